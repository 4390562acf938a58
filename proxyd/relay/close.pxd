# How a connection ends.
#
# What is passed on, and when (the promises of the man page):
#
#   EOF at X            everything before it, then SHUT_WR to Y; the other half goes on
#   both ended          both are closed
#   X reset or failed   what could still be read from X goes to Y; then Y lingers until its send
#                       queue is empty, or has not moved for STALLED_MS, and is reset, whether or
#                       not it was sent a clean end before
#   X cannot be         what X had already sent goes to Y, to the end; then as above. EPIPE from a
#   written             UNIX socket is the reset that such sockets have
#   X, a UNIX socket,   as above, but Y is closed, as by a close(2) of X. If it has sent X anything
#   closed              since, it is reset
#
# What Y was sent stays readable to it, for a reset takes nothing from the queue of its receiver. A
# lingering connection has only Y left; X is closed.

from proxyd.relay.bookkeeping cimport (
    connection_set_timer, connections_decrement, worker_remove_connection,
)
from proxyd.relay.endpoint cimport (
    endpoint_failed, endpoint_lost, endpoint_recv, endpoint_unguard, endpoint_unregister,
)
from proxyd.relay.half cimport half_abandon, half_drop, half_held
from proxyd.relay.list cimport list_append, list_empty, list_remove
from proxyd.relay.pages cimport connection_leave_pages, connection_warn_pages
from proxyd.relay.quarantine cimport quarantine_put
from proxyd.relay.records cimport ENDING_NORMAL, ENDING_RESET, REPORT_BEGINS, REPORT_ENDS
from proxyd.relay.rights cimport rights_may_close
from proxyd.relay.row cimport row_new
from proxyd.relay.self_connect cimport self_connect_remove
from proxyd.relay.slate cimport slot_record
from proxyd.relay.socket cimport socket_end_copies, socket_reset, socket_reset_copies
from proxyd.relay.source cimport source_leave
from proxyd.relay.strike cimport connection_strike
from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, AF_UNIX, EAGAIN, EINTR, SHUT_RDWR, SHUT_WR, SIOCOUTQ, atomic_add, close,
    counter_add, errno, fence, free, hint_get, int64_t, ioctl, shutdown, uint64_t,
)
from proxyd.relay.types cimport (
    CLOSED, CONNECTED, DEAD, DRAINING, KIND_CLIENT, LINGERING, RIGHTS_AHEAD, SHUT, Connection,
    Endpoint, Half, Link, Worker,
)
from proxyd.relay.upstream cimport connection_count_end

cdef enum:
    DRAIN_BYTES = 1024 * 1024  # most that is read from a side and thrown away
    STALLED_MS = 5000          # a send queue that has not moved for this long is given up
    LINGER_FIRST_MS = 1        # until the first look at a send queue; it doubles with each …
    LINGER_MAX_MS = 128        # … up to this
    RESET_OWED = 2             # reset a side, unless all that it is still sent is complete


# ── what follows from a pump ─────────────────────────────────────────────────────────────────────

cdef inline void connection_settle(Worker *worker, Connection *c) noexcept nogil:
    """The one place where the end of a connection is decided."""
    half_settle(worker, c, &c.up, &c.down)
    half_settle(worker, c, &c.down, &c.up)
    if c.state != CONNECTED or c.up.state < SHUT and c.down.state < SHUT:
        return
    if c.up.state == SHUT and c.down.state == SHUT:
        connection_close(worker, c, ENDING_NORMAL, False)
    elif c.up.state == DEAD and c.down.state == DEAD:
        connection_close(worker, c, ENDING_RESET, c.client.error != 0 or c.target.error != 0)
    elif c.up.state == SHUT and c.down.state == DEAD:
        connection_linger(worker, c, &c.target, &c.client)
    elif c.down.state == SHUT and c.up.state == DEAD:
        connection_linger(worker, c, &c.client, &c.target)
    elif c.timer_ms == 0 and (
            c.client.error != 0 or c.target.error != 0 or c.drained >= DRAIN_BYTES):
        # A side has failed, or is gone while the other has sent much in vain; and the other does
        # not take its last words. Watch whether they move.
        c.progress_ms = worker.ctx.now_ms
        c.recheck_ms = LINGER_MAX_MS
        connection_set_timer(worker, c, worker.ctx.now_ms + c.recheck_ms)


cdef inline void half_settle(
    Worker *worker, Connection *c, Half *half, Half *other
) noexcept nogil:
    """Draw the conclusions from what the pumps have found, for src → dst."""
    if c.state != CONNECTED:
        return
    if half.dst.gone:
        half_abandon(half)
    elif half.state == DRAINING and half_held(half) == 0:
        if half.src.error != 0:
            connection_linger(worker, c, half.dst, half.src)
        else:
            half_finish(half, other)


