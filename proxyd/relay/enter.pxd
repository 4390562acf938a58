# Which connections are entered, and when: those older than a second, each by its own worker.
#
# Shorter ones are left out, since that would cost as much as they do. A cursor in `members` is
# before those that are yet to be passed; they are nearly in the order of their age, so that a pass
# ends at the first young one. What is old and cannot be entered yet waits in a list of its own, for
# rounds, and is looked at once in each. A worker with nothing to do sleeps on.
#
# Until there is a slate, the policy is told once that one is needed.

from proxyd.relay.bookkeeping cimport policy_event_add
from proxyd.relay.list cimport (
    list_append, list_empty, list_insert_after, list_move_all, list_remove,
)
from proxyd.relay.mailbox cimport mailbox_wake
from proxyd.relay.pages cimport pages_enter, worker_slate
from proxyd.relay.quarantine cimport QUARANTINE, quarantine_order_tidy
from proxyd.relay.records cimport REPORT_OLD
from proxyd.relay.sys cimport (
    AF_INET, AF_INET6, AF_UNIX, EINVAL, EMSGSIZE, EOPNOTSUPP, EUSERS, atomic_add,
    atomic_get, atomic_set, atomic_take, hint_get, hint_set, int64_t,
)
from proxyd.relay.tidy cimport TIDY_BLOCKED, TIDY_DONE, TIDY_LATER, pages_tidy
from proxyd.relay.types cimport (
    CONNECTED, DEAD, EVENT_NOT_KEPT, EVENT_OLD, RIGHTS_AHEAD, RIGHTS_UNKNOWN, Connection, Endpoint,
    Link, Worker,
)

cdef enum:
    OLD_MS = 1000              # from this age on, a connection is to be kept
    PASS_MS = 50               # between two passes, at least
    ROUND_MS = 1000            # … and between two rounds of those that could not be entered
    PASS_MAX = 1024            # connections that a pass looks at …
    PASS_ENTERED = 32          # … and that it enters: each is some 20 system calls

# whether a connection can be entered
cdef enum:
    ENTER_NOW, ENTER_LATER, ENTER_NEVER


# ── the pass ─────────────────────────────────────────────────────────────────────────────────────

cdef inline void worker_enter_old(Worker *worker) noexcept nogil:
    """It is time to look for old connections; and to say when it is the next time."""
    worker.enter_ms = 0
    if worker.main == NULL:
        main_tell_policy(worker)
    if worker.ctx.slate == NULL:
        if hint_get(&worker.gauges.reports) & REPORT_OLD:
            worker_look_for_old(worker)
        return
    if worker.ctx.intent == NULL:
        return  # this worker can keep nothing
    if list_empty(&worker.enter_cursor):
        list_insert_after(&worker.members, &worker.enter_cursor)
    if worker_pass(worker) and worker_round(worker) and not list_empty(&worker.enter_later):
        worker_enter_at(worker, worker.enter_round_ms)


cdef inline bint worker_pass(Worker *worker) noexcept nogil:
    """Pass some. False: the pass goes on later."""
    cdef Link *link
    cdef Connection *c
    cdef int count = 0, entered = 0
    while count < PASS_MAX and entered < PASS_ENTERED:
        link = worker.enter_cursor.next
        if link == &worker.members:
            return True
        c = <Connection *>link.owner
        if c != NULL and c.opened_ms + OLD_MS > worker.ctx.now_ms:
            worker_enter_at(worker, max(c.opened_ms + OLD_MS, worker.ctx.now_ms + PASS_MS))
            return True
        list_remove(&worker.enter_cursor)
        list_insert_after(link, &worker.enter_cursor)
        count += 1
        if c != NULL and not connection_is_entered(c):  # NULL: it is the cursor of a sweep
            if not worker_enter(worker, c):
                return False
            entered += connection_is_entered(c)
    worker_enter_at(worker, worker.ctx.now_ms)
    return False


