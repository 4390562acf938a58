# A listener: clients are accepted here and, on the policy's terms, connected at once.
#
# The terms are a target that is believed to be up (`auto_connect`), and a limit. Within them a
# connection runs no Python at all. Everything else becomes an event for the policy: a client that
# is accepted without terms, one that begins with a PROXY header, one over a limit, one whose
# connect fails at once, an error of accept4(2).

from proxyd.relay.bookkeeping cimport connection_limit, policy_event_add
from proxyd.relay.connect cimport connection_connect, worker_hang_up
from proxyd.relay.gauges cimport gauges_places
from proxyd.relay.list cimport list_append, list_empty, list_remove
from proxyd.relay.quarantine cimport quarantine_takes_orphans
from proxyd.relay.records cimport SOURCE_WORDS, Origin, Peer, Source
from proxyd.relay.self_connect cimport local_port, self_connect_came_back
from proxyd.relay.sender cimport is_sender
from proxyd.relay.signals cimport alarm_is_handled, alarm_set
from proxyd.relay.socket cimport socket_guard, socket_peer_pid, socket_tune, socket_unlinger
from proxyd.relay.source cimport source_enter, source_hold, source_leave, source_of_client
from proxyd.relay.sys cimport (
    AF_UNIX, AF_VSOCK, EAGAIN, EINTR, ELOOP, EPOLLIN, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EUSERS, F_GETFL,
    F_SETFL, IPPROTO_TCP, O_NONBLOCK, SOCK_CLOEXEC, SOCK_NONBLOCK, TCP_INFO, accept4, epoll_ctl,
    epoll_event, errno, errno_set, fcntl, getsockopt, int64_t, memcpy, memset, sockaddr,
    sockaddr_storage, socklen_t, tcp_info, uint32_t,
)
from proxyd.relay.types cimport (
    CHECK_PORT, CHECK_TCP, CHECK_UNIX, EVENT_ACCEPTED, EVENT_ACCEPT_FAILED, EVENT_CONNECT_FAILED,
    EVENT_REFUSED, POLICY_EVENTS_MAX, Listener, PolicyEvent, Worker,
)

# While clients are few, it is cheapest to accept one per turn: learning that no other waits
# (EAGAIN) costs as much as a connection, since the kernel makes the new socket before it looks. A
# listener that is ready in turn after turn is accepted from in batches.
cdef enum:
    BATCH_TURNS = 4            # after this number of turns in a row, the batch is doubled …
    BATCH_MAX = 32             # … up to this; then the connections have their turn
    READY_TURNS_MAX = 5 * BATCH_TURNS  # turns that are counted: the batch is at its maximum then
    ROOM_WAIT_MS = 20          # how long a client over the limit waits for room
    CONTEST_MS = 10            # how long an accept4 may wait while others clear O_NONBLOCK


# ── accept ───────────────────────────────────────────────────────────────────────────────────────

cdef inline void listener_accept_clients(Worker *worker, Listener *listener) noexcept nogil:
    """The listener is readable. It is level-triggered: clients that are left wait for the next
    turn."""
    cdef int count = listener_batch_size(listener, worker.turns)
    cdef bint first = True     # epoll promised one client; later accepts may find none
    cdef sockaddr_storage peer
    cdef socklen_t size
    cdef int fd
    while count > 0 and worker.policy_event_count < POLICY_EVENTS_MAX // 2:
        count -= 1
        if not (worker_has_room(worker) or first and worker_make_room(worker)) and not (
                listener.refuses and quarantine_takes_orphans(worker.quarantine)):
            if first:
                listener_wait_for_room(worker, listener)
            return
        first = False
        fd = listener_accept(worker, listener, &peer, &size)
        if fd >= 0:
            listener_admit(worker, listener, fd, &peer, size)
            continue
        if fd == -EINTR:
            return
        if fd == -EAGAIN:
            listener.ready_turns = 0
            listener.refuses = False
        else:
            policy_event_add(worker, EVENT_ACCEPT_FAILED, -1, -fd, listener.index)
        return


cdef inline bint worker_has_room(Worker *worker) noexcept nogil:
    return gauges_places(worker.gauges) < connection_limit(worker)


cdef inline bint worker_make_room(Worker *worker) noexcept nogil:
    """Give a client that waits the place of a flow of datagrams, if there is one to spare."""
    return worker.flows != NULL and worker.flows.make_room(worker)


