# CLOCK_MONOTONIC.

from proxyd.relay.sys cimport CLOCK_MONOTONIC, clock_gettime, int64_t, timespec


cdef inline int64_t clock_ms() noexcept nogil:
    return clock_ns() // 1000000


cdef inline int64_t clock_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef inline int64_t earlier(int64_t one, int64_t other) noexcept nogil:
    """The earlier of two moments; one < 0 is never."""
    return other if one < 0 or other < one else one
