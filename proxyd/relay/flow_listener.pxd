# A datagram listener: its datagrams find their flows, and go to the target.

from proxyd.relay.flow cimport flow_begin, flow_heard_client
from proxyd.relay.flow_address cimport name_is_any, name_of_socket
from proxyd.relay.flow_batch cimport inbox_receive, piece_datagrams
from proxyd.relay.flow_held cimport (
    held_add, held_drop_all, held_drop_one, held_first, held_piece, held_take,
)
from proxyd.relay.flow_rights cimport (
    listener_avoids_rights, listener_set_rights, listener_was_empty,
)
from proxyd.relay.flow_send cimport flow_send_all, flow_send_judged
from proxyd.relay.flow_socket cimport flow_wait_for_room
from proxyd.relay.flow_table cimport flow_find, flow_hash, flow_is_of
from proxyd.relay.flow_target cimport (
    target_errs, target_fails, target_holds_now, target_judge, target_passes,
)
from proxyd.relay.flow_tell cimport flows_tell, socket_dropped
from proxyd.relay.flow_types cimport (
    DROP_DOWN, DROP_TARGET, DROP_TOO_LARGE, TARGET_DOUBT, TARGET_DOWN, TARGET_UP,
    TELL_LISTENER_FAILED, UNIX_SPAN, Cursor, Flow, FlowListener, FlowTarget, Flows, Held, Inbox,
    LocalAddress, Name, Piece,
)
from proxyd.relay.list cimport link_init
from proxyd.relay.socket cimport socket_take_error
from proxyd.relay.sys cimport (
    AF_INET, AF_UNIX, EAGAIN, EBADF, EINVAL, EMSGSIZE, ENOBUFS, ENOMEM, ENOTSOCK, EPOLLET, EPOLLIN,
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, IPPROTO_IP, IPPROTO_IPV6, IPV6_RECVPKTINFO, IP_PKTINFO, SOL_UDP,
    UDP_GRO, epoll_ctl, epoll_event, errno, setsockopt, uint32_t,
)
from proxyd.relay.types cimport KIND_FLOW_LISTENER

cdef enum:
    BATCH = 32                 # messages of one listener in one turn
    DROP_ROUNDS = 1024         # batches that are dropped at once: more may come all the time


# ── a turn ───────────────────────────────────────────────────────────────────────────────────────

cdef inline void listener_turn(Flows *flows, FlowListener *listener) noexcept nogil:
    """Send what is in hand, and read one batch."""
    cdef FlowTarget *target = listener.target
    cdef bint has_read = False
    while listener_can_go_on(listener):
        if held_first(listener) != NULL:
            if target.state == TARGET_DOUBT:
                listener_send_judged(flows, listener)
            else:
                listener_send_held(flows, listener)
        elif has_read:
            return
        else:
            has_read = True
            if target.state == TARGET_UP:
                listener_forward(flows, listener)
            else:
                listener_hold_one(flows, listener)


cdef inline bint listener_can_go_on(const FlowListener *listener) noexcept nogil:
    """Whether there is something to do for it, and nothing to wait for."""
    if not listener.started or listener.blocked != NULL or listener.target.judged != NULL:
        return False
    if held_first(listener) != NULL:
        return listener.target.state != TARGET_DOWN
    return listener.readable


# ── while the target is up ───────────────────────────────────────────────────────────────────────

cdef inline void listener_forward(Flows *flows, FlowListener *listener) noexcept nogil:
    """One batch, from the listener's queue to the flows. Datagrams in a row that belong to one flow
    are sent together."""
    cdef int count = listener_receive(flows, listener, BATCH)
    cdef Flow *flow
    cdef Cursor at
    cdef int error = 0
    cdef int run
    cdef int i = 0
    while i < count:
        flow = listener_flow_of_message(flows, listener, i, &error)
        if error != 0:
            listener_hold(flows, listener, i, count)
            target_errs(flows, listener.target, NULL, error)
            return
        if flow == NULL:
            i += 1
            continue
        run = listener_find_run(flows, flow, i, count)
        flow_heard_client(flows, flow)
        flow.asked = run == 1 and piece_datagrams(&flows.inbox.pieces[i], 0) == 1
        at.piece = 0
        at.offset = 0
        error = -flow_send_all(flows, flow, &flows.inbox.pieces[i], run, &at)
        if error != 0:
            held_add(listener, &flow.peer, &flow.local, &flows.inbox.pieces[i + at.piece],
                     at.offset, flows.worker.ctx.now_ms)
            listener_hold(flows, listener, i + at.piece + 1, count)
            listener_send_failed(flows, listener, flow, error)
            return
        i += run


