# Workers: threads that run a loop each, without Python.
#
# The main worker runs in the thread of Python. It accepts clients, connects them, and forwards as
# well; with --threads=N there are N - 1 others. A connection that has moved to one of these stays
# there (balance.pxd). Two things come back, through the main worker's mailbox, since only Python
# can deal with them: failed connects, and ends that are to be reported.
#
# The quarantine's worker is one more, which alone may block: see quarantine.pxd.

from proxyd.relay.clock cimport earlier
from proxyd.relay.close cimport connections_free
from proxyd.relay.list cimport list_empty, list_move_all
from proxyd.relay.loop cimport (
    worker_cut, worker_destroy, worker_init, worker_read_mailbox, worker_set_up, worker_turn,
)
from proxyd.relay.mailbox cimport (
    mailbox_destroy, mailbox_init, mailbox_order, mailbox_order_sweep, mailbox_return,
    mailbox_wake,
)
from proxyd.relay.quarantine cimport (
    QUARANTINE, QUARANTINE_RETRY_MS, quarantine_begin, quarantine_end,
)
from proxyd.relay.records cimport ENDING_COUNT, Sweep
from proxyd.relay.row cimport batches_keep
from proxyd.relay.sweep cimport sweep_begin
from proxyd.relay.sys cimport (
    CLOCK_REALTIME, ENOMEM, EPOLLIN, EPOLL_CTL_ADD, EPOLL_CTL_DEL, SIG_SETMASK, atomic_add,
    atomic_get, atomic_set, calloc, clock_gettime, counter_add, epoll_ctl, epoll_event, errno,
    free, int64_t, pthread_attr_destroy, pthread_attr_init, pthread_attr_setstacksize,
    pthread_attr_t, pthread_create, pthread_join, pthread_sigmask, pthread_timedjoin_np, realloc,
    sigfillset, sigset_t, timespec, uint32_t,
)
from proxyd.relay.types cimport (
    KIND_MAILBOX, ORDER_ANSWER, ORDER_ENTER, ORDER_STOP, ORDER_SWEEP_END, Worker, Workers,
)

cdef enum:
    STACK_SIZE = 256 * 1024    # bytes of address space; a loop needs a few KiB of it
    QUARANTINE_STOP_MS = 1000  # how long its thread may take to end before it counts as blocked
    QUARANTINE_ANSWER_MS = 200  # likewise, to answer a sweep


# ── start ────────────────────────────────────────────────────────────────────────────────────────

cdef inline int workers_start_one(Worker *main) noexcept nogil:
    """Start one more worker; 0 or -errno. It takes the settings of the main worker as they are now.
    """
    cdef int failure = workers_make_room(&main.workers)
    if failure == 0:
        failure = worker_start(
            main, &main.workers.each[main.workers.count], main.workers.count + 1,
            main.offloads_when_busy, worker_thread)
    if failure == 0:
        main.workers.count += 1
    return failure


cdef inline int workers_make_room(Workers *workers) noexcept nogil:
    """Make room in the array for one more worker; 0 or -ENOMEM."""
    cdef int size = max(2 * workers.size, 4)
    cdef Worker **each
    if workers.count < workers.size:
        return 0
    each = <Worker **>realloc(workers.each, size * sizeof(Worker *))
    if each == NULL:
        return -ENOMEM
    workers.each = each
    workers.size = size
    return 0


cdef inline void quarantine_start(Worker *main) noexcept nogil:
    """A connection is to go into quarantine: start its thread if there is none. If that fails, it
    is tried again later."""
    if main.workers.quarantine == NULL and worker_start(
            main, &main.workers.quarantine, QUARANTINE, False, quarantine_thread) < 0:
        main.quarantine.retry_ms = main.ctx.now_ms + QUARANTINE_RETRY_MS
        return
    quarantine_begin(main.quarantine, main.workers.quarantine)
    workers_order(main, 0)  # connections that have waited for this are to be moved now
    mailbox_wake(&main.mailbox)


