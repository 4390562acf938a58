# Addresses of datagrams: which of ours a client has sent to, how a reply leaves from it, and what a
# PROXY header says of both.

from proxyd.relay.binding cimport socket_make_transparent
from proxyd.relay.flow_types cimport Flow, FlowListener, LocalAddress, Name
from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, AF_UNIX, CMSG_DATA, CMSG_LEN, CMSG_SPACE, IPPROTO_IP, IPPROTO_IPV6,
    IPV6_PKTINFO, IP_PKTINFO, SOCK_CLOEXEC, SOCK_DGRAM, bind, close, cmsghdr, getsockname,
    in6_pktinfo, in_pktinfo, memcmp, memcpy, memset, sockaddr, sockaddr_in, sockaddr_in6,
    sockaddr_storage, socket, uint16_t, uint8_t,
)

cdef enum:
    UNNAMED_SIZE = 2           # of the address of a UNIX socket without a name: only the family

cdef extern from * nogil:
    """
    static const unsigned char mapped_prefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
    static const char proxy_signature[12] = "\\r\\n\\r\\n\\0\\r\\nQUIT\\n";
    """
    const uint8_t mapped_prefix[12]     # RFC 4291, section 2.5.5.2
    const char proxy_signature[12]      # HAProxy, doc/proxy-protocol.txt, section 2.2


# ── where a client has sent to ───────────────────────────────────────────────────────────────────

cdef inline void local_read_pktinfo(LocalAddress *local, cmsghdr *part) noexcept nogil:
    """What one part of a received message tells of it; nothing if it is about something else.

    What was queued before the option was set has no ipi_spec_dst. Otherwise that is preferred, as
    ipi_addr may be a broadcast address."""
    cdef in_pktinfo v4
    cdef in6_pktinfo v6
    if part.cmsg_level == IPPROTO_IP and part.cmsg_type == IP_PKTINFO:
        memcpy(&v4, CMSG_DATA(part), sizeof(v4))
        memcpy(local.address, mapped_prefix, 12)
        if v4.ipi_spec_dst.s_addr != 0:
            memcpy(&local.address[12], &v4.ipi_spec_dst, 4)
        else:
            memcpy(&local.address[12], &v4.ipi_addr, 4)
    elif part.cmsg_level == IPPROTO_IPV6 and part.cmsg_type == IPV6_PKTINFO:
        memcpy(&v6, CMSG_DATA(part), sizeof(v6))
        memcpy(local.address, &v6.ipi6_addr, 16)
        if local.address[0] == 0xfe and local.address[1] & 0xc0 == 0x80:
            local.interface = v6.ipi6_ifindex


cdef inline size_t local_write_pktinfo(
    const LocalAddress *local, int family, cmsghdr *part
) noexcept nogil:
    """Have a message leave from `local`; the size of this part, 0 if any address will do."""
    cdef in_pktinfo v4
    cdef in6_pktinfo v6
    if family == AF_UNIX or local_is_unknown(local):
        return 0
    if family == AF_INET:
        memset(&v4, 0, sizeof(v4))
        memcpy(&v4.ipi_spec_dst, &local.address[12], 4)
        part.cmsg_level = IPPROTO_IP
        part.cmsg_type = IP_PKTINFO
        part.cmsg_len = CMSG_LEN(sizeof(v4))
        memcpy(CMSG_DATA(part), &v4, sizeof(v4))
        return CMSG_SPACE(sizeof(v4))
    memcpy(&v6.ipi6_addr, local.address, 16)
    v6.ipi6_ifindex = local.interface
    part.cmsg_level = IPPROTO_IPV6
    part.cmsg_type = IPV6_PKTINFO
    part.cmsg_len = CMSG_LEN(sizeof(v6))
    memcpy(CMSG_DATA(part), &v6, sizeof(v6))
    return CMSG_SPACE(sizeof(v6))


# ── PROXY v2 ─────────────────────────────────────────────────────────────────────────────────────

cdef inline void flow_make_header(Flow *flow) noexcept nogil:
    """The header before each datagram of a flow. A UNIX client has no address to tell of."""
    cdef FlowListener *listener = flow.listener
    cdef Name client
    cdef LocalAddress to = flow.local
    cdef uint8_t *at = &flow.header[16]
    cdef bint v4
    memcpy(flow.header, proxy_signature, 12)
    memset(&flow.header[12], 0, 4)
    flow.header[12] = 0x20     # LOCAL
    flow.header_size = 16
    if listener.family == AF_UNIX:
        return
    name_unmap(&client, &flow.peer)
    if local_is_unknown(&to):
        name_ip(&listener.name, to.address)
    v4 = client.address.ss_family == AF_INET
    flow.header[12] = 0x21     # PROXY
    flow.header[13] = 0x12 if v4 else 0x22
    flow.header[15] = 12 if v4 else 36
    at = header_put_ip(at, &client, v4)
    memcpy(at, &to.address[12 if v4 else 0], 4 if v4 else 16)
    at += 4 if v4 else 16
    header_put_port(at, name_port(&client))
    header_put_port(at + 2, name_port(&listener.name))
    flow.header_size = 16 + flow.header[15]


