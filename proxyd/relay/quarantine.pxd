# What may block for as long as its peer likes is left to a thread for which nobody waits.
#
# Two things go there: connections whose next message has file descriptors (rights.pxd), to be
# forwarded from then on by a relay that reads and closes as it comes; and sockets whose queue has
# such messages, to be closed. Both keep their place in the limit, so there are never more of them
# than connections. While the thread waits, the clients that sent descriptors wait for it, and
# others do not notice.
#
# The thread starts with the first of them. Where the system refuses it, sockets that are to be
# closed stay open, and connections stay where they are, unread; the boss tries again.

from proxyd.relay.mailbox cimport Inbox, inbox_put, inbox_ring
from proxyd.relay.sys cimport (
    int64_t, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock, shared_get, shared_set,
)
from proxyd.relay.list cimport Link, link_init, list_append, list_move_all, list_remove

cdef enum:
    QUARANTINE_RETRY_MS = 1000  # after the thread was refused
    STRAYS_MOST = 4             # while so many strays wait, no client is accepted to be refused

ctypedef struct Quarantine:
    pthread_mutex_t lock
    Link waiting               # connections with a socket to close, while there is no thread
    Inbox *inbox               # its thread's; NULL: there is none yet
    Inbox *boss                # whose owner starts it
    int wanted                 # that is to happen
    int strays                 # sockets to be closed that were no connection's
    int64_t retry_ms           # not before


cdef inline void quarantine_init(Quarantine *quarantine, Inbox *boss) noexcept nogil:
    pthread_mutex_init(&quarantine.lock, NULL)
    link_init(&quarantine.waiting, NULL)
    quarantine.boss = boss


cdef inline void quarantine_destroy(Quarantine *quarantine) noexcept nogil:
    pthread_mutex_destroy(&quarantine.lock)


cdef inline void quarantine_want(Quarantine *quarantine) noexcept nogil:
    """Have the boss start the thread. It is told once: who waits for it asks in every turn."""
    if shared_get(&quarantine.wanted):
        return
    shared_set(&quarantine.wanted, 1)
    if quarantine.boss.bell >= 0:
        inbox_ring(quarantine.boss)


cdef inline bint quarantine_runs(Quarantine *quarantine) noexcept nogil:
    cdef bint runs
    pthread_mutex_lock(&quarantine.lock)
    runs = quarantine.inbox != NULL
    pthread_mutex_unlock(&quarantine.lock)
    return runs


cdef inline void quarantine_put(Quarantine *quarantine, Link *link) noexcept nogil:
    """Leave it a connection, which waits until there is a thread."""
    cdef bint runs
    pthread_mutex_lock(&quarantine.lock)
    runs = quarantine.inbox != NULL
    if runs:
        inbox_put(quarantine.inbox, &quarantine.inbox.begin, link)
    else:
        list_remove(link)
        list_append(&quarantine.waiting, link)
    pthread_mutex_unlock(&quarantine.lock)
    if not runs:
        quarantine_want(quarantine)


cdef inline bint quarantine_due(Quarantine *quarantine, int64_t now_ms) noexcept nogil:
    return shared_get(&quarantine.wanted) and now_ms >= quarantine.retry_ms


cdef inline void quarantine_begin(Quarantine *quarantine, Inbox *inbox) noexcept nogil:
    """There is a thread now: give it what has waited."""
    pthread_mutex_lock(&quarantine.lock)
    quarantine.inbox = inbox
    pthread_mutex_lock(&inbox.lock)
    list_move_all(&inbox.begin, &quarantine.waiting)
    pthread_mutex_unlock(&inbox.lock)
    pthread_mutex_unlock(&quarantine.lock)
    shared_set(&quarantine.wanted, 0)
    inbox_ring(inbox)


cdef inline void quarantine_end(Quarantine *quarantine) noexcept nogil:
    """There is no thread any more."""
    pthread_mutex_lock(&quarantine.lock)
    quarantine.inbox = NULL
    pthread_mutex_unlock(&quarantine.lock)
