# A connection: two endpoints, two halves, and how it ends.
#
# What is passed on, and when (the promises of the man page):
#
#   EOF at X            everything before it, then SHUT_WR to Y; the other half goes on
#   both ended          both are closed
#   X reset or failed   what could still be read from X goes to Y; then Y lingers until its send
#                       queue is empty, or has not moved for STUCK_MS, and is reset, whether or not
#                       it was sent a clean end before
#   X cannot be         what X had already sent goes to Y, to the end; then as above. EPIPE from a
#   written             UNIX socket is the reset that such sockets have
#   X, a UNIX socket,   as above, but Y is closed, as by a close(2) of X. If it has sent X anything
#   closed              since, it is reset
#
# What Y was sent stays readable to it, for a reset takes nothing from the queue of its receiver. A
# lingering connection has only Y left, X is closed. Nothing is freed while a batch of events is
# worked on, since a later event of the batch may still point to it: the dead go last.

from proxyd.relay.busy cimport SPARE_FOR_NEW
from proxyd.relay.gauges cimport gauges_add_connection, gauges_remove_connection
from proxyd.relay.list cimport link_init, list_append, list_empty, list_remove
from proxyd.relay.mailbox cimport mailbox_put, mailbox_wake
from proxyd.relay.pipe cimport pipe_init, pool_clear
from proxyd.relay.pump cimport (
    endpoint_failed, endpoint_interest, endpoint_lost, endpoint_recv, endpoint_refuse_rights,
    half_abandon, half_drop, half_held, half_keep, half_pump, unsent_free,
)
from proxyd.relay.quarantine cimport quarantine_put
from proxyd.relay.rights cimport rights_may_close, rights_refuse
from proxyd.relay.self_connect cimport self_connect_add, self_connect_remove
from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, AF_UNIX, AF_UNSPEC, AF_VSOCK, EAGAIN, ECONNREFUSED, ECONNRESET, EINPROGRESS,
    EINTR, ELOOP, ENOMEM, ENOTCONN, EPIPE, EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI,
    EPOLLRDHUP, EPOLL_CTL_ADD, EPOLL_CTL_DEL, ETIMEDOUT, IPPROTO_TCP, MSG_DONTWAIT, MSG_NOSIGNAL,
    MSG_PEEK, SHUT_RDWR, SHUT_WR, SIOCOUTQ, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, SOL_SOCKET,
    SO_ERROR, SO_KEEPALIVE, SO_LINGER, SO_OOBINLINE, TCP_NODELAY, atomic_add, atomic_get, calloc,
    close, connect, counter_add, epoll_ctl, epoll_event, errno, free, getpeername, getsockname,
    getsockopt, int64_t, ioctl, linger, memcmp, memset, recv, send, setsockopt, shutdown, sockaddr,
    sockaddr_storage, socket, socklen_t, uint32_t, uint64_t,
)
from proxyd.relay.types cimport (
    CLOSED, CONNECTED, CONNECTING, DEAD, DRAINING, ENDING_CLIENT_GONE, ENDING_NORMAL, ENDING_RESET,
    FLOWING, KIND_CLIENT, KIND_TARGET, LINGERING, POLICY_EVENTS_MAX, RIGHTS_AHEAD, RIGHTS_ANY,
    RIGHTS_MAYBE, RIGHTS_NONE, RIGHTS_UNKNOWN, SHUT, TO_CLIENT, TO_TARGET, Connection, Endpoint,
    Half, Link, PolicyEvent, PumpContext, Rights, Worker,
)

cdef enum:
    DRAIN_BYTES = 1024 * 1024  # most that is read from a side and thrown away
    STALLED_MS = 5000            # a send queue that has not moved for so long is given up
    LINGER_FIRST_MS = 1        # the first look at a send queue, then twice as long each time …
    LINGER_MAX_MS = 128    # … up to this

# ── set-up ───────────────────────────────────────────────────────────────────────────────────

cdef inline void endpoint_init(
    Endpoint *end, int kind, int fd, int family, void *owner
) noexcept nogil:
    end.kind = kind
    end.fd = fd
    end.family = family
    end.writable = 1
    end.orphan_fd = -1
    end.connection = owner


