# One client's share: how many places of the limit each source has taken.
#
# A source is what a client cannot choose at will: an IPv4 address; the first 64 bits of an IPv6
# address, since one host has all the others; the user at the other end of a UNIX socket; the CID of
# a virtual machine.
#
# Only the main worker makes and removes entries. Any worker gives a place back, as the last thing
# that it does with an entry: one without places can be removed at any time.

from proxyd.relay.records cimport SOURCE_WORDS, Source, SourceTable
from proxyd.relay.siphash cimport siphash
from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, AF_UNIX, AF_VSOCK, ENOMEM, EUSERS, GRND_INSECURE, SOL_SOCKET, SO_PEERCRED,
    atomic_add, atomic_get, calloc, errno, free, getrandom, getsockopt, int64_t, memcmp, memcpy,
    memset, realloc, sockaddr_in, sockaddr_in6, sockaddr_storage, sockaddr_vm, socklen_t, ucred,
    uint32_t, uint8_t,
)

cdef extern from * nogil:
    """
    static const unsigned char ipv4_prefixes[2][12] = {
        {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff},  /* IPv4-mapped: RFC 4291, section 2.5.5.2 */
        {0, 0x64, 0xff, 0x9b},                       /* translated: RFC 6052, section 2.1 */
    };
    """
    const uint8_t ipv4_prefixes[2][12]

# kinds of sources, the first word of a key
cdef enum:
    SOURCE_IPV4, SOURCE_IPV6, SOURCE_LINK, SOURCE_USER, SOURCE_CID

cdef enum:
    BUCKETS_MIN = 64
    BUCKETS_MAX = 1 << 16
    HELD_MIN = 64


cdef inline int source_enter(
    SourceTable *table, const uint32_t *key, Source **entered
) noexcept nogil:
    """Take a place for a client with this key: 0. -EUSERS: its source has no place left. -ENOMEM.
    The source is told unless there was no memory for it."""
    cdef Source *source = source_find(table, key)
    if source == NULL:
        source = source_add(table, key)
    entered[0] = source
    if source == NULL:
        return -ENOMEM
    if atomic_get(&source.places) >= table.places_max:
        return -EUSERS
    atomic_add(&source.places, 1)
    return 0


cdef inline Source *source_take_place(SourceTable *table, const uint32_t *key) noexcept nogil:
    """Likewise, however many its source has; NULL: no memory."""
    cdef Source *source = source_find(table, key)
    if source == NULL:
        source = source_add(table, key)
    if source != NULL:
        atomic_add(&source.places, 1)
    return source


# ── what a client has in common with the others of its source ────────────────────────────────────

cdef inline bint source_of_client(
    const SourceTable *table, int fd, const sockaddr_storage *peer, uint32_t *key
) noexcept nogil:
    """The key of a client with this address; False: its source is not known."""
    cdef ucred user
    cdef socklen_t size = sizeof(user)
    if peer.ss_family != AF_UNIX:
        return source_of_address(peer, key)
    if getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &user, &size) < 0:
        return False
    if <int64_t>user.uid == table.nobody:
        return False
    key[0] = SOURCE_USER
    key[1] = user.uid
    key[2] = 0
    return True


cdef inline bint source_of_address(const sockaddr_storage *peer, uint32_t *key) noexcept nogil:
    """The key of an address; False: it does not tell the source."""
    cdef int family = peer.ss_family
    key[2] = 0
    if family == AF_INET:
        key[0] = SOURCE_IPV4
        key[1] = (<const sockaddr_in *>peer).sin_addr.s_addr
    elif family == AF_INET6:
        source_of_ipv6(<const sockaddr_in6 *>peer, key)
    elif family == AF_VSOCK:
        key[0] = SOURCE_CID
        key[1] = (<const sockaddr_vm *>peer).svm_cid
    else:
        return False
    return True


