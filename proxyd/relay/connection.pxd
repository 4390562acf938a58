# What happens to a connection, event by event: its connect ends, bytes move, its timer expires.
#
# Nothing is freed while a batch of events is being worked on, since a later event of the batch may
# still point to it: the dead are freed last (worker_turn).

from proxyd.relay.bookkeeping cimport connection_set_timer, worker_remove_connection
from proxyd.relay.close cimport (
    connection_check_rights, connection_close, connection_is_stalled, connection_settle,
    endpoint_close, endpoint_drain, endpoint_queue, linger_step,
)
from proxyd.relay.endpoint cimport endpoint_failed, endpoint_unregister
from proxyd.relay.half cimport half_held
from proxyd.relay.list cimport list_append, list_remove
from proxyd.relay.pump cimport half_pump
from proxyd.relay.records cimport ENDING_CLIENT_GONE, ENDING_RESET
from proxyd.relay.self_connect cimport self_connect_remove
from proxyd.relay.socket cimport socket_self_connected, socket_take_error
from proxyd.relay.strike cimport connection_strike
from proxyd.relay.sys cimport (
    AF_UNIX, AF_VSOCK, ECONNREFUSED, ECONNRESET, ELOOP, EPIPE, EPOLLERR, EPOLLHUP, EPOLLIN,
    EPOLLOUT, EPOLLPRI, EPOLLRDHUP, ETIMEDOUT, MSG_DONTWAIT, MSG_PEEK, getpeername, recv, sockaddr,
    sockaddr_storage, socklen_t, uint32_t, uint64_t,
)
from proxyd.relay.types cimport (
    CLOSED, CONNECTED, CONNECTING, DEAD, KIND_CLIENT, LINGERING, SHUT, Connection, Endpoint, Half,
    Worker,
)
from proxyd.relay.upstream cimport connection_count_connect


# ── timers ───────────────────────────────────────────────────────────────────────────────────────

cdef inline void connection_timer_expired(Worker *worker, Connection *c) noexcept nogil:
    if c.state == CONNECTING:
        connect_expired(worker, c)
    elif c.state == CONNECTED:
        connection_check_stall(worker, c)
    elif c.state == LINGERING:
        linger_step(worker, c)


cdef inline void connect_expired(Worker *worker, Connection *c) noexcept nogil:
    """The time for the connect is over. A target that has accepted just now is kept."""
    cdef sockaddr_storage peer
    cdef socklen_t size = sizeof(peer)
    if getpeername(c.target.fd, <sockaddr *>&peer, &size) == 0:
        connection_event(worker, &c.target, EPOLLOUT)
    else:
        connect_failed(worker, c, ETIMEDOUT)


cdef inline void connection_check_stall(Worker *worker, Connection *c) noexcept nogil:
    """A side is gone, and its last words wait for a reader: give up if nothing moves."""
    cdef Half *half = &c.down if c.up.state == DEAD else &c.up
    cdef uint64_t queue = half.moved + half_held(half) + <uint64_t>endpoint_queue(half.dst)
    if connection_is_stalled(worker, c, queue):
        connection_close(worker, c, ENDING_RESET, True)
    else:
        connection_set_timer(worker, c, worker.ctx.now_ms + c.recheck_ms)


# ── events ───────────────────────────────────────────────────────────────────────────────────────

cdef inline void connection_event(Worker *worker, Endpoint *end, uint32_t events) noexcept nogil:
    cdef Connection *c = <Connection *>end.connection
    if end.fd < 0 or c.state == CLOSED:
        return
    endpoint_mark_ready(c, end, events)
    if c.state == CONNECTING:
        connecting_event(worker, c, end, events)
    if c.state == CONNECTED:
        connection_advance(worker, c)
    elif c.state == LINGERING:
        linger_step(worker, c)


cdef inline void endpoint_mark_ready(Connection *c, Endpoint *end, uint32_t events) noexcept nogil:
    """Remember what an edge has said."""
    cdef int error
    cdef Half *towards = &c.down if end.kind == KIND_CLIENT else &c.up
    if events & EPOLLERR or c.state == CONNECTING and events & (EPOLLHUP | EPOLLRDHUP):
        connection_strike(c)  # reading clears it
        error = socket_take_error(end.fd)
        if error != 0:
            endpoint_failed(end, error)
    if events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR | EPOLLPRI):
        end.readable = 1
    if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        end.ending = 1
    if events & EPOLLPRI:
        end.urgent = 1
    if events & (EPOLLOUT | EPOLLHUP | EPOLLERR):
        end.writable = 1
    if events & EPOLLHUP and end.family == AF_UNIX and towards.state != SHUT:
        connection_strike(c)
        end.gone = 1