cdef inline bint local_is_unknown(const LocalAddress *local) noexcept nogil:
    cdef LocalAddress unknown
    memset(&unknown, 0, sizeof(unknown))
    return memcmp(local.address, unknown.address, 16) == 0


cdef inline uint8_t *header_put_ip(uint8_t *at, const Name *name, bint v4) noexcept nogil:
    """Where the next field begins."""
    cdef uint8_t address[16]
    name_ip(name, address)
    memcpy(at, &address[12 if v4 else 0], 4 if v4 else 16)
    return at + (4 if v4 else 16)


cdef inline void header_put_port(uint8_t *at, uint16_t port) noexcept nogil:
    """It is in network byte order."""
    memcpy(at, &port, 2)


# ── names ────────────────────────────────────────────────────────────────────────────────────────

cdef inline bint name_is_unnamed(const Name *name) noexcept nogil:
    """Whether it is that of a UNIX socket without a name, to which nothing can be sent."""
    return name.size <= UNNAMED_SIZE


cdef inline bint name_is_local(const Name *target, const Name *own) noexcept nogil:
    """Whether `target`, to which a socket with the address `own` is connected, is on this machine,
    so that its refusal comes while a datagram is sent."""
    cdef uint8_t address[16]
    cdef uint8_t mine[16]
    if target.address.ss_family == AF_UNIX:
        return True
    name_ip(target, address)
    name_ip(own, mine)
    return memcmp(address, mine, 16) == 0 or (
        memcmp(address, mapped_prefix, 12) == 0 and address[12] == 127)


cdef inline void name_unmap(Name *to, const Name *name) noexcept nogil:
    """An IPv4-mapped address as IPv4, others as they are."""
    cdef const sockaddr_in6 *v6 = <const sockaddr_in6 *>&name.address
    cdef sockaddr_in *v4 = <sockaddr_in *>&to.address
    to[0] = name[0]
    if name.address.ss_family != AF_INET6 or memcmp(&v6.sin6_addr, mapped_prefix, 12) != 0:
        return
    memset(&to.address, 0, sizeof(to.address))
    to.size = sizeof(sockaddr_in)
    to.address.ss_family = AF_INET
    v4.sin_port = v6.sin6_port
    memcpy(&v4.sin_addr, &v6.sin6_addr.s6_addr[12], 4)


cdef inline void name_make_definite(Name *name) noexcept nogil:
    """The unspecified address means loopback to connect(2), ip(7)."""
    cdef uint8_t *last = <uint8_t *>&(<sockaddr_in6 *>&name.address).sin6_addr + 15
    if name_is_any(name):
        if name.address.ss_family == AF_INET:
            last = <uint8_t *>&(<sockaddr_in *>&name.address).sin_addr + 3
            (last - 3)[0] = 127
        last[0] = 1


cdef inline bint name_is_any(const Name *name) noexcept nogil:
    """Whether it is the unspecified IP address, so that clients may send to several of ours."""
    cdef uint8_t address[16]
    cdef uint8_t nowhere[16]
    if name.address.ss_family == AF_UNIX:
        return False
    name_ip(name, address)
    memset(nowhere, 0, sizeof(nowhere))
    if name.address.ss_family == AF_INET:
        return memcmp(&address[12], nowhere, 4) == 0
    return memcmp(address, nowhere, 16) == 0


cdef inline void name_ip(const Name *name, uint8_t *address) noexcept nogil:
    """Its IP address as 16 bytes, IPv4 as ::ffff:a.b.c.d."""
    memcpy(address, mapped_prefix, 12)
    if name.address.ss_family == AF_INET:
        memcpy(address + 12, &(<const sockaddr_in *>&name.address).sin_addr, 4)
    else:
        memcpy(address, &(<const sockaddr_in6 *>&name.address).sin6_addr, 16)


cdef inline uint16_t name_port(const Name *name) noexcept nogil:
    """In network byte order; 0 for a UNIX socket."""
    if name.address.ss_family == AF_INET:
        return (<const sockaddr_in *>&name.address).sin_port
    if name.address.ss_family == AF_INET6:
        return (<const sockaddr_in6 *>&name.address).sin6_port
    return 0


cdef inline bint name_is_taken(const Name *name, bint of_client) noexcept nogil:
    """Whether a socket of this machine has this address now; True as well if that cannot be found
    out. `of_client`: the address need not be one of this machine's."""
    cdef int fd = socket(name.address.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0)
    cdef bint taken = True
    if fd >= 0:
        if of_client:
            socket_make_transparent(fd, name.address.ss_family)
        taken = bind(fd, <const sockaddr *>&name.address, name.size) < 0
        close(fd)
    return taken


cdef inline void name_of_socket(int fd, Name *name) noexcept nogil:
    """Its own address; of size 0 if the kernel does not tell."""
    memset(name, 0, sizeof(name[0]))
    name.size = sizeof(sockaddr_storage)
    if getsockname(fd, <sockaddr *>&name.address, &name.size) < 0:
        name.size = 0  # GCOVR_EXCL_LINE - fails only without memory for 28 bytes
