# A connection, made of a record of a parcel (parcel.pxd) and its descriptors.
#
# The sockets are asked whether they are those that the record is about, by the kernel's cookie, and
# the pipes by their inode: bytes must never go to another client, whatever went wrong on the way.

from proxyd.relay.close cimport connection_free
from proxyd.relay.connect cimport connection_new, worker_hang_up
from proxyd.relay.half cimport half_held
from proxyd.relay.parcel cimport (
    FDS_MAX, FD_CLIENT, IS_ARMED, IS_ENDED, IS_ENDING, IS_GONE, IS_READABLE, IS_REFUSED, IS_URGENT,
    IS_WRITABLE, LAST_CLIENT, LAST_NONE, RECHECK_MS_MAX, ParcelRecord, file_read,
)
from proxyd.relay.records cimport SOURCE_WORDS, Peer, Source
from proxyd.relay.self_connect cimport self_connect_enter
from proxyd.relay.sender cimport is_sender
from proxyd.relay.socket cimport socket_cookie, socket_stream_family
from proxyd.relay.source cimport source_of_client, source_take_place
from proxyd.relay.sys cimport (
    AF_UNIX, AF_UNSPEC, ENOMEM, FIONREAD, F_GETFL, F_SETFL, O_NONBLOCK, S_ISFIFO, close, fcntl,
    fstat, getpeername, int64_t, ioctl, malloc, memcmp, memcpy, memset, sockaddr, sockaddr_storage,
    socklen_t, stat_t, uint32_t, uint64_t,
)
from proxyd.relay.types cimport CONNECTING, Connection, Endpoint, Half, Worker


cdef inline Connection *connection_restore(
    Worker *worker, const ParcelRecord *record, const int *fds, int file, int64_t offset,
    int64_t now_ms
) noexcept nogil:
    """A connection that rests, of a valid record and its descriptors; `offset`: of its bytes in
    `file`. The caller sets its origin.

    NULL: it cannot go on, and its peers have been told, since a descriptor is missing, or another
    one, or there is no memory. The descriptors are owned in either case."""
    cdef Connection *c
    cdef int each[FDS_MAX]     # -1: none
    cdef int i, count = 0
    cdef bint good = True
    for i in range(FDS_MAX):
        each[i] = -1
        if record.fds & 1 << i:
            each[i] = fds[count]
            count += 1
    for i in range(2):
        good = (good and record_socket_is_right(record, i, each[i])
                and record_pipe_is_right(record, i, each[2 + i]))
    if good:
        c = connection_new(
            worker, each[0], record.families[0], each[1], record.families[1], NULL, 0)
        if c != NULL and record_restore_bytes(record, c, &each[2], file, offset) == 0:
            record_restore(worker, record, c, now_ms)
            return c
        if c != NULL:
            connection_free(c)
    for i in range(FDS_MAX):
        descriptor_reset(worker, each[i])
    return NULL


cdef inline bint record_socket_is_right(
    const ParcelRecord *record, int side, int fd
) noexcept nogil:
    """Whether it is the socket of the record; or the record has none."""
    if not record.fds & FD_CLIENT << side:
        return True
    return (fd >= 0 and socket_cookie(fd) == record.cookies[side]
            and socket_stream_family(fd) == record.families[side] and descriptor_unblock(fd))


cdef inline bint record_pipe_is_right(const ParcelRecord *record, int side, int fd) noexcept nogil:
    """Whether it is the pipe of the record, with its bytes; or the record has none."""
    cdef stat_t about
    cdef int filled = 0
    if record.piped[side] == 0:
        return True
    if fd < 0 or fstat(fd, &about) < 0 or about.st_ino != record.inodes[side]:
        return False
    return (S_ISFIFO(about.st_mode) and ioctl(fd, FIONREAD, &filled) == 0 and filled >= 0
            and <uint64_t>filled == record.piped[side] and descriptor_unblock(fd))


cdef inline bint descriptor_unblock(int fd) noexcept nogil:
    """Make sure that nothing waits for it. It is so already, unless another process has meddled."""
    cdef int flags = fcntl(fd, F_GETFL)
    return flags >= 0 and (
        flags & O_NONBLOCK != 0 or fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0)


