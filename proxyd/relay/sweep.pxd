# A sweep: every connection that is there when it begins is passed once, and told of, or cut.
#
# Each worker passes its own connections, in the order of `members`, some in each turn. A cursor in
# that list keeps the place. The order of the list does not depend on what the connections do, so
# that the walk ends, however much they do. New ones carry the number of the sweep from the start.
#
# A connection may change threads meanwhile. One that arrives behind the cursor is passed at once.
# One that left a worker before that had the order may arrive at a worker that has finished; by the
# time that every worker has finished, it is in a mailbox. So each empties its mailbox once more,
# and has to answer twice (sweep_advance() in workers.pxd).

from proxyd.relay.close cimport connection_close
from proxyd.relay.enter cimport enter_expect
from proxyd.relay.list cimport list_append, list_empty, list_insert_after, list_remove
from proxyd.relay.records cimport ENDING_CUT, ROWS_MAX, SWEEP_CUT, SWEEP_TELL, Sweep
from proxyd.relay.row cimport BATCHES_MAX, row_add
from proxyd.relay.sys cimport atomic_get, atomic_set
from proxyd.relay.types cimport Connection, Link, Worker
from proxyd.relay.upstream cimport connection_count_bytes

cdef enum:
    WALK_MAX = 1024            # connections per turn that the cursor passes


cdef inline void sweep_begin(Worker *worker, const Sweep *sweep) noexcept nogil:
    worker.sweep = sweep[0]
    list_remove(&worker.cursor)
    list_insert_after(&worker.members, &worker.cursor)


cdef inline void sweep_walk(Worker *worker) noexcept nogil:
    """Pass some connections, if the policy has fetched the rows of those before."""
    cdef Link *link
    cdef Connection *c
    cdef int told = 0
    cdef int _i
    if not sweep_can_walk(worker):
        return
    for _i in range(WALK_MAX):
        link = worker.cursor.next
        list_remove(&worker.cursor)
        if link == &worker.members:
            worker.sweep_answer = 2 * worker.sweep.number
            return
        list_insert_after(link, &worker.cursor)
        c = <Connection *>link.owner
        if c == NULL:
            continue  # the cursor of enter.pxd
        if c.sweep < worker.sweep.number:
            sweep_pass(worker, c)
            told += worker.sweep.what == SWEEP_TELL
        if told == ROWS_MAX:
            return


cdef inline bint sweep_can_walk(Worker *worker) noexcept nogil:
    return not list_empty(&worker.cursor) and (
        atomic_get(&worker.batches_on_the_way) < BATCHES_MAX)


cdef inline void sweep_arrive(Worker *worker, Connection *c) noexcept nogil:
    """A connection begins in this worker."""
    list_append(&worker.members, &c.member)
    enter_expect(worker, c)
    if c.sweep < worker.sweep.number and list_empty(&worker.cursor):
        sweep_pass(worker, c)


cdef inline void sweep_pass(Worker *worker, Connection *c) noexcept nogil:
    c.sweep = worker.sweep.number
    if worker.sweep.what != SWEEP_CUT:
        connection_count_bytes(c)
        if worker.sweep.what == SWEEP_TELL:
            row_add(worker, &worker.batches, worker.sweep.number, c, worker.number)
    elif c.id == worker.sweep.connection:
        atomic_set(&worker.gauges.terminated, 1)
        connection_close(worker, c, ENDING_CUT, True)
