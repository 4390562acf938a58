# cython: language_level=3, binding=False, auto_pickle=False, freethreading_compatible=True
# cython: boundscheck=False, wraparound=False, cdivision=True
#
# binding, auto_pickle: nobody introspects or pickles a relay, and both cost start-up time.
# freethreading_compatible: a relay's methods are for one thread. What its crew of threads shares
#   with it has locks and atomics of its own (relay/mailbox.pxd, relay/gauges.pxd), and no Python.
# boundscheck …: only C arrays, with C's rules.
"""The mechanism: an epoll loop that forwards between pairs of sockets without the GIL.

This file is its Python face. Where to read on, in the order a byte meets it: relay/loop.pxd (a batch of
events), relay/accept.pxd (how clients come in), relay/connection.pxd (how a connection begins and ends),
relay/pump.pxd (the pump), relay/pipe.pxd (pipes); and relay/workers.pxd for the same in several threads.
"""

from cpython.ref cimport Py_INCREF
from cython cimport no_gc_clear

from proxyd.relay.busy cimport CPUS_MOST, Machine
from proxyd.relay.connection cimport (
    HOW_COUNT, HOW_CUT, HOW_GONE, KIND_GATE, KIND_WATCH, NOTE_ACCEPTED, NOTE_BUSY, NOTE_NOBODY,
    NOTE_READY, NOTE_REFUSED, Connection, Note, Relaying, connection_free, connection_new,
    connection_open, connection_place, connections_fewer, connections_free, relay_hang_up,
    room_limit, socket_connect, socket_met_itself, socket_take_error, socket_tune,
    socket_unlinger, target_set_rights,
)
from proxyd.relay.workers cimport (
    crew_answered, crew_ask, crew_dismiss, crew_free, crew_hire, crew_order, quarantine_serve,
    relay_close_inbox,
)
from proxyd.relay.accept cimport (
    GATE_CHECK_PORT, GATE_CHECK_TCP, GATE_CHECK_UNIX, GateState, gate_count_early, gate_unwatch,
    gate_watch,
)
from proxyd.relay.pump cimport STAT_TO_CLIENT, STAT_TO_TARGET, endpoint_lost
from proxyd.relay.mailbox cimport ORDER_TRIM
from proxyd.relay.sys cimport (
    AF_UNIX, AF_VSOCK, ECONNREFUSED, ECONNRESET, EFD_CLOEXEC, EFD_NONBLOCK, EINPROGRESS, ELOOP,
    ENOMEM, EPOLLET, EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLL_CTL_ADD, EPOLL_CTL_DEL, MSG_DONTWAIT,
    MSG_PEEK, RLIMIT_NOFILE, SIGALRM, SIGHUP, SIGINT, SIG_IGN, SIG_UNBLOCK, SOL_SOCKET, SO_DOMAIN,
    calloc, close, counter_get, epoll_ctl, epoll_event, errno, errno_set, eventfd, eventfd_read,
    eventfd_write, free, getpeername, getpid, getrlimit, getsockname, getsockopt, int64_t, memcpy,
    memset, moment_get, pthread_join, pthread_sigmask, recv, rlimit, setrlimit, shared_add,
    shared_get, shared_take, sigaction, sigaction_t, sigaddset, sigemptyset, sigset_t, sockaddr,
    sockaddr_storage, socklen_t, uint64_t,
)
from proxyd.relay.list cimport link_init, list_empty, list_remove
from proxyd.relay.loop cimport (
    Watch, clock_ms, earlier, relay_cut, relay_free, relay_init, relay_open, relay_turn,
)
from proxyd.relay.self_connect cimport (
    Own, OwnTable, local_port, own_add, own_move, own_remove, own_table_close, own_table_init,
)
from proxyd.relay.pipe cimport pool_clear
from proxyd.relay.quarantine cimport (
    Quarantine, quarantine_destroy, quarantine_due, quarantine_init,
)
from proxyd.relay.signals cimport alarm_set
from proxyd.relay.gauges cimport Tally, tally_late, tally_open, tally_wake_at

