# Pages: where the sockets and pipes of a slate live on when this process is killed.
#
# A page is a SEQPACKET pair, and its queue is what keeps them; nobody receives from it but the one
# that goes on with them, or empties it. Both of its ends are in root's queue as well, and root's
# receiving end is in the store of the service manager. A message in root's queue announces a page;
# a message in a page is one of
#
#   SLOT ENTRY   client, target    a connection; void if the slot has another entry by now
#   p NUMBER     read end          a pipe
#
# What is in a page is not ended by close(2): see endpoint_close(). A page is never given up. Once
# all that was sent to it has ended, it is emptied and filled again; if few are left, these go to
# another page first (tidy.pxd). Both have them then, for a moment, which does no harm: the messages
# are equal.
#
# Everything here is done under Slate.lock.

from proxyd.relay.keep cimport connection_commit, connection_keep, connection_unkeep
from proxyd.relay.page cimport DATA_MAX, message_send, page_close, page_open
from proxyd.relay.slate cimport slot_index
from proxyd.relay.slate_types cimport PAGE_MAX, Page, Slate
from proxyd.relay.sys cimport (
    AF_UNIX, EAGAIN, EINVAL, ENOMEM, EUSERS, atomic_add, calloc, free, pointer_get,
    pthread_mutex_lock, pthread_mutex_unlock, realloc, snprintf, uint32_t, uint64_t,
)
from proxyd.relay.types cimport Connection, Half, Pipe, PumpContext, Worker

cdef enum:
    UNIX_SOCKETS_MAX = 8000    # in pages: from 16000 in flight on, older kernels search all of them
    TIDY_MS = 1000             # until a page is tidied, after something in it has ended


# ── enter ────────────────────────────────────────────────────────────────────────────────────────

cdef inline int pages_enter(PumpContext *ctx, Connection *c) noexcept nogil:
    """Keep a connection for the next process; 0 or -errno. It may be tried again then."""
    cdef Slate *slate = ctx.slate
    cdef int failure
    if not connection_fits(slate, c):
        return -EUSERS
    failure = half_keep_pipe(ctx, &c.up)
    if failure == 0:
        failure = half_keep_pipe(ctx, &c.down)
    if failure == 0:
        failure = connection_keep(ctx, c)
    if failure < 0:
        return failure
    pthread_mutex_lock(&slate.lock)
    if slate.root >= 0:
        failure = slate_send_connection(slate, c)
    if failure == 0:
        connection_commit(slate, c)
    pthread_mutex_unlock(&slate.lock)
    return failure


cdef inline int half_keep_pipe(PumpContext *ctx, Half *half) noexcept nogil:
    """What it holds in a pipe; 0 or -errno."""
    return pipe_keep(ctx, &half.pipe) if half.pipe.filled > 0 else 0


cdef inline int pipe_keep(PumpContext *ctx, Pipe *pipe) noexcept nogil:
    """Make sure that a pipe is in a page; 0 or -errno, and then the next process would not find
    what is in it."""
    cdef Slate *slate = ctx.slate
    cdef int failure
    if pipe.number != 0:
        return 0
    if slate.root < 0:
        return -EINVAL
    pthread_mutex_lock(&slate.lock)
    failure = slate_send_pipe(slate, pipe)
    pthread_mutex_unlock(&slate.lock)
    return failure


cdef inline bint connection_fits(Slate *slate, const Connection *c) noexcept nogil:
    """Whether pages may have its sockets. Asked before a slot is filled for it."""
    cdef bint fits
    pthread_mutex_lock(&slate.lock)
    fits = slate.root < 0 or slate_has_room(slate, connection_unix_sockets(c))
    pthread_mutex_unlock(&slate.lock)
    return fits


cdef inline int slate_send_connection(Slate *slate, Connection *c) noexcept nogil:
    """Into a page, under the entry that connection_commit() gives it next; 0 or -errno."""
    cdef uint32_t index = slot_index(slate, c.slot)
    cdef int count = connection_unix_sockets(c)
    cdef int fds[2]
    cdef int failure
    if not slate_has_room(slate, count):
        return -EUSERS
    fds[0] = c.client.fd
    fds[1] = c.target.fd
    failure = slate_send_sockets(slate, index, slate.last_entry + 1, fds, count)
    if failure == 0:
        slate_forget(slate, c)  # it was entered, and struck
        slate.slot_pages[index] = slate.page
    return failure


cdef inline int slate_send_pipe(Slate *slate, Pipe *pipe) noexcept nogil:
    cdef char data[DATA_MAX]
    cdef int size = snprintf(data, DATA_MAX, "p %u", <unsigned int>(slate.last_pipe + 1))
    cdef int failure = slate_send(slate, &slate.pipe_page, data, <size_t>size, &pipe.rd, 1)
    if failure == 0:
        slate.last_pipe += 1
        slate.pipe_page.of_pipes = True
        pipe.number = slate.last_pipe
        pipe.page_alive = &slate.pipe_page.alive
    return failure


cdef inline int connection_unix_sockets(const Connection *c) noexcept nogil:
    return (c.client.family == AF_UNIX) + (c.target.family == AF_UNIX)


cdef inline bint slate_has_room(const Slate *slate, int count) noexcept nogil:
    """Whether so many UNIX sockets more may be in pages."""
    return slate.unix_sockets + count <= UNIX_SOCKETS_MAX


# ── the end of what is entered ───────────────────────────────────────────────────────────────────

