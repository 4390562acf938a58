# The boss's crew: further relays, each with a loop in a thread of its own.
#
# The boss accepts and connects, and hands each connection to the relay with the fewest. From then
# on everything about it happens there, but for the policy's part: a failed connect and an end to be
# reported come back through the boss's inbox. These threads never run Python, and block no longer
# than a batch of events takes.

from proxyd.relay.connection cimport Crew, HOW_COUNT, KIND_INBOX, Relaying, connections_free
from proxyd.relay.mailbox cimport (
    ORDER_ANSWER, ORDER_STOP, inbox_close, inbox_open, inbox_order, inbox_return, inbox_ring,
)
from proxyd.relay.sys cimport (
    CLOCK_REALTIME, ENOMEM, EPOLLIN, EPOLL_CTL_ADD, EPOLL_CTL_DEL, SIG_SETMASK, calloc,
    clock_gettime, counter_add, epoll_ctl, epoll_event, errno, free, pthread_attr_destroy,
    pthread_attr_init, pthread_attr_setstacksize, pthread_attr_t, pthread_create, pthread_join,
    pthread_sigmask, pthread_timedjoin_np, realloc, shared_add, shared_get, shared_set, sigfillset,
    sigset_t, timespec, uint32_t,
)
from proxyd.relay.list cimport list_move_all
from proxyd.relay.quarantine cimport QUARANTINE_RETRY_MS, quarantine_begin, quarantine_end
from proxyd.relay.loop cimport (
    relay_cut, relay_free, relay_init, relay_open, relay_read_inbox, relay_turn,
)

cdef enum:
    STACK_SIZE = 256 * 1024    # bytes of address space; a loop needs a few KiB of it
    FAREWELL_MS = 200          # the end of the quarantine's thread is waited for so long


cdef inline int relay_open_inbox(Relaying *relay) noexcept nogil:
    """Open its inbox, so that other threads can leave something here; 0 or -errno."""
    cdef epoll_event event
    cdef int failure
    if relay.inbox.bell >= 0:
        return 0
    failure = inbox_open(&relay.inbox, KIND_INBOX)
    if failure < 0:
        return failure
    event.events = EPOLLIN
    event.data.ptr = &relay.inbox
    if epoll_ctl(relay.engine.epoll, EPOLL_CTL_ADD, relay.inbox.bell, &event) < 0:
        failure = -errno
        inbox_close(&relay.inbox)
    return failure


cdef inline void relay_close_inbox(Relaying *relay) noexcept nogil:
    """Only once it is empty."""
    if relay.inbox.bell >= 0:
        epoll_ctl(relay.engine.epoll, EPOLL_CTL_DEL, relay.inbox.bell, NULL)
    inbox_close(&relay.inbox)


cdef inline void *crew_work(void *argument) noexcept nogil:
    """The life of a thread."""
    cdef Relaying *relay = <Relaying *>argument
    cdef Relaying *boss = relay.boss
    cdef int failure = 0
    while failure == 0 and not relay.stopping:
        failure = relay_turn(relay, -1)
        inbox_return(&boss.inbox, &relay.failed, &relay.ended)
    if failure < 0:
        shared_set(&relay.tally.failure, -failure)
        inbox_ring(&boss.inbox)
    return NULL


cdef inline int crew_start(
    Relaying *relay, void *(*work)(void *) noexcept nogil
) noexcept nogil:
    """Start its thread, which hears no signal: those are the boss's. 0 or -errno."""
    cdef pthread_attr_t attributes
    cdef sigset_t every, before
    cdef int error
    sigfillset(&every)
    pthread_attr_init(&attributes)
    pthread_attr_setstacksize(&attributes, STACK_SIZE)
    pthread_sigmask(SIG_SETMASK, &every, &before)
    error = pthread_create(&relay.thread, &attributes, work, relay)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    pthread_attr_destroy(&attributes)
    return -error


cdef inline void crew_free(Relaying *relay) noexcept nogil:
    """One whose thread has ended, or never was."""
    relay_close_inbox(relay)
    relay_free(relay)
    free(relay)


cdef inline int crew_open(Relaying *relay, const Relaying *boss) noexcept nogil:
    """Make a relay as the boss's is; 0 or -errno."""
    cdef int failure = relay_open(
        relay, boss.engine.stream_unit, boss.engine.pool.size, boss.engine.may_splice)
    relay.engine.may_refuse = boss.engine.may_refuse
    relay.idle_ms = boss.idle_ms
    relay.report_ends = boss.report_ends
    return relay_open_inbox(relay) if failure == 0 else failure


cdef inline int crew_fits(Crew *crew) noexcept nogil:
    """Make room for one more; 0 or -ENOMEM."""
    cdef int size = max(2 * crew.size, 4)
    cdef Relaying **relays
    if crew.count < crew.size:
        return 0
    relays = <Relaying **>realloc(crew.relays, size * sizeof(Relaying *))
    if relays == NULL:
        return -ENOMEM
    crew.relays = relays
    crew.size = size
    return 0


cdef inline int crew_hire(Relaying *boss) noexcept nogil:
    """Start one more thread; 0 or -errno. What it is to know of the boss must be settled."""
    cdef int failure = crew_fits(&boss.crew)
    if failure == 0:
        failure = crew_begin(
            boss, &boss.crew.relays[boss.crew.count], boss.shares, crew_work)
    if failure == 0:
        boss.crew.count += 1
    return failure


