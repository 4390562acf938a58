# File descriptors that come over a UNIX socket (SCM_RIGHTS), and how to be rid of them.
#
# The relay forwards bytes alone. A descriptor in a message is dropped by whoever takes the message
# out of the queue, or closes the socket with the message in it; and if that was the last reference
# to its file, the file is closed, which lasts for as long as the sender likes: a TCP socket with
# SO_LINGER waits for its peer. So no thread that others wait for may take such a message, or close
# such a socket. That is left to a thread of its own (quarantine.pxd). No descriptor is ever
# installed here: the table may be full, and close(2) then flushes, which recvmsg(2) without room
# for descriptors does not; a FUSE file's flush cannot even be killed.
#
#   kernel             what is done
#   6.16 and newer     SO_PASSRIGHTS is 0 on every socket; on those to targets before connect(2).
#                      sendmsg(2) of a descriptor then fails with EPERM. What an accepted client
#                      had queued before is read with care, until that is known to be gone.
#   older              every read is one with care, and nothing is spliced.
#
# With care means: a look first (MSG_PEEK). It drops references too, but never the last, which the
# queue has. MSG_CTRUNC says that a descriptor did not fit; then the message is left where it is.

from proxyd.relay.sys cimport (
    EAGAIN, MSG_CTRUNC, MSG_DONTWAIT, MSG_PEEK, SHUT_RD, SIOCINQ, SOL_SOCKET, SO_OOBINLINE,
    SO_PASSCRED, SO_PASSPIDFD, SO_PASSRIGHTS, SO_PASSSEC, errno, errno_set, ioctl, iovec, memset,
    msghdr, recv, recvmsg, setsockopt, shutdown,
)
from proxyd.relay.types cimport (
    RIGHTS_AHEAD, RIGHTS_ANY, RIGHTS_LEFT, RIGHTS_MAYBE, RIGHTS_NONE, RIGHTS_QUEUED, Rights,
)

cdef enum:
    PEEK_UNIT = 4096           # bytes; a look at much data writes these again and again
    PEEK_PIECES = 64
    PEEK_MAX = PEEK_UNIT * PEEK_PIECES


# ── refusing ─────────────────────────────────────────────────────────────────────────────────────

cdef inline bint rights_refuse(int fd) noexcept nogil:
    """Have descriptors refused that are sent from now on. Whether the kernel can do so."""
    cdef int off = 0
    return setsockopt(fd, SOL_SOCKET, SO_PASSRIGHTS, &off, sizeof(off)) == 0


# ── reading ──────────────────────────────────────────────────────────────────────────────────────

cdef inline ssize_t rights_look(Rights *rights, int fd, char *buffer, size_t size) noexcept nogil:
    """How much may be taken, of at most `size` bytes, which rights_took() is to be told; otherwise
    as recv(2) without waiting. EAGAIN also if descriptors come next."""
    cdef bint some = False
    cdef ssize_t got = -1
    errno_set(EAGAIN)
    if rights.state != RIGHTS_AHEAD:
        got = rights_peek(fd, buffer, size, &some)
    if some:
        rights.state = RIGHTS_AHEAD
        errno_set(EAGAIN)
        return -1
    if got == 0 or got < 0 and rights.state < RIGHTS_MAYBE and errno == EAGAIN:
        rights.state = RIGHTS_NONE
    return got


cdef inline void rights_took(Rights *rights, int fd, size_t size) noexcept nogil:
    """`size` bytes were read with care. A sender that found descriptors not yet refused has queued
    its message by the time of the first look, since both take the lock of the socket.

    Only the second look asks how much is queued: most clients send one message, and leave."""
    if rights.state == RIGHTS_QUEUED:
        rights.state = RIGHTS_LEFT
        rights.left = -1
    elif rights.state == RIGHTS_LEFT:
        if rights.left < 0:
            rights.left = queue_length(fd)
        else:
            rights.left -= <int>min(size, <size_t>rights.left)
        if rights.left == 0:
            rights.state = RIGHTS_NONE


