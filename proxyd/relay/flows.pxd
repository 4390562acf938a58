# Datagrams: flows between the clients of datagram listeners and their targets. An extension of its
# own, proxyd._datagram, which hangs itself into the loop of the main worker (FlowHooks).
#
# What belongs together: a target (flow_target.pxd) is where the datagrams of some listeners
# (flow_listener.pxd) go. Each client of a listener has a flow (flow.pxd), with a socket of its own
# that is connected to the target. One turn:
#
#   replies are read from the flows that are ready, and sent to their clients  (flow_replies.pxd)
#   a batch is read from each listener that is ready, and sent over the flows  (flow_listener.pxd,
#                                                                               flow_send.pxd)
#   flows that were silent for too long are closed                             (flow.pxd)
#
# Everything is registered once. Listeners are edge-triggered: one that must not be read is simply
# left alone, and its queue in the kernel is where datagrams wait. Flows are always read, and
# level-triggered.

from proxyd.relay.clock cimport earlier
from proxyd.relay.flow cimport (
    flow_end, flow_expires_ms, flows_expire, flows_first, flows_free_dead,
    worker_make_room_for_client,
)
from proxyd.relay.flow_batch cimport inbox_init, outbox_init
from proxyd.relay.flow_held cimport held_drop_all, held_first
from proxyd.relay.flow_listener cimport listener_can_go_on, listener_stop, listener_turn
from proxyd.relay.flow_replies cimport flow_event, replies_send
from proxyd.relay.flow_spare cimport flows_close_spares
from proxyd.relay.flow_table cimport flow_table_free, flow_table_init
from proxyd.relay.flow_target cimport target_tell_again, target_was_silent
from proxyd.relay.flow_tell cimport (
    flows_announce, flows_forget_events, flows_owe_news, listener_notices_ms, listener_tell_notices,
)
from proxyd.relay.flow_types cimport (
    BUFFERS, BUFFER_STRIDE, DROP_DOWN, FLOW_CLASSES, FLOW_CUT, Flow, FlowListener, FlowTarget,
    Flows, RightsDropper,
)
from proxyd.relay.list cimport link_init, list_empty, list_remove
from proxyd.relay.source cimport source_table_destroy
from proxyd.relay.sys cimport ENOMEM, atomic_get, calloc, free, int64_t, malloc, uint32_t
from proxyd.relay.types cimport KIND_FLOW, Link, Watch, Worker

cdef enum:
    MEMORY_MS = 10             # after which there may be memory again


# ── set-up ────────────────────────────────────────────────────────────────────────────────────────

cdef inline int flows_set_up(Flows *flows, Worker *worker) noexcept nogil:
    """0 or -errno; flows_destroy() is due in either case. The memory is all zero."""
    cdef int flow_class
    cdef int failure
    flows.worker = worker
    link_init(&flows.targets, NULL)
    link_init(&flows.listeners, NULL)
    link_init(&flows.members, NULL)
    link_init(&flows.spares, NULL)
    link_init(&flows.dead, NULL)
    link_init(&flows.events, NULL)
    for flow_class in range(FLOW_CLASSES):
        link_init(&flows.classes[flow_class], NULL)
    inbox_init(&flows.inbox)
    outbox_init(&flows.outbox)
    flows.dropper = <RightsDropper *>calloc(1, sizeof(RightsDropper))
    if flows.dropper == NULL:
        return -ENOMEM
    flows.inbox.buffers = <char *>malloc(<size_t>BUFFERS * BUFFER_STRIDE)
    if flows.inbox.buffers == NULL:
        return -ENOMEM
    failure = flow_table_init(&flows.table)
    if failure < 0:
        return failure
    flows.hooks.event = worker_flow_event
    flows.hooks.turn = worker_flows_turn
    flows.hooks.next_ms = worker_flows_next_ms
    flows.hooks.make_room = worker_make_room_for_client
    worker.flows = &flows.hooks
    return 0


# ── the hooks ─────────────────────────────────────────────────────────────────────────────────────

