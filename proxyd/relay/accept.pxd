# A listener: its clients are accepted here and, on the policy's terms, connected at once.
#
# The terms are a target and whether it is believed to be there (`express`). Within them a client
# costs no Python at all. Everything else becomes a note to the policy: a client accepted without
# terms, one over the limit, one whose connect failed, an error of accept.

from proxyd.relay.connection cimport (
    KIND_GATE, NOTES_MOST, NOTE_ACCEPTED, NOTE_FAILED, NOTE_NOBODY, NOTE_REFUSED, Note, Relaying,
    connection_open, note_add, relay_hang_up, room_limit, socket_tune, socket_unlinger,
)
from proxyd.relay.sys cimport (
    AF_UNIX, EAGAIN, EINTR, ELOOP, EPOLLIN, EPOLL_CTL_ADD, EPOLL_CTL_DEL, F_GETFL, F_SETFL,
    IPPROTO_TCP, O_NONBLOCK, SOCK_CLOEXEC, SOCK_NONBLOCK, SOL_SOCKET, SO_PEERCRED, TCP_INFO,
    accept4, epoll_ctl, epoll_event, errno, errno_set, fcntl, getsockopt, int64_t, memcpy, memset,
    shared_get, sockaddr, sockaddr_storage, socklen_t, tcp_info, ucred, uint16_t, uint32_t,
    uint64_t,
)
from proxyd.relay.list cimport Link, list_append, list_empty, list_remove
from proxyd.relay.self_connect cimport local_port, own_came_back
from proxyd.relay.quarantine cimport STRAYS_MOST
from proxyd.relay.signals cimport alarm_is_handled, alarm_set
from proxyd.relay.gauges cimport tally_places

# what to look for in an accepted client, to find that it is ourselves
cdef enum:
    GATE_CHECK_TCP = 1         # its address is one of our outgoing sockets'
    GATE_CHECK_UNIX = 2        # its process is this one
    GATE_CHECK_PORT = 4        # it connected to another port than the listener's

# One client at a time is the cheapest while few come: to be told that nobody else waits (EAGAIN)
# costs as much as a connection does, for the kernel makes the new socket before it looks. Where a
# listener is ready in turn after turn, more are accepted at a time.
cdef enum:
    CROWD_TURNS = 4            # after so many turns in a row, twice as many
    CROWD_MOST = 32            # before the connections have their turn
    READY_MOST = 5 * CROWD_TURNS  # turns that are counted: with them it is CROWD_MOST
    ROOM_WAIT_MS = 20          # a client over the limit waits so long for room
    CONTEST_MS = 10            # how long an accept4 may wait where others clear O_NONBLOCK

ctypedef struct GateState:
    int kind                   # KIND_GATE, where an Endpoint has its kind
    int fd
    int family
    int check                  # GATE_CHECK_*
    int index                  # the policy's number for it
    uint16_t port              # its own, in network byte order; for GATE_CHECK_PORT
    bint watched               # with epoll
    bint express               # connect at once
    sockaddr_storage target
    socklen_t target_size
    int64_t timeout_ms         # of a connect; 0: as long as the kernel tries
    uint64_t served            # clients connected, or on their way
    int64_t turn               # of the relay, in which it was last ready
    int ready_turns            # in a row, up to READY_MOST
    Link full                  # among those that wait for room
    bint refuses               # the wait was in vain
    bint contested             # whoever shares the listener has made it blocking
    int64_t looked_ms          # when O_NONBLOCK was last looked at
    uint32_t early             # clients to come who may be older than the settings of the listener


cdef inline bint peer_is_process(int fd, int pid) noexcept nogil:
    cdef ucred peer
    cdef socklen_t size = sizeof(peer)
    if getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0:
        return False
    return peer.pid == pid


