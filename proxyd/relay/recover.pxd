# Recovery: what a killed process has left (slate.pxd) becomes a parcel (parcel.pxd), and its reader
# goes on with that as after a restart.
#
#   intents     of each worker: what it was in the middle of is settled in the slate itself. Killed
#               at any point of that, the next process settles the same again
#   entries     of each message in a page: a slot and its two sockets. It becomes a record, if all
#               that is under way is known (recover_entry.pxd)
#   file        the records, and the bytes that are in spills
#
# The slate is input, and no number in it is believed.

from proxyd.relay.clock cimport clock_ms
from proxyd.relay.freeze cimport ID_BITS
from proxyd.relay.parcel cimport FDS_MAX, PARCEL_MAGIC, ParcelHead, ParcelRecord, file_write
from proxyd.relay.position cimport socket_state
from proxyd.relay.recover_entry cimport (
    KeptEntry, KeptPipe, Recovery, entry_begin, entry_is_valid, entry_recover, half_end, half_given,
    half_take_pipe, is_tcp, recovery_pipe,
)
from proxyd.relay.slate cimport (
    slate_buffer, slate_check, slate_intent, slate_size, slate_slot, slate_spill,
)
from proxyd.relay.slate_types cimport (
    INTENT_COPY, INTENT_FLUSH, INTENT_SPLICE, Intent, KeptHalf,
)
from proxyd.relay.sys cimport (
    ENOMEM, EPROTO, MAP_FAILED, MAP_SHARED, POLLHUP, PROT_READ, PROT_WRITE, TCP_CLOSE, calloc,
    errno, fence, free, int64_t, memcpy, memset, mmap, munmap, poll, pollfd, uint32_t, uint64_t,
    uint8_t,
)
from proxyd.relay.types cimport SHUT

cdef inline int64_t slate_recover(
    Recovery *work, int slate, int file, int64_t offset
) noexcept nogil:
    """Write a parcel into `file`, from `offset` to its end. The number of descriptors in work.fds,
    or -errno; -EPROTO: it is no slate. Nothing is closed."""
    cdef int64_t result = recovery_begin(work, slate)
    if result == 0:
        recovery_count_pipes(work)
        recovery_settle(work)
        result = recovery_decide(work)
    if result == 0:
        result = recovery_write(work, file, offset)
    if work.slate.map != NULL:
        munmap(work.slate.map, work.slate.size)
    return result


cdef inline int recovery_begin(Recovery *work, int slate) noexcept nogil:
    """Map it; 0 or -errno."""
    cdef void *place
    cdef int failure = slate_check(slate, &work.head)
    if failure < 0:
        return failure
    if work.head.last_id < 0 or work.head.last_id >> ID_BITS != 0:
        return -EPROTO
    work.slate.size = slate_size(&work.head)
    place = mmap(NULL, work.slate.size, PROT_READ | PROT_WRITE, MAP_SHARED, slate, 0)
    if place == MAP_FAILED:
        return -errno
    work.slate.map = <char *>place
    work.slate.head = &work.head
    work.now_ms = clock_ms()
    return 0


cdef inline void recovery_count_pipes(Recovery *work) noexcept nogil:
    """A pipe is of one half: if two name it, nobody knows whose bytes it has."""
    cdef KeptPipe *pipe
    cdef uint64_t i
    cdef int side
    for i in range(work.pipe_count):
        work.pipes[i].halves = 0
    for i in range(work.entry_count):
        if not entry_is_valid(work, &work.entries[i]):
            continue
        for side in range(2):
            pipe = recovery_pipe(
                work, slate_slot(&work.slate, work.entries[i].slot).halves[side].pipe)
            if pipe != NULL:
                pipe.halves += 1


# ── intents ──────────────────────────────────────────────────────────────────────────────────────

cdef inline void recovery_settle(Recovery *work) noexcept nogil:
    cdef uint32_t i
    for i in range(work.head.worker_count):
        intent_settle(work, i)