# what a RelayListener checks each client for
CHECK_TCP = GATE_CHECK_TCP
CHECK_UNIX = GATE_CHECK_UNIX
CHECK_PORT = GATE_CHECK_PORT

# How a connection can end, by HOW_*. These are the words of the log and of Totals.endings; the
# policy counts held clients under the two that have names of their own.
ENDINGS = ("ended", "reset", "idle", "cut", "client gone")
ENDING_CUT = ENDINGS[HOW_CUT]
ENDING_CLIENT_GONE = ENDINGS[HOW_GONE]

ctypedef struct WatchedFd:
    Watch watch
    Own own                    # of a socket that dial() made


# ── events, as run() returns them ────────────────────────────────────────────────────────────────

cdef class Ready:
    """A watched fd is ready."""

    cdef readonly int fd
    cdef readonly unsigned int events      # EPOLLIN …, as epoll_wait(2) has them

    def __init__(self, int fd, unsigned int events):
        self.fd = fd
        self.events = events


cdef class Accepted:
    """A client that is not connected automatically: its fd is the caller's now."""

    cdef readonly int listener             # index
    cdef readonly int client               # fd
    cdef readonly bytes peer               # packed address; b"": socket_names() can tell it

    def __init__(self, int listener, int client, bytes peer not None):
        self.listener = listener
        self.client = client
        self.peer = peer


cdef class AcceptFailed:
    """accept(2) failed. ELOOP: the client was one of our own outgoing sockets, and was closed."""

    cdef readonly int listener             # index
    cdef readonly int error                # errno

    def __init__(self, int listener, int error):
        self.listener = listener
        self.error = error


cdef class Refused:
    """A client over the limit was closed."""

    cdef readonly int listener             # index

    def __init__(self, int listener):
        self.listener = listener


cdef class ConnectFailed:
    """A client could not be connected: its fd is the caller's again.

    `pending` has to be sent first when another target is tried: the preamble, and bytes that were
    already read from the client.
    """

    cdef readonly int listener             # index, as connect() was given it
    cdef readonly int client               # fd
    cdef readonly int error                # errno; ELOOP: the target was the socket itself
    cdef readonly bytes pending
    cdef readonly int64_t opened_ms        # when the connect began
    cdef readonly long long connection     # id; 0: the connect failed before there was any

    def __init__(self, int listener, int client, int error, bytes pending not None,
                 int64_t opened_ms, long long connection):
        self.listener = listener
        self.client = client
        self.error = error
        self.pending = pending
        self.opened_ms = opened_ms
        self.connection = connection


cdef class Ended:
    """A connection has ended. Only with Relay.report_ends."""

    cdef readonly long long connection     # id
    cdef readonly str ending               # one of ENDINGS
    cdef readonly uint64_t bytes_up        # read from the client
    cdef readonly uint64_t bytes_down      # read from the target
    cdef readonly int64_t duration_ms
    cdef readonly int client_error         # errno with which the client's side failed; 0: none
    cdef readonly int target_error

    def __init__(self, long long connection, str ending not None, uint64_t bytes_up,
                 uint64_t bytes_down, int64_t duration_ms, int client_error, int target_error):
        self.connection = connection
        self.ending = ending
        self.bytes_up = bytes_up
        self.bytes_down = bytes_down
        self.duration_ms = duration_ms
        self.client_error = client_error
        self.target_error = target_error


cdef class WorkersWanted:
    """One thread has more to do than it can, a CPU is idle, and there are no workers yet."""


cdef class Totals:
    """What has been counted since the start, over all threads."""

    cdef readonly uint64_t accepted
    cdef readonly uint64_t refused         # of these, closed at once: over the limit, or ourselves
    cdef readonly uint64_t bytes_to_targets
    cdef readonly uint64_t bytes_to_clients
    cdef readonly uint64_t spliced         # bytes, of both directions, that splice(2) moved …
    cdef readonly uint64_t copied          # … and those that were copied
    cdef readonly dict endings             # connections that have ended: {one of ENDINGS: count}


