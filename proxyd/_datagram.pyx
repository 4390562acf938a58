# cython: language_level=3, binding=False, auto_pickle=False, freethreading_compatible=True
# cython: boundscheck=False, wraparound=False, cdivision=True
#
# For these directives see _relay.pyx.
"""Datagrams: an extension that adds flows to the loop of a relay.

It is imported only where there is a datagram listener. This file is its Python face; read on in
relay/flows.pxd.
"""

from cpython.pycapsule cimport PyCapsule_GetPointer
from cython cimport no_gc_clear

from proxyd.relay cimport flow_types
from proxyd.relay.flow cimport flow_end
from proxyd.relay.flow_held cimport held_first
from proxyd.relay.flow_listener cimport (
    listener_drop_queue, listener_init, listener_set_options, listener_start, listener_stop,
)
from proxyd.relay.flow_target cimport target_forget, target_move, target_probe
from proxyd.relay.flow_tell cimport row_of_flow, socket_dropped
from proxyd.relay.flow_types cimport (
    DROP_COUNT, FLOW_CUT, FLOW_ENDING_COUNT, TELL_BEGUN, TELL_DOWN, TELL_ENDED, TELL_HOLDS,
    TELL_LIMIT, TELL_LISTENER_FAILED, TELL_LOOP, TELL_SOURCE, TELL_UP, Flow, FlowEvent,
    FlowListener, FlowRow, Flows, FlowSource, FlowTarget, FlowTotals, LocalAddress, Name,
)
from proxyd.relay.flow_address cimport local_is_unknown
from proxyd.relay.flows cimport flows_cut, flows_destroy, flows_set_up
from proxyd.relay.list cimport link_init, list_append, list_remove
from proxyd.relay.source cimport source_table_init
from proxyd.relay.sys cimport (
    AF_INET, AF_UNIX, ENOMEM, calloc, free, int64_t, memcpy, memset, sockaddr_in, sockaddr_in6,
    sockaddr_storage, socklen_t, uint16_t, uint64_t,
)
from proxyd.relay.types cimport TO_CLIENT, TO_TARGET, Link, Worker

# Why datagrams are dropped, by DROP_* in relay/flow_types.pxd: the words of the log, and the keys
# of DatagramTotals.dropped.
DROPS = ("at the limit", "target down", "too large", "from ourselves", "no socket",
         "no return address", "client refused", "target refused", "with descriptors",
         "at the limit of the source")
DROP_LIMIT = DROPS[flow_types.DROP_LIMIT]
DROP_DOWN = DROPS[flow_types.DROP_DOWN]
DROP_TOO_LARGE = DROPS[flow_types.DROP_TOO_LARGE]
DROP_LOOP = DROPS[flow_types.DROP_LOOP]
DROP_NO_SOCKET = DROPS[flow_types.DROP_NO_SOCKET]
DROP_UNANSWERABLE = DROPS[flow_types.DROP_UNANSWERABLE]
DROP_CLIENT = DROPS[flow_types.DROP_CLIENT]
DROP_TARGET = DROPS[flow_types.DROP_TARGET]
DROP_RIGHTS = DROPS[flow_types.DROP_RIGHTS]
DROP_SOURCE = DROPS[flow_types.DROP_SOURCE]

# How a flow can end, by FLOW_EXPIRED …: the keys of DatagramTotals.endings.
FLOW_ENDINGS = ("expired", "evicted", "cut")

# DatagramTarget.state
TARGET_STATES = ("doubt", "up", "down")


# ── events, as take_events() returns them ────────────────────────────────────────────────────────

cdef class TargetDown:
    """A target has refused the datagram in hand, or cannot be reached."""

    cdef readonly int target               # index
    cdef readonly int error                # errno

    def __init__(self, int target, int error):
        self.target = target
        self.error = error


cdef class TargetUp:
    """A target answers, of which TargetDown or TargetHolds was told before."""

    cdef readonly int target               # index

    def __init__(self, int target):
        self.target = target


cdef class TargetHolds:
    """A target is down, and a datagram has come for it: the first one in hand."""

    cdef readonly int target               # index

    def __init__(self, int target):
        self.target = target


cdef class FlowsRefused:
    """Datagrams were dropped since there is no place for their flows. Told once a second at most.
    """

    cdef readonly int listener             # index
    cdef readonly uint64_t count           # of datagrams since this was last told
    cdef readonly bytes peer               # packed address of the last one's sender
    cdef readonly bint by_source           # the limit of its source, not that of all

    def __init__(self, int listener, uint64_t count, bytes peer not None, bint by_source=False):
        self.listener = listener
        self.count = count
        self.peer = peer
        self.by_source = by_source


