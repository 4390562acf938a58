# A worker's loop: wait for events, and work on one batch of them.
#
# Every worker has a loop. Only the main worker has listeners, watched fds and events for the
# policy.

from proxyd.relay.accept cimport listener_accept_clients, listeners_resume
from proxyd.relay.balance cimport worker_is_overloaded, worker_offload
from proxyd.relay.bookkeeping cimport policy_event_add
from proxyd.relay.clock cimport clock_ms, clock_ns, earlier
from proxyd.relay.close cimport (
    RESET_OWED, connection_close, connections_free, endpoint_close,
)
from proxyd.relay.connect cimport connection_begin
from proxyd.relay.connection cimport connection_advance, connection_event, connection_timer_expired
from proxyd.relay.enter cimport (
    main_tell_policy, worker_enter_at, worker_enter_old, worker_tidy,
)
from proxyd.relay.gather cimport (
    connection_rest, worker_end_rest, worker_gather, worker_hand_to_rest,
)
from proxyd.relay.half cimport half_held
from proxyd.relay.list cimport link_init, list_append, list_empty, list_remove
from proxyd.relay.mailbox cimport mailbox_take
from proxyd.relay.pipe cimport PIPE_SIZE_MIN, pool_clear
from proxyd.relay.pump cimport COPY_UNIT, FIRST_UNIT
from proxyd.relay.quarantine cimport worker_quarantine
from proxyd.relay.records cimport ENDING_CUT, ENDING_IDLE, Sweep
from proxyd.relay.row cimport batches_free
from proxyd.relay.slate cimport worker_use_slate
from proxyd.relay.sweep cimport sweep_begin, sweep_can_walk, sweep_walk
from proxyd.relay.sys cimport (
    EINTR, ENOMEM, EPOLL_CLOEXEC, atomic_get, atomic_set, close, epoll_create1, epoll_event,
    epoll_wait, errno, free, hint_set, int64_t, malloc, uint32_t,
)
from proxyd.relay.types cimport (
    CLOSED, CONNECTED, EPOLL_EVENTS_MAX, EVENT_READY, KIND_FLOW_LISTENER, KIND_LISTENER,
    KIND_MAILBOX, KIND_WATCH, ORDER_ANSWER, ORDER_ENTER, ORDER_GATHER, ORDER_STOP, ORDER_SWEEP,
    ORDER_SWEEP_END, ORDER_TIDY, ORDER_TRIM, Connection, Endpoint, Gauges, Link, Listener,
    SelfConnectTable, Watch, Worker,
)

cdef enum:
    PIPE_SIZE_MAX = 1 << 30    # F_SETPIPE_SZ takes an int


# ── one batch ────────────────────────────────────────────────────────────────────────────────────

cdef inline int worker_turn(Worker *worker, int64_t deadline_ms) noexcept nogil:
    """Wait until `deadline_ms` at most (-1: for ever), then work on what has come; 0 or -errno.

    Does nothing until the policy has fetched all events, so that there is room for new ones."""
    cdef int i, count
    cdef bint overflows
    if worker.policy_event_count > 0:
        return 0
    count = worker_wait(worker, worker_timeout(worker, deadline_ms))
    if count < 0:
        if errno != EINTR:
            return -errno  # GCOVR_EXCL_LINE - epoll_wait fails with EINTR only
        count = 0
    worker.ctx.now_ms = clock_ms()
    worker.turns += 1
    worker_use_slate(worker)
    overflows = worker_is_overloaded(worker)
    for i in range(count):
        worker_dispatch(worker, &worker.events[i])
    worker_pump_ready(worker)
    worker_accept(worker, count)
    if worker.flows != NULL:
        worker.flows.turn(worker)
    if worker.room_ms != 0:
        listeners_resume(worker)
    if worker.next_timer_ms != 0 and worker.next_timer_ms <= worker.ctx.now_ms:
        worker_run_timers(worker)
    if worker.idle_ms > 0:
        worker_close_idle(worker)
    if not list_empty(&worker.cursor):
        sweep_walk(worker)
    if worker.enter_ms != 0 and worker.enter_ms <= worker.ctx.now_ms:
        worker_enter_old(worker)
    if worker.tidy_ms != 0 and worker.tidy_ms <= worker.ctx.now_ms:
        worker_tidy(worker)
    connections_free(&worker.dead)
    if not list_empty(&worker.to_quarantine):
        worker_quarantine(worker)
    if overflows:
        worker_offload(worker)
    if worker.gathers:
        worker_obey_gather(worker)
    return 0