cdef inline void worker_flow_event(Worker *worker, void *place, uint32_t events) noexcept nogil:
    """FlowHooks.event: something has happened to a flow or a listener."""
    if (<Watch *>place).kind == KIND_FLOW:
        flow_event(<Flows *>worker.flows, <Flow *>place, events)
    else:
        (<FlowListener *>place).readable = True


cdef inline void worker_flows_turn(Worker *worker) noexcept nogil:
    """FlowHooks.turn. No listener is read while there are events for the policy, which may mean
    that none is to be read any more."""
    cdef Flows *flows = <Flows *>worker.flows
    cdef Link *link
    replies_send(flows)
    targets_look_at_time(flows)
    if worker.policy_event_count == 0:
        link = flows.listeners.next
        while link != &flows.listeners:
            listener_turn(flows, <FlowListener *>link.owner)
            link = link.next
    flows_expire(flows)
    flows_close_spares(flows)
    flows_tell_notices(flows)
    flows_free_dead(flows)
    flows_announce(flows)


cdef inline void targets_look_at_time(Flows *flows) noexcept nogil:
    cdef Link *link = flows.targets.next
    while link != &flows.targets:
        target_was_silent(flows, <FlowTarget *>link.owner)
        target_tell_again(flows, <FlowTarget *>link.owner)
        link = link.next


cdef inline void flows_tell_notices(Flows *flows) noexcept nogil:
    cdef Link *link = flows.listeners.next
    while link != &flows.listeners:
        listener_tell_notices(flows, <FlowListener *>link.owner)
        link = link.next


cdef inline int64_t worker_flows_next_ms(Worker *worker) noexcept nogil:
    """FlowHooks.next_ms."""
    cdef Flows *flows = <Flows *>worker.flows
    cdef int64_t until = -1
    cdef int64_t notices_ms
    cdef Link *link = flows.listeners.next
    cdef FlowListener *listener
    cdef Flow *flow
    cdef int flow_class
    if flows_owe_news(flows):
        return 0
    while link != &flows.listeners:
        listener = <FlowListener *>link.owner
        if listener_can_go_on(listener):
            if listener.rights_ms == 0 or held_first(listener) != NULL:
                return 0
            until = earlier(until, listener.rights_ms)
        notices_ms = listener_notices_ms(listener)
        if notices_ms >= 0:
            until = earlier(until, notices_ms)
        link = link.next
    link = flows.targets.next
    while link != &flows.targets:
        if (<FlowTarget *>link.owner).judged != NULL:
            until = earlier(until, (<FlowTarget *>link.owner).verdict_ms)
        if (<FlowTarget *>link.owner).untold:
            until = earlier(until, flows.worker.ctx.now_ms + MEMORY_MS)
        link = link.next
    for flow_class in range(FLOW_CLASSES):
        flow = flows_first(&flows.classes[flow_class])
        if flow != NULL:
            until = earlier(until, flow_expires_ms(flows, flow))
    return until


# ── end ───────────────────────────────────────────────────────────────────────────────────────────

cdef inline void flows_destroy(Flows *flows) noexcept nogil:
    """Free all that it owns. The loop does not know it any more."""
    cdef Link *link
    flows_cut(flows)
    while not list_empty(&flows.listeners):
        link = flows.listeners.next
        listener_stop(flows, <FlowListener *>link.owner)
        held_drop_all(<FlowListener *>link.owner, DROP_DOWN)
        list_remove(link)
        free(link.owner)
    while not list_empty(&flows.targets):
        link = flows.targets.next
        list_remove(link)
        free(link.owner)
    flows_forget_events(flows)
    flow_table_free(&flows.table)
    source_table_destroy(&flows.sources)
    free(flows.inbox.buffers)
    if flows.dropper != NULL and atomic_get(&flows.dropper.busy) == 0:
        free(flows.dropper)
    if flows.worker.flows == &flows.hooks:
        flows.worker.flows = NULL


cdef inline int flows_cut(Flows *flows) noexcept nogil:
    """Close every flow; how many these were."""
    cdef int count = 0
    while not list_empty(&flows.members):
        flow_end(flows, <Flow *>flows.members.next.owner, FLOW_CUT)
        count += 1
    flows_close_spares(flows)
    flows_free_dead(flows)
    return count
