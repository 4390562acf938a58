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

from proxyd.relay.busy cimport Busy, Machine, SPARE_FOR_NEW
from proxyd.relay.pump cimport (
    DEAD, DRAINING, Endpoint, Engine, FLOWING, Half, SHUT, STAT_TO_CLIENT, STAT_TO_TARGET,
    endpoint_failed, endpoint_interest, endpoint_lost, endpoint_recv, endpoint_refuse_rights,
    half_abandon, half_drop, half_held, half_keep, half_pump, spill_free,
)
from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, AF_UNIX, AF_UNSPEC, AF_VSOCK, EAGAIN, ECONNREFUSED, ECONNRESET, EINPROGRESS,
    EINTR, ELOOP, ENOMEM, ENOTCONN, EPIPE, EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI,
    EPOLLRDHUP, EPOLL_CTL_ADD, EPOLL_CTL_DEL, ETIMEDOUT, IPPROTO_TCP, MSG_DONTWAIT, MSG_NOSIGNAL,
    MSG_PEEK, SHUT_RDWR, SHUT_WR, SIOCOUTQ, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, SOL_SOCKET,
    SO_ERROR, SO_KEEPALIVE, SO_LINGER, SO_OOBINLINE, TCP_NODELAY, calloc, close, connect,
    counter_add, epoll_ctl, epoll_event, errno, free, getpeername, getsockname, getsockopt,
    int64_t, ioctl, linger, memcmp, memset, pthread_t, recv, send, setsockopt, shared_add,
    shared_get, shutdown, sockaddr, sockaddr_in6, sockaddr_storage, socket, socklen_t, uint32_t,
    uint64_t,
)
from proxyd.relay.mailbox cimport Inbox, inbox_put, inbox_ring
from proxyd.relay.list cimport Link, link_init, list_append, list_empty, list_remove
from proxyd.relay.self_connect cimport Own, OwnTable, own_add, own_remove
from proxyd.relay.pipe cimport pipe_init, pool_clear
from proxyd.relay.quarantine cimport Quarantine, quarantine_put
from proxyd.relay.rights cimport (
    RIGHTS_AHEAD, RIGHTS_ANY, RIGHTS_MAYBE, RIGHTS_NONE, RIGHTS_UNKNOWN, Rights, rights_may_close,
    rights_refuse,
)
from proxyd.relay.gauges cimport Tally, tally_join, tally_leave

cdef enum:
    KIND_WATCH, KIND_GATE, KIND_INBOX, KIND_CLIENT, KIND_TARGET

cdef enum:
    CONNECTING, CONNECTED, LINGERING, CLOSED

# what run() tells the policy
cdef enum:
    NOTE_READY, NOTE_ACCEPTED, NOTE_NOBODY, NOTE_REFUSED, NOTE_FAILED, NOTE_BUSY

cdef enum:
    EVENTS_MOST = 256          # per epoll_wait
    NOTES_MOST = 512           # per turn; gates stop at half, the other half is for watched fds

# how a connection ended
cdef enum:
    HOW_ENDED, HOW_RESET, HOW_IDLE, HOW_CUT, HOW_GONE, HOW_COUNT

cdef enum:
    DRAIN_BYTES = 1024 * 1024  # most that is read from a side and thrown away
    STUCK_MS = 5000            # a send queue that has not moved for so long is given up
    LINGER_FIRST_MS = 1        # the first look at a send queue, then twice as long each time …
    LINGER_LONGEST_MS = 128    # … up to this

ctypedef struct Connection:
    Link live                  # all of a relay's, the longest without a byte first; or the dead
    Link timed                 # connecting, lingering or stuck ones: `wake_ms` says when to look
    Link again                 # those whose pump spent its budget
    Link exile                 # those that are to go into quarantine
    Quarantine *quarantine     # the program's
    Endpoint client
    Endpoint target
    Half up                    # client → target
    Half down                  # target → client
    Own own                    # the target socket's own address, to recognise loops
    long long id
    int listener               # index of the one it came from; the caller's
    int state
    int how                    # HOW_*, valid once CLOSED
    int64_t timeout_ms         # of the connect; 0: as long as the kernel tries
    int64_t opened_ms
    int64_t active_ms          # when a byte last moved
    int64_t wake_ms
    int64_t progress_ms        # when the queue towards the lingering side last moved
    uint64_t queue             # what it was then, bytes
    uint64_t moved             # up.moved + down.moved when last looked at
    int pause_ms               # until the next look
    size_t drained             # bytes thrown away, since nobody is there to take them
    Endpoint *last             # the side that lingers
    bint reset                 # it is to be reset at the end
    bint late                  # the quarantine has a socket of it to close
    bint stray                 # … and that is all that it is: a socket without a connection

