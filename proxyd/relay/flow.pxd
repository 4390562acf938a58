# A flow: the datagrams of one client, and a socket of its own that is connected to the target.
#
# The kernel gives such a socket only what comes from the target, and reports ICMP errors to it. It
# lives until it was silent for too long, or another flow needs its place; no error ends it. There
# are three classes of flows, each a list of which the one that was silent for the longest comes
# first: so finding out which ones have expired, and which one to evict, takes no search.

from proxyd.relay.bookkeeping cimport connection_limit, connections_decrement
from proxyd.relay.connect cimport worker_new_id
from proxyd.relay.flow_address cimport (
    flow_make_header, name_is_local, name_is_taken, name_of_socket, name_unmap,
)
from proxyd.relay.flow_spare cimport flow_become_spare, flow_close, flow_drain, flow_take_spare
from proxyd.relay.flow_table cimport (
    flow_table_add, flow_table_add_own, flow_table_evicted_own, flow_table_has_own,
    flow_table_keep_evicted, flow_table_remove, flow_table_remove_own,
)
from proxyd.relay.flow_tell cimport flow_tell, listener_notice, socket_dropped
from proxyd.relay.flow_types cimport (
    DROP_LIMIT, DROP_LOOP, DROP_NO_SOCKET, FLOW_ANSWERED, FLOW_ESTABLISHED, FLOW_EVICTED,
    FLOW_EXPIRED, FLOW_UNANSWERED, NOTICE_LIMIT, NOTICE_LOOP, NOTICE_NO_SOCKET, TELL_BEGUN,
    TELL_ENDED, Flow, FlowListener, FlowTarget, Flows, LocalAddress, Name,
)
from proxyd.relay.gauges cimport gauges_add_connection, gauges_places
from proxyd.relay.list cimport link_init, list_append, list_empty, list_remove
from proxyd.relay.socket cimport socket_take_error
from proxyd.relay.sys cimport (
    AF_INET, AF_UNIX, EAGAIN, ECONNREFUSED, EMSGSIZE, ENOMEM, EPOLLIN, EPOLLOUT, EPOLL_CTL_ADD,
    EPOLL_CTL_MOD, IPPROTO_IP, IPPROTO_IPV6, IPV6_RECVERR, IP_RECVERR, MSG_DONTWAIT, MSG_ERRQUEUE,
    SOCK_CLOEXEC, SOCK_DGRAM, SOCK_NONBLOCK, SOL_SOCKET, SO_PASSRIGHTS, bind, close, connect,
    epoll_ctl, epoll_event, errno, free, int64_t, malloc, memcmp, memset, msghdr, recvmsg,
    sa_family_t, setsockopt, sockaddr, socket, uint32_t, uint64_t,
)
from proxyd.relay.types cimport KIND_FLOW, Worker

cdef enum:
    GUARDED_MS = 30000         # established flows that were silent for less are not evicted
    ERRORS_MAX = 1024          # read from one socket at a time


# ── begin ────────────────────────────────────────────────────────────────────────────────────────

cdef inline Flow *flow_begin(
    Flows *flows, FlowListener *listener, const Name *peer, const LocalAddress *local,
    uint32_t hash, uint64_t count, int *error
) noexcept nogil:
    """A flow for a new client; NULL, and the errno with which the target cannot be reached; or
    NULL and 0, when its `count` datagrams are to be dropped, which is counted."""
    cdef FlowTarget *target = listener.target
    cdef Flow *flow
    cdef bint ours = True
    error[0] = 0
    if flow_comes_back(flows, listener, peer):
        target.totals.dropped[DROP_LOOP] += count
        listener_notice(listener, NOTICE_LOOP, count, 0, peer)
        return NULL
    if gauges_places(flows.worker.gauges) >= connection_limit(flows.worker) and (
            not flows_make_room(flows)):
        target.totals.dropped[DROP_LIMIT] += count
        listener_notice(listener, NOTICE_LIMIT, count, 0, peer)
        return NULL
    flow = flow_new(flows, listener, peer, local)
    if flow != NULL:
        flow.hash = hash
        error[0] = -flow_open(flows, flow, &ours)
    if flow != NULL and error[0] == 0:
        flow_enter(flows, flow)
        return flow
    if flow == NULL or ours:
        target.totals.dropped[DROP_NO_SOCKET] += count
        listener_notice(
            listener, NOTICE_NO_SOCKET, count, ENOMEM if flow == NULL else error[0], peer)
        error[0] = 0
    free(flow)
    return NULL


