# Freezing: all connections stop where they are, and go on in another relay; or in this one.
#
#   workers_freeze()      all connections of all threads rest in the main worker (gather.pxd) …
#   connections_export()  … and are described in a file (parcel.pxd), whose reader goes on with
#                         them. They rest until connections_release() forgets them
#   workers_thaw()        they go on here after all
#
#   connections_import()  connections of a parcel rest in the main worker, until workers_thaw()

from proxyd.relay.balance cimport worker_for_new
from proxyd.relay.bookkeeping cimport connections_decrement, worker_remove_connection
from proxyd.relay.clock cimport clock_ms
from proxyd.relay.close cimport connection_free
from proxyd.relay.connect cimport connection_begin
from proxyd.relay.gather cimport worker_gather, worker_keep_at_rest
from proxyd.relay.gauges cimport gauges_add_connection
from proxyd.relay.list cimport link_init, list_append, list_empty, list_move_all, list_remove
from proxyd.relay.loop cimport worker_read_mailbox
from proxyd.relay.mailbox cimport mailbox_order, mailbox_put, mailbox_wait
from proxyd.relay.parcel cimport (
    PARCEL_MAGIC, ParcelHead, ParcelRecord, file_read, file_write, record_fd_count, record_fill,
    record_is_valid, record_take_fds,
)
from proxyd.relay.pipe cimport pipe_close
from proxyd.relay.quarantine cimport connection_was_in_quarantine, quarantine_take_waiting
from proxyd.relay.restore cimport client_take_place, connection_restore, descriptor_reset
from proxyd.relay.self_connect cimport self_connect_remove
from proxyd.relay.source cimport source_leave
from proxyd.relay.sys cimport (
    EPROTO, ETIMEDOUT, atomic_add, atomic_get, atomic_set, close, errno, fstat, int64_t,
    memset, stat_t, uint64_t,
)
from proxyd.relay.types cimport (
    ORDER_GATHER, Connection, Endpoint, Half, Link, UpstreamTotals, Worker,
)
from proxyd.relay.workers cimport workers_order

cdef enum:
    GATHER_MS = 5000           # until a worker that has not answered counts as stuck …
    GATHER_QUARANTINE_MS = 200  # … and the quarantine as blocked
    GATHER_STEP_MS = 10        # between two looks at what threads count
    RECORD_MIN = 320           # bytes of a record of the first version …
    RECORD_MAX = 65536         # … and of any
    ID_BITS = 53

# What a parcel comes with.
ctypedef struct Import:
    int file
    int64_t offset             # of the parcel in the file
    const int *fds             # -1: lost on the way
    uint64_t fd_count
    const int *listeners       # index there → index here, or -1
    uint64_t listener_count
    UpstreamTotals **upstreams  # index there → where to count
    uint64_t upstream_count
    uint64_t restored          # connections that rest here now …
    uint64_t failed            # … and those that could not be restored


# ── stop ─────────────────────────────────────────────────────────────────────────────────────────

cdef inline int workers_freeze(Worker *main) noexcept nogil:
    """Let all connections rest in the main worker; 0 or -errno, and then workers_thaw() is due.

    Without those of a quarantine that blocks: the end of the process will reset them."""
    cdef int64_t began_ms = clock_ms()
    atomic_set(&main.gauges.gathering, 1)
    worker_gather(main)
    atomic_add(&main.workers.gather_sequence, 1)
    workers_order(main, ORDER_GATHER)
    if main.workers.quarantine != NULL:
        mailbox_order(&main.workers.quarantine.mailbox, ORDER_GATHER)
    while not workers_have_gathered(main):
        if clock_ms() - began_ms >= GATHER_MS:
            return -ETIMEDOUT  # GCOVR_EXCL_LINE - a bug: no worker may block
        workers_await(main)
    while not quarantine_has_gathered(main) and clock_ms() - began_ms < GATHER_QUARANTINE_MS:
        workers_await(main)
    if main.mailbox.wake_fd >= 0:
        worker_read_mailbox(main)
    workers_gather_waiting(main)
    return 0


cdef inline void workers_await(Worker *main) noexcept nogil:
    """Take what they leave here, as soon as they do."""
    mailbox_wait(&main.mailbox, GATHER_STEP_MS)
    worker_read_mailbox(main)


cdef inline void workers_gather_waiting(Worker *main) noexcept nogil:
    """Those that wait for a quarantine, for which there was no thread, are counted nowhere."""
    cdef Link rest
    link_init(&rest, NULL)
    atomic_add(&main.connection_count, quarantine_take_waiting(main.quarantine, &rest))
    worker_keep_at_rest(main, &rest)