cdef inline bint worker_round(Worker *worker) noexcept nogil:
    """Try some again. False: the round goes on later."""
    cdef Connection *c
    cdef int count = 0, entered = 0
    if list_empty(&worker.enter_again):
        if worker.ctx.now_ms < worker.enter_round_ms:
            return True
        list_move_all(&worker.enter_again, &worker.enter_later)
        worker.enter_round_ms = worker.ctx.now_ms + ROUND_MS
    while not list_empty(&worker.enter_again):
        if count == PASS_MAX or entered == PASS_ENTERED:
            worker_enter_at(worker, worker.ctx.now_ms)
            return False
        c = <Connection *>worker.enter_again.next.owner
        list_remove(&c.entering)
        count += 1
        if not worker_enter(worker, c):
            return False
        entered += connection_is_entered(c)
    return True


cdef inline bint worker_enter(Worker *worker, Connection *c) noexcept nogil:
    """Enter a connection, if that is possible now. False: the system has refused it, and is to be
    left alone for a while."""
    cdef int can = connection_can_enter(worker, c)
    cdef int failure = 0
    if can == ENTER_NOW:
        failure = pages_enter(&worker.ctx, c)
    if failure < 0 and failure != -EINVAL and failure != -EMSGSIZE:  # these are of no system
        worker_tell_not_kept(worker, -failure)
    if can == ENTER_LATER or failure < 0 and failure != -EOPNOTSUPP:
        if list_empty(&worker.enter_later) and list_empty(&worker.enter_again):
            worker.enter_round_ms = worker.ctx.now_ms + ROUND_MS
        list_append(&worker.enter_later, &c.entering)
    if failure == 0 or failure_is_its_own(failure):
        return True
    worker_enter_at(worker, worker.ctx.now_ms + ROUND_MS)
    return False


cdef inline bint failure_is_its_own(int failure) noexcept nogil:
    """Whether others may be entered all the same."""
    return (failure == -EINVAL or failure == -EMSGSIZE or failure == -EOPNOTSUPP
            or failure == -EUSERS)


# ── those that rest ──────────────────────────────────────────────────────────────────────────────

cdef inline int resting_enter(Worker *main, int *failure) noexcept nogil:
    """Enter all that rest, whatever their age; how many there are. `failure`: 0, or the last
    -errno."""
    cdef Link *link = main.resting.next
    cdef Connection *c
    cdef int count = 0
    cdef int result
    failure[0] = 0
    while link != &main.resting:
        c = <Connection *>link.owner
        link = link.next
        if connection_is_entered(c) or connection_can_enter(main, c) != ENTER_NOW:
            continue
        result = pages_enter(&main.ctx, c)
        if result == 0:
            count += 1
        else:
            failure[0] = result
    return count


# ── what the policy is told ──────────────────────────────────────────────────────────────────────

cdef inline void worker_look_for_old(Worker *worker) noexcept nogil:
    """There is no slate: see whether there should be one."""
    cdef Link *link = worker.members.next
    cdef Connection *c
    cdef int count = 0
    cdef int can
    while link != &worker.members and count < PASS_MAX:
        c = <Connection *>link.owner
        link = link.next
        count += 1
        if c == NULL:
            continue
        if c.opened_ms + OLD_MS > worker.ctx.now_ms:
            worker_enter_at(worker, max(c.opened_ms + OLD_MS, worker.ctx.now_ms + PASS_MS))
            return
        can = connection_can_enter(worker, c)
        if can == ENTER_NOW:
            atomic_set(&worker.gauges.old, 1)
            worker_tell_main(worker)
            return
        if can == ENTER_LATER:
            worker_enter_at(worker, worker.ctx.now_ms + ROUND_MS)


cdef inline void worker_tell_not_kept(Worker *worker, int error) noexcept nogil:
    """Only the first time."""
    if atomic_add(&worker.ctx.slate.failures, 1) == 1:
        atomic_set(&worker.gauges.not_kept, error)
        worker_tell_main(worker)


