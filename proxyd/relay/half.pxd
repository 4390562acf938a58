# What a half holds: bytes taken from its source that its destination has not taken yet.

from proxyd.relay.pipe cimport pipe_close
from proxyd.relay.sys cimport ENOMEM, free, malloc, memcpy, uint64_t
from proxyd.relay.types cimport DEAD, SHUT, Half


cdef inline void half_abandon(Half *half) noexcept nogil:
    """dst cannot be written any more."""
    if half.state != SHUT:
        half.state = DEAD
    half.dst.refused |= half_held(half) > 0
    half_drop(half)


cdef inline void half_drop(Half *half) noexcept nogil:
    """Give up what is held, and the memory and fds that held it."""
    half.lost += half_held(half)
    pipe_close(&half.pipe)
    unsent_free(half)


cdef inline int half_keep(Half *half, const char *data, size_t size) noexcept nogil:
    """Keep bytes that dst did not take; 0 or -ENOMEM. Only while there are no unsent ones."""
    half.unsent = <char *>malloc(size)
    if half.unsent == NULL:
        return -ENOMEM
    memcpy(half.unsent, data, size)
    half.unsent_start = 0
    half.unsent_end = size
    return 0


cdef inline uint64_t half_delivered(const Half *half) noexcept nogil:
    """Bytes that dst has taken."""
    return half.moved + half.given - half.lost - half_held(half)


cdef inline size_t half_held(const Half *half) noexcept nogil:
    """Bytes taken from src and not yet given to dst."""
    return half.pipe.filled + (half.unsent_end - half.unsent_start)


cdef inline void unsent_free(Half *half) noexcept nogil:
    free(half.unsent)
    half.unsent = NULL
    half.unsent_start = half.unsent_end = 0
