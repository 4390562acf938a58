# Which connections are kept for the next process, and what the slate says of them (slate.pxd).
#
# A connection is kept from connection_commit() until it is struck, or ends. One that does not
# simply go on is not kept: the next process could not prove in which state it was.

from proxyd.relay.half cimport half_delivered, half_keep_in_spill, half_note_spill, unsent_free
from proxyd.relay.parcel cimport record_fill
from proxyd.relay.position cimport socket_given, socket_taken
from proxyd.relay.slate cimport round_up, slate_slot, slate_spill, slot_index, slot_record
from proxyd.relay.slate_types cimport SLATE_UNIT, SLOT_SIZE, KeptHalf, Slate, Slot
from proxyd.relay.strike cimport connection_strike
from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, AF_UNIX, EALREADY, EBADF, EINVAL, EMSGSIZE, ENOSPC, EOPNOTSUPP, MADV_REMOVE,
    _SC_PAGESIZE, fence, free, int64_t, madvise, memset, pthread_mutex_lock, pthread_mutex_unlock,
    sysconf, uint32_t, uint64_t,
)
from proxyd.relay.types cimport (
    CONNECTED, DEAD, RIGHTS_MAYBE, RIGHTS_NONE, SHUT, Connection, Endpoint, Half, PumpContext,
)

cdef enum:
    SPILL_STAYS = 4096         # bytes of memory that a spill may leave to the next one in its place


# ── begin ────────────────────────────────────────────────────────────────────────────────────────

cdef inline int connection_keep(PumpContext *ctx, Connection *c) noexcept nogil:
    """Say all there is to say of a connection in a slot, and hold there what it holds; 0 or -errno.
    It is not kept before connection_commit(); if that does not follow, this is to be called again.
    """
    cdef Slate *slate = ctx.slate
    cdef int failure = connection_can_be_kept(slate, c)
    if failure < 0:
        return failure
    if c.slot == NULL:
        c.slot = slate_take_slot(slate)
        if c.slot == NULL:
            return -ENOSPC
    memset(c.slot, 0, SLOT_SIZE)
    half_move_to_spill(slate, c.slot, &c.up)
    half_move_to_spill(slate, c.slot, &c.down)
    record_fill(slot_record(c.slot), c)
    failure = half_note(&c.up)
    return half_note(&c.down) if failure == 0 else failure


cdef inline uint64_t connection_commit(Slate *slate, Connection *c) noexcept nogil:
    """It is kept from now on; its entry. Called with the lock of the slate."""
    slate.last_entry += 1
    slate.head.last_id = max(slate.head.last_id, <int64_t>c.id)
    fence()
    c.slot.entry = slate.last_entry
    fence()
    return slate.last_entry


cdef inline int connection_can_be_kept(const Slate *slate, const Connection *c) noexcept nogil:
    """0 or -errno."""
    cdef int failure
    if slate == NULL or c.slot != NULL and c.slot.entry != 0:
        return -EALREADY
    if c.state != CONNECTED:
        return -EINVAL
    failure = half_can_be_kept(slate, &c.up)
    if failure == 0:
        failure = half_can_be_kept(slate, &c.down)
    return failure


cdef inline int half_can_be_kept(const Slate *slate, const Half *half) noexcept nogil:
    """0 or -errno. What is asked of src is asked of dst in the other direction."""
    cdef const Endpoint *src = half.src
    if src.family == AF_UNIX:
        if not slate.notes_unix or not RIGHTS_NONE <= src.rights.state <= RIGHTS_MAYBE:
            return -EOPNOTSUPP
    elif src.family != AF_INET and src.family != AF_INET6:
        return -EOPNOTSUPP
    if src.error != 0 or src.gone or half.state == DEAD or half.lost > 0:
        return -EINVAL
    if half.pipe.filled > 0 and half.pipe.number == 0:
        return -EBADF
    return 0 if half.unsent_end - half.unsent_start <= slate.head.unit else -EMSGSIZE


cdef inline Slot *slate_take_slot(Slate *slate) noexcept nogil:
    """NULL: none is free."""
    cdef Slot *slot = NULL
    pthread_mutex_lock(&slate.lock)
    if slate.free_count > 0:
        slate.free_count -= 1
        slot = slate_slot(slate, slate.free_slots[slate.free_count])
    pthread_mutex_unlock(&slate.lock)
    return slot


cdef inline void half_move_to_spill(const Slate *slate, Slot *slot, Half *half) noexcept nogil:
    """From now on, what is unsent is in the spill, and what is there now as well."""
    cdef char *spill = slate_spill(slate, slot_index(slate, slot), half.direction)
    cdef char *unsent = half.unsent
    cdef size_t size = half.unsent_end - half.unsent_start
    if half.kept == NULL:
        half.kept = &slot.halves[half.direction]
        half.spill_limit = spill + slate.head.unit
        if size > 0:
            half_keep_in_spill(half, unsent + half.unsent_start, size)
        free(unsent)
    elif size > 0:
        half_note_spill(half)


cdef inline int half_note(Half *half) noexcept nogil:
    """Where it is in its stream; 0 or -errno. Nothing is owed to a dst that was sent the end."""
    cdef KeptHalf *kept = half.kept
    cdef uint64_t position = 0
    cdef int failure = 0
    kept.taken = half.moved + half.given
    kept.pipe = half.pipe.number if half.pipe.filled > 0 else 0
    if half.src.family != AF_UNIX:
        failure = socket_taken(half.src.fd, &position)
        kept.taken_offset = <int64_t>(kept.taken - position)
    if failure == 0 and half.state != SHUT and half.dst.family != AF_UNIX:
        failure = socket_given(half.dst.fd, &position)
        kept.given_offset = <int64_t>(half_delivered(half) - position)
    return -EOPNOTSUPP if failure == -EINVAL else failure  # the former is no state of ours


# ── end ──────────────────────────────────────────────────────────────────────────────────────────

cdef inline void connection_unkeep(Slate *slate, Connection *c) noexcept nogil:
    """It has ended, and its slot is another one's. What it still holds is dropped."""
    cdef uint32_t index
    if c.slot == NULL:
        return
    connection_strike(c)
    index = slot_index(slate, c.slot)
    half_leave_spill(&c.up)
    half_leave_spill(&c.down)
    c.slot = NULL
    pthread_mutex_lock(&slate.lock)
    slate.free_slots[slate.free_count] = index
    slate.free_count += 1
    pthread_mutex_unlock(&slate.lock)


cdef inline void half_leave_spill(Half *half) noexcept nogil:
    """Whatever memory it has left in the file is returned, unless that is little."""
    cdef size_t size = round_up(half.spill_most, SLATE_UNIT)
    unsent_free(half)
    if size > SPILL_STAYS:
        memory_return(half.spill_limit - size, half.spill_limit)
    half.kept = NULL
    half.spill_limit = NULL
    half.spill_most = 0


cdef inline void memory_return(char *begin, char *end) noexcept nogil:
    """All whole pages between them."""
    cdef size_t page = <size_t>sysconf(_SC_PAGESIZE)
    cdef size_t first = round_up(<size_t>begin, page)
    if first < <size_t>end:
        madvise(<char *>first, (<size_t>end - first) // page * page, MADV_REMOVE)
