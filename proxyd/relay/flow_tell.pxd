# What the policy is told of datagrams: events that are rare, and rows of flows for those who ask.

from proxyd.relay.bookkeeping cimport policy_event_add
from proxyd.relay.flow_address cimport name_port
from proxyd.relay.flow_types cimport (
    FLOW_ESTABLISHED, NOTICE_COUNT, TELL_LIMIT, Flow, FlowEvent, FlowListener, FlowRow, FlowTarget,
    Flows, Name, Notice,
)
from proxyd.relay.list cimport link_init, list_append, list_empty, list_remove
from proxyd.relay.sys cimport (
    MEMINFO_DROPS, MEMINFO_SIZE, SOL_SOCKET, SO_MEMINFO, calloc, free, getpeername, getsockopt,
    int64_t, sockaddr, socklen_t, uint32_t, uint64_t,
)
from proxyd.relay.types cimport EVENT_DATAGRAMS_CHANGED

cdef enum:
    NOTICE_MS = 1000           # a listener's notices of one kind are not closer than this
    MEMINFO_ROOM = 16          # numbers; the kernel may know more of them than we do


# ── notices ──────────────────────────────────────────────────────────────────────────────────────

cdef inline void listener_notice(
    FlowListener *listener, int kind, uint64_t count, int error, const Name *peer
) noexcept nogil:
    """Note something of which there may be a flood: it is told once a second."""
    cdef Notice *notice = &listener.notices[kind]
    notice.count += count
    notice.error = error
    notice.peer = peer[0]


cdef inline void listener_tell_notices(Flows *flows, FlowListener *listener) noexcept nogil:
    """Tell those that are due."""
    cdef Notice *notice
    cdef FlowEvent *event
    cdef int kind
    for kind in range(NOTICE_COUNT):
        notice = &listener.notices[kind]
        if notice.count == 0 or not notice_is_due(notice, flows.worker.ctx.now_ms):
            continue
        event = flows_tell(flows, TELL_LIMIT + kind, listener.index, notice.error)
        if event != NULL:
            event.count = notice.count
            event.peer = notice.peer
            notice.count = 0
        notice.told_ms = flows.worker.ctx.now_ms


cdef inline bint notice_is_due(const Notice *notice, int64_t now_ms) noexcept nogil:
    return notice.told_ms == 0 or now_ms >= notice.told_ms + NOTICE_MS


cdef inline int64_t listener_notices_ms(const FlowListener *listener) noexcept nogil:
    """When the next one is due; -1: there is none."""
    cdef int64_t until = -1
    cdef int kind
    for kind in range(NOTICE_COUNT):
        if listener.notices[kind].count > 0 and (
                until < 0 or listener.notices[kind].told_ms + NOTICE_MS < until):
            until = listener.notices[kind].told_ms + NOTICE_MS
    return until


# ── events ───────────────────────────────────────────────────────────────────────────────────────

cdef inline void flow_tell(Flows *flows, const Flow *flow, int kind, int value) noexcept nogil:
    """That it has begun, or how it ended."""
    cdef FlowEvent *event
    if not flows.report_flows:
        return
    event = flows_tell(flows, kind, 0, value)
    if event != NULL:
        row_of_flow(&event.row, flow)


cdef inline FlowEvent *flows_tell(Flows *flows, int kind, int index, int value) noexcept nogil:
    """An event for the policy; NULL: no memory, and then it is lost."""
    cdef FlowEvent *event = <FlowEvent *>calloc(1, sizeof(FlowEvent))
    if event == NULL:
        return NULL
    link_init(&event.link, event)
    event.kind = kind
    event.index = index
    event.value = value
    list_append(&flows.events, &event.link)
    return event


cdef inline void flows_announce(Flows *flows) noexcept nogil:
    """Have run() return if there are events."""
    if not flows_owe_news(flows):
        return
    if policy_event_add(flows.worker, EVENT_DATAGRAMS_CHANGED, -1, 0, 0) != NULL:
        flows.announced = True


cdef inline bint flows_owe_news(const Flows *flows) noexcept nogil:
    """Whether there are events that the policy does not know of. It may have made them itself, or
    there was no room to announce them."""
    return not flows.announced and not list_empty(&flows.events)


cdef inline void flows_forget_events(Flows *flows) noexcept nogil:
    cdef FlowEvent *event
    while not list_empty(&flows.events):
        event = <FlowEvent *>flows.events.next.owner
        list_remove(&event.link)
        free(event)


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────

cdef inline void row_of_flow(FlowRow *row, const Flow *flow) noexcept nogil:
    cdef FlowTarget *target = flow.listener.target
    row.id = flow.id
    row.listener = flow.listener.index
    row.target = target.index
    row.family = flow.listener.family
    row.port = name_port(&flow.listener.name)
    row.client = flow.peer
    row.local = flow.local
    row.address.size = sizeof(row.address.address)
    if getpeername(flow.fd, <sockaddr *>&row.address.address, &row.address.size) < 0:
        row.address = target.address
    row.own = flow.own
    row.opened_ms = flow.opened_ms
    row.active_ms = flow.active_ms
    row.established = flow.flow_class == FLOW_ESTABLISHED
    row.answered = flow.answered
    row.datagrams[0] = flow.datagrams[0]
    row.datagrams[1] = flow.datagrams[1]
    row.bytes[0] = flow.bytes[0]
    row.bytes[1] = flow.bytes[1]
    row.kernel_dropped = socket_dropped(flow.fd)


cdef inline uint64_t socket_dropped(int fd) noexcept nogil:
    """How many datagrams the kernel has dropped, because the socket's queue was full."""
    cdef uint32_t numbers[MEMINFO_ROOM]
    cdef socklen_t size = sizeof(numbers)
    if fd < 0 or getsockopt(fd, SOL_SOCKET, SO_MEMINFO, numbers, &size) < 0:
        return 0
    return numbers[MEMINFO_DROPS] if size >= MEMINFO_SIZE * sizeof(uint32_t) else 0
