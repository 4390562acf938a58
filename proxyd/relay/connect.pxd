# From an accepted client to a connection: the connect, and what is sent before epoll is asked.
#
# Over loopback and UNIX sockets a target is connected before connect(2) has returned. So the first
# pump comes at once, and most short exchanges have their first bytes forwarded by the time that
# the sockets are registered with epoll.

from proxyd.relay.balance cimport worker_for_new
from proxyd.relay.binding cimport socket_bind
from proxyd.relay.bookkeeping cimport connection_set_timer
from proxyd.relay.clock cimport clock_ns
from proxyd.relay.close cimport connection_close, connection_free, endpoint_orphan, linger_step
from proxyd.relay.connection cimport (
    connect_done, connect_failed, connection_advance, target_was_reached,
)
from proxyd.relay.endpoint cimport (
    endpoint_failed, endpoint_lost, endpoint_recv, endpoint_refuse_rights, endpoint_register,
)
from proxyd.relay.gather cimport connection_begin_at_rest
from proxyd.relay.gauges cimport gauges_add_connection
from proxyd.relay.half cimport half_keep, unsent_free
from proxyd.relay.list cimport link_init, list_append, list_empty
from proxyd.relay.mailbox cimport mailbox_put, mailbox_wake
from proxyd.relay.pipe cimport pipe_init
from proxyd.relay.quarantine cimport (
    QUARANTINE, connection_return_to_quarantine, connection_was_in_quarantine,
    quarantine_takes_orphans,
)
from proxyd.relay.records cimport (
    ENDING_CLIENT_GONE, ENDING_RESET, REPORT_BEGINS, Origin, Peer, Source,
)
from proxyd.relay.rights cimport rights_may_close, rights_refuse
from proxyd.relay.row cimport row_add
from proxyd.relay.self_connect cimport self_connect_add
from proxyd.relay.socket cimport socket_guard, socket_reset, socket_tune, socket_unlinger
from proxyd.relay.source cimport source_leave
from proxyd.relay.sweep cimport sweep_arrive
from proxyd.relay.sys cimport (
    AF_UNIX, EAGAIN, EINPROGRESS, EINTR, ENOMEM, ENOTCONN, MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_RDWR,
    SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, atomic_add, calloc, close, connect, counter_add,
    errno, free, hint_get, int64_t, send, shutdown, sockaddr, sockaddr_storage, socket, socklen_t,
)
from proxyd.relay.types cimport (
    CLOSED, CONNECTED, CONNECTING, DRAINING, FLOWING, KIND_CLIENT, KIND_TARGET, LINGERING,
    RIGHTS_MAYBE, RIGHTS_NONE, RIGHTS_UNKNOWN, TO_CLIENT, TO_TARGET, Connection, Endpoint, Half,
    PumpContext, Rights, Terms, Worker,
)
from proxyd.relay.upstream cimport connection_count_connect


cdef inline long long connection_connect(
    Worker *worker, int client, int client_family, const Terms *terms, const char *preamble,
    size_t preamble_size, const Origin *origin, long long number
) noexcept nogil:
    """Connect a client on these terms and forward, under the id `number` (0: a new one). The id;
    or -errno, and the client is not owned."""
    cdef Connection *c
    cdef bint connecting
    cdef bint is_new = number == 0
    cdef int family = terms.target.ss_family
    cdef int64_t began_ns = clock_ns()
    cdef int fd = socket_connect(
        &worker.ctx, &terms.target, terms.target_size, &origin.peer, &connecting)
    if fd < 0:
        return fd
    c = connection_new(worker, client, client_family, fd, family, preamble, preamble_size)
    if c == NULL:
        worker_hang_up(worker, fd, family, False, NULL)
        return -ENOMEM
    if is_new:
        number = worker_new_id(worker)
    c.id = number
    c.origin = origin[0]
    c.began_ns = began_ns
    c.timeout_ms = terms.timeout_ms
    target_set_rights(&worker.ctx, &c.target)
    self_connect_add(worker.self_connects, &c.self_connect, fd, &terms.target)
    connection_place(worker, c, connecting, is_new)
    return number


cdef inline long long worker_new_id(Worker *main) noexcept nogil:
    main.last_id += 1
    return main.last_id


cdef inline int socket_connect(
    PumpContext *ctx, const sockaddr_storage *address, socklen_t size, const Peer *client,
    bint *connecting
) noexcept nogil:
    """A new socket that is connecting to `address`, or connected; or -errno."""
    cdef int fd = socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    cdef int error
    if fd < 0:
        return -errno
    if ctx.binding != NULL:
        error = -socket_bind(fd, address.ss_family, ctx.binding, client, True)
        if error != 0:
            close(fd)
            return -error
    socket_tune(fd, address.ss_family)
    socket_guard(fd, address.ss_family)
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