# ── listeners ────────────────────────────────────────────────────────────────────────────────────

@no_gc_clear  # __dealloc__ needs the relay
cdef class RelayListener:
    """A listener whose clients the relay accepts. The fd stays the caller's.

    Each client becomes an Accepted event; with auto_connect() it is connected at once instead.
    `check` is CHECK_TCP to recognise clients that are our own outgoing sockets (the listener must
    be in our network namespace), CHECK_UNIX to recognise those of this process; such a client is
    closed, and an AcceptFailed event with ELOOP tells. With CHECK_PORT a client that connected to
    another port than the listener's becomes an Accepted event in any case. `index` is what events
    call this listener.
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
        self.state.port = local_port(fd)
        link_init(&self.state.full, &self.state)

    def __dealloc__(self):
        if self.relay is not None:
            gate_unwatch(&self.relay.relaying, &self.state)

    @property
    def connected_count(self):
        """Clients that auto_connect() has connected, including those whose connect failed later."""
        return self.state.served

    def start(self):
        """Begin to accept. Raises OSError. The object must live until stop() was called."""
        cdef int failure
        gate_count_early(&self.state)
        failure = gate_watch(&self.relay.relaying, &self.state)
        if failure < 0:
            raise_errno(-failure)

    def stop(self):
        """Accept no more clients; those that wait stay in the backlog."""
        gate_unwatch(&self.relay.relaying, &self.state)

    def auto_connect(self, bytes address, long long timeout_ms=0):
        """Connect each client to the packed `address` from now on, as Relay.connect() does.

        None: no longer.
        """
        self.state.express = address is not None
        if address is not None:
            address_unpack(&self.state.target, address)
            self.state.target_size = <socklen_t>len(address)
            self.state.timeout_ms = timeout_ms


cdef object raise_errno(int error):
    raise OSError(error, "")


# ── the relay ────────────────────────────────────────────────────────────────────────────────────

cdef class Relay:
    """Forwards between pairs of stream sockets. Belongs to one thread.

    `stream_unit` is the most that one recv asks for, `pipe_size` what a pipe is to hold, both in
    bytes; without `may_splice` everything is copied. Without `may_refuse`, or where the kernel
    cannot refuse file descriptors sent over UNIX sockets, they are taken and dropped.

    The relay owns a client once connect() has returned an id, or adopt() has returned. A
    ConnectFailed, returned or as an event, gives the client back.
    """

    cdef Relaying relaying
    cdef Tally tally
    cdef OwnTable own
    cdef Quarantine quarantine
    cdef bint outlived                 # by the quarantine's thread, which cannot be ended
    cdef WatchedFd **watches           # by fd; NULL: not watched
    cdef int watches_size
    cdef public int wake_at_count      # run() returns at this number of connections; -1: never
    cdef public bint wake_on_first     # … and when the first one comes

    def __cinit__(self, size_t stream_unit=256 * 1024, size_t pipe_size=1024 * 1024,
                  bint may_splice=True, bint may_refuse=True):
        cdef Relaying *relay = &self.relaying
        cdef int failure
        own_table_init(&self.own)
        relay_init(relay, &self.tally, &self.own)
        quarantine_init(&self.quarantine, &relay.inbox)
        relay.quarantine = &self.quarantine
        relay.engine.may_refuse = may_refuse
        if stream_unit < 1:
            raise ValueError("a recv of nothing would look like the end")
        relay.pid = getpid()
        relay.connections_max = 1 << 30
        self.tally.ended_ms = relay.engine.now_ms
        self.wake_at_count = -1
        failure = relay_open(relay, stream_unit, pipe_size, may_splice)
        if failure == -ENOMEM:
            raise MemoryError()
        if failure < 0:
            raise_errno(-failure)

    def __dealloc__(self):
        cdef Connection *c
        if self.relaying.live.next == NULL:
            return  # __cinit__ has not even begun: its arguments were no good
        crew_dismiss(&self.relaying, True)
        if self.relaying.crew.quarantine != NULL:  # without a close_all() that could have kept us
            pthread_join(self.relaying.crew.quarantine.thread, NULL)
            crew_free(self.relaying.crew.quarantine)
        free(self.relaying.crew.relays)
        if self.relaying.crew.machine.stat >= 0:
            close(self.relaying.crew.machine.stat)
        relay_close_inbox(&self.relaying)
        for fd in range(self.watches_size):
            self.unwatch(fd)
        free(self.watches)
        relay_free(&self.relaying)
        while not list_empty(&self.quarantine.waiting):  # their sockets end with the process
            c = <Connection *>self.quarantine.waiting.next.owner
            list_remove(&c.live)
            free(c)
        quarantine_destroy(&self.quarantine)
        own_table_close(&self.own)

    # ── what the policy sees ─────────────────────────────────────────────────────────────────

    @property
    def connections(self):
        """Connections of all threads, including those still connecting and those ending."""
        return tally_open(&self.tally)

    @property
    def in_quarantine(self):
        """Sockets that the quarantine has yet to close. They are no connections any more, but keep
        their places in the limit."""
        return tally_late(&self.tally)

    @property
    def connections_max(self):
        """The limit: a client is let in while there are fewer connections, sockets in quarantine
        and held clients, taken together. The relay never changes it."""
        return self.relaying.connections_max

    @connections_max.setter
    def connections_max(self, int value):
        self.relaying.connections_max = value

    @property
    def held(self):
        """Clients in the caller's hands. Each event that hands one out adds one, so that no other
        is let in for it; the caller corrects the number after each batch of events."""
        return self.relaying.held

    @held.setter
    def held(self, int value):
        self.relaying.held = value

    @property
    def last_end_ms(self):
        """When a connection last ended, on the clock of now_ms; before that, when the relay was
        made."""
        return moment_get(&self.tally.ended_ms)

    @property
    def now_ms(self):
        """CLOCK_MONOTONIC in ms, as read for the last batch of events."""
        return self.relaying.engine.now_ms

    @property
    def idle_ms(self):
        """Connections over which no byte has moved for this long are closed; 0: never."""
        return self.relaying.idle_ms

    @idle_ms.setter
    def idle_ms(self, long long value):
        self.relaying.idle_ms = value

    @property
    def report_ends(self):
        """Whether run() returns an Ended event for each connection."""
        return bool(self.relaying.report_ends)

    @report_ends.setter
    def report_ends(self, bint value):
        self.relaying.report_ends = value

    def totals(self):
        """What has been counted since the start."""
        cdef Relaying *relay = &self.relaying
        cdef Totals totals = Totals()
        totals.accepted = relay.accepted
        totals.refused = relay.refused
        totals.bytes_to_targets = self.sum_of(&relay.engine.counters.forwarded[STAT_TO_TARGET])
        totals.bytes_to_clients = self.sum_of(&relay.engine.counters.forwarded[STAT_TO_CLIENT])
        totals.spliced = self.sum_of(&relay.engine.counters.spliced)
        totals.copied = self.sum_of(&relay.engine.counters.copied)
        totals.endings = {ENDINGS[i]: self.sum_of(&relay.ends[i]) for i in range(HOW_COUNT)}
        return totals

    cdef uint64_t sum_of(self, uint64_t *counter) noexcept:
        """Of the boss's `counter` and the same one of all of its crew."""
        cdef Relaying *relay = &self.relaying
        cdef size_t offset = <char *>counter - <char *>relay
        cdef uint64_t total = counter_get(counter)
        for i in range(relay.crew.count):
            total += counter_get(<uint64_t *>(<char *>relay.crew.relays[i] + offset))
        if relay.crew.quarantine != NULL:
            total += counter_get(<uint64_t *>(<char *>relay.crew.quarantine + offset))
        return total

    # ── threads ──────────────────────────────────────────────────────────────────────────────

    @property
    def thread_count(self):
        """Threads that forward, including the one that calls run()."""
        return 1 + self.relaying.crew.count

    @property
    def handed_over(self):
        """How often a connection moved from one thread to another."""
        return self.sum_of(&self.relaying.handed_over)

    def offload_when_busy(self, int stat, int window_ms=100, cpus=None, int quota=0,
                          int wait_max=100):
        """Offload only a thread that is busy, and only while a CPU is idle, as relay/busy.pxd has it.
        Load is measured over windows of `window_ms`. Without this call every new connection goes to
        the thread with the fewest. To be called once, before start_worker().

        `stat` is an fd of /proc/stat or /proc/uptime, which the relay closes; with -1, where
        neither can be opened, a CPU is always taken to be idle. With `cpus` only the idle time of
        these CPUs counts, which takes /proc/stat. `quota` is how much of a CPU the process may use,
        in per cent; 0: no limit. An idle CPU does not count after a window of which the thread had
        to wait for a CPU for more than `wait_max` per cent. The first time that a worker could help
        and there is none, run() returns a WorkersWanted event.
        """
        cdef Machine *machine = &self.relaying.crew.machine
        self.relaying.shares = True
        self.relaying.crew.window_ms = window_ms
        machine.stat = stat
        machine.quota = quota
        machine.wait_most = wait_max
        machine.some = cpus is not None
        for cpu in cpus or ():
            if 0 <= cpu < CPUS_MOST:
                machine.cpus[<int>cpu // 8] |= 1 << (<int>cpu % 8)

    def start_worker(self):
        """Start one more thread, to which connections are moved. Raises OSError.

        idle_ms and report_ends must be set before: a worker takes them as they are. All workers
        must be there before run() can move anything to one of them.
        """
        cdef int failure = crew_hire(&self.relaying)
        if failure < 0:
            raise_errno(-failure)

    def ping_workers(self):
        """Ask every thread for an answer, to see that none is stuck; see workers_answered."""
        crew_ask(&self.relaying)

    @property
    def workers_answered(self):
        """Whether every thread has answered the last ping_workers()."""
        return crew_answered(&self.relaying)

    # ── listeners and other fds of the policy ────────────────────────────────────────────────

    def watch(self, int fd, unsigned int events=EPOLLIN):
        """Have run() return a Ready event for `fd`, which stays the caller's.

        Level-triggered unless `events` has EPOLLET.
        """
        cdef epoll_event event
        cdef WatchedFd *watch
        self.watches_fit(fd)
        watch = <WatchedFd *>calloc(1, sizeof(WatchedFd))
        if watch == NULL:
            raise_errno(ENOMEM)
        watch.watch.kind = KIND_WATCH
        watch.watch.fd = fd
        event.events = events
        event.data.ptr = watch
        if epoll_ctl(self.relaying.engine.epoll, EPOLL_CTL_ADD, fd, &event) < 0:
            free(watch)
            raise_errno(errno)
        self.watches[fd] = watch

    def unwatch(self, int fd):
        """Stop watching an fd, before it is closed. Does nothing if it is not watched."""
        cdef WatchedFd *watch = self.watch_of(fd)
        if watch == NULL:
            return
        self.watches[fd] = NULL
        epoll_ctl(self.relaying.engine.epoll, EPOLL_CTL_DEL, fd, NULL)
        own_remove(&self.own, &watch.own)
        free(watch)

    cdef WatchedFd *watch_of(self, int fd) noexcept:
        return self.watches[fd] if 0 <= fd < self.watches_size else NULL

    cdef int watches_fit(self, int fd) except -1:
        """Make room for `fd` in the table."""
        cdef int size = max(self.watches_size, 16)
        cdef WatchedFd **table
        while size <= fd:
            size *= 2
        if size == self.watches_size:
            return 0
        table = <WatchedFd **>calloc(size, sizeof(WatchedFd *))
        if table == NULL:
            raise_errno(ENOMEM)
        if self.watches != NULL:
            memcpy(table, self.watches, self.watches_size * sizeof(WatchedFd *))
        free(self.watches)
        self.watches = table
        self.watches_size = size
        return 0

    def take_over(self, int fd, int family):
        """Prepare a client that was accepted elsewhere, before there are further threads.

        close(2) is not to wait for it. Nor is splice(2), which would where another process that has
        the socket clears O_NONBLOCK: everything is copied from now on.
        """
        if family != AF_UNIX:
            socket_unlinger(fd)
        self.relaying.engine.may_splice = False

    def trim_pipes(self):
        """Close the pipes kept for later, to make room where fds are short."""
        pool_clear(&self.relaying.engine.pool)
        crew_order(&self.relaying, ORDER_TRIM)

    # ── connections ──────────────────────────────────────────────────────────────────────────

    def connect(self, int client, int client_family, bytes address not None,
                bytes preamble=None, int listener=0, long long timeout_ms=0):
        """Connect an accepted client to the packed sockaddr `address` and forward; the id.

        `preamble` is sent to the target first. If the connect fails, the client is the caller's
        again: a ConnectFailed with this `listener` says so. It is returned if the connect fails at
        once, and an event of run() if it fails later or takes longer than `timeout_ms` (0: as long
        as the kernel tries). Either way the client is no longer watched.
        """
        cdef sockaddr_storage target
        cdef long long number
        address_unpack(&target, address)
        self.unwatch(client)
        if preamble is None:
            preamble = b""
        number = connection_open(
            &self.relaying, client, client_family, &target, <socklen_t>len(address),
            preamble, <size_t>len(preamble), listener, timeout_ms)
        if number < 0:
            return ConnectFailed(
                listener, client, <int>-number, preamble, self.relaying.engine.now_ms, 0)
        return number

    def dial(self, bytes address not None):
        """Start to connect a socket of the caller's; its fd, watched for what it comes to say.

        For adopt() once connected() says so; hang_up() ends it. Raises OSError where it fails at
        once.
        """
        cdef sockaddr_storage target
        cdef bint connecting
        cdef int fd
        cdef WatchedFd *watch
        address_unpack(&target, address)
        fd = socket_connect(&self.relaying.engine, &target, <socklen_t>len(address), &connecting)
        if fd < 0:
            raise_errno(-fd)
        try:
            self.watch(fd, EPOLLOUT | EPOLLIN | EPOLLRDHUP | EPOLLET)
        except OSError:
            relay_hang_up(&self.relaying, fd, target.ss_family, False)
            raise
        watch = self.watches[fd]
        own_add(&self.own, &watch.own, fd, &target)
        return fd

    def hang_up(self, int fd, bint reset=False):
        """Close a client or a socket of dial(), watched or not; as a reset where it may have been
        heard of and is not to look complete. Never waits."""
        self.unwatch(fd)
        relay_hang_up(&self.relaying, fd, socket_family(fd), reset)

    def adopt(self, int client, int client_family, int fd, bytes preamble=None, int error=0):
        """Forward between a client and a connected socket of dial(), both owned from now on; the
        id. Raises OSError, both still the caller's.
        """
        cdef WatchedFd *watch = self.watch_of(fd)
        cdef Connection *c
        if preamble is None:
            preamble = b""
        c = connection_new(&self.relaying, client, client_family, fd, socket_family(fd),
                           preamble, <size_t>len(preamble))
        if c == NULL:
            raise_errno(ENOMEM)
        target_set_rights(&self.relaying.engine, &c.target)
        self.unwatch(client)
        if watch != NULL:
            own_move(&self.own, &c.own, &watch.own)
            self.unwatch(fd)
        if error != 0:  # it has answered and reset: what connected() has read nobody else can
            endpoint_lost(&c.target, error)
        connection_place(&self.relaying, c, False)
        return self.relaying.last_id

    def close_all(self):
        """Cut every connection, as a reset: this is no clean end. How many there were. The threads
        that were hired end with it, but for one that is blocked in quarantine: see there."""
        cdef int count
        with nogil:
            count = crew_dismiss(&self.relaying, True)  # may leave some to the boss
            count += relay_cut(&self.relaying, True)
            connections_free(&self.relaying.dead)
        if self.relaying.crew.quarantine != NULL and not self.outlived:
            self.outlived = True
            Py_INCREF(self)  # for good: the thread uses what is in here
        return count

    # ── the loop ─────────────────────────────────────────────────────────────────────────────

    def run(self, long long timeout_ms=-1):
        """Forward until the policy is needed; the events, as a list.

        The list is empty after `timeout_ms` (-1: never), at `wake_at_count` connections or fewer,
        and with `wake_on_first` when their number has risen from 0.
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
            before = tally_open(&self.tally)
            if quarantine_due(&self.quarantine, relay.engine.now_ms):
                quarantine_serve(relay)
            failure = relay_turn(relay, 0 if self.is_wanted() else self.until(deadline_ms))
            if failure == 0:
                failure = -shared_get(&self.tally.failure)
            if failure < 0:
                return failure
            if relay.notes_count > 0 or not list_empty(&relay.failed):
                return 0
            if not list_empty(&relay.ended):
                return 0
            if tally_open(&self.tally) <= self.wake_at_count:
                return 0
            if self.wake_on_first and before == 0 and tally_open(&self.tally) > 0:
                return 0
            if deadline_ms >= 0 and relay.engine.now_ms >= deadline_ms:
                return 0

    cdef int64_t until(self, int64_t deadline_ms) noexcept nogil:
        """`deadline_ms`, or when to try again to start the quarantine's thread."""
        if shared_get(&self.quarantine.wanted):
            return earlier(deadline_ms, self.quarantine.retry_ms)
        return deadline_ms

    cdef bint is_wanted(self) noexcept nogil:
        """Whether so many connections have ended that there is something to do without an event.
        Otherwise the thread in which the one in question ends will ring."""
        cdef Relaying *relay = &self.relaying
        cdef int wake_at = self.wake_at_count
        if relay.room_ms != 0:
            wake_at = max(wake_at, room_limit(relay) - 1 - tally_late(&self.tally))
        tally_wake_at(&self.tally, wake_at)
        return tally_open(&self.tally) <= wake_at

    cdef list take_events(self):
        cdef Relaying *relay = &self.relaying
        cdef Connection *c
        cdef int i
        cdef list events = []
        for i in range(relay.notes_count):
            events.append(note_event(&relay.notes[i], relay.engine.now_ms))
        relay.notes_count = 0
        while not list_empty(&relay.failed):
            c = <Connection *>relay.failed.next.owner
            list_remove(&c.live)
            events.append(ConnectFailed(
                c.listener, c.client.fd, c.target.error, take_pending(c), c.opened_ms, c.id))
            connections_fewer(relay)
            relay.held += 1
            connection_free(c)
        while not list_empty(&relay.ended):
            c = <Connection *>relay.ended.next.owner
            list_remove(&c.live)
            events.append(Ended(
                c.id, ENDINGS[c.how], c.up.moved, c.down.moved,
                relay.engine.now_ms - c.opened_ms, c.client.error, c.target.error))
            connection_free(c)
        return events


cdef object note_event(const Note *note, int64_t now_ms):
    if note.kind == NOTE_READY:
        return Ready(note.fd, note.value)
    if note.kind == NOTE_ACCEPTED:
        return Accepted(note.index, note.fd, (<char *>&note.peer)[:note.peer_size])
    if note.kind == NOTE_NOBODY:
        return AcceptFailed(note.index, note.value)
    if note.kind == NOTE_REFUSED:
        return Refused(note.index)
    if note.kind == NOTE_BUSY:
        return WorkersWanted()
    return ConnectFailed(note.index, note.fd, note.value, b"", now_ms, 0)


cdef bytes take_pending(Connection *c):
    if c.up.spill == NULL:
        return b""
    return c.up.spill[c.up.spill_at:c.up.spill_end]


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
    cdef int error = socket_take_error(fd)
    if error == ECONNRESET and socket_family(fd) == AF_VSOCK:
        return ECONNREFUSED  # how the virtio transport says so
    if error != 0:
        return error
    if getpeername(fd, <sockaddr *>&peer, &size) < 0:
        return EINPROGRESS
    return ELOOP if socket_met_itself(fd) else 0


def peek(int fd):
    """What a recv would say, and nothing is taken: 1 for bytes, 0 for the end, or -errno."""
    cdef char byte
    cdef ssize_t size = recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT)
    return -errno if size < 0 else size


