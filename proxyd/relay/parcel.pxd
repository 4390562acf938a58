# A parcel: connections that rest, as records in a file, for another relay to go on with them.
#
#   ParcelHead                 what follows, and how much of it
#   ParcelRecord × count       a connection each; the next record is `record_size` bytes further
#   bytes                      those that records have `unsent`, in the order of the records
#
# The descriptors come beside the file, in the order of the records: of each the client, the target,
# and the read ends of the pipes up and down, as far as `fds` says that it has them.
#
# A later version may have longer records: what is behind the known part is not read. Where a record
# is shorter, the rest is zero. What cannot be left out is another magic number.
#
# A parcel is input, and nothing in it is believed: record_is_valid() checks every number, and
# restore.pxd every descriptor.

from proxyd.relay.records cimport Peer
from proxyd.relay.socket cimport socket_cookie
from proxyd.relay.sys cimport (
    EINTR, EIO, EPROTO, errno, fstat, int32_t, int64_t, memset, pread, pwrite, stat_t, uint32_t,
    uint64_t, uint8_t,
)
from proxyd.relay.types cimport (
    DEAD, LINGERING, RIGHTS_ANY, SHUT, Connection, Endpoint, Half, SelfConnectKey,
)

cdef enum:
    PARCEL_MAGIC = 0x31637270  # "prc1"
    BYTES_BITS = 48            # of any count of bytes
    ERRNO_MAX = 4095
    RECHECK_MS_MAX = 128       # LINGER_MAX_MS

# the descriptors of a record, bits, in their order
cdef enum:
    FD_CLIENT = 1
    FD_TARGET = 2
    FD_PIPE_UP = 4
    FD_PIPE_DOWN = 8
    FDS_MAX = 4

# what is known of an endpoint, bits
cdef enum:
    IS_READABLE = 1
    IS_WRITABLE = 2
    IS_ENDING = 4
    IS_URGENT = 8
    IS_ENDED = 16
    IS_GONE = 32
    IS_REFUSED = 64
    IS_ARMED = 128

# ParcelRecord.last
cdef enum:
    LAST_NONE, LAST_CLIENT, LAST_TARGET

ctypedef struct ParcelHead:
    uint32_t magic             # PARCEL_MAGIC
    uint32_t record_size       # bytes from one record to the next
    uint64_t count             # of records
    uint64_t fds               # of all records
    uint64_t unsent            # bytes behind the records
    int64_t last_id            # of a connection

# Arrays of two: the client and the target, or the halves up and down. The order leaves no gaps.
ctypedef struct ParcelRecord:
    int64_t id
    uint64_t cookies[2]        # SO_COOKIE of the sockets
    uint64_t inodes[2]         # of the pipes
    uint64_t piped[2]          # bytes in the pipes
    uint64_t unsent[2]         # … and behind the records
    uint64_t moved[2]          # as in Half
    uint64_t given[2]
    uint64_t lost[2]
    uint64_t counted[2]
    uint64_t queue             # this and the following as in Connection
    uint64_t drained
    int64_t opened_ms
    int64_t active_ms
    int64_t began_ns
    int64_t connect_us
    int64_t timer_ms
    int64_t timeout_ms
    int64_t progress_ms
    int32_t recheck_ms
    int32_t held_ms
    int32_t listener
    int32_t upstream           # index
    int32_t errors[2]          # errno that ended the socket
    int32_t rights_left[2]
    SelfConnectKey local       # port 0: none
    SelfConnectKey remote
    Peer peer                  # the client
    uint8_t fds                # FD_*
    uint8_t state              # CONNECTING …
    uint8_t last               # LAST_*
    uint8_t reset
    uint8_t halves[2]          # FLOWING …
    uint8_t rights[2]          # RIGHTS_*
    uint8_t flags[2]           # IS_*
    uint8_t families[2]        # AF_*


# ── from a connection ────────────────────────────────────────────────────────────────────────────

cdef inline void record_fill(ParcelRecord *record, const Connection *c) noexcept nogil:
    memset(record, 0, sizeof(record[0]))
    record.id = c.id
    record.state = <uint8_t>c.state
    record.reset = c.reset
    record.queue = c.queue
    record.drained = c.drained
    record.opened_ms = c.opened_ms
    record.active_ms = c.active_ms
    record.began_ns = c.began_ns
    record.connect_us = c.connect_us
    record.timer_ms = c.timer_ms
    record.timeout_ms = c.timeout_ms
    record.progress_ms = c.progress_ms
    record.recheck_ms = c.recheck_ms
    record.held_ms = c.origin.held_ms
    record.listener = c.origin.listener
    record.upstream = c.origin.upstream.index
    record.peer = c.origin.peer
    record.local = c.self_connect.local
    record.remote = c.self_connect.remote
    if c.state == LINGERING:
        record.last = LAST_CLIENT if c.last == &c.client else LAST_TARGET
    record_fill_side(record, 0, &c.client, &c.up)
    record_fill_side(record, 1, &c.target, &c.down)


