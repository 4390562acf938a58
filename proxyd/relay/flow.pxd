# A flow: the datagrams of one client, and a socket of its own that is connected to the target.
#
# The kernel gives such a socket only what comes from the target, and reports ICMP errors to it. It
# lives until it was silent for too long, or another flow needs its place; no error ends it. There
# are three classes of flows, each a list of which the one that was silent for the longest comes
# first: so finding out which ones have expired, and which one to evict, takes no search.

from proxyd.relay.bookkeeping cimport connection_limit, connections_decrement
from proxyd.relay.connect cimport worker_new_id
from proxyd.relay.flow_address cimport (
    flow_make_header, local_is_unknown, name_ip, name_is_taken, name_make_definite, name_port,
    name_unmap,
)
from proxyd.relay.flow_socket cimport flow_open
from proxyd.relay.flow_spare cimport flow_become_spare, flow_close, flow_take_spare
from proxyd.relay.flow_table cimport (
    flow_table_add, flow_table_evicted_own, flow_table_find_own, flow_table_keep_evicted,
    flow_table_remove,
)
from proxyd.relay.flow_tell cimport flow_tell, listener_notice, socket_dropped
from proxyd.relay.flow_types cimport (
    DROP_COUNT, DROP_LIMIT, DROP_LOOP, DROP_NO_SOCKET, DROP_SOURCE, FLOW_ANSWERED, FLOW_CLASSES,
    FLOW_ESTABLISHED, FLOW_EVICTED, FLOW_EXPIRED, FLOW_UNANSWERED, NOTICE_LIMIT, NOTICE_LOOP,
    NOTICE_NO_SOCKET, NOTICE_SOURCE, TELL_BEGUN, TELL_ENDED, Flow, FlowListener, FlowSource,
    FlowTarget, Flows, LocalAddress, Name,
)
from proxyd.relay.gauges cimport gauges_add_connection, gauges_places
from proxyd.relay.list cimport link_init, list_append, list_empty, list_remove
from proxyd.relay.records cimport SOURCE_WORDS, Binding, Source
from proxyd.relay.source cimport source_enter, source_leave, source_of_address
from proxyd.relay.sys cimport (
    AF_UNIX, ENOMEM, EUSERS, free, int64_t, malloc, memcmp, memset, uint32_t, uint64_t, uint8_t,
)
from proxyd.relay.types cimport KIND_FLOW, Link, Worker

cdef enum:
    GUARDED_MS = 30000         # established flows that were silent for less are not evicted


# ── begin ────────────────────────────────────────────────────────────────────────────────────────

cdef inline Flow *flow_begin(
    Flows *flows, FlowListener *listener, const Name *peer, const LocalAddress *local,
    uint32_t hash, uint64_t count, int *error
) noexcept nogil:
    """A flow for a new client; NULL, and the errno with which the target cannot be reached; or
    NULL and 0, when its `count` datagrams are to be dropped, which is counted."""
    cdef FlowSource *source = NULL
    cdef Flow *flow
    cdef bint ours = True
    cdef int refusal = flow_refusal(flows, listener, peer, local, &source)
    error[0] = 0
    if refusal != DROP_COUNT:
        flow_refuse(listener, peer, count, refusal)
        return NULL
    flow = flow_new(flows, listener, peer, local)
    if flow != NULL:
        flow.hash = hash
        flow.source = source
        error[0] = -flow_open(flows, flow, &ours)
    if flow != NULL and error[0] == 0:
        flow_enter(flows, flow)
        return flow
    source_leave(<Source *>source)
    if flow == NULL or ours:
        listener.target.totals.dropped[DROP_NO_SOCKET] += count
        listener_notice(
            listener, NOTICE_NO_SOCKET, count, ENOMEM if flow == NULL else error[0], peer)
        error[0] = 0
    free(flow)
    return NULL


cdef inline int flow_refusal(
    Flows *flows, const FlowListener *listener, const Name *peer, const LocalAddress *local,
    FlowSource **source
) noexcept nogil:
    """Why a client may not have a flow, DROP_*; DROP_COUNT: it may, and has a place of its source
    now."""
    if flow_comes_back(flows, listener, peer, local):
        return DROP_LOOP
    if flows.sources.buckets != NULL and not flow_enter_source(flows, peer, source):
        return DROP_SOURCE
    if gauges_places(flows.worker.gauges) >= connection_limit(flows.worker) and (
            not flows_make_room(flows, flows.classes)):
        source_leave(<Source *>source[0])
        return DROP_LIMIT
    return DROP_COUNT