cdef inline void half_finish(Half *half, Half *other) noexcept nogil:
    """src has ended cleanly and everything is delivered: pass the end on.

    If the other half is over, closing both sides says the same with a system call less, since a
    UNIX socket does not linger. If the end cannot be passed on, the connection has failed: dst
    would wait for it for ever."""
    half.state = SHUT
    half_note_end(half)
    endpoint_unguard(half.dst)  # before it: from then on a reset would cut what is complete
    if other.state == DEAD and half.dst.family == AF_UNIX:
        return
    if other.state != SHUT and shutdown(half.dst.fd, SHUT_WR) < 0:
        endpoint_lost(half.dst, errno)


cdef inline void half_note_end(Half *half) noexcept nogil:
    """The slate tells of an end that is about to be passed on: afterwards the positions that the
    kernel tells are of no use."""
    if half.kept != NULL:
        slot_record((<Connection *>half.dst.connection).slot).halves[half.direction] = SHUT
        fence()


# ── linger ───────────────────────────────────────────────────────────────────────────────────────

cdef inline void connection_linger(
    Worker *worker, Connection *c, Endpoint *last, Endpoint *other
) noexcept nogil:
    """`other` has nothing more to give or take: close it, and `last` when it may be closed.

    A side that has failed may live on, if the kernel had no memory: it must not see a clean end."""
    endpoint_close(worker, other, other.error != 0)
    self_connect_remove(worker.self_connects, &c.self_connect)
    half_drop(&c.up)
    half_drop(&c.down)
    list_remove(&c.ready)
    c.state = LINGERING
    c.last = last
    c.reset = other.error != 0 or other.refused
    c.progress_ms = worker.ctx.now_ms
    c.recheck_ms = LINGER_FIRST_MS
    linger_step(worker, c)


cdef inline void linger_step(Worker *worker, Connection *c) noexcept nogil:
    """Close the last side if it is time; otherwise look again later, less and less often."""
    if linger_over(worker, c):
        connection_close(worker, c, ENDING_RESET if c.reset else ENDING_NORMAL, c.reset)
        return
    connection_check_rights(worker, c)
    connection_set_timer(worker, c, worker.ctx.now_ms + c.recheck_ms)
    c.recheck_ms = min(2 * c.recheck_ms, LINGER_MAX_MS)


cdef inline bint linger_over(Worker *worker, Connection *c) noexcept nogil:
    """Whether the last side may be closed.

    What it sends meanwhile is thrown away, since it may have to say all of that before it reads.
    But then it is to be told that it was not heard, by a reset."""
    cdef int64_t queue
    if c.last.error != 0:
        return True
    if c.last.family == AF_UNIX:
        c.last.readable = 1  # unread input would turn its end into an error
    if endpoint_drain(worker, c, c.last):
        if c.last.error != 0:
            return True  # perhaps for want of memory: it may live on, and is to be reset
        if endpoint_was_sent_an_end(c.last):
            c.reset = False
            return True
    c.reset |= c.drained > 0
    queue = endpoint_queue(c.last)
    return queue == 0 or connection_is_stalled(worker, c, <uint64_t>queue)


cdef inline bint endpoint_drain(Worker *worker, Connection *c, Endpoint *end) noexcept nogil:
    """Throw away what it sends, up to DRAIN_BYTES. True once it has ended."""
    cdef ssize_t size
    connection_strike(c)
    while end.readable and c.drained < DRAIN_BYTES:
        size = endpoint_recv(end, worker.ctx.buffer, worker.ctx.stream_unit, NULL)
        if size > 0:
            c.drained += <size_t>size
        elif size < 0 and errno != EAGAIN and errno != EINTR:
            end.readable = 0
            endpoint_failed(end, errno)
    return end.ended or end.error != 0


cdef inline bint connection_is_stalled(
    Worker *worker, Connection *c, uint64_t queue
) noexcept nogil:
    """Whether the queue towards the last side has not moved for STALLED_MS."""
    if queue != c.queue:
        c.queue = queue
        c.progress_ms = worker.ctx.now_ms
    return worker.ctx.now_ms - c.progress_ms >= STALLED_MS


cdef inline void connection_check_rights(Worker *worker, Connection *c) noexcept nogil:
    """If descriptors come next, this worker must not read any more: after the batch the connection
    goes into quarantine."""
    if c.client.rights.state == RIGHTS_AHEAD or c.target.rights.state == RIGHTS_AHEAD:
        list_remove(&c.to_quarantine)
        list_append(&worker.to_quarantine, &c.to_quarantine)