cdef inline int worker_timeout(Worker *worker, int64_t deadline_ms) noexcept nogil:
    """Milliseconds that epoll_wait may sleep."""
    cdef int64_t until = deadline_ms
    cdef int64_t flows_ms
    if not (list_empty(&worker.ready) and list_empty(&worker.failed) and list_empty(&worker.ended)):
        return 0
    if not (list_empty(&worker.batches) and list_empty(&worker.begun)) or sweep_can_walk(worker):
        return 0
    if worker.next_timer_ms != 0:
        until = earlier(until, worker.next_timer_ms)
    if worker.room_ms != 0:
        until = earlier(until, worker.room_ms)
    if worker.enter_ms != 0:
        until = earlier(until, worker.enter_ms)
    if worker.tidy_ms != 0:
        until = earlier(until, worker.tidy_ms)
    if worker.idle_ms > 0 and not list_empty(&worker.live):
        until = earlier(until, (<Connection *>worker.live.next.owner).active_ms + worker.idle_ms)
    if worker.flows != NULL:
        flows_ms = worker.flows.next_ms(worker)
        if flows_ms >= 0:
            until = earlier(until, flows_ms)
    if until < 0:
        return -1
    return <int>min(max(until - clock_ms(), 0), 1 << 30)


cdef inline int worker_wait(Worker *worker, int timeout_ms) noexcept nogil:
    """As epoll_wait(2). Others see meanwhile that this worker sleeps, and may give it work."""
    cdef int count
    cdef int64_t began_ns
    if not worker.offloads_when_busy:
        return epoll_wait(worker.ctx.epoll, worker.events, EPOLL_EVENTS_MAX, timeout_ms)
    began_ns = clock_ns()
    hint_set(&worker.asleep, 1)
    count = epoll_wait(worker.ctx.epoll, worker.events, EPOLL_EVENTS_MAX, timeout_ms)
    hint_set(&worker.asleep, 0)
    worker.busy.asleep_ns += clock_ns() - began_ns
    return count


cdef inline void worker_dispatch(Worker *worker, epoll_event *event) noexcept nogil:
    cdef Watch *watch = <Watch *>event.data.ptr
    if watch.kind == KIND_WATCH:
        if watch.began_ns != 0 and watch.connect_us < 0:
            watch.connect_us = (clock_ns() - watch.began_ns) // 1000
        policy_event_add(worker, EVENT_READY, watch.fd, event.events, 0)
    elif watch.kind == KIND_MAILBOX:
        worker_read_mailbox(worker)
    elif watch.kind >= KIND_FLOW_LISTENER:
        worker.flows.event(worker, watch, event.events)
    elif watch.kind != KIND_LISTENER:
        connection_event(worker, <Endpoint *>watch, event.events)


cdef inline void worker_read_mailbox(Worker *worker) noexcept nogil:
    """What other threads have left: connections to begin, connections to report, orders."""
    cdef Link begin, rest
    cdef Connection *c
    cdef Sweep sweep
    cdef uint32_t orders
    link_init(&begin, NULL)
    link_init(&rest, NULL)
    orders = mailbox_take(
        &worker.mailbox, &begin, &worker.failed, &worker.ended, &worker.batches, &sweep)
    while not list_empty(&begin):
        c = <Connection *>begin.next.owner
        list_remove(&c.live)
        if c.state != CLOSED and atomic_get(&worker.gauges.gathering):
            connection_rest(worker, c)
            list_append(&rest, &c.live)
        else:
            connection_begin(worker, c)
    worker_hand_to_rest(worker, &rest)
    if orders & ORDER_GATHER:
        worker.gathers = True
    if orders & ORDER_TRIM:
        pool_clear(&worker.ctx.pool)
    if orders & ORDER_ANSWER:
        atomic_set(&worker.answered_ping, atomic_get(&worker.main.workers.ping_sequence))
    if orders & ORDER_SWEEP:
        sweep_begin(worker, &sweep)
    if orders & ORDER_SWEEP_END:
        worker.sweep_answer = 2 * worker.sweep.number + 1
    if orders & ORDER_ENTER:
        worker_enter_at(worker, clock_ms())
    if orders & ORDER_TIDY:
        worker.tidy_ms = clock_ms()
    if orders & ORDER_STOP:
        worker.stopping = True
    if worker.main == NULL:
        main_tell_policy(worker)


cdef inline void worker_obey_gather(Worker *worker) noexcept nogil:
    """Only at the end of a turn, as worker_offload(): later events of the batch would wake them."""
    worker.gathers = False
    if atomic_get(&worker.gauges.gathering):
        worker_gather(worker)
        worker.gather_answer = atomic_get(&worker.main.workers.gather_sequence)


cdef inline void worker_pump_ready(Worker *worker) noexcept nogil:
    """One more turn for each connection whose pump spent its budget."""
    cdef Link *last = worker.ready.prev
    cdef Link *link
    if list_empty(&worker.ready):
        return
    while True:
        link = worker.ready.next
        list_remove(link)
        connection_advance(worker, <Connection *>link.owner)
        if link == last:
            return


cdef inline void worker_accept(Worker *worker, int count) noexcept nogil:
    """The listeners' turn. It comes after the connections, some of which may have ended and made
    room; and not while there are events for the policy, which may mean that no client is to be
    accepted any more."""
    cdef Watch *watch
    cdef int i
    if worker.policy_event_count > 0:
        return  # listeners are level-triggered: they are announced again
    for i in range(count):
        watch = <Watch *>worker.events[i].data.ptr
        if watch.kind == KIND_LISTENER:
            listener_accept_clients(worker, <Listener *>watch)