ctypedef struct Relaying       # below

ctypedef struct Note:
    int kind
    int fd
    uint32_t value             # epoll events, or an errno
    int index                  # of the gate
    sockaddr_in6 peer          # of an accepted client: what accept(2) said, as far as it fits …
    socklen_t peer_size        # … or 0

ctypedef struct Crew:
    Relaying **relays
    int count
    int size                   # of `relays`
    int window_ms              # how long a relay must have been busy to hand work over
    Machine machine            # where to learn whether another CPU is idle
    Relaying *quarantine       # NULL: nobody has needed it yet
    bint asked_for             # the boss has told the policy that it could need a crew
    int asked                  # how often they were asked whether they are alive

ctypedef struct Relaying:
    Engine engine
    Tally *tally               # what all relays of the program count together
    OwnTable *own              # likewise
    Quarantine *quarantine     # where to leave what may block
    Inbox inbox                # what other threads have left here
    Relaying *boss             # the relay that accepts and hands over; NULL: this is the one
    Crew crew                  # the boss's: those it hands over to
    pthread_t thread           # a crew's relay: where it runs
    bint shares                # it hands over only what is too much for it
    Busy busy
    int asleep                 # it waits for events
    bint stopping              # a crew's relay: it was told to end
    int answered               # a crew's relay: up to which of the boss's questions
    Link live
    Link timed
    Link again
    Link failed                # connects that failed: the caller gets the client back
    Link ended                 # closed ones, to be reported
    Link dead                  # closed ones, to be freed after the batch
    Link exiles                # those that are to go into quarantine after the batch
    int cut                    # the quarantine's relay: how many it has cut in the end
    int open                   # connections of this relay
    int connections_max        # of all relays, before gates refuse; the policy's
    int held                   # clients that the policy has: each takes a place of the limit
    Link full                  # gates that wait for room
    int64_t room_ms            # until when they do; 0: none does
    int64_t idle_ms            # close what has not moved a byte for so long; 0: never
    long long last_id
    uint64_t handed_over       # connections that others have from here
    uint64_t accepted
    uint64_t refused           # of them, closed at once: over the limit, or ourselves
    int64_t turns              # epoll_wait calls
    epoll_event events[EVENTS_MOST]
    Note notes[NOTES_MOST]
    int notes_count
    int64_t next_wake_ms       # the earliest of `timed`; 0: none
    int pid                    # this process
    bint report_ends
    uint64_t ends[HOW_COUNT]   # connections ended, by HOW_*


# ── set-up ───────────────────────────────────────────────────────────────────────────────────

cdef inline void endpoint_init(
    Endpoint *end, int kind, int fd, int family, void *owner
) noexcept nogil:
    end.kind = kind
    end.fd = fd
    end.family = family
    end.writable = 1
    end.late = -1
    end.connection = owner


cdef inline void half_init(Half *half, Endpoint *src, Endpoint *dst, int direction) noexcept nogil:
    half.src = src
    half.dst = dst
    half.direction = direction
    half.state = FLOWING
    pipe_init(&half.pipe)


cdef inline Connection *connection_new(
    Relaying *relay, int client, int client_family, int target, int target_family,
    const char *preamble, size_t preamble_size
) noexcept nogil:
    """`preamble` is to be sent first. Neither fd is owned yet. NULL: no memory."""
    cdef Connection *c = <Connection *>calloc(1, sizeof(Connection))
    if c == NULL:
        return NULL
    if preamble_size > 0 and half_keep(&c.up, preamble, preamble_size) < 0:
        free(c)
        return NULL
    relay.last_id += 1
    c.id = relay.last_id
    link_init(&c.live, c)
    link_init(&c.timed, c)
    link_init(&c.again, c)
    link_init(&c.exile, c)
    c.quarantine = relay.quarantine
    endpoint_init(&c.client, KIND_CLIENT, client, client_family, c)
    endpoint_init(&c.target, KIND_TARGET, target, target_family, c)
    half_init(&c.up, &c.client, &c.target, STAT_TO_TARGET)
    half_init(&c.down, &c.target, &c.client, STAT_TO_CLIENT)
    c.client.readable = 1
    return c