# ── close ────────────────────────────────────────────────────────────────────────────────────────

cdef inline void connection_close(
    Worker *worker, Connection *c, int ending, int reset
) noexcept nogil:
    """Close whatever is left of it, both sides in the same way; `reset` may be RESET_OWED."""
    cdef int reports = hint_get(&worker.gauges.reports)
    if reports & REPORT_BEGINS and reports & REPORT_ENDS:
        c.row = row_new(c, worker.number)
    endpoint_close(worker, &c.client, reset)
    endpoint_close(worker, &c.target, reset)
    connection_unlink(worker, c)
    connection_leave_pages(worker, c)
    c.ending = ending
    connection_count_end(c)
    counter_add(&worker.ends[ending], 1)
    list_append(&worker.ended if reports & REPORT_ENDS else &worker.dead, &c.live)
    if not c.has_orphans:
        source_leave(c.origin.source)
    worker_remove_connection(worker)
    connections_decrement(worker)


cdef inline void connection_unlink(Worker *worker, Connection *c) noexcept nogil:
    """Take it out of all lists, and drop what it holds."""
    list_remove(&c.live)
    list_remove(&c.timed)
    list_remove(&c.ready)
    list_remove(&c.to_quarantine)
    list_remove(&c.member)
    list_remove(&c.entering)
    self_connect_remove(worker.self_connects, &c.self_connect)
    half_drop(&c.up)
    half_drop(&c.down)
    c.state = CLOSED


cdef inline void endpoint_close(Worker *worker, Endpoint *end, int reset) noexcept nogil:
    """The one way in which the socket of a connection ends. A page may have it as well (pages.pxd):
    then close(2) alone would say nothing to its peer."""
    cdef Connection *c = <Connection *>end.connection
    if end.fd < 0:
        return
    connection_strike(c)
    endpoint_unregister(&worker.ctx, end)
    if not endpoint_may_close(end):
        connection_warn_pages(worker, c)
        endpoint_orphan(worker, end)
    elif reset and not (reset == RESET_OWED and endpoint_finishes(end)):
        if c.slot != NULL:
            socket_reset_copies(end.fd, end.family)
        socket_reset(end.fd, end.family)
    else:
        if not endpoint_was_sent_an_end(end):
            endpoint_unguard(end)
        if c.slot != NULL:
            socket_end_copies(end.fd, end.family)
        close(end.fd)
    end.fd = -1


cdef inline bint endpoint_finishes(const Endpoint *end) noexcept nogil:
    """Whether the kernel is still sending it what is complete, up to the end."""
    return endpoint_was_sent_an_end(end) and endpoint_queue(end) > 0


cdef inline bint endpoint_was_sent_an_end(const Endpoint *end) noexcept nogil:
    cdef Connection *c = <Connection *>end.connection
    return (c.down.state if end.kind == KIND_CLIENT else c.up.state) == SHUT


cdef inline int64_t endpoint_queue(const Endpoint *end) noexcept nogil:
    """Bytes that its peer has not acknowledged; 0 for AF_UNIX, whose peer has them already."""
    cdef int size = 0
    if end.family != AF_INET and end.family != AF_INET6:
        return 0
    if ioctl(end.fd, SIOCOUTQ, &size) < 0:
        return 0
    return size


cdef inline bint endpoint_may_close(Endpoint *end) noexcept nogil:
    """Whether close(2) cannot wait for descriptors that were sent to it: see rights.pxd."""
    return end.family != AF_UNIX or end.ended or rights_may_close(&end.rights, end.fd)


cdef inline void endpoint_orphan(Worker *worker, Endpoint *end) noexcept nogil:
    """Its peer sees the end now; the quarantine closes the socket once the connection is freed.
    Until then it keeps its place in the limit, but it is no connection any more: neither a drain
    nor an idle exit waits for it."""
    cdef Connection *c = <Connection *>end.connection
    shutdown(end.fd, SHUT_RDWR)
    end.orphan_fd = end.fd
    if not c.has_orphans:
        c.has_orphans = True
        atomic_add(&worker.gauges.in_quarantine, 1)


# ── free ─────────────────────────────────────────────────────────────────────────────────────────

cdef inline void connections_free(Link *connections) noexcept nogil:
    cdef Connection *c
    while not list_empty(connections):
        c = <Connection *>connections.next.owner
        list_remove(&c.live)
        connection_free(c)


cdef inline void connection_free(Connection *c) noexcept nogil:
    free(c.row)
    c.row = NULL
    half_drop(&c.up)
    half_drop(&c.down)
    if c.has_orphans:
        quarantine_put(c.quarantine, &c.live)
    else:
        free(c)