cdef inline void record_fill_side(
    ParcelRecord *record, int side, const Endpoint *end, const Half *half
) noexcept nogil:
    """One socket, and the half that it is the source of."""
    cdef stat_t about
    record.errors[side] = end.error
    record.rights[side] = end.rights.state
    record.rights_left[side] = end.rights.left
    record.flags[side] = endpoint_flags(end)
    record.families[side] = <uint8_t>end.family
    record.halves[side] = <uint8_t>half.state
    record.moved[side] = half.moved
    record.given[side] = half.given
    record.lost[side] = half.lost
    record.counted[side] = half.counted
    record.unsent[side] = half.unsent_end - half.unsent_start
    if end.fd >= 0:
        record.fds |= FD_CLIENT << side
        record.cookies[side] = socket_cookie(end.fd)
    if half.pipe.filled > 0:
        record.fds |= FD_PIPE_UP << side
        record.piped[side] = half.pipe.filled
        if fstat(half.pipe.rd, &about) == 0:
            record.inodes[side] = about.st_ino


cdef inline uint8_t endpoint_flags(const Endpoint *end) noexcept nogil:
    return <uint8_t>(
        IS_READABLE * (end.readable != 0) | IS_WRITABLE * (end.writable != 0)
        | IS_ENDING * (end.ending != 0) | IS_URGENT * (end.urgent != 0)
        | IS_ENDED * (end.ended != 0) | IS_GONE * (end.gone != 0)
        | IS_REFUSED * (end.refused != 0) | IS_ARMED * (end.armed != 0))


cdef inline int record_take_fds(
    const ParcelRecord *record, const Connection *c, int *fds
) noexcept nogil:
    """The descriptors of a record, in order; how many there are."""
    cdef int count = 0
    if record.fds & FD_CLIENT:
        fds[count] = c.client.fd
        count += 1
    if record.fds & FD_TARGET:
        fds[count] = c.target.fd
        count += 1
    if record.fds & FD_PIPE_UP:
        fds[count] = c.up.pipe.rd
        count += 1
    if record.fds & FD_PIPE_DOWN:
        fds[count] = c.down.pipe.rd
        count += 1
    return count


# ── what is believed ─────────────────────────────────────────────────────────────────────────────

cdef inline bint record_is_valid(const ParcelRecord *record, uint64_t upstreams) noexcept nogil:
    """Whether its numbers can be those of a connection."""
    cdef int open = record.fds & (FD_CLIENT | FD_TARGET)
    if record.id <= 0 or record.fds >= 1 << FDS_MAX or record.reset > 1:
        return False
    if not 0 <= record.upstream < <int64_t>upstreams:
        return False
    if record.peer.size > sizeof(record.peer.address):
        return False
    if record.state == LINGERING:
        if not (record.last == LAST_CLIENT and open == FD_CLIENT
                or record.last == LAST_TARGET and open == FD_TARGET):
            return False
    elif record.state > LINGERING or record.last != LAST_NONE or open != FD_CLIENT | FD_TARGET:
        return False
    return (record_times_are_valid(record) and record_side_is_valid(record, 0)
            and record_side_is_valid(record, 1))


cdef inline bint record_times_are_valid(const ParcelRecord *record) noexcept nogil:
    """What is later than now is corrected later."""
    if record.opened_ms < 0 or record.active_ms < 0 or record.began_ns < 0:
        return False
    if record.connect_us < -1 or record.timer_ms < 0 or record.timeout_ms < 0:
        return False
    return (record.progress_ms >= 0 and record.held_ms >= 0
            and 0 <= record.recheck_ms <= RECHECK_MS_MAX)


cdef inline bint record_side_is_valid(const ParcelRecord *record, int side) noexcept nogil:
    cdef uint64_t held
    cdef uint64_t all_bits = (
        record.piped[side] | record.unsent[side] | record.moved[side] | record.given[side]
        | record.lost[side] | record.counted[side])
    if all_bits >> BYTES_BITS != 0:
        return False
    held = record.piped[side] + record.unsent[side]
    if record.lost[side] + held + record.counted[side] > record.moved[side] + record.given[side]:
        return False
    if (record.piped[side] > 0) != (record.fds & FD_PIPE_UP << side != 0):
        return False
    if record.halves[side] > DEAD:
        return False
    if held > 0 and (record.state == LINGERING or record.halves[side] >= SHUT):
        return False
    if not 0 <= record.errors[side] <= ERRNO_MAX or record.rights[side] > RIGHTS_ANY:
        return False
    return record.rights[side] != RIGHTS_ANY or record.rights_left[side] >= 0


cdef inline int record_fd_count(const ParcelRecord *record) noexcept nogil:
    """How many of the descriptors are its own."""
    cdef int fds = record.fds
    return (fds & 1) + (fds >> 1 & 1) + (fds >> 2 & 1) + (fds >> 3 & 1)


# ── the file ─────────────────────────────────────────────────────────────────────────────────────

cdef inline int file_read(int file, void *data, size_t size, int64_t offset) noexcept nogil:
    """All of it; 0 or -errno."""
    cdef ssize_t got
    while size > 0:
        got = pread(file, data, size, offset)
        if got < 0 and errno == EINTR:
            continue
        if got <= 0:
            return -errno if got < 0 else -EPROTO
        data = <char *>data + got
        size -= <size_t>got
        offset += got
    return 0


cdef inline int file_write(int file, const void *data, size_t size, int64_t offset) noexcept nogil:
    """All of it; 0 or -errno."""
    cdef ssize_t put
    while size > 0:
        put = pwrite(file, data, size, offset)
        if put < 0 and errno == EINTR:
            continue
        if put <= 0:
            return -errno if put < 0 else -EIO
        data = <const char *>data + put
        size -= <size_t>put
        offset += put
    return 0
