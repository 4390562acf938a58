# What one thread leaves for another: connections and orders, under a lock; an eventfd wakes it.
#
# Connections are linked by their `live` link, which is in no other list while they are on their
# way.

from proxyd.relay.list cimport link_init, list_append, list_empty, list_move_all, list_remove
from proxyd.relay.records cimport Sweep
from proxyd.relay.sys cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, POLLIN, close, errno, eventfd, eventfd_read, eventfd_write, poll,
    pollfd, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
    uint32_t, uint64_t,
)
from proxyd.relay.types cimport ORDER_SWEEP, ORDER_SWEEP_END, Link, Mailbox


cdef inline uint32_t mailbox_take(
    Mailbox *mailbox, Link *begin, Link *failed, Link *ended, Link *batches, Sweep *sweep
) noexcept nogil:
    """Move what has come to these lists; returns the orders. `sweep` is what ORDER_SWEEP means."""
    cdef uint32_t orders
    cdef uint64_t rings
    eventfd_read(mailbox.wake_fd, &rings)  # before the look: what comes after it wakes again
    pthread_mutex_lock(&mailbox.lock)
    list_move_all(begin, &mailbox.begin)
    list_move_all(failed, &mailbox.failed)
    list_move_all(ended, &mailbox.ended)
    list_move_all(batches, &mailbox.batches)
    sweep[0] = mailbox.sweep
    orders = mailbox.orders
    mailbox.orders = 0
    pthread_mutex_unlock(&mailbox.lock)
    return orders


cdef inline void mailbox_put(Mailbox *mailbox, Link *place, Link *link) noexcept nogil:
    """Leave a connection in `place`, one of the lists of the mailbox."""
    cdef bint first
    pthread_mutex_lock(&mailbox.lock)
    first = list_empty(place)
    list_remove(link)
    list_append(place, link)
    pthread_mutex_unlock(&mailbox.lock)
    if first:  # later ones are found together with the first
        mailbox_wake(mailbox)


cdef inline void mailbox_put_all(Mailbox *mailbox, Link *place, Link *links) noexcept nogil:
    """As mailbox_put(), for all that is in a list, in its order."""
    pthread_mutex_lock(&mailbox.lock)
    list_move_all(place, links)
    pthread_mutex_unlock(&mailbox.lock)
    mailbox_wake(mailbox)


cdef inline bint mailbox_wait(Mailbox *mailbox, int timeout_ms) noexcept nogil:
    """Wait until something has come, for `timeout_ms` at most. Whether it has."""
    cdef pollfd rings
    rings.fd = mailbox.wake_fd
    rings.events = POLLIN
    return poll(&rings, 1, timeout_ms) > 0


cdef inline void mailbox_return(
    Mailbox *mailbox, Link *failed, Link *ended, Link *batches
) noexcept nogil:
    """Leave all that is in these lists."""
    if list_empty(failed) and list_empty(ended) and list_empty(batches):
        return
    pthread_mutex_lock(&mailbox.lock)
    list_move_all(&mailbox.failed, failed)
    list_move_all(&mailbox.ended, ended)
    list_move_all(&mailbox.batches, batches)
    pthread_mutex_unlock(&mailbox.lock)
    mailbox_wake(mailbox)


cdef inline void mailbox_order_sweep(Mailbox *mailbox, const Sweep *sweep) noexcept nogil:
    """Give ORDER_SWEEP. One that has not been begun is forgotten."""
    pthread_mutex_lock(&mailbox.lock)
    mailbox.sweep = sweep[0]
    mailbox.orders = (mailbox.orders | ORDER_SWEEP) & ~<uint32_t>ORDER_SWEEP_END
    pthread_mutex_unlock(&mailbox.lock)
    mailbox_wake(mailbox)


cdef inline void mailbox_order(Mailbox *mailbox, uint32_t order) noexcept nogil:
    pthread_mutex_lock(&mailbox.lock)
    mailbox.orders |= order
    pthread_mutex_unlock(&mailbox.lock)
    mailbox_wake(mailbox)


cdef inline void mailbox_wake(Mailbox *mailbox) noexcept nogil:
    """Wake its thread. The eventfd is a counter far from full, so this cannot fail."""
    eventfd_write(mailbox.wake_fd, 1)


# ── set-up ───────────────────────────────────────────────────────────────────────────────────────

cdef inline int mailbox_init(Mailbox *mailbox, int kind) noexcept nogil:
    """0 or -errno."""
    cdef int wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if wake_fd < 0:
        return -errno
    mailbox.kind = kind
    mailbox.wake_fd = wake_fd
    mailbox.orders = 0
    link_init(&mailbox.begin, NULL)
    link_init(&mailbox.failed, NULL)
    link_init(&mailbox.ended, NULL)
    link_init(&mailbox.batches, NULL)
    pthread_mutex_init(&mailbox.lock, NULL)
    return 0


cdef inline void mailbox_destroy(Mailbox *mailbox) noexcept nogil:
    """It must be empty."""
    if mailbox.wake_fd < 0:
        return
    close(mailbox.wake_fd)
    mailbox.wake_fd = -1
    pthread_mutex_destroy(&mailbox.lock)
