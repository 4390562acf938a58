# Sockets of flows that have ended, for new ones.
#
# Half of what a new flow costs is what the kernel does to make a socket, to have epoll watch it,
# and to close it in the end; so a few are kept. A spare socket is disconnected, which gives its
# port back: the next flow has another one. What has come for the flow that has ended is thrown away
# between the new one's connect(2) and its first send, when nothing can have come for that.
#
# Only IP sockets without options of their own are kept. Together with connections and flows they
# are never more than the limit, since the limit of open files may allow no more.

from proxyd.relay.bookkeeping cimport connection_limit
from proxyd.relay.flow_types cimport Flow, Flows
from proxyd.relay.gauges cimport gauges_places
from proxyd.relay.list cimport list_append, list_empty, list_remove
from proxyd.relay.sys cimport (
    AF_UNIX, AF_UNSPEC, EAGAIN, MSG_DONTWAIT, close, connect, errno, int64_t, recv, sa_family_t,
    sockaddr,
)

cdef enum:
    SPARES_MAX = 64
    SPARE_MS = 1000            # nothing is spare for longer, while something moves
    DRAIN_MAX = 1024           # datagrams that are thrown away before a socket is given up


cdef inline bint flow_become_spare(Flows *flows, Flow *flow) noexcept nogil:
    """Keep the socket of a flow that has ended; False: close it."""
    cdef sockaddr nowhere
    if flow.own.address.ss_family == AF_UNIX or flow.gro or flow.wants_room or (
            not flow.verdict_at_once):
        return False
    if flows.spare_count >= SPARES_MAX or flows_places_left(flows) <= 0:
        return False
    nowhere.sa_family = AF_UNSPEC
    if connect(flow.fd, &nowhere, sizeof(nowhere)) < 0:
        return False
    flow.listener = NULL
    flow.active_ms = flows.worker.ctx.now_ms
    list_append(&flows.spares, &flow.member)
    flows.spare_count += 1
    return True


cdef inline Flow *flow_take_spare(Flows *flows, sa_family_t family) noexcept nogil:
    """The one that has been spare for the longest; NULL: there is none, or not of this family."""
    cdef Flow *flow
    if list_empty(&flows.spares):
        return NULL
    flow = <Flow *>flows.spares.next.owner
    list_remove(&flow.member)
    flows.spare_count -= 1
    if flow.own.address.ss_family == family:
        return flow
    flow_close(flows, flow)
    return NULL


cdef inline void flows_close_spares(Flows *flows) noexcept nogil:
    """Close those that no new flow needs, it seems, or that must make room; and all of them when
    there is no flow."""
    cdef Flow *flow
    while not list_empty(&flows.spares):
        flow = <Flow *>flows.spares.next.owner
        if flows.table.count > 0 and flows_places_left(flows) >= 0 and (
                flows.worker.ctx.now_ms - flow.active_ms < SPARE_MS):
            return
        list_remove(&flow.member)
        flows.spare_count -= 1
        flow_close(flows, flow)


cdef inline int64_t flows_places_left(const Flows *flows) noexcept nogil:
    """How many more connections, flows and spare ones the limit allows."""
    return <int64_t>connection_limit(flows.worker) - gauges_places(flows.worker.gauges) - (
        flows.spare_count)


cdef inline bint flow_drain(Flow *flow) noexcept nogil:
    """Throw away what has come for its socket; whether nothing is left."""
    cdef char byte
    cdef int _i
    for _i in range(DRAIN_MAX):
        if recv(flow.fd, &byte, 1, MSG_DONTWAIT) < 0 and errno == EAGAIN:
            return True
    return False


cdef inline void flow_close(Flows *flows, Flow *flow) noexcept nogil:
    """It is in no list."""
    close(flow.fd)
    flow.fd = -1
    list_append(&flows.dead, &flow.member)