cdef inline bint endpoint_register(Engine *engine, Endpoint *end) noexcept nogil:
    """Whether epoll announces it from now on. What is there already is announced at once."""
    cdef epoll_event event
    if end.fd < 0:
        return True
    event.events = endpoint_interest(end)
    event.data.ptr = end
    end.registered = epoll_ctl(engine.epoll, EPOLL_CTL_ADD, end.fd, &event) == 0
    return end.registered


cdef inline void endpoint_unregister(Engine *engine, Endpoint *end) noexcept nogil:
    """Before every close(2): where another process has the socket too, that leaves it in epoll, and
    a later event would point to memory that is freed."""
    if end.registered:
        epoll_ctl(engine.epoll, EPOLL_CTL_DEL, end.fd, NULL)
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
    if c.late:
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

cdef inline void connection_wake_at(Relaying *relay, Connection *c, int64_t when_ms) noexcept nogil:
    list_remove(&c.timed)
    list_append(&relay.timed, &c.timed)
    c.wake_ms = when_ms
    if relay.next_wake_ms == 0 or when_ms < relay.next_wake_ms:
        relay.next_wake_ms = when_ms


cdef inline void connection_active(Relaying *relay, Connection *c) noexcept nogil:
    """Note whether bytes have moved since the last look."""
    cdef uint64_t moved = c.up.moved + c.down.moved
    cdef uint64_t held = half_held(&c.up) + half_held(&c.down)
    if moved - held == c.moved:
        return
    c.moved = moved - held
    c.active_ms = relay.engine.now_ms
    list_remove(&c.live)
    list_append(&relay.live, &c.live)


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


cdef inline void endpoint_close_late(Relaying *relay, Endpoint *end) noexcept nogil:
    """Its peer sees the end now, and the quarantine closes it once the connection is freed. Until
    then it keeps its place in the limit, but is no open connection: nobody waits for it, neither
    a drain nor an idle exit."""
    cdef Connection *c = <Connection *>end.connection
    shutdown(end.fd, SHUT_RDWR)
    end.late = end.fd
    if not c.late:
        c.late = True
        shared_add(&relay.tally.late, 1)


cdef inline bint endpoint_may_close(Endpoint *end) noexcept nogil:
    """Whether close(2) cannot wait, for descriptors that were sent to it. See rights.pxd."""
    return end.family != AF_UNIX or end.ended or rights_may_close(&end.rights, end.fd)


cdef inline void endpoint_close(Relaying *relay, Endpoint *end, bint reset) noexcept nogil:
    if end.fd < 0:
        return
    endpoint_unregister(&relay.engine, end)
    if not endpoint_may_close(end):
        endpoint_close_late(relay, end)
    elif reset:
        socket_reset(end.fd, end.family)
    else:
        if end.rights.state == RIGHTS_ANY and end.family != AF_UNIX:
            socket_unlinger(end.fd)  # what connection_exile() has set
        close(end.fd)
    end.fd = -1


cdef inline void relay_hang_up(Relaying *relay, int fd, int family, bint reset) noexcept nogil:
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
    c = connection_new(relay, fd, family, -1, family, NULL, 0)
    if c == NULL:
        shutdown(fd, SHUT_RDWR)
        return
    endpoint_close_late(relay, &c.client)
    c.client.fd = -1
    c.state = CLOSED
    c.stray = True
    shared_add(&relay.quarantine.strays, 1)
    connection_free(c)


cdef inline void connection_unlink(Relaying *relay, Connection *c) noexcept nogil:
    list_remove(&c.live)
    list_remove(&c.timed)
    list_remove(&c.again)
    list_remove(&c.exile)
    own_remove(relay.own, &c.own)
    half_drop(&c.up)
    half_drop(&c.down)
    c.state = CLOSED