cdef inline int worker_start(
    Worker *main, Worker **place, int number, bint offloads_when_busy,
    void *(*work)(void *) noexcept nogil
) noexcept nogil:
    """Make a worker, store it in `place`, and start its thread; 0 or -errno."""
    cdef Worker *worker
    cdef int failure = worker_open_mailbox(main)
    if failure < 0:
        return failure
    worker = <Worker *>calloc(1, sizeof(Worker))
    if worker == NULL:
        return -ENOMEM
    worker_init(worker, main.gauges, main.self_connects)
    worker.main = main
    worker.number = number
    worker.quarantine = main.quarantine
    worker.answered_ping = main.workers.ping_sequence  # earlier pings are not for it
    worker.gather_answer = worker.answered_gather = main.workers.gather_sequence
    worker.sweep = main.sweep  # what comes from other workers may be yet to be passed
    worker.sweep_answer = worker.answered_sweep = 2 * main.sweep.number
    failure = worker_set_up_like(worker, main)
    worker.offloads_when_busy = offloads_when_busy
    if failure == 0:
        failure = worker_start_thread(worker, work)
    if failure < 0:
        worker_free(worker)
        return failure
    place[0] = worker
    return 0


cdef inline int worker_set_up_like(Worker *worker, const Worker *main) noexcept nogil:
    """Set up a worker with the settings of the main one; 0 or -errno."""
    cdef int failure = worker_set_up(
        worker, main.ctx.stream_unit, main.ctx.pool.size, main.ctx.may_splice)
    worker.ctx.may_refuse = main.ctx.may_refuse
    worker.idle_ms = main.idle_ms
    return worker_open_mailbox(worker) if failure == 0 else failure


cdef inline int worker_start_thread(
    Worker *worker, void *(*work)(void *) noexcept nogil
) noexcept nogil:
    """Start its thread, with every signal blocked: those are for the main thread. 0 or -errno."""
    cdef pthread_attr_t attributes
    cdef sigset_t every, before
    cdef int error
    sigfillset(&every)
    pthread_attr_init(&attributes)
    pthread_attr_setstacksize(&attributes, STACK_SIZE)
    pthread_sigmask(SIG_SETMASK, &every, &before)
    error = pthread_create(&worker.thread, &attributes, work, worker)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    pthread_attr_destroy(&attributes)
    return -error


cdef inline void *quarantine_thread(void *argument) noexcept nogil:
    """What the quarantine's thread runs. It cuts its remaining connections itself, since that may
    block."""
    cdef Worker *worker = <Worker *>argument
    worker_thread(worker)
    worker.cut = worker_cut(worker, True)
    connections_free(&worker.dead)
    return NULL


cdef inline void *worker_thread(void *argument) noexcept nogil:
    """What the thread of a worker runs."""
    cdef Worker *worker = <Worker *>argument
    cdef Worker *main = worker.main
    cdef int failure = 0
    while failure == 0 and not worker.stopping:
        failure = worker_turn(worker, -1)
        mailbox_return(&main.mailbox, &worker.failed, &worker.ended, &worker.batches)
        worker_answer(worker)
    if failure < 0:
        atomic_set(&worker.gauges.worker_error, -failure)  # GCOVR_EXCL_LINE - see worker_turn()
        mailbox_wake(&main.mailbox)  # GCOVR_EXCL_LINE - the same
    return NULL


cdef inline void worker_answer(Worker *worker) noexcept nogil:
    """After all that it had to tell."""
    if (worker.sweep_answer == worker.answered_sweep
            and worker.gather_answer == worker.answered_gather):
        return
    atomic_set(&worker.answered_sweep, worker.sweep_answer)
    atomic_set(&worker.answered_gather, worker.gather_answer)
    mailbox_wake(&worker.main.mailbox)


# ── sweeps ───────────────────────────────────────────────────────────────────────────────────────

cdef inline void workers_sweep(
    Worker *main, int what, int number, long long connection
) noexcept nogil:
    """Begin a sweep, when there is none."""
    cdef Sweep sweep
    cdef int i
    sweep.number = number
    sweep.what = what
    sweep.connection = connection
    atomic_set(&main.gauges.terminated, 0)
    atomic_set(&main.gauges.rows_lost, 0)
    sweep_begin(main, &sweep)
    for i in range(main.workers.count):
        mailbox_order_sweep(&main.workers.each[i].mailbox, &sweep)
    if main.workers.quarantine != NULL:
        mailbox_order_sweep(&main.workers.quarantine.mailbox, &sweep)
    sweep_await(main, 2 * number)


