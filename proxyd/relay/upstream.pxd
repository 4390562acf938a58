# What is counted by target: bytes, ends, and the time that connects took.
#
# All workers count in the same place, once for each connection and not for each byte: what a
# connection has moved is added when it ends, and when a sweep passes it (sweep.pxd). So these
# numbers never go down, and none is added twice.

from proxyd.relay.clock cimport clock_ns
from proxyd.relay.half cimport half_delivered
from proxyd.relay.records cimport CONNECT_BUCKETS, UpstreamTotals
from proxyd.relay.sys cimport counter_add_shared, int64_t, uint64_t
from proxyd.relay.types cimport Connection, Half


cdef inline void connection_count_connect(Connection *c) noexcept nogil:
    """It is connected now."""
    if c.began_ns != 0:
        c.connect_us = (clock_ns() - c.began_ns) // 1000
    if c.connect_us >= 0:
        counter_add_shared(&c.origin.upstream.connects[connect_bucket(c.connect_us)], 1)
        counter_add_shared(&c.origin.upstream.connect_us, <uint64_t>c.connect_us)


cdef inline int connect_bucket(int64_t us) noexcept nogil:
    """The first one that is wide enough; the last one takes all that remain."""
    cdef int bucket = 0
    while bucket < CONNECT_BUCKETS - 1 and us > connect_bucket_us(bucket):
        bucket += 1
    return bucket


cdef inline int64_t connect_bucket_us(int bucket) noexcept nogil:
    """The longest time that falls into a bucket other than the last: 100, 250, 500, 1000 …"""
    cdef int64_t us = 100
    while bucket >= 3:
        us *= 10
        bucket -= 3
    if bucket == 0:
        return us
    return us * 5 // 2 if bucket == 1 else us * 5


cdef inline void connection_count_end(Connection *c) noexcept nogil:
    connection_count_bytes(c)
    counter_add_shared(&c.origin.upstream.endings[c.ending], 1)


cdef inline void connection_count_bytes(Connection *c) noexcept nogil:
    half_count_bytes(&c.up, c.origin.upstream)
    half_count_bytes(&c.down, c.origin.upstream)


cdef inline void half_count_bytes(Half *half, UpstreamTotals *upstream) noexcept nogil:
    cdef uint64_t delivered = half_delivered(half)
    if delivered != half.counted:
        counter_add_shared(&upstream.bytes[half.direction], delivered - half.counted)
        half.counted = delivered