cdef inline bint flow_comes_back(
    const Flows *flows, const FlowListener *listener, const Name *peer
) noexcept nogil:
    """Whether the client is one of our own flows, which is proven by its address; or was one until
    it was evicted, or else a loop of more datagrams than flows would never end."""
    cdef Name name
    if not listener.guarded:
        return False
    name_unmap(&name, peer)
    return flow_table_has_own(&flows.table, &name) or (
        flow_table_evicted_own(&flows.table, &name, flows.worker.ctx.now_ms)
        and not name_is_taken(&name))


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
    link_init(&flow.member, flow)
    if listener.proxy:
        flow_make_header(flow)
    return flow


cdef inline void flow_enter(Flows *flows, Flow *flow) noexcept nogil:
    """It exists from now on."""
    flow.id = worker_new_id(flows.worker)
    flow_table_add(&flows.table, flow)
    list_append(&flows.classes[flow.flow_class], &flow.silent)
    list_append(&flows.members, &flow.member)
    gauges_add_connection(flows.worker.gauges)
    flow.listener.target.totals.flows += 1
    flow_tell(flows, flow, TELL_BEGUN, 0)


# ── its socket ───────────────────────────────────────────────────────────────────────────────────

cdef inline int flow_reopen(Flows *flows, Flow *flow) noexcept nogil:
    """The target has another address: a new socket for a flow; 0 or -errno, and then the flow is as
    before."""
    cdef Flow before = flow[0]
    cdef bint ours
    cdef int failure
    flow_table_remove_own(&flows.table, flow)
    flow.fd = -1
    failure = flow_open(flows, flow, &ours)
    if failure < 0:
        flow.fd = before.fd
        flow.own = before.own
    else:
        flow.listener.target.totals.kernel_dropped += socket_dropped(before.fd)
        close(before.fd)
    flow_table_add_own(&flows.table, flow)
    return failure


cdef inline int flow_open(Flows *flows, Flow *flow, bint *ours) noexcept nogil:
    """Connect the socket that it has from a flow that has ended, or a new one; 0 or -errno. `ours`:
    it was not for the target that this failed."""
    cdef const FlowTarget *target = flow.listener.target
    cdef int failure = 0
    ours[0] = True
    if not flow_takes_over(flow, target):
        failure = flow_make_socket(flows, flow, target, ours)
    if failure == 0:
        flow.generation = target.generation
        flow.gro = flow.failed = 0
    return failure


cdef inline bint flow_takes_over(Flow *flow, const FlowTarget *target) noexcept nogil:
    """Connect the socket that it has; False: it has none, or none any more."""
    if flow.fd < 0:
        return False
    if flow_connect(flow, target) == 0 and flow_drain(flow):
        return True
    close(flow.fd)
    flow.fd = -1
    return False


