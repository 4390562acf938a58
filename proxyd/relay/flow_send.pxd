# Sending to a target, over a flow.
#
#   errno                            then
#   EAGAIN                           the queue is full: the datagram is kept until there is room
#   EMSGSIZE, EINVAL, EIO            of several datagrams at once: the kernel cannot segment them,
#                                    they are sent one by one
#   EMSGSIZE                         of one: it is too large, and is dropped
#   ENOBUFS, ENOMEM                  it is dropped
#   any other                        the target is in doubt: the datagram is kept
#
# A refusal that an earlier datagram has met is reported by the next send, which sends nothing. The
# datagram is kept then, too, so it is not lost.

from proxyd.relay.flow cimport flow_count
from proxyd.relay.flow_batch cimport outbox_fill, outbox_send
from proxyd.relay.flow_socket cimport flow_connect, flow_reopen
from proxyd.relay.flow_types cimport (
    DROP_TARGET, DROP_TOO_LARGE, Cursor, Flow, FlowTarget, Flows, Outbox, Outgoing, Piece,
)
from proxyd.relay.socket cimport socket_take_error
from proxyd.relay.sys cimport (
    AF_UNIX, EAGAIN, ECONNREFUSED, ECONNRESET, EINTR, EINVAL, EIO, EMSGSIZE, ENOBUFS, ENOMEM,
    ENOTCONN, EPIPE, errno, uint32_t,
)
from proxyd.relay.types cimport TO_TARGET


cdef inline int flow_send_all(
    Flows *flows, Flow *flow, const Piece *pieces, int count, Cursor *at
) noexcept nogil:
    """Send what is in the pieces from `at` on; 0, or -errno if that at `at` is to be kept."""
    cdef int failure = 0
    while failure == 0 and at.piece < count:
        failure = flow_send_some(flows, flow, pieces, count, at)
    return failure


cdef inline int flow_send_some(
    Flows *flows, Flow *flow, const Piece *pieces, int count, Cursor *at
) noexcept nogil:
    """One call of the kernel, and what follows from it."""
    cdef Outbox *outbox = &flows.outbox
    cdef FlowTarget *target = flow.listener.target
    cdef Outgoing *first = &outbox.about[0]
    cdef int sent, error
    cdef int i
    outbox_fill(outbox, pieces, count, at, TO_TARGET, target.gso_limit)
    sent = outbox_send(outbox, flow.fd)
    error = errno
    for i in range(sent):
        flow_count(flow, TO_TARGET, outbox.about[i].datagrams, outbox.about[i].bytes)
    if sent > 0:
        at[0] = outbox.end if sent == outbox.count else outbox.about[sent].start
        return 0
    if error == EINTR:
        return 0
    if first.datagrams > 1 and error_is_of_gso(error):
        target.gso_limit = min(target.gso_limit, first_wire_size(flow, pieces, at))
        if error == EIO:
            target.gso_limit = 0
        return 0
    if error == EAGAIN or not error_is_of_datagram(error):
        return -error
    target.totals.dropped[DROP_TOO_LARGE if error == EMSGSIZE else DROP_TARGET] += first.datagrams
    at[0] = outbox.end if outbox.count == 1 else outbox.about[1].start
    return 0


cdef inline bint error_is_of_gso(int error) noexcept nogil:
    """Whether the kernel may have failed because it was to segment: larger than the MTU (EMSGSIZE,
    before Linux 6.15 EINVAL), or a device without checksums (EIO)."""
    return error == EMSGSIZE or error == EINVAL or error == EIO


cdef inline uint32_t first_wire_size(
    const Flow *flow, const Piece *pieces, const Cursor *at
) noexcept nogil:
    return pieces[at.piece].segment + flow.header_size


# ── one datagram, on which the target is judged ──────────────────────────────────────────────────

cdef inline int flow_send_judged(Flows *flows, Flow *flow, const Piece *piece) noexcept nogil:
    """Send the only datagram in a piece; 0 or -errno. With Flow.verdict_at_once this is the
    verdict. The caller counts it.

    If the target has moved, a flow stays where it is until an error comes from there: a session
    that works must not change servers."""
    cdef bint moved = flow.generation != flow.listener.target.generation
    cdef int failure
    if moved and flow.failed:
        failure = flow_reopen(flows, flow)
        return failure if failure < 0 else flow_send_and_look(flows, flow, piece)
    failure = flow_send_and_look(flows, flow, piece)
    if failure == 0 or not moved or error_is_of_datagram(-failure):
        return failure
    failure = flow_reopen(flows, flow)
    return failure if failure < 0 else flow_send_and_look(flows, flow, piece)


cdef inline bint error_is_of_datagram(int error) noexcept nogil:
    """Whether it says nothing of the target."""
    return error == EAGAIN or error == EMSGSIZE or error == ENOBUFS or error == ENOMEM


cdef inline int flow_send_and_look(Flows *flows, Flow *flow, const Piece *piece) noexcept nogil:
    """0 or -errno, which may have come after the send."""
    cdef int failure
    socket_take_error(flow.fd)  # of an earlier datagram: it would be mistaken for this one's
    failure = flow_send_once(flows, flow, piece)
    if failure < 0 and flow.own.address.ss_family == AF_UNIX and error_is_of_peer(-failure):
        failure = flow_reconnect(flow)
        if failure == 0:
            failure = flow_send_once(flows, flow, piece)
    if failure == 0 and flow.verdict_at_once:
        failure = -socket_take_error(flow.fd)
    return failure


cdef inline int flow_reconnect(Flow *flow) noexcept nogil:
    """Find a UNIX target again that was restarted; 0 or -errno."""
    if flow.generation != flow.listener.target.generation:
        return -ECONNREFUSED
    return flow_connect(flow, flow.listener.target)


cdef inline int flow_send_once(Flows *flows, Flow *flow, const Piece *piece) noexcept nogil:
    """0 or -errno."""
    cdef Cursor begin
    cdef int error = EINTR
    begin.piece = 0
    begin.offset = 0
    outbox_fill(&flows.outbox, piece, 1, &begin, TO_TARGET, 0)
    while error == EINTR:
        if outbox_send(&flows.outbox, flow.fd) > 0:
            return 0
        error = errno
    return -error


cdef inline bint error_is_of_peer(int error) noexcept nogil:
    """Whether a UNIX socket has lost its peer, which may be back under the same name."""
    return error == ECONNREFUSED or error == ENOTCONN or error == ECONNRESET or error == EPIPE
