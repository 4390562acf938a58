# The quarantine: a thread for what may block for as long as a peer likes. No other thread waits for
# it.
#
# Two things go there: connections whose next message has file descriptors (rights.pxd), to be
# forwarded from then on by a worker that reads and closes without looking first; and sockets whose
# queue has such messages, to be closed. Both keep their place in the limit, so there are never more
# of them than connections. While the thread blocks, the clients that sent descriptors wait for it,
# and no other client notices.
#
# The thread starts with the first of them. If the system refuses a thread, sockets that are to be
# closed stay open, and connections stay where they are, unread; the main worker tries again.

from proxyd.relay.bookkeeping cimport worker_remove_connection
from proxyd.relay.endpoint cimport endpoint_unregister
from proxyd.relay.list cimport link_init, list_append, list_move_all, list_remove
from proxyd.relay.mailbox cimport mailbox_order, mailbox_put, mailbox_wake
from proxyd.relay.pages cimport connection_warn_pages
from proxyd.relay.strike cimport connection_strike
from proxyd.relay.sys cimport (
    atomic_add, atomic_get, atomic_set, int64_t, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from proxyd.relay.types cimport (
    CLOSED, CONNECTING, ORDER_TIDY, RIGHTS_ANY, Connection, Endpoint, Link, Mailbox, Quarantine,
    Worker,
)

cdef enum:
    QUARANTINE = -1             # the number of its worker
    QUARANTINE_RETRY_MS = 1000  # after the thread was refused
    ORPHAN_SOCKETS_MAX = 4      # with this number in it, no client is accepted to be refused


# ── connections move there ───────────────────────────────────────────────────────────────────────

cdef inline void worker_quarantine(Worker *worker) noexcept nogil:
    """Move those that are to go there. Only at the end of a turn, as worker_offload()."""
    cdef Link *link = worker.to_quarantine.next
    cdef Link *after
    if not quarantine_runs(worker.quarantine):
        quarantine_want(worker.quarantine)
        return
    while link != &worker.to_quarantine:
        after = link.next
        if (<Connection *>link.owner).state != CONNECTING:
            connection_quarantine(worker, <Connection *>link.owner)
        link = after


cdef inline void connection_quarantine(Worker *worker, Connection *c) noexcept nogil:
    """Move a connection with all it holds, including its timer. It begins there as new ones do."""
    cdef Worker *main = worker if worker.main == NULL else worker.main
    connection_strike(c)
    connection_warn_pages(worker, c)
    endpoint_quarantine(worker, &c.client)
    endpoint_quarantine(worker, &c.target)
    list_remove(&c.ready)
    list_remove(&c.to_quarantine)
    list_remove(&c.member)
    list_remove(&c.entering)
    list_remove(&c.timed)
    worker_remove_connection(worker)
    atomic_add(&main.workers.quarantine.connection_count, 1)
    quarantine_put(worker.quarantine, &c.live)


cdef inline void connection_return_to_quarantine(Worker *main, Connection *c) noexcept nogil:
    """A connection has rested that was there before. If there is no thread, it waits for one."""
    endpoint_quarantine(main, &c.client)
    endpoint_quarantine(main, &c.target)
    worker_remove_connection(main)
    if main.workers.quarantine != NULL:  # otherwise quarantine_begin() will count it
        atomic_add(&main.workers.quarantine.connection_count, 1)
    quarantine_put(main.quarantine, &c.live)


cdef inline int quarantine_take_waiting(Quarantine *quarantine, Link *rest) noexcept nogil:
    """Append the connections that wait for a thread to `rest`; how many there are."""
    cdef Link *link
    cdef Link *after
    cdef int count = 0
    pthread_mutex_lock(&quarantine.lock)
    link = quarantine.waiting.next
    while link != &quarantine.waiting:
        after = link.next
        if (<Connection *>link.owner).state != CLOSED:
            list_remove(link)
            list_append(rest, link)
            (<Connection *>link.owner).has_rested = True
            count += 1
        link = after
    pthread_mutex_unlock(&quarantine.lock)
    return count


cdef inline bint connection_was_in_quarantine(const Connection *c) noexcept nogil:
    return c.client.rights.state == RIGHTS_ANY or c.target.rights.state == RIGHTS_ANY


cdef inline void endpoint_quarantine(Worker *worker, Endpoint *end) noexcept nogil:
    if end.fd < 0:
        return
    endpoint_unregister(&worker.ctx, end)
    if end.rights.state != RIGHTS_ANY:  # otherwise it comes back, and `left` is what it has seen
        end.rights.state = RIGHTS_ANY
        end.rights.left = 0
    end.readable = 1


# ── what the thread is given ─────────────────────────────────────────────────────────────────────

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


cdef inline bint quarantine_runs(Quarantine *quarantine) noexcept nogil:
    cdef bint runs
    pthread_mutex_lock(&quarantine.lock)
    runs = quarantine.mailbox != NULL
    pthread_mutex_unlock(&quarantine.lock)
    return runs


cdef inline void quarantine_order_tidy(Quarantine *quarantine) noexcept nogil:
    """Have it empty pages, if there is a thread; otherwise they are left as they are."""
    pthread_mutex_lock(&quarantine.lock)
    if quarantine.mailbox != NULL:
        mailbox_order(quarantine.mailbox, ORDER_TIDY)
    pthread_mutex_unlock(&quarantine.lock)


cdef inline void quarantine_want(Quarantine *quarantine) noexcept nogil:
    """Have the main worker start the thread. It is woken once; connections that wait for the thread
    ask again in every turn."""
    if atomic_get(&quarantine.wanted):
        return
    atomic_set(&quarantine.wanted, 1)
    if quarantine.main_mailbox.wake_fd >= 0:
        mailbox_wake(quarantine.main_mailbox)


cdef inline bint quarantine_takes_orphans(Quarantine *quarantine) noexcept nogil:
    """Whether it may be left another socket that was no connection's."""
    return atomic_get(&quarantine.orphan_sockets) < ORPHAN_SOCKETS_MAX


cdef inline bint quarantine_due(Quarantine *quarantine, int64_t now_ms) noexcept nogil:
    """Whether it is time to start the thread, or to try so again."""
    return atomic_get(&quarantine.wanted) and now_ms >= quarantine.retry_ms


cdef inline void quarantine_begin(Quarantine *quarantine, Worker *worker) noexcept nogil:
    """There is a thread now: give it what has waited."""
    cdef Mailbox *mailbox = &worker.mailbox
    cdef Link *link
    pthread_mutex_lock(&quarantine.lock)
    quarantine.mailbox = mailbox
    link = quarantine.waiting.next
    while link != &quarantine.waiting:
        if (<Connection *>link.owner).state != CLOSED:
            atomic_add(&worker.connection_count, 1)
        link = link.next
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


# ── set-up ───────────────────────────────────────────────────────────────────────────────────────

cdef inline void quarantine_init(Quarantine *quarantine, Mailbox *main) noexcept nogil:
    pthread_mutex_init(&quarantine.lock, NULL)
    link_init(&quarantine.waiting, NULL)
    quarantine.main_mailbox = main


cdef inline void quarantine_destroy(Quarantine *quarantine) noexcept nogil:
    pthread_mutex_destroy(&quarantine.lock)