cdef inline void half_init(Half *half, Endpoint *src, Endpoint *dst, int direction) noexcept nogil:
    half.src = src
    half.dst = dst
    half.direction = direction
    half.state = FLOWING
    pipe_init(&half.pipe)


cdef inline Connection *connection_new(
    Worker *worker, int client, int client_family, int target, int target_family,
    const char *preamble, size_t preamble_size
) noexcept nogil:
    """`preamble` is to be sent first. Neither fd is owned yet. NULL: no memory."""
    cdef Connection *c = <Connection *>calloc(1, sizeof(Connection))
    if c == NULL:
        return NULL
    if preamble_size > 0 and half_keep(&c.up, preamble, preamble_size) < 0:
        free(c)
        return NULL
    worker.last_id += 1
    c.id = worker.last_id
    link_init(&c.live, c)
    link_init(&c.timed, c)
    link_init(&c.ready, c)
    link_init(&c.to_quarantine, c)
    c.quarantine = worker.quarantine
    endpoint_init(&c.client, KIND_CLIENT, client, client_family, c)
    endpoint_init(&c.target, KIND_TARGET, target, target_family, c)
    half_init(&c.up, &c.client, &c.target, TO_TARGET)
    half_init(&c.down, &c.target, &c.client, TO_CLIENT)
    c.client.readable = 1
    return c


cdef inline bint endpoint_register(PumpContext *ctx, Endpoint *end) noexcept nogil:
    """Whether epoll announces it from now on. What is there already is announced at once."""
    cdef epoll_event event
    if end.fd < 0:
        return True
    event.events = endpoint_interest(end)
    event.data.ptr = end
    end.registered = epoll_ctl(ctx.epoll, EPOLL_CTL_ADD, end.fd, &event) == 0
    return end.registered


cdef inline void endpoint_unregister(PumpContext *ctx, Endpoint *end) noexcept nogil:
    """Before every close(2): where another process has the socket too, that leaves it in epoll, and
    a later event would point to memory that is freed."""
    if end.registered:
        epoll_ctl(ctx.epoll, EPOLL_CTL_DEL, end.fd, NULL)
        end.registered = False


cdef inline void socket_tune(int fd, int family) noexcept nogil:
    """What both legs have: urgent bytes in their place, keepalive, no Nagle delay.

    What a listener has, the TCP sockets it accepts inherit; UNIX ones do not. Failures are
    ignored: a transport without the option has no need of it.
    """
    cdef int on = 1
    if family == AF_INET or family == AF_INET6:
        setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof(on))
        setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on))
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on))
    elif family == AF_UNIX:
        setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof(on))


cdef inline void connection_free(Connection *c) noexcept nogil:
    half_drop(&c.up)
    half_drop(&c.down)
    if c.has_orphans:
        quarantine_put(c.quarantine, &c.live)
    else:
        free(c)


cdef inline void connections_free(Link *connections) noexcept nogil:
    cdef Connection *c
    while not list_empty(connections):
        c = <Connection *>connections.next.owner
        list_remove(&c.live)
        connection_free(c)


# ── time ─────────────────────────────────────────────────────────────────────────────────────

cdef inline void connection_set_timer(Worker *worker, Connection *c, int64_t when_ms) noexcept nogil:
    list_remove(&c.timed)
    list_append(&worker.timed, &c.timed)
    c.timer_ms = when_ms
    if worker.next_timer_ms == 0 or when_ms < worker.next_timer_ms:
        worker.next_timer_ms = when_ms


cdef inline void connection_mark_active(Worker *worker, Connection *c) noexcept nogil:
    """Note whether bytes have moved since the last look."""
    cdef uint64_t moved = c.up.moved + c.down.moved
    cdef uint64_t held = half_held(&c.up) + half_held(&c.down)
    if moved - held == c.moved:
        return
    c.moved = moved - held
    c.active_ms = worker.ctx.now_ms
    list_remove(&c.live)
    list_append(&worker.live, &c.live)


# ── the end ──────────────────────────────────────────────────────────────────────────────────