cdef inline int64_t sweep_until(Worker *main, int64_t deadline_ms) noexcept nogil:
    """`deadline_ms`, or when not to wait for the quarantine any longer."""
    if main.workers.sweep_awaited != 0 and sweep_waits_for_quarantine(main):
        return earlier(deadline_ms, main.workers.sweep_patience_ms)
    return deadline_ms


cdef inline void sweep_advance(Worker *main) noexcept nogil:
    """Go on once every worker has answered. The first answer says that it has passed all of its
    connections, the second that none can come that was yet to be passed."""
    while main.workers.sweep_awaited != 0 and list_empty(&main.cursor) and sweep_answered(main):
        if main.workers.sweep_awaited % 2 == 0:
            sweep_ask_again(main)
        else:
            sweep_finish(main)


cdef inline bint sweep_answered(Worker *main) noexcept nogil:
    """Whether every worker has answered; the quarantine may block, and is not waited for then."""
    cdef int i
    for i in range(main.workers.count):
        if atomic_get(&main.workers.each[i].answered_sweep) < main.workers.sweep_awaited:
            return False
    return not sweep_waits_for_quarantine(main) or (
        main.ctx.now_ms >= main.workers.sweep_patience_ms)


cdef inline void sweep_ask_again(Worker *main) noexcept nogil:
    """A quarantine that has not answered is not asked, and not waited for again."""
    cdef bint blocked = sweep_waits_for_quarantine(main)
    workers_order(main, ORDER_SWEEP_END)
    if main.workers.quarantine != NULL and not blocked:
        mailbox_order(&main.workers.quarantine.mailbox, ORDER_SWEEP_END)
    sweep_await(main, main.workers.sweep_awaited + 1)
    if blocked:
        main.workers.sweep_patience_ms = main.ctx.now_ms


cdef inline void sweep_await(Worker *main, int answer) noexcept nogil:
    main.workers.sweep_awaited = answer
    main.workers.sweep_patience_ms = main.ctx.now_ms + QUARANTINE_ANSWER_MS


cdef inline void sweep_finish(Worker *main) noexcept nogil:
    cdef Worker *quarantine = main.workers.quarantine
    if main.mailbox.wake_fd >= 0:
        worker_read_mailbox(main)  # all that came with the answers
    main.workers.sweep_missing = atomic_get(&main.gauges.rows_lost)
    if quarantine != NULL and atomic_get(&quarantine.answered_sweep) < 2 * main.sweep.number:
        main.workers.sweep_missing += atomic_get(&quarantine.connection_count)
    main.workers.sweep_awaited = 0
    main.workers.sweep_over = True


cdef inline bint sweep_waits_for_quarantine(Worker *main) noexcept nogil:
    cdef Worker *quarantine = main.workers.quarantine
    return quarantine != NULL and (
        atomic_get(&quarantine.answered_sweep) < main.workers.sweep_awaited)


# ── alive? ───────────────────────────────────────────────────────────────────────────────────────

cdef inline void workers_ping(Worker *main) noexcept nogil:
    """Ask every worker for an answer."""
    atomic_add(&main.workers.ping_sequence, 1)
    workers_order(main, ORDER_ANSWER)


cdef inline bint workers_answered(const Worker *main) noexcept nogil:
    """Whether every worker has answered the last ping."""
    cdef int i
    for i in range(main.workers.count):
        if atomic_get(&main.workers.each[i].answered_ping) != main.workers.ping_sequence:
            return False
    return True


# ── stop ─────────────────────────────────────────────────────────────────────────────────────────

cdef inline int workers_stop(Worker *main, bint reset) noexcept nogil:
    """End every thread and cut its connections; returns how many these were."""
    cdef Worker *worker
    cdef int i, count = 0
    workers_order(main, ORDER_STOP)
    # All of them, before any is freed: one may still move connections to another.
    for i in range(main.workers.count):
        pthread_join(main.workers.each[i].thread, NULL)
    count += quarantine_stop(main)
    for i in range(main.workers.count):
        worker = main.workers.each[i]
        worker_read_mailbox(worker)  # whatever is left of a thread that could not go on
        count += worker_cut(worker, reset)
        worker_inherit(main, worker)
        worker_free(worker)
    main.workers.count = 0
    main.offloads_when_busy = False  # no further workers are asked for
    if main.mailbox.wake_fd >= 0:
        worker_read_mailbox(main)
    batches_keep(&main.batches)
    main.batches_on_the_way = 0
    return count