cdef inline void gate_count_early(GateState *gate) noexcept nogil:
    """Count who waits already: a socket has what the listener had when its client connected, and
    the client for whom the program was started was there before it."""
    cdef tcp_info about
    cdef socklen_t size = sizeof(about)
    memset(&about, 0, sizeof(about))
    if gate.family != AF_UNIX:
        getsockopt(gate.fd, IPPROTO_TCP, TCP_INFO, &about, &size)
    gate.early = about.tcpi_unacked  # of a listener: the length of its queue


cdef inline void gate_keep_nonblocking(GateState *gate, int64_t now_ms) noexcept nogil:
    """O_NONBLOCK belongs to the open file description, and so to all who share the listener.

    Looked at once a millisecond: where clients come faster, none waits for the next for long.
    """
    cdef int flags
    if gate.looked_ms == now_ms and not gate.contested:
        return
    gate.looked_ms = now_ms
    flags = fcntl(gate.fd, F_GETFL)
    if flags < 0 or flags & O_NONBLOCK:
        return
    fcntl(gate.fd, F_SETFL, flags | O_NONBLOCK)
    gate.contested = alarm_is_handled()


cdef inline int gate_accept4(
    GateState *gate, int64_t now_ms, sockaddr *peer, socklen_t *size
) noexcept nogil:
    """As accept4(2), which may wait for a client that another process has taken, if that process
    has cleared O_NONBLOCK since the last look: no flag of one call prevents it. Where this was
    seen once an alarm ends such a wait; before that a signal does, or the next client."""
    cdef int fd, error
    gate_keep_nonblocking(gate, now_ms)
    if not gate.contested:
        return accept4(gate.fd, peer, size, SOCK_CLOEXEC | SOCK_NONBLOCK)
    alarm_set(CONTEST_MS)
    fd = accept4(gate.fd, peer, size, SOCK_CLOEXEC | SOCK_NONBLOCK)
    error = errno
    alarm_set(0)
    errno_set(error)
    return fd


cdef inline int gate_accept(
    Relaying *relay, GateState *gate, sockaddr_storage *peer, socklen_t *size
) noexcept nogil:
    """A client's fd, and its address; or -errno, -ELOOP for one that is ourselves and was closed.
    """
    cdef int fd
    size[0] = sizeof(peer[0])
    fd = gate_accept4(gate, relay.engine.now_ms, <sockaddr *>peer, size)
    if fd < 0:
        return -errno
    relay.accepted += 1
    if gate.family != AF_UNIX:
        socket_unlinger(fd)
    if gate.early > 0:
        gate.early -= 1
        socket_tune(fd, gate.family)
    if (gate.check & GATE_CHECK_TCP and own_came_back(relay.own, fd, peer)
            or gate.check & GATE_CHECK_UNIX and peer_is_process(fd, relay.pid)):
        relay_hang_up(relay, fd, gate.family, True)
        relay.refused += 1
        return -ELOOP
    return fd


cdef inline void gate_announce(
    Relaying *relay, GateState *gate, int fd, const sockaddr_storage *peer, socklen_t size
) noexcept nogil:
    """A client for the policy, with the address that accept(2) has told: once a client has reset,
    the kernel tells it no more. That of a UNIX client may not fit, but can be asked for later."""
    cdef Note *note = note_add(relay, NOTE_ACCEPTED, fd, 0, gate.index)
    relay.held += 1
    if note == NULL:  # gate_event() sees to it that there is room
        relay_hang_up(relay, fd, gate.family, True)
    elif size <= sizeof(note.peer):
        memcpy(&note.peer, peer, size)
        note.peer_size = size


cdef inline void gate_admit(
    Relaying *relay, GateState *gate, int fd, const sockaddr_storage *peer, socklen_t size
) noexcept nogil:
    """A client is in: on its way to the target, or before the policy."""
    cdef long long result
    if not gate.express or gate.check & GATE_CHECK_PORT and local_port(fd) != gate.port:
        gate_announce(relay, gate, fd, peer, size)
        return
    if tally_places(relay.tally) >= room_limit(relay):
        relay_hang_up(relay, fd, gate.family, False)
        relay.refused += 1
        note_add(relay, NOTE_REFUSED, -1, 0, gate.index)
        return
    gate.served += 1
    result = connection_open(relay, fd, gate.family, &gate.target, gate.target_size, NULL, 0,
                             gate.index, gate.timeout_ms)
    if result < 0:
        gate.express = False  # whoever comes next must not overtake it
        relay.held += 1
        note_add(relay, NOTE_FAILED, fd, <int>-result, gate.index)


