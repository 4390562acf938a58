# One side of a connection: its socket, and what is known of it. pump.pxd has the rules.

from proxyd.relay.rights cimport (
    PEEK_MAX, rights_look, rights_recv_any, rights_refuse, rights_took,
)
from proxyd.relay.slate cimport intent_recv
from proxyd.relay.slate_types cimport Intent
from proxyd.relay.socket cimport socket_unlinger
from proxyd.relay.strike cimport connection_strike
from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, AF_UNIX, EAGAIN, EINTR, EPIPE, EPOLLET, EPOLLIN, EPOLLOUT, EPOLLPRI,
    EPOLLRDHUP, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, MSG_CTRUNC, MSG_DONTWAIT, SOCK_CLOEXEC,
    SOCK_STREAM, SOL_SOCKET, SO_SNDBUF, close, epoll_ctl, epoll_event, errno, getsockopt, iovec,
    memset, msghdr, recv, recvmsg, setsockopt, socket, socklen_t, uint32_t,
)
from proxyd.relay.types cimport (
    RIGHTS_ANY, RIGHTS_MAYBE, RIGHTS_NONE, RIGHTS_QUEUED, Connection, Endpoint, PumpContext,
)

cdef enum:
    SNDBUF = 256 * 1024        # bytes asked for if a stream goes into a UNIX socket: twice that


# ── epoll ────────────────────────────────────────────────────────────────────────────────────────

cdef inline bint endpoint_register(PumpContext *ctx, Endpoint *end) noexcept nogil:
    """Whether epoll announces it from now on. What is there already is announced at once."""
    cdef epoll_event event
    if end.fd < 0:
        return True
    event.events = endpoint_interest(end)
    event.data.ptr = end
    end.registered = epoll_ctl(ctx.epoll, EPOLL_CTL_ADD, end.fd, &event) == 0
    return end.registered


cdef inline void endpoint_unregister(PumpContext *ctx, Endpoint *end) noexcept nogil:
    """Before every close(2), which leaves the registration in place if another process has the
    socket as well: a later event would then point to freed memory."""
    if end.registered:
        epoll_ctl(ctx.epoll, EPOLL_CTL_DEL, end.fd, NULL)
        end.registered = False


cdef inline void endpoint_blocked(PumpContext *ctx, Endpoint *end) noexcept nogil:
    """No more fits into the socket: wait for EPOLLOUT."""
    cdef epoll_event event
    end.writable = 0
    if end.armed:
        return
    end.armed = 1
    if end.registered:
        event.events = endpoint_interest(end)
        event.data.ptr = end
        if epoll_ctl(ctx.epoll, EPOLL_CTL_MOD, end.fd, &event) < 0:
            endpoint_failed(end, errno)  # it would wait for ever otherwise


cdef inline uint32_t endpoint_interest(const Endpoint *end) noexcept nogil:
    """What epoll is to announce: a function of the endpoint's state, computed only here.

    EPOLLOUT is asked for while connecting and after the first send that did not fit, and stays:
    TCP announces free space only after such a send, so it costs nothing more; a UNIX socket does
    so whenever its peer has read, which is of no use for a socket that never fills."""
    cdef uint32_t interest = EPOLLIN | EPOLLRDHUP | EPOLLPRI | EPOLLET
    if end.armed:
        interest |= EPOLLOUT
    return interest


cdef inline void endpoint_unguard(const Endpoint *end) noexcept nogil:
    """It is owed nothing more: undo socket_guard()."""
    if end.family == AF_INET or end.family == AF_INET6:
        socket_unlinger(end.fd)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────

cdef inline ssize_t endpoint_recv(
    Endpoint *end, char *buffer, size_t size, Intent *intent
) noexcept nogil:
    """As recv(2), and `readable` is true afterwards only if there may be more to read. `intent`: in
    which the kernel is to note how much was taken; NULL: nowhere.

    A message with credentials ends a recv from a UNIX socket, whatever is behind it. There is no
    room for them here, so MSG_CTRUNC tells of them."""
    cdef ssize_t got
    cdef int flags = 0
    if end.family != AF_UNIX:
        got = recv(end.fd, buffer, size, MSG_DONTWAIT)
    elif end.rights.state == RIGHTS_ANY:
        got = rights_recv_any(&end.rights, end.fd, buffer, min(size, <size_t>PEEK_MAX))
        flags = MSG_CTRUNC  # read on: what was seen is yet to be taken
    elif endpoint_is_plain(end):
        got = endpoint_take(end, buffer, size, intent, &flags)
    else:
        size = min(size, <size_t>PEEK_MAX)
        got = endpoint_take_with_care(end, buffer, size, intent)
    if got < 0:
        if errno == EAGAIN:
            end.readable = end.urgent = 0
    elif got == 0:
        end.readable = 0
        end.ended = 1
    elif <size_t>got < size and not (end.ending or end.urgent or flags & MSG_CTRUNC):
        end.readable = 0
    return got