cdef class LoopFound:
    """Datagrams that came from our own flows were dropped. Told once a second at most."""

    cdef readonly int listener             # index
    cdef readonly uint64_t count           # of datagrams since this was last told
    cdef readonly bytes peer               # packed address of the last one's sender

    def __init__(self, int listener, uint64_t count, bytes peer not None):
        self.listener = listener
        self.count = count
        self.peer = peer


cdef class FlowFailed:
    """Datagrams were dropped since there was no socket for a flow. Told once a second at most."""

    cdef readonly int listener             # index
    cdef readonly int error                # errno of the last one
    cdef readonly uint64_t count           # of datagrams since this was last told

    def __init__(self, int listener, int error, uint64_t count):
        self.listener = listener
        self.error = error
        self.count = count


cdef class ListenerFailed:
    """A listener cannot be read any more, and was stopped."""

    cdef readonly int listener             # index
    cdef readonly int error                # errno

    def __init__(self, int listener, int error):
        self.listener = listener
        self.error = error


cdef class FlowBegun:
    """A flow has begun. Only with Datagrams.report_flows."""

    cdef readonly FlowInfo info

    def __init__(self, FlowInfo info not None):
        self.info = info


cdef class FlowEnded:
    """A flow has ended. Only with Datagrams.report_flows."""

    cdef readonly FlowInfo info            # just before
    cdef readonly str ending               # one of FLOW_ENDINGS

    def __init__(self, FlowInfo info not None, str ending not None):
        self.info = info
        self.ending = ending


# ── what a flow is, and numbers ──────────────────────────────────────────────────────────────────

cdef class FlowInfo:
    """A flow, as it is now."""

    cdef readonly long long flow           # id
    cdef readonly int listener             # index
    cdef readonly int target_index         # index of its DatagramTarget
    cdef readonly bytes client             # packed address; b"": a UNIX sender without a name
    cdef readonly bytes local              # … that it has sent to; b"": the listener's own
    cdef readonly bytes target             # packed address
    cdef readonly bytes own                # our own towards the target
    cdef readonly int64_t opened_ms
    cdef readonly int64_t active_ms        # when a datagram last moved
    cdef readonly bint established         # the client has sent again after a reply
    cdef readonly bint answered            # there was a reply
    cdef readonly uint64_t datagrams_up    # delivered
    cdef readonly uint64_t datagrams_down
    cdef readonly uint64_t bytes_up        # in them, without PROXY headers
    cdef readonly uint64_t bytes_down
    cdef readonly uint64_t kernel_drops    # replies that the queue of its socket had no room for

    def __init__(self, long long flow, int listener, int target_index, bytes client not None,
                 bytes local not None, bytes target not None, bytes own not None,
                 int64_t opened_ms, int64_t active_ms, bint established, bint answered,
                 uint64_t datagrams_up, uint64_t datagrams_down, uint64_t bytes_up,
                 uint64_t bytes_down, uint64_t kernel_drops):
        self.flow = flow
        self.listener = listener
        self.target_index = target_index
        self.client = client
        self.local = local
        self.target = target
        self.own = own
        self.opened_ms = opened_ms
        self.active_ms = active_ms
        self.established = established
        self.answered = answered
        self.datagrams_up = datagrams_up
        self.datagrams_down = datagrams_down
        self.bytes_up = bytes_up
        self.bytes_down = bytes_down
        self.kernel_drops = kernel_drops


cdef class DatagramTotals:
    """What has been counted since the start."""

    cdef readonly uint64_t flows           # begun
    cdef readonly dict endings             # flows that have ended: {one of FLOW_ENDINGS: count}
    cdef readonly uint64_t datagrams_to_targets  # delivered
    cdef readonly uint64_t datagrams_to_clients
    cdef readonly uint64_t bytes_to_targets  # in them, without PROXY headers
    cdef readonly uint64_t bytes_to_clients
    cdef readonly dict dropped             # datagrams: {one of DROPS: count}
    cdef readonly uint64_t kernel_dropped  # for which the kernel's queues had no room


# ── the flows of a relay ─────────────────────────────────────────────────────────────────────────

