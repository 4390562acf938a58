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
from proxyd.relay.half cimport half_abandon, half_delivered, half_held, half_keep, half_took_unsent
from proxyd.relay.pages cimport pipe_keep
from proxyd.relay.pipe cimport pipe_get, pipe_put
from proxyd.relay.slate cimport intent_close, intent_open, intent_send
from proxyd.relay.slate_types cimport INTENT_COPY, INTENT_FLUSH, INTENT_SPLICE, Intent
from proxyd.relay.strike cimport half_strike
from proxyd.relay.sys cimport (
    AF_UNIX, AF_VSOCK, EAGAIN, EINTR, EINVAL, ENOMEM, ENOSYS, EOPNOTSUPP, EPERM, EPIPE,
    MSG_DONTWAIT, MSG_NOSIGNAL, SPLICE_F_MOVE, SPLICE_F_NONBLOCK, counter_add, errno, fence, read,
    send, splice,
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
    if half.kept != NULL and ctx.intent == NULL:
        half_strike(half)
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
    if half_get_pipe(ctx, half) < 0:
        return half_copy(ctx, half, ctx.stream_unit)
    size = half_splice_in(ctx, half)
    if size > 0:
        half_classify(half, <size_t>size, half.pipe.capacity)
        half_splice_out(ctx, half)
        return size
    half_put_pipe(ctx, half)
    half.copy_only |= splice_refused(-<int>size)
    if size == 0 or half.copy_only:
        return half_copy(ctx, half, ctx.stream_unit)
    return 0


cdef inline ssize_t half_splice_in(PumpContext *ctx, Half *half) noexcept nogil:
    """Bytes that are in the pipe now, 0 or -errno."""
    cdef Intent *intent = NULL
    cdef ssize_t size
    if half.kept != NULL and half.src.family == AF_UNIX:
        intent = intent_open(ctx, half, INTENT_SPLICE, 0)
    size = splice(half.src.fd, NULL, half.pipe.wr, NULL, half.pipe.capacity,
                  SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
    if size > 0:
        half.moved += <size_t>size
        half.pipe.filled = <size_t>size
    elif size < 0:
        size = -errno
        if size == -EAGAIN:
            half.src.readable = 0
        elif size != -EINTR and not splice_refused(-<int>size):
            half_read_failed(half, -<int>size)
    if intent != NULL:
        intent_close(intent, half)
    return size


cdef inline ssize_t half_copy(PumpContext *ctx, Half *half, size_t unit) noexcept nogil:
    """One recv and one send. Bytes taken; 0 at the end, or if there are none now."""
    cdef Intent *intent = NULL
    cdef ssize_t size
    if half.kept != NULL:
        intent = intent_open(ctx, half, INTENT_COPY, half.moved + half.given)
    size = endpoint_recv(half.src, ctx.buffer, unit, intent)
    if size > 0:
        half.moved += <size_t>size
        half_classify(half, <size_t>size, unit)
        half_pass_on(ctx, half, <size_t>size, intent)
    elif size == 0:
        half.state = DRAINING
    elif errno != EAGAIN and errno != EINTR:
        half_read_failed(half, errno)
    if intent != NULL:
        intent_close(intent, half)
    return max(size, <ssize_t>0)


cdef inline void half_pass_on(
    PumpContext *ctx, Half *half, size_t size, Intent *intent
) noexcept nogil:
    """Send what has just been taken, and keep what is left of it."""
    cdef ssize_t sent = half_send(ctx, half, ctx.buffer, size, intent)
    if sent < 0:
        half.lost += size
    elif <size_t>sent < size and half_keep(half, ctx.buffer + sent, size - <size_t>sent) < 0:
        half.lost += size - <size_t>sent
        half_broke(half)


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
    cdef Intent *intent = NULL
    cdef ssize_t moved
    cdef int error = 0
    if half.kept != NULL and half.dst.family == AF_UNIX:
        intent = intent_open(ctx, half, INTENT_SPLICE, 0)
    while half.pipe.filled > 0:
        moved = splice(half.pipe.rd, NULL, half.dst.fd, NULL, half.pipe.filled,
                       SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
        if moved <= 0:
            error = errno if moved < 0 else EPIPE
            break
        half.pipe.filled -= min(<size_t>moved, half.pipe.filled)
        counter_add(&ctx.counters.forwarded[half.direction], <size_t>moved)
        counter_add(&ctx.counters.spliced, <size_t>moved)
    if error == EAGAIN:
        endpoint_blocked(ctx, half.dst)
    elif error != 0 and error != EINTR and not splice_refused(error):
        half_write_failed(half, error)
    if intent != NULL:
        intent_close(intent, half)
    if error == 0:
        half_put_pipe(ctx, half)
    elif splice_refused(error):
        half_unpipe(ctx, half)


cdef inline void half_unpipe(PumpContext *ctx, Half *half) noexcept nogil:
    """dst refuses splice: read back what the pipe holds, and copy from now on. No intent says so.
    """
    cdef ssize_t size
    half_strike(half)
    size = read(half.pipe.rd, ctx.buffer, ctx.stream_unit)
    half.copy_only = 1
    if size <= 0 or half_keep(half, ctx.buffer, <size_t>size) < 0:
        half_broke(half)  # GCOVR_EXCL_LINE - two failures at once: no splice, and no memory
        return  # GCOVR_EXCL_LINE - the same
    half.pipe.filled -= min(<size_t>size, half.pipe.filled)
    if half.pipe.filled == 0:
        half_put_pipe(ctx, half)
    half_send_unsent(ctx, half)


cdef inline void half_send_unsent(PumpContext *ctx, Half *half) noexcept nogil:
    cdef Intent *intent = NULL
    cdef ssize_t sent
    if half.kept != NULL:
        intent = intent_open(ctx, half, INTENT_FLUSH, half_delivered(half))
    sent = half_send(ctx, half, half.unsent + half.unsent_start,
                     half.unsent_end - half.unsent_start, intent)
    if sent > 0:
        half_took_unsent(half, <size_t>sent)
    if intent != NULL:
        intent_close(intent, half)


cdef inline ssize_t half_send(
    PumpContext *ctx, Half *half, const char *data, size_t size, Intent *intent
) noexcept nogil:
    """Bytes that dst took, 0 if it takes none now, -errno if it is gone."""
    cdef ssize_t sent
    cdef int error
    if intent != NULL and half.dst.family == AF_UNIX:
        sent = intent_send(intent, half.dst.fd, data, size)
    else:
        sent = send(half.dst.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)
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


cdef inline int half_get_pipe(PumpContext *ctx, Half *half) noexcept nogil:
    """An empty pipe; 0 or -errno. One of a kept half outlives this process, and the slate tells
    which it is."""
    cdef int failure = 0
    if half.pipe.rd < 0:
        failure = pipe_get(&ctx.pool, &half.pipe, ctx.now_ms)
    if half.kept == NULL or failure < 0:
        return failure
    if half.pipe.number == 0:
        failure = pipe_keep(ctx, &half.pipe)
    if failure < 0:
        pipe_put(&ctx.pool, &half.pipe)
        return failure
    fence()
    half.kept.pipe = half.pipe.number
    fence()
    return 0


cdef inline void half_put_pipe(PumpContext *ctx, Half *half) noexcept nogil:
    """Give an empty pipe up."""
    if half.kept != NULL:
        fence()
        half.kept.taken = half.moved + half.given
        half.kept.pipe = 0
        fence()
    pipe_put(&ctx.pool, &half.pipe)


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
