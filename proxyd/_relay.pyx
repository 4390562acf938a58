# cython: language_level=3, binding=False, auto_pickle=False, freethreading_compatible=True
# cython: boundscheck=False, wraparound=False, cdivision=True
#
# binding, auto_pickle: nobody introspects or pickles a relay, and both cost start-up time.
# freethreading_compatible: a relay belongs to one thread; nothing here is shared between two.
# boundscheck …: only C arrays, with C's rules.
"""The mechanism: an epoll loop that forwards between pairs of sockets without the GIL.

Where to read on, in the order a byte meets it: this file (the loop and its Python face),
_connection.pxd (how a connection begins and ends), _half.pxd (the pump), _pipe.pxd (pipes).
"""

from proxyd._connection cimport (
    CONNECTED, Connection, HOW_COUNT, HOW_CUT, HOW_IDLE, KIND_GATE, KIND_WATCH, NOTE_ACCEPTED,
    NOTE_ENDED, NOTE_FAILED, NOTE_NOBODY, NOTE_READY, NOTE_REFUSED, Note, Relaying,
    connection_advance, connection_begin, connection_close, connection_event, connection_new,
    connection_open, note_add, relay_timers, socket_connect, socket_error, socket_met_itself,
    socket_tune,
)
from proxyd._gate cimport (
    GATE_CHECK_TCP, GATE_CHECK_UNIX, GateState, gate_event, gate_unwatch, gate_watch,
    gates_reopen,
)
from proxyd._half cimport COPY_UNIT, Endpoint, FIRST_UNIT, endpoint_lost, half_drop, half_held
from proxyd._linux cimport (
    CLOCK_MONOTONIC, EINPROGRESS, EINTR, ELOOP, ENOMEM, EPOLLET, EPOLLIN, EPOLLOUT,
    EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, RLIMIT_NOFILE, SFD_CLOEXEC, SFD_NONBLOCK,
    SIG_BLOCK, SOL_SOCKET, SO_DOMAIN, calloc, clock_gettime, close, epoll_create1, epoll_ctl,
    epoll_event, epoll_wait, errno, free, getpeername, getpid, getrlimit, getsockname,
    getsockopt, int64_t, malloc, memcpy, memset, rlimit, setrlimit, sigaddset, sigemptyset,
    signalfd, sigprocmask, sigset_t, sockaddr, sockaddr_storage, socklen_t, timespec,
)
from proxyd._list cimport Link, link_init, list_append, list_empty, list_remove
from proxyd._own cimport Own, own_add, own_move, own_remove
from proxyd._pipe cimport pool_clear

cdef enum:
    EVENTS_MOST = 256          # per epoll_wait
    PIPE_MOST = 1 << 30        # F_SETPIPE_SZ takes an int

# kinds of events that run() returns
READY = NOTE_READY
ACCEPTED = NOTE_ACCEPTED
NOBODY = NOTE_NOBODY
REFUSED = NOTE_REFUSED
FAILED = NOTE_FAILED
ENDED = NOTE_ENDED

# what a Gate is to look for
CHECK_TCP = GATE_CHECK_TCP
CHECK_UNIX = GATE_CHECK_UNIX

ctypedef struct Watch:
    int kind                   # KIND_WATCH, where an Endpoint has its kind
    int fd
    Own own                    # of a socket that dial() made


cdef class Gate:
    """A listener whose clients the relay accepts. The fd stays the caller's.

    Each client becomes an (ACCEPTED, client, index) event; with express() it is connected at once
    instead. `check` is CHECK_TCP to find clients that are our own outgoing sockets (the listener
    must be in our network namespace), CHECK_UNIX to find those of this process; such a client is
    closed, and (NOBODY, ELOOP, index) tells.
    """

    cdef GateState state
    cdef Relay relay

    def __init__(self, Relay relay not None, int fd, int family, int check, int index):
        self.relay = relay
        self.state.kind = KIND_GATE
        self.state.fd = fd
        self.state.family = family
        self.state.check = check
        self.state.index = index
        link_init(&self.state.full, &self.state)

    @property
    def served(self):
        """Clients connected by express(), those included whose connect failed later."""
        return self.state.served

    def open(self):
        """Begin to accept. Raises OSError. The gate must live until shut() was called."""
        cdef int failure = gate_watch(&self.relay.relaying, &self.state)
        if failure < 0:
            raise_errno(-failure)

    def shut(self):
        """Accept nobody any more; what waits stays in the backlog."""
        gate_unwatch(&self.relay.relaying, &self.state)

    def express(self, bytes address, long long timeout_ms=0):
        """Connect clients to the packed `address` from now on, as Relay.connect() does.

        None: no longer.
        """
        self.state.express = address is not None
        if address is not None:
            address_unpack(&self.state.target, address)
            self.state.target_size = <socklen_t>len(address)
            self.state.timeout_ms = timeout_ms