cdef inline void worker_run_timers(Worker *worker) noexcept nogil:
    """Serve the timers that are due, and find out when the next one is."""
    cdef Link *link = worker.timed.next
    cdef Link *after
    cdef Connection *c
    worker.next_timer_ms = 0
    while link != &worker.timed:
        after = link.next
        c = <Connection *>link.owner
        if c.timer_ms <= worker.ctx.now_ms:
            connection_timer_expired(worker, c)
        elif worker.next_timer_ms == 0 or c.timer_ms < worker.next_timer_ms:
            worker.next_timer_ms = c.timer_ms
        link = after


cdef inline void worker_close_idle(Worker *worker) noexcept nogil:
    """Close connections that were silent for too long; reset those on which that loses bytes."""
    cdef Connection *c
    cdef int how
    while not list_empty(&worker.live):
        c = <Connection *>worker.live.next.owner
        if worker.ctx.now_ms - c.active_ms < worker.idle_ms:
            return
        if c.state == CONNECTED:
            how = RESET_OWED if connection_owes_bytes(c) else 0
            connection_close(worker, c, ENDING_IDLE, how)
        else:
            # Those that are connecting or ending have limits of their own.
            c.active_ms = worker.ctx.now_ms
            list_remove(&c.live)
            list_append(&worker.live, &c.live)


cdef inline bint connection_owes_bytes(const Connection *c) noexcept nogil:
    """Whether one side has not received everything, and must not believe that it has."""
    return (half_held(&c.up) + half_held(&c.down) > 0
            or c.client.error != 0 or c.target.error != 0)


# ── set-up and end ───────────────────────────────────────────────────────────────────────────────

cdef inline void worker_init(
    Worker *worker, Gauges *gauges, SelfConnectTable *table
) noexcept nogil:
    """What worker_destroy() relies on. The memory is all zero."""
    worker.gauges = gauges
    worker.self_connects = table
    worker.ctx.epoll = -1
    worker.ctx.now_ms = clock_ms()
    worker.mailbox.wake_fd = -1
    worker.workers.machine.stat_fd = -1
    worker.busy.since_ns = clock_ns()
    link_init(&worker.live, NULL)
    link_init(&worker.members, NULL)
    link_init(&worker.cursor, NULL)
    link_init(&worker.enter_cursor, NULL)
    link_init(&worker.enter_later, NULL)
    link_init(&worker.enter_again, NULL)
    link_init(&worker.batches, NULL)
    link_init(&worker.begun, NULL)
    link_init(&worker.timed, NULL)
    link_init(&worker.ready, NULL)
    link_init(&worker.failed, NULL)
    link_init(&worker.ended, NULL)
    link_init(&worker.dead, NULL)
    link_init(&worker.to_quarantine, NULL)
    link_init(&worker.resting, NULL)
    link_init(&worker.waiting_listeners, NULL)


cdef inline int worker_set_up(
    Worker *worker, size_t stream_unit, size_t pipe_size, bint may_splice
) noexcept nogil:
    """0 or -errno; worker_destroy() is due in either case."""
    worker.ctx.first_unit = min(stream_unit, <size_t>FIRST_UNIT)
    worker.ctx.copy_unit = min(stream_unit, <size_t>COPY_UNIT)
    worker.ctx.stream_unit = stream_unit
    worker.ctx.pool.size = min(pipe_size, <size_t>PIPE_SIZE_MAX)
    worker.ctx.may_splice = may_splice and pipe_size >= PIPE_SIZE_MIN
    worker.ctx.buffer = <char *>malloc(stream_unit)
    if worker.ctx.buffer == NULL:
        return -ENOMEM
    worker.ctx.epoll = epoll_create1(EPOLL_CLOEXEC)
    return -errno if worker.ctx.epoll < 0 else 0


cdef inline void worker_destroy(Worker *worker) noexcept nogil:
    """Free all that it owns, including the clients of failed connects that the policy has not
    fetched."""
    cdef Link *link = worker.failed.next
    worker_cut(worker, True)
    while link != &worker.failed:
        endpoint_close(worker, &(<Connection *>link.owner).client, True)
        link = link.next
    connections_free(&worker.failed)
    connections_free(&worker.ended)
    connections_free(&worker.dead)
    batches_free(&worker.batches)
    batches_free(&worker.begun)
    pool_clear(&worker.ctx.pool)
    if worker.ctx.epoll >= 0:
        close(worker.ctx.epoll)
    if worker.ctx.intent == NULL:  # otherwise it is the slate's
        free(worker.ctx.buffer)


cdef inline int worker_cut(Worker *worker, bint reset) noexcept nogil:
    """Close every connection of this worker. Returns how many these were."""
    cdef int how = RESET_OWED if reset else 0
    cdef int count = 0
    worker_end_rest(worker)
    while not list_empty(&worker.live):
        connection_close(worker, <Connection *>worker.live.next.owner, ENDING_CUT, how)
        count += 1
    return count
