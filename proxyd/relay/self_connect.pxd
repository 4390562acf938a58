# The addresses of our own outgoing TCP sockets, to prove that an accepted client is one of them.
#
# Equal addresses of a listener and a target prove nothing: they may be in two network namespaces.
# Nor does a client with the address of one of our outgoing sockets: the kernel may give one port to
# two sockets that lead to two places. Both ends must match: the client's address is that of the
# outgoing socket, and the client came in where the outgoing socket leads.
#
# There is one table for all threads, since any of them may close such a socket.

from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, getsockname, memcmp, memcpy, memset, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, sockaddr, sockaddr_in,
    sockaddr_in6, sockaddr_storage, socklen_t, uint16_t,
)
from proxyd.relay.types cimport SELF_CONNECT_BUCKETS, SelfConnect, SelfConnectKey, SelfConnectTable


cdef inline bint self_connect_came_back(
    SelfConnectTable *table, int fd, const sockaddr_storage *peer
) noexcept nogil:
    """Whether the accepted client `fd` is the other end of one of our outgoing sockets."""
    cdef sockaddr_storage name
    cdef socklen_t size = sizeof(name)
    cdef SelfConnectKey client, here
    self_connect_key(&client, peer)
    # The kernel is not asked unless a socket of ours has that address, which is rare.
    if client.port == 0 or not self_connect_found(table, &client, NULL):
        return False
    memset(&name, 0, sizeof(name))
    if getsockname(fd, <sockaddr *>&name, &size) < 0:
        return False  # GCOVR_EXCL_LINE - fails only without memory for 28 bytes
    self_connect_key(&here, &name)
    return self_connect_found(table, &client, &here)


cdef inline bint self_connect_found(
    SelfConnectTable *table, const SelfConnectKey *client, const SelfConnectKey *here
) noexcept nogil:
    """Whether one of ours has the client's address and leads `here` (NULL: anywhere)."""
    cdef const SelfConnect *entry
    cdef bint found = False
    pthread_mutex_lock(&table.lock)
    entry = table.bucket[client.port % SELF_CONNECT_BUCKETS]
    while entry != NULL and not found:
        found = memcmp(&entry.local, client, sizeof(client[0])) == 0 and (
            here == NULL or self_connect_leads_to(entry, here))
        entry = entry.next
    pthread_mutex_unlock(&table.lock)
    return found


cdef inline bint self_connect_leads_to(
    const SelfConnect *entry, const SelfConnectKey *place
) noexcept nogil:
    """Whether it leads to `place`; the unspecified address means loopback, ip(7)."""
    cdef SelfConnectKey nowhere
    if entry.remote.port != place.port:
        return False
    if memcmp(entry.remote.address, place.address, 16) == 0:
        return True
    memset(&nowhere, 0, sizeof(nowhere))
    return memcmp(entry.remote.address, nowhere.address, 16) == 0 or (
        memcmp(entry.remote.address, place.address, 12) == 0
        and memcmp(&entry.remote.address[12], nowhere.address, 4) == 0)


cdef inline void self_connect_add(
    SelfConnectTable *table, SelfConnect *entry, int fd, const sockaddr_storage *target
) noexcept nogil:
    """Enter a TCP socket that is connecting to `target`; connect() has given it its address."""
    cdef sockaddr_storage mine
    cdef socklen_t size = sizeof(mine)
    if target.ss_family != AF_INET and target.ss_family != AF_INET6:
        return
    if getsockname(fd, <sockaddr *>&mine, &size) < 0:
        return
    self_connect_key(&entry.local, &mine)
    self_connect_key(&entry.remote, target)
    self_connect_enter(table, entry)


cdef inline void self_connect_enter(SelfConnectTable *table, SelfConnect *entry) noexcept nogil:
    """Enter a socket whose addresses are known, if it has any."""
    if entry.local.port == 0:
        return
    entry.self_possible = entry.local.port == entry.remote.port
    pthread_mutex_lock(&table.lock)
    self_connect_link(table, entry)
    pthread_mutex_unlock(&table.lock)


cdef inline void self_connect_move(
    SelfConnectTable *table, SelfConnect *to, SelfConnect *entry
) noexcept nogil:
    """Let `to` stand for the same socket instead of `entry`."""
    if not entry.listed:
        return
    pthread_mutex_lock(&table.lock)
    self_connect_unlink(table, entry)
    to[0] = entry[0]
    self_connect_link(table, to)
    pthread_mutex_unlock(&table.lock)


cdef inline void self_connect_remove(SelfConnectTable *table, SelfConnect *entry) noexcept nogil:
    if not entry.listed:
        return
    pthread_mutex_lock(&table.lock)
    self_connect_unlink(table, entry)
    pthread_mutex_unlock(&table.lock)


cdef inline void self_connect_link(SelfConnectTable *table, SelfConnect *entry) noexcept nogil:
    """With the lock held."""
    cdef int index = entry.local.port % SELF_CONNECT_BUCKETS
    entry.next = table.bucket[index]
    table.bucket[index] = entry
    entry.listed = True


cdef inline void self_connect_unlink(SelfConnectTable *table, SelfConnect *entry) noexcept nogil:
    """With the lock held."""
    cdef SelfConnect **place = &table.bucket[entry.local.port % SELF_CONNECT_BUCKETS]
    while place[0] != entry:
        place = &place[0].next
    place[0] = entry.next
    entry.listed = False


cdef inline socklen_t self_connect_address(
    const SelfConnectKey *key, int family, sockaddr_storage *address
) noexcept nogil:
    """Fill `address`, which is all zero, with that of a key; its size. A scope is not kept."""
    cdef sockaddr_in *v4 = <sockaddr_in *>address
    cdef sockaddr_in6 *v6 = <sockaddr_in6 *>address
    address.ss_family = family
    if family == AF_INET:
        v4.sin_port = key.port
        memcpy(&v4.sin_addr, &key.address[12], 4)
        return sizeof(v4[0])
    v6.sin6_port = key.port
    memcpy(&v6.sin6_addr, key.address, 16)
    return sizeof(v6[0])


cdef inline uint16_t local_port(int fd) noexcept nogil:
    """The port of a socket, in network byte order; 0 if it has none."""
    cdef sockaddr_storage name
    cdef socklen_t size = sizeof(name)
    cdef SelfConnectKey key
    memset(&name, 0, sizeof(name))
    if getsockname(fd, <sockaddr *>&name, &size) < 0:
        return 0
    self_connect_key(&key, &name)
    return key.port


cdef inline void self_connect_key(
    SelfConnectKey *key, const sockaddr_storage *address
) noexcept nogil:
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


# ── set-up ───────────────────────────────────────────────────────────────────────────────────────

cdef inline void self_connect_table_init(SelfConnectTable *table) noexcept nogil:
    memset(table.bucket, 0, sizeof(table.bucket))
    pthread_mutex_init(&table.lock, NULL)


cdef inline void self_connect_table_destroy(SelfConnectTable *table) noexcept nogil:
    pthread_mutex_destroy(&table.lock)
