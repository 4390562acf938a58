# What a worker keeps count of, and what the policy is told.

from proxyd.relay.gauges cimport gauges_remove_connection
from proxyd.relay.list cimport list_append, list_remove
from proxyd.relay.mailbox cimport mailbox_wake
from proxyd.relay.pipe cimport pool_clear
from proxyd.relay.sys cimport atomic_add, int64_t, uint32_t
from proxyd.relay.types cimport POLICY_EVENTS_MAX, Connection, PolicyEvent, Worker


cdef inline PolicyEvent *policy_event_add(
    Worker *worker, int kind, int fd, uint32_t value, int index
) noexcept nogil:
    """Something for the policy. NULL if there is no room: there will be once it has fetched the
    events."""
    cdef PolicyEvent *event = &worker.policy_events[worker.policy_event_count]
    if worker.policy_event_count >= POLICY_EVENTS_MAX:
        return NULL
    event.kind = kind
    event.fd = fd
    event.value = value
    event.listener = index
    event.peer.size = 0
    worker.policy_event_count += 1
    return event


cdef inline int connection_limit(const Worker *worker) noexcept nogil:
    """The limit of connections and sockets in quarantine, with places left free for held clients.
    """
    return worker.connections_max - worker.held


cdef inline void connection_set_timer(
    Worker *worker, Connection *c, int64_t when_ms
) noexcept nogil:
    """Have connection_timer_expired() called at `when_ms`."""
    list_remove(&c.timed)
    list_append(&worker.timed, &c.timed)
    c.timer_ms = when_ms
    if worker.next_timer_ms == 0 or when_ms < worker.next_timer_ms:
        worker.next_timer_ms = when_ms


cdef inline void worker_remove_connection(Worker *worker) noexcept nogil:
    """This worker has a connection less."""
    if atomic_add(&worker.connection_count, -1) == 0:
        pool_clear(&worker.ctx.pool)


cdef inline void connections_decrement(Worker *worker) noexcept nogil:
    """The program has a connection less: wake the main worker if it waits for that."""
    if gauges_remove_connection(worker.gauges, worker.ctx.now_ms) and worker.main != NULL:
        mailbox_wake(&worker.main.mailbox)