cdef inline void worker_tell_main(Worker *worker) noexcept nogil:
    if worker.main == NULL:
        main_tell_policy(worker)
    else:
        mailbox_wake(&worker.main.mailbox)


cdef inline void main_tell_policy(Worker *main) noexcept nogil:
    """What workers have to tell of connections that are to be kept. Without room for an event it is
    looked for again in a later turn."""
    cdef int reports = hint_get(&main.gauges.reports)
    cdef int error
    if atomic_get(&main.gauges.old):
        if not reports & REPORT_OLD:
            atomic_set(&main.gauges.old, 0)  # it has been told already
        elif policy_event_add(main, EVENT_OLD, -1, 0, 0) != NULL:
            hint_set(&main.gauges.reports, reports & ~REPORT_OLD)
            atomic_set(&main.gauges.old, 0)
        else:
            worker_enter_at(main, main.ctx.now_ms)
    error = atomic_take(&main.gauges.not_kept)
    if error != 0 and policy_event_add(main, EVENT_NOT_KEPT, -1, error, 0) == NULL:
        atomic_set(&main.ctx.slate.failures, 0)  # the next one is told


# ── tidying ──────────────────────────────────────────────────────────────────────────────────────

cdef inline void worker_tidy(Worker *worker) noexcept nogil:
    """It is time to empty a page: what has ended is kept by it until then."""
    cdef int found = pages_tidy(worker_slate(worker), worker.number == QUARANTINE)
    worker.tidy_ms = 0
    if found == TIDY_DONE:
        worker.tidy_ms = worker.ctx.now_ms  # there may be others
    elif found == TIDY_LATER:
        worker.tidy_ms = worker.ctx.now_ms + ROUND_MS
    elif found == TIDY_BLOCKED:
        quarantine_order_tidy(worker.quarantine)


# ── when ─────────────────────────────────────────────────────────────────────────────────────────

cdef inline void enter_expect(Worker *worker, const Connection *c) noexcept nogil:
    """A connection begins in this worker."""
    if worker.ctx.slate == NULL and not hint_get(&worker.gauges.reports) & REPORT_OLD:
        return
    if worker.number != QUARANTINE and not connection_is_entered(c):
        worker_enter_at(worker, max(c.opened_ms + OLD_MS, worker.ctx.now_ms))


cdef inline void worker_enter_at(Worker *worker, int64_t when_ms) noexcept nogil:
    """Have worker_enter_old() called at `when_ms`."""
    if worker.enter_ms == 0 or when_ms < worker.enter_ms:
        worker.enter_ms = when_ms


# ── whether ───────────────────────────────────────────────────────────────────────────────────────

cdef inline int connection_can_enter(const Worker *worker, const Connection *c) noexcept nogil:
    """ENTER_*."""
    cdef int client = endpoint_can_enter(worker, &c.client)
    cdef int target = endpoint_can_enter(worker, &c.target)
    if client == ENTER_NEVER or target == ENTER_NEVER:
        return ENTER_NEVER
    if c.state != CONNECTED or c.up.state == DEAD or c.down.state == DEAD:
        return ENTER_LATER
    if c.drained > 0 or not list_empty(&c.to_quarantine):
        return ENTER_LATER
    return max(client, target)


cdef inline int endpoint_can_enter(const Worker *worker, const Endpoint *end) noexcept nogil:
    """ENTER_*."""
    if end.family == AF_UNIX:
        if hint_get(&worker.gauges.tcp_alone):
            return ENTER_NEVER
        if end.rights.state == RIGHTS_UNKNOWN or end.rights.state >= RIGHTS_AHEAD:
            return ENTER_LATER
    elif end.family != AF_INET and end.family != AF_INET6:
        return ENTER_NEVER
    return ENTER_LATER if end.error != 0 or end.gone or end.urgent else ENTER_NOW


cdef inline bint connection_is_entered(const Connection *c) noexcept nogil:
    return c.slot != NULL and c.slot.entry != 0