cdef inline void connection_warn_pages(Worker *worker, Connection *c) noexcept nogil:
    """To close the last copies of its sockets may take as long as a peer likes: see rights.pxd.
    Called before ours are closed."""
    cdef Slate *slate = worker_slate(worker)
    cdef Page *page
    if c.slot == NULL:
        return
    pthread_mutex_lock(&slate.lock)
    page = slate_page_of(slate, c)
    if page != NULL:
        page.may_block = True
    pthread_mutex_unlock(&slate.lock)


cdef inline void connection_leave_pages(Worker *worker, Connection *c) noexcept nogil:
    """It has ended; its sockets are shut down and closed."""
    cdef Slate *slate = worker_slate(worker)
    if c.slot == NULL:
        return
    if worker.tidy_ms == 0:
        worker.tidy_ms = worker.ctx.now_ms + TIDY_MS
    pthread_mutex_lock(&slate.lock)
    slate_forget(slate, c)
    pthread_mutex_unlock(&slate.lock)
    connection_unkeep(slate, c)


cdef inline void slate_forget(Slate *slate, const Connection *c) noexcept nogil:
    """What a page has of it is of no use any more."""
    cdef Page *page = slate_page_of(slate, c)
    if page != NULL:
        slate.slot_pages[slot_index(slate, c.slot)] = NULL
        atomic_add(&page.alive, -1)


cdef inline Page *slate_page_of(const Slate *slate, const Connection *c) noexcept nogil:
    """The page that has its sockets; NULL: none."""
    return slate.slot_pages[slot_index(slate, c.slot)]


cdef inline Slate *worker_slate(Worker *worker) noexcept nogil:
    """The program's; NULL: none. A thread that has ended may never have learnt of it."""
    cdef Worker *main = worker if worker.main == NULL else worker.main
    return <Slate *>pointer_get(<void **>&main.ctx.slate)


# ── sending ──────────────────────────────────────────────────────────────────────────────────────

cdef inline int slate_send_sockets(
    Slate *slate, uint32_t index, uint64_t entry, const int *fds, int unix_sockets
) noexcept nogil:
    """Both sockets of a connection, to Slate.page; 0 or -errno."""
    cdef char data[DATA_MAX]
    cdef int size = snprintf(data, DATA_MAX, "%u %llu", <unsigned int>index,
                             <unsigned long long>entry)
    cdef int failure = slate_send(slate, &slate.page, data, <size_t>size, fds, 2)
    if failure == 0:
        slate.page.unix_sockets += unix_sockets
        slate.unix_sockets += unix_sockets
    return failure


cdef inline int slate_send(
    Slate *slate, Page **place, const char *data, size_t size, const int *fds, int count
) noexcept nogil:
    """A message to the page of `place`, or to another one that takes its place; 0 or -errno."""
    cdef int failure = -EAGAIN
    if place[0] != NULL and place[0].sent < PAGE_MAX:
        failure = message_send(place[0].sender, data, size, fds, count)
    if failure == -EAGAIN:  # the page is full; with a small net.core.wmem_max sooner
        failure = slate_next_page(slate, place)
        if failure == 0:
            failure = message_send(place[0].sender, data, size, fds, count)
    if failure == 0:
        place[0].sent += 1
        atomic_add(&place[0].alive, 1)
    return failure


cdef inline int slate_next_page(Slate *slate, Page **place) noexcept nogil:
    """Put an empty page into `place`; 0 or -errno."""
    cdef Page *page
    cdef int i
    for i in range(slate.page_count):
        page = slate.pages[i]
        if page.sent == 0 and not page.emptying and (
                page != slate.page and page != slate.pipe_page):
            place[0] = page
            return 0
    return slate_add_page(slate, place)


cdef inline int slate_add_page(Slate *slate, Page **place) noexcept nogil:
    """A new page, which root's queue has as well; 0 or -errno."""
    cdef Page *page
    cdef int failure = slate_fit_pages(slate)
    if failure < 0:
        return failure
    page = <Page *>calloc(1, sizeof(Page))
    if page == NULL:
        return -ENOMEM
    failure = page_open(page)
    if failure == 0:
        failure = slate_announce(slate, page)
        if failure < 0:
            page_close(page)
    if failure < 0:
        free(page)
        return failure
    slate.pages[slate.page_count] = page
    slate.page_count += 1
    place[0] = page
    return 0


cdef inline int slate_fit_pages(Slate *slate) noexcept nogil:
    """Make room in the array for one more; 0 or -ENOMEM."""
    cdef int size = max(2 * slate.pages_size, 16)
    cdef Page **pages
    if slate.page_count < slate.pages_size:
        return 0
    pages = <Page **>realloc(slate.pages, <size_t>size * sizeof(Page *))
    if pages == NULL:
        return -ENOMEM
    slate.pages = pages
    slate.pages_size = size
    return 0


cdef inline int slate_announce(Slate *slate, const Page *page) noexcept nogil:
    cdef char data[DATA_MAX]
    cdef int ends[2]
    cdef int size = snprintf(data, DATA_MAX, "P %u %d", <unsigned int>slate.generation,
                             slate.page_count)
    ends[0] = page.receiver
    ends[1] = page.sender
    return message_send(slate.root, data, <size_t>size, ends, 2)


# ── set-up ───────────────────────────────────────────────────────────────────────────────────────

cdef inline void pages_destroy(Slate *slate) noexcept nogil:
    """Let go of the pages. What is in them lives on in root's queue."""
    cdef int i
    for i in range(slate.page_count):
        page_close(slate.pages[i])
        free(slate.pages[i])
    free(slate.pages)
    slate.pages = NULL
    slate.page = slate.pipe_page = NULL
    slate.page_count = slate.pages_size = 0
