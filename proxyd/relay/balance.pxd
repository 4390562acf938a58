# Which worker forwards a connection.
#
# A worker that is busy while a CPU is idle (busy.pxd) gives half of its work to one that sleeps. If
# there is none yet, the policy is asked to start workers. Nothing is taken back: later connections
# begin in the main worker again.

from proxyd.relay.bookkeeping cimport policy_event_add, worker_remove_connection
from proxyd.relay.busy cimport SPARE_FOR_NEW, SPARE_MIN, busy_window
from proxyd.relay.endpoint cimport endpoint_unregister
from proxyd.relay.list cimport list_remove
from proxyd.relay.mailbox cimport mailbox_put
from proxyd.relay.sys cimport atomic_add, atomic_get, counter_add, hint_get
from proxyd.relay.types cimport CONNECTED, EVENT_WORKERS_WANTED, Connection, Link, Worker

cdef enum:
    MOVE_MAX = 32              # connections per turn: each costs four epoll_ctl


# ── new connections ──────────────────────────────────────────────────────────────────────────────

cdef inline Worker *worker_for_new(Worker *main) noexcept nogil:
    """Where a new connection begins: in the main worker, unless that has too much to do."""
    if main.offloads_when_busy and main.busy.spare < SPARE_FOR_NEW:
        return main
    return worker_with_fewest(main)


cdef inline Worker *worker_with_fewest(Worker *main) noexcept nogil:
    """The worker with the fewest connections; the main one if no other has fewer, since that saves
    a change of threads."""
    cdef Worker *least = main
    cdef int fewest = atomic_get(&main.connection_count)
    cdef int i, count
    for i in range(main.workers.count):
        count = atomic_get(&main.workers.each[i].connection_count)
        if count < fewest:
            fewest = count
            least = main.workers.each[i]
    return least


# ── offload ──────────────────────────────────────────────────────────────────────────────────────

cdef inline bint worker_is_overloaded(Worker *worker) noexcept nogil:
    """Whether a window has ended after which the worker is to give work away."""
    cdef Worker *main = worker if worker.main == NULL else worker.main
    if not worker.offloads_when_busy:
        return False
    if worker.ctx.now_ms - worker.busy.since_ns // 1000000 < main.workers.window_ms:
        return False
    if not busy_window(&worker.busy, &main.workers.machine, worker.ctx.buffer,
                       worker.ctx.stream_unit):
        return False
    return worker.busy.spare >= SPARE_MIN


cdef inline void worker_offload(Worker *worker) noexcept nogil:
    """Move every second connection that has just moved bytes to a worker that sleeps.

    Only at the end of a turn: an event that is yet to be worked on may point to one of them."""
    cdef Worker *main = worker if worker.main == NULL else worker.main
    cdef Worker *other
    cdef Link *link = worker.live.prev
    cdef Link *before
    cdef int count = 0
    if main.workers.count == 0:
        workers_report_want(main)
        return
    other = workers_find_idle(main)
    while other != NULL and link != &worker.live and count < 2 * MOVE_MAX:
        before = link.prev
        if (<Connection *>link.owner).active_ms < worker.ctx.now_ms - main.workers.window_ms:
            return  # those further ahead in the list have been silent for longer
        if connection_can_move(<Connection *>link.owner):
            if count % 2 == 1:
                connection_move(worker, other, <Connection *>link.owner)
            count += 1
        link = before


cdef inline void workers_report_want(Worker *main) noexcept nogil:
    """Tell the policy, once, that a worker would help. There may be none all the same."""
    if not main.workers.want_reported:
        main.workers.want_reported = policy_event_add(main, EVENT_WORKERS_WANTED, -1, 0, 0) != NULL


cdef inline Worker *workers_find_idle(Worker *main) noexcept nogil:
    """The worker with the fewest connections of those that wait for events; NULL: none does."""
    cdef Worker *found = main if hint_get(&main.asleep) else NULL
    cdef Worker *worker
    cdef int i
    for i in range(main.workers.count):
        worker = main.workers.each[i]
        if hint_get(&worker.asleep) and (
                found == NULL or atomic_get(&worker.connection_count)
                < atomic_get(&found.connection_count)):
            found = worker
    return found


cdef inline bint connection_can_move(const Connection *c) noexcept nogil:
    """Not if it has a timer or is about to end: then it is in lists of its worker."""
    return c.state == CONNECTED and c.timer_ms == 0


cdef inline void connection_move(Worker *worker, Worker *other, Connection *c) noexcept nogil:
    """Move a connection with all it holds. It begins there as a new one does."""
    endpoint_unregister(&worker.ctx, &c.client)
    endpoint_unregister(&worker.ctx, &c.target)
    list_remove(&c.ready)
    list_remove(&c.to_quarantine)
    list_remove(&c.member)
    list_remove(&c.entering)
    worker_remove_connection(worker)
    atomic_add(&other.connection_count, 1)
    counter_add(&worker.handed_over, 1)
    mailbox_put(&other.mailbox, &other.mailbox.begin, &c.live)
