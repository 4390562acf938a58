# A flow's socket: it is connected to the target, and watched for replies and errors.

from proxyd.relay.binding cimport socket_bind
from proxyd.relay.flow_address cimport name_is_local, name_of_socket
from proxyd.relay.flow_spare cimport flow_drain
from proxyd.relay.flow_table cimport flow_table_add_own, flow_table_remove_own
from proxyd.relay.flow_tell cimport socket_dropped
from proxyd.relay.flow_types cimport Flow, FlowTarget, Flows, Name
from proxyd.relay.records cimport Binding, Peer
from proxyd.relay.socket cimport socket_take_error
from proxyd.relay.sys cimport (
    AF_INET, AF_UNIX, EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, EAGAIN, ECONNREFUSED, EINVAL,
    EMSGSIZE, ENOMEM, EPOLLIN, EPOLLOUT, EPOLL_CTL_ADD, EPOLL_CTL_MOD, IPPROTO_IP, IPPROTO_IPV6,
    IPV6_RECVERR, IP_RECVERR, MSG_DONTWAIT, MSG_ERRQUEUE, SOCK_CLOEXEC, SOCK_DGRAM, SOCK_NONBLOCK,
    SOL_SOCKET, SO_PASSRIGHTS, bind, close, connect, epoll_ctl, epoll_event, errno, memcmp, memcpy,
    memset, msghdr, recvmsg, sa_family_t, setsockopt, sockaddr, socket,
)

cdef enum:
    ERRORS_MAX = 1024          # read from one socket at a time


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
    cdef const Binding *binding = flows.worker.ctx.binding
    cdef sa_family_t family = target.address.address.ss_family
    cdef int failure
    flow.fd = socket(family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    if flow.fd < 0:
        return -errno
    if family == AF_UNIX:
        flow_name_socket(flow)
    failure = flow_bind(flow, family, binding)
    if failure == 0:
        failure = flow_connect(flow, target)
    if failure < 0:
        ours[0] = error_is_ours(-failure, binding != NULL and binding.client)
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


cdef inline int flow_bind(Flow *flow, int family, const Binding *binding) noexcept nogil:
    """Bind the socket, if it is not for the kernel to choose how; 0 or -errno."""
    cdef Peer client
    if binding == NULL:
        return 0
    client.size = 0
    if flow.peer.size <= sizeof(client.address):
        client.size = flow.peer.size
        memcpy(&client.address, &flow.peer.address, flow.peer.size)
    flow.transparent = binding.client and family != AF_UNIX
    return socket_bind(flow.fd, family, binding, &client, False)


cdef inline bint error_is_ours(int error, bint of_client) noexcept nogil:
    """Whether it says nothing of the target: no memory, no port is left (EAGAIN, or EADDRINUSE with
    an address), or no address to bind to of the target's family. With `of_client` the address is
    that of the client, and may be one from which the target cannot be sent to."""
    if error == EAGAIN or error == ENOMEM or error == EADDRINUSE or error == EAFNOSUPPORT:
        return True
    return of_client and (error == EINVAL or error == EADDRNOTAVAIL)


cdef inline int flow_connect(Flow *flow, const FlowTarget *target) noexcept nogil:
    """Connect the socket, once more perhaps; 0 or -errno."""
    cdef const Name *address = &target.address
    if connect(flow.fd, <const sockaddr *>&address.address, address.size) < 0:
        return -errno
    name_of_socket(flow.fd, &flow.own)
    if flow.own.size == address.size and (
            memcmp(&flow.own.address, &address.address, address.size) == 0):
        return -ECONNREFUSED   # to itself, by chance: nobody else has that port
    # An answer to another address than ours may have to go another way.
    flow.verdict_at_once = not flow.transparent and name_is_local(address, &flow.own)
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