cdef inline int flow_make_socket(
    Flows *flows, Flow *flow, const FlowTarget *target, bint *ours
) noexcept nogil:
    cdef sa_family_t family = target.address.address.ss_family
    cdef int failure
    flow.fd = socket(family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    if flow.fd < 0:
        return -errno
    if family == AF_UNIX:
        flow_name_socket(flow)
    failure = flow_connect(flow, target)
    if failure < 0:
        ours[0] = failure == -EAGAIN or failure == -ENOMEM  # EAGAIN: there is no port left
    else:
        failure = flow_watch(flows, flow, EPOLL_CTL_ADD, False)
    if failure < 0:
        close(flow.fd)
        flow.fd = -1
    return failure


cdef inline void flow_name_socket(Flow *flow) noexcept nogil:
    """Have the kernel name a UNIX socket, or no reply would come; and refuse descriptors, whose
    close(2) may wait (rights.pxd). Where these fail there are no replies, or descriptors are
    dropped."""
    cdef sa_family_t nameless = AF_UNIX
    cdef int off = 0
    bind(flow.fd, <sockaddr *>&nameless, sizeof(nameless))
    setsockopt(flow.fd, SOL_SOCKET, SO_PASSRIGHTS, &off, sizeof(off))


cdef inline int flow_connect(Flow *flow, const FlowTarget *target) noexcept nogil:
    """Connect the socket, once more perhaps; 0 or -errno."""
    cdef const Name *address = &target.address
    if connect(flow.fd, <const sockaddr *>&address.address, address.size) < 0:
        return -errno
    name_of_socket(flow.fd, &flow.own)
    if flow.own.size == address.size and (
            memcmp(&flow.own.address, &address.address, address.size) == 0):
        return -ECONNREFUSED   # to itself, by chance: nobody else has that port
    flow.verdict_at_once = name_is_local(address, &flow.own)
    if not flow.verdict_at_once:
        flow_want_errors(flow, address)
    return 0


cdef inline void flow_want_errors(Flow *flow, const Name *address) noexcept nogil:
    """Be told, too, that the way to another host has failed."""
    cdef int on = 1
    if address.address.ss_family == AF_INET:
        setsockopt(flow.fd, IPPROTO_IP, IP_RECVERR, &on, sizeof(on))
    else:
        setsockopt(flow.fd, IPPROTO_IPV6, IPV6_RECVERR, &on, sizeof(on))


cdef inline int flow_wait_for_room(Flows *flows, Flow *flow) noexcept nogil:
    """Its listener is not read until the flow can send again; 0, or -errno if that would never be
    announced."""
    cdef int failure = flow_watch(flows, flow, EPOLL_CTL_MOD, True)
    if failure == 0:
        flow.listener.blocked = flow
    return failure


cdef inline void flow_has_room(Flows *flows, Flow *flow) noexcept nogil:
    if not flow.wants_room:
        return
    flow_watch(flows, flow, EPOLL_CTL_MOD, False)  # if that fails, it is announced and tried again
    if flow.listener.blocked == flow:
        flow.listener.blocked = NULL


cdef inline int flow_watch(Flows *flows, Flow *flow, int operation, bint for_room) noexcept nogil:
    """Have epoll announce replies and errors, and with `for_room` when a send may succeed; 0 or
    -errno.

    It announces them until they were read, so that none has to be asked for in vain."""
    cdef epoll_event event
    event.events = EPOLLIN
    if for_room:
        event.events |= EPOLLOUT
    event.data.ptr = flow
    if epoll_ctl(flows.worker.ctx.epoll, operation, flow.fd, &event) < 0:
        return -errno
    flow.wants_room = for_room
    return 0


cdef inline int flow_take_error(Flow *flow) noexcept nogil:
    """The error that has come for it, which is cleared; 0: none that says anything of the target.
    """
    cdef int error = socket_take_error(flow.fd)
    cdef msghdr message
    cdef int count = 0
    memset(&message, 0, sizeof(message))
    while not flow.verdict_at_once and count < ERRORS_MAX and (
            recvmsg(flow.fd, &message, MSG_ERRQUEUE | MSG_DONTWAIT) >= 0):
        count += 1             # each of them is announced until it was read
    if count > 0:
        socket_take_error(flow.fd)  # reading one puts the next one's errno there
    return 0 if error == EMSGSIZE else error  # the path is too narrow: the kernel fragments


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
    return flows_make_room(<Flows *>worker.flows)


cdef inline bint flows_make_room(Flows *flows) noexcept nogil:
    """Evict the flow that is missed least, if there is one to spare."""
    cdef Flow *flow = flows_first(flows, FLOW_ANSWERED)
    if flow == NULL:
        flow = flows_first(flows, FLOW_UNANSWERED)
    if flow == NULL:
        flow = flows_first(flows, FLOW_ESTABLISHED)
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
        flow = flows_first(flows, flow_class)
        while flow != NULL and flow_expires_ms(flows, flow) <= flows.worker.ctx.now_ms:
            flow_end(flows, flow, FLOW_EXPIRED)
            flow = flows_first(flows, flow_class)


cdef inline int64_t flow_expires_ms(const Flows *flows, const Flow *flow) noexcept nogil:
    cdef int64_t idle_ms = flows.fresh_ms
    if flow.flow_class == FLOW_ESTABLISHED:
        idle_ms = flows.established_ms
    if flows.idle_ms > 0:
        idle_ms = min(idle_ms, flows.idle_ms)
    return flow.active_ms + idle_ms


cdef inline Flow *flows_first(const Flows *flows, int flow_class) noexcept nogil:
    """The one of a class that was silent for the longest; NULL: there is none."""
    if list_empty(&flows.classes[flow_class]):
        return NULL
    return <Flow *>flows.classes[flow_class].next.owner


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
