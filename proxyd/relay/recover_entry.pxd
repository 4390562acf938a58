# One connection of a killed process: whether it can go on, and where what is under way is.
#
# What is under way in a half is [given, taken): first what is in the spill, then what is in the
# pipe. For TCP the kernel says how much was taken and given, and it has to fit exactly. For UNIX
# sockets the slate says it. A half that does not fit is not guessed at: its connection is left out,
# and closing the last copies of its sockets resets it, as far as anything is owed (socket_guard()).
#
# A reset may have been read, and thereby forgotten, just before the kill. So a socket that has come
# to its end is not believed to have ended cleanly, unless something proves it: the FIN is a
# position, too, and the slate tells of an end that was passed on.

from proxyd.relay.parcel cimport (
    FD_CLIENT, FD_PIPE_UP, FD_TARGET, IS_READABLE, IS_WRITABLE, LAST_NONE, ParcelRecord,
    record_is_valid,
)
from proxyd.relay.position cimport socket_given, socket_state, socket_taken
from proxyd.relay.restore cimport record_pipe_is_right, record_socket_is_right
from proxyd.relay.slate cimport slate_slot, slate_spill, slot_record
from proxyd.relay.slate_types cimport KeptHalf, Slate, SlateHead
from proxyd.relay.socket cimport socket_unlinger
from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, AF_UNIX, FIONREAD, IPPROTO_TCP, SHUT_WR, SOL_SOCKET, SO_PROTOCOL, TCP_CLOSE,
    TCP_CLOSE_WAIT, TCP_ESTABLISHED, fstat, getsockopt, int64_t, ioctl, memcpy, memset, shutdown,
    socklen_t, stat_t, uint32_t, uint64_t,
)
from proxyd.relay.types cimport CONNECTED, FLOWING, RIGHTS_AHEAD, SHUT

ctypedef struct KeptEntry:     # a message of a page
    uint64_t entry
    uint32_t slot
    int fds[2]                 # client and target; -1: lost on the way
    bint dropped               # it was settled that it cannot go on
    bint used                  # what follows is valid
    int pipes[2]               # read ends; -1: none
    const char *unsent[2]
    ParcelRecord record

ctypedef struct KeptPipe:
    uint32_t number
    int fd                     # read end
    int halves                 # that name it

ctypedef struct Recovery:
    KeptEntry *entries
    uint64_t entry_count
    KeptPipe *pipes            # by number
    uint64_t pipe_count
    uint64_t upstreams         # indexes that a record may have
    int *fds                   # room for four of each entry: the descriptors of the records
    uint64_t dropped           # connections that cannot go on
    Slate slate
    SlateHead head             # as it was checked
    int64_t now_ms


cdef inline bint entry_recover(Recovery *work, KeptEntry *entry) noexcept nogil:
    """Whether it can go on; then its record is complete."""
    cdef int side
    if not entry_begin(work, entry):
        return False
    for side in range(2):
        if not (half_take_pipe(work, entry, side) and half_recover(work, entry, side)):
            return False
    if not record_is_valid(&entry.record, work.upstreams):
        return False
    for side in range(2):
        half_pass_end_on(entry, side)
    return True


cdef inline bint entry_is_valid(const Recovery *work, const KeptEntry *entry) noexcept nogil:
    """Whether its slot is still about it. Otherwise the connection has ended since."""
    return (entry.entry != 0 and entry.slot < work.head.slot_count
            and slate_slot(&work.slate, entry.slot).entry == entry.entry)


cdef inline bint entry_begin(Recovery *work, KeptEntry *entry) noexcept nogil:
    """Begin its record with what does not change, and all that is known to be nothing; whether
    these are its sockets, and in a state in which it can go on."""
    cdef ParcelRecord *record = &entry.record
    cdef const ParcelRecord *kept = slot_record(slate_slot(&work.slate, entry.slot))
    cdef int side
    memset(record, 0, sizeof(record[0]))
    memcpy(record, kept, sizeof(record[0]))
    record.fds = FD_CLIENT | FD_TARGET
    record.last = LAST_NONE
    record.reset = 0
    record.queue = record.drained = 0
    record.timer_ms = record.timeout_ms = record.progress_ms = 0
    record.recheck_ms = 0
    record.active_ms = work.now_ms
    for side in range(2):
        entry.pipes[side] = -1
        entry.unsent[side] = NULL
        record.errors[side] = 0
        record.flags[side] = IS_READABLE | IS_WRITABLE
        record.piped[side] = record.unsent[side] = record.lost[side] = 0
    if record.state != CONNECTED:
        return False
    for side in range(2):
        if not side_is_right(entry, side):
            return False
    return True


cdef inline bint side_is_right(KeptEntry *entry, int side) noexcept nogil:
    """Whether a socket is the right one, and can be gone on with. Sets the half towards it."""
    cdef ParcelRecord *record = &entry.record
    cdef int fd = entry.fds[side]
    cdef int towards = 1 - side
    cdef int state
    if record.halves[towards] > SHUT or record.rights[side] >= RIGHTS_AHEAD:
        return False
    if not record_socket_is_right(record, side, fd):
        return False
    if record.halves[towards] != SHUT:
        record.halves[towards] = FLOWING  # what has ended will end again
    if record.families[side] == AF_UNIX:
        return True
    if not is_tcp(record, side) or socket_protocol(fd) != IPPROTO_TCP:
        return False
    state = socket_state(fd)
    if state < TCP_ESTABLISHED:
        return False
    if state != TCP_ESTABLISHED and state != TCP_CLOSE_WAIT and state != TCP_CLOSE:
        record.halves[towards] = SHUT  # the kernel has our end
    return state != TCP_CLOSE or record.halves[towards] == SHUT