def socket_error(int fd):
    """SO_ERROR of a socket, which reading clears; 0: none."""
    return socket_take_error(fd)


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


def tune_socket(int fd, int family):
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


# ── signals ──────────────────────────────────────────────────────────────────────────────────────

cdef enum:
    SIGNALS_MOST = 65          # Linux has 64
    ALARM_MS = 50              # how often a signal interrupts until it is noticed

cdef int signal_bell = -1      # eventfd
cdef int signal_counts[SIGNALS_MOST]


cdef void signal_came(int number) noexcept nogil:
    """The handler: leave a note. What it interrupts was perhaps not yet waiting; so an alarm goes
    on interrupting until the note is read."""
    cdef int error = errno
    shared_add(&signal_counts[number], 1)
    eventfd_write(signal_bell, 1)
    alarm_set(ALARM_MS)
    errno_set(error)


cdef void alarm_came(int number) noexcept nogil:
    """Interrupt, no more."""


cdef int signal_handle(int number, void (*handler)(int) noexcept nogil) except -1:
    """Without SA_RESTART: a signal is to end any waiting."""
    cdef sigaction_t action
    memset(&action, 0, sizeof(action))
    action.sa_handler = handler
    if sigaction(number, &action, NULL) < 0:
        raise_errno(errno)
    return 0


