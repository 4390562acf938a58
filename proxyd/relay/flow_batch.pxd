# Batches of datagrams: one recvmmsg(2) into the inbox, one sendmmsg(2) from pieces of it.
#
# The kernel may hand over several datagrams of one size as one message (UDP_GRO), and takes several
# as one (UDP_SEGMENT, GSO). A piece is such a message as it was read. What is sent is composed
# anew, so that datagrams that came one by one can leave together. A message is as large as it can
# be: datagrams of one flow and one size, of which only the last may be smaller.

from proxyd.relay.flow_address cimport local_read_pktinfo, local_write_pktinfo
from proxyd.relay.flow_types cimport (
    BUFFERS, BUFFER_SIZE, BUFFER_STRIDE, CONTROL_SIZE, IOVS, UNIX_SPAN, Cursor, Flow, Inbox,
    LocalAddress, Outbox, Outgoing, Piece,
)
from proxyd.relay.sys cimport (
    AF_UNIX, CMSG_DATA, CMSG_FIRSTHDR, CMSG_LEN, CMSG_NXTHDR, CMSG_SPACE, MSG_DONTWAIT,
    MSG_NOSIGNAL, MSG_TRUNC, SOL_UDP, UDP_GRO, UDP_SEGMENT, cmsghdr, iovec, memcpy, memset, mmsghdr,
    msghdr, recv, recvmmsg, send, sendmmsg, sendmsg, sockaddr_storage, uint16_t,
    uint32_t,
)
from proxyd.relay.types cimport TO_CLIENT

cdef enum:
    SEGMENTS_MAX = 64          # UDP_MAX_SEGMENTS before Linux 6.9
    SEGMENTED_MAX = 65000      # bytes: with its headers it must fit into one IP packet


# ── receiving ────────────────────────────────────────────────────────────────────────────────────

cdef inline void inbox_init(Inbox *inbox) noexcept nogil:
    """Everything but the buffers is set; these are laid out by the first call."""
    cdef int i
    for i in range(BUFFERS):
        inbox.messages[i].msg_hdr.msg_name = &inbox.names[i].address
        inbox.messages[i].msg_hdr.msg_iov = &inbox.iovs[i]
        inbox.messages[i].msg_hdr.msg_iovlen = 1
        inbox.messages[i].msg_hdr.msg_control = &inbox.controls[i]
        message_make_ready(&inbox.messages[i].msg_hdr)
    inbox.wide = True


cdef inline int inbox_receive(
    Inbox *inbox, int fd, int family, int first, int count
) noexcept nogil:
    """As recvmmsg(2), of `count` messages into pieces from the one with this index on. For UNIX
    sockets UNIX_SPAN buffers make one."""
    cdef int i, received
    if family == AF_UNIX:
        inbox_lay_out(inbox, first, count, UNIX_SPAN)
        inbox.wide = True
    else:
        inbox_lay_out_for_ip(inbox)
    received = recvmmsg(fd, &inbox.messages[first], count, MSG_DONTWAIT, NULL)
    for i in range(received):
        inbox_parse(inbox, first + i)
    return received


cdef inline int inbox_receive_one(Inbox *inbox, int fd, int index) noexcept nogil:
    """As inbox_receive(), of one message from a connected IP socket without UDP_GRO."""
    cdef Piece *piece = &inbox.pieces[index]
    cdef ssize_t size
    inbox_lay_out_for_ip(inbox)
    size = recv(fd, inbox.iovs[index].iov_base, BUFFER_SIZE, MSG_DONTWAIT)
    if size < 0:
        return -1
    piece.flow = NULL
    piece.data = <char *>inbox.iovs[index].iov_base
    piece.size = piece.segment = <uint32_t>size
    return 1


cdef inline void inbox_lay_out_for_ip(Inbox *inbox) noexcept nogil:
    """One buffer for each message."""
    if inbox.wide:
        inbox_lay_out(inbox, 0, BUFFERS, 1)
        inbox.wide = False


