# The pump: it moves the bytes of one direction.
#
# Sockets are registered once, edge-triggered. So the kernel says once that a socket has become
# readable or writable, and the endpoint remembers it until a call proves the contrary:
#
#   readable  ends with EAGAIN from an empty socket, or with a short recv: what comes after that
#             raises a new edge. A short recv proves nothing if the end or an urgent mark may have
#             cut it short (`ending`, `urgent`: announced with the same edge), or, on a UNIX socket,
#             the bounds of a message that came with fds or credentials (endpoint_recv).
#   writable  ends with EAGAIN or a short send; both make the kernel announce the next free space.
#
# The states of a half:
#
#   FLOWING ──EOF or error at src──▶ DRAINING ──nothing held any more──▶ SHUT (end passed on)
#      └───────────── dst cannot be written any more ────────────▶ DEAD (what is held is dropped)
#
# The pump itself goes as far as DRAINING and DEAD; the end is passed on in close.pxd.
#
# errno × call → what the pump does:
#
#                       recv, splice in             send, splice out
#   EAGAIN              not readable                not writable
#   EINTR               tried again                 tried again
#   EINVAL ENOSYS       this half copies from       what the pipe holds is read back and sent
#   EPERM EOPNOTSUPP    now on
#   anything else       src has failed: DRAINING    dst is gone: DEAD; src's last words go on in
#                                                   the other half

from proxyd.relay.endpoint cimport (
    endpoint_blocked, endpoint_failed, endpoint_grow_sndbuf, endpoint_is_plain, endpoint_lost,
    endpoint_recv,
)
from proxyd.relay.half cimport half_abandon, half_held, half_keep, unsent_free
from proxyd.relay.pipe cimport pipe_get, pipe_put
from proxyd.relay.sys cimport (
    AF_UNIX, AF_VSOCK, EAGAIN, EINTR, EINVAL, ENOMEM, ENOSYS, EOPNOTSUPP, EPERM, EPIPE,
    MSG_DONTWAIT, MSG_NOSIGNAL, SPLICE_F_MOVE, SPLICE_F_NONBLOCK, counter_add, errno, read, send,
    splice,
)
from proxyd.relay.types cimport DRAINING, FLOWING, Half, PumpContext

cdef enum:
    COPY_UNIT = 64 * 1024      # most bytes asked of one recv, except from a stream …
    FIRST_UNIT = 16 * 1024     # … and while connecting: the bytes are kept if that fails
    STREAM_READS = 2           # this number of full reads in a row makes a stream …
    STREAM_SMALL = 16 * 1024   # … and reads below this size …
    STREAM_MISSES = 4          # … make it none, after this number in a row
    PUMP_BUDGET = 1024 * 1024  # bytes that one pump may move before the others have their turn


cdef inline bint half_pump(PumpContext *ctx, Half *half) noexcept nogil:
    """Move bytes until one side has none, the other takes none, or the budget is spent.

    True: the budget is spent and there is more to do."""
    cdef size_t budget = PUMP_BUDGET
    cdef size_t size
    while half.state == FLOWING or half.state == DRAINING:
        if half.dst.gone:
            half_abandon(half)
            break
        if half_held(half) > 0:
            if not half.dst.writable:
                break
            half_flush(ctx, half)
            continue
        if half.state == DRAINING or not half.src.readable:
            break
        if budget == 0:
            return True
        if half.streaming and half_splices(ctx, half):
            size = <size_t>half_splice(ctx, half)
        else:
            size = <size_t>half_copy(
                ctx, half, ctx.stream_unit if half.streaming else ctx.copy_unit)
        budget -= min(size, budget)
    return False


# ── reading ──────────────────────────────────────────────────────────────────────────────────────

cdef inline bint half_splices(const PumpContext *ctx, const Half *half) noexcept nogil:
    """Whether a stream goes by splice in this direction (otherwise by large copies).

    Measured: out of a UNIX socket into TCP copying is cheaper, everywhere else splicing is."""
    if not ctx.may_splice or half.copy_only or half.src.urgent:
        return False
    if not endpoint_is_plain(half.src):
        return False
    if half.src.family == AF_VSOCK or half.dst.family == AF_VSOCK:
        return False  # GCOVR_EXCL_LINE - where the kernel has no VSOCK loopback
    return half.dst.family == AF_UNIX or half.src.family != AF_UNIX


