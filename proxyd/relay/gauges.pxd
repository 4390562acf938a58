# What the relays of one program count together, whichever thread they run in.

from proxyd.relay.sys cimport int64_t, moment_set, shared_add, shared_get, shared_set

ctypedef struct Tally:
    int open                   # connections, from connect(2) until closed or given back
    int late                   # of ended ones, and strays: what the quarantine has yet to close
    int wake_at                # the boss sleeps, and wants to hear when `open` falls to this
    int64_t ended_ms           # when a connection last ended
    int failure                # errno of a relay that cannot go on; 0: none


cdef inline int tally_open(Tally *tally) noexcept nogil:
    return shared_get(&tally.open)


cdef inline int tally_late(Tally *tally) noexcept nogil:
    return shared_get(&tally.late)


cdef inline int tally_places(Tally *tally) noexcept nogil:
    """How much of the limit is taken."""
    return tally_open(tally) + tally_late(tally)


cdef inline void tally_join(Tally *tally) noexcept nogil:
    shared_add(&tally.open, 1)


cdef inline bint tally_leave(Tally *tally, int64_t now_ms) noexcept nogil:
    """One connection less. Whether the boss wants to hear of it.

    The boss says so and looks at `open` once more before it sleeps; here it is the other way
    round. So one of the two always sees the other.
    """
    moment_set(&tally.ended_ms, now_ms)
    return shared_add(&tally.open, -1) == shared_get(&tally.wake_at)


cdef inline void tally_wake_at(Tally *tally, int count) noexcept nogil:
    shared_set(&tally.wake_at, count)