cdef inline void socket_reset(int fd, int family) noexcept nogil:
    """Close with RST, which throws away what was not yet acknowledged. AF_UNIX has no reset: it is
    a plain close there."""
    cdef linger now
    cdef sockaddr nowhere
    if family != AF_UNIX:
        now.l_onoff = 1
        now.l_linger = 0
        if setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now)) < 0:
            nowhere.sa_family = AF_UNSPEC  # where that is forbidden: this disconnects, tcp(7)
            connect(fd, &nowhere, sizeof(nowhere))
    close(fd)


cdef inline void socket_unlinger(int fd) noexcept nogil:
    """Have close(2) neither wait nor cut, whatever SO_LINGER the listener had."""
    cdef linger off
    off.l_onoff = off.l_linger = 0
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &off, sizeof(off))


cdef inline void endpoint_orphan(Worker *worker, Endpoint *end) noexcept nogil:
    """Its peer sees the end now, and the quarantine closes it once the connection is freed. Until
    then it keeps its place in the limit, but is no open connection: nobody waits for it, neither
    a drain nor an idle exit."""
    cdef Connection *c = <Connection *>end.connection
    shutdown(end.fd, SHUT_RDWR)
    end.orphan_fd = end.fd
    if not c.has_orphans:
        c.has_orphans = True
        atomic_add(&worker.gauges.in_quarantine, 1)


cdef inline bint endpoint_may_close(Endpoint *end) noexcept nogil:
    """Whether close(2) cannot wait, for descriptors that were sent to it. See rights.pxd."""
    return end.family != AF_UNIX or end.ended or rights_may_close(&end.rights, end.fd)


cdef inline void endpoint_close(Worker *worker, Endpoint *end, bint reset) noexcept nogil:
    if end.fd < 0:
        return
    endpoint_unregister(&worker.ctx, end)
    if not endpoint_may_close(end):
        endpoint_orphan(worker, end)
    elif reset:
        socket_reset(end.fd, end.family)
    else:
        if end.rights.state == RIGHTS_ANY and end.family != AF_UNIX:
            socket_unlinger(end.fd)  # what connection_exile() has set
        close(end.fd)
    end.fd = -1


cdef inline void worker_hang_up(Worker *worker, int fd, int family, bint reset) noexcept nogil:
    """Close a socket that is no connection's. Where there is not even the memory to leave it to
    the quarantine, it stays open."""
    cdef Rights unknown
    cdef Connection *c
    unknown.state = RIGHTS_UNKNOWN
    if family != AF_UNIX or rights_may_close(&unknown, fd):
        if reset:
            socket_reset(fd, family)
        else:
            close(fd)
        return
    c = connection_new(worker, fd, family, -1, family, NULL, 0)
    if c == NULL:
        shutdown(fd, SHUT_RDWR)
        return
    endpoint_orphan(worker, &c.client)
    c.client.fd = -1
    c.state = CLOSED
    c.orphan_only = True
    atomic_add(&worker.quarantine.orphan_sockets, 1)
    connection_free(c)


cdef inline void connection_unlink(Worker *worker, Connection *c) noexcept nogil:
    list_remove(&c.live)
    list_remove(&c.timed)
    list_remove(&c.ready)
    list_remove(&c.to_quarantine)
    self_connect_remove(worker.self_connects, &c.self_connect)
    half_drop(&c.up)
    half_drop(&c.down)
    c.state = CLOSED


cdef inline void worker_remove_connection(Worker *worker) noexcept nogil:
    """This relay has a connection less."""
    if atomic_add(&worker.connection_count, -1) == 0:
        pool_clear(&worker.ctx.pool)


cdef inline void connections_decrement(Worker *worker) noexcept nogil:
    """The program has a connection less."""
    if gauges_remove_connection(worker.gauges, worker.ctx.now_ms) and worker.main != NULL:
        mailbox_wake(&worker.main.mailbox)