cdef inline ssize_t endpoint_take_with_care(
    Endpoint *end, char *buffer, size_t size, Intent *intent
) noexcept nogil:
    """As recv(2), of a UNIX socket whose queue may hold descriptors."""
    cdef int flags = 0
    cdef ssize_t got = rights_look(&end.rights, end.fd, buffer, size)
    if got > 0:
        if intent == NULL:
            got = recv(end.fd, buffer, <size_t>got, MSG_DONTWAIT)
        else:
            got = endpoint_take(end, buffer, <size_t>got, intent, &flags)
        rights_took(&end.rights, end.fd, <size_t>max(got, 0))
    return got


cdef inline ssize_t endpoint_take(
    Endpoint *end, char *buffer, size_t size, Intent *intent, int *flags
) noexcept nogil:
    """As recv(2), of a UNIX socket; `flags`: as recvmsg(2) returns them."""
    cdef ssize_t got
    cdef iovec piece
    cdef msghdr message
    if intent != NULL:
        got = intent_recv(intent, end.fd, buffer, size, flags)
        if got >= 0 or errno == EAGAIN or errno == EINTR:
            return got
        # recvmmsg(2) tells of an error before it gives what is queued. That is yet to be read.
        endpoint_failed(end, errno)
        end.ending = 1
    memset(&message, 0, sizeof(message))
    piece.iov_base = buffer
    piece.iov_len = size
    message.msg_iov = &piece
    message.msg_iovlen = 1
    got = recvmsg(end.fd, &message, MSG_DONTWAIT)
    flags[0] = message.msg_flags
    return got


cdef inline bint endpoint_is_plain(const Endpoint *end) noexcept nogil:
    """Whether it can be read without a look for descriptors first."""
    return end.family != AF_UNIX or end.rights.state == RIGHTS_NONE


cdef inline void endpoint_refuse_rights(PumpContext *ctx, Endpoint *end) noexcept nogil:
    """Have descriptors that are sent to an accepted UNIX client refused, or be prepared for them.
    """
    if ctx.may_refuse and rights_refuse(end.fd):
        end.rights.state = RIGHTS_QUEUED
    else:
        ctx.may_refuse = False
        end.rights.state = RIGHTS_MAYBE


# ── failures ─────────────────────────────────────────────────────────────────────────────────────

cdef inline void endpoint_lost(Endpoint *end, int error) noexcept nogil:
    """A write failed. What the peer had already sent is still to be read, to the end.

    EPIPE from a UNIX socket means that its peer has closed, or has only stopped reading: no error
    when that is read."""
    if error == EPIPE and end.family == AF_UNIX:
        connection_strike(<Connection *>end.connection)
        end.gone = end.refused = 1
    else:
        endpoint_failed(end, error)
    end.readable = end.ending = 1


cdef inline void endpoint_failed(Endpoint *end, int error) noexcept nogil:
    """A read or write said that the peer is gone, without a clean end."""
    connection_strike(<Connection *>end.connection)
    end.gone = 1
    if end.error == 0:
        end.error = error


# ── the send buffer ──────────────────────────────────────────────────────────────────────────────

cdef inline void endpoint_grow_sndbuf(const Endpoint *end) noexcept nogil:
    """Give a UNIX socket that a stream goes into a larger send buffer, if net.core.wmem_max allows.

    Such a socket is announced as writable when it is nearly empty; with the default of 208 KiB that
    is a wake-up for every 150 KiB. TCP finds the right size by itself. Never less than it has: the
    default may be more than an ordinary user may ask for."""
    cdef int size = SNDBUF
    if end.family == AF_UNIX and sndbuf_of(end.fd) < sndbuf_granted():
        setsockopt(end.fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size))


cdef inline int sndbuf_granted() noexcept nogil:
    """The send buffer of a socket that asks for SNDBUF; 0: not known. Tried on a socket made for
    that: nothing else tells the limit, and a buffer that was reduced may not be restored."""
    cdef int size = SNDBUF
    cdef int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)
    if fd < 0:
        return 0
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size))
    size = sndbuf_of(fd)
    close(fd)
    return size


cdef inline int sndbuf_of(int fd) noexcept nogil:
    cdef int size = 0
    cdef socklen_t length = sizeof(size)
    if getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, &length) < 0:
        return SNDBUF * 2  # leave it as it is
    return size