cdef inline bint workers_have_gathered(const Worker *main) noexcept nogil:
    """Whether nothing is left with any of them, or on the way.

    All answers first: after its own, a worker moves no connection to another any more, so that
    what is on the way is counted where it arrives."""
    cdef int i
    for i in range(main.workers.count):
        if atomic_get(&main.workers.each[i].answered_gather) != main.workers.gather_sequence:
            return False
    for i in range(main.workers.count):
        if atomic_get(&main.workers.each[i].connection_count) > 0:
            return False
    return True


cdef inline bint quarantine_has_gathered(const Worker *main) noexcept nogil:
    """Likewise; after the others, which may move connections there."""
    cdef Worker *quarantine = main.workers.quarantine
    return quarantine == NULL or (
        atomic_get(&quarantine.answered_gather) == main.workers.gather_sequence
        and atomic_get(&quarantine.connection_count) == 0)


# ── to a parcel ──────────────────────────────────────────────────────────────────────────────────

cdef inline int64_t connections_export(
    Worker *main, int file, int64_t offset, int *fds
) noexcept nogil:
    """Describe all that rest in `file` from `offset` on. The number of descriptors, which are in
    `fds`: there is room for four of each connection; or -errno.

    Whoever closes the last copies of the sockets resets them, as our own death would: see
    socket_guard()."""
    cdef ParcelHead head
    cdef int64_t result
    memset(&head, 0, sizeof(head))
    head.magic = PARCEL_MAGIC
    head.record_size = sizeof(ParcelRecord)
    head.last_id = main.last_id
    head.count = connections_resting(main)
    result = records_write(main, file, offset + <int64_t>sizeof(head), &head, fds)
    if result == 0:
        result = file_write(file, &head, sizeof(head), offset)
    if result < 0:
        return result
    return <int64_t>head.fds


cdef inline uint64_t connections_resting(const Worker *main) noexcept nogil:
    cdef const Link *link = main.resting.next
    cdef uint64_t count = 0
    while link != &main.resting:
        count += 1
        link = link.next
    return count


cdef inline int records_write(
    Worker *main, int file, int64_t offset, ParcelHead *head, int *fds
) noexcept nogil:
    """The records, and the bytes behind them; 0 or -errno."""
    cdef ParcelRecord record
    cdef Connection *c
    cdef Link *link = main.resting.next
    cdef int64_t bytes_offset = offset + <int64_t>(head.count * sizeof(record))
    cdef int failure
    while link != &main.resting:
        c = <Connection *>link.owner
        record_fill(&record, c)
        head.fds += <uint64_t>record_take_fds(&record, c, &fds[head.fds])
        failure = file_write(file, &record, sizeof(record), offset)
        if failure == 0:
            failure = file_write(file, c.up.unsent + c.up.unsent_start, record.unsent[0],
                                 bytes_offset + <int64_t>head.unsent)
        if failure == 0:
            head.unsent += record.unsent[0]
            failure = file_write(file, c.down.unsent + c.down.unsent_start, record.unsent[1],
                                 bytes_offset + <int64_t>head.unsent)
        if failure < 0:
            return failure
        head.unsent += record.unsent[1]
        offset += <int64_t>sizeof(record)
        link = link.next
    return 0


# ── from a parcel ────────────────────────────────────────────────────────────────────────────────

cdef inline int connections_import(Worker *main, Import *source) noexcept nogil:
    """Let the connections of a parcel rest here. Its descriptors are owned from now on. 0 or
    -errno, and then none of them is left."""
    cdef ParcelHead head
    cdef Link rest
    cdef uint64_t used = 0
    cdef int failure = parcel_check(source, &head)
    link_init(&rest, NULL)
    main.ctx.now_ms = clock_ms()
    if failure == 0:
        failure = records_read(main, source, &head, &rest, &used)
        main.last_id = max(main.last_id, head.last_id)
    worker_keep_at_rest(main, &rest)
    while used < source.fd_count:
        descriptor_reset(main, source.fds[used])
        used += 1
    return failure


cdef inline int parcel_check(const Import *source, ParcelHead *head) noexcept nogil:
    """Look at all of it, before anything is believed; 0 or -errno. -EPROTO: it is no parcel.

    If one number is wrong, the descriptors may belong to other records than it seems."""
    cdef ParcelRecord record
    cdef stat_t about
    cdef uint64_t fds = 0, unsent = 0, room, i
    cdef int failure = file_read(source.file, head, sizeof(head[0]), source.offset)
    if failure < 0:
        return failure
    if fstat(source.file, &about) < 0:
        return -errno
    if head.magic != PARCEL_MAGIC or not RECORD_MIN <= head.record_size <= RECORD_MAX:
        return -EPROTO
    room = <uint64_t>(about.st_size - source.offset) - sizeof(head[0])
    if head.count > room // head.record_size or head.fds != source.fd_count:
        return -EPROTO
    if head.unsent > room - head.count * head.record_size or head.last_id >> ID_BITS != 0:
        return -EPROTO
    for i in range(head.count):
        failure = record_read(source, head, i, &record)
        if failure < 0:
            return failure
        fds += <uint64_t>record_fd_count(&record)
        if record.unsent[0] > head.unsent or record.unsent[1] > head.unsent:
            return -EPROTO
        unsent += record.unsent[0] + record.unsent[1]
    return 0 if fds == head.fds and unsent == head.unsent else -EPROTO