cdef inline int listener_batch_size(Listener *listener, int64_t turn) noexcept nogil:
    """How many clients to accept in this turn, at most."""
    if listener.refuses:
        return POLICY_EVENTS_MAX
    if turn == listener.last_turn + 1:
        listener.ready_turns = min(listener.ready_turns + 1, READY_TURNS_MAX)
    else:
        listener.ready_turns = 0
    listener.last_turn = turn
    return min(1 << (listener.ready_turns // BATCH_TURNS), BATCH_MAX)


cdef inline int listener_accept(
    Worker *worker, Listener *listener, sockaddr_storage *peer, socklen_t *size
) noexcept nogil:
    """A client's fd, and its address; or -errno. -ELOOP: the client was ourselves, and was closed.
    """
    cdef int fd
    size[0] = sizeof(peer[0])
    fd = listener_accept4(listener, worker.ctx.now_ms, <sockaddr *>peer, size)
    if fd < 0:
        return -errno
    worker.accepted += 1
    if listener.family == AF_VSOCK:
        socket_unlinger(fd)
    socket_guard(fd, listener.family)
    if listener.early > 0:
        listener.early -= 1
        socket_tune(fd, listener.family)
    if (listener.check & CHECK_TCP and self_connect_came_back(worker.self_connects, fd, peer)
            or listener.check & CHECK_UNIX and socket_peer_pid(fd) == worker.pid):
        worker_hang_up(worker, fd, listener.family, True, NULL)
        worker.refused += 1
        return -ELOOP
    return fd


cdef inline int listener_accept4(
    Listener *listener, int64_t now_ms, sockaddr *peer, socklen_t *size
) noexcept nogil:
    """As accept4(2), which may block: if another process has taken the client, and has cleared
    O_NONBLOCK since the last look. No flag of the call prevents that. Once this was seen, an alarm
    ends such a wait; before that, a signal does, or the next client."""
    cdef int fd, error
    listener_keep_nonblocking(listener, now_ms)
    if not listener.contested:
        return accept4(listener.fd, peer, size, SOCK_CLOEXEC | SOCK_NONBLOCK)
    alarm_set(CONTEST_MS)
    fd = accept4(listener.fd, peer, size, SOCK_CLOEXEC | SOCK_NONBLOCK)
    error = errno
    alarm_set(0)
    errno_set(error)
    return fd


cdef inline void listener_keep_nonblocking(Listener *listener, int64_t now_ms) noexcept nogil:
    """O_NONBLOCK belongs to the open file description, and so to every process that shares it.

    Looked at once a millisecond: if clients come faster, a wait for the next one is short anyway.
    """
    cdef int flags
    if listener.nonblock_checked_ms == now_ms and not listener.contested:
        return
    listener.nonblock_checked_ms = now_ms
    flags = fcntl(listener.fd, F_GETFL)
    if flags < 0 or flags & O_NONBLOCK:
        return
    fcntl(listener.fd, F_SETFL, flags | O_NONBLOCK)
    listener.contested = alarm_is_handled()


cdef inline void listener_admit(
    Worker *worker, Listener *listener, int fd, const sockaddr_storage *peer, socklen_t size
) noexcept nogil:
    """A client is let in: it is connected, or handed to the policy."""
    cdef Source *source = NULL
    cdef Origin origin
    cdef PolicyEvent *event
    cdef long long result
    if worker.senders != NULL and is_sender(worker.senders, peer):
        # The one that counts is the client in its header.
        listener_hand_to_policy(worker, listener, fd, peer, size, NULL, True)
        return
    if worker.sources.buckets != NULL and not client_enter(worker, fd, peer, &source):
        listener_refuse(worker, listener, fd, peer, size, True)
        return
    if not listener.auto_connect or listener.check & CHECK_PORT and local_port(fd) != listener.port:
        listener_hand_to_policy(worker, listener, fd, peer, size, source, False)
        return
    if gauges_places(worker.gauges) >= connection_limit(worker):
        source_leave(source)
        listener_refuse(worker, listener, fd, peer, size, False)
        return
    listener.connected_count += 1
    origin.source = source
    origin.upstream = listener.terms.upstream
    origin.listener = listener.index
    origin.held_ms = 0
    peer_keep(&origin.peer, peer, size)
    result = connection_connect(
        worker, fd, listener.family, &listener.terms, NULL, 0, &origin, 0)
    if result < 0:
        listener.auto_connect = False  # later clients must not overtake it
        worker.held += 1
        source_hold(worker.sources, fd, source)
        event = policy_event_add(
            worker, EVENT_CONNECT_FAILED, fd, <int>-result, listener.index)
        if event != NULL:
            event.peer = origin.peer


cdef inline bint client_enter(
    Worker *worker, int fd, const sockaddr_storage *peer, Source **source
) noexcept nogil:
    """Give a client a place of its source; False: there is none left. A client is let in if its
    source is not known, or if there is no memory for it; NULL then."""
    cdef uint32_t key[SOURCE_WORDS]
    cdef int failure
    if not source_of_client(worker.sources, fd, peer, key):
        return True
    failure = source_enter(worker.sources, key, source)
    if failure < 0:
        source[0] = NULL
    return failure != -EUSERS


cdef inline void listener_refuse(
    Worker *worker, Listener *listener, int fd, const sockaddr_storage *peer, socklen_t size,
    bint by_source
) noexcept nogil:
    """Close a client over the limit, or with `by_source` over the share of its source."""
    cdef PolicyEvent *event
    worker_hang_up(worker, fd, listener.family, False, NULL)
    worker.refused += 1
    if by_source:
        worker.sources.refused += 1
    event = policy_event_add(worker, EVENT_REFUSED, -1, by_source, listener.index)
    if event != NULL:
        peer_keep(&event.peer, peer, size)


cdef inline void listener_hand_to_policy(
    Worker *worker, Listener *listener, int fd, const sockaddr_storage *peer, socklen_t size,
    Source *source, bint sends_header
) noexcept nogil:
    """Tell the policy of a client, with its address."""
    cdef PolicyEvent *event = policy_event_add(
        worker, EVENT_ACCEPTED, fd, sends_header, listener.index)
    worker.held += 1
    if event == NULL:  # listener_accept_clients() makes sure that there is room
        worker_hang_up(worker, fd, listener.family, True, source)
    else:
        source_hold(worker.sources, fd, source)
        peer_keep(&event.peer, peer, size)


cdef inline void peer_keep(
    Peer *kept, const sockaddr_storage *peer, socklen_t size
) noexcept nogil:
    """Keep the address that accept(2) has told: once a client has reset, the kernel no longer
    tells it."""
    kept.size = 0
    if size <= sizeof(kept.address):
        memcpy(kept.address, peer, size)
        kept.size = size


# ── start, stop, and wait for room ───────────────────────────────────────────────────────────────

cdef inline void listener_count_early(Listener *listener) noexcept nogil:
    """Count the clients that already wait: a socket has the options that its listener had when the
    client connected, and the client that started the program was there before we could set any."""
    cdef tcp_info about
    cdef socklen_t size = sizeof(about)
    memset(&about, 0, sizeof(about))
    if listener.family != AF_UNIX:
        getsockopt(listener.fd, IPPROTO_TCP, TCP_INFO, &about, &size)
    listener.early = about.tcpi_unacked  # of a listener: the length of its queue


cdef inline void listeners_resume(Worker *worker) noexcept nogil:
    """There is room again, or the wait for it is over: let the clients in, or have those over the
    limit closed."""
    cdef bint refuse = gauges_places(worker.gauges) >= connection_limit(worker)
    cdef Listener *listener
    cdef int failure
    if refuse and worker.ctx.now_ms < worker.room_ms:
        return
    worker.room_ms = 0
    while not list_empty(&worker.waiting_listeners):
        listener = <Listener *>worker.waiting_listeners.next.owner
        list_remove(&listener.waiting)
        listener.refuses = refuse
        failure = listener_watch(worker, listener)
        if failure < 0 and policy_event_add(
                worker, EVENT_ACCEPT_FAILED, -1, -failure, listener.index) == NULL:
            listener_wait_for_room(worker, listener)
            return


cdef inline void listener_wait_for_room(Worker *worker, Listener *listener) noexcept nogil:
    """There is no room: leave clients in the backlog until there is some. They are refused only if
    no connection ends for ROOM_WAIT_MS.

    A client that has closed and connects again often arrives before the target has closed as well.
    """
    if worker.room_ms == 0:
        worker.room_ms = worker.ctx.now_ms + ROOM_WAIT_MS
    listener_unwatch(worker, listener)
    list_append(&worker.waiting_listeners, &listener.waiting)


cdef inline int listener_watch(Worker *worker, Listener *listener) noexcept nogil:
    """Have epoll announce clients; 0 or -errno."""
    cdef epoll_event event
    event.events = EPOLLIN
    event.data.ptr = listener
    if epoll_ctl(worker.ctx.epoll, EPOLL_CTL_ADD, listener.fd, &event) < 0:
        return -errno
    listener.watched = True
    return 0


cdef inline void listener_unwatch(Worker *worker, Listener *listener) noexcept nogil:
    """Have epoll announce no clients. An interest of 0 would not do: a hang-up would be announced
    again and again."""
    list_remove(&listener.waiting)
    if listener.watched:
        epoll_ctl(worker.ctx.epoll, EPOLL_CTL_DEL, listener.fd, NULL)
        listener.watched = False