cdef inline void target_set_rights(const PumpContext *ctx, Endpoint *target) noexcept nogil:
    """As socket_connect() has left it, before the target could send anything."""
    target.rights.state = RIGHTS_NONE if ctx.may_refuse else RIGHTS_MAYBE


cdef inline void connection_place(
    Worker *main, Connection *c, bint connecting, bint is_new
) noexcept nogil:
    """Count a connection, and have it begin in the worker that is to forward it. Unless it is new,
    the policy has held its client, and knows of it."""
    cdef bint rests = hint_get(&main.gauges.gathering)
    cdef Worker *worker = main if rests else worker_for_new(main)
    c.opened_ms = c.active_ms = main.ctx.now_ms
    c.state = CONNECTING if connecting else CONNECTED
    if not connecting:
        connection_count_connect(c)
    if is_new and hint_get(&main.gauges.reports) & REPORT_BEGINS:
        row_add(main, &main.begun, 0, c, worker.number)
    gauges_add_connection(main.gauges)
    atomic_add(&worker.connection_count, 1)
    if rests:
        connection_begin_at_rest(main, c)
    elif worker == main:
        connection_begin(main, c)
    else:
        counter_add(&main.handed_over, 1)
        mailbox_put(&worker.mailbox, &worker.mailbox.begin, &c.live)


# ── begin ────────────────────────────────────────────────────────────────────────────────────────

cdef inline void connection_begin(Worker *worker, Connection *c) noexcept nogil:
    """Begin in this worker: pump first, and only then register with epoll. By then most short
    exchanges have been read and need no event."""
    cdef bint rested = c.has_rested
    if c.has_orphans and c.state == CLOSED:
        connection_close_orphans(worker, c)
        return
    if not rested:
        c.active_ms = worker.ctx.now_ms
    elif not connection_wake_up(worker, c):
        return
    list_append(&worker.live, &c.live)
    sweep_arrive(worker, c)
    if c.state == CLOSED:
        return
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
    if not connection_register(&worker.ctx, c, rested):
        connection_close(worker, c, ENDING_RESET, True)
    elif c.timer_ms != 0 and list_empty(&c.timed):
        connection_set_timer(worker, c, c.timer_ms)  # as it was in the worker before
    elif c.state == CONNECTING and c.timeout_ms > 0 and c.timer_ms == 0:
        connection_set_timer(worker, c, worker.ctx.now_ms + c.timeout_ms)


cdef inline bint connection_register(
    PumpContext *ctx, Connection *c, bint rested
) noexcept nogil:
    """Have epoll announce both sides, in the order of their events so far. While it rested, it may
    have been connected; its client, of which only that is new, left later."""
    if rested and not endpoint_register(ctx, &c.target):
        return False
    return endpoint_register(ctx, &c.client) and (rested or endpoint_register(ctx, &c.target))


cdef inline bint connection_wake_up(Worker *worker, Connection *c) noexcept nogil:
    """A connection that has rested begins again; it was silent for as long as before. False: it has
    gone to the quarantine."""
    c.has_rested = False
    if worker.number == QUARANTINE or not connection_was_in_quarantine(c):
        return True
    connection_return_to_quarantine(worker, c)
    return False


cdef inline void connection_first_pump(Worker *worker, Connection *c) noexcept nogil:
    """Do not wait for the news that the target is connected: it may be so already. If not, send(2)
    returns EAGAIN, and the bytes wait for the connection.

    The exception is a target that may be the socket itself: bytes sent there cannot be taken back.
    """
    cdef ssize_t size
    if c.self_connect.self_possible:
        return
    if c.up.unsent != NULL:
        connecting_send(worker, c, c.up.unsent, c.up.unsent_end)
    else:
        size = endpoint_recv(&c.client, worker.ctx.buffer, worker.ctx.first_unit, NULL)
        if size > 0:
            c.up.moved += <size_t>size
            connecting_send(worker, c, worker.ctx.buffer, <size_t>size)
        elif size == 0:
            c.up.state = DRAINING
        elif errno != EAGAIN and errno != EINTR:
            connection_close(worker, c, ENDING_CLIENT_GONE, True)
    if c.state == CONNECTED:
        connection_advance(worker, c)