cdef object raise_errno(int error):
    raise OSError(error, "")


cdef int64_t clock_ms() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000 + now.tv_nsec // 1000000


cdef class Relay:
    """Forwards between pairs of stream sockets. Belongs to one thread.

    `stream_unit` is the most that one recv asks for, `pipe_size` what a pipe is to hold, both in
    bytes; without `may_splice` everything is copied.

    The relay owns a client from the moment connect() or adopt() returns; when either raises, the
    client is still the caller's. A FAILED event gives a client back.
    """

    cdef Relaying relaying
    cdef epoll_event events[EVENTS_MOST]
    cdef Watch **watches               # by fd; NULL: not watched
    cdef int watches_size
    cdef public long long idle_ms      # close what has not moved a byte for so long; 0: never
    cdef public int wake_at            # run() returns when the open connections fall to this
    cdef public bint wake_first        # … and when the first one comes

    def __cinit__(self, size_t stream_unit=512 * 1024, size_t pipe_size=1024 * 1024,
                  bint may_splice=True):
        cdef Relaying *relay = &self.relaying
        relay.engine.epoll = -1
        link_init(&relay.live, NULL)
        link_init(&relay.timed, NULL)
        link_init(&relay.again, NULL)
        link_init(&relay.full, NULL)
        if stream_unit < 1:
            raise ValueError("a recv of nothing would look like the end")
        relay.pid = getpid()
        relay.most = 1 << 30
        relay.engine.now_ms = relay.quiet_ms = clock_ms()
        relay.engine.first_unit = min(stream_unit, <size_t>FIRST_UNIT)
        relay.engine.copy_unit = min(stream_unit, <size_t>COPY_UNIT)
        relay.engine.stream_unit = stream_unit
        relay.engine.pool.size = min(pipe_size, <size_t>PIPE_MOST)
        relay.engine.may_splice = may_splice
        relay.engine.buffer = <char *>malloc(stream_unit)
        if relay.engine.buffer == NULL:
            raise MemoryError()
        relay.engine.epoll = epoll_create1(EPOLL_CLOEXEC)
        if relay.engine.epoll < 0:
            raise_errno(errno)

    def __dealloc__(self):
        cdef Relaying *relay = &self.relaying
        if relay.live.next == NULL:
            return  # __cinit__ has not come so far: its arguments were no good
        while not list_empty(&relay.live):
            connection_close(relay, <Connection *>relay.live.next.owner, HOW_CUT, False)
        self.free_failed()
        connections_free(&relay.ended)
        connections_free(&relay.dead)
        for fd in range(self.watches_size):
            self.unwatch(fd)
        free(self.watches)
        pool_clear(&relay.engine.pool)
        if relay.engine.epoll >= 0:
            close(relay.engine.epoll)
        free(relay.engine.buffer)

    cdef void free_failed(self) noexcept:
        """The clients of failed connects that nobody fetched."""
        cdef Connection *c = self.relaying.failed
        while c != NULL:
            close(c.client.fd)
            c = c.next
        connections_free(&self.relaying.failed)

    # ── what the policy sees ─────────────────────────────────────────────────────────────────

    @property
    def open(self):
        """Connections, those still connecting and those ending included."""
        return self.relaying.open

    @property
    def most(self):
        """So many connections may be open before gates refuse more."""
        return self.relaying.most

    @most.setter
    def most(self, int value):
        self.relaying.most = value

    @property
    def quiet_ms(self):
        """When the last connection ended, on the clock of now_ms; at first, when it all began."""
        return self.relaying.quiet_ms

    @property
    def now_ms(self):
        """CLOCK_MONOTONIC in ms, as read for the last batch of events."""
        return self.relaying.engine.now_ms

    @property
    def report_ends(self):
        """Whether run() returns an ENDED event for each connection."""
        return bool(self.relaying.report_ends)

    @report_ends.setter
    def report_ends(self, bint value):
        self.relaying.report_ends = value

    @property
    def shared(self):
        """Whether clients may be open in another process too, as the service manager keeps those
        of Accept=yes."""
        return bool(self.relaying.shared)

    @shared.setter
    def shared(self, bint value):
        self.relaying.shared = value

    def counters(self):
        """(accepted, refused, bytes to targets, to clients, spliced, copied, ends by HOW_*)."""
        cdef Relaying *relay = &self.relaying
        return (
            relay.accepted, relay.refused,
            relay.engine.counters.forwarded[0], relay.engine.counters.forwarded[1],
            relay.engine.counters.spliced, relay.engine.counters.copied,
            tuple([relay.ends[i] for i in range(HOW_COUNT)]),
        )

    # ── listeners and other fds of the policy ────────────────────────────────────────────────

    def watch(self, int fd, unsigned int events=EPOLLIN):
        """Have run() return (READY, fd, events). The fd stays the caller's.

        Level-triggered unless `events` has EPOLLET.
        """
        cdef epoll_event event
        cdef Watch *watch
        self.watches_fit(fd)
        watch = <Watch *>calloc(1, sizeof(Watch))
        if watch == NULL:
            raise_errno(ENOMEM)
        watch.kind = KIND_WATCH
        watch.fd = fd
        event.events = events
        event.data.ptr = watch
        if epoll_ctl(self.relaying.engine.epoll, EPOLL_CTL_ADD, fd, &event) < 0:
            free(watch)
            raise_errno(errno)
        self.watches[fd] = watch

    def unwatch(self, int fd):
        """Forget an fd; before it is closed. Nothing happens where it is not watched."""
        cdef Watch *watch = self.watch_of(fd)
        if watch == NULL:
            return
        self.watches[fd] = NULL
        epoll_ctl(self.relaying.engine.epoll, EPOLL_CTL_DEL, fd, NULL)
        own_remove(&self.relaying.own, &watch.own)
        free(watch)

    cdef Watch *watch_of(self, int fd) noexcept:
        return self.watches[fd] if 0 <= fd < self.watches_size else NULL

    cdef int watches_fit(self, int fd) except -1:
        """Make room for `fd` in the table."""
        cdef int size = max(self.watches_size, 16)
        cdef Watch **table
        while size <= fd:
            size *= 2
        if size == self.watches_size:
            return 0
        table = <Watch **>calloc(size, sizeof(Watch *))
        if table == NULL:
            raise_errno(ENOMEM)
        if self.watches != NULL:
            memcpy(table, self.watches, self.watches_size * sizeof(Watch *))
        free(self.watches)
        self.watches = table
        self.watches_size = size
        return 0

    def trim(self):
        """Close the pipes kept for later, to make room where fds are short."""
        pool_clear(&self.relaying.engine.pool)

    # ── connections ──────────────────────────────────────────────────────────────────────────

    def connect(self, int client, int client_family, bytes address not None,
                bytes preamble=None, long long cookie=0, long long timeout_ms=0):
        """Connect an accepted client to the packed sockaddr `address` and forward; the id.

        `preamble` goes to the target before anything else. A connect that fails later, or takes
        longer than `timeout_ms` (0: as long as the kernel tries), gives the client back as
        (FAILED, client, errno, cookie, pending, opened_ms, id): pending is what must be sent first
        when another target is tried, the preamble and bytes already taken from the client.

        Raises OSError, the client still the caller's, where it fails at once.
        """
        cdef sockaddr_storage target
        cdef long long number
        address_unpack(&target, address)
        if preamble is None:
            preamble = b""
        number = connection_open(
            &self.relaying, client, client_family, &target, <socklen_t>len(address),
            preamble, <size_t>len(preamble), cookie, timeout_ms)
        if number < 0:
            raise_errno(<int>-number)
        return number

    def dial(self, bytes address not None):
        """Start to connect a socket of the caller's; its fd, watched for EPOLLOUT.

        For adopt() once connected() says so; hang_up() ends it. Raises OSError where it fails at
        once.
        """
        cdef sockaddr_storage target
        cdef bint connecting
        cdef int fd
        cdef Watch *watch
        address_unpack(&target, address)
        fd = socket_connect(&target, <socklen_t>len(address), &connecting)
        if fd < 0:
            raise_errno(-fd)
        try:
            self.watch(fd, EPOLLOUT | EPOLLET)
        except OSError:
            close(fd)
            raise
        watch = self.watches[fd]
        own_add(&self.relaying.own, &watch.own, fd, &target)
        return fd

    def hang_up(self, int fd):
        """Close a socket of dial()."""
        self.unwatch(fd)
        close(fd)

    def adopt(self, int client, int client_family, int fd, bytes preamble=None, int error=0):
        """Forward between a client and a connected socket of dial(), both owned from now on; the
        id. Raises OSError, both still the caller's.
        """
        cdef Watch *watch = self.watch_of(fd)
        cdef Connection *c
        if preamble is None:
            preamble = b""
        c = connection_new(&self.relaying, client, client_family, fd, socket_family(fd),
                           preamble, <size_t>len(preamble))
        if c == NULL:
            raise_errno(ENOMEM)
        if watch != NULL:
            own_move(&self.relaying.own, &c.own, &watch.own)
            self.unwatch(fd)
        if error != 0:  # it has answered and reset: what connected() has read nobody else can
            endpoint_lost(&c.target, error)
        connection_begin(&self.relaying, c, False, 0)
        return self.relaying.last_id

    def close_all(self):
        """Cut every connection, as a reset: this is no clean end. How many there were."""
        cdef Relaying *relay = &self.relaying
        cdef int count = 0
        while not list_empty(&relay.live):
            connection_close(relay, <Connection *>relay.live.next.owner, HOW_CUT, True)
            count += 1
        return count

    # ── the loop ─────────────────────────────────────────────────────────────────────────────

    def run(self, long long timeout_ms=-1):
        """Forward until there is something for the policy; the events, as a list of tuples.

        (READY, fd, events)                           a watched fd
        (ACCEPTED, client, index)                     the caller's now; see Gate
        (NOBODY, errno, index)                        accept failed
        (REFUSED, index)                              a client over the limit was closed
        (FAILED, client, errno, cookie, …)            see connect(); the cookie is a gate's index
        (ENDED, id, how, up, down, ms, errnos)        with report_ends: bytes each way, duration,
                                                      (client's errno, target's errno)

        The list is empty after `timeout_ms` (-1: never), when the number of open connections has
        fallen to `wake_at`, and with `wake_first` when it has risen from 0.
        """
        cdef int64_t deadline_ms = clock_ms() + timeout_ms if timeout_ms >= 0 else -1
        cdef int failure
        with nogil:
            failure = self.turn_until(deadline_ms)
        if failure < 0:
            raise_errno(-failure)
        return self.take_events()

    cdef int turn_until(self, int64_t deadline_ms) noexcept nogil:
        """Turn until the policy is needed; 0 or -errno."""
        cdef Relaying *relay = &self.relaying
        cdef int failure, before
        while True:
            before = relay.open
            failure = self.turn(deadline_ms)
            if failure < 0:
                return failure
            if relay.notes_count > 0 or relay.failed != NULL or relay.ended != NULL:
                return 0
            if before > self.wake_at >= relay.open:
                return 0
            if self.wake_first and before == 0 and relay.open > 0:
                return 0
            if deadline_ms >= 0 and relay.engine.now_ms >= deadline_ms:
                return 0

    cdef int turn(self, int64_t deadline_ms) noexcept nogil:
        """Wait, then work on one batch of events; 0 or -errno."""
        cdef Relaying *relay = &self.relaying
        cdef int i
        cdef int count = epoll_wait(
            relay.engine.epoll, self.events, EVENTS_MOST, self.timeout(deadline_ms))
        if count < 0:
            if errno != EINTR:
                return -errno
            count = 0
        relay.engine.now_ms = clock_ms()
        relay.turns += 1
        for i in range(count):
            self.dispatch(&self.events[i])
        self.pump_again()
        self.admit(count)
        if relay.room_ms != 0:
            gates_reopen(relay)
        if relay.next_wake_ms != 0 and relay.next_wake_ms <= relay.engine.now_ms:
            relay_timers(relay)
        if self.idle_ms > 0:
            self.close_idle()
        connections_free(&relay.dead)
        return 0

    cdef void dispatch(self, epoll_event *event) noexcept nogil:
        cdef Watch *watch = <Watch *>event.data.ptr
        if watch.kind == KIND_WATCH:
            note_add(&self.relaying, NOTE_READY, watch.fd, event.events, 0)
        elif watch.kind != KIND_GATE:
            connection_event(&self.relaying, <Endpoint *>watch, event.events)

    cdef void admit(self, int count) noexcept nogil:
        """The gates' turn: after the connections, which may end and make room, and not before the
        policy has seen what else there is. It may be the signal to accept nobody any more."""
        cdef Watch *watch
        cdef int i
        if self.relaying.notes_count > 0:
            return  # gates are level-triggered, and announced again
        for i in range(count):
            watch = <Watch *>self.events[i].data.ptr
            if watch.kind == KIND_GATE:
                gate_event(&self.relaying, <GateState *>watch)

    cdef void pump_again(self) noexcept nogil:
        """One more turn for each connection whose pump had spent its budget."""
        cdef Relaying *relay = &self.relaying
        cdef Link *last = relay.again.prev
        cdef Link *link
        if list_empty(&relay.again):
            return
        while True:
            link = relay.again.next
            list_remove(link)
            connection_advance(relay, <Connection *>link.owner)
            if link == last:
                return

    cdef int timeout(self, int64_t deadline_ms) noexcept nogil:
        """Milliseconds that epoll_wait may sleep."""
        cdef Relaying *relay = &self.relaying
        cdef int64_t until = deadline_ms
        if not list_empty(&relay.again) or relay.failed != NULL or relay.ended != NULL:
            return 0
        if relay.next_wake_ms != 0:
            until = earlier(until, relay.next_wake_ms)
        if relay.room_ms != 0:
            until = earlier(until, relay.room_ms)
        if self.idle_ms > 0 and not list_empty(&relay.live):
            until = earlier(until, (<Connection *>relay.live.next.owner).active_ms + self.idle_ms)
        if until < 0:
            return -1
        return <int>min(max(until - clock_ms(), 0), 1 << 30)

    cdef void close_idle(self) noexcept nogil:
        """Close what has not moved a byte for too long; reset it where that loses bytes."""
        cdef Relaying *relay = &self.relaying
        cdef Connection *c
        while not list_empty(&relay.live):
            c = <Connection *>relay.live.next.owner
            if relay.engine.now_ms - c.active_ms < self.idle_ms:
                return
            if c.state == CONNECTED:
                connection_close(relay, c, HOW_IDLE, half_held(&c.up) + half_held(&c.down) > 0)
            else:
                # Connecting and ending ones have limits of their own.
                c.active_ms = relay.engine.now_ms
                list_remove(&c.live)
                list_append(&relay.live, &c.live)

    cdef list take_events(self):
        cdef Relaying *relay = &self.relaying
        cdef Connection *c
        cdef int i
        cdef list events = []
        cdef list failed = []
        for i in range(relay.notes_count):
            events.append(note_tuple(&relay.notes[i], relay.engine.now_ms))
        relay.notes_count = 0
        while relay.failed != NULL:
            c = relay.failed
            failed.append((FAILED, c.client.fd, c.target.error, c.cookie, take_pending(c),
                           c.opened_ms, c.id))
            relay.failed = c.next
            connection_free(c)
        failed.reverse()  # the list has the last one first
        events += failed
        while relay.ended != NULL:
            c = relay.ended
            events.append((ENDED, c.id, c.how, c.up.moved, c.down.moved,
                           relay.engine.now_ms - c.opened_ms, (c.client.error, c.target.error)))
            relay.ended = c.next
            connection_free(c)
        return events


