# What sockets to targets are bound to, if not to what the kernel chooses: an address, an interface,
# or the address of the client.

from proxyd.relay.records cimport Binding, Peer
from proxyd.relay.sender cimport mapped
from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, EAFNOSUPPORT, IPPROTO_IP, IPPROTO_IPV6, IPV6_TRANSPARENT,
    IP_BIND_ADDRESS_NO_PORT, IP_TRANSPARENT, SOL_SOCKET, SO_BINDTODEVICE, SO_REUSEADDR, bind, errno,
    memcmp, memcpy, memset, setsockopt, sockaddr, sockaddr_in, sockaddr_in6, uint16_t,
)


cdef inline int socket_bind(
    int fd, int family, const Binding *binding, const Peer *client, bint is_stream
) noexcept nogil:
    """Bind a socket for a target of this family; 0 or -errno. Other than IP ones stay unbound.

    -EAFNOSUPPORT: there is no address of this family, or the client (NULL: none) has none. It never
    gets another address instead."""
    cdef Peer source
    if family != AF_INET and family != AF_INET6:
        return 0
    if binding.device_size > 0 and setsockopt(
            fd, SOL_SOCKET, SO_BINDTODEVICE, binding.device, binding.device_size) < 0:
        return -errno
    if binding.client:
        peer_without_port(&source, client)
    elif binding.v4.size == 0 and binding.v6.size == 0:
        return 0
    else:
        source = binding.v4 if family == AF_INET else binding.v6
    if source.size == 0 or peer_family(&source) != family:
        return -EAFNOSUPPORT
    if binding.client and socket_make_transparent(fd, family) < 0:
        return -errno
    if is_stream:
        socket_share_port(fd, peer_port(&source))
    return -errno if bind(fd, <const sockaddr *>&source.address, source.size) < 0 else 0


cdef inline void peer_without_port(Peer *source, const Peer *client) noexcept nogil:
    """The IP address of a client, an IPv4-mapped one as IPv4; of size 0 if it is not known."""
    cdef const sockaddr_in6 *theirs
    cdef sockaddr_in *v4 = <sockaddr_in *>&source.address
    memset(source, 0, sizeof(source[0]))
    if client == NULL or client.size == 0:
        return
    theirs = <const sockaddr_in6 *>&client.address
    if peer_family(client) == AF_INET:
        source[0] = client[0]
        v4.sin_port = 0
    elif peer_family(client) != AF_INET6:
        return
    elif memcmp(&theirs.sin6_addr, mapped, sizeof(mapped)) == 0:
        (<sockaddr *>v4).sa_family = AF_INET
        memcpy(&v4.sin_addr, &theirs.sin6_addr.s6_addr[sizeof(mapped)], 4)
        source.size = sizeof(sockaddr_in)
    else:
        source[0] = client[0]
        (<sockaddr_in6 *>&source.address).sin6_port = 0


cdef inline int socket_make_transparent(int fd, int family) noexcept nogil:
    """Let it be bound to an address that is not this machine's. As setsockopt(2)."""
    cdef int on = 1
    if family == AF_INET:
        return setsockopt(fd, IPPROTO_IP, IP_TRANSPARENT, &on, sizeof(on))
    return setsockopt(fd, IPPROTO_IPV6, IPV6_TRANSPARENT, &on, sizeof(on))


cdef inline void socket_share_port(int fd, uint16_t port) noexcept nogil:
    """Let connections to other targets have its port, too: one that is still to be chosen (0) is so
    by connect(2), which knows the target. Failures are ignored: ports are used up earlier."""
    cdef int on = 1
    if port == 0:
        setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof(on))
    else:
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on))


cdef inline uint16_t peer_port(const Peer *peer) noexcept nogil:
    """In network byte order."""
    if peer_family(peer) == AF_INET:
        return (<const sockaddr_in *>&peer.address).sin_port
    return (<const sockaddr_in6 *>&peer.address).sin6_port


cdef inline int peer_family(const Peer *peer) noexcept nogil:
    return (<const sockaddr *>&peer.address).sa_family