cdef inline int crew_begin(
    Relaying *boss, Relaying **place, bint shares, void *(*work)(void *) noexcept nogil
) noexcept nogil:
    """Start the thread of a further relay, and put that in `place`; 0 or -errno."""
    cdef Relaying *relay
    cdef int failure = relay_open_inbox(boss)
    if failure < 0:
        return failure
    relay = <Relaying *>calloc(1, sizeof(Relaying))
    if relay == NULL:
        return -ENOMEM
    relay_init(relay, boss.tally, boss.own)
    relay.boss = boss
    relay.quarantine = boss.quarantine
    relay.answered = boss.crew.asked  # it has not been there to be asked
    failure = crew_open(relay, boss)
    relay.shares = shares
    if failure == 0:
        failure = crew_start(relay, work)
    if failure < 0:
        crew_free(relay)
        return failure
    place[0] = relay
    return 0


cdef inline void crew_order(const Relaying *boss, uint32_t order) noexcept nogil:
    cdef int i
    for i in range(boss.crew.count):
        inbox_order(&boss.crew.relays[i].inbox, order)


cdef inline bint crew_answered(const Relaying *boss) noexcept nogil:
    """Whether every thread has answered since crew_ask()."""
    cdef int i
    for i in range(boss.crew.count):
        if shared_get(&boss.crew.relays[i].answered) != boss.crew.asked:
            return False
    return True


cdef inline void crew_ask(Relaying *boss) noexcept nogil:
    shared_add(&boss.crew.asked, 1)
    crew_order(boss, ORDER_ANSWER)


cdef inline void relay_inherit(Relaying *boss, Relaying *relay) noexcept nogil:
    """Take over what a relay that is to go has counted and has not reported yet."""
    cdef int i
    for i in range(HOW_COUNT):
        counter_add(&boss.ends[i], relay.ends[i])
    for i in range(2):
        counter_add(&boss.engine.counters.forwarded[i], relay.engine.counters.forwarded[i])
    counter_add(&boss.handed_over, relay.handed_over)
    counter_add(&boss.engine.counters.spliced, relay.engine.counters.spliced)
    counter_add(&boss.engine.counters.copied, relay.engine.counters.copied)
    list_move_all(&boss.failed, &relay.failed)
    list_move_all(&boss.ended, &relay.ended)


# ── quarantine ───────────────────────────────────────────────────────────────────────────────

cdef inline void *quarantine_work(void *argument) noexcept nogil:
    """The life of its thread. It also cuts what is left itself, since that may block."""
    cdef Relaying *relay = <Relaying *>argument
    crew_work(relay)
    relay.cut = relay_cut(relay, True)
    connections_free(&relay.dead)
    return NULL


cdef inline void quarantine_serve(Relaying *boss) noexcept nogil:
    """Somebody is to go into quarantine: see that there is a thread, now or later."""
    if boss.crew.quarantine == NULL and crew_begin(
            boss, &boss.crew.quarantine, False, quarantine_work) < 0:
        boss.quarantine.retry_ms = boss.engine.now_ms + QUARANTINE_RETRY_MS
        return
    quarantine_begin(boss.quarantine, &boss.crew.quarantine.inbox)
    crew_order(boss, 0)  # who has waited for this is to look again
    inbox_ring(&boss.inbox)


cdef inline bint thread_joins(Relaying *relay, int ms) noexcept nogil:
    """Wait until its thread has ended, but no longer than `ms`."""
    cdef timespec until
    clock_gettime(CLOCK_REALTIME, &until)
    until.tv_nsec += ms * 1000000
    until.tv_sec += until.tv_nsec // 1000000000
    until.tv_nsec %= 1000000000
    return pthread_timedjoin_np(relay.thread, NULL, &until) == 0


cdef inline int quarantine_dismiss(Relaying *boss) noexcept nogil:
    """End its thread and cut its connections; how many those were.

    A thread that blocks is left alone, and boss.crew.quarantine tells: what it uses must stay.
    Its connections are cut by the end of the process, as endpoint_exile() has prepared.
    """
    cdef Relaying *relay = boss.crew.quarantine
    cdef int count
    if relay == NULL:
        return 0
    inbox_order(&relay.inbox, ORDER_STOP)
    if not thread_joins(relay, FAREWELL_MS):
        return shared_get(&relay.open)
    count = relay.cut
    quarantine_end(boss.quarantine)
    relay_inherit(boss, relay)
    boss.crew.quarantine = NULL
    crew_free(relay)
    return count


cdef inline int crew_dismiss(Relaying *boss, bint reset) noexcept nogil:
    """End every thread and cut its connections; how many those were."""
    cdef Relaying *relay
    cdef int i, count = 0
    crew_order(boss, ORDER_STOP)
    for i in range(boss.crew.count):  # all, before any is freed to which another may still give
        pthread_join(boss.crew.relays[i].thread, NULL)
    count += quarantine_dismiss(boss)
    for i in range(boss.crew.count):
        relay = boss.crew.relays[i]
        relay_read_inbox(relay)  # what a thread has left that could not go on
        count += relay_cut(relay, reset)
        relay_inherit(boss, relay)
        crew_free(relay)
    boss.crew.count = 0
    boss.shares = False  # and no other crew is asked for
    if boss.inbox.bell >= 0:
        relay_read_inbox(boss)
    return count
