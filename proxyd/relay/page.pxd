# A page by itself: a SEQPACKET pair, and messages with descriptors in its queue. See pages.pxd.

from proxyd.relay.slate_types cimport Page
from proxyd.relay.sys cimport (
    CMSG_DATA, CMSG_FIRSTHDR, CMSG_LEN, CMSG_SPACE, AF_UNIX, ETOOMANYREFS, MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, RLIMIT_NOFILE, SCM_RIGHTS, SOCK_CLOEXEC, SOCK_SEQPACKET,
    SOL_SOCKET, SO_SNDBUF, close, cmsghdr, errno, getrlimit, iovec, memcpy, memset, msghdr, recv,
    recvmsg, rlimit, sendmsg, setrlimit, setsockopt, socketpair, uint64_t,
)

cdef enum:
    PAGE_BYTES = 256 * 1024    # send buffer: a message takes up to 1 KiB, and this is doubled
    DATA_MAX = 48              # bytes of a message
    CONTROL_WORDS = 8          # of 8 bytes, for two descriptors


cdef inline int page_open(Page *page) noexcept nogil:
    cdef int ends[2]
    cdef int bytes = PAGE_BYTES
    if socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0:
        return -errno
    page.receiver = ends[0]
    page.sender = ends[1]
    setsockopt(page.sender, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes))
    return 0


cdef inline void page_empty(Page *page) noexcept nogil:
    """Take everything out of it. There is no room for descriptors: the kernel closes them."""
    cdef char data[DATA_MAX]
    while recv(page.receiver, data, DATA_MAX, MSG_DONTWAIT) > 0:
        pass


cdef inline void page_close(const Page *page) noexcept nogil:
    close(page.receiver)
    close(page.sender)


# ── messages ──────────────────────────────────────────────────────────────────────────────────────

cdef inline ssize_t page_peek(Page *page, char *data, int *fds, int *count) noexcept nogil:
    """The first message, which stays; its descriptors are the caller's."""
    cdef uint64_t control[CONTROL_WORDS]
    cdef iovec piece
    cdef msghdr message
    cdef cmsghdr *part
    cdef ssize_t size
    count[0] = 0
    message_init(&message, &piece, data, DATA_MAX - 1, control)
    message.msg_controllen = CMSG_SPACE(2 * sizeof(int))
    size = recvmsg(page.receiver, &message, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
    if size < 0:
        return size
    data[size] = 0
    part = CMSG_FIRSTHDR(&message)
    if part != NULL and part.cmsg_level == SOL_SOCKET and part.cmsg_type == SCM_RIGHTS:
        count[0] = <int>((part.cmsg_len - CMSG_LEN(0)) // sizeof(int))
        memcpy(fds, CMSG_DATA(part), <size_t>count[0] * sizeof(int))
    return size


cdef inline int message_send(
    int sender, const char *data, size_t size, const int *fds, int count
) noexcept nogil:
    """A message with descriptors; 0 or -errno. The kernel compares those in flight of this user
    with the soft limit of its process: see unix(7), ETOOMANYREFS."""
    cdef rlimit limit, raised
    cdef int failure = message_send_once(sender, data, size, fds, count)
    if failure != -ETOOMANYREFS or getrlimit(RLIMIT_NOFILE, &limit) < 0:
        return failure
    raised = limit
    raised.rlim_cur = limit.rlim_max
    if limit.rlim_cur == limit.rlim_max or setrlimit(RLIMIT_NOFILE, &raised) < 0:
        return failure
    failure = message_send_once(sender, data, size, fds, count)
    setrlimit(RLIMIT_NOFILE, &limit)
    return failure


cdef inline int message_send_once(
    int sender, const char *data, size_t size, const int *fds, int count
) noexcept nogil:
    cdef uint64_t control[CONTROL_WORDS]
    cdef iovec piece
    cdef msghdr message
    cdef cmsghdr *part
    message_init(&message, &piece, <char *>data, size, control)
    message.msg_controllen = CMSG_SPACE(<size_t>count * sizeof(int))
    part = CMSG_FIRSTHDR(&message)
    part.cmsg_level = SOL_SOCKET
    part.cmsg_type = SCM_RIGHTS
    part.cmsg_len = CMSG_LEN(<size_t>count * sizeof(int))
    memcpy(CMSG_DATA(part), fds, <size_t>count * sizeof(int))
    return 0 if sendmsg(sender, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0 else -errno


cdef inline void message_init(
    msghdr *message, iovec *piece, char *data, size_t size, uint64_t *control
) noexcept nogil:
    memset(message, 0, sizeof(message[0]))
    memset(control, 0, CONTROL_WORDS * sizeof(uint64_t))
    piece.iov_base = data
    piece.iov_len = size
    message.msg_iov = piece
    message.msg_iovlen = 1
    message.msg_control = control
    message.msg_controllen = CONTROL_WORDS * sizeof(uint64_t)