cdef inline ssize_t rights_recv_any(
    Rights *rights, int fd, char *buffer, size_t size
) noexcept nogil:
    """As recv(2) without waiting, in quarantine: the bytes are passed on first, and taken out of
    the queue by the next call, which blocks if descriptors came with them."""
    cdef ssize_t got
    while rights.left > 0:
        got = recv(fd, buffer, min(size, <size_t>rights.left), MSG_DONTWAIT)
        if got <= 0:
            return got
        rights.left -= <int>got
    got = recv(fd, buffer, size, MSG_PEEK | MSG_DONTWAIT)
    rights.left = <int>max(got, 0)
    return got


# ── closing ──────────────────────────────────────────────────────────────────────────────────────

cdef inline bint rights_may_close(const Rights *rights, int fd) noexcept nogil:
    """Whether a close(2) of this UNIX socket finds no descriptors. Nothing can be sent to it any
    more afterwards: otherwise some could come in between.

    Data that was not read stays, so that the peer sees ECONNRESET as after any such close."""
    if rights.state == RIGHTS_NONE or rights.state == RIGHTS_ANY:
        return True
    shutdown(fd, SHUT_RD)
    return rights_queue_is_plain(fd)


cdef inline bint rights_queue_is_plain(int fd) noexcept nogil:
    """Whether there are no descriptors in the whole queue, to which nothing is added any more.

    A look ends before an urgent byte, and after PEEK_MAX bytes: then what was seen is taken, to
    look further. If there was anything, something stays unread."""
    cdef char scrap[PEEK_UNIT]
    cdef bint some = False
    cdef ssize_t got
    cdef int on = 1
    cdef int size = queue_length(fd)
    if size > 0:
        setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof(on))
    while size > 0:
        got = rights_peek(fd, scrap, <size_t>size, &some)
        if some or got <= 0:
            return False
        if got >= size:
            return True
        if not queue_take(fd, scrap, got):
            return False
        size = queue_length(fd)
    return size == 0


cdef inline bint queue_take(int fd, char *scrap, ssize_t size) noexcept nogil:
    """Throw away this number of bytes, which have come without descriptors."""
    cdef ssize_t got
    while size > 0:
        got = recv(fd, scrap, min(<size_t>size, <size_t>PEEK_UNIT), MSG_DONTWAIT)
        if got <= 0:
            return False
        size -= got
    return True


cdef inline int queue_length(int fd) noexcept nogil:
    """Bytes that are yet to be read, or -errno."""
    cdef int size = 0
    return size if ioctl(fd, SIOCINQ, &size) == 0 else -errno


# ── looking ──────────────────────────────────────────────────────────────────────────────────────

cdef inline ssize_t rights_peek(int fd, char *buffer, size_t size, bint *some) noexcept nogil:
    """How many bytes a recv(2) would give, and whether descriptors came with the last of them."""
    cdef ssize_t got = rights_peek_once(fd, buffer, size, some)
    if not some[0]:
        return got
    rights_forget_writers(fd)
    return rights_peek_once(fd, buffer, size, some)


cdef inline ssize_t rights_peek_once(
    int fd, char *buffer, size_t size, bint *truncated
) noexcept nogil:
    """As recv(2) with MSG_PEEK, except that much data leaves nothing useful in `buffer`: it is
    written over and over, which is cheaper. At most PEEK_MAX bytes."""
    cdef iovec pieces[PEEK_PIECES]
    cdef msghdr message
    cdef ssize_t got
    cdef size_t count = 0
    memset(&message, 0, sizeof(message))
    while size > 0 and count < PEEK_PIECES:
        pieces[count].iov_base = buffer
        pieces[count].iov_len = min(size, <size_t>PEEK_UNIT)
        size -= pieces[count].iov_len
        count += 1
    message.msg_iov = pieces
    message.msg_iovlen = count
    got = recvmsg(fd, &message, MSG_PEEK | MSG_DONTWAIT)
    truncated[0] = got > 0 and message.msg_flags & MSG_CTRUNC
    return got


cdef inline void rights_forget_writers(int fd) noexcept nogil:
    """Ask for no credentials, as a listener may have (PassCredentials=): without room for them,
    MSG_CTRUNC would tell of these, too."""
    cdef int off = 0
    setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &off, sizeof(off))
    setsockopt(fd, SOL_SOCKET, SO_PASSSEC, &off, sizeof(off))
    setsockopt(fd, SOL_SOCKET, SO_PASSPIDFD, &off, sizeof(off))
