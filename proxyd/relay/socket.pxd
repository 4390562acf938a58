# Sockets: options and questions that several files share.

from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, AF_UNIX, AF_UNSPEC, AF_VSOCK, IPPROTO_TCP, SHUT_RDWR, SIOCINQ, SOCK_STREAM,
    SOL_SOCKET, SO_COOKIE, SO_DOMAIN, SO_ERROR, SO_KEEPALIVE, SO_LINGER, SO_OOBINLINE, SO_PEERCRED,
    SO_TYPE, TCP_NODELAY, close, connect, errno, getpeername, getsockname, getsockopt, ioctl,
    linger, memcmp, memset, setsockopt, shutdown, sockaddr, sockaddr_storage, socklen_t, ucred,
    uint64_t,
)


cdef inline void socket_tune(int fd, int family) noexcept nogil:
    """What both legs need: urgent bytes in their place, keepalive, no Nagle delay.

    Accepted TCP sockets inherit it from their listener; UNIX ones do not. Failures are ignored: a
    transport without an option does not need it."""
    cdef int on = 1
    if family == AF_INET or family == AF_INET6:
        setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof(on))
        setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on))
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on))
    elif family == AF_UNIX:
        setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof(on))


cdef inline void socket_reset(int fd, int family) noexcept nogil:
    """Close with RST, which throws away what was not acknowledged yet. AF_UNIX has no reset: there
    it is a plain close."""
    if family != AF_UNIX and socket_reset_at_close(fd) < 0:
        socket_disconnect(fd)  # where that is forbidden
    close(fd)


cdef inline void socket_reset_copies(int fd, int family) noexcept nogil:
    """Before socket_reset(): another process has the socket as well, or a queue, and its peer is to
    see the reset now."""
    if family == AF_UNIX:
        shutdown(fd, SHUT_RDWR)
    else:
        socket_disconnect(fd)


cdef inline void socket_end_copies(int fd, int family) noexcept nogil:
    """Likewise, before a clean close(2). With input that was not read, that would be a reset."""
    cdef int unread = 0
    if family != AF_UNIX and ioctl(fd, SIOCINQ, &unread) == 0 and unread > 0:
        socket_disconnect(fd)
    else:
        shutdown(fd, SHUT_RDWR)


cdef inline void socket_disconnect(int fd) noexcept nogil:
    """Reset a TCP socket that stays open: see tcp(7), AF_UNSPEC."""
    cdef sockaddr nowhere
    memset(&nowhere, 0, sizeof(nowhere))
    nowhere.sa_family = AF_UNSPEC
    connect(fd, &nowhere, sizeof(nowhere))


cdef inline void socket_guard(int fd, int family) noexcept nogil:
    """Have its peer see a reset if this process is killed, as long as it is owed bytes or an end.

    Whoever passes the end on, or closes it cleanly, calls socket_unlinger() first: SO_LINGER would
    throw away what is queued even then. Only TCP can do this. Never for a listener, which outlives
    us."""
    if family == AF_INET or family == AF_INET6:
        socket_reset_at_close(fd)


cdef inline int socket_reset_at_close(int fd) noexcept nogil:
    """Have close(2) reset it, also if the process ends. As setsockopt(2)."""
    cdef linger now
    now.l_onoff = 1
    now.l_linger = 0
    return setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now))


cdef inline void socket_unlinger(int fd) noexcept nogil:
    """Have close(2) neither wait nor reset, whatever SO_LINGER the listener had."""
    cdef linger off
    off.l_onoff = off.l_linger = 0
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &off, sizeof(off))


cdef inline int socket_take_error(int fd) noexcept nogil:
    """SO_ERROR, which reading clears."""
    cdef int error = 0
    cdef socklen_t size = sizeof(error)
    if getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0:
        return errno
    return error


cdef inline bint socket_self_connected(int fd) noexcept nogil:
    """Whether a TCP socket is connected to itself: a connect to a port of the ephemeral range that
    has no listener may be given that very port as its own."""
    cdef sockaddr_storage mine, peer
    cdef socklen_t mine_size = sizeof(mine), peer_size = sizeof(peer)
    memset(&mine, 0, sizeof(mine))
    memset(&peer, 0, sizeof(peer))
    if getsockname(fd, <sockaddr *>&mine, &mine_size) < 0:
        return False
    if getpeername(fd, <sockaddr *>&peer, &peer_size) < 0:
        return False
    return mine_size == peer_size and memcmp(&mine, &peer, mine_size) == 0


cdef inline int socket_stream_family(int fd) noexcept nogil:
    """The family of a stream socket; -1 if it is none, or one that the relay does not know."""
    cdef int family = -1, kind = -1
    cdef socklen_t size = sizeof(family)
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &size)
    size = sizeof(kind)
    getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &size)
    if kind != SOCK_STREAM or not (
            family == AF_INET or family == AF_INET6 or family == AF_UNIX or family == AF_VSOCK):
        return -1
    return family


cdef inline uint64_t socket_cookie(int fd) noexcept nogil:
    """The number that no other socket of this boot has; 0: not known."""
    cdef uint64_t cookie = 0
    cdef socklen_t size = sizeof(cookie)
    getsockopt(fd, SOL_SOCKET, SO_COOKIE, &cookie, &size)
    return cookie


cdef inline int socket_peer_pid(int fd) noexcept nogil:
    """The process that has connected a UNIX socket; 0: not known."""
    cdef ucred peer
    cdef socklen_t size = sizeof(peer)
    if getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0:
        return 0
    return peer.pid