cdef inline void relay_left(Relaying *relay) noexcept nogil:
    """This relay has a connection less."""
    if shared_add(&relay.open, -1) == 0:
        pool_clear(&relay.engine.pool)


cdef inline void connections_fewer(Relaying *relay) noexcept nogil:
    """The program has a connection less."""
    if tally_leave(relay.tally, relay.engine.now_ms) and relay.boss != NULL:
        inbox_ring(&relay.boss.inbox)


cdef inline void connection_close(
    Relaying *relay, Connection *c, int how, bint reset
) noexcept nogil:
    """Close whatever is left of it, both sides the same way."""
    endpoint_close(relay, &c.client, reset)
    endpoint_close(relay, &c.target, reset)
    connection_unlink(relay, c)
    c.how = how
    counter_add(&relay.ends[how], 1)
    list_append(&relay.ended if relay.report_ends else &relay.dead, &c.live)
    relay_left(relay)
    connections_fewer(relay)


cdef inline int64_t endpoint_queue(const Endpoint *end) noexcept nogil:
    """Bytes its peer has not acknowledged; 0 for AF_UNIX, where they are with the peer already."""
    cdef int size = 0
    if end.family != AF_INET and end.family != AF_INET6:
        return 0
    if ioctl(end.fd, SIOCOUTQ, &size) < 0:
        return 0
    return size


cdef inline bint connection_stuck(Relaying *relay, Connection *c, uint64_t queue) noexcept nogil:
    """Whether the queue towards the last side has not moved for STUCK_MS."""
    if queue != c.queue:
        c.queue = queue
        c.progress_ms = relay.engine.now_ms
    return relay.engine.now_ms - c.progress_ms >= STUCK_MS


cdef inline bint endpoint_drain(Relaying *relay, Connection *c, Endpoint *end) noexcept nogil:
    """Throw away what it sends, up to DRAIN_BYTES. True once it has ended."""
    cdef ssize_t size
    while end.readable and c.drained < DRAIN_BYTES:
        size = endpoint_recv(end, relay.engine.buffer, relay.engine.stream_unit)
        if size > 0:
            c.drained += <size_t>size
        elif size < 0 and errno != EAGAIN and errno != EINTR:
            end.readable = 0
            endpoint_failed(end, errno)
    return end.ended or end.error != 0


cdef inline void connection_look_ahead(Relaying *relay, Connection *c) noexcept nogil:
    """Where descriptors come next, this relay is not to read any more: after the batch the
    connection goes into quarantine."""
    if c.client.rights.state == RIGHTS_AHEAD or c.target.rights.state == RIGHTS_AHEAD:
        list_remove(&c.exile)
        list_append(&relay.exiles, &c.exile)


cdef inline bint linger_over(Relaying *relay, Connection *c) noexcept nogil:
    """Whether the last side may be closed.

    What it sends meanwhile is thrown away: it may have all of that to say before it reads. But it
    is then to hear that nobody was there.
    """
    cdef int64_t queue
    if c.last.error != 0:
        return True
    if c.last.family == AF_UNIX:
        c.last.readable = 1  # unread input would turn its end into an error
    if endpoint_drain(relay, c, c.last):
        if c.last.error != 0:
            return True  # perhaps for want of memory: it may live on, and is still to be reset
        if last_was_sent_an_end(c):
            c.reset = False
            return True
    c.reset |= c.drained > 0
    queue = endpoint_queue(c.last)
    return queue == 0 or connection_stuck(relay, c, <uint64_t>queue)


cdef inline bint last_was_sent_an_end(const Connection *c) noexcept nogil:
    return (c.up.state if c.last == &c.target else c.down.state) == SHUT


cdef inline void linger_step(Relaying *relay, Connection *c) noexcept nogil:
    """Look whether the last side may be closed; otherwise look again later, less and less often."""
    if linger_over(relay, c):
        connection_close(relay, c, HOW_RESET if c.reset else HOW_ENDED, c.reset)
        return
    connection_look_ahead(relay, c)
    connection_wake_at(relay, c, relay.engine.now_ms + c.pause_ms)
    c.pause_ms = min(2 * c.pause_ms, LINGER_LONGEST_MS)