cdef inline Flow *listener_flow_of_message(
    Flows *flows, FlowListener *listener, int index, int *error
) noexcept nogil:
    """The flow of a message in the inbox, as listener_flow(). NULL and 0 also if it is too large.
    """
    cdef Piece *piece = &flows.inbox.pieces[index]
    error[0] = 0
    if piece.data == NULL:
        listener.target.totals.dropped[DROP_TOO_LARGE] += 1
        return NULL
    return listener_flow(flows, listener, &flows.inbox.names[index], &flows.inbox.locals[index],
                         piece_datagrams(piece, 0), error)


cdef inline int listener_find_run(Flows *flows, Flow *flow, int first, int count) noexcept nogil:
    """How many messages in a row are of this flow; the first one is."""
    cdef Inbox *inbox = &flows.inbox
    cdef int i = first + 1
    inbox.pieces[first].flow = flow
    while i < count and inbox.pieces[i].data != NULL and (
            flow_is_of(flow, flow.listener, &inbox.names[i], &inbox.locals[i])):
        inbox.pieces[i].flow = flow
        i += 1
    return i - first


cdef inline void listener_send_held(Flows *flows, FlowListener *listener) noexcept nogil:
    """Send the first message in hand."""
    cdef Held *held = held_first(listener)
    cdef Piece piece
    cdef Cursor at
    cdef Flow *flow = listener_flow_of_held(flows, listener, held)
    cdef int error
    if flow == NULL:
        return
    held_piece(held, &piece)
    piece.flow = flow
    at.piece = 0
    at.offset = 0
    error = -flow_send_all(flows, flow, &piece, 1, &at)
    held_take(listener, held, held.size if at.piece == 1 else held.start + at.offset)
    if error != 0:
        listener_send_failed(flows, listener, flow, error)


cdef inline void listener_send_failed(
    Flows *flows, FlowListener *listener, Flow *flow, int error
) noexcept nogil:
    """What could not be sent is in hand."""
    if error == EAGAIN:
        listener_wait_for_room(flows, listener, flow)
    else:
        target_errs(flows, listener.target, flow, error)


# ── while the target is in doubt, or down ────────────────────────────────────────────────────────

cdef inline void listener_hold_one(Flows *flows, FlowListener *listener) noexcept nogil:
    """Take one message into the hand."""
    cdef bint first = listener.target.held == 0
    listener_hold(flows, listener, 0, listener_receive(flows, listener, 1))
    if first and listener.target.held > 0 and listener.target.state == TARGET_DOWN:
        target_holds_now(flows, listener.target)


cdef inline void listener_hold(
    Flows *flows, FlowListener *listener, int first, int count
) noexcept nogil:
    """Keep the rest of a batch."""
    cdef Inbox *inbox = &flows.inbox
    cdef int i
    for i in range(first, count):
        if inbox.pieces[i].data != NULL:
            held_add(listener, &inbox.names[i], &inbox.locals[i], &inbox.pieces[i], 0,
                     flows.worker.ctx.now_ms)
        else:
            listener.target.totals.dropped[DROP_TOO_LARGE] += 1


cdef inline void listener_send_judged(Flows *flows, FlowListener *listener) noexcept nogil:
    """Send the first datagram in hand, and see what becomes of it."""
    cdef FlowTarget *target = listener.target
    cdef Held *held = held_first(listener)
    cdef Piece piece
    cdef Flow *flow = listener_flow_of_held(flows, listener, held)
    cdef int error
    if flow == NULL:
        return
    held_piece(held, &piece)
    piece.flow = flow
    piece.size = min(piece.segment, piece.size)
    error = -flow_send_judged(flows, flow, &piece)
    if error == 0:
        target_judge(flows, target, listener, flow)
        if flow.verdict_at_once:
            target_passes(flows, target)
    elif error == EAGAIN:
        target_passes(flows, target)
        listener_wait_for_room(flows, listener, flow)
    elif error == EMSGSIZE or error == ENOBUFS or error == ENOMEM:
        held_drop_one(listener, DROP_TOO_LARGE if error == EMSGSIZE else DROP_TARGET)
    else:
        target.judged = listener
        target_fails(flows, target, error)


cdef inline void listener_wait_for_room(
    Flows *flows, FlowListener *listener, Flow *flow
) noexcept nogil:
    """The flow's queue is full. Where it cannot be waited for, what is in hand is dropped: to try
    all the time would take all of the CPU."""
    if flow_wait_for_room(flows, flow) < 0:
        held_drop_one(listener, DROP_TARGET)


cdef inline Flow *listener_flow_of_held(
    Flows *flows, FlowListener *listener, Held *held
) noexcept nogil:
    """The flow of the first message in hand; NULL: there is none, and what follows was done."""
    cdef FlowTarget *target = listener.target
    cdef Piece piece
    cdef Flow *flow
    cdef int error
    held_piece(held, &piece)
    flow = listener_flow(
        flows, listener, &held.peer, &held.local, piece_datagrams(&piece, 0), &error)
    if flow != NULL:
        flow_heard_client(flows, flow)
    elif error == 0:
        held_take(listener, held, held.size)
    elif target.state == TARGET_UP:
        target_errs(flows, target, NULL, error)
    else:
        target.judged = listener
        target_fails(flows, target, error)
    return flow