cdef inline void inbox_lay_out(Inbox *inbox, int first, int count, int span) noexcept nogil:
    """Give each of these messages so many buffers in a row."""
    cdef int i
    for i in range(count):
        inbox.iovs[first + i].iov_base = inbox.buffers + <size_t>(first + i * span) * BUFFER_STRIDE
        inbox.iovs[first + i].iov_len = BUFFER_SIZE + <size_t>(span - 1) * BUFFER_STRIDE


cdef inline void inbox_parse(Inbox *inbox, int index) noexcept nogil:
    """Make a piece of a message, of no flow yet; and learn to which address it was sent. The
    message can be received into again."""
    cdef mmsghdr *message = &inbox.messages[index]
    cdef Piece *piece = &inbox.pieces[index]
    cdef uint32_t segment = message_read_control(&message.msg_hdr, &inbox.locals[index])
    inbox.names[index].size = message.msg_hdr.msg_namelen
    piece.flow = NULL
    piece.data = <char *>inbox.iovs[index].iov_base
    piece.size = message.msg_len
    piece.segment = segment if segment > 0 else message.msg_len
    if message.msg_hdr.msg_flags & MSG_TRUNC:
        piece.data = NULL
    message_make_ready(&message.msg_hdr)


cdef inline void message_make_ready(msghdr *message) noexcept nogil:
    """What the kernel changes."""
    message.msg_namelen = sizeof(sockaddr_storage)
    message.msg_controllen = CONTROL_SIZE
    message.msg_flags = 0


cdef inline uint32_t message_read_control(msghdr *message, LocalAddress *local) noexcept nogil:
    """The size of each datagram in a message, 0 if it is one; and to which address it was sent."""
    cdef cmsghdr *part = CMSG_FIRSTHDR(message)
    cdef int segment = 0
    memset(local, 0, sizeof(local[0]))
    while part != NULL:
        if part.cmsg_level == SOL_UDP and part.cmsg_type == UDP_GRO:
            memcpy(&segment, CMSG_DATA(part), sizeof(segment))
        else:
            local_read_pktinfo(local, part)
        part = CMSG_NXTHDR(message, part)
    return segment


# ── sending ──────────────────────────────────────────────────────────────────────────────────────

cdef inline void outbox_fill(
    Outbox *outbox, const Piece *pieces, int count, const Cursor *begin, int direction,
    uint32_t gso_limit
) noexcept nogil:
    """Compose messages of the pieces from `begin` on, as many as there is room for. All go through
    one socket: to one target over its flow, or to clients over their listener."""
    cdef Cursor at = begin[0]
    outbox.count = outbox.iov_count = 0
    while at.piece < count and outbox.count < BUFFERS and outbox.iov_count <= IOVS - 2:
        if direction == TO_CLIENT:
            if pieces[at.piece].flow.listener != pieces[begin.piece].flow.listener:
                break
            gso_limit = pieces[at.piece].flow.gso_limit
        outbox_compose(outbox, pieces, count, &at, direction, gso_limit)
    outbox.end = at