cdef inline void intent_settle(Recovery *work, uint32_t worker) noexcept nogil:
    """Have the slot say what an intent says, before that is void."""
    cdef Intent *intent = slate_intent(&work.slate, worker)
    cdef uint32_t half = intent.half
    cdef KeptEntry *entry
    if half == 0:
        return
    if half - 1 < 2 * work.head.slot_count:
        entry = recovery_find(work, (half - 1) // 2)
        if entry != NULL and not (
                intent_is_alone(work, half) and entry_begin(work, entry)
                and half_settle(work, entry, <int>((half - 1) % 2), worker)):
            entry.dropped = True
            slate_slot(&work.slate, entry.slot).entry = 0
    fence()
    intent.half = 0


cdef inline KeptEntry *recovery_find(Recovery *work, uint32_t slot) noexcept nogil:
    """What is now in this slot; NULL: nothing that was found in a page."""
    cdef uint64_t i
    for i in range(work.entry_count):
        if work.entries[i].slot == slot and entry_is_valid(work, &work.entries[i]):
            return &work.entries[i]
    return NULL


cdef inline bint intent_is_alone(const Recovery *work, uint32_t half) noexcept nogil:
    """Whether only one worker was at this half."""
    cdef uint32_t i
    cdef int count = 0
    for i in range(work.head.worker_count):
        count += slate_intent(&work.slate, i).half == half
    return count == 1


cdef inline bint half_settle(
    Recovery *work, KeptEntry *entry, int side, uint32_t worker
) noexcept nogil:
    """Whether it could be what it says, and no error was read that nobody knows of now."""
    cdef Intent *intent = slate_intent(&work.slate, worker)
    cdef KeptHalf *kept = &slate_slot(&work.slate, entry.slot).halves[side]
    if entry.record.halves[side] == SHUT or not half_take_pipe(work, entry, side):
        return False
    if socket_is_gone(entry, 1 - side):
        return False
    if intent.what == INTENT_COPY:
        return half_settle_copy(work, entry, side, worker)
    if intent.what == INTENT_FLUSH:
        return is_tcp(&entry.record, 1 - side) or half_settle_flush(work, kept, intent)
    if intent.what == INTENT_SPLICE:
        return entry.record.piped[side] > 0 or not socket_is_gone(entry, side)
    return False


cdef inline bint half_settle_copy(
    Recovery *work, KeptEntry *entry, int side, uint32_t worker
) noexcept nogil:
    """What counts is the buffer: its bytes are those from `position` on."""
    cdef Intent *intent = slate_intent(&work.slate, worker)
    cdef KeptHalf *kept = &slate_slot(&work.slate, entry.slot).halves[side]
    cdef uint64_t begin = intent.position
    cdef uint64_t end = begin + intent.taken.msg_len
    cdef uint64_t given = begin + intent.given.msg_len
    cdef uint64_t size
    if is_tcp(&entry.record, side):
        if not half_end(entry, side, kept, &end):
            return False
    elif entry.record.piped[side] > 0:
        return False
    if is_tcp(&entry.record, 1 - side) and not half_given(entry, side, kept, &given):
        return False
    if not begin <= given <= end or end - begin > work.head.unit:
        return False
    if (end == begin or is_tcp(&entry.record, side)) and socket_is_gone(entry, side):
        return False
    size = end - given
    memcpy(slate_spill(&work.slate, entry.slot, side) + work.head.unit - size,
           slate_buffer(&work.slate, worker) + (given - begin), size)
    fence()
    kept.spill_end = end
    fence()
    kept.spill_size = <uint32_t>size
    fence()
    kept.taken = end
    return True


cdef inline bint half_settle_flush(
    const Recovery *work, KeptHalf *kept, const Intent *intent
) noexcept nogil:
    """The kernel has noted how much of the spill a UNIX socket has taken."""
    cdef uint64_t given = intent.position + intent.given.msg_len
    if given > kept.spill_end or kept.spill_end - given > work.head.unit:
        return False
    kept.spill_size = <uint32_t>(kept.spill_end - given)
    return True


cdef inline bint socket_is_gone(const KeptEntry *entry, int side) noexcept nogil:
    """Whether its end, or an error that it had, may be what was read just now. In that state the
    position of TCP is not exact either."""
    cdef pollfd event
    if is_tcp(&entry.record, side):
        return socket_state(entry.fds[side]) == TCP_CLOSE
    event.fd = entry.fds[side]
    event.events = 0
    event.revents = 0
    poll(&event, 1, 0)
    return event.revents & POLLHUP != 0


# ── entries ──────────────────────────────────────────────────────────────────────────────────────

cdef inline int recovery_decide(Recovery *work) noexcept nogil:
    """Find out which can go on; 0 or -errno."""
    cdef uint8_t *seen = <uint8_t *>calloc(work.head.slot_count, 1)
    cdef KeptEntry *entry
    cdef uint64_t i
    if seen == NULL:
        return -ENOMEM
    for i in range(work.entry_count):
        entry = &work.entries[i]
        if entry.dropped:
            work.dropped += 1
        if not entry_is_valid(work, entry) or seen[entry.slot]:
            continue
        seen[entry.slot] = 1
        entry.used = entry_recover(work, entry)
        work.dropped += not entry.used
    free(seen)
    return 0


# ── the file ─────────────────────────────────────────────────────────────────────────────────────

cdef inline int64_t recovery_write(Recovery *work, int file, int64_t offset) noexcept nogil:
    """As connections_export()."""
    cdef ParcelHead head
    cdef int64_t at = offset + <int64_t>sizeof(head)
    cdef int64_t bytes_at
    cdef uint64_t i
    cdef int failure = 0
    memset(&head, 0, sizeof(head))
    head.magic = PARCEL_MAGIC
    head.record_size = sizeof(ParcelRecord)
    head.last_id = work.head.last_id
    for i in range(work.entry_count):
        head.count += work.entries[i].used
    bytes_at = at + <int64_t>(head.count * sizeof(ParcelRecord))
    for i in range(work.entry_count):
        if failure == 0 and work.entries[i].used:
            failure = entry_write(work, &work.entries[i], file, at, bytes_at, &head)
            at += <int64_t>sizeof(ParcelRecord)
    if failure == 0:
        failure = file_write(file, &head, sizeof(head), offset)
    return failure if failure < 0 else <int64_t>head.fds


cdef inline int entry_write(
    Recovery *work, const KeptEntry *entry, int file, int64_t at, int64_t bytes_at,
    ParcelHead *head
) noexcept nogil:
    """A record, its bytes, and its descriptors; 0 or -errno."""
    cdef int fds[FDS_MAX]
    cdef int i
    cdef int failure = file_write(file, &entry.record, sizeof(entry.record), at)
    for i in range(2):
        fds[i] = entry.fds[i]
        fds[2 + i] = entry.pipes[i]
        if failure == 0:
            failure = file_write(file, entry.unsent[i], entry.record.unsent[i],
                                 bytes_at + <int64_t>head.unsent)
        head.unsent += entry.record.unsent[i]
    for i in range(FDS_MAX):
        if entry.record.fds & 1 << i:
            work.fds[head.fds] = fds[i]
            head.fds += 1
    head.last_id = max(head.last_id, entry.record.id)
    return failure