cdef inline bint half_take_pipe(Recovery *work, KeptEntry *entry, int side) noexcept nogil:
    """Whether it is known what its pipe has, if it has one."""
    cdef uint32_t number = slate_slot(&work.slate, entry.slot).halves[side].pipe
    cdef KeptPipe *pipe = recovery_pipe(work, number)
    cdef stat_t about
    cdef int filled = 0
    if number == 0:
        return True
    if pipe == NULL or pipe.halves > 1 or ioctl(pipe.fd, FIONREAD, &filled) < 0 or filled < 0:
        return False
    if filled == 0:
        return True
    if fstat(pipe.fd, &about) < 0:
        return False
    entry.pipes[side] = pipe.fd
    entry.record.fds |= FD_PIPE_UP << side
    entry.record.inodes[side] = about.st_ino
    entry.record.piped[side] = <uint64_t>filled
    return record_pipe_is_right(&entry.record, side, pipe.fd)


cdef inline KeptPipe *recovery_pipe(Recovery *work, uint32_t number) noexcept nogil:
    """The pipe of this number; NULL: there is none."""
    cdef uint64_t low = 0, high = work.pipe_count, middle
    while low < high:
        middle = (low + high) // 2
        if work.pipes[middle].number < number:
            low = middle + 1
        else:
            high = middle
    if number == 0 or low == work.pipe_count or work.pipes[low].number != number:
        return NULL
    return &work.pipes[low]


cdef inline bint half_recover(Recovery *work, KeptEntry *entry, int side) noexcept nogil:
    """Whether all that is under way is known; then the record says where it is."""
    cdef const KeptHalf *kept = &slate_slot(&work.slate, entry.slot).halves[side]
    cdef uint64_t held = 0, end = kept.taken, given = 0
    if kept.spill_size > work.head.unit:
        return False
    if entry.record.halves[side] != SHUT and is_tcp(&entry.record, side) and not half_end(
            entry, side, kept, &end):
        return False
    if entry.record.halves[side] == SHUT:  # all is given; `end` may be less, which does no harm
        if entry.record.piped[side] > 0 or (
                kept.spill_size > 0 and not is_tcp(&entry.record, 1 - side)):
            return False
    elif is_tcp(&entry.record, 1 - side):
        if not half_given(entry, side, kept, &given):
            return False
        held = end - given
        if given > end or held > 0 and not spill_covers(kept, given, end):
            return False
        if kept.spill_size > 0 and kept.spill_end > end:
            return False
        if entry.record.piped[side] > 0 and not is_tcp(&entry.record, side):
            return False  # such a half copies only
    else:
        held = kept.spill_size
        if not is_tcp(&entry.record, side):
            end = kept.spill_end if held > 0 else end
        elif held > 0 and kept.spill_end != end:
            return False
        elif socket_state(entry.fds[side]) == TCP_CLOSE and (
                entry.record.piped[side] > 0 or kept.taken != end):
            return False  # that there was a FIN is only proved if nothing is on its way
    if held > end or end + entry.record.piped[side] < entry.record.given[side]:
        return False
    entry.unsent[side] = slate_spill(&work.slate, entry.slot, side) + work.head.unit - held
    entry.record.unsent[side] = held
    entry.record.counted[side] = end - held
    entry.record.moved[side] = end + entry.record.piped[side] - entry.record.given[side]
    return True


cdef inline bint spill_covers(
    const KeptHalf *kept, uint64_t given, uint64_t end
) noexcept nogil:
    return kept.spill_end == end and end - given <= kept.spill_size


cdef inline bint half_end(
    const KeptEntry *entry, int side, const KeptHalf *kept, uint64_t *end
) noexcept nogil:
    """The position behind what TCP has delivered to us, without what is in the pipe."""
    if socket_taken(entry.fds[side], end) < 0:
        return False
    end[0] += <uint64_t>kept.taken_offset - entry.record.piped[side]
    return True


cdef inline bint half_given(
    const KeptEntry *entry, int side, const KeptHalf *kept, uint64_t *given
) noexcept nogil:
    """The position behind what we have given to TCP."""
    if socket_given(entry.fds[1 - side], given) < 0:
        return False
    given[0] += <uint64_t>kept.given_offset
    return True


cdef inline void half_pass_end_on(const KeptEntry *entry, int side) noexcept nogil:
    """The slot says so before it is done: it may have been killed in between."""
    if entry.record.halves[side] != SHUT:
        return
    if is_tcp(&entry.record, 1 - side):
        socket_unlinger(entry.fds[1 - side])
    shutdown(entry.fds[1 - side], SHUT_WR)


cdef inline bint is_tcp(const ParcelRecord *record, int side) noexcept nogil:
    return record.families[side] == AF_INET or record.families[side] == AF_INET6


cdef inline int socket_protocol(int fd) noexcept nogil:
    cdef int protocol = -1
    cdef socklen_t size = sizeof(protocol)
    getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &size)
    return protocol
