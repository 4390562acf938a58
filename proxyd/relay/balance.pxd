# What a relay does that has more to do than one CPU can, while another is idle (busy.pxd): it
# gives half of its work to a relay that sleeps. Where there is none yet, the boss asks for a crew.
#
# Nothing is ever taken back: the connections that come later begin with the boss again.

from proxyd.relay.busy cimport SPARE_MIN, busy_window
from proxyd.relay.connection cimport endpoint_unregister, policy_event_add, worker_remove_connection
from proxyd.relay.list cimport list_remove
from proxyd.relay.mailbox cimport mailbox_put
from proxyd.relay.quarantine cimport quarantine_put, quarantine_runs, quarantine_want
from proxyd.relay.sys cimport (
    AF_UNIX, SOL_SOCKET, SO_LINGER, atomic_add, atomic_get, counter_add, hint_get, linger,
    setsockopt,
)
from proxyd.relay.types cimport (
    CONNECTED, CONNECTING, EVENT_WORKERS_WANTED, RIGHTS_ANY, Connection, Endpoint, Link, Worker,
)

cdef enum:
    MOVE_MAX = 32             # connections at a time: each costs four epoll_ctl


cdef inline bint worker_is_overloaded(Worker *worker) noexcept nogil:
    """Whether a window has ended after which the relay is to give work away."""
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
    """Give every second connection that has just moved bytes to a relay that sleeps.

    Only at the end of a turn: an event that is yet to be worked on may point to one of them.
    """
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
            return  # nor has any that is further ahead in the list
        if connection_can_move(<Connection *>link.owner):
            if count % 2 == 1:
                connection_move(worker, other, <Connection *>link.owner)
            count += 1
        link = before


cdef inline void workers_report_want(Worker *main) noexcept nogil:
    """Once: the policy may find that there can be none."""
    if not main.workers.want_reported:
        main.workers.want_reported = policy_event_add(main, EVENT_WORKERS_WANTED, -1, 0, 0) != NULL


cdef inline Worker *workers_find_idle(Worker *main) noexcept nogil:
    """Of the relays that wait for events, the one with the fewest connections; NULL: none does."""
    cdef Worker *found = main if hint_get(&main.asleep) else NULL
    cdef Worker *worker
    cdef int i
    for i in range(main.workers.count):
        worker = main.workers.each[i]
        if hint_get(&worker.asleep) and (
                found == NULL or atomic_get(&worker.connection_count) < atomic_get(&found.connection_count)):
            found = worker
    return found


cdef inline bint connection_can_move(const Connection *c) noexcept nogil:
    """While it has a time limit, or is about to end, its relay's list of those has it."""
    return c.state == CONNECTED and c.timer_ms == 0


cdef inline void connection_move(Worker *worker, Worker *other, Connection *c) noexcept nogil:
    """With all it holds. It begins there as new ones do, with a pump, and then asks that epoll."""
    endpoint_unregister(&worker.ctx, &c.client)
    endpoint_unregister(&worker.ctx, &c.target)
    list_remove(&c.ready)
    list_remove(&c.to_quarantine)
    worker_remove_connection(worker)
    atomic_add(&other.connection_count, 1)
    counter_add(&worker.handed_over, 1)
    mailbox_put(&other.mailbox, &other.mailbox.begin, &c.live)


# ── into quarantine ──────────────────────────────────────────────────────────────────────────

cdef inline void endpoint_quarantine(Worker *worker, Endpoint *end) noexcept nogil:
    """Where the thread still waits when the program ends, the kernel closes its sockets: that is no
    clean end."""
    cdef linger now
    if end.fd < 0:
        return
    endpoint_unregister(&worker.ctx, end)
    end.rights.state = RIGHTS_ANY
    end.rights.left = 0
    end.readable = 1
    if end.family != AF_UNIX:
        now.l_onoff = 1
        now.l_linger = 0
        setsockopt(end.fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now))


cdef inline void connection_quarantine(Worker *worker, Connection *c) noexcept nogil:
    """With all it holds, its time limit too. It begins there as one does that was given away."""
    cdef Worker *main = worker if worker.main == NULL else worker.main
    endpoint_quarantine(worker, &c.client)
    endpoint_quarantine(worker, &c.target)
    list_remove(&c.ready)
    list_remove(&c.to_quarantine)
    list_remove(&c.timed)
    worker_remove_connection(worker)
    atomic_add(&main.workers.quarantine.connection_count, 1)
    quarantine_put(worker.quarantine, &c.live)


cdef inline void worker_quarantine(Worker *worker) noexcept nogil:
    """Only at the end of a turn, as relay_share()."""
    cdef Link *link = worker.to_quarantine.next
    cdef Link *after
    if not quarantine_runs(worker.quarantine):
        quarantine_want(worker.quarantine)
        return
    while link != &worker.to_quarantine:
        after = link.next
        if (<Connection *>link.owner).state != CONNECTING:
            connection_quarantine(worker, <Connection *>link.owner)
        link = after