cdef bint signal_is_ignored(int number) noexcept:
    cdef sigaction_t now
    return sigaction(number, NULL, &now) == 0 and now.sa_handler == SIG_IGN


def signal_fd(numbers):
    """An fd, the caller's, that is readable when one of these signals has come; take_signals()
    tells which. It must stay open while they can come.

    By handlers, not by signalfd(2): a signal is to interrupt what waits against all expectation. A
    SIGINT or SIGHUP that whoever started us ignores stays ignored, as nohup(1) wants it.
    """
    global signal_bell
    cdef sigset_t mask
    cdef int number
    cdef int bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if bell < 0:
        raise_errno(errno)
    signal_bell = bell
    signal_handle(SIGALRM, alarm_came)
    sigemptyset(&mask)
    sigaddset(&mask, SIGALRM)
    for number in numbers:
        if not 0 < number < SIGNALS_MOST:
            raise ValueError("no such signal")
        if (number == SIGINT or number == SIGHUP) and signal_is_ignored(number):
            continue
        signal_handle(number, signal_came)
        sigaddset(&mask, number)
    if pthread_sigmask(SIG_UNBLOCK, &mask, NULL) != 0:
        raise_errno(errno)
    return signal_bell


def take_signals():
    """The signals that have come since the last call, each as often as it was delivered."""
    cdef uint64_t rings
    cdef int number, count
    found = []
    eventfd_read(signal_bell, &rings)  # before the look: what comes after it rings again
    alarm_set(0)
    for number in range(SIGNALS_MOST):
        count = shared_take(&signal_counts[number])  # Cython 0.29 would evaluate it twice
        found += [number] * count
    return found
