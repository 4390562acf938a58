# cython: language_level=3, binding=False, auto_pickle=False, freethreading_compatible=True
# cython: boundscheck=False, wraparound=False, cdivision=True
#
# binding, auto_pickle: relays are neither introspected nor pickled, and both cost start-up time.
# freethreading_compatible: the methods of a relay are for one thread. What its workers share with
#   it has locks and atomics of its own (relay/mailbox.pxd, relay/gauges.pxd), and no Python.
# boundscheck …: only C arrays, with C's rules.
#
# This file is long, because a class that Python sees has to be in one piece. It holds only the two
# classes that do something, and what they do is in relay/*.pxd. Classes that hold values, and
# functions, are in files that are included here.
"""The mechanism: an epoll loop that forwards between pairs of sockets without the GIL.

This file is its Python face: the listener, and the relay. relay/events.pxi has what they return,
relay/calls.pxi the functions. Read on in relay/__init__.pxd, which says in which order.
"""

from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_INCREF
from cython cimport no_gc, no_gc_clear

from proxyd.relay cimport types
from proxyd.relay.accept cimport listener_count_early, listener_unwatch, listener_watch
from proxyd.relay.bookkeeping cimport connection_limit, connections_decrement
from proxyd.relay.clock cimport clock_ms, clock_ns, earlier
from proxyd.relay.close cimport connection_free, connections_free
from proxyd.relay.connect cimport (
    connection_connect, connection_new, connection_place, socket_connect, target_set_rights,
    worker_discard, worker_hang_up, worker_new_id,
)
from proxyd.relay.endpoint cimport endpoint_lost
from proxyd.relay.enter cimport resting_enter
from proxyd.relay.freeze cimport (
    Import, connections_export, connections_import, connections_release, connections_resting,
    quarantine_has_gathered, workers_freeze, workers_thaw,
)
from proxyd.relay.gauges cimport gauges_connections, gauges_in_quarantine, gauges_set_wake_at_count
from proxyd.relay.list cimport link_init, list_empty, list_remove
from proxyd.relay.loop cimport (
    worker_cut, worker_destroy, worker_init, worker_read_mailbox, worker_set_up, worker_turn,
)
from proxyd.relay.pages cimport pages_destroy
from proxyd.relay.pipe cimport pool_clear
from proxyd.relay.quarantine cimport quarantine_destroy, quarantine_due, quarantine_init
from proxyd.relay.records cimport (
    CONNECT_BUCKETS, CPUS_MAX, ENDING_COUNT, REPORT_BEGINS, REPORT_ENDS, REPORT_OLD, SOURCE_WORDS,
    SWEEP_COUNT, SWEEP_CUT, SWEEP_TELL, Binding, Machine, Network, Origin, Peer, Senders, Source,
    SourceTable, UpstreamTotals,
)
from proxyd.relay.restore cimport client_take_place, descriptor_reset
from proxyd.relay.row cimport batch_free, batches_keep, row_add
from proxyd.relay.self_connect cimport (
    local_port, self_connect_add, self_connect_move, self_connect_remove,
    self_connect_table_destroy, self_connect_table_init,
)
from proxyd.relay.sender cimport is_sender
from proxyd.relay.slate cimport slate_map, slate_unmap, worker_take_slate
from proxyd.relay.slate_types cimport Slate
from proxyd.relay.socket cimport socket_guard, socket_unlinger
from proxyd.relay.source cimport (
    source_enter, source_hold, source_of_address, source_table_destroy, source_table_init,
    source_take,
)
from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, ENOMEM, EPROTO, EPOLLET, EPOLLIN, EPOLLOUT, EPOLLRDHUP,
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, EUSERS, SOL_SOCKET, SO_DOMAIN, atomic_get, calloc, close,
    counter_get, epoll_ctl, epoll_event, errno, free, getpid, getsockopt, hint_set, int64_t, malloc,
    memcpy, memset, moment_get, pthread_join, sockaddr_storage, socklen_t, uint32_t, uint64_t,
)
from proxyd.relay.types cimport (
    KIND_LISTENER, KIND_WATCH, ORDER_TRIM, TO_CLIENT, TO_TARGET, Connection, Gauges, Listener,
    Quarantine, RowBatch, SelfConnectTable, Terms, Watch, Worker, Workers,
)
from proxyd.relay.workers cimport (
    quarantine_start, sweep_advance, sweep_until, worker_close_mailbox, worker_free,
    workers_answered, workers_enter, workers_order, workers_ping, workers_start_one, workers_stop,
    workers_sweep, workers_wake,
)

cdef enum:
    UPSTREAMS_MAX = 1 << 20    # indexes of targets

# what a RelayListener checks each client for
CHECK_TCP = types.CHECK_TCP
CHECK_UNIX = types.CHECK_UNIX
CHECK_PORT = types.CHECK_PORT