cdef inline ssize_t half_splice(PumpContext *ctx, Half *half) noexcept nogil:
    """Fill an empty pipe from src and empty it into dst. Returns as half_copy().

    Only an empty pipe is filled: then EAGAIN can only mean that the socket is empty, and a pipe
    that is out of slots is never asked to take more. A result of 0 is not the end by itself, for
    splice also returns it at an urgent mark with the end behind it. recv tells the two apart."""
    cdef ssize_t size
    cdef int error
    if half.pipe.rd < 0 and pipe_get(&ctx.pool, &half.pipe, ctx.now_ms) < 0:
        return half_copy(ctx, half, ctx.stream_unit)
    size = splice(half.src.fd, NULL, half.pipe.wr, NULL, half.pipe.capacity,
                  SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
    if size > 0:
        half.moved += <size_t>size
        half.pipe.filled = <size_t>size
        half_classify(half, <size_t>size, half.pipe.capacity)
        half_splice_out(ctx, half)
        return size
    error = errno
    pipe_put(&ctx.pool, &half.pipe)
    if size == 0:
        return half_copy(ctx, half, ctx.stream_unit)
    if error == EAGAIN:
        half.src.readable = 0
    elif splice_refused(error):
        half.copy_only = 1
        return half_copy(ctx, half, ctx.stream_unit)
    elif error != EINTR:
        half_read_failed(half, error)
    return 0


cdef inline ssize_t half_copy(PumpContext *ctx, Half *half, size_t unit) noexcept nogil:
    """One recv and one send. Bytes taken; 0 at the end, or if there are none now."""
    cdef ssize_t size = endpoint_recv(half.src, ctx.buffer, unit)
    cdef ssize_t sent
    if size < 0:
        if errno != EAGAIN and errno != EINTR:
            half_read_failed(half, errno)
        return 0
    if size == 0:
        half.state = DRAINING
        return 0
    half.moved += <size_t>size
    half_classify(half, <size_t>size, unit)
    sent = half_send(ctx, half, ctx.buffer, <size_t>size)
    if sent < 0:
        half.lost += <size_t>size
    elif sent < size and half_keep(half, ctx.buffer + sent, <size_t>(size - sent)) < 0:
        half.lost += <size_t>(size - sent)
        half_broke(half)
    return size


cdef inline void half_classify(Half *half, size_t size, size_t asked) noexcept nogil:
    """A few full reads in a row make a stream, a few small ones make it none."""
    if not half.streaming:
        half.full_reads = half.full_reads + 1 if size == asked else 0
        half.streaming = half.full_reads >= STREAM_READS
        half.small_reads = 0
        if half.streaming and not half.sndbuf_grown:
            half.sndbuf_grown = 1
            endpoint_grow_sndbuf(half.dst)
        return
    half.small_reads = half.small_reads + 1 if size < STREAM_SMALL else 0
    if half.small_reads >= STREAM_MISSES:
        half.streaming = half.full_reads = 0


cdef inline void half_read_failed(Half *half, int error) noexcept nogil:
    """src is gone, and nothing more can be read from it."""
    endpoint_failed(half.src, error)
    half.src.readable = 0
    half.state = DRAINING


# ── writing ──────────────────────────────────────────────────────────────────────────────────────

cdef inline void half_flush(PumpContext *ctx, Half *half) noexcept nogil:
    """Give dst what is held. Unsent bytes go first: they are older than anything in the pipe."""
    if half.unsent != NULL:
        half_send_unsent(ctx, half)
    if half.unsent == NULL and half.pipe.filled > 0:
        if half.copy_only:
            half_unpipe(ctx, half)
        else:
            half_splice_out(ctx, half)


cdef inline void half_splice_out(PumpContext *ctx, Half *half) noexcept nogil:
    """Empty the pipe into dst. Asks for exactly what is inside: a larger length may be taken for a
    promise of more to come, and the last segment is then held back."""
    cdef ssize_t moved
    cdef int error
    while half.pipe.filled > 0:
        moved = splice(half.pipe.rd, NULL, half.dst.fd, NULL, half.pipe.filled,
                       SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
        if moved <= 0:
            error = errno if moved < 0 else EPIPE
            if error == EAGAIN:
                endpoint_blocked(ctx, half.dst)
            elif splice_refused(error):
                half_unpipe(ctx, half)
            elif error != EINTR:
                half_write_failed(half, error)
            return
        half.pipe.filled -= min(<size_t>moved, half.pipe.filled)
        counter_add(&ctx.counters.forwarded[half.direction], <size_t>moved)
        counter_add(&ctx.counters.spliced, <size_t>moved)
    pipe_put(&ctx.pool, &half.pipe)


cdef inline void half_unpipe(PumpContext *ctx, Half *half) noexcept nogil:
    """dst refuses splice: read back what the pipe holds, and copy from now on."""
    cdef ssize_t size = read(half.pipe.rd, ctx.buffer, ctx.stream_unit)
    half.copy_only = 1
    if size <= 0 or half_keep(half, ctx.buffer, <size_t>size) < 0:
        half_broke(half)  # GCOVR_EXCL_LINE - two failures at once: no splice, and no memory
        return  # GCOVR_EXCL_LINE - the same
    half.pipe.filled -= min(<size_t>size, half.pipe.filled)
    if half.pipe.filled == 0:
        pipe_put(&ctx.pool, &half.pipe)
    half_send_unsent(ctx, half)


cdef inline void half_send_unsent(PumpContext *ctx, Half *half) noexcept nogil:
    cdef ssize_t sent = half_send(
        ctx, half, half.unsent + half.unsent_start, half.unsent_end - half.unsent_start)
    if sent <= 0:
        return
    half.unsent_start += <size_t>sent
    if half.unsent_start == half.unsent_end:
        unsent_free(half)


cdef inline ssize_t half_send(
    PumpContext *ctx, Half *half, const char *data, size_t size
) noexcept nogil:
    """Bytes that dst took, 0 if it takes none now, -errno if it is gone."""
    cdef ssize_t sent = send(half.dst.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)
    cdef int error
    if sent < 0:
        error = errno
        if error == EINTR:
            return 0
        if error != EAGAIN:
            half_write_failed(half, error)
            return -error
        sent = 0
    if <size_t>sent < size:
        endpoint_blocked(ctx, half.dst)
    counter_add(&ctx.counters.forwarded[half.direction], <size_t>sent)
    counter_add(&ctx.counters.copied, <size_t>sent)
    return sent


cdef inline void half_write_failed(Half *half, int error) noexcept nogil:
    endpoint_lost(half.dst, error)
    half_abandon(half)


cdef inline void half_broke(Half *half) noexcept nogil:
    """Bytes were lost for want of memory: neither side may take this for a clean end."""
    endpoint_failed(half.src, ENOMEM)
    endpoint_failed(half.dst, ENOMEM)
    half_abandon(half)


cdef inline bint splice_refused(int error) noexcept nogil:
    """Whether the kernel does not splice such a socket at all."""
    return error == EINVAL or error == ENOSYS or error == EPERM or error == EOPNOTSUPP
