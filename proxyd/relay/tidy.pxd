# Tidying pages (pages.pxd): what has ended is kept in memory by its page, until that is emptied.
#
# A page of which nothing is alive is emptied; of one with little, that goes to another page first.
# What is closed by this may keep a thread waiting for as long as a peer likes (rights.pxd): such a
# page is left to the quarantine's thread, which empties it without the lock.

from proxyd.relay.page cimport DATA_MAX, page_empty, page_peek
from proxyd.relay.pages cimport slate_send_sockets
from proxyd.relay.slate cimport slate_slot
from proxyd.relay.slate_types cimport Page, Slate
from proxyd.relay.socket cimport socket_stream_family
from proxyd.relay.sys cimport (
    AF_UNIX, EBADF, MSG_DONTWAIT, atomic_add, atomic_get, close, counter_get, pthread_mutex_lock,
    pthread_mutex_unlock, recv, strtoull, uint32_t, uint64_t,
)

cdef enum:
    FEW = 4                    # a page is cleared if less than one of so many is alive

# what pages_tidy() has found
cdef enum:
    TIDY_NOTHING               # to do
    TIDY_DONE                  # one page; there may be others
    TIDY_BLOCKED               # nothing to do for a thread that may not block
    TIDY_LATER                 # the system has refused something


cdef inline int pages_tidy(Slate *slate, bint may_block) noexcept nogil:
    """Empty one page, or clear it; TIDY_*. `may_block`: this thread may wait for a peer."""
    cdef Page *page
    cdef bint blocked = False
    cdef int result = TIDY_NOTHING
    pthread_mutex_lock(&slate.lock)
    page = slate_find_dead(slate, may_block, &blocked)
    if page != NULL:
        slate_begin_emptying(slate, page)
        pthread_mutex_unlock(&slate.lock)
        page_empty(page)
        pthread_mutex_lock(&slate.lock)
        slate_end_emptying(slate, page)
        result = TIDY_DONE
    else:
        page = slate_find_sparse(slate)
        if page != NULL:
            result = slate_clear_page(slate, page)
        elif blocked:
            result = TIDY_BLOCKED
    pthread_mutex_unlock(&slate.lock)
    return result


cdef inline Page *slate_find_dead(Slate *slate, bint may_block, bint *blocked) noexcept nogil:
    """A page to be emptied; NULL: there is none, or it is `blocked`, and not for this thread."""
    cdef Page *page
    cdef int i
    for i in range(slate.page_count):
        page = slate.pages[i]
        if page.sent == 0 or page.emptying or atomic_get(&page.alive) > 0:
            continue
        if may_block or not page.may_block:
            return page
        blocked[0] = True
    return NULL


cdef inline Page *slate_find_sparse(Slate *slate) noexcept nogil:
    """A page to be cleared; NULL: none. Not one with pipes: they are used again and again, so that
    few pages have any."""
    cdef Page *page
    cdef int i, alive
    for i in range(slate.page_count):
        page = slate.pages[i]
        alive = atomic_get(&page.alive)
        if (0 < alive < page.sent // FEW and page != slate.page
                and not (page.of_pipes or page.may_block or page.emptying)):
            return page
    return NULL


cdef inline void slate_begin_emptying(Slate *slate, Page *page) noexcept nogil:
    """From now on nothing is sent to it."""
    page.emptying = True
    if slate.page == page:
        slate.page = NULL
    if slate.pipe_page == page:
        slate.pipe_page = NULL


cdef inline int slate_clear_page(Slate *slate, Page *page) noexcept nogil:
    """Send what is alive to another page, and empty this one."""
    cdef char data[DATA_MAX]
    cdef int fds[2]
    cdef int failure, count
    cdef ssize_t size
    while atomic_get(&page.alive) > 0:
        size = page_peek(page, data, fds, &count)
        if size <= 0:
            break
        failure = slate_move(slate, page, data, fds, count)
        while count > 0:
            count -= 1
            close(fds[count])
        if failure < 0:
            return TIDY_LATER
        recv(page.receiver, data, DATA_MAX, MSG_DONTWAIT)
    page_empty(page)
    slate_end_emptying(slate, page)
    return TIDY_DONE


cdef inline void slate_end_emptying(Slate *slate, Page *page) noexcept nogil:
    slate.unix_sockets -= page.unix_sockets
    page.sent = page.unix_sockets = 0
    page.of_pipes = page.may_block = page.emptying = False


cdef inline int slate_move(
    Slate *slate, Page *page, char *data, const int *fds, int count
) noexcept nogil:
    """Send the connection of a message to another page, if it is alive; 0 or -errno."""
    cdef char *end = data
    cdef uint32_t index = <uint32_t>strtoull(data, &end, 10)
    cdef uint64_t entry = strtoull(end, &end, 10)
    cdef uint64_t kept
    cdef int failure = 0
    if index >= slate.head.slot_count or slate.slot_pages[index] != page:
        return 0
    kept = counter_get(&slate_slot(slate, index).entry)
    if kept == entry:
        if count < 2:
            return -EBADF  # no room in the table of this process
        failure = slate_send_sockets(slate, index, entry, fds, unix_sockets_of(fds))
    elif kept != 0:
        return 0  # the slot's connection comes further on
    if failure == 0:
        slate.slot_pages[index] = slate.page if kept != 0 else NULL  # it was struck
        atomic_add(&page.alive, -1)
    return failure


cdef inline int unix_sockets_of(const int *fds) noexcept nogil:
    return (socket_stream_family(fds[0]) == AF_UNIX) + (socket_stream_family(fds[1]) == AF_UNIX)