cdef inline int record_restore_bytes(
    const ParcelRecord *record, Connection *c, const int *pipes, int file, int64_t offset
) noexcept nogil:
    """What the halves hold; 0 or -errno, and then the pipes are still the caller's."""
    cdef Half *half
    cdef int i, failure
    for i in range(2):
        half = &c.up if i == 0 else &c.down
        if record.unsent[i] > 0:
            half.unsent = <char *>malloc(record.unsent[i])
            if half.unsent == NULL:
                return -ENOMEM
            failure = file_read(file, half.unsent, record.unsent[i], offset)
            if failure < 0:
                return failure
            half.unsent_end = record.unsent[i]
            offset += <int64_t>record.unsent[i]
    for i in range(2):
        half = &c.up if i == 0 else &c.down
        half.pipe.rd = pipes[i]
        half.pipe.filled = record.piped[i]
    return 0


cdef inline void record_restore(
    Worker *worker, const ParcelRecord *record, Connection *c, int64_t now_ms
) noexcept nogil:
    """All but what it holds. No moment is in the future, except that of its timer."""
    c.has_rested = True
    c.id = record.id
    c.state = record.state
    c.reset = record.reset
    c.queue = record.queue
    c.drained = record.drained
    c.opened_ms = min(record.opened_ms, now_ms)
    c.active_ms = min(record.active_ms, now_ms)
    c.progress_ms = min(record.progress_ms, now_ms)
    c.began_ns = min(record.began_ns, now_ms * 1000000)
    c.connect_us = record.connect_us
    c.timeout_ms = record.timeout_ms
    c.timer_ms = record.timer_ms
    c.recheck_ms = max(record.recheck_ms, 1)
    if c.state != CONNECTING:
        c.timer_ms = min(c.timer_ms, now_ms + RECHECK_MS_MAX)
    if record.last != LAST_NONE:
        c.last = &c.client if record.last == LAST_CLIENT else &c.target
    side_restore(record, 0, &c.client, &c.up)
    side_restore(record, 1, &c.target, &c.down)
    c.moved = c.up.moved + c.down.moved - half_held(&c.up) - half_held(&c.down)
    c.origin.held_ms = record.held_ms
    c.origin.peer = record.peer
    c.self_connect.local = record.local
    c.self_connect.remote = record.remote
    if c.target.fd >= 0:
        self_connect_enter(worker.self_connects, &c.self_connect)


cdef inline void side_restore(
    const ParcelRecord *record, int side, Endpoint *end, Half *half
) noexcept nogil:
    cdef int flags = record.flags[side]
    end.error = record.errors[side]
    end.rights.state = record.rights[side]
    end.rights.left = record.rights_left[side]
    end.readable = flags & IS_READABLE != 0
    end.writable = flags & IS_WRITABLE != 0
    end.ending = flags & IS_ENDING != 0
    end.urgent = flags & IS_URGENT != 0
    end.ended = flags & IS_ENDED != 0
    end.gone = flags & IS_GONE != 0
    end.refused = flags & IS_REFUSED != 0
    end.armed = flags & IS_ARMED != 0 or end.writable == 0
    half.state = record.halves[side]
    half.moved = record.moved[side]
    half.given = record.given[side]
    half.lost = record.lost[side]
    half.counted = record.counted[side]


cdef inline Source *client_take_place(
    const Worker *main, int fd, const Peer *peer
) noexcept nogil:
    """Let a client that another process has let in take a place of its source, even beyond the
    share: a lower limit cuts nobody. NULL: it counts nowhere.

    If it has come with a PROXY header, `peer` is what that says, and counts. One without an address
    in its header has only its own, which is that of a proxy: see sender.pxd."""
    cdef sockaddr_storage own, told
    cdef socklen_t size = sizeof(own)
    cdef uint32_t key[SOURCE_WORDS]
    cdef bint is_introduced
    if main.sources.buckets == NULL:
        return NULL
    memset(&own, 0, sizeof(own))
    memset(&told, 0, sizeof(told))
    if getpeername(fd, <sockaddr *>&own, &size) < 0:
        own.ss_family = AF_UNSPEC
    if peer.size > 0:
        memcpy(&told, &peer.address, peer.size)
    else:
        told = own
    is_introduced = main.senders != NULL and is_sender(main.senders, &own)
    if is_introduced and memcmp(&told, &own, sizeof(own)) == 0:
        return NULL
    if told.ss_family == AF_UNIX and (is_introduced or own.ss_family != AF_UNIX):
        return NULL
    if not source_of_client(main.sources, fd, &told, key):
        return NULL
    return source_take_place(main.sources, key)


cdef inline void descriptor_reset(Worker *worker, int fd) noexcept nogil:
    """Close what cannot be used, if it is there. If it is a socket, its peer sees a reset."""
    cdef int family
    if fd < 0:
        return
    family = socket_stream_family(fd)
    if family < 0:
        close(fd)
    else:
        worker_hang_up(worker, fd, family, True, NULL)