cdef inline void connection_linger(
    Relaying *relay, Connection *c, Endpoint *last, Endpoint *other
) noexcept nogil:
    """`other` has nothing more to give or take: close it, and `last` when its time has come.

    One that has failed may live on, where the kernel had no memory: it must not see a clean end.
    """
    endpoint_close(relay, other, other.error != 0)
    own_remove(relay.own, &c.own)
    half_drop(&c.up)
    half_drop(&c.down)
    list_remove(&c.again)
    c.state = LINGERING
    c.last = last
    c.reset = other.error != 0 or other.refused
    c.progress_ms = relay.engine.now_ms
    c.pause_ms = LINGER_FIRST_MS
    linger_step(relay, c)


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
    Relaying *relay, Connection *c, Half *half, Half *other
) noexcept nogil:
    """Draw the consequences of what the pumps have found, for src → dst."""
    if c.state != CONNECTED:
        return
    if half.dst.gone:
        half_abandon(half)
    elif half.state == DRAINING and half_held(half) == 0:
        if half.src.error != 0:
            connection_linger(relay, c, half.dst, half.src)
        else:
            half_finish(half, other)


cdef inline void connection_settle(Relaying *relay, Connection *c) noexcept nogil:
    """The one place where a connection's end is decided."""
    half_settle(relay, c, &c.up, &c.down)
    half_settle(relay, c, &c.down, &c.up)
    if c.state != CONNECTED or c.up.state < SHUT and c.down.state < SHUT:
        return
    if c.up.state == SHUT and c.down.state == SHUT:
        connection_close(relay, c, HOW_ENDED, False)
    elif c.up.state == DEAD and c.down.state == DEAD:
        connection_close(relay, c, HOW_RESET, c.client.error != 0 or c.target.error != 0)
    elif c.up.state == SHUT and c.down.state == DEAD:
        connection_linger(relay, c, &c.target, &c.client)
    elif c.down.state == SHUT and c.up.state == DEAD:
        connection_linger(relay, c, &c.client, &c.target)
    elif c.wake_ms == 0 and (
            c.client.error != 0 or c.target.error != 0 or c.drained >= DRAIN_BYTES):
        # A side has failed, or is gone and the other has sent much in vain; and the other does
        # not take its last words. Watch that they move.
        c.progress_ms = relay.engine.now_ms
        c.pause_ms = LINGER_LONGEST_MS
        connection_wake_at(relay, c, relay.engine.now_ms + c.pause_ms)


cdef inline void connection_swallow(Relaying *relay, Connection *c) noexcept nogil:
    """What a side sends to one that is gone is thrown away, so that it comes to read the last
    words of that one: it may wait for its own to be taken first."""
    if c.up.state == DEAD:
        endpoint_drain(relay, c, &c.client)
    elif c.down.state == DEAD:
        endpoint_drain(relay, c, &c.target)


cdef inline void connection_advance(Relaying *relay, Connection *c) noexcept nogil:
    """Pump both halves as far as they go, then settle what follows."""
    cdef bint more = half_pump(&relay.engine, &c.up)
    more |= half_pump(&relay.engine, &c.down)
    # What the second pump has found may free the first: a failed write leaves last words to read.
    if c.client.gone and not more:
        more = half_pump(&relay.engine, &c.up)
    connection_swallow(relay, c)
    connection_settle(relay, c)
    if c.state == CLOSED:
        return
    connection_look_ahead(relay, c)
    connection_active(relay, c)
    if more and c.state == CONNECTED:
        list_remove(&c.again)
        list_append(&relay.again, &c.again)


cdef inline void connection_look(Relaying *relay, Connection *c) noexcept nogil:
    """A side is gone, and its last words wait for a reader: give up where nothing moves."""
    cdef Half *half = &c.down if c.up.state == DEAD else &c.up
    cdef uint64_t queue = half.moved + half_held(half) + <uint64_t>endpoint_queue(half.dst)
    if connection_stuck(relay, c, queue):
        connection_close(relay, c, HOW_RESET, True)
    else:
        connection_wake_at(relay, c, relay.engine.now_ms + c.pause_ms)


# ── the connect ──────────────────────────────────────────────────────────────────────────────

cdef inline int socket_take_error(int fd) noexcept nogil:
    """SO_ERROR, which reading clears."""
    cdef int error = 0
    cdef socklen_t size = sizeof(error)
    if getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0:
        return errno
    return error


