# What one thread leaves for another: connections and orders, under a lock, and a bell.
#
# Connections are linked by their `live` link, which no other list has while they are on their way.

from proxyd.relay.sys cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, close, errno, eventfd, eventfd_read, eventfd_write,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock, uint32_t, uint64_t,
)
from proxyd.relay.list cimport Link, link_init, list_append, list_empty, list_move_all, list_remove

# orders to a relay
cdef enum:
    ORDER_STOP = 1             # cut everything and end the thread
    ORDER_TRIM = 2             # close the pipes kept for later
    ORDER_ANSWER = 4           # show that the thread is alive

ctypedef struct Inbox:
    int kind                   # KIND_INBOX, where an Endpoint has its kind
    int bell                   # eventfd; -1: there is only one thread, and nothing ever comes
    pthread_mutex_t lock
    Link begin                 # connections to be forwarded from now on
    Link failed                # connections whose connect failed in another thread
    Link ended                 # connections closed in another thread, to be reported
    uint32_t orders            # ORDER_*


cdef inline int inbox_open(Inbox *inbox, int kind) noexcept nogil:
    """0 or -errno."""
    cdef int bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if bell < 0:
        return -errno
    inbox.kind = kind
    inbox.bell = bell
    inbox.orders = 0
    link_init(&inbox.begin, NULL)
    link_init(&inbox.failed, NULL)
    link_init(&inbox.ended, NULL)
    pthread_mutex_init(&inbox.lock, NULL)
    return 0


cdef inline void inbox_close(Inbox *inbox) noexcept nogil:
    """Only once it is empty."""
    if inbox.bell < 0:
        return
    close(inbox.bell)
    inbox.bell = -1
    pthread_mutex_destroy(&inbox.lock)


cdef inline void inbox_ring(Inbox *inbox) noexcept nogil:
    """Wake its thread. The bell is a counter far from full, and cannot refuse."""
    eventfd_write(inbox.bell, 1)


cdef inline void inbox_put(Inbox *inbox, Link *place, Link *link) noexcept nogil:
    """Leave a connection in `place`, one of the lists of the inbox."""
    cdef bint first
    pthread_mutex_lock(&inbox.lock)
    first = list_empty(place)
    list_remove(link)
    list_append(place, link)
    pthread_mutex_unlock(&inbox.lock)
    if first:  # who comes later is found together with the first
        inbox_ring(inbox)


cdef inline void inbox_return(Inbox *inbox, Link *failed, Link *ended) noexcept nogil:
    """Leave everything that these two lists have."""
    if list_empty(failed) and list_empty(ended):
        return
    pthread_mutex_lock(&inbox.lock)
    list_move_all(&inbox.failed, failed)
    list_move_all(&inbox.ended, ended)
    pthread_mutex_unlock(&inbox.lock)
    inbox_ring(inbox)


cdef inline void inbox_order(Inbox *inbox, uint32_t order) noexcept nogil:
    pthread_mutex_lock(&inbox.lock)
    inbox.orders |= order
    pthread_mutex_unlock(&inbox.lock)
    inbox_ring(inbox)


cdef inline uint32_t inbox_take(
    Inbox *inbox, Link *begin, Link *failed, Link *ended
) noexcept nogil:
    """Move what has come to these lists; the orders."""
    cdef uint32_t orders
    cdef uint64_t rings
    eventfd_read(inbox.bell, &rings)  # before the look: who comes after it rings again
    pthread_mutex_lock(&inbox.lock)
    list_move_all(begin, &inbox.begin)
    list_move_all(failed, &inbox.failed)
    list_move_all(ended, &inbox.ended)
    orders = inbox.orders
    inbox.orders = 0
    pthread_mutex_unlock(&inbox.lock)
    return orders