cdef inline void source_of_ipv6(const sockaddr_in6 *peer, uint32_t *key) noexcept nogil:
    """Link-local addresses begin alike on every link, so there it is the link that counts."""
    cdef const uint8_t *address = &peer.sin6_addr.s6_addr[0]
    if memcmp(address, ipv4_prefixes[0], 12) == 0 or memcmp(address, ipv4_prefixes[1], 12) == 0:
        key[0] = SOURCE_IPV4
        memcpy(&key[1], &address[12], 4)
    elif address[0] == 0xfe and address[1] & 0xc0 == 0x80:
        key[0] = SOURCE_LINK
        key[1] = peer.sin6_scope_id
    else:
        key[0] = SOURCE_IPV6
        memcpy(&key[1], address, 8)


# ── clients in the hands of the policy ───────────────────────────────────────────────────────────

cdef inline void source_hold(SourceTable *table, int fd, Source *source) noexcept nogil:
    """The policy has the client `fd`: keep its place until source_take(). Without memory for a
    table of fds, the client does not count."""
    cdef Source **held
    cdef int size = max(table.held_size, HELD_MIN)
    if source == NULL:
        return
    while size <= fd:
        size *= 2
    if size > table.held_size:
        held = <Source **>realloc(table.held, size * sizeof(Source *))
        if held == NULL:
            source_leave(source)
            return
        memset(&held[table.held_size], 0, (size - table.held_size) * sizeof(Source *))
        table.held = held
        table.held_size = size
    table.held[fd] = source


cdef inline Source *source_take(SourceTable *table, int fd) noexcept nogil:
    """The source of a client that the policy does not have any more; NULL: none."""
    cdef Source *source
    if not 0 <= fd < table.held_size:
        return NULL
    source = table.held[fd]
    table.held[fd] = NULL
    return source


cdef inline void source_leave(Source *source) noexcept nogil:
    """Give a place back. The entry is not to be used after that."""
    if source != NULL:
        atomic_add(&source.places, -1)


# ── the table ────────────────────────────────────────────────────────────────────────────────────

cdef inline Source *source_find(SourceTable *table, const uint32_t *key) noexcept nogil:
    """The entry of this key, or NULL. Entries without places are removed on the way, so that there
    is at most one for each place and one more for each bucket."""
    cdef Source **place = &table.buckets[source_bucket(table, key)]
    cdef Source *source
    while place[0] != NULL:
        source = place[0]
        if memcmp(source.key, key, sizeof(source.key)) == 0:
            return source
        if atomic_get(&source.places) == 0:
            place[0] = source.next
            free(source)
        else:
            place = &source.next
    return NULL


cdef inline Source *source_add(SourceTable *table, const uint32_t *key) noexcept nogil:
    """A new entry without places; NULL: no memory."""
    cdef uint32_t bucket = source_bucket(table, key)
    cdef Source *source = <Source *>calloc(1, table.entry_size)
    if source == NULL:
        return NULL
    memcpy(source.key, key, sizeof(source.key))
    source.next = table.buckets[bucket]
    table.buckets[bucket] = source
    return source


cdef inline uint32_t source_bucket(const SourceTable *table, const uint32_t *key) noexcept nogil:
    cdef uint32_t hash = <uint32_t>siphash(table.secret, key, SOURCE_WORDS * sizeof(uint32_t))
    return hash & table.mask


cdef inline int source_table_init(
    SourceTable *table, int places_max, int connections_max, size_t entry_size
) noexcept nogil:
    """Allow `places_max` places to each source; 0 or -errno. An entry begins with a Source. The
    memory is all zero."""
    cdef uint32_t count = BUCKETS_MIN
    while count < <uint32_t>min(connections_max, BUCKETS_MAX):
        count *= 2
    if getrandom(table.secret, sizeof(table.secret), GRND_INSECURE) < 0:
        return -errno
    table.buckets = <Source **>calloc(count, sizeof(Source *))
    if table.buckets == NULL:
        return -ENOMEM
    table.mask = count - 1
    table.places_max = places_max
    table.entry_size = entry_size
    table.nobody = -1
    return 0


cdef inline void source_table_destroy(SourceTable *table) noexcept nogil:
    cdef Source *source
    cdef uint32_t i
    for i in range(table.mask + 1 if table.buckets != NULL else 0):
        while table.buckets[i] != NULL:
            source = table.buckets[i]
            table.buckets[i] = source.next
            free(source)
    free(table.buckets)
    table.buckets = NULL
    free(table.held)
    table.held = NULL
    table.held_size = 0
