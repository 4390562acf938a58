# What the workers of the program count together, whichever thread they run in.

from proxyd.relay.sys cimport atomic_add, atomic_get, atomic_set, int64_t, moment_set
from proxyd.relay.types cimport Gauges


cdef inline int gauges_places(Gauges *gauges) noexcept nogil:
    """How many places of the limit are taken."""
    return gauges_connections(gauges) + gauges_in_quarantine(gauges)


cdef inline int gauges_connections(Gauges *gauges) noexcept nogil:
    return atomic_get(&gauges.connections)


cdef inline int gauges_in_quarantine(Gauges *gauges) noexcept nogil:
    return atomic_get(&gauges.in_quarantine)


cdef inline void gauges_add_connection(Gauges *gauges) noexcept nogil:
    atomic_add(&gauges.connections, 1)


cdef inline bint gauges_remove_connection(Gauges *gauges, int64_t now_ms) noexcept nogil:
    """One connection less. Whether the main worker is to be woken.

    The main worker stores the number at which it wants to be woken and then looks at `connections`
    once more before it sleeps; here it is the other way round. So one of the two always sees the
    other."""
    moment_set(&gauges.last_end_ms, now_ms)
    return atomic_add(&gauges.connections, -1) == atomic_get(&gauges.wake_at_count)


cdef inline void gauges_set_wake_at_count(Gauges *gauges, int count) noexcept nogil:
    atomic_set(&gauges.wake_at_count, count)