@no_gc_clear  # __dealloc__ needs the relay
cdef class Datagrams:
    """Forwards datagrams in the loop of a relay. Belongs to the relay's thread.

    A flow may be silent for `fresh_ms`, or for `established_ms` once its client has sent again
    after a reply. Flows count as connections of the relay, limit included.
    """

    cdef Flows flows_state
    cdef object relay

    def __cinit__(self, relay, long long fresh_ms=30_000, long long established_ms=180_000):
        cdef Worker *worker = <Worker *>PyCapsule_GetPointer(
            relay.main_worker(), "proxyd.relay.Worker")
        cdef int failure
        if worker.flows != NULL:
            raise ValueError("the relay has its datagrams already")
        self.relay = relay
        failure = flows_set_up(&self.flows_state, worker)
        if failure < 0:
            raise_errno(-failure)
        self.flows_state.fresh_ms = fresh_ms
        self.flows_state.established_ms = established_ms

    def __dealloc__(self):
        if self.flows_state.worker != NULL:
            flows_destroy(&self.flows_state)

    @property
    def flows(self):
        """Flows that are open now. The relay's `connections` counts them, too."""
        return self.flows_state.table.count

    @property
    def last_ms(self):
        """When a datagram last moved, on the clock of Relay.now_ms; 0: none has."""
        return self.flows_state.last_ms

    @property
    def idle_ms(self):
        """The longest time that any flow may be silent; 0: only `fresh_ms` and `established_ms`
        count."""
        return self.flows_state.idle_ms

    @idle_ms.setter
    def idle_ms(self, long long value):
        self.flows_state.idle_ms = value

    @property
    def report_flows(self):
        """Whether there is an event for the begin and the end of each flow."""
        return self.flows_state.report_flows

    @report_flows.setter
    def report_flows(self, bint value):
        self.flows_state.report_flows = value

    def limit_sources(self, int places_max):
        """Let each source (Relay.limit_sources) have at most this number of flows. One more takes
        the place of another flow of its source, if there is one to spare, or is refused. Call it
        once, before any datagram is received. Raises OSError."""
        cdef int failure = source_table_init(
            &self.flows_state.sources, places_max, self.flows_state.worker.connections_max,
            sizeof(FlowSource))
        if failure < 0:
            raise_errno(-failure)

    def totals(self):
        """The DatagramTotals of all targets, and of the listeners' queues."""
        cdef FlowTotals sums
        cdef Link *link = self.flows_state.targets.next
        memset(&sums, 0, sizeof(sums))
        while link != &self.flows_state.targets:
            totals_add(&sums, &(<FlowTarget *>link.owner).totals)
            link = link.next
        link = self.flows_state.listeners.next
        while link != &self.flows_state.listeners:
            sums.kernel_dropped += listener_dropped(<FlowListener *>link.owner)
            link = link.next
        sums.kernel_dropped += self.flows_dropped(NULL)
        return make_totals(&sums)

    cdef uint64_t flows_dropped(self, const FlowTarget *target):
        """What the queues of open flows had no room for; NULL: towards any target."""
        cdef uint64_t dropped = 0
        cdef Link *link = self.flows_state.members.next
        while link != &self.flows_state.members:
            if target == NULL or (<Flow *>link.owner).listener.target == target:
                dropped += socket_dropped((<Flow *>link.owner).fd)
            link = link.next
        return dropped

    def take_events(self):
        """The events since the last call. Relay.run() has returned DatagramsChanged if there are
        some."""
        cdef FlowEvent *event
        cdef list events = []
        self.flows_state.announced = False
        while self.flows_state.events.next != &self.flows_state.events:
            event = <FlowEvent *>self.flows_state.events.next.owner
            list_remove(&event.link)
            try:
                events.append(make_event(event))
            finally:
                free(event)
        return events

    def rows(self, long long after=0, int limit=64):
        """The FlowInfo of at most `limit` flows with larger ids than `after`, in their order."""
        cdef FlowRow row
        cdef Link *link = self.flows_state.members.next
        cdef list found = []
        while link != &self.flows_state.members and len(found) < limit:
            if (<Flow *>link.owner).id > after:
                row_of_flow(&row, <Flow *>link.owner)
                found.append(flow_info(&row))
            link = link.next
        return found

    def terminate(self, long long flow):
        """End a flow; whether there is one with this id."""
        cdef Link *link = self.flows_state.members.next
        while link != &self.flows_state.members:
            if (<Flow *>link.owner).id == flow:
                flow_end(&self.flows_state, <Flow *>link.owner, FLOW_CUT)
                return True
            link = link.next
        return False

    def close_all(self):
        """End all flows; how many there were."""
        return flows_cut(&self.flows_state)


