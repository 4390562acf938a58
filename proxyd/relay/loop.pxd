# A relay's loop: wait for events, and work on one batch of them.
#
# Every relay has one, the boss's and those of its crew. Only the boss has gates, watched fds and
# notes for the policy.

from proxyd.relay.busy cimport clock_ns
from proxyd.relay.connection cimport (
    CONNECTED, Connection, EVENTS_MOST, HOW_CUT, HOW_IDLE, KIND_GATE, KIND_INBOX, KIND_WATCH,
    NOTE_READY, Relaying, connection_advance, connection_begin, connection_close,
    connection_event, connections_free, endpoint_close, note_add, relay_timers,
)
from proxyd.relay.accept cimport GateState, gate_event, gates_reopen
from proxyd.relay.pump cimport COPY_UNIT, Endpoint, FIRST_UNIT, half_held
from proxyd.relay.mailbox cimport ORDER_ANSWER, ORDER_STOP, ORDER_TRIM, inbox_take
from proxyd.relay.sys cimport (
    EINTR, ENOMEM, EPOLL_CLOEXEC, close, epoll_create1, epoll_event, epoll_wait, errno, free,
    hint_set, int64_t, malloc, shared_get, shared_set, uint32_t,
)
from proxyd.relay.list cimport Link, link_init, list_append, list_empty, list_remove
from proxyd.relay.self_connect cimport OwnTable
from proxyd.relay.pipe cimport PIPE_LEAST, pool_clear
from proxyd.relay.balance cimport relay_exile, relay_overflows, relay_share
from proxyd.relay.gauges cimport Tally

cdef enum:
    PIPE_MOST = 1 << 30        # F_SETPIPE_SZ takes an int

ctypedef struct Watch:
    int kind                   # KIND_WATCH, where an Endpoint has its kind
    int fd


cdef inline int64_t clock_ms() noexcept nogil:
    return clock_ns() // 1000000


# ── set-up ───────────────────────────────────────────────────────────────────────────────────

cdef inline void relay_init(Relaying *relay, Tally *tally, OwnTable *own) noexcept nogil:
    """What relay_free() needs to find. The memory is all zero."""
    relay.tally = tally
    relay.own = own
    relay.engine.epoll = -1
    relay.engine.now_ms = clock_ms()
    relay.inbox.bell = -1
    relay.crew.machine.stat = -1
    relay.busy.since_ns = clock_ns()
    link_init(&relay.live, NULL)
    link_init(&relay.timed, NULL)
    link_init(&relay.again, NULL)
    link_init(&relay.failed, NULL)
    link_init(&relay.ended, NULL)
    link_init(&relay.dead, NULL)
    link_init(&relay.exiles, NULL)
    link_init(&relay.full, NULL)


cdef inline int relay_open(
    Relaying *relay, size_t stream_unit, size_t pipe_size, bint may_splice
) noexcept nogil:
    """0 or -errno; to be freed either way."""
    relay.engine.first_unit = min(stream_unit, <size_t>FIRST_UNIT)
    relay.engine.copy_unit = min(stream_unit, <size_t>COPY_UNIT)
    relay.engine.stream_unit = stream_unit
    relay.engine.pool.size = min(pipe_size, <size_t>PIPE_MOST)
    relay.engine.may_splice = may_splice and pipe_size >= PIPE_LEAST
    relay.engine.buffer = <char *>malloc(stream_unit)
    if relay.engine.buffer == NULL:
        return -ENOMEM
    relay.engine.epoll = epoll_create1(EPOLL_CLOEXEC)
    return -errno if relay.engine.epoll < 0 else 0


cdef inline int relay_cut(Relaying *relay, bint reset) noexcept nogil:
    """Close every connection of this relay. How many there were."""
    cdef int count = 0
    while not list_empty(&relay.live):
        connection_close(relay, <Connection *>relay.live.next.owner, HOW_CUT, reset)
        count += 1
    return count


cdef inline void relay_free(Relaying *relay) noexcept nogil:
    """Everything that it owns; clients of failed connects included, whom nobody has fetched."""
    cdef Link *link = relay.failed.next
    relay_cut(relay, True)
    while link != &relay.failed:
        endpoint_close(relay, &(<Connection *>link.owner).client, True)
        link = link.next
    connections_free(&relay.failed)
    connections_free(&relay.ended)
    connections_free(&relay.dead)
    pool_clear(&relay.engine.pool)
    if relay.engine.epoll >= 0:
        close(relay.engine.epoll)
    free(relay.engine.buffer)


# ── one batch ────────────────────────────────────────────────────────────────────────────────

cdef inline int relay_turn(Relaying *relay, int64_t deadline_ms) noexcept nogil:
    """Wait until `deadline_ms` at most (-1: for ever), then work on what has come; 0 or -errno.

    Not before the policy has fetched all notes: there is room for one of each event then.
    """
    cdef int i, count
    cdef bint overflows
    if relay.notes_count > 0:
        return 0
    count = relay_wait(relay, relay_timeout(relay, deadline_ms))
    if count < 0:
        if errno != EINTR:
            return -errno
        count = 0
    relay.engine.now_ms = clock_ms()
    relay.turns += 1
    overflows = relay_overflows(relay)
    for i in range(count):
        relay_dispatch(relay, &relay.events[i])
    relay_pump_again(relay)
    relay_admit(relay, count)
    if relay.room_ms != 0:
        gates_reopen(relay)
    if relay.next_wake_ms != 0 and relay.next_wake_ms <= relay.engine.now_ms:
        relay_timers(relay)
    if relay.idle_ms > 0:
        relay_close_idle(relay)
    connections_free(&relay.dead)
    if not list_empty(&relay.exiles):
        relay_exile(relay)
    if overflows:
        relay_share(relay)
    return 0


