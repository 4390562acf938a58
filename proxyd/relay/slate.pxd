# The slate: memory that outlives this process, for what would be lost with it.
#
# When a process is killed, its sockets and pipes live on in pages (pages.pxd), and the kernel knows
# what TCP has taken and given (position.pxd). Two things would be lost: bytes that were read and
# not yet written, and what a UNIX socket has taken and given. So a connection that is kept has a
# slot in a file that is mapped shared; a worker copies through a buffer of that file, keeps what
# was not taken in the slot's spill instead of memory of its own, and notes what it is about to do:
#
#   1  position = taken; counts = 0; what = COPY
#   2  half = this one           killed from here on, until 8: what counts is the buffer
#   3  recv into the buffer      a UNIX socket by recvmmsg(2), so that the kernel notes the count
#   4  send from the buffer      likewise, by sendmmsg(2)
#   5  what was not sent is copied to the end of the spill
#   6  spill_end, then spill_size
#   7  taken = …
#   8  half = 0                  from here on, the spill
#
# A flush is likewise, with 2, 4, 6 and 8. When a UNIX socket is spliced, 2 and 8 alone remain: they
# say that an error may have been read, which is gone then.
#
# A killed thread has executed everything before the instruction at which it died, and the memory
# survives it: the order of the compiler's stores is all that matters (fence()).

from proxyd.relay.parcel cimport ParcelRecord, file_read
from proxyd.relay.slate_types cimport (
    SLATE_ALIGN, SLATE_MAGIC, SLATE_UNIT, SLOTS_MAX, SLOT_RECORD, SLOT_SIZE, Intent, Page, Slate,
    SlateHead, Slot,
)
from proxyd.relay.sys cimport (
    EBADF, ENOMEM, EPROTO, F_GET_SEALS, F_SEAL_GROW, F_SEAL_SHRINK, MAP_FAILED, MAP_SHARED,
    MSG_DONTWAIT, MSG_NOSIGNAL, PROT_READ, PROT_WRITE, calloc, errno, fcntl, fence, free, fstat,
    memset, mlock, mmap, mmsghdr, munmap, pointer_get, pointer_set, pthread_mutex_destroy,
    pthread_mutex_init, recvmmsg, sendmmsg, stat_t, uint32_t, uint64_t,
)
from proxyd.relay.types cimport Connection, Half, PumpContext, Worker

cdef enum:
    WORKERS_MAX = 4096
    UNIT_MAX = 1 << 30         # bytes
    TEXT_MAX = 1 << 30         # bytes


# ── a slate is mapped ────────────────────────────────────────────────────────────────────────────

cdef inline int slate_map(Slate *slate, int file) noexcept nogil:
    """Use the new slate in this file, which may be closed then. 0 or -errno, and then nothing is to
    be undone. -EPROTO: it is no slate, or not one of this version. The structure is all zero."""
    cdef SlateHead head
    cdef int failure = slate_check(file, &head)
    if failure < 0:
        return failure
    slate.size = slate_size(&head)
    slate.map = <char *>mmap(NULL, slate.size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)
    if slate.map == <char *>MAP_FAILED:
        slate.map = NULL
        return -errno
    slate.head = <SlateHead *>slate.map
    slate.free_slots = <uint32_t *>calloc(head.slot_count, sizeof(uint32_t))
    slate.slot_pages = <Page **>calloc(head.slot_count, sizeof(Page *))
    pthread_mutex_init(&slate.lock, NULL)
    if slate.free_slots == NULL or slate.slot_pages == NULL:
        slate_unmap(slate)
        return -ENOMEM
    slate.notes_unix = slate_can_note(slate)
    slate.root = -1
    slate_free_all(slate)
    return 0


cdef inline void slate_unmap(Slate *slate) noexcept nogil:
    """Nothing may use it any more. What it says stays in the file."""
    munmap(slate.map, slate.size)
    free(slate.free_slots)
    free(slate.slot_pages)
    pthread_mutex_destroy(&slate.lock)
    memset(slate, 0, sizeof(slate[0]))