cdef class DatagramTarget:
    """Where the datagrams of some listeners go.

    In doubt at first, or down until it has an address. Without `holds`, datagrams that are refused
    are dropped.
    """

    cdef FlowTarget *state_of
    cdef Datagrams datagrams

    def __cinit__(self, Datagrams datagrams not None, int index):
        cdef FlowTarget *target = <FlowTarget *>calloc(1, sizeof(FlowTarget))
        if target == NULL:
            raise_errno(ENOMEM)
        self.state_of = target
        self.datagrams = datagrams
        target.index = index
        target.holds = True
        target.state = flow_types.TARGET_DOWN
        link_init(&target.link, target)
        list_append(&datagrams.flows_state.targets, &target.link)

    @property
    def state(self):
        """One of TARGET_STATES."""
        return TARGET_STATES[self.state_of.state]

    @property
    def holds(self):
        return self.state_of.holds

    @holds.setter
    def holds(self, bint value):
        self.state_of.holds = value

    @property
    def held(self):
        """Datagrams in hand: read, but not delivered."""
        return self.state_of.held

    @property
    def held_since_ms(self):
        """When the oldest of them was read; 0: there is none."""
        cdef int64_t since_ms = 0
        cdef Link *link = self.datagrams.flows_state.listeners.next
        cdef FlowListener *listener
        while link != &self.datagrams.flows_state.listeners:
            listener = <FlowListener *>link.owner
            if listener.target == self.state_of and held_first(listener) != NULL and (
                    since_ms == 0 or held_first(listener).since_ms < since_ms):
                since_ms = held_first(listener).since_ms
            link = link.next
        return since_ms

    def set_address(self, bytes address):
        """Where datagrams go from now on, as a packed address; None: it is not known. Flows follow
        when they next send."""
        cdef Name name
        memset(&name, 0, sizeof(name))
        if address is not None:
            if not 2 < len(address) <= <Py_ssize_t>sizeof(name.address):
                raise ValueError("no such address")
            memcpy(&name.address, <const char *>address, len(address))
            name.size = <socklen_t>len(address)
        target_move(self.state_of, &name)

    def probe(self):
        """Have the first datagram in hand sent, if the target is down; an event tells what comes of
        it."""
        target_probe(self.state_of)

    def drop_held(self):
        """Drop what is in hand, and what its listeners have queued; how many datagrams that were.
        """
        cdef int dropped = 0
        cdef Link *link = self.datagrams.flows_state.listeners.next
        target_forget(self.state_of)
        while link != &self.datagrams.flows_state.listeners:
            if (<FlowListener *>link.owner).target == self.state_of:
                dropped += listener_drop_queue(
                    &self.datagrams.flows_state, <FlowListener *>link.owner)
            link = link.next
        return dropped

    def totals(self):
        """The DatagramTotals of this target; of the kernel's queues, only those of its flows."""
        cdef FlowTotals sums = self.state_of.totals
        sums.kernel_dropped += self.datagrams.flows_dropped(self.state_of)
        return make_totals(&sums)


@no_gc_clear  # __dealloc__ needs the datagrams
cdef class DatagramListener:
    """A socket whose datagrams are forwarded. The fd stays the caller's, and must be non-blocking.

    `index` is what events call this listener. `guarded`: it is in our network namespace, so that a
    sender with the address of one of our flows is that flow. `proxy`: a PROXY v2 header precedes
    each datagram.
    """

    cdef FlowListener *state_of
    cdef Datagrams datagrams

    def __cinit__(self, Datagrams datagrams not None, int fd, DatagramTarget target not None,
                  int index, bint guarded=False, bint proxy=False):
        cdef FlowListener *listener = <FlowListener *>calloc(1, sizeof(FlowListener))
        cdef int failure
        if listener == NULL:
            raise_errno(ENOMEM)
        failure = listener_init(&datagrams.flows_state, listener, fd)
        if failure < 0:
            free(listener)
            raise_errno(-failure)
        self.state_of = listener
        self.datagrams = datagrams
        listener.target = target.state_of
        listener.index = index
        listener.guarded = guarded
        listener.proxy = proxy
        list_append(&datagrams.flows_state.listeners, &listener.link)

    def __dealloc__(self):
        if self.state_of != NULL and self.datagrams is not None:
            listener_stop(&self.datagrams.flows_state, self.state_of)

    @property
    def kernel_dropped(self):
        """Datagrams for which its queue had no room, since this object was made."""
        return listener_dropped(self.state_of)

    def start(self):
        """Begin to read. Raises OSError. The object must live until stop() was called."""
        cdef int failure = listener_start(&self.datagrams.flows_state, self.state_of)
        if failure < 0:
            raise_errno(-failure)

    def stop(self):
        """Read no more: what comes stays in the queue, and what is in hand stays there."""
        listener_stop(&self.datagrams.flows_state, self.state_of)

    def finish(self):
        """Stop, and switch off what would outlive the program: for others, a datagram is to be one.
        """
        self.stop()
        listener_set_options(self.state_of, 0)


