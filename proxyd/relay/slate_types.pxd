# The structures of a slate, and of what refers to it: slate.pxd and pages.pxd have the rules.

from proxyd.relay.sys cimport (
    int64_t, iovec, mmsghdr, pthread_mutex_t, uint32_t, uint64_t,
)

cdef enum:
    SLATE_MAGIC = 0x31746c73   # "slt1"
    SLATE_UNIT = 4096          # of the layout, bytes
    SLATE_ALIGN = 65536        # of buffers and spills, bytes: no kernel has larger pages
    SLOT_SIZE = 1024           # bytes
    SLOT_RECORD = 128          # offset of the ParcelRecord in a slot
    SLOTS_MAX = 1 << 20
    PAGE_MAX = 128             # connections, or pipes, of a page

# Intent.what
cdef enum:
    INTENT_COPY                # from src to dst through the buffer of this worker
    INTENT_FLUSH               # what was spilled, to dst
    INTENT_SPLICE              # into the pipe, or out of it: a UNIX socket may tell of an error

# ── in the file ──────────────────────────────────────────────────────────────────────────────────

# The parts of the file follow each other, each from a multiple of SLATE_UNIT on: this head; the
# text; an Intent per worker, one SLATE_UNIT each; slots; from a multiple of SLATE_ALIGN on, a
# buffer of `unit` bytes per worker; two spills of `unit` bytes per slot, up and down.
ctypedef struct SlateHead:
    uint32_t magic             # SLATE_MAGIC
    uint32_t record_size       # sizeof(ParcelRecord) of the writer
    uint32_t slot_count
    uint32_t worker_count
    uint64_t unit              # bytes, a multiple of SLATE_UNIT
    uint64_t text_size         # bytes
    int64_t last_id            # of a connection, when the last one was entered

# One direction of an entered connection. Positions count the bytes for dst: `taken` is moved +
# given, `given` is half_delivered().
ctypedef struct KeptHalf:
    int64_t taken_offset       # src is TCP: taken = socket_taken() + this
    int64_t given_offset       # dst is TCP: given = socket_given() + this
    uint64_t taken             # src is UNIX: as of the end of the last intent
    uint64_t spill_end         # position behind what was spilled
    uint32_t spill_size        # bytes at the end of the spill; for TCP, `given` knows better
    uint32_t pipe              # number of the pipe that may have bytes of it; 0: none

ctypedef struct Slot:
    uint64_t entry             # 0: whatever else is here is void
    KeptHalf halves[2]         # by direction; the ParcelRecord is at SLOT_RECORD

# What a worker is in the middle of. The kernel itself writes msg_len.
ctypedef struct Intent:
    uint32_t half              # 1 + 2 * slot + direction; 0: nothing, and the rest is void
    uint32_t what              # INTENT_*
    uint64_t position          # COPY: taken before it. FLUSH: given before it. SPLICE: void
    mmsghdr taken              # from a UNIX socket: msg_len
    mmsghdr given              # to a UNIX socket: msg_len
    iovec taken_piece
    iovec given_piece


# ── in this process ──────────────────────────────────────────────────────────────────────────────

ctypedef struct Page:
    int receiver               # both ends; they are in root's queue as well
    int sender
    int sent                   # messages since it was last emptied
    int alive                  # of these, not ended (atomic)
    int unix_sockets           # in it
    bint of_pipes              # it has pipes, not sockets
    bint may_block             # to close what is in it may take as long as a peer likes
    bint emptying              # a thread does so, without the lock

ctypedef struct Slate:
    char *map                  # the file
    size_t size                # bytes
    SlateHead *head
    bint notes_unix            # the kernel can note in intents what UNIX sockets do
    pthread_mutex_t lock       # of all that follows
    uint32_t *free_slots       # a stack …
    uint32_t free_count        # … and its height
    uint64_t last_entry
    uint32_t last_pipe         # number
    uint32_t generation        # of root's queue
    int root                   # root's sending end
    Page *page                 # the one that is being filled; NULL: none
    Page *pipe_page            # likewise, with pipes
    Page **pages               # all of them, in the order in which they were made
    int page_count
    int pages_size             # of `pages`
    Page **slot_pages          # by slot: which one has its sockets; NULL: none
    int unix_sockets           # in pages
    int failures               # connections that could not be entered (atomic)