cdef inline int slate_check(int file, SlateHead *head) noexcept nogil:
    """Whether it is a slate that this version can use, and will not shrink; 0 or -errno."""
    cdef stat_t about
    cdef int seals = fcntl(file, F_GET_SEALS)
    cdef int failure = file_read(file, head, sizeof(head[0]), 0)
    if failure < 0:
        return failure
    if fstat(file, &about) < 0:
        return -errno
    if seals < 0 or seals & (F_SEAL_SHRINK | F_SEAL_GROW) != F_SEAL_SHRINK | F_SEAL_GROW:
        return -EPROTO
    if not slate_head_is_valid(head) or <uint64_t>about.st_size != slate_size(head):
        return -EPROTO
    return 0


cdef inline bint slate_head_is_valid(const SlateHead *head) noexcept nogil:
    if head.magic != SLATE_MAGIC or head.record_size != sizeof(ParcelRecord):
        return False
    if not 0 < head.slot_count <= SLOTS_MAX or not 0 < head.worker_count <= WORKERS_MAX:
        return False
    return 0 < head.unit <= UNIT_MAX and head.unit % SLATE_UNIT == 0 and head.text_size <= TEXT_MAX


cdef inline bint slate_can_note(const Slate *slate) noexcept nogil:
    """Whether the kernel can note in intents what UNIX sockets take and give. It does so after the
    fact, so that their memory must be there; and a filter may not know the system calls."""
    cdef mmsghdr nothing
    memset(&nothing, 0, sizeof(nothing))
    if recvmmsg(-1, &nothing, 1, MSG_DONTWAIT, NULL) >= 0 or errno != EBADF:
        return False
    if sendmmsg(-1, &nothing, 1, MSG_DONTWAIT) >= 0 or errno != EBADF:
        return False
    return mlock(slate_intent(slate, 0), slate.head.worker_count * <size_t>SLATE_UNIT) == 0


cdef inline void slate_free_all(Slate *slate) noexcept nogil:
    """It is a new file. A look at its slots would take memory for them: where nothing was written,
    reading does so, too. The first of them is taken first."""
    cdef uint32_t index = slate.head.slot_count
    while index > 0:
        index -= 1
        slate.free_slots[slate.free_count] = index
        slate.free_count += 1


# ── a worker has its part of it ──────────────────────────────────────────────────────────────────

cdef inline void worker_use_slate(Worker *worker) noexcept nogil:
    """At the begin of a turn, before anything is done with a connection: it may be a kept one."""
    cdef Slate *slate
    if worker.ctx.slate != NULL or worker.main == NULL:
        return
    slate = <Slate *>pointer_get(<void **>&worker.main.ctx.slate)
    if slate != NULL:
        worker_take_slate(worker, slate)


cdef inline void worker_take_slate(Worker *worker, Slate *slate) noexcept nogil:
    """From now on, keep what is to be kept in this slate. In a worker that finds no intent there,
    nothing is kept: the quarantine's, or one too many."""
    cdef Intent *intent
    if 0 <= worker.number < <int>slate.head.worker_count:
        intent = slate_intent(slate, <uint32_t>worker.number)
        memset(intent, 0, sizeof(intent[0]))
        intent.taken.msg_hdr.msg_iov = &intent.taken_piece
        intent.taken.msg_hdr.msg_iovlen = 1
        intent.given.msg_hdr.msg_iov = &intent.given_piece
        intent.given.msg_hdr.msg_iovlen = 1
        free(worker.ctx.buffer)
        worker.ctx.buffer = slate_buffer(slate, <uint32_t>worker.number)
        worker.ctx.intent = intent
    pointer_set(<void **>&worker.ctx.slate, slate)


# ── an intent ────────────────────────────────────────────────────────────────────────────────────

