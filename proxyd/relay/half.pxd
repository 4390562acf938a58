# What a half holds: bytes taken from its source that its destination has not taken yet.
#
# Those that are unsent are in memory of their own. If the half is kept for the next process, they
# are in the spill of its slot instead, at the end of it (slate.pxd).

from proxyd.relay.pipe cimport pipe_drop
from proxyd.relay.sys cimport ENOMEM, fence, free, malloc, memcpy, uint32_t, uint64_t
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
    pipe_drop(&half.pipe)
    unsent_free(half)


cdef inline int half_keep(Half *half, const char *data, size_t size) noexcept nogil:
    """Keep bytes that dst did not take; 0 or -ENOMEM. Only while there are no unsent ones."""
    if half.kept != NULL:
        half_keep_in_spill(half, data, size)
        return 0
    half.unsent = <char *>malloc(size)
    if half.unsent == NULL:
        return -ENOMEM
    memcpy(half.unsent, data, size)
    half.unsent_start = 0
    half.unsent_end = size
    return 0


cdef inline void half_keep_in_spill(Half *half, const char *data, size_t size) noexcept nogil:
    """It is large enough for the largest of all copies."""
    half.spill_most = max(half.spill_most, size)
    half.unsent = half.spill_limit - size
    half.unsent_start = 0
    half.unsent_end = size
    memcpy(half.unsent, data, size)
    half_note_spill(half)


cdef inline void half_took_unsent(Half *half, size_t size) noexcept nogil:
    """dst has taken that much of what is unsent."""
    half.unsent_start += size
    if half.kept != NULL:
        half_note_spill(half)
    if half.unsent_start == half.unsent_end:
        unsent_free(half)


cdef inline void half_note_spill(Half *half) noexcept nogil:
    """Say what is in the spill: `spill_size` is what makes it valid."""
    fence()
    half.kept.spill_end = half.moved + half.given - half.pipe.filled
    fence()
    half.kept.spill_size = <uint32_t>(half.unsent_end - half.unsent_start)
    fence()


cdef inline uint64_t half_delivered(const Half *half) noexcept nogil:
    """Bytes that dst has taken."""
    return half.moved + half.given - half.lost - half_held(half)


cdef inline size_t half_held(const Half *half) noexcept nogil:
    """Bytes taken from src and not yet given to dst."""
    return half.pipe.filled + (half.unsent_end - half.unsent_start)


cdef inline void unsent_free(Half *half) noexcept nogil:
    """What the slot says is left as it is: perhaps another process goes on from there."""
    if half.kept == NULL:
        free(half.unsent)
    half.unsent = NULL
    half.unsent_start = half.unsent_end = 0