cdef inline void outbox_compose(
    Outbox *outbox, const Piece *pieces, int count, Cursor *at, int direction, uint32_t gso_limit
) noexcept nogil:
    """One message, and `at` behind it."""
    cdef Flow *flow = pieces[at.piece].flow
    cdef msghdr *message = &outbox.messages[outbox.count].msg_hdr
    cdef Outgoing *about = &outbox.about[outbox.count]
    cdef uint32_t header = 0 if direction == TO_CLIENT else flow.header_size
    cdef uint32_t size = datagram_size(&pieces[at.piece], at.offset)
    cdef uint32_t segment = size
    cdef uint32_t most = 1     # datagrams
    message.msg_iov = &outbox.iovs[outbox.iov_count]
    message.msg_iovlen = 0
    message.msg_flags = 0
    about.start = at[0]
    about.datagrams = about.bytes = 0
    if 0 < size and size + header < gso_limit:
        most = min(<uint32_t>SEGMENTS_MAX, SEGMENTED_MAX // (size + header))
    while True:
        outbox_add_datagram(outbox, message, &pieces[at.piece], at.offset, size, flow, header)
        about.datagrams += 1
        about.bytes += size
        at.offset += size
        if at.offset >= pieces[at.piece].size:
            at.piece += 1
            at.offset = 0
        if size < segment or about.datagrams >= most or outbox.iov_count > IOVS - 2:
            break
        if at.piece >= count or pieces[at.piece].flow != flow:
            break
        size = datagram_size(&pieces[at.piece], at.offset)
        if size > segment or size == 0:
            break
    message_write_control(message, outbox, direction, flow,
                          segment + header if about.datagrams > 1 else 0)
    outbox.count += 1


cdef inline uint32_t piece_datagrams(const Piece *piece, uint32_t offset) noexcept nogil:
    """How many datagrams there are from `offset` on. One may be empty."""
    if piece.size == 0:
        return 1
    return (piece.size - offset + piece.segment - 1) // piece.segment


cdef inline uint32_t datagram_size(const Piece *piece, uint32_t offset) noexcept nogil:
    """Of the one that begins there."""
    return min(piece.segment, piece.size - offset)


cdef inline void outbox_add_datagram(
    Outbox *outbox, msghdr *message, const Piece *piece, uint32_t offset, uint32_t size, Flow *flow,
    uint32_t header
) noexcept nogil:
    """With its PROXY header, if there is one. What follows the last datagram in memory needs no
    iovec of its own."""
    cdef char *data = piece.data + offset
    cdef iovec *iov = &outbox.iovs[outbox.iov_count]
    if header > 0:
        iov.iov_base = flow.header
        iov.iov_len = header
        iov += 1
    elif message.msg_iovlen > 0 and (
            <char *>(iov - 1).iov_base + (iov - 1).iov_len == data):
        (iov - 1).iov_len += size
        return
    iov.iov_base = data
    iov.iov_len = size
    message.msg_iovlen += 2 if header > 0 else 1
    outbox.iov_count += 2 if header > 0 else 1


cdef inline void message_write_control(
    msghdr *message, Outbox *outbox, int direction, Flow *flow, uint32_t segment
) noexcept nogil:
    """Where to, from which of our addresses, and in which size (0: as one) the kernel is to send
    it."""
    cdef cmsghdr *part = <cmsghdr *>&outbox.controls[outbox.count]
    cdef uint16_t value = <uint16_t>segment
    cdef size_t size = 0
    message.msg_name = NULL
    message.msg_namelen = 0
    if direction == TO_CLIENT:
        message.msg_name = &flow.peer.address
        message.msg_namelen = flow.peer.size
        if not flow.local_refused:
            size = local_write_pktinfo(&flow.local, flow.listener.family, part)
    if segment > 0:
        part = <cmsghdr *>(<char *>part + size)
        part.cmsg_level = SOL_UDP
        part.cmsg_type = UDP_SEGMENT
        part.cmsg_len = CMSG_LEN(sizeof(value))
        memcpy(CMSG_DATA(part), &value, sizeof(value))
        size += CMSG_SPACE(sizeof(value))
    message.msg_control = &outbox.controls[outbox.count] if size > 0 else NULL
    message.msg_controllen = size


cdef inline int outbox_send(Outbox *outbox, int fd) noexcept nogil:
    """As sendmmsg(2): how many messages were sent, or -1 and errno if the first was not."""
    cdef msghdr *first = &outbox.messages[0].msg_hdr
    if outbox.count > 1:
        return sendmmsg(fd, outbox.messages, outbox.count, MSG_DONTWAIT | MSG_NOSIGNAL)
    if first.msg_iovlen == 1 and first.msg_controllen == 0 and first.msg_name == NULL:
        return -1 if send(fd, first.msg_iov.iov_base, first.msg_iov.iov_len,
                          MSG_DONTWAIT | MSG_NOSIGNAL) < 0 else 1
    return -1 if sendmsg(fd, first, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 else 1


cdef inline void outbox_init(Outbox *outbox) noexcept nogil:
    memset(outbox, 0, sizeof(outbox[0]))