# ── conversions ──────────────────────────────────────────────────────────────────────────────────

cdef object make_event(const FlowEvent *event):
    if event.kind == TELL_DOWN:
        return TargetDown(event.index, event.value)
    if event.kind == TELL_UP:
        return TargetUp(event.index)
    if event.kind == TELL_HOLDS:
        return TargetHolds(event.index)
    if event.kind == TELL_LIMIT or event.kind == TELL_SOURCE:
        return FlowsRefused(
            event.index, event.count, name_bytes(&event.peer), event.kind == TELL_SOURCE)
    if event.kind == TELL_LOOP:
        return LoopFound(event.index, event.count, name_bytes(&event.peer))
    if event.kind == TELL_LISTENER_FAILED:
        return ListenerFailed(event.index, event.value)
    if event.kind == TELL_BEGUN:
        return FlowBegun(flow_info(&event.row))
    if event.kind == TELL_ENDED:
        return FlowEnded(flow_info(&event.row), FLOW_ENDINGS[event.value])
    return FlowFailed(event.index, event.value, event.count)


cdef FlowInfo flow_info(const FlowRow *row):
    return FlowInfo(
        row.id, row.listener, row.target, name_bytes(&row.client),
        local_bytes(&row.local, row.family, row.port), name_bytes(&row.address),
        name_bytes(&row.own), row.opened_ms, row.active_ms, row.established, row.answered,
        row.datagrams[TO_TARGET], row.datagrams[TO_CLIENT], row.bytes[TO_TARGET],
        row.bytes[TO_CLIENT], row.kernel_dropped)


cdef bytes name_bytes(const Name *name):
    return (<const char *>&name.address)[:name.size]


cdef bytes local_bytes(const LocalAddress *local, int family, uint16_t port):
    """As a packed address; b"" if it is not known."""
    cdef sockaddr_storage address
    cdef sockaddr_in *v4 = <sockaddr_in *>&address
    cdef sockaddr_in6 *v6 = <sockaddr_in6 *>&address
    memset(&address, 0, sizeof(address))
    address.ss_family = family
    if family == AF_UNIX or local_is_unknown(local):
        return b""
    if family == AF_INET:
        v4.sin_port = port
        memcpy(&v4.sin_addr, &local.address[12], 4)
        return (<char *>&address)[:sizeof(sockaddr_in)]
    v6.sin6_port = port
    v6.sin6_scope_id = local.interface
    memcpy(&v6.sin6_addr, local.address, 16)
    return (<char *>&address)[:sizeof(sockaddr_in6)]


cdef int totals_add(FlowTotals *sums, const FlowTotals *totals) except -1:
    cdef int i
    sums.flows += totals.flows
    sums.kernel_dropped += totals.kernel_dropped
    for i in range(FLOW_ENDING_COUNT):
        sums.endings[i] += totals.endings[i]
    for i in range(2):
        sums.datagrams[i] += totals.datagrams[i]
        sums.bytes[i] += totals.bytes[i]
    for i in range(DROP_COUNT):
        sums.dropped[i] += totals.dropped[i]
    return 0


cdef DatagramTotals make_totals(const FlowTotals *counted):
    cdef DatagramTotals totals = DatagramTotals()
    totals.flows = counted.flows
    totals.endings = {FLOW_ENDINGS[i]: counted.endings[i] for i in range(FLOW_ENDING_COUNT)}
    totals.datagrams_to_targets = counted.datagrams[TO_TARGET]
    totals.datagrams_to_clients = counted.datagrams[TO_CLIENT]
    totals.bytes_to_targets = counted.bytes[TO_TARGET]
    totals.bytes_to_clients = counted.bytes[TO_CLIENT]
    totals.dropped = {DROPS[i]: counted.dropped[i] for i in range(DROP_COUNT)}
    totals.kernel_dropped = counted.kernel_dropped
    return totals


cdef uint64_t listener_dropped(const FlowListener *listener):
    """By its queue, since the start of the program."""
    return socket_dropped(listener.fd) - listener.kernel_dropped


cdef object raise_errno(int error):
    raise OSError(error, "")