cdef inline void connection_close(
    Worker *worker, Connection *c, int ending, bint reset
) noexcept nogil:
    """Close whatever is left of it, both sides the same way."""
    endpoint_close(worker, &c.client, reset)
    endpoint_close(worker, &c.target, reset)
    connection_unlink(worker, c)
    c.ending = ending
    counter_add(&worker.ends[ending], 1)
    list_append(&worker.ended if worker.report_ends else &worker.dead, &c.live)
    worker_remove_connection(worker)
    connections_decrement(worker)


cdef inline int64_t endpoint_queue(const Endpoint *end) noexcept nogil:
    """Bytes its peer has not acknowledged; 0 for AF_UNIX, where they are with the peer already."""
    cdef int size = 0
    if end.family != AF_INET and end.family != AF_INET6:
        return 0
    if ioctl(end.fd, SIOCOUTQ, &size) < 0:
        return 0
    return size


cdef inline bint connection_is_stalled(Worker *worker, Connection *c, uint64_t queue) noexcept nogil:
    """Whether the queue towards the last side has not moved for STUCK_MS."""
    if queue != c.queue:
        c.queue = queue
        c.progress_ms = worker.ctx.now_ms
    return worker.ctx.now_ms - c.progress_ms >= STALLED_MS


cdef inline bint endpoint_drain(Worker *worker, Connection *c, Endpoint *end) noexcept nogil:
    """Throw away what it sends, up to DRAIN_BYTES. True once it has ended."""
    cdef ssize_t size
    while end.readable and c.drained < DRAIN_BYTES:
        size = endpoint_recv(end, worker.ctx.buffer, worker.ctx.stream_unit)
        if size > 0:
            c.drained += <size_t>size
        elif size < 0 and errno != EAGAIN and errno != EINTR:
            end.readable = 0
            endpoint_failed(end, errno)
    return end.ended or end.error != 0


cdef inline void connection_check_rights(Worker *worker, Connection *c) noexcept nogil:
    """Where descriptors come next, this relay is not to read any more: after the batch the
    connection goes into quarantine."""
    if c.client.rights.state == RIGHTS_AHEAD or c.target.rights.state == RIGHTS_AHEAD:
        list_remove(&c.to_quarantine)
        list_append(&worker.to_quarantine, &c.to_quarantine)


cdef inline bint linger_over(Worker *worker, Connection *c) noexcept nogil:
    """Whether the last side may be closed.

    What it sends meanwhile is thrown away: it may have all of that to say before it reads. But it
    is then to hear that nobody was there.
    """
    cdef int64_t queue
    if c.last.error != 0:
        return True
    if c.last.family == AF_UNIX:
        c.last.readable = 1  # unread input would turn its end into an error
    if endpoint_drain(worker, c, c.last):
        if c.last.error != 0:
            return True  # perhaps for want of memory: it may live on, and is still to be reset
        if last_was_sent_an_end(c):
            c.reset = False
            return True
    c.reset |= c.drained > 0
    queue = endpoint_queue(c.last)
    return queue == 0 or connection_is_stalled(worker, c, <uint64_t>queue)


cdef inline bint last_was_sent_an_end(const Connection *c) noexcept nogil:
    return (c.up.state if c.last == &c.target else c.down.state) == SHUT


cdef inline void linger_step(Worker *worker, Connection *c) noexcept nogil:
    """Look whether the last side may be closed; otherwise look again later, less and less often."""
    if linger_over(worker, c):
        connection_close(worker, c, ENDING_RESET if c.reset else ENDING_NORMAL, c.reset)
        return
    connection_check_rights(worker, c)
    connection_set_timer(worker, c, worker.ctx.now_ms + c.recheck_ms)
    c.recheck_ms = min(2 * c.recheck_ms, LINGER_MAX_MS)


cdef inline void connection_linger(
    Worker *worker, Connection *c, Endpoint *last, Endpoint *other
) noexcept nogil:
    """`other` has nothing more to give or take: close it, and `last` when its time has come.

    One that has failed may live on, where the kernel had no memory: it must not see a clean end.
    """
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


