# The table of flows: by client, and by the address of our own socket.
#
# Chained hashing, with the chains in the flows themselves. The first hash is keyed: senders choose
# their addresses, or invent them. The second is not, since the kernel chooses ours.

from proxyd.relay.flow_types cimport (
    EVICTED_KEPT, Flow, FlowListener, FlowTable, LocalAddress, Name,
)
from proxyd.relay.siphash cimport siphash
from proxyd.relay.sys cimport (
    ENOMEM, GRND_INSECURE, calloc, errno, free, getrandom, int64_t, memcmp, uint32_t, uint64_t,
    uint8_t,
)

cdef enum:
    BUCKETS_MIN = 256
    LOOP_MS = 20               # that a datagram may take from one of our sockets to another


cdef inline Flow *flow_find(
    FlowTable *table, FlowListener *listener, const Name *peer, const LocalAddress *local,
    uint32_t hash
) noexcept nogil:
    """The flow of a client; NULL: there is none."""
    cdef Flow *flow = table.buckets[hash & table.mask]
    while flow != NULL and not (flow.hash == hash and flow_is_of(flow, listener, peer, local)):
        flow = flow.next
    return flow


cdef inline bint flow_is_of(
    const Flow *flow, const FlowListener *listener, const Name *peer, const LocalAddress *local
) noexcept nogil:
    return (
        flow.listener == listener and flow.peer.size == peer.size
        and memcmp(&flow.peer.address, &peer.address, peer.size) == 0
        and memcmp(&flow.local, local, sizeof(local[0])) == 0)


cdef inline uint32_t flow_hash(
    const FlowTable *table, const FlowListener *listener, const Name *peer,
    const LocalAddress *local
) noexcept nogil:
    cdef uint64_t secret[2]
    secret[0] = table.secret[0] ^ siphash(table.secret, local, sizeof(local[0]))
    secret[1] = table.secret[1] + <uint64_t>listener.fd
    return <uint32_t>siphash(secret, &peer.address, peer.size)


cdef inline const Flow *flow_table_find_own(
    const FlowTable *table, const Name *name
) noexcept nogil:
    """The flow whose own socket has this address; NULL: there is none."""
    cdef const Flow *flow = table.own_buckets[own_hash(name) & table.mask]
    while flow != NULL:
        if flow.own.size == name.size and (
                memcmp(&flow.own.address, &name.address, name.size) == 0):
            return flow
        flow = flow.own_next
    return NULL


cdef inline bint flow_table_evicted_own(
    const FlowTable *table, const Name *name, int64_t now_ms
) noexcept nogil:
    """Whether it was the address of a flow that was evicted just now; another socket may have it
    meanwhile."""
    cdef uint32_t hash = own_hash(name)
    cdef uint32_t place = hash & (EVICTED_KEPT - 1)
    return table.evicted[place] == hash and now_ms - table.evicted_ms[place] <= LOOP_MS


# ── changes ──────────────────────────────────────────────────────────────────────────────────────

cdef inline void flow_table_add(FlowTable *table, Flow *flow) noexcept nogil:
    """Enter a flow with its hash and its own address."""
    cdef Flow **place
    if table.count > table.mask:
        flow_table_grow(table)
    place = &table.buckets[flow.hash & table.mask]
    flow.next = place[0]
    place[0] = flow
    flow_table_add_own(table, flow)
    table.count += 1


cdef inline void flow_table_remove(FlowTable *table, Flow *flow) noexcept nogil:
    cdef Flow **place = &table.buckets[flow.hash & table.mask]
    while place[0] != flow:
        place = &place[0].next
    place[0] = flow.next
    flow_table_remove_own(table, flow)
    table.count -= 1


cdef inline void flow_table_remove_own(FlowTable *table, Flow *flow) noexcept nogil:
    """Before its own address changes."""
    cdef Flow **place = &table.own_buckets[own_hash(&flow.own) & table.mask]
    while place[0] != flow:
        place = &place[0].own_next
    place[0] = flow.own_next


cdef inline void flow_table_keep_evicted(
    FlowTable *table, const Flow *flow, int64_t now_ms
) noexcept nogil:
    """What the flow has sent may still come back."""
    cdef uint32_t hash = own_hash(&flow.own)
    table.evicted[hash & (EVICTED_KEPT - 1)] = hash
    table.evicted_ms[hash & (EVICTED_KEPT - 1)] = now_ms


cdef inline void flow_table_grow(FlowTable *table) noexcept nogil:
    """Twice the buckets. Without memory the chains get longer, and that is all."""
    cdef FlowTable larger = table[0]
    cdef Flow *flow
    cdef Flow *after
    cdef uint32_t i
    cdef int failure = flow_table_allocate(&larger, 2 * (table.mask + 1))
    if failure < 0:
        return
    for i in range(table.mask + 1):
        flow = table.buckets[i]
        while flow != NULL:
            after = flow.next
            flow.next = larger.buckets[flow.hash & larger.mask]
            larger.buckets[flow.hash & larger.mask] = flow
            flow_table_add_own(&larger, flow)
            flow = after
    flow_table_free(table)
    table[0] = larger


cdef inline void flow_table_add_own(FlowTable *table, Flow *flow) noexcept nogil:
    cdef Flow **place = &table.own_buckets[own_hash(&flow.own) & table.mask]
    flow.own_next = place[0]
    place[0] = flow


cdef inline uint32_t own_hash(const Name *name) noexcept nogil:
    """FNV-1a."""
    cdef const uint8_t *at = <const uint8_t *>&name.address
    cdef uint32_t hash = 2166136261U
    cdef uint32_t i
    for i in range(name.size):
        hash = (hash ^ at[i]) * 16777619U
    return hash ^ hash >> 16


# ── set-up ───────────────────────────────────────────────────────────────────────────────────────

cdef inline int flow_table_init(FlowTable *table) noexcept nogil:
    """0 or -errno. The memory is all zero."""
    if getrandom(table.secret, sizeof(table.secret), GRND_INSECURE) < 0:
        return -errno
    return flow_table_allocate(table, BUCKETS_MIN)


cdef inline int flow_table_allocate(FlowTable *table, uint32_t buckets) noexcept nogil:
    """Empty buckets; 0 or -errno, and then the table is as before."""
    cdef Flow **one = <Flow **>calloc(buckets, sizeof(Flow *))
    cdef Flow **other = <Flow **>calloc(buckets, sizeof(Flow *))
    if one == NULL or other == NULL:
        free(one)
        free(other)
        return -ENOMEM
    table.buckets = one
    table.own_buckets = other
    table.mask = buckets - 1
    return 0


cdef inline void flow_table_free(FlowTable *table) noexcept nogil:
    free(table.buckets)
    free(table.own_buckets)