cdef inline void flow_refuse(
    FlowListener *listener, const Name *peer, uint64_t count, int why
) noexcept nogil:
    cdef int notice = NOTICE_LIMIT
    if why == DROP_LOOP:
        notice = NOTICE_LOOP
    elif why == DROP_SOURCE:
        notice = NOTICE_SOURCE
    listener.target.totals.dropped[why] += count
    listener_notice(listener, notice, count, 0, peer)


cdef inline bint flow_enter_source(
    Flows *flows, const Name *peer, FlowSource **entered
) noexcept nogil:
    """Give a new flow a place of its source, that of another flow of it perhaps; False: there is
    none to spare. NULL: its source is not known, or there is no memory for it.

    Flows have places of their own: whoever forges the address of a client cannot use up those of
    its connections."""
    cdef uint32_t key[SOURCE_WORDS]
    cdef Source *source = NULL
    cdef int failure, flow_class
    if not source_of_address(&peer.address, key):
        return True
    failure = source_enter(&flows.sources, key, &source)
    if failure == -EUSERS and flows_make_room(flows, (<FlowSource *>source).classes):
        failure = source_enter(&flows.sources, key, &source)
    if failure == 0:
        entered[0] = <FlowSource *>source
        if source.places == 1:
            for flow_class in range(FLOW_CLASSES):
                link_init(&entered[0].classes[flow_class], NULL)
    return failure != -EUSERS


cdef inline bint flow_comes_back(
    const Flows *flows, const FlowListener *listener, const Name *peer, const LocalAddress *local
) noexcept nogil:
    """Whether the client is one of our own flows, which is proven by its address; or was one until
    it was evicted, or else a loop of more datagrams than flows would never end.

    If a flow has the address of its client, that client may have the same port: then the datagram
    must also have come in where the flow leads."""
    cdef const Binding *binding = flows.worker.ctx.binding
    cdef const Flow *flow
    cdef Name name
    if not listener.guarded:
        return False
    name_unmap(&name, peer)
    flow = flow_table_find_own(&flows.table, &name)
    if flow != NULL:
        return not flow.transparent or (
            listener_is_at(listener, local, &flow.listener.target.address))
    return flow_table_evicted_own(&flows.table, &name, flows.worker.ctx.now_ms) and (
        not name_is_taken(&name, binding != NULL and binding.client))


cdef inline bint listener_is_at(
    const FlowListener *listener, const LocalAddress *local, const Name *place
) noexcept nogil:
    """Whether a datagram that has come to `local` was sent to `place`."""
    cdef Name name = place[0]
    cdef uint8_t there[16]
    cdef uint8_t here[16]
    name_make_definite(&name)
    if name_port(&name) != name_port(&listener.name):
        return False
    name_ip(&name, there)
    if not listener.any_address:
        name_ip(&listener.name, here)
        return memcmp(there, here, 16) == 0
    return local_is_unknown(local) or memcmp(there, local.address, 16) == 0


cdef inline Flow *flow_new(
    Flows *flows, FlowListener *listener, const Name *peer, const LocalAddress *local
) noexcept nogil:
    """A flow that is nowhere yet, perhaps with a spare one's socket; NULL: no memory."""
    cdef Flow *flow = flow_take_spare(flows, listener.target.address.address.ss_family)
    cdef int fd = -1
    if flow == NULL:
        flow = <Flow *>malloc(sizeof(Flow))
    else:
        fd = flow.fd
    if flow == NULL:
        return NULL
    memset(flow, 0, sizeof(Flow))
    flow.kind = KIND_FLOW
    flow.fd = fd
    flow.listener = listener
    flow.peer = peer[0]
    flow.local = local[0]
    flow.gso_limit = 0 if listener.family == AF_UNIX else <uint32_t>-1
    flow.opened_ms = flow.active_ms = flows.worker.ctx.now_ms
    flow.flow_class = FLOW_UNANSWERED
    link_init(&flow.silent, flow)
    link_init(&flow.of_source, flow)
    link_init(&flow.member, flow)
    if listener.proxy:
        flow_make_header(flow)
    return flow


cdef inline void flow_enter(Flows *flows, Flow *flow) noexcept nogil:
    """It exists from now on."""
    flow.id = worker_new_id(flows.worker)
    flow_table_add(&flows.table, flow)
    flow_set_class(flows, flow, flow.flow_class)
    list_append(&flows.members, &flow.member)
    gauges_add_connection(flows.worker.gauges)
    flow.listener.target.totals.flows += 1
    flow_tell(flows, flow, TELL_BEGUN, 0)


# ── while it lives ───────────────────────────────────────────────────────────────────────────────

cdef inline void flow_heard_client(Flows *flows, Flow *flow) noexcept nogil:
    if flow.answered and flow.flow_class != FLOW_ESTABLISHED:
        flow_set_class(flows, flow, FLOW_ESTABLISHED)
    flow.asked = 1
    flow_touch(flows, flow)