cdef tuple note_tuple(const Note *note, int64_t now_ms):
    if note.kind == NOTE_READY:
        return READY, note.fd, note.value
    if note.kind == NOTE_ACCEPTED:
        return ACCEPTED, note.fd, note.index
    if note.kind == NOTE_NOBODY:
        return NOBODY, note.value, note.index
    if note.kind == NOTE_REFUSED:
        return REFUSED, note.index
    return FAILED, note.fd, note.value, note.index, b"", now_ms, 0


cdef int64_t earlier(int64_t one, int64_t other) noexcept nogil:
    """The earlier of two moments; one < 0 is never."""
    return other if one < 0 or other < one else one


cdef bytes take_pending(Connection *c):
    if c.up.spill == NULL:
        return b""
    return c.up.spill[c.up.spill_at:c.up.spill_end]


cdef void connection_free(Connection *c) noexcept nogil:
    half_drop(&c.up)
    half_drop(&c.down)
    free(c)


cdef void connections_free(Connection **first) noexcept nogil:
    cdef Connection *c
    while first[0] != NULL:
        c = first[0]
        first[0] = c.next
        connection_free(c)


cdef int socket_family(int fd) noexcept:
    """The address family, or 0."""
    cdef int family = 0
    cdef socklen_t size = sizeof(family)
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &size)
    return family


