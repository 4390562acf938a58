# What the policy is told of a connection: a row, copied in the thread that forwards it.
#
# Rows are made for those who ask: a sweep, or a watcher of begins and ends. Addresses that the
# kernel can tell are asked for here; that of the client is kept, since the kernel forgets it when
# the client resets.

from proxyd.relay.half cimport half_delivered, half_held
from proxyd.relay.list cimport link_init, list_append, list_empty, list_remove
from proxyd.relay.records cimport ROWS_MAX, HalfRow, Row
from proxyd.relay.self_connect cimport self_connect_address
from proxyd.relay.socket cimport socket_peer_pid
from proxyd.relay.sys cimport (
    AF_UNIX, atomic_add, calloc, free, getpeername, getsockname, sockaddr, socklen_t,
)
from proxyd.relay.types cimport CLOSED, CONNECTING, Connection, Half, Link, RowBatch, Worker

cdef enum:
    BATCHES_MAX = 4            # of a worker and a sweep, until the policy has fetched some


cdef inline void row_add(
    Worker *worker, Link *batches, int sweep, Connection *c, int thread
) noexcept nogil:
    """Add a row to the last of these batches, or to a new one."""
    cdef RowBatch *batch = <RowBatch *>batches.prev.owner  # NULL: there is none
    if batch == NULL or batch.count == ROWS_MAX or batch.sweep != sweep:
        batch = batch_new(worker, sweep)
        if batch == NULL:
            atomic_add(&worker.gauges.rows_lost, 1)
            return
        list_append(batches, &batch.link)
    row_fill(&batch.rows[batch.count], c, thread)
    batch.count += 1


cdef inline Row *row_new(const Connection *c, int thread) noexcept nogil:
    """A row by itself; NULL: no memory."""
    cdef Row *row = <Row *>calloc(1, sizeof(Row))
    if row != NULL:
        row_fill(row, c, thread)
    return row


cdef inline void row_fill(Row *row, const Connection *c, int thread) noexcept nogil:
    """The row is all zero."""
    row.id = c.id
    row.state = CONNECTING if c.state == CLOSED else c.state  # its connect has failed just now
    row.listener = c.origin.listener
    row.upstream = c.origin.upstream.index
    row.thread = thread
    row.held_ms = c.origin.held_ms
    row.client = c.origin.peer
    row.opened_ms = c.opened_ms
    row.active_ms = c.active_ms
    row.connect_us = c.connect_us
    half_row_fill(&row.halves[0], &c.up)
    half_row_fill(&row.halves[1], &c.down)
    if c.client.family == AF_UNIX and c.client.fd >= 0:
        row.client_pid = socket_peer_pid(c.client.fd)
    row_fill_target(row, c)


cdef inline void half_row_fill(HalfRow *row, const Half *half) noexcept nogil:
    row.delivered = half_delivered(half)
    row.held = half_held(half)
    row.state = half.state


cdef inline void row_fill_target(Row *row, const Connection *c) noexcept nogil:
    """Where it is connected to, and from where. The kernel does not know the former of a socket
    that is connecting, or that was reset."""
    cdef socklen_t size = sizeof(row.target.name)
    if c.target.fd >= 0:
        if getpeername(c.target.fd, <sockaddr *>&row.target.name, &size) == 0:
            row.target.size = size
        size = sizeof(row.local.name)
        if getsockname(c.target.fd, <sockaddr *>&row.local.name, &size) == 0:
            row.local.size = size
    if c.self_connect.remote.port == 0:
        return
    if row.target.size == 0:
        row.target.size = self_connect_address(
            &c.self_connect.remote, c.target.family, &row.target.name)
    if row.local.size == 0:
        row.local.size = self_connect_address(
            &c.self_connect.local, c.target.family, &row.local.name)


# ── batches ──────────────────────────────────────────────────────────────────────────────────────

cdef inline RowBatch *batch_new(Worker *worker, int sweep) noexcept nogil:
    """An empty batch; NULL: no memory."""
    cdef RowBatch *batch = <RowBatch *>calloc(1, sizeof(RowBatch))
    if batch == NULL:
        return NULL
    link_init(&batch.link, batch)
    batch.sweep = sweep
    if sweep != 0:
        batch.on_the_way = &worker.batches_on_the_way
        atomic_add(batch.on_the_way, 1)
    return batch


cdef inline void batches_free(Link *batches) noexcept nogil:
    while not list_empty(batches):
        batch_free(<RowBatch *>batches.next.owner)


cdef inline bint batch_free(RowBatch *batch) noexcept nogil:
    """Whether its worker may have waited for that."""
    cdef bint waited = False
    list_remove(&batch.link)
    if batch.on_the_way != NULL:
        waited = atomic_add(batch.on_the_way, -1) == BATCHES_MAX - 1
    free(batch)
    return waited


cdef inline void batches_keep(Link *batches) noexcept nogil:
    """Keep batches whose worker is about to be freed."""
    cdef Link *link = batches.next
    while link != batches:
        (<RowBatch *>link.owner).on_the_way = NULL
        link = link.next