cdef inline bint socket_met_itself(int fd) noexcept nogil:
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


cdef inline void connect_failed(Relaying *relay, Connection *c, int error) noexcept nogil:
    """Give the client back, with the bytes already taken from it. The connection counts until the
    policy has it: otherwise somebody else could be let in for it meanwhile."""
    endpoint_unregister(&relay.engine, &c.client)
    endpoint_close(relay, &c.target, True)  # it may have accepted, and nothing was sent to it
    list_remove(&c.live)
    list_remove(&c.timed)
    own_remove(relay.own, &c.own)
    c.state = CLOSED
    c.target.error = ECONNREFUSED if vsock_refused(c, error) else error
    list_append(&relay.failed, &c.live)
    relay_left(relay)


cdef inline bint vsock_refused(const Connection *c, int error) noexcept nogil:
    """Whether nobody listens on that VSOCK port: the virtio transport answers a request with RST.
    A connection that was made and then reset ends without an error there."""
    return c.target.family == AF_VSOCK and error == ECONNRESET


cdef inline bint target_was_reached(const Connection *c, int error) noexcept nogil:
    """Whether a connect that ended with `error` met a target that accepted and then reset."""
    return (error == ECONNRESET or error == EPIPE) and not vsock_refused(c, error)


cdef inline void connect_done(Relaying *relay, Connection *c) noexcept nogil:
    list_remove(&c.timed)
    c.wake_ms = 0
    c.state = CONNECTED
    if c.own.self_possible and socket_met_itself(c.target.fd):
        c.state = CONNECTING
        connect_failed(relay, c, ELOOP)