cdef int address_unpack(sockaddr_storage *to, bytes address) except -1:
    if len(address) > <Py_ssize_t>sizeof(to[0]):
        raise ValueError("address too long")
    memset(to, 0, sizeof(to[0]))
    memcpy(to, <const char *>address, len(address))
    return 0


def connected(int fd):
    """0 where a socket of dial() is connected, EINPROGRESS where it is not yet, or why it failed:
    ELOOP for one that was connected to itself."""
    cdef sockaddr_storage peer
    cdef socklen_t size = sizeof(peer)
    cdef int error = socket_error(fd)
    if error != 0:
        return error
    if getpeername(fd, <sockaddr *>&peer, &size) < 0:
        return EINPROGRESS
    return ELOOP if socket_met_itself(fd) else 0


def socket_names(int fd):
    """(peer, own) addresses, packed; b"" for one that cannot be had."""
    cdef sockaddr_storage name
    cdef socklen_t size = sizeof(name)
    peer = own = b""
    if getpeername(fd, <sockaddr *>&name, &size) == 0:
        peer = (<char *>&name)[:size]
    size = sizeof(name)
    if getsockname(fd, <sockaddr *>&name, &size) == 0:
        own = (<char *>&name)[:size]
    return peer, own


def tune(int fd, int family):
    """Give a socket what both legs have; what a listener has, the sockets it accepts inherit."""
    socket_tune(fd, family)


def raise_fd_limit(long long wanted):
    """Raise the soft RLIMIT_NOFILE to `wanted`, as far as the hard one allows; what it is then.

    Never lowered: libraries that select() may live in this process.
    """
    cdef rlimit limit
    if getrlimit(RLIMIT_NOFILE, &limit) < 0:
        raise_errno(errno)
    if <unsigned long long>wanted > limit.rlim_cur:
        limit.rlim_cur = min(<unsigned long long>wanted, limit.rlim_max)
        setrlimit(RLIMIT_NOFILE, &limit)
        getrlimit(RLIMIT_NOFILE, &limit)
    return min(limit.rlim_cur, <unsigned long long>1 << 30)


def signal_fd(numbers):
    """An fd (the caller's) from which these signals are read from now on instead of delivered.

    To be called before there is a second thread: threads inherit the mask. See signalfd(2).
    """
    cdef sigset_t mask
    cdef int fd
    sigemptyset(&mask)
    for number in numbers:
        sigaddset(&mask, number)
    if sigprocmask(SIG_BLOCK, &mask, NULL) < 0:
        raise_errno(errno)
    fd = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK)
    if fd < 0:
        raise_errno(errno)
    return fd
