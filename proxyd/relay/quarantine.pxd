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

from proxyd.relay.list cimport link_init, list_append, list_move_all, list_remove
from proxyd.relay.mailbox cimport mailbox_put, mailbox_wake
from proxyd.relay.sys cimport (
    atomic_get, atomic_set, int64_t, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock,
)
from proxyd.relay.types cimport Link, Mailbox, Quarantine

cdef enum:
    QUARANTINE_RETRY_MS = 1000  # after the thread was refused
    ORPHAN_SOCKETS_MAX = 4             # while so many strays wait, no client is accepted to be refused

cdef inline void quarantine_init(Quarantine *quarantine, Mailbox *main) noexcept nogil:
    pthread_mutex_init(&quarantine.lock, NULL)
    link_init(&quarantine.waiting, NULL)
    quarantine.main_mailbox = main


cdef inline void quarantine_destroy(Quarantine *quarantine) noexcept nogil:
    pthread_mutex_destroy(&quarantine.lock)


cdef inline void quarantine_want(Quarantine *quarantine) noexcept nogil:
    """Have the boss start the thread. It is told once: who waits for it asks in every turn."""
    if atomic_get(&quarantine.wanted):
        return
    atomic_set(&quarantine.wanted, 1)
    if quarantine.main_mailbox.wake_fd >= 0:
        mailbox_wake(quarantine.main_mailbox)


cdef inline bint quarantine_runs(Quarantine *quarantine) noexcept nogil:
    cdef bint runs
    pthread_mutex_lock(&quarantine.lock)
    runs = quarantine.mailbox != NULL
    pthread_mutex_unlock(&quarantine.lock)
    return runs


cdef inline void quarantine_put(Quarantine *quarantine, Link *link) noexcept nogil:
    """Leave it a connection, which waits until there is a thread."""
    cdef bint runs
    pthread_mutex_lock(&quarantine.lock)
    runs = quarantine.mailbox != NULL
    if runs:
        mailbox_put(quarantine.mailbox, &quarantine.mailbox.begin, link)
    else:
        list_remove(link)
        list_append(&quarantine.waiting, link)
    pthread_mutex_unlock(&quarantine.lock)
    if not runs:
        quarantine_want(quarantine)


cdef inline bint quarantine_due(Quarantine *quarantine, int64_t now_ms) noexcept nogil:
    return atomic_get(&quarantine.wanted) and now_ms >= quarantine.retry_ms


cdef inline void quarantine_begin(Quarantine *quarantine, Mailbox *mailbox) noexcept nogil:
    """There is a thread now: give it what has waited."""
    pthread_mutex_lock(&quarantine.lock)
    quarantine.mailbox = mailbox
    pthread_mutex_lock(&mailbox.lock)
    list_move_all(&mailbox.begin, &quarantine.waiting)
    pthread_mutex_unlock(&mailbox.lock)
    pthread_mutex_unlock(&quarantine.lock)
    atomic_set(&quarantine.wanted, 0)
    mailbox_wake(mailbox)


cdef inline void quarantine_end(Quarantine *quarantine) noexcept nogil:
    """There is no thread any more."""
    pthread_mutex_lock(&quarantine.lock)
    quarantine.mailbox = NULL
    pthread_mutex_unlock(&quarantine.lock)