cdef inline int quarantine_stop(Worker *main) noexcept nogil:
    """End its thread and cut its connections; returns how many these were.

    A thread that blocks is left alone, and main.workers.quarantine stays set: the memory that it
    uses must stay as well. Its connections are cut by the end of the process, for which
    endpoint_quarantine() has prepared."""
    cdef Worker *worker = main.workers.quarantine
    cdef int count
    if worker == NULL:
        return 0
    mailbox_order(&worker.mailbox, ORDER_STOP)
    if not thread_join_within(worker, QUARANTINE_STOP_MS):
        return atomic_get(&worker.connection_count)
    count = worker.cut
    quarantine_end(main.quarantine)
    worker_inherit(main, worker)
    main.workers.quarantine = NULL
    worker_free(worker)
    return count


cdef inline bint thread_join_within(Worker *worker, int ms) noexcept nogil:
    """Wait for the end of its thread, for `ms` at most. Whether it has ended."""
    cdef timespec until
    clock_gettime(CLOCK_REALTIME, &until)
    until.tv_nsec += ms * 1000000
    until.tv_sec += until.tv_nsec // 1000000000
    until.tv_nsec %= 1000000000
    return pthread_timedjoin_np(worker.thread, NULL, &until) == 0


cdef inline void worker_inherit(Worker *main, Worker *worker) noexcept nogil:
    """Add what a worker that is about to be freed has counted, and has not reported yet, to the
    main one's."""
    cdef int i
    for i in range(ENDING_COUNT):
        counter_add(&main.ends[i], worker.ends[i])
    for i in range(2):
        counter_add(&main.ctx.counters.forwarded[i], worker.ctx.counters.forwarded[i])
    counter_add(&main.handed_over, worker.handed_over)
    counter_add(&main.ctx.counters.spliced, worker.ctx.counters.spliced)
    counter_add(&main.ctx.counters.copied, worker.ctx.counters.copied)
    list_move_all(&main.failed, &worker.failed)
    list_move_all(&main.ended, &worker.ended)
    list_move_all(&main.batches, &worker.batches)


cdef inline void worker_free(Worker *worker) noexcept nogil:
    """Free a worker whose thread has ended, or was never started."""
    worker_close_mailbox(worker)
    worker_destroy(worker)
    free(worker)


# ── mailboxes ────────────────────────────────────────────────────────────────────────────────────

cdef inline int worker_open_mailbox(Worker *worker) noexcept nogil:
    """Open its mailbox, so that other threads can reach it; 0 or -errno."""
    cdef epoll_event event
    cdef int failure
    if worker.mailbox.wake_fd >= 0:
        return 0
    failure = mailbox_init(&worker.mailbox, KIND_MAILBOX)
    if failure < 0:
        return failure
    event.events = EPOLLIN
    event.data.ptr = &worker.mailbox
    if epoll_ctl(worker.ctx.epoll, EPOLL_CTL_ADD, worker.mailbox.wake_fd, &event) < 0:
        failure = -errno
        mailbox_destroy(&worker.mailbox)
    return failure


cdef inline void worker_close_mailbox(Worker *worker) noexcept nogil:
    """The mailbox must be empty."""
    if worker.mailbox.wake_fd >= 0:
        epoll_ctl(worker.ctx.epoll, EPOLL_CTL_DEL, worker.mailbox.wake_fd, NULL)
    mailbox_destroy(&worker.mailbox)


cdef inline void workers_enter(Worker *main) noexcept nogil:
    """There is a slate, or the policy wants to know that one is needed: have every worker look for
    old connections."""
    main.enter_ms = main.ctx.now_ms
    workers_order(main, ORDER_ENTER)


cdef inline void workers_wake(const Worker *main) noexcept nogil:
    """Wake every worker, and the quarantine's."""
    workers_order(main, 0)
    if main.workers.quarantine != NULL:
        mailbox_wake(&main.workers.quarantine.mailbox)


cdef inline void workers_order(const Worker *main, uint32_t order) noexcept nogil:
    """Give an order to every worker; 0 only wakes them."""
    cdef int i
    for i in range(main.workers.count):
        mailbox_order(&main.workers.each[i].mailbox, order)