cdef inline int relay_wait(Relaying *relay, int timeout_ms) noexcept nogil:
    """As epoll_wait(2). Where work is shared, others see that it waits, and may give it some."""
    cdef int count
    cdef int64_t began_ns
    if not relay.shares:
        return epoll_wait(relay.engine.epoll, relay.events, EVENTS_MOST, timeout_ms)
    began_ns = clock_ns()
    hint_set(&relay.asleep, 1)
    count = epoll_wait(relay.engine.epoll, relay.events, EVENTS_MOST, timeout_ms)
    hint_set(&relay.asleep, 0)
    relay.busy.asleep_ns += clock_ns() - began_ns
    return count


cdef inline void relay_dispatch(Relaying *relay, epoll_event *event) noexcept nogil:
    cdef Watch *watch = <Watch *>event.data.ptr
    if watch.kind == KIND_WATCH:
        note_add(relay, NOTE_READY, watch.fd, event.events, 0)
    elif watch.kind == KIND_INBOX:
        relay_read_inbox(relay)
    elif watch.kind != KIND_GATE:
        connection_event(relay, <Endpoint *>watch, event.events)


cdef inline void relay_read_inbox(Relaying *relay) noexcept nogil:
    """What other threads have left here: connections to begin, those to report, orders."""
    cdef Link begin
    cdef Connection *c
    cdef uint32_t orders
    link_init(&begin, NULL)
    orders = inbox_take(&relay.inbox, &begin, &relay.failed, &relay.ended)
    while not list_empty(&begin):
        c = <Connection *>begin.next.owner
        list_remove(&c.live)
        connection_begin(relay, c)
    if orders & ORDER_TRIM:
        pool_clear(&relay.engine.pool)
    if orders & ORDER_ANSWER:
        shared_set(&relay.answered, shared_get(&relay.boss.crew.asked))
    if orders & ORDER_STOP:
        relay.stopping = True


cdef inline void relay_admit(Relaying *relay, int count) noexcept nogil:
    """The gates' turn: after the connections, which may end and make room, and not before the
    policy has seen what else there is. It may be the signal to accept nobody any more."""
    cdef Watch *watch
    cdef int i
    if relay.notes_count > 0:
        return  # gates are level-triggered, and announced again
    for i in range(count):
        watch = <Watch *>relay.events[i].data.ptr
        if watch.kind == KIND_GATE:
            gate_event(relay, <GateState *>watch)


cdef inline void relay_pump_again(Relaying *relay) noexcept nogil:
    """One more turn for each connection whose pump had spent its budget."""
    cdef Link *last = relay.again.prev
    cdef Link *link
    if list_empty(&relay.again):
        return
    while True:
        link = relay.again.next
        list_remove(link)
        connection_advance(relay, <Connection *>link.owner)
        if link == last:
            return


cdef inline int64_t earlier(int64_t one, int64_t other) noexcept nogil:
    """The earlier of two moments; one < 0 is never."""
    return other if one < 0 or other < one else one


cdef inline int relay_timeout(Relaying *relay, int64_t deadline_ms) noexcept nogil:
    """Milliseconds that epoll_wait may sleep."""
    cdef int64_t until = deadline_ms
    if not (list_empty(&relay.again) and list_empty(&relay.failed) and list_empty(&relay.ended)):
        return 0
    if relay.next_wake_ms != 0:
        until = earlier(until, relay.next_wake_ms)
    if relay.room_ms != 0:
        until = earlier(until, relay.room_ms)
    if relay.idle_ms > 0 and not list_empty(&relay.live):
        until = earlier(until, (<Connection *>relay.live.next.owner).active_ms + relay.idle_ms)
    if until < 0:
        return -1
    return <int>min(max(until - clock_ms(), 0), 1 << 30)


cdef inline bint connection_owes(const Connection *c) noexcept nogil:
    """Whether one side has not been given everything, and is not to believe that it has."""
    return (half_held(&c.up) + half_held(&c.down) > 0
            or c.client.error != 0 or c.target.error != 0)


cdef inline void relay_close_idle(Relaying *relay) noexcept nogil:
    """Close what has not moved a byte for too long; reset it where that loses bytes."""
    cdef Connection *c
    while not list_empty(&relay.live):
        c = <Connection *>relay.live.next.owner
        if relay.engine.now_ms - c.active_ms < relay.idle_ms:
            return
        if c.state == CONNECTED:
            connection_close(relay, c, HOW_IDLE, connection_owes(c))
        else:
            # Connecting and ending ones have limits of their own.
            c.active_ms = relay.engine.now_ms
            list_remove(&c.live)
            list_append(&relay.live, &c.live)