cdef inline void connecting_send(
    Worker *worker, Connection *c, const char *data, size_t size
) noexcept nogil:
    """Send the first bytes before it is known that the target is connected. They are kept until it
    has taken them: the next target may need them."""
    cdef ssize_t sent = send(c.target.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)
    cdef int error = errno
    if sent < 0:
        sent = 0
        if target_was_reached(c, error):
            if c.up.unsent == NULL:
                c.up.lost += size
            endpoint_lost(&c.target, error)
            connect_done(worker, c)
            return
        # VSOCK returns ENOTCONN where others return EAGAIN.
        if error != EAGAIN and error != EINTR and error != ENOTCONN:
            endpoint_failed(&c.target, error)
    if c.up.unsent != NULL:
        c.up.unsent_start += <size_t>sent
        if c.up.unsent_start == c.up.unsent_end:
            unsent_free(&c.up)
    elif <size_t>sent < size and half_keep(&c.up, data + sent, size - <size_t>sent) < 0:
        c.up.lost += size - <size_t>sent
        connection_close(worker, c, ENDING_RESET, True)
        return
    counter_add(&worker.ctx.counters.forwarded[TO_TARGET], <size_t>sent)
    counter_add(&worker.ctx.counters.copied, <size_t>sent)
    if c.target.gone:
        connect_failed(worker, c, c.target.error)
    elif sent > 0:
        connect_done(worker, c)


cdef inline void connection_close_orphans(Worker *worker, Connection *c) noexcept nogil:
    """In quarantine: close the sockets that a connection has left, however long that takes."""
    if c.client.orphan_fd >= 0:
        close(c.client.orphan_fd)
    if c.target.orphan_fd >= 0:
        close(c.target.orphan_fd)
    if c.orphan_only:
        atomic_add(&worker.quarantine.orphan_sockets, -1)
    if not c.placeless:
        atomic_add(&worker.gauges.in_quarantine, -1)
    source_leave(c.origin.source)
    free(c)
    mailbox_wake(&worker.main.mailbox)  # clients may be waiting for room


# ── sockets without a connection ─────────────────────────────────────────────────────────────────

cdef inline void worker_hang_up(
    Worker *worker, int fd, int family, bint reset, Source *source
) noexcept nogil:
    """Close a socket that is not part of a connection, after which its source (NULL: none) has a
    place more. If there is not even the memory to leave it to the quarantine, it stays open."""
    cdef Rights unknown
    unknown.state = RIGHTS_UNKNOWN
    if family != AF_UNIX or rights_may_close(&unknown, fd):
        if reset:
            socket_reset(fd, family)
        else:
            if family != AF_UNIX:
                socket_unlinger(fd)
            close(fd)
        source_leave(source)
    elif not socket_orphan(worker, fd, False, source):
        shutdown(fd, SHUT_RDWR)


cdef inline bint worker_discard(Worker *worker, int fd) noexcept nogil:
    """As worker_hang_up(), for a UNIX socket that has no place in the limit. False: its peer sees
    the end, but it stays open, since the quarantine has enough of such sockets to close."""
    cdef Rights unknown
    unknown.state = RIGHTS_UNKNOWN
    if rights_may_close(&unknown, fd):
        close(fd)
        return True
    shutdown(fd, SHUT_RDWR)
    return quarantine_takes_orphans(worker.quarantine) and socket_orphan(worker, fd, True, NULL)


cdef inline bint socket_orphan(
    Worker *worker, int fd, bint placeless, Source *source
) noexcept nogil:
    """Leave a UNIX socket to the quarantine to close. False: no memory."""
    cdef Connection *c = connection_new(worker, fd, AF_UNIX, -1, AF_UNIX, NULL, 0)
    if c == NULL:
        return False
    endpoint_orphan(worker, &c.client)
    c.client.fd = -1
    c.state = CLOSED
    c.orphan_only = True
    c.origin.source = source
    c.placeless = placeless
    if placeless:
        atomic_add(&worker.gauges.in_quarantine, -1)
    atomic_add(&worker.quarantine.orphan_sockets, 1)
    connection_free(c)
    return True


# ── make one ─────────────────────────────────────────────────────────────────────────────────────

cdef inline Connection *connection_new(
    Worker *worker, int client, int client_family, int target, int target_family,
    const char *preamble, size_t preamble_size
) noexcept nogil:
    """`preamble` is to be sent first. Neither fd is owned yet. Id and origin are the caller's to
    set. NULL: no memory."""
    cdef Connection *c = <Connection *>calloc(1, sizeof(Connection))
    if c == NULL:
        return NULL
    if preamble_size > 0 and half_keep(&c.up, preamble, preamble_size) < 0:
        free(c)
        return NULL
    c.up.given = preamble_size
    c.connect_us = -1
    c.sweep = worker.sweep.number
    link_init(&c.live, c)
    link_init(&c.timed, c)
    link_init(&c.ready, c)
    link_init(&c.to_quarantine, c)
    link_init(&c.member, c)
    link_init(&c.entering, c)
    c.quarantine = worker.quarantine
    endpoint_init(&c.client, KIND_CLIENT, client, client_family, c)
    endpoint_init(&c.target, KIND_TARGET, target, target_family, c)
    half_init(&c.up, &c.client, &c.target, TO_TARGET)
    half_init(&c.down, &c.target, &c.client, TO_CLIENT)
    c.client.readable = 1
    return c


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