cdef inline Intent *intent_open(
    PumpContext *ctx, const Half *half, uint32_t what, uint64_t position
) noexcept nogil:
    """Note what is about to be done with a kept half. NULL: this worker keeps nothing."""
    cdef Intent *intent = ctx.intent
    if intent == NULL:
        return NULL
    intent.what = what
    intent.position = position
    intent.taken.msg_len = 0
    intent.given.msg_len = 0
    fence()
    intent.half = 1 + 2 * slot_index(ctx.slate, (<Connection *>half.src.connection).slot) + (
        <uint32_t>half.direction)
    fence()
    return intent


cdef inline void intent_close(Intent *intent, Half *half) noexcept nogil:
    """It is done, and all that follows from it is noted."""
    fence()
    half.kept.taken = half.moved + half.given
    fence()
    intent.half = 0
    fence()


cdef inline ssize_t intent_recv(
    Intent *intent, int fd, char *buffer, size_t size, int *flags
) noexcept nogil:
    """As recvmsg(2) without waiting. `flags`: MSG_CTRUNC … if there was something."""
    intent.taken_piece.iov_base = buffer
    intent.taken_piece.iov_len = size
    if recvmmsg(fd, &intent.taken, 1, MSG_DONTWAIT, NULL) < 0:
        return -1
    flags[0] = intent.taken.msg_hdr.msg_flags
    return intent.taken.msg_len


cdef inline ssize_t intent_send(
    Intent *intent, int fd, const char *data, size_t size
) noexcept nogil:
    """As send(2) without waiting."""
    intent.given_piece.iov_base = <void *>data
    intent.given_piece.iov_len = size
    if sendmmsg(fd, &intent.given, 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0:
        return -1
    return intent.given.msg_len


# ── where things are ─────────────────────────────────────────────────────────────────────────────

cdef inline Slot *slate_slot(const Slate *slate, uint32_t index) noexcept nogil:
    return <Slot *>(slate.map + slate_slots_at(slate.head) + <uint64_t>index * SLOT_SIZE)


cdef inline uint32_t slot_index(const Slate *slate, const Slot *slot) noexcept nogil:
    return <uint32_t>(
        (<const char *>slot - slate.map - slate_slots_at(slate.head)) // <uint64_t>SLOT_SIZE)


cdef inline ParcelRecord *slot_record(Slot *slot) noexcept nogil:
    return <ParcelRecord *>(<char *>slot + SLOT_RECORD)


cdef inline Intent *slate_intent(const Slate *slate, uint32_t worker) noexcept nogil:
    return <Intent *>(slate.map + slate_intents_at(slate.head) + <uint64_t>worker * SLATE_UNIT)


cdef inline char *slate_buffer(const Slate *slate, uint32_t worker) noexcept nogil:
    return slate.map + slate_buffers_at(slate.head) + worker * slate.head.unit


cdef inline char *slate_spill(const Slate *slate, uint32_t index, int direction) noexcept nogil:
    """The spill of a half: `unit` bytes. What is in it lies at its end."""
    return (slate.map + slate_spills_at(slate.head)
            + (2 * <uint64_t>index + direction) * slate.head.unit)


cdef inline uint64_t slate_size(const SlateHead *head) noexcept nogil:
    return slate_spills_at(head) + 2 * head.slot_count * head.unit


cdef inline uint64_t slate_spills_at(const SlateHead *head) noexcept nogil:
    return slate_buffers_at(head) + head.worker_count * head.unit


cdef inline uint64_t slate_buffers_at(const SlateHead *head) noexcept nogil:
    return round_up(slate_slots_at(head) + <uint64_t>head.slot_count * SLOT_SIZE, SLATE_ALIGN)


cdef inline uint64_t slate_slots_at(const SlateHead *head) noexcept nogil:
    return slate_intents_at(head) + <uint64_t>head.worker_count * SLATE_UNIT


cdef inline uint64_t slate_intents_at(const SlateHead *head) noexcept nogil:
    return SLATE_UNIT + round_up(head.text_size, SLATE_UNIT)


cdef inline uint64_t slate_text_at() noexcept nogil:
    return SLATE_UNIT


cdef inline uint64_t round_up(uint64_t size, uint64_t unit) noexcept nogil:
    return (size + unit - 1) // unit * unit
