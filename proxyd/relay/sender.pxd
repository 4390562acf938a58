# Which clients begin with a PROXY header: those of the networks that the policy trusts to send one.

from proxyd.relay.records cimport Network, Senders
from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, AF_UNIX, memcmp, sockaddr_in, sockaddr_in6, sockaddr_storage, uint8_t,
)

cdef extern from * nogil:
    """
    static const unsigned char mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
    """
    const uint8_t mapped[12]   # RFC 4291, section 2.5.5.2


cdef inline bint is_sender(const Senders *senders, const sockaddr_storage *peer) noexcept nogil:
    """Whether a client with this address is one. An IPv4-mapped address is an IPv4 one."""
    cdef const uint8_t *address
    cdef int family = peer.ss_family
    cdef int i
    if family == AF_INET:
        address = <const uint8_t *>&(<const sockaddr_in *>peer).sin_addr
    elif family == AF_INET6:
        address = &(<const sockaddr_in6 *>peer).sin6_addr.s6_addr[0]
        if memcmp(address, mapped, sizeof(mapped)) == 0:
            family = AF_INET
            address = &address[sizeof(mapped)]
    else:
        return family == AF_UNIX and senders.unix_clients
    for i in range(senders.count):
        if senders.networks[i].family == family and network_has(&senders.networks[i], address):
            return True
    return False


cdef inline bint network_has(const Network *network, const uint8_t *address) noexcept nogil:
    cdef int whole = network.bits // 8
    cdef int rest = network.bits % 8
    if memcmp(network.address, address, whole) != 0:
        return False
    return rest == 0 or (network.address[whole] ^ address[whole]) >> (8 - rest) == 0