cdef inline void half_finish(Half *half, Half *other) noexcept nogil:
    """src has ended cleanly and everything is delivered: pass the end on.

    Where the other half is over, closing both says the same with a system call less: a UNIX socket
    does not linger. An end that cannot be passed on makes a failed connection: dst would wait for
    it for ever.
    """
    half.state = SHUT
    if other.state == DEAD and half.dst.family == AF_UNIX:
        return
    if other.state != SHUT and shutdown(half.dst.fd, SHUT_WR) < 0:
        endpoint_lost(half.dst, errno)


cdef inline void half_settle(
    Worker *worker, Connection *c, Half *half, Half *other
) noexcept nogil:
    """Draw the consequences of what the pumps have found, for src → dst."""
    if c.state != CONNECTED:
        return
    if half.dst.gone:
        half_abandon(half)
    elif half.state == DRAINING and half_held(half) == 0:
        if half.src.error != 0:
            connection_linger(worker, c, half.dst, half.src)
        else:
            half_finish(half, other)


cdef inline void connection_settle(Worker *worker, Connection *c) noexcept nogil:
    """The one place where a connection's end is decided."""
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
        # A side has failed, or is gone and the other has sent much in vain; and the other does
        # not take its last words. Watch that they move.
        c.progress_ms = worker.ctx.now_ms
        c.recheck_ms = LINGER_MAX_MS
        connection_set_timer(worker, c, worker.ctx.now_ms + c.recheck_ms)


cdef inline void connection_discard_input(Worker *worker, Connection *c) noexcept nogil:
    """What a side sends to one that is gone is thrown away, so that it comes to read the last
    words of that one: it may wait for its own to be taken first."""
    if c.up.state == DEAD:
        endpoint_drain(worker, c, &c.client)
    elif c.down.state == DEAD:
        endpoint_drain(worker, c, &c.target)


cdef inline void connection_advance(Worker *worker, Connection *c) noexcept nogil:
    """Pump both halves as far as they go, then settle what follows."""
    cdef bint more = half_pump(&worker.ctx, &c.up)
    more |= half_pump(&worker.ctx, &c.down)
    # What the second pump has found may free the first: a failed write leaves last words to read.
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


cdef inline void connection_check_stall(Worker *worker, Connection *c) noexcept nogil:
    """A side is gone, and its last words wait for a reader: give up where nothing moves."""
    cdef Half *half = &c.down if c.up.state == DEAD else &c.up
    cdef uint64_t queue = half.moved + half_held(half) + <uint64_t>endpoint_queue(half.dst)
    if connection_is_stalled(worker, c, queue):
        connection_close(worker, c, ENDING_RESET, True)
    else:
        connection_set_timer(worker, c, worker.ctx.now_ms + c.recheck_ms)


# ── the connect ──────────────────────────────────────────────────────────────────────────────

cdef inline int socket_take_error(int fd) noexcept nogil:
    """SO_ERROR, which reading clears."""
    cdef int error = 0
    cdef socklen_t size = sizeof(error)
    if getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0:
        return errno
    return error


cdef inline bint socket_self_connected(int fd) noexcept nogil:
    """Whether a TCP socket was connected to itself: a connect to a port of the ephemeral range on
    which nobody listens may be given that very port as its own."""
    cdef sockaddr_storage mine, peer
    cdef socklen_t mine_size = sizeof(mine), peer_size = sizeof(peer)
    memset(&mine, 0, sizeof(mine))
    memset(&peer, 0, sizeof(peer))
    if getsockname(fd, <sockaddr *>&mine, &mine_size) < 0:
        return False
    if getpeername(fd, <sockaddr *>&peer, &peer_size) < 0:
        return False
    return mine_size == peer_size and memcmp(&mine, &peer, mine_size) == 0


cdef inline void connect_failed(Worker *worker, Connection *c, int error) noexcept nogil:
    """Give the client back, with the bytes already taken from it. The connection counts until the
    policy has it: otherwise somebody else could be let in for it meanwhile."""
    endpoint_unregister(&worker.ctx, &c.client)
    endpoint_close(worker, &c.target, True)  # it may have accepted, and nothing was sent to it
    list_remove(&c.live)
    list_remove(&c.timed)
    self_connect_remove(worker.self_connects, &c.self_connect)
    c.state = CLOSED
    c.target.error = ECONNREFUSED if vsock_refused(c, error) else error
    list_append(&worker.failed, &c.live)
    worker_remove_connection(worker)