include "relay/events.pxi"
include "relay/calls.pxi"


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

    cdef Listener state
    cdef Relay relay

    def __init__(self, Relay relay not None, int fd, int family, int check, int index):
        self.relay = relay
        self.state.kind = KIND_LISTENER
        self.state.fd = fd
        self.state.family = family
        self.state.check = check
        self.state.index = index
        self.state.port = local_port(fd)
        link_init(&self.state.waiting, &self.state)

    def __dealloc__(self):
        if self.relay is not None:
            listener_unwatch(&self.relay.worker, &self.state)

    @property
    def connected_count(self):
        """Clients that auto_connect() has connected, including those whose connect failed later."""
        return self.state.connected_count

    def start(self):
        """Begin to accept. Raises OSError. The object must live until stop() was called."""
        cdef int failure
        listener_count_early(&self.state)
        failure = listener_watch(&self.relay.worker, &self.state)
        if failure < 0:
            raise_errno(-failure)

    def stop(self):
        """Accept no more clients; those that wait stay in the backlog."""
        listener_unwatch(&self.relay.worker, &self.state)

    def auto_connect(self, bytes address, long long timeout_ms=0, int upstream=0):
        """Connect each client to the packed `address` from now on, as Relay.connect() does.

        None: no longer.
        """
        if address is not None:
            self.relay.fill_terms(&self.state.terms, address, timeout_ms, upstream)
        self.state.auto_connect = address is not None


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

    cdef Worker worker
    cdef Gauges gauges
    cdef SelfConnectTable self_connects
    cdef Quarantine quarantine
    cdef SourceTable sources
    cdef Slate slate
    cdef Senders senders
    cdef Binding binding
    cdef bint outlived                 # by the quarantine's thread, which cannot be ended
    cdef Watch **watches               # by fd; NULL: not watched
    cdef int watches_size
    cdef UpstreamTotals **upstreams    # by index; NULL: not used so far
    cdef int upstreams_size
    cdef int sweeps                    # that were asked for
    cdef list sweeps_waiting           # (what, number, connection) of those that are to begin
    cdef public int wake_at_count      # run() returns at this number of connections; -1: never
    cdef public bint wake_on_first     # … and when the first one comes

    def __cinit__(self, size_t stream_unit=256 * 1024, size_t pipe_size=1024 * 1024,
                  bint may_splice=True, bint may_refuse=True):
        cdef Worker *worker = &self.worker
        cdef int failure
        self_connect_table_init(&self.self_connects)
        worker_init(worker, &self.gauges, &self.self_connects)
        quarantine_init(&self.quarantine, &worker.mailbox)
        worker.quarantine = &self.quarantine
        worker.sources = &self.sources
        worker.ctx.may_refuse = may_refuse
        if stream_unit < 1:
            raise ValueError("a recv of nothing would look like the end")
        worker.pid = getpid()
        worker.connections_max = 1 << 30
        self.gauges.last_end_ms = worker.ctx.now_ms
        self.wake_at_count = -1
        self.sweeps_waiting = []
        failure = worker_set_up(worker, stream_unit, pipe_size, may_splice)
        if failure == -ENOMEM:
            raise MemoryError()
        if failure < 0:
            raise_errno(-failure)

    def __dealloc__(self):
        cdef Connection *c
        if self.worker.live.next == NULL:
            return  # __cinit__ has not even begun: its arguments were bad
        workers_stop(&self.worker, True)
        if self.worker.workers.quarantine != NULL:  # close_all() would have kept us alive
            pthread_join(self.worker.workers.quarantine.thread, NULL)
            worker_read_mailbox(&self.worker)
            batches_keep(&self.worker.batches)
            worker_free(self.worker.workers.quarantine)
        free(self.worker.workers.each)
        if self.worker.workers.machine.stat_fd >= 0:
            close(self.worker.workers.machine.stat_fd)
        worker_close_mailbox(&self.worker)
        for fd in range(self.watches_size):
            self.unwatch(fd)
        free(self.watches)  # GCOVR_EXCL_LINE - run, but gcov takes it for another function's
        worker_destroy(&self.worker)
        if self.slate.map != NULL:
            pages_destroy(&self.slate)
            slate_unmap(&self.slate)
        for index in range(self.upstreams_size):
            free(self.upstreams[index])
        free(self.upstreams)
        while not list_empty(&self.quarantine.waiting):  # their sockets end with the process
            c = <Connection *>self.quarantine.waiting.next.owner
            list_remove(&c.live)
            free(c)
        quarantine_destroy(&self.quarantine)
        source_table_destroy(&self.sources)
        free(self.senders.networks)
        self_connect_table_destroy(&self.self_connects)

    # ── what the policy sees ─────────────────────────────────────────────────────────────────

    @property
    def connections(self):
        """Connections of all threads, including those still connecting and those ending, and flows
        of datagrams."""
        return gauges_connections(&self.gauges)

    @property
    def in_quarantine(self):
        """Sockets that the quarantine has yet to close. They are no connections any more, but keep
        their places in the limit."""
        return gauges_in_quarantine(&self.gauges)

    @property
    def connections_max(self):
        """The limit: a client is let in while there are fewer connections, sockets in quarantine
        and held clients, taken together. The relay never changes it."""
        return self.worker.connections_max

    @connections_max.setter
    def connections_max(self, int value):
        self.worker.connections_max = value

    def limit_sources(self, int places_max, long long nobody=-1):
        """Let each source have at most this number of places of the limit, which connections_max
        has set. A source is an address (of IPv6, its first 64 bits), a uid, or a CID. A client
        beyond that is closed, and a Refused event tells. Users with the uid `nobody` are not
        limited: it stands for all those who have no name in our user namespace. Call it once,
        before any client is accepted. Raises OSError.
        """
        cdef int failure = source_table_init(
            &self.sources, places_max, self.worker.connections_max, sizeof(Source))
        if failure < 0:
            raise_errno(-failure)
        self.sources.nobody = nobody

    def count_source(self, int client, bytes peer not None):
        """Count a client that was handed out with `sends_header` as one of this packed address;
        False: its source has no place left."""
        cdef sockaddr_storage address
        cdef uint32_t key[SOURCE_WORDS]
        cdef Source *source = NULL
        cdef int failure
        if self.sources.buckets == NULL:
            return True
        address_unpack(&address, peer)
        if not source_of_address(&address, key):
            return True
        failure = source_enter(&self.sources, key, &source)
        if failure == 0:
            source_hold(&self.sources, client, source)
        self.sources.refused += failure == -EUSERS
        return failure != -EUSERS

    def count_again(self, int client, bytes peer not None):
        """Count a client that another process has let in, even beyond the share of its source.
        `peer` is its packed address: that of its PROXY header, if there was one."""
        cdef Peer kept
        peer_fill(&kept, peer)
        source_hold(&self.sources, client, client_take_place(&self.worker, client, &kept))

    def bind_outgoing(self, bytes v4=b"", bytes v6=b"", bytes device=b"", bint client=False):
        """Bind all sockets to targets from now on, those for datagrams included: to the packed
        address of the target's family, or with `client` to the client's address without its port,
        and to the interface `device`. Where there is no address, the connect fails with
        EAFNOSUPPORT. Raises ValueError."""
        if max(len(v4), len(v6)) > <Py_ssize_t>sizeof(self.binding.v4.address):
            raise ValueError("address too long")
        if len(device) >= <Py_ssize_t>sizeof(self.binding.device):
            raise ValueError("name too long")
        memset(&self.binding, 0, sizeof(self.binding))
        self.binding.client = client
        peer_fill(&self.binding.v4, v4)
        peer_fill(&self.binding.v6, v6)
        memcpy(self.binding.device, <const char *>device, len(device))
        self.binding.device_size = <socklen_t>len(device)
        self.worker.ctx.binding = &self.binding

    def expect_headers(self, networks, bint unix_clients):
        """Hand each client from these networks out as an Accepted event with `sends_header`, and
        with `unix_clients` those of UNIX sockets. A network is an address of 4 or 16 bytes, and the
        number of its bits that count. Call it once, before any client is accepted. Raises
        MemoryError, ValueError."""
        cdef Network *network
        self.senders.unix_clients = unix_clients
        self.senders.networks = <Network *>calloc(max(len(networks), 1), sizeof(Network))
        if self.senders.networks == NULL:
            raise MemoryError()
        for address, bits in networks:
            if len(address) not in (4, 16) or not 0 <= bits <= 8 * len(address):
                raise ValueError("no such network")
            network = &self.senders.networks[self.senders.count]
            network.family = AF_INET if len(address) == 4 else AF_INET6
            network.bits = bits
            memcpy(network.address, <const char *><bytes>address, len(address))
            self.senders.count += 1
        self.worker.senders = &self.senders

    def expects_header(self, bytes peer not None):
        """Whether a client with this packed address is one that begins with a PROXY header."""
        cdef sockaddr_storage address
        address_unpack(&address, peer)
        return self.worker.senders != NULL and is_sender(self.worker.senders, &address)

    @property
    def refused_by_source(self):
        """Of the clients refused, those whose source had no place left."""
        return self.sources.refused

    @property
    def held(self):
        """Clients in the caller's hands. Each event that hands one out adds one, so that no other
        is let in for it; the caller corrects the number after each batch of events."""
        return self.worker.held

    @held.setter
    def held(self, int value):
        self.worker.held = value

    @property
    def last_end_ms(self):
        """When a connection last ended, on the clock of now_ms; before that, when the relay was
        made."""
        return moment_get(&self.gauges.last_end_ms)

    @property
    def now_ms(self):
        """CLOCK_MONOTONIC in ms, as read for the last batch of events."""
        return self.worker.ctx.now_ms

    @property
    def idle_ms(self):
        """Connections over which no byte has moved for this long are closed; 0: never."""
        return self.worker.idle_ms

    @idle_ms.setter
    def idle_ms(self, long long value):
        self.worker.idle_ms = value

    @property
    def report_ends(self):
        """Whether run() returns an Ended event for each connection."""
        return bool(self.gauges.reports & REPORT_ENDS)

    @report_ends.setter
    def report_ends(self, bint value):
        self.set_report(REPORT_ENDS, value)

    @property
    def report_begins(self):
        """Whether run() returns a Begun event for each connection, and Ended has its `info`."""
        return bool(self.gauges.reports & REPORT_BEGINS)

    @report_begins.setter
    def report_begins(self, bint value):
        self.set_report(REPORT_BEGINS, value)

    @property
    def report_old(self):
        """Whether run() returns an Old event, once; then this is False again."""
        return bool(self.gauges.reports & REPORT_OLD)

    @report_old.setter
    def report_old(self, bint value):
        self.set_report(REPORT_OLD, value)
        if value:
            workers_enter(&self.worker)

    @property
    def keeps_unix(self):
        """Whether connections with a UNIX socket are kept in a slate, too: it costs them a little
        with each message. Not asked for those that are kept already."""
        return not self.gauges.tcp_alone

    @keeps_unix.setter
    def keeps_unix(self, bint value):
        hint_set(&self.gauges.tcp_alone, not value)

    cdef void set_report(self, int report, bint wanted) noexcept:
        cdef int others = self.gauges.reports & ~report
        hint_set(&self.gauges.reports, others | report if wanted else others)

    def totals(self):
        """What has been counted since the start."""
        cdef Worker *worker = &self.worker
        cdef Totals totals = Totals()
        totals.accepted = worker.accepted
        totals.refused = worker.refused
        totals.bytes_to_targets = self.sum_of(&worker.ctx.counters.forwarded[TO_TARGET])
        totals.bytes_to_clients = self.sum_of(&worker.ctx.counters.forwarded[TO_CLIENT])
        totals.spliced = self.sum_of(&worker.ctx.counters.spliced)
        totals.copied = self.sum_of(&worker.ctx.counters.copied)
        totals.endings = {ENDINGS[i]: self.sum_of(&worker.ends[i]) for i in range(ENDING_COUNT)}
        return totals

    def add_upstream(self, int upstream):
        """Make ready to count under this index, so that a connect needs no memory for it. Raises
        ValueError if it is negative or too large."""
        self.upstream_at(upstream)

    def target_totals(self, int upstream):
        """The TargetTotals of one index. Raises ValueError if it is negative or too large."""
        cdef UpstreamTotals *counted = self.upstream_at(upstream)
        cdef TargetTotals totals = TargetTotals()
        totals.bytes_to_target = counter_get(&counted.bytes[TO_TARGET])
        totals.bytes_to_clients = counter_get(&counted.bytes[TO_CLIENT])
        totals.endings = {ENDINGS[i]: counter_get(&counted.endings[i]) for i in range(ENDING_COUNT)}
        totals.connects = tuple([counter_get(&counted.connects[i]) for i in range(CONNECT_BUCKETS)])
        totals.connect_us = counter_get(&counted.connect_us)
        return totals

    cdef UpstreamTotals *upstream_at(self, int index) except NULL:
        """Where the connections of this index count. It never moves."""
        cdef int size = max(self.upstreams_size, 4)
        cdef UpstreamTotals **table
        if not 0 <= index < UPSTREAMS_MAX:
            raise ValueError("no such index of a target")
        while size <= index:
            size *= 2
        if size > self.upstreams_size:
            table = <UpstreamTotals **>calloc(size, sizeof(UpstreamTotals *))
            if table == NULL:
                raise MemoryError()
            if self.upstreams != NULL:
                memcpy(table, self.upstreams, self.upstreams_size * sizeof(UpstreamTotals *))
            free(self.upstreams)
            self.upstreams = table
            self.upstreams_size = size
        if self.upstreams[index] == NULL:
            self.upstreams[index] = <UpstreamTotals *>calloc(1, sizeof(UpstreamTotals))
            if self.upstreams[index] == NULL:
                raise MemoryError()
            self.upstreams[index].index = index
        return self.upstreams[index]

    cdef uint64_t sum_of(self, uint64_t *counter) noexcept:
        """The main worker's `counter`, plus the same one of every other worker."""
        cdef Worker *worker = &self.worker
        cdef size_t offset = <char *>counter - <char *>worker
        cdef uint64_t total = counter_get(counter)
        for i in range(worker.workers.count):
            total += counter_get(<uint64_t *>(<char *>worker.workers.each[i] + offset))
        if worker.workers.quarantine != NULL:
            total += counter_get(<uint64_t *>(<char *>worker.workers.quarantine + offset))
        return total

    # ── threads ──────────────────────────────────────────────────────────────────────────────

    @property
    def thread_count(self):
        """Threads that forward, including the one that calls run()."""
        return 1 + self.worker.workers.count

    @property
    def handed_over(self):
        """How often a connection moved from one thread to another."""
        return self.sum_of(&self.worker.handed_over)

    def offload_when_busy(self, int stat, int window_ms=100, cpus=None, int quota=0,
                          int wait_max=100):
        """Offload only a thread that is busy, and only while a CPU is idle (relay/busy.pxd). Load
        is measured over windows of `window_ms`. Without this call every new connection goes to the
        thread with the fewest. Call it once, before start_worker().

        `stat` is an fd of /proc/stat or /proc/uptime, which the relay closes; with -1, if neither
        can be opened, an idle CPU is assumed. With `cpus` only the idle time of these CPUs counts,
        which takes /proc/stat. `quota` is how much of a CPU the process may use, in per cent; 0: no
        limit. An idle CPU does not count after a window in which the thread had to wait for a CPU
        for more than `wait_max` per cent of the time. The first time that a worker could help and
        there is none, run() returns a WorkersWanted event.
        """
        cdef Machine *machine = &self.worker.workers.machine
        self.worker.offloads_when_busy = True
        self.worker.workers.window_ms = window_ms
        machine.stat_fd = stat
        machine.quota = quota
        machine.wait_max = wait_max
        machine.some_cpus = cpus is not None
        for cpu in cpus or ():
            if 0 <= cpu < CPUS_MAX:
                machine.cpus[<int>cpu // 8] |= 1 << (<int>cpu % 8)

    def start_worker(self):
        """Start one more thread, to which connections are moved. Raises OSError.

        idle_ms must be set before: a worker takes it as it is. All workers must be there before
        run() can move anything to one of them.
        """
        cdef int failure = workers_start_one(&self.worker)
        if failure < 0:
            raise_errno(-failure)

    def ping_workers(self):
        """Ask every thread for an answer, to see that none is stuck; see workers_answered."""
        workers_ping(&self.worker)

    @property
    def workers_answered(self):
        """Whether every thread has answered the last ping_workers()."""
        return workers_answered(&self.worker)

    # ── listeners and other fds of the policy ────────────────────────────────────────────────

    def watch(self, int fd, unsigned int events=EPOLLIN):
        """Have run() return a Ready event for `fd`, which stays the caller's.

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
        if epoll_ctl(self.worker.ctx.epoll, EPOLL_CTL_ADD, fd, &event) < 0:
            free(watch)
            raise_errno(errno)
        self.watches[fd] = watch

    def unwatch(self, int fd):
        """Stop watching an fd, before it is closed. Does nothing if it is not watched."""
        cdef Watch *watch = self.watch_of(fd)
        if watch == NULL:
            return
        self.watches[fd] = NULL
        epoll_ctl(self.worker.ctx.epoll, EPOLL_CTL_DEL, fd, NULL)
        self_connect_remove(&self.self_connects, &watch.self_connect)
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

    def take_over(self, int fd, int family):
        """Prepare a client that was accepted elsewhere, before there are further threads.

        close(2) must not wait for it. Nor must splice(2), which would if another process that has
        the socket clears O_NONBLOCK: everything is copied from now on.
        """
        if family == AF_VSOCK:
            socket_unlinger(fd)
        socket_guard(fd, family)
        self.worker.ctx.may_splice = False

    def trim_pipes(self):
        """Close the idle pipes, when fds are short."""
        pool_clear(&self.worker.ctx.pool)
        workers_order(&self.worker, ORDER_TRIM)

    def main_worker(self):
        """A capsule for _datagram, which adds flows to this loop. It is valid while the relay is.
        """
        return PyCapsule_New(&self.worker, "proxyd.relay.Worker", NULL)

    # ── connections ──────────────────────────────────────────────────────────────────────────

    def new_id(self):
        """An id for a client that is held; connect() and adopt() take it as `connection`."""
        return worker_new_id(&self.worker)

    def connect(self, int client, int client_family, bytes address not None,
                bytes preamble=None, int listener=0, long long timeout_ms=0, int upstream=0,
                bytes peer=b"", int held_ms=0, long long connection=0):
        """Connect an accepted client to the packed sockaddr `address` and forward; the id.

        It counts under `upstream`. `peer`, the client's packed address, and `held_ms`, how long the
        caller has held it, are for ConnectionInfo. `connection` is its id from new_id(); 0: a new
        one.

        `preamble` is sent to the target first. If the connect fails, the client is the caller's
        again: a ConnectFailed with this `listener` says so. It is returned if the connect fails at
        once, and an event of run() if it fails later or takes longer than `timeout_ms` (0: as long
        as the kernel tries). Either way the client is no longer watched.
        """
        cdef Terms terms
        cdef Origin origin
        cdef long long number
        self.fill_terms(&terms, address, timeout_ms, upstream)
        self.fill_origin(&origin, listener, upstream, peer, held_ms)
        self.unwatch(client)
        if preamble is None:
            preamble = b""
        origin.source = source_take(&self.sources, client)
        number = connection_connect(
            &self.worker, client, client_family, &terms, preamble, <size_t>len(preamble),
            &origin, connection)
        if number < 0:
            source_hold(&self.sources, client, origin.source)
            return ConnectFailed(
                listener, client, <int>-number, preamble, self.worker.ctx.now_ms, 0,
                peer_bytes(&origin.peer))
        return number

    cdef int fill_terms(self, Terms *terms, bytes address, int64_t timeout_ms,
                        int upstream) except -1:
        terms.upstream = self.upstream_at(upstream)
        address_unpack(&terms.target, address)
        terms.target_size = <socklen_t>len(address)
        terms.timeout_ms = timeout_ms
        return 0

    cdef int fill_origin(self, Origin *origin, int listener, int upstream, bytes peer,
                         int held_ms) except -1:
        origin.upstream = self.upstream_at(upstream)
        origin.listener = listener
        origin.held_ms = held_ms
        origin.source = NULL
        peer_fill(&origin.peer, peer)
        return 0

    def dial(self, bytes address not None, bytes client=b""):
        """Start to connect a new socket; its fd, the caller's. It is watched, edge-triggered.
        `client` is the packed address of the one that it is for, which counts only if sockets are
        bound to it: see bind_outgoing().

        Once connected() says so, adopt() takes it; hang_up() closes it. Raises OSError if the
        connect fails at once.
        """
        cdef sockaddr_storage target
        cdef bint connecting
        cdef int fd
        cdef Watch *watch
        cdef int64_t began_ns = clock_ns()
        cdef Peer source
        address_unpack(&target, address)
        peer_fill(&source, client)
        fd = socket_connect(
            &self.worker.ctx, &target, <socklen_t>len(address), &source, &connecting)
        if fd < 0:
            raise_errno(-fd)
        try:
            self.watch(fd, EPOLLOUT | EPOLLIN | EPOLLRDHUP | EPOLLET)
        except OSError:
            worker_hang_up(&self.worker, fd, target.ss_family, False, NULL)
            raise
        watch = self.watches[fd]
        watch.began_ns = began_ns
        watch.connect_us = -1 if connecting else (clock_ns() - began_ns) // 1000
        self_connect_add(&self.self_connects, &watch.self_connect, fd, &target)
        return fd

    def hang_up(self, int fd, bint reset=False):
        """Close a client or a socket of dial(), watched or not. With `reset` its peer does not take
        this for a clean end. Never waits."""
        self.unwatch(fd)
        worker_hang_up(
            &self.worker, fd, socket_family(fd), reset, source_take(&self.sources, fd))

    def discard(self, int fd):
        """As hang_up(), for a UNIX socket that has no place in the limit. False: it is still the
        caller's, to be tried again later. Its peer has seen the end, but its queue has descriptors,
        and the quarantine has enough of such sockets to close."""
        self.unwatch(fd)
        return worker_discard(&self.worker, fd)

    def adopt(self, int client, int client_family, int fd, bytes preamble=None, int error=0,
              int listener=0, int upstream=0, bytes peer=b"", int held_ms=0,
              long long connection=0):
        """Forward between a client and a connected socket of dial(), both owned from now on; the
        id. `error`: the target has already reset with it. For the rest see connect(). Raises
        OSError, and both are still the caller's.
        """
        cdef Watch *watch = self.watch_of(fd)
        cdef Origin origin
        cdef Connection *c
        cdef bint is_new = connection == 0
        self.fill_origin(&origin, listener, upstream, peer, held_ms)
        if preamble is None:
            preamble = b""
        c = connection_new(&self.worker, client, client_family, fd, socket_family(fd),
                           preamble, <size_t>len(preamble))
        if c == NULL:
            raise_errno(ENOMEM)
        if is_new:
            connection = worker_new_id(&self.worker)
        c.id = connection
        origin.source = source_take(&self.sources, client)
        c.origin = origin
        target_set_rights(&self.worker.ctx, &c.target)
        self.unwatch(client)
        if watch != NULL:
            if watch.began_ns != 0 and watch.connect_us < 0:  # connected before its first event
                watch.connect_us = (clock_ns() - watch.began_ns) // 1000
            c.connect_us = watch.connect_us
            self_connect_move(&self.self_connects, &c.self_connect, &watch.self_connect)
            self.unwatch(fd)
        if error != 0:  # connected() has read it, and reading clears it
            endpoint_lost(&c.target, error)
        connection_place(&self.worker, c, False, is_new)
        return connection

    def close_all(self):
        """Cut every connection with a reset, since this is no clean end; how many there were. The
        workers end too, except a quarantine that is blocked: see quarantine_stop()."""
        cdef int count
        with nogil:
            count = workers_stop(&self.worker, True)  # may leave some to this one
            count += worker_cut(&self.worker, True)
            connections_free(&self.worker.dead)
        if self.worker.workers.quarantine != NULL and not self.outlived:
            self.outlived = True
            Py_INCREF(self)  # for good: the thread goes on using this memory
        return count

    # ── taking connections to another process ────────────────────────────────────────────────

    @property
    def resting(self):
        """Connections that rest: see freeze() and import_connections()."""
        return connections_resting(&self.worker)

    def freeze(self):
        """Let all connections of all threads rest, so that export() can take them. The last events
        are returned. run() is not to be called before thaw(); what connect() and adopt() begin
        rests as well.

        Raises OSError if a thread does not answer: then all go on. Connections in quarantine stay
        there if it blocks.
        """
        cdef int failure
        with nogil:
            failure = workers_freeze(&self.worker)
            if failure < 0:
                workers_thaw(&self.worker)  # GCOVR_EXCL_LINE - see workers_freeze()
        if failure < 0:
            raise_errno(-failure)  # GCOVR_EXCL_LINE - the same
        return self.take_events()

    @property
    def quarantine_blocks(self):
        """After freeze(): whether the quarantine blocks, and its connections stay behind."""
        return not quarantine_has_gathered(&self.worker)

    def export(self, int fd, long long offset=0):
        """Describe all connections that rest in the file `fd`, from `offset` to its end. The
        descriptors that belong to it, as a list: they are to be sent in this order, and stay ours.

        Their sockets are reset if nobody goes on with them. release() or thaw() is to follow.
        Raises OSError.
        """
        cdef uint64_t count = connections_resting(&self.worker)
        cdef int *fds = <int *>malloc(<size_t>(4 * count + 1) * sizeof(int))
        cdef int64_t result, i
        if fds == NULL:
            raise MemoryError()
        try:
            with nogil:
                result = connections_export(&self.worker, fd, offset, fds)
            if result < 0:
                raise_errno(<int>-result)
            return [fds[i] for i in range(result)]
        finally:
            free(fds)

    def import_connections(self, int fd, long long offset, list fds not None,
                           list listeners not None, list upstreams not None):
        """Let the connections of an export() rest here until thaw(): (how many there are, how many
        could not be restored and were reset).

        `fds` are the descriptors, -1 for those that were lost; they are owned from now on in any
        case. `listeners` and `upstreams` are, by the indexes that they had there, the indexes that
        they have here; a listener that is not there any more is -1. Raises ValueError if the file
        is not what export() has written, and OSError if it cannot be read; then all are reset.
        """
        cdef Import source
        cdef int failure, count = 0
        memset(&source, 0, sizeof(source))
        source.file = fd
        source.offset = offset
        source.fd_count = <uint64_t>len(fds)
        source.listener_count = <uint64_t>len(listeners)
        source.upstream_count = <uint64_t>len(upstreams)
        fd_array = int_array(fds)
        listener_array = int_array(listeners)
        source.fds = <const int *><const char *>fd_array
        source.listeners = <const int *><const char *>listener_array
        source.upstreams = <UpstreamTotals **>malloc(
            <size_t>(source.upstream_count + 1) * sizeof(UpstreamTotals *))
        try:
            try:
                if source.upstreams == NULL:
                    raise MemoryError()
                for upstream in upstreams:
                    source.upstreams[count] = self.upstream_at(upstream)
                    count += 1
            except (ValueError, MemoryError):
                for fd in fds:
                    descriptor_reset(&self.worker, fd)
                raise
            with nogil:
                failure = connections_import(&self.worker, &source)
        finally:
            free(source.upstreams)
        if failure == -EPROTO:
            raise ValueError("not a parcel of connections")
        if failure < 0:
            raise_errno(-failure)
        return source.restored, source.failed

    def thaw(self):
        """Go on with all connections that rest."""
        with nogil:
            workers_thaw(&self.worker)

    def use_slate(self, int file, int root, unsigned int generation):
        """Keep connections for the next process in the slate of this file (slate_create()), which
        may be closed then. `root` is the sending end that pages are announced to, as of this
        generation; it stays the caller's, and must stay open. -1: there are no pages, and no pipes
        are used for what is kept. Call it once. Raises OSError, ValueError.
        """
        cdef int failure
        if self.slate.map != NULL:
            raise ValueError("there is a slate already")
        failure = slate_map(&self.slate, file)
        if failure == -EPROTO or failure == 0 and (
                self.slate.head.unit < self.worker.ctx.stream_unit):
            if failure == 0:
                slate_unmap(&self.slate)
            raise ValueError("not a slate for this relay")
        if failure < 0:
            raise_errno(-failure)
        self.slate.root = root
        self.slate.generation = generation
        worker_take_slate(&self.worker, &self.slate)
        workers_enter(&self.worker)

    def release(self):
        """Forget the connections that rest, without a word to their peers: another process has
        copies of their descriptors, and goes on with them."""
        with nogil:
            connections_release(&self.worker)

    def enter_all(self):
        """Keep all that rest for the next process, whatever their age; how many these are. Those
        that could not go on by themselves are left out. Raises OSError if the system refuses one.
        """
        cdef int failure = 0
        cdef int count
        if self.worker.ctx.slate == NULL:
            return 0
        with nogil:
            count = resting_enter(&self.worker, &failure)
        if failure < 0:
            raise_errno(-failure)
        return count

    # ── looking at connections ───────────────────────────────────────────────────────────────

    def start_snapshot(self, bint rows=True):
        """Tell of every connection that is there now; the number of the snapshot.

        SnapshotRows events of run() follow, one at a time. Connections that end before they are
        passed are left out. Without `rows` there is only the last event: the bytes of all
        connections are in target_totals() then, as with it. One snapshot follows the other.
        """
        return self.start_sweep(SWEEP_TELL if rows else SWEEP_COUNT, 0)

    def terminate(self, long long connection):
        """Reset both sides of a connection, whichever thread has it. A Terminated event tells
        whether there was one; it ends as ENDING_CUT."""
        self.start_sweep(SWEEP_CUT, connection)

    cdef int start_sweep(self, int what, long long connection) except -1:
        """The number of the sweep."""
        self.sweeps += 1
        self.sweeps_waiting.append((what, self.sweeps, connection))
        self.begin_sweep()
        return self.sweeps

    cdef int begin_sweep(self) except -1:
        """Begin the next one, if there is none."""
        if not self.is_sweeping() and self.sweeps_waiting:
            what, number, connection = self.sweeps_waiting.pop(0)
            workers_sweep(&self.worker, what, number, connection)
        return 0

    cdef bint is_sweeping(self) noexcept:
        return self.worker.workers.sweep_awaited != 0 or self.worker.workers.sweep_over

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
            raise_errno(-failure)  # GCOVR_EXCL_LINE - epoll_wait fails with EINTR only
        return self.take_events()

    cdef int turn_until(self, int64_t deadline_ms) noexcept nogil:
        """Turn until the policy is needed; 0 or -errno."""
        cdef Worker *worker = &self.worker
        cdef int failure, before
        while True:
            before = gauges_connections(&self.gauges)
            if quarantine_due(&self.quarantine, worker.ctx.now_ms):
                quarantine_start(worker)
            failure = worker_turn(worker, 0 if self.is_wanted() else self.until(deadline_ms))
            if failure == 0:
                failure = -atomic_get(&self.gauges.worker_error)
            if failure < 0:
                return failure  # GCOVR_EXCL_LINE - epoll_wait fails with EINTR only
            sweep_advance(worker)
            if worker.policy_event_count > 0 or not list_empty(&worker.failed):
                return 0
            if worker.workers.sweep_over or not list_empty(&worker.ended):
                return 0
            if not list_empty(&worker.batches) or not list_empty(&worker.begun):
                return 0
            if gauges_connections(&self.gauges) <= self.wake_at_count:
                return 0
            if self.wake_on_first and before == 0 and gauges_connections(&self.gauges) > 0:
                return 0
            if deadline_ms >= 0 and worker.ctx.now_ms >= deadline_ms:
                return 0

    cdef int64_t until(self, int64_t deadline_ms) noexcept nogil:
        """`deadline_ms`, or when to try again to start the quarantine's thread."""
        deadline_ms = sweep_until(&self.worker, deadline_ms)
        if atomic_get(&self.quarantine.wanted):
            return earlier(deadline_ms, self.quarantine.retry_ms)
        return deadline_ms

    cdef bint is_wanted(self) noexcept nogil:
        """Whether the number of connections has already fallen to where there is something to do.
        If not, the thread in which it does will wake this one."""
        cdef Worker *worker = &self.worker
        cdef int wake_at = self.wake_at_count
        if worker.room_ms != 0:
            wake_at = max(
                wake_at, connection_limit(worker) - 1 - gauges_in_quarantine(&self.gauges))
        gauges_set_wake_at_count(&self.gauges, wake_at)
        return gauges_connections(&self.gauges) <= wake_at

    cdef list take_events(self):
        cdef Worker *worker = &self.worker
        cdef Connection *c
        cdef RowBatch *batch
        cdef int i
        cdef list events = []
        for i in range(worker.policy_event_count):
            events.append(make_event(&worker.policy_events[i], worker.ctx.now_ms))
        worker.policy_event_count = 0
        while not list_empty(&worker.begun):
            batch = <RowBatch *>worker.begun.next.owner
            for i in range(batch.count):
                events.append(Begun(connection_info(&batch.rows[i])))
            batch_free(batch)
        while not list_empty(&worker.failed):
            c = <Connection *>worker.failed.next.owner
            list_remove(&c.live)
            if self.is_sweeping() and worker.sweep.what == SWEEP_TELL and (
                    c.sweep < worker.sweep.number):
                # It was there when the snapshot began, and is the policy's from now on.
                row_add(worker, &worker.batches, worker.sweep.number, c, worker.number)
            events.append(ConnectFailed(
                c.origin.listener, c.client.fd, c.target.error, take_pending(c), c.opened_ms, c.id,
                peer_bytes(&c.origin.peer), c.up.moved > 0))
            source_hold(&self.sources, c.client.fd, c.origin.source)
            c.origin.source = NULL
            connections_decrement(worker)
            worker.held += 1
            connection_free(c)
        while not list_empty(&worker.ended):
            c = <Connection *>worker.ended.next.owner
            list_remove(&c.live)
            events.append(Ended(
                c.id, ENDINGS[c.ending], c.up.moved, c.down.moved,
                worker.ctx.now_ms - c.opened_ms, c.client.error, c.target.error,
                None if c.row == NULL else connection_info(c.row)))
            connection_free(c)
        self.take_sweep(events)
        return events

    cdef int take_sweep(self, list events) except -1:
        """At most one batch of rows, so that clients are served in between."""
        cdef Worker *worker = &self.worker
        cdef Workers *workers = &worker.workers
        cdef RowBatch *batch
        cdef bint last
        cdef int i
        cdef list rows = []
        while not rows and not list_empty(&worker.batches):
            batch = <RowBatch *>worker.batches.next.owner
            # Otherwise the quarantine has told it too late.
            if batch.sweep == worker.sweep.number and self.is_sweeping():
                rows = [connection_info(&batch.rows[i]) for i in range(batch.count)]
            if batch_free(batch):
                workers_wake(worker)
        last = workers.sweep_over and list_empty(&worker.batches)
        if last and worker.sweep.what == SWEEP_CUT:
            events.append(Terminated(
                worker.sweep.connection, atomic_get(&self.gauges.terminated) != 0))
        elif last or rows:
            events.append(SnapshotRows(
                worker.sweep.number, rows, last, workers.sweep_missing if last else 0))
        if last:
            workers.sweep_over = False
            self.begin_sweep()
        return 0


cdef int socket_family(int fd) noexcept:
    """The address family, or 0."""
    cdef int family = 0
    cdef socklen_t size = sizeof(family)
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &size)
    return family


cdef bytes int_array(list numbers):
    """An array of C ints."""
    cdef bytes packed = bytes(len(numbers) * sizeof(int))
    cdef int *array = <int *><char *>packed
    cdef int place = 0
    for number in numbers:
        array[place] = number
        place += 1
    return packed


cdef void peer_fill(Peer *to, bytes address) noexcept:
    """Nothing, if it is too long for a socket."""
    to.size = 0
    if address is not None and <size_t>len(address) <= sizeof(to.address):
        memcpy(&to.address, <const char *>address, len(address))
        to.size = <socklen_t>len(address)


cdef int address_unpack(sockaddr_storage *to, bytes address) except -1:
    if len(address) > <Py_ssize_t>sizeof(to[0]):
        raise ValueError("address too long")
    memset(to, 0, sizeof(to[0]))
    memcpy(to, <const char *>address, len(address))
    return 0