cdef inline bint client_has_spoken(const Connection *c) noexcept nogil:
    cdef char byte
    return c.up.moved > 0 or recv(c.client.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0


cdef inline void connecting_event(
    Relaying *relay, Connection *c, Endpoint *end, uint32_t events
) noexcept nogil:
    """A target that accepted and then reset has been reached: that is for the client to see.

    A client that is gone is dropped, unless it has ended cleanly and said something: that is still
    delivered. The target may have accepted, and hears how the client went.
    """
    if end.kind == KIND_CLIENT:
        if end.gone and (end.error != 0 or not client_has_spoken(c)):
            connection_close(relay, c, HOW_GONE, end.error != 0)
        return
    if end.error != 0 and not target_was_reached(c, end.error):
        connect_failed(relay, c, end.error)
    elif events & (EPOLLOUT | EPOLLERR | EPOLLHUP | EPOLLRDHUP):
        connect_done(relay, c)


cdef inline void connecting_send(
    Relaying *relay, Connection *c, const char *data, size_t size
) noexcept nogil:
    """The first bytes for the target, sent before it is known to be there. They are kept until it
    has taken them: the next target may need them."""
    cdef ssize_t sent = send(c.target.fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL)
    cdef int error = errno
    if sent < 0:
        sent = 0
        if target_was_reached(c, error):
            endpoint_lost(&c.target, error)
            connect_done(relay, c)
            return
        # ENOTCONN is what VSOCK says instead of EAGAIN.
        if error != EAGAIN and error != EINTR and error != ENOTCONN:
            endpoint_failed(&c.target, error)
    if c.up.spill != NULL:
        c.up.spill_at += <size_t>sent
        if c.up.spill_at == c.up.spill_end:
            spill_free(&c.up)
    elif <size_t>sent < size and half_keep(&c.up, data + sent, size - <size_t>sent) < 0:
        connection_close(relay, c, HOW_RESET, True)
        return
    counter_add(&relay.engine.counters.forwarded[STAT_TO_TARGET], <size_t>sent)
    counter_add(&relay.engine.counters.copied, <size_t>sent)
    if c.target.gone:
        connect_failed(relay, c, c.target.error)
    elif sent > 0:
        connect_done(relay, c)


cdef inline void connection_first_pump(Relaying *relay, Connection *c) noexcept nogil:
    """Do not wait to hear that the target is there: over loopback and UNIX sockets it is, before
    connect() has returned. Otherwise send answers EAGAIN, and the bytes wait for the connection.

    Unless the target may be the socket itself: what is sent there cannot be taken back.
    """
    cdef ssize_t size
    if c.own.self_possible:
        return
    if c.up.spill != NULL:
        connecting_send(relay, c, c.up.spill, c.up.spill_end)
    else:
        size = endpoint_recv(&c.client, relay.engine.buffer, relay.engine.first_unit)
        if size > 0:
            c.up.moved += <size_t>size
            connecting_send(relay, c, relay.engine.buffer, <size_t>size)
        elif size == 0:
            c.up.state = DRAINING
        elif errno != EAGAIN and errno != EINTR:
            connection_close(relay, c, HOW_GONE, True)
    if c.state == CONNECTED:
        connection_advance(relay, c)


cdef inline void connection_begin(Relaying *relay, Connection *c) noexcept nogil:
    """Pump for the first time in this relay, and only then ask epoll: most short exchanges have by
    then been heard, and need no event to say so."""
    if c.late and c.state == CLOSED:
        connection_bury(relay, c)
        return
    c.active_ms = relay.engine.now_ms
    list_append(&relay.live, &c.live)
    if c.client.family == AF_UNIX and c.client.rights.state == RIGHTS_UNKNOWN:
        socket_tune(c.client.fd, AF_UNIX)
        endpoint_refuse_rights(&relay.engine, &c.client)
    if c.state == CONNECTING:
        connection_first_pump(relay, c)
    elif c.state == LINGERING:
        linger_step(relay, c)
    else:
        connection_advance(relay, c)
    if c.state == CLOSED:
        return
    c.target.armed |= c.state == CONNECTING
    if not endpoint_register(&relay.engine, &c.client) or (
            not endpoint_register(&relay.engine, &c.target)):
        connection_close(relay, c, HOW_RESET, True)
    elif c.state == CONNECTING and c.timeout_ms > 0:
        connection_wake_at(relay, c, relay.engine.now_ms + c.timeout_ms)
    elif c.wake_ms != 0 and list_empty(&c.timed):
        connection_wake_at(relay, c, c.wake_ms)  # as it was before it came here


cdef inline void connection_bury(Relaying *relay, Connection *c) noexcept nogil:
    """In quarantine: close the sockets that a connection has left, however long that takes."""
    if c.client.late >= 0:
        close(c.client.late)
    if c.target.late >= 0:
        close(c.target.late)
    if c.stray:
        shared_add(&relay.quarantine.strays, -1)
    free(c)
    shared_add(&relay.tally.late, -1)
    inbox_ring(&relay.boss.inbox)  # there may be clients that wait for room


cdef inline Relaying *relay_with_least(Relaying *boss) noexcept nogil:
    """The relay with the fewest connections; the boss's own where that is no more than others
    have, since it costs no change of threads."""
    cdef Relaying *least = boss
    cdef int fewest = shared_get(&boss.open)
    cdef int i, count
    for i in range(boss.crew.count):
        count = shared_get(&boss.crew.relays[i].open)
        if count < fewest:
            fewest = count
            least = boss.crew.relays[i]
    return least


cdef inline Relaying *relay_for_new(Relaying *boss) noexcept nogil:
    """Where a new connection is to begin: with the boss, unless that is too much for it."""
    if boss.shares and boss.busy.spare < SPARE_FOR_NEW:
        return boss
    return relay_with_least(boss)


cdef inline void connection_place(Relaying *boss, Connection *c, bint connecting) noexcept nogil:
    """Count a new connection, and have it begin."""
    cdef Relaying *relay = relay_for_new(boss)
    c.opened_ms = boss.engine.now_ms
    c.state = CONNECTING if connecting else CONNECTED
    tally_join(boss.tally)
    shared_add(&relay.open, 1)
    if relay == boss:
        connection_begin(boss, c)
    else:
        counter_add(&boss.handed_over, 1)
        inbox_put(&relay.inbox, &relay.inbox.begin, &c.live)


cdef inline void target_set_rights(const Engine *engine, Endpoint *target) noexcept nogil:
    """What socket_connect() has made of it, before anybody could send it anything."""
    target.rights.state = RIGHTS_NONE if engine.may_refuse else RIGHTS_MAYBE


cdef inline int socket_connect(
    Engine *engine, const sockaddr_storage *address, socklen_t size, bint *connecting
) noexcept nogil:
    """A new socket on its way to `address`, or there; or -errno."""
    cdef int fd = socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    cdef int error
    if fd < 0:
        return -errno
    socket_tune(fd, address.ss_family)
    if address.ss_family == AF_UNIX:
        engine.may_refuse = engine.may_refuse and rights_refuse(fd)
    connecting[0] = False
    if connect(fd, <const sockaddr *>address, size) < 0:
        error = errno
        if error != EINPROGRESS:
            close(fd)
            return -error
        connecting[0] = True
    return fd


cdef inline long long connection_open(
    Relaying *relay, int client, int client_family, const sockaddr_storage *address,
    socklen_t size, const char *preamble, size_t preamble_size, int listener,
    int64_t timeout_ms
) noexcept nogil:
    """Connect a client to `address` and forward. The id, or -errno and the client is not owned."""
    cdef Connection *c
    cdef bint connecting
    cdef long long number
    cdef int fd = socket_connect(&relay.engine, address, size, &connecting)
    if fd < 0:
        return fd
    c = connection_new(relay, client, client_family, fd, address.ss_family,
                       preamble, preamble_size)
    if c == NULL:
        relay_hang_up(relay, fd, address.ss_family, False)
        return -ENOMEM
    number = c.id
    target_set_rights(&relay.engine, &c.target)
    c.listener = listener
    c.timeout_ms = timeout_ms
    own_add(relay.own, &c.own, fd, address)
    connection_place(relay, c, connecting)
    return number


# ── the limit ────────────────────────────────────────────────────────────────────────────────

cdef inline int room_limit(const Relaying *relay) noexcept nogil:
    """How many connections and sockets in quarantine the limit leaves room for."""
    return relay.connections_max - relay.held


# ── notes ────────────────────────────────────────────────────────────────────────────────────

cdef inline Note *note_add(
    Relaying *relay, int kind, int fd, uint32_t value, int index
) noexcept nogil:
    """Something for the policy. NULL where there is no room: once it has run there is."""
    cdef Note *note = &relay.notes[relay.notes_count]
    if relay.notes_count >= NOTES_MOST:
        return NULL
    note.kind = kind
    note.fd = fd
    note.value = value
    note.index = index
    note.peer_size = 0
    relay.notes_count += 1
    return note


# ── events ───────────────────────────────────────────────────────────────────────────────────

cdef inline void endpoint_note(Connection *c, Endpoint *end, uint32_t events) noexcept nogil:
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


cdef inline void connection_event(Relaying *relay, Endpoint *end, uint32_t events) noexcept nogil:
    cdef Connection *c = <Connection *>end.connection
    if end.fd < 0 or c.state == CLOSED:
        return
    endpoint_note(c, end, events)
    if c.state == CONNECTING:
        connecting_event(relay, c, end, events)
    if c.state == CONNECTED:
        connection_advance(relay, c)
    elif c.state == LINGERING:
        linger_step(relay, c)


cdef inline void connect_expired(Relaying *relay, Connection *c) noexcept nogil:
    """The time for the connect is over. A target that has accepted just now is not left again."""
    cdef sockaddr_storage peer
    cdef socklen_t size = sizeof(peer)
    if getpeername(c.target.fd, <sockaddr *>&peer, &size) == 0:
        connection_event(relay, &c.target, EPOLLOUT)
    else:
        connect_failed(relay, c, ETIMEDOUT)


cdef inline void connection_timer(Relaying *relay, Connection *c) noexcept nogil:
    if c.state == CONNECTING:
        connect_expired(relay, c)
    elif c.state == CONNECTED:
        connection_look(relay, c)
    elif c.state == LINGERING:
        linger_step(relay, c)


cdef inline void relay_timers(Relaying *relay) noexcept nogil:
    """Look after the timed connections that are due, and find out when the next one is."""
    cdef Link *link = relay.timed.next
    cdef Link *after
    cdef Connection *c
    relay.next_wake_ms = 0
    while link != &relay.timed:
        after = link.next
        c = <Connection *>link.owner
        if c.wake_ms <= relay.engine.now_ms:
            connection_timer(relay, c)
        elif relay.next_wake_ms == 0 or c.wake_ms < relay.next_wake_ms:
            relay.next_wake_ms = c.wake_ms
        link = after