# ── receiving ────────────────────────────────────────────────────────────────────────────────────

cdef inline Flow *listener_flow(
    Flows *flows, FlowListener *listener, const Name *peer, const LocalAddress *local,
    uint32_t datagrams, int *error
) noexcept nogil:
    """The flow of a client, perhaps a new one. NULL as from flow_begin()."""
    cdef uint32_t hash = flow_hash(&flows.table, listener, peer, local)
    cdef Flow *flow = flow_find(&flows.table, listener, peer, local, hash)
    error[0] = 0
    if flow == NULL:
        flow = flow_begin(flows, listener, peer, local, hash, datagrams, error)
    return flow


cdef inline int listener_drop_queue(Flows *flows, FlowListener *listener) noexcept nogil:
    """Drop what is in hand and in the kernel's queue; how many datagrams that were."""
    cdef int dropped = held_drop_all(listener, DROP_DOWN)
    cdef int _round, count, i
    cdef uint32_t datagrams
    for _round in range(DROP_ROUNDS):
        count = listener_receive(flows, listener, BATCH)
        for i in range(count):
            datagrams = piece_datagrams(&flows.inbox.pieces[i], 0)
            dropped += datagrams
            listener.target.totals.dropped[DROP_DOWN] += datagrams
        if count == 0 or not listener.readable:
            break
    return dropped


cdef inline int listener_receive(Flows *flows, FlowListener *listener, int most) noexcept nogil:
    """Read at most that many messages into the inbox; how many there were."""
    cdef int count
    if listener.family == AF_UNIX:
        most = max(most // UNIX_SPAN, 1)
    if listener.careful:
        most = 1
        if flows.worker.ctx.now_ms < listener.rights_ms or listener_avoids_rights(flows, listener):
            return 0
    count = inbox_receive(&flows.inbox, listener.fd, listener.family, 0, most)
    if count < 0:
        listener_receive_failed(flows, listener, errno)
        return 0
    listener.readable = count == most
    return count


cdef inline void listener_receive_failed(
    Flows *flows, FlowListener *listener, int error
) noexcept nogil:
    """ICMP errors come for a listener only if somebody has asked for them: they are gone now."""
    if error == EAGAIN:
        listener.readable = False
        listener_was_empty(listener)
    elif error == EBADF or error == ENOTSOCK or error == EINVAL:
        listener_stop(flows, listener)
        flows_tell(flows, TELL_LISTENER_FAILED, listener.index, error)


# ── start and stop ───────────────────────────────────────────────────────────────────────────────

cdef inline int listener_start(Flows *flows, FlowListener *listener) noexcept nogil:
    """Have epoll announce datagrams; 0 or -errno."""
    cdef epoll_event event
    if listener.started:
        return 0
    event.events = EPOLLIN | EPOLLET
    event.data.ptr = listener
    if epoll_ctl(flows.worker.ctx.epoll, EPOLL_CTL_ADD, listener.fd, &event) < 0:
        return -errno
    listener.started = True
    listener.readable = True   # what has started the program is there already
    return 0


cdef inline void listener_stop(Flows *flows, FlowListener *listener) noexcept nogil:
    """Read no more. What is in hand stays there."""
    if listener.started:
        epoll_ctl(flows.worker.ctx.epoll, EPOLL_CTL_DEL, listener.fd, NULL)
    listener.started = False


cdef inline int listener_init(Flows *flows, FlowListener *listener, int fd) noexcept nogil:
    """Learn what there is to know of its socket; 0 or -errno. The memory is all zero."""
    listener.kind = KIND_FLOW_LISTENER
    listener.fd = fd
    link_init(&listener.link, listener)
    link_init(&listener.held, NULL)
    name_of_socket(fd, &listener.name)
    if listener.name.size == 0:
        return -errno
    listener.family = listener.name.address.ss_family
    listener.any_address = name_is_any(&listener.name)
    listener.kernel_dropped = socket_dropped(fd)
    socket_take_error(fd)
    listener_set_rights(listener, flows.worker.ctx.may_refuse)
    listener_set_options(listener, 1)
    return 0


cdef inline void listener_set_options(const FlowListener *listener, int on) noexcept nogil:
    """What a listener needs, on or off. Options of a listener outlive the program, and what was
    queued under UDP_GRO would be read without it as one datagram.

    Failures are ignored: without GRO datagrams come one by one."""
    if listener.family == AF_UNIX:
        return
    setsockopt(listener.fd, SOL_UDP, UDP_GRO, &on, sizeof(on))
    if not listener.any_address:
        return
    if listener.family == AF_INET:
        setsockopt(listener.fd, IPPROTO_IP, IP_PKTINFO, &on, sizeof(on))
    else:
        setsockopt(listener.fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof(on))