cdef inline bint vsock_refused(const Connection *c, int error) noexcept nogil:
    """Whether nobody listens on that VSOCK port: the virtio transport answers a request with RST.
    A connection that was made and then reset ends without an error there."""
    return c.target.family == AF_VSOCK and error == ECONNRESET


cdef inline bint target_was_reached(const Connection *c, int error) noexcept nogil:
    """Whether a connect that ended with `error` met a target that accepted and then reset."""
    return (error == ECONNRESET or error == EPIPE) and not vsock_refused(c, error)


cdef inline void connect_done(Worker *worker, Connection *c) noexcept nogil:
    list_remove(&c.timed)
    c.timer_ms = 0
    c.state = CONNECTED
    if c.self_connect.self_possible and socket_self_connected(c.target.fd):
        c.state = CONNECTING
        connect_failed(worker, c, ELOOP)


cdef inline bint client_has_spoken(const Connection *c) noexcept nogil:
    cdef char byte
    return c.up.moved > 0 or recv(c.client.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0


cdef inline void connecting_event(
    Worker *worker, Connection *c, Endpoint *end, uint32_t events
) noexcept nogil:
    """A target that accepted and then reset has been reached: that is for the client to see.

    A client that is gone is dropped, unless it has ended cleanly and said something: that is still
    delivered. The target may have accepted, and hears how the client went.
    """
    if end.kind == KIND_CLIENT:
        if end.gone and (end.error != 0 or not client_has_spoken(c)):
            connection_close(worker, c, ENDING_CLIENT_GONE, end.error != 0)
        return
    if end.error != 0 and not target_was_reached(c, end.error):
        connect_failed(worker, c, end.error)
    elif events & (EPOLLOUT | EPOLLERR | EPOLLHUP | EPOLLRDHUP):
        connect_done(worker, c)


cdef inline void connecting_send(
    Worker *worker, Connection *c, const char *data, size_t size
) noexcept nogil:
    """The first bytes for the target, sent before it is known to be there. They are kept until it
    has taken them: the next target may need them."""
    cdef ssize_t sent = send(c.target.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)
    cdef int error = errno
    if sent < 0:
        sent = 0
        if target_was_reached(c, error):
            endpoint_lost(&c.target, error)
            connect_done(worker, c)
            return
        # ENOTCONN is what VSOCK says instead of EAGAIN.
        if error != EAGAIN and error != EINTR and error != ENOTCONN:
            endpoint_failed(&c.target, error)
    if c.up.unsent != NULL:
        c.up.unsent_start += <size_t>sent
        if c.up.unsent_start == c.up.unsent_end:
            unsent_free(&c.up)
    elif <size_t>sent < size and half_keep(&c.up, data + sent, size - <size_t>sent) < 0:
        connection_close(worker, c, ENDING_RESET, True)
        return
    counter_add(&worker.ctx.counters.forwarded[TO_TARGET], <size_t>sent)
    counter_add(&worker.ctx.counters.copied, <size_t>sent)
    if c.target.gone:
        connect_failed(worker, c, c.target.error)
    elif sent > 0:
        connect_done(worker, c)


cdef inline void connection_first_pump(Worker *worker, Connection *c) noexcept nogil:
    """Do not wait to hear that the target is there: over loopback and UNIX sockets it is, before
    connect() has returned. Otherwise send answers EAGAIN, and the bytes wait for the connection.

    Unless the target may be the socket itself: what is sent there cannot be taken back.
    """
    cdef ssize_t size
    if c.self_connect.self_possible:
        return
    if c.up.unsent != NULL:
        connecting_send(worker, c, c.up.unsent, c.up.unsent_end)
    else:
        size = endpoint_recv(&c.client, worker.ctx.buffer, worker.ctx.first_unit)
        if size > 0:
            c.up.moved += <size_t>size
            connecting_send(worker, c, worker.ctx.buffer, <size_t>size)
        elif size == 0:
            c.up.state = DRAINING
        elif errno != EAGAIN and errno != EINTR:
            connection_close(worker, c, ENDING_CLIENT_GONE, True)
    if c.state == CONNECTED:
        connection_advance(worker, c)


cdef inline void connection_begin(Worker *worker, Connection *c) noexcept nogil:
    """Pump for the first time in this relay, and only then ask epoll: most short exchanges have by
    then been heard, and need no event to say so."""
    if c.has_orphans and c.state == CLOSED:
        connection_close_orphans(worker, c)
        return
    c.active_ms = worker.ctx.now_ms
    list_append(&worker.live, &c.live)
    if c.client.family == AF_UNIX and c.client.rights.state == RIGHTS_UNKNOWN:
        socket_tune(c.client.fd, AF_UNIX)
        endpoint_refuse_rights(&worker.ctx, &c.client)
    if c.state == CONNECTING:
        connection_first_pump(worker, c)
    elif c.state == LINGERING:
        linger_step(worker, c)
    else:
        connection_advance(worker, c)
    if c.state == CLOSED:
        return
    c.target.armed |= c.state == CONNECTING
    if not endpoint_register(&worker.ctx, &c.client) or (
            not endpoint_register(&worker.ctx, &c.target)):
        connection_close(worker, c, ENDING_RESET, True)
    elif c.state == CONNECTING and c.timeout_ms > 0:
        connection_set_timer(worker, c, worker.ctx.now_ms + c.timeout_ms)
    elif c.timer_ms != 0 and list_empty(&c.timed):
        connection_set_timer(worker, c, c.timer_ms)  # as it was before it came here


cdef inline void connection_close_orphans(Worker *worker, Connection *c) noexcept nogil:
    """In quarantine: close the sockets that a connection has left, however long that takes."""
    if c.client.orphan_fd >= 0:
        close(c.client.orphan_fd)
    if c.target.orphan_fd >= 0:
        close(c.target.orphan_fd)
    if c.orphan_only:
        atomic_add(&worker.quarantine.orphan_sockets, -1)
    free(c)
    atomic_add(&worker.gauges.in_quarantine, -1)
    mailbox_wake(&worker.main.mailbox)  # there may be clients that wait for room


cdef inline Worker *worker_with_fewest(Worker *main) noexcept nogil:
    """The relay with the fewest connections; the boss's own where that is no more than others
    have, since it costs no change of threads."""
    cdef Worker *least = main
    cdef int fewest = atomic_get(&main.connection_count)
    cdef int i, count
    for i in range(main.workers.count):
        count = atomic_get(&main.workers.each[i].connection_count)
        if count < fewest:
            fewest = count
            least = main.workers.each[i]
    return least


cdef inline Worker *worker_for_new(Worker *main) noexcept nogil:
    """Where a new connection is to begin: with the boss, unless that is too much for it."""
    if main.offloads_when_busy and main.busy.spare < SPARE_FOR_NEW:
        return main
    return worker_with_fewest(main)


cdef inline void connection_place(Worker *main, Connection *c, bint connecting) noexcept nogil:
    """Count a new connection, and have it begin."""
    cdef Worker *worker = worker_for_new(main)
    c.opened_ms = main.ctx.now_ms
    c.state = CONNECTING if connecting else CONNECTED
    gauges_add_connection(main.gauges)
    atomic_add(&worker.connection_count, 1)
    if worker == main:
        connection_begin(main, c)
    else:
        counter_add(&main.handed_over, 1)
        mailbox_put(&worker.mailbox, &worker.mailbox.begin, &c.live)


cdef inline void target_set_rights(const PumpContext *ctx, Endpoint *target) noexcept nogil:
    """What socket_connect() has made of it, before anybody could send it anything."""
    target.rights.state = RIGHTS_NONE if ctx.may_refuse else RIGHTS_MAYBE


cdef inline int socket_connect(
    PumpContext *ctx, const sockaddr_storage *address, socklen_t size, bint *connecting
) noexcept nogil:
    """A new socket on its way to `address`, or there; or -errno."""
    cdef int fd = socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    cdef int error
    if fd < 0:
        return -errno
    socket_tune(fd, address.ss_family)
    if address.ss_family == AF_UNIX:
        ctx.may_refuse = ctx.may_refuse and rights_refuse(fd)
    connecting[0] = False
    if connect(fd, <const sockaddr *>address, size) < 0:
        error = errno
        if error != EINPROGRESS:
            close(fd)
            return -error
        connecting[0] = True
    return fd


cdef inline long long connection_connect(
    Worker *worker, int client, int client_family, const sockaddr_storage *address,
    socklen_t size, const char *preamble, size_t preamble_size, int listener,
    int64_t timeout_ms
) noexcept nogil:
    """Connect a client to `address` and forward. The id, or -errno and the client is not owned."""
    cdef Connection *c
    cdef bint connecting
    cdef long long number
    cdef int fd = socket_connect(&worker.ctx, address, size, &connecting)
    if fd < 0:
        return fd
    c = connection_new(worker, client, client_family, fd, address.ss_family,
                       preamble, preamble_size)
    if c == NULL:
        worker_hang_up(worker, fd, address.ss_family, False)
        return -ENOMEM
    number = c.id
    target_set_rights(&worker.ctx, &c.target)
    c.listener = listener
    c.timeout_ms = timeout_ms
    self_connect_add(worker.self_connects, &c.self_connect, fd, address)
    connection_place(worker, c, connecting)
    return number


# ── the limit ────────────────────────────────────────────────────────────────────────────────

cdef inline int connection_limit(const Worker *worker) noexcept nogil:
    """How many connections and sockets in quarantine the limit leaves room for."""
    return worker.connections_max - worker.held


# ── notes ────────────────────────────────────────────────────────────────────────────────────

cdef inline PolicyEvent *policy_event_add(
    Worker *worker, int kind, int fd, uint32_t value, int index
) noexcept nogil:
    """Something for the policy. NULL where there is no room: once it has run there is."""
    cdef PolicyEvent *event = &worker.policy_events[worker.policy_event_count]
    if worker.policy_event_count >= POLICY_EVENTS_MAX:
        return NULL
    event.kind = kind
    event.fd = fd
    event.value = value
    event.listener = index
    event.peer_size = 0
    worker.policy_event_count += 1
    return event


# ── events ───────────────────────────────────────────────────────────────────────────────────

cdef inline void endpoint_mark_ready(Connection *c, Endpoint *end, uint32_t events) noexcept nogil:
    """Remember what an edge has said."""
    cdef int error
    cdef Half *towards = &c.down if end.kind == KIND_CLIENT else &c.up
    if events & EPOLLERR or c.state == CONNECTING and events & (EPOLLHUP | EPOLLRDHUP):
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
        end.gone = 1


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


cdef inline void connect_expired(Worker *worker, Connection *c) noexcept nogil:
    """The time for the connect is over. A target that has accepted just now is not left again."""
    cdef sockaddr_storage peer
    cdef socklen_t size = sizeof(peer)
    if getpeername(c.target.fd, <sockaddr *>&peer, &size) == 0:
        connection_event(worker, &c.target, EPOLLOUT)
    else:
        connect_failed(worker, c, ETIMEDOUT)


cdef inline void connection_timer_expired(Worker *worker, Connection *c) noexcept nogil:
    if c.state == CONNECTING:
        connect_expired(worker, c)
    elif c.state == CONNECTED:
        connection_check_stall(worker, c)
    elif c.state == LINGERING:
        linger_step(worker, c)


cdef inline void worker_run_timers(Worker *worker) noexcept nogil:
    """Look after the timed connections that are due, and find out when the next one is."""
    cdef Link *link = worker.timed.next
    cdef Link *after
    cdef Connection *c
    worker.next_timer_ms = 0
    while link != &worker.timed:
        after = link.next
        c = <Connection *>link.owner
        if c.timer_ms <= worker.ctx.now_ms:
            connection_timer_expired(worker, c)
        elif worker.next_timer_ms == 0 or c.timer_ms < worker.next_timer_ms:
            worker.next_timer_ms = c.timer_ms
        link = after