cdef inline void flow_heard_target(Flows *flows, Flow *flow) noexcept nogil:
    flow.failed = flow.asked = 0
    if not flow.answered:
        flow.answered = 1
        flow_set_class(flows, flow, FLOW_ANSWERED)
    flow_touch(flows, flow)


cdef inline void flow_touch(Flows *flows, Flow *flow) noexcept nogil:
    """A datagram has moved."""
    flows.last_ms = flows.worker.ctx.now_ms
    if flow.active_ms == flows.last_ms:
        return
    flow.active_ms = flows.last_ms
    flow_set_class(flows, flow, flow.flow_class)


cdef inline void flow_set_class(Flows *flows, Flow *flow, int flow_class) noexcept nogil:
    """It is the last of its class."""
    flow.flow_class = flow_class
    list_remove(&flow.silent)
    list_append(&flows.classes[flow_class], &flow.silent)
    if flow.source != NULL:
        list_remove(&flow.of_source)
        list_append(&flow.source.classes[flow_class], &flow.of_source)


cdef inline void flow_count(
    Flow *flow, int direction, uint64_t datagrams, uint64_t size
) noexcept nogil:
    """Datagrams that were delivered."""
    flow.datagrams[direction] += datagrams
    flow.bytes[direction] += size
    flow.listener.target.totals.datagrams[direction] += datagrams
    flow.listener.target.totals.bytes[direction] += size


# ── end ──────────────────────────────────────────────────────────────────────────────────────────

cdef inline bint worker_make_room_for_client(Worker *worker) noexcept nogil:
    """FlowHooks.make_room."""
    cdef Flows *flows = <Flows *>worker.flows
    return flows_make_room(flows, flows.classes)


cdef inline bint flows_make_room(Flows *flows, const Link *classes) noexcept nogil:
    """Evict the flow of these that is missed least, if there is one to spare."""
    cdef Flow *flow = flows_first(&classes[FLOW_ANSWERED])
    if flow == NULL:
        flow = flows_first(&classes[FLOW_UNANSWERED])
    if flow == NULL:
        flow = flows_first(&classes[FLOW_ESTABLISHED])
        if flow == NULL or flows.worker.ctx.now_ms - flow.active_ms <= GUARDED_MS:
            return False
    flow_table_keep_evicted(&flows.table, flow, flows.worker.ctx.now_ms)
    flow_end(flows, flow, FLOW_EVICTED)
    return True


cdef inline void flows_expire(Flows *flows) noexcept nogil:
    """End those that were silent for too long."""
    cdef Flow *flow
    cdef int flow_class
    for flow_class in range(FLOW_ESTABLISHED + 1):
        flow = flows_first(&flows.classes[flow_class])
        while flow != NULL and flow_expires_ms(flows, flow) <= flows.worker.ctx.now_ms:
            flow_end(flows, flow, FLOW_EXPIRED)
            flow = flows_first(&flows.classes[flow_class])


cdef inline int64_t flow_expires_ms(const Flows *flows, const Flow *flow) noexcept nogil:
    cdef int64_t idle_ms = flows.fresh_ms
    if flow.flow_class == FLOW_ESTABLISHED:
        idle_ms = flows.established_ms
    if flows.idle_ms > 0:
        idle_ms = min(idle_ms, flows.idle_ms)
    return flow.active_ms + idle_ms


cdef inline Flow *flows_first(const Link *flow_class) noexcept nogil:
    """The one of a class that was silent for the longest; NULL: there is none."""
    return NULL if list_empty(flow_class) else <Flow *>flow_class.next.owner


cdef inline void flow_end(Flows *flows, Flow *flow, int ending) noexcept nogil:
    """Close it, or keep its socket. It is freed after the batch of events, of which a later one may
    still name it."""
    cdef FlowTarget *target = flow.listener.target
    flow_tell(flows, flow, TELL_ENDED, ending)
    target.totals.endings[ending] += 1
    if flow.gro:               # otherwise replies were few, and the queue was never full
        target.totals.kernel_dropped += socket_dropped(flow.fd)
    if flow.listener.blocked == flow:
        flow.listener.blocked = NULL
    if target.judged_flow == flow:
        target.judged_flow = NULL
    flow_table_remove(&flows.table, flow)
    list_remove(&flow.silent)
    list_remove(&flow.of_source)
    source_leave(<Source *>flow.source)
    list_remove(&flow.member)
    connections_decrement(flows.worker)
    if not flow_become_spare(flows, flow):
        flow_close(flows, flow)


cdef inline void flows_free_dead(Flows *flows) noexcept nogil:
    cdef Flow *flow
    while not list_empty(&flows.dead):
        flow = <Flow *>flows.dead.next.owner
        list_remove(&flow.member)
        free(flow)
