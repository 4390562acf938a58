# Striking: a connection is no longer kept for the next process (slate.pxd).
#
# It comes before a fact is consumed that cannot be asked for again: an error, bytes that are thrown
# away, a socket that is shut down. If this process is killed from then on, the next one closes the
# sockets, and their guard (socket_guard) says how their peers see that.

from proxyd.relay.sys cimport uint64_t
from proxyd.relay.types cimport Connection, Half

cdef extern from * nogil:
    """
    /* Nothing that stands before it in the program comes after it, and vice versa. */
    #define entry_strike(place) ((void)__atomic_exchange_n((place), 0, __ATOMIC_SEQ_CST))
    """
    void entry_strike(uint64_t *place)


cdef inline void half_strike(Half *half) noexcept nogil:
    connection_strike(<Connection *>half.src.connection)


cdef inline void connection_strike(Connection *c) noexcept nogil:
    if c.slot != NULL and c.slot.entry != 0:
        entry_strike(&c.slot.entry)