cdef inline void connection_advance(Worker *worker, Connection *c) noexcept nogil:
    """Pump both halves as far as they go, then settle what follows from that."""
    cdef bint more = half_pump(&worker.ctx, &c.up)
    more |= half_pump(&worker.ctx, &c.down)
    # What the second pump has found may free the first: after a failed write there are last words
    # to read.
    if c.client.gone and not more:
        more = half_pump(&worker.ctx, &c.up)
    connection_discard_input(worker, c)
    connection_settle(worker, c)
    if c.state == CLOSED:
        return
    connection_check_rights(worker, c)
    connection_mark_active(worker, c)
    if more and c.state == CONNECTED:
        list_remove(&c.ready)
        list_append(&worker.ready, &c.ready)


cdef inline void connection_discard_input(Worker *worker, Connection *c) noexcept nogil:
    """Throw away what a side sends to one that is gone, so that it comes to read the last words of
    that one: it may be waiting for its own to be taken first."""
    if c.up.state == DEAD:
        endpoint_drain(worker, c, &c.client)
    elif c.down.state == DEAD:
        endpoint_drain(worker, c, &c.target)


cdef inline void connection_mark_active(Worker *worker, Connection *c) noexcept nogil:
    """Note the time, if bytes have moved since the last look."""
    cdef uint64_t moved = c.up.moved + c.down.moved
    cdef uint64_t held = half_held(&c.up) + half_held(&c.down)
    if moved - held == c.moved:
        return
    c.moved = moved - held
    c.active_ms = worker.ctx.now_ms
    list_remove(&c.live)
    list_append(&worker.live, &c.live)


# ── the end of a connect ─────────────────────────────────────────────────────────────────────────

cdef inline void connecting_event(
    Worker *worker, Connection *c, Endpoint *end, uint32_t events
) noexcept nogil:
    """A target that accepted and then reset has been reached: the client is to see that.

    A client that is gone is dropped, unless it has ended cleanly and said something: then that is
    still delivered. The target may have accepted, and sees how the client left."""
    if end.kind == KIND_CLIENT:
        if end.gone and (end.error != 0 or not client_has_spoken(c)):
            connection_close(worker, c, ENDING_CLIENT_GONE, end.error != 0)
        return
    if end.error != 0 and not target_was_reached(c, end.error):
        connect_failed(worker, c, end.error)
    elif events & (EPOLLOUT | EPOLLERR | EPOLLHUP | EPOLLRDHUP):
        connect_done(worker, c)


cdef inline bint client_has_spoken(const Connection *c) noexcept nogil:
    cdef char byte
    return c.up.moved > 0 or recv(c.client.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0


cdef inline void connect_done(Worker *worker, Connection *c) noexcept nogil:
    list_remove(&c.timed)
    c.timer_ms = 0
    if c.self_connect.self_possible and socket_self_connected(c.target.fd):
        connect_failed(worker, c, ELOOP)
        return
    c.state = CONNECTED
    connection_count_connect(c)


cdef inline void connect_failed(Worker *worker, Connection *c, int error) noexcept nogil:
    """Give the client back, with the bytes already taken from it. The connection counts until the
    policy has fetched it, so that no other client is let in for it meanwhile."""
    endpoint_unregister(&worker.ctx, &c.client)
    endpoint_close(worker, &c.target, True)  # it may have accepted, but was sent nothing
    list_remove(&c.live)
    list_remove(&c.member)
    list_remove(&c.entering)
    list_remove(&c.timed)
    self_connect_remove(worker.self_connects, &c.self_connect)
    c.state = CLOSED
    c.target.error = ECONNREFUSED if vsock_refused(c, error) else error
    list_append(&worker.failed, &c.live)
    worker_remove_connection(worker)


cdef inline bint target_was_reached(const Connection *c, int error) noexcept nogil:
    """Whether a connect that ended with `error` met a target that accepted and then reset."""
    return (error == ECONNRESET or error == EPIPE) and not vsock_refused(c, error)


cdef inline bint vsock_refused(const Connection *c, int error) noexcept nogil:
    """Whether that VSOCK port has no listener: the virtio transport answers a request with RST. A
    connection that was made and then reset ends without an error there."""
    return c.target.family == AF_VSOCK and error == ECONNRESET