cdef inline int gate_crowd(GateState *gate, int64_t turn) noexcept nogil:
    """How many clients to accept in this turn."""
    gate.ready_turns = min(gate.ready_turns + 1, READY_MOST) if turn == gate.turn + 1 else 0
    gate.turn = turn
    return min(1 << (gate.ready_turns // CROWD_TURNS), CROWD_MOST)


cdef inline int gate_watch(Relaying *relay, GateState *gate) noexcept nogil:
    """Have epoll announce clients; 0 or -errno."""
    cdef epoll_event event
    event.events = EPOLLIN
    event.data.ptr = gate
    if epoll_ctl(relay.engine.epoll, EPOLL_CTL_ADD, gate.fd, &event) < 0:
        return -errno
    gate.watched = True
    return 0


cdef inline void gate_unwatch(Relaying *relay, GateState *gate) noexcept nogil:
    """Not by an interest of 0: a hang-up would be announced again and again all the same."""
    list_remove(&gate.full)
    if gate.watched:
        epoll_ctl(relay.engine.epoll, EPOLL_CTL_DEL, gate.fd, NULL)
        gate.watched = False


cdef inline void gate_rest(Relaying *relay, GateState *gate) noexcept nogil:
    """There is no room, and a client has to wait for it in the backlog.

    A client that has closed and comes again is often here before the target has closed too. So
    nobody is refused before ROOM_WAIT_MS have passed without a connection's end.
    """
    if relay.room_ms == 0:
        relay.room_ms = relay.engine.now_ms + ROOM_WAIT_MS
    gate_unwatch(relay, gate)
    list_append(&relay.full, &gate.full)


cdef inline void gates_reopen(Relaying *relay) noexcept nogil:
    """There is room again, or the wait for it has been long enough: let the clients in, or hear
    that they are too many."""
    cdef bint refuse = tally_places(relay.tally) >= room_limit(relay)
    cdef GateState *gate
    cdef int failure
    if refuse and relay.engine.now_ms < relay.room_ms:
        return
    relay.room_ms = 0
    while not list_empty(&relay.full):
        gate = <GateState *>relay.full.next.owner
        list_remove(&gate.full)
        gate.refuses = refuse
        failure = gate_watch(relay, gate)
        if failure < 0 and note_add(relay, NOTE_NOBODY, -1, -failure, gate.index) == NULL:
            gate_rest(relay, gate)
            return


cdef inline void gate_event(Relaying *relay, GateState *gate) noexcept nogil:
    """The listener is readable. Level-triggered: who is left waits for the next turn."""
    cdef int most = NOTES_MOST if gate.refuses else gate_crowd(gate, relay.turns)
    cdef bint first = True     # somebody is there, while after him perhaps nobody
    cdef sockaddr_storage peer
    cdef socklen_t size
    cdef int fd
    while most > 0 and relay.notes_count < NOTES_MOST // 2:
        most -= 1
        if tally_places(relay.tally) >= room_limit(relay) and not (
                gate.refuses and shared_get(&relay.quarantine.strays) < STRAYS_MOST):
            if first:
                gate_rest(relay, gate)
            return
        first = False
        fd = gate_accept(relay, gate, &peer, &size)
        if fd >= 0:
            gate_admit(relay, gate, fd, &peer, size)
            continue
        if fd == -EINTR:
            return
        if fd == -EAGAIN:
            gate.ready_turns = 0
            gate.refuses = False
        else:
            note_add(relay, NOTE_NOBODY, -1, -fd, gate.index)
        return
