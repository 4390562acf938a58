# Gathering: all connections of all workers come to rest in the main one.
#
# A connection that rests is registered with no epoll instance and is in no list but Worker.resting:
# nothing happens to it, whatever its peers do. From there it is taken to another process
# (parcel.pxd), or begins again. It keeps all that it holds, its clocks and its timer.
#
# While Gauges.gathering is set, a worker passes on what arrives in its mailbox. So once every
# worker has answered the order, and counts no connection, all of them rest (freeze.pxd).

from proxyd.relay.bookkeeping cimport worker_remove_connection
from proxyd.relay.endpoint cimport endpoint_unregister
from proxyd.relay.list cimport link_init, list_append, list_empty, list_move_all, list_remove
from proxyd.relay.mailbox cimport mailbox_put_all
from proxyd.relay.sys cimport atomic_add
from proxyd.relay.types cimport (
    RIGHTS_ANY, RIGHTS_MAYBE, Connection, Endpoint, Link, Worker,
)


cdef inline void connection_begin_at_rest(Worker *main, Connection *c) noexcept nogil:
    """It was connected after the others had come to rest."""
    connection_rest(main, c)
    list_append(resting_place(main, &main.resting, c), &c.live)


cdef inline void worker_gather(Worker *worker) noexcept nogil:
    """Send all connections of this worker to rest. Not while it works on a batch of events."""
    cdef Link rest
    cdef Connection *c
    link_init(&rest, NULL)
    while not list_empty(&worker.live):
        c = <Connection *>worker.live.next.owner
        connection_rest(worker, c)
        list_append(&rest, &c.live)
    worker_hand_to_rest(worker, &rest)


cdef inline void connection_rest(Worker *worker, Connection *c) noexcept nogil:
    """Take it out of every list of the worker, which still counts it."""
    endpoint_unregister(&worker.ctx, &c.client)
    endpoint_unregister(&worker.ctx, &c.target)
    list_remove(&c.live)
    list_remove(&c.timed)
    list_remove(&c.ready)
    list_remove(&c.to_quarantine)
    list_remove(&c.member)
    list_remove(&c.entering)
    c.has_rested = True


cdef inline void worker_hand_to_rest(Worker *worker, Link *connections) noexcept nogil:
    """Leave them to the main worker, all at once: then they are still in order.

    They are counted there before they are on their way, and here until they are."""
    cdef Link *link = connections.next
    cdef int count = 0
    if worker.main == NULL:
        worker_keep_at_rest(worker, connections)
        return
    while link != connections:
        count += 1
        link = link.next
    if count == 0:
        return
    atomic_add(&worker.main.connection_count, count)
    mailbox_put_all(&worker.main.mailbox, &worker.main.mailbox.begin, connections)
    while count > 0:
        worker_remove_connection(worker)
        count -= 1


cdef inline void worker_keep_at_rest(Worker *main, Link *connections) noexcept nogil:
    """Sort them into `resting`; the one that was silent for the longest comes first. What comes
    from one worker is in order already, so that one walk per worker does it."""
    cdef Link *place = main.resting.next
    cdef Connection *c
    while not list_empty(connections):
        c = <Connection *>connections.next.owner
        list_remove(&c.live)
        place = resting_place(main, place, c)
        list_append(place, &c.live)


cdef inline Link *resting_place(Worker *main, Link *place, const Connection *c) noexcept nogil:
    """Before what it belongs in `resting`; looked for from `place` on, if it is not before that."""
    if place.prev != &main.resting and (
            (<Connection *>place.prev.owner).active_ms > c.active_ms):
        place = main.resting.next
    while place != &main.resting and (<Connection *>place.owner).active_ms <= c.active_ms:
        place = place.next
    return place


cdef inline void worker_end_rest(Worker *worker) noexcept nogil:
    """They are to be cut. This thread must not block for descriptors, as the quarantine's may."""
    cdef Link *link = worker.resting.next
    while link != &worker.resting:
        endpoint_leave_quarantine(&(<Connection *>link.owner).client)
        endpoint_leave_quarantine(&(<Connection *>link.owner).target)
        link = link.next
    list_move_all(&worker.live, &worker.resting)


cdef inline void endpoint_leave_quarantine(Endpoint *end) noexcept nogil:
    if end.rights.state == RIGHTS_ANY:
        end.rights.state = RIGHTS_MAYBE
