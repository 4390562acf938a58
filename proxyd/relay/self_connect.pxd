# The addresses of our own outgoing TCP sockets, to prove that an accepted client is one of them.
#
# Equal addresses of a listener and a target prove nothing: they may live in two network namespaces.
# Nor does a client that has the address of one of our outgoing sockets: the kernel gives one port
# to two sockets that lead to two places. Both ends must match: the client's address is the outgoing
# socket's own, and where it came in is where the outgoing socket went.
#
# There is one table for all threads: any of them may close such a socket.

from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, getsockname, memcmp, memcpy, memset, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, sockaddr,
    sockaddr_in, sockaddr_in6, sockaddr_storage, socklen_t, uint16_t, uint8_t,
)

cdef enum:
    OWN_BUCKETS = 4096         # by port; local ports rarely repeat

ctypedef struct OwnKey:
    uint8_t address[16]        # IPv4 as ::ffff:a.b.c.d, so that both families compare
    uint16_t port              # network byte order; 0: not TCP

ctypedef struct Own:
    OwnKey key                 # its own address
    OwnKey goal                # where it goes
    Own *next
    bint listed
    bint self_possible         # its own port is the target's: it may have met itself

ctypedef struct OwnTable:
    pthread_mutex_t lock
    Own *bucket[OWN_BUCKETS]


cdef inline void own_table_init(OwnTable *table) noexcept nogil:
    memset(table.bucket, 0, sizeof(table.bucket))
    pthread_mutex_init(&table.lock, NULL)


cdef inline void own_table_close(OwnTable *table) noexcept nogil:
    pthread_mutex_destroy(&table.lock)


cdef inline void own_key(OwnKey *key, const sockaddr_storage *address) noexcept nogil:
    cdef const sockaddr_in *v4 = <const sockaddr_in *>address
    cdef const sockaddr_in6 *v6 = <const sockaddr_in6 *>address
    memset(key, 0, sizeof(key[0]))
    if address.ss_family == AF_INET:
        key.address[10] = key.address[11] = 0xff
        memcpy(&key.address[12], &v4.sin_addr, 4)
        key.port = v4.sin_port
    elif address.ss_family == AF_INET6:
        memcpy(key.address, &v6.sin6_addr, 16)
        key.port = v6.sin6_port


cdef inline uint16_t local_port(int fd) noexcept nogil:
    """The port of a socket, in network byte order; 0 where it has none."""
    cdef sockaddr_storage name
    cdef socklen_t size = sizeof(name)
    cdef OwnKey key
    memset(&name, 0, sizeof(name))
    if getsockname(fd, <sockaddr *>&name, &size) < 0:
        return 0
    own_key(&key, &name)
    return key.port


cdef inline void own_add(
    OwnTable *table, Own *own, int fd, const sockaddr_storage *target
) noexcept nogil:
    """Enter a TCP socket that is on its way to `target`; connect() has given it its address."""
    cdef sockaddr_storage mine
    cdef socklen_t size = sizeof(mine)
    if target.ss_family != AF_INET and target.ss_family != AF_INET6:
        return
    if getsockname(fd, <sockaddr *>&mine, &size) < 0:
        return
    own_key(&own.key, &mine)
    own_key(&own.goal, target)
    own.self_possible = own.key.port == own.goal.port
    pthread_mutex_lock(&table.lock)
    own_link(table, own)
    pthread_mutex_unlock(&table.lock)


cdef inline void own_link(OwnTable *table, Own *own) noexcept nogil:
    """With the lock held."""
    cdef int index = own.key.port % OWN_BUCKETS
    own.next = table.bucket[index]
    table.bucket[index] = own
    own.listed = True


cdef inline void own_unlink(OwnTable *table, Own *own) noexcept nogil:
    """With the lock held."""
    cdef Own **place = &table.bucket[own.key.port % OWN_BUCKETS]
    while place[0] != own:
        place = &place[0].next
    place[0] = own.next
    own.listed = False


cdef inline void own_remove(OwnTable *table, Own *own) noexcept nogil:
    if not own.listed:
        return
    pthread_mutex_lock(&table.lock)
    own_unlink(table, own)
    pthread_mutex_unlock(&table.lock)


cdef inline bint own_goes_to(const Own *own, const OwnKey *place) noexcept nogil:
    """Whether it goes to `place`; the unspecified address goes to loopback, ip(7)."""
    cdef OwnKey nowhere
    if own.goal.port != place.port:
        return False
    if memcmp(own.goal.address, place.address, 16) == 0:
        return True
    memset(&nowhere, 0, sizeof(nowhere))
    return memcmp(own.goal.address, nowhere.address, 16) == 0 or (
        memcmp(own.goal.address, place.address, 12) == 0
        and memcmp(&own.goal.address[12], nowhere.address, 4) == 0)


cdef inline bint own_found(
    OwnTable *table, const OwnKey *client, const OwnKey *here
) noexcept nogil:
    """Whether one of ours has the client's address and goes `here` (NULL: anywhere)."""
    cdef const Own *own
    cdef bint found = False
    pthread_mutex_lock(&table.lock)
    own = table.bucket[client.port % OWN_BUCKETS]
    while own != NULL and not found:
        found = memcmp(&own.key, client, sizeof(client[0])) == 0 and (
            here == NULL or own_goes_to(own, here))
        own = own.next
    pthread_mutex_unlock(&table.lock)
    return found


cdef inline bint own_came_back(
    OwnTable *table, int fd, const sockaddr_storage *peer
) noexcept nogil:
    """Whether the accepted client `fd` is the other end of one of our outgoing sockets."""
    cdef sockaddr_storage name
    cdef socklen_t size = sizeof(name)
    cdef OwnKey client, here
    own_key(&client, peer)
    # Nothing is asked of the kernel where no socket of ours has that address: nearly always.
    if client.port == 0 or not own_found(table, &client, NULL):
        return False
    memset(&name, 0, sizeof(name))
    if getsockname(fd, <sockaddr *>&name, &size) < 0:
        return False
    own_key(&here, &name)
    return own_found(table, &client, &here)


cdef inline void own_move(OwnTable *table, Own *to, Own *own) noexcept nogil:
    """Let `to` stand for the same socket instead of `own`."""
    if not own.listed:
        return
    pthread_mutex_lock(&table.lock)
    own_unlink(table, own)
    to[0] = own[0]
    own_link(table, to)
    pthread_mutex_unlock(&table.lock)
