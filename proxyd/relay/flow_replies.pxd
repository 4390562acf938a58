# Replies: read from the flows, and sent to their clients.
#
# They are gathered in the inbox and sent once per batch of events, by one sendmmsg(2) for each
# listener: it is the listener's socket that a client expects them from.

from proxyd.relay.flow cimport flow_count, flow_heard_target
from proxyd.relay.flow_address cimport local_is_unknown, name_is_unnamed
from proxyd.relay.flow_batch cimport (
    inbox_receive, inbox_receive_one, outbox_fill, outbox_send, piece_datagrams,
)
from proxyd.relay.flow_send cimport error_is_of_datagram, error_is_of_gso
from proxyd.relay.flow_socket cimport flow_has_room, flow_take_error
from proxyd.relay.flow_spare cimport flow_drain
from proxyd.relay.flow_target cimport target_errs, target_replied
from proxyd.relay.flow_types cimport (
    BUFFERS, DROP_CLIENT, DROP_TOO_LARGE, DROP_UNANSWERABLE, UNIX_SPAN, Cursor, Flow, FlowTarget,
    Flows, Outbox, Outgoing, Piece,
)
from proxyd.relay.sys cimport (
    AF_UNIX, EADDRNOTAVAIL, EINTR, EINVAL, EIO, EMSGSIZE, ENETUNREACH, EPOLLERR, EPOLLOUT, SOL_UDP,
    UDP_GRO, errno, setsockopt, uint32_t,
)
from proxyd.relay.types cimport TO_CLIENT

cdef enum:
    READ_MAX = 16              # messages of one flow in one turn


cdef inline void flow_event(Flows *flows, Flow *flow, uint32_t events) noexcept nogil:
    cdef int error
    if flow.fd < 0:
        return                 # it has ended earlier in this batch
    if flow.listener == NULL:
        flow_drain(flow)       # for one that has ended
        return
    if events & EPOLLERR:
        error = flow_take_error(flow)
        if error != 0:
            target_errs(flows, flow.listener.target, flow, error)
    if events & EPOLLOUT:
        flow_has_room(flows, flow)
    flow_read(flows, flow)


cdef inline void flow_read(Flows *flows, Flow *flow) noexcept nogil:
    """Read replies, until there are no more, or it is the other flows' turn. To a question one is
    expected, and read by the cheaper call."""
    cdef int family = flow.own.address.ss_family
    cdef int span = UNIX_SPAN if family == AF_UNIX else 1
    cdef bint one = flow.asked and not flow.gro and family != AF_UNIX
    cdef int most = 1 if one else READ_MAX // span
    cdef int count, first, i
    if (BUFFERS - flows.buffers_used) // span < most:
        replies_send(flows)
    first = flows.buffers_used
    if one:
        count = inbox_receive_one(&flows.inbox, flow.fd, first)
    else:
        count = inbox_receive(&flows.inbox, flow.fd, family, first, most)
    if count < 0:
        flow_read_failed(flows, flow, errno)
        return
    for i in range(count):
        flow_take_reply(flows, flow, first + i)
    flows.buffers_used += count * span
    flow_heard_target(flows, flow)
    target_replied(flows, flow.listener.target)
    if count > 1 and not flow.gro and family != AF_UNIX:
        flow_want_gro(flow)


cdef inline void flow_read_failed(Flows *flows, Flow *flow, int error) noexcept nogil:
    if error != EINTR and not error_is_of_datagram(error):
        target_errs(flows, flow.listener.target, flow, error)


cdef inline void flow_want_gro(Flow *flow) noexcept nogil:
    """Replies come in bursts: have the kernel hand over several at once. For flows with a reply
    here and there, the call and the memory are saved."""
    cdef int on = 1
    setsockopt(flow.fd, SOL_UDP, UDP_GRO, &on, sizeof(on))
    flow.gro = 1


cdef inline void flow_take_reply(Flows *flows, Flow *flow, int index) noexcept nogil:
    """Gather one message, if it can be sent at all."""
    cdef Piece *piece = &flows.inbox.pieces[index]
    cdef FlowTarget *target = flow.listener.target
    if piece.data == NULL:
        target.totals.dropped[DROP_TOO_LARGE] += 1
    elif name_is_unnamed(&flow.peer):
        target.totals.dropped[DROP_UNANSWERABLE] += piece_datagrams(piece, 0)
    else:
        piece.flow = flow
        flows.replies[flows.reply_count] = piece[0]
        flows.reply_count += 1


# ── to the clients ───────────────────────────────────────────────────────────────────────────────

cdef inline void replies_send(Flows *flows) noexcept nogil:
    """Send all that were gathered. The inbox is empty then."""
    cdef Cursor at
    at.piece = 0
    at.offset = 0
    while at.piece < flows.reply_count:
        replies_send_some(flows, &at)
    flows.reply_count = 0
    flows.buffers_used = 0


cdef inline void replies_send_some(Flows *flows, Cursor *at) noexcept nogil:
    """One call of the kernel, and what follows from it."""
    cdef Outbox *outbox = &flows.outbox
    cdef Outgoing *first = &outbox.about[0]
    cdef Flow *flow = flows.replies[at.piece].flow
    cdef int sent, error
    cdef int i
    outbox_fill(outbox, flows.replies, flows.reply_count, at, TO_CLIENT, 0)
    sent = outbox_send(outbox, flow.listener.fd)
    error = errno
    for i in range(sent):
        flow_count(
            flows.replies[outbox.about[i].start.piece].flow, TO_CLIENT, outbox.about[i].datagrams,
            outbox.about[i].bytes)
    if sent > 0:
        at[0] = outbox.end if sent == outbox.count else outbox.about[sent].start
    elif error != EINTR and not flow_adapts(flow, &flows.replies[at.piece], first, error):
        flow.listener.target.totals.dropped[
            DROP_TOO_LARGE if error == EMSGSIZE else DROP_CLIENT] += first.datagrams
        at[0] = outbox.end if outbox.count == 1 else outbox.about[1].start


cdef inline bint flow_adapts(
    Flow *flow, const Piece *piece, const Outgoing *message, int error
) noexcept nogil:
    """Whether it is worth another try, in another form, since the kernel could not send a message
    to the client like this."""
    if message.datagrams > 1 and error_is_of_gso(error):
        flow.gso_limit = 0 if error == EIO else min(flow.gso_limit, piece.segment)
        return True
    if flow.local_refused or local_is_unknown(&flow.local) or flow.datagrams[TO_CLIENT] > 0:
        return False
    # Nothing can be sent from a broadcast address, to which the client may have sent.
    flow.local_refused = error == EINVAL or error == ENETUNREACH or error == EADDRNOTAVAIL
    return flow.local_refused