cdef inline int records_read(
    Worker *main, Import *source, const ParcelHead *head, Link *rest, uint64_t *used
) noexcept nogil:
    """Append the connections to `rest`; 0 or -errno. `used`: how many descriptors are not the
    caller's any more. The file may have changed since the check."""
    cdef ParcelRecord record
    cdef Connection *c
    cdef int64_t bytes_offset = (
        source.offset + <int64_t>sizeof(head[0]) + <int64_t>(head.count * head.record_size))
    cdef uint64_t i, unsent = 0
    cdef int failure
    for i in range(head.count):
        failure = record_read(source, head, i, &record)
        if failure < 0:
            return failure
        if (source.fd_count - used[0] < <uint64_t>record_fd_count(&record)
                or record.unsent[0] > head.unsent - unsent
                or record.unsent[1] > head.unsent - unsent - record.unsent[0]):
            return -EPROTO
        c = connection_restore(main, &record, &source.fds[used[0]], source.file,
                               bytes_offset + <int64_t>unsent, main.ctx.now_ms)
        used[0] += <uint64_t>record_fd_count(&record)
        unsent += record.unsent[0] + record.unsent[1]
        if c == NULL:
            source.failed += 1
            continue
        c.origin.upstream = source.upstreams[record.upstream]
        c.origin.source = client_take_place(main, c.client.fd, &c.origin.peer)
        c.origin.listener = -1
        if 0 <= record.listener < <int64_t>source.listener_count:
            c.origin.listener = source.listeners[record.listener]
        source.restored += 1
        gauges_add_connection(main.gauges)
        atomic_add(&main.connection_count, 1)
        list_append(rest, &c.live)
    return 0


cdef inline int record_read(
    const Import *source, const ParcelHead *head, uint64_t index, ParcelRecord *record
) noexcept nogil:
    """A record that is valid; 0 or -errno."""
    cdef int64_t offset = source.offset + <int64_t>(sizeof(head[0]) + index * head.record_size)
    cdef int failure
    memset(record, 0, sizeof(record[0]))
    failure = file_read(
        source.file, record, min(sizeof(record[0]), <size_t>head.record_size), offset)
    if failure < 0:
        return failure
    if record.id > head.last_id or not record_is_valid(record, source.upstream_count):
        return -EPROTO
    return 0


# ── go on, or forget ─────────────────────────────────────────────────────────────────────────────

cdef inline void workers_thaw(Worker *main) noexcept nogil:
    """All that rest go on, each where a new connection would begin."""
    cdef Link rest
    cdef Worker *worker
    cdef Connection *c
    link_init(&rest, NULL)
    atomic_set(&main.gauges.gathering, 0)
    main.ctx.now_ms = clock_ms()
    list_move_all(&rest, &main.resting)
    while not list_empty(&rest):
        c = <Connection *>rest.next.owner
        list_remove(&c.live)
        worker = main if connection_was_in_quarantine(c) else worker_for_new(main)
        if worker == main:
            connection_begin(main, c)
            continue
        atomic_add(&worker.connection_count, 1)
        mailbox_put(&worker.mailbox, &worker.mailbox.begin, &c.live)
        worker_remove_connection(main)


cdef inline void connections_release(Worker *main) noexcept nogil:
    """Forget all that rest: another process goes on with them, so nothing is shut down."""
    cdef Connection *c
    while not list_empty(&main.resting):
        c = <Connection *>main.resting.next.owner
        list_remove(&c.live)
        connection_leave_slot(c)
        endpoint_release(&c.client)
        endpoint_release(&c.target)
        self_connect_remove(main.self_connects, &c.self_connect)
        source_leave(c.origin.source)
        worker_remove_connection(main)
        connections_decrement(main)
        connection_free(c)


cdef inline void connection_leave_slot(Connection *c) noexcept nogil:
    """It is kept as it is: until the other process keeps it itself, there is nothing else to go on
    from but slate and pages. So its pipes are not emptied either."""
    half_leave_slot(&c.up)
    half_leave_slot(&c.down)
    c.slot = NULL


cdef inline void half_leave_slot(Half *half) noexcept nogil:
    half.pipe.page_alive = NULL
    pipe_close(&half.pipe)
    if half.kept != NULL:
        half.unsent = NULL
        half.unsent_start = half.unsent_end = 0
        half.kept = NULL


cdef inline void endpoint_release(Endpoint *end) noexcept nogil:
    if end.fd >= 0:
        close(end.fd)
    end.fd = -1
