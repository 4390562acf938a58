# The structures of what is counted, measured and told. types.pxd has those that move bytes.

from proxyd.relay.sys cimport (
    int64_t, sockaddr_storage, socklen_t, uint32_t, uint64_t, uint8_t,
)


# how a connection ended
cdef enum:
    ENDING_NORMAL, ENDING_RESET, ENDING_IDLE, ENDING_CUT, ENDING_CLIENT_GONE, ENDING_COUNT

cdef enum:
    CONNECT_BUCKETS = 17       # of the time that a connect took: see upstream.pxd
    ROWS_MAX = 64              # of a batch
    SOURCE_WORDS = 3           # of a key: see source.pxd
    PEER_MAX = 116             # bytes of an address: 111 for that of a UNIX socket, and no gap

ctypedef struct UpstreamTotals:
    int index                  # the policy's
    uint64_t bytes[2]          # given to the receiver, by direction
    uint64_t endings[ENDING_COUNT]  # connections that have ended, by ENDING_*
    uint64_t connects[CONNECT_BUCKETS]  # that succeeded, by the time they took
    uint64_t connect_us        # the sum of these times

ctypedef struct Peer:
    char address[PEER_MAX]     # of a client, as accept(2) or its PROXY header said
    socklen_t size             # 0: not known

ctypedef struct Binding:
    bint client                # bind to the client's address, without its port; otherwise …
    Peer v4                    # … to one of these, whose family is the target's; size 0: none
    Peer v6
    char device[16]            # the interface, IFNAMSIZ …
    socklen_t device_size      # … and the length of its name; 0: any interface

ctypedef struct Source:
    Source *next               # in its bucket
    uint32_t key[SOURCE_WORDS]
    int places                 # of the limit, that its clients take

ctypedef struct SourceTable:
    Source **buckets           # NULL: sources are not limited
    uint32_t mask              # number of buckets - 1
    uint64_t secret[2]         # so that nobody can choose addresses that fall into one bucket
    size_t entry_size          # bytes
    int places_max             # of each source
    int64_t nobody             # uid that is not a source; -1: none
    uint64_t refused           # clients whose source had no place left
    Source **held              # by fd: sources of clients that the policy has
    int held_size

ctypedef struct Network:
    int family                 # AF_INET or AF_INET6
    int bits                   # of the address, that count
    uint8_t address[16]        # network byte order

ctypedef struct Senders:
    Network *networks          # whose clients begin with a PROXY header
    int count
    bint unix_clients          # so do those of UNIX sockets

ctypedef struct Origin:
    UpstreamTotals *upstream   # where the connection counts
    Source *source             # where the client does; NULL: nowhere
    int listener               # index of the one it came from; the policy's
    int held_ms                # how long the policy has held the client
    Peer peer                  # the client

ctypedef struct Address:
    socklen_t size             # 0: not known
    sockaddr_storage name

ctypedef struct HalfRow:
    uint64_t delivered         # bytes that dst has taken
    uint64_t held              # bytes that it is yet to be given
    int state                  # FLOWING …

ctypedef struct Row:
    long long id
    int state                  # CONNECTING …
    int listener
    int upstream               # index
    int thread                 # number of the worker
    int client_pid             # of a UNIX client; 0: not known
    int held_ms
    Peer client
    Address target
    Address local              # our own towards the target
    int64_t opened_ms
    int64_t active_ms
    int64_t connect_us         # -1: not connected yet, or not known
    HalfRow halves[2]          # by direction


# ── sweeps and reports ───────────────────────────────────────────────────────────────────────────

# what a sweep does with each connection
cdef enum:
    SWEEP_COUNT                # add its bytes to UpstreamTotals
    SWEEP_TELL                 # … and tell of it
    SWEEP_CUT                  # cut it, if it is Sweep.connection

ctypedef struct Sweep:
    int number                 # 0: there was none yet
    int what                   # SWEEP_*
    long long connection       # id

# what the policy wants to be told, bits
cdef enum:
    REPORT_BEGINS = 1          # connections that begin, and rows of those that end
    REPORT_ENDS = 2            # connections that have ended
    REPORT_OLD = 4             # once: that there is a connection that is to be kept


# ── load ─────────────────────────────────────────────────────────────────────────────────────────

cdef enum:
    CPUS_MAX = 8192            # NR_CPUS of the largest configuration …
    CPUS_BYTES = 1024          # … at a bit each

ctypedef struct Machine:
    int stat_fd                # of /proc/stat or /proc/uptime; -1: neither could be opened
    bint some_cpus             # only the CPUs of `cpus` count
    uint8_t cpus[CPUS_BYTES]   # bits
    int quota                  # per cent of a CPU that the process may use; 0: no limit
    int wait_max               # per cent of a window: with more, the worker had to wait for a CPU

ctypedef struct Busy:
    int64_t since_ns           # when this window began
    int64_t asleep_ns          # how much of it the worker has slept
    int64_t ran_ns             # CPU time of the thread until this window,
    int64_t spent_ns           # … and of the process
    bint sampled               # the worker was busy ever since the idle time was last read:
    int64_t sampled_ns         # when that was,
    uint64_t idle_ns           # … and what it was then, modulo 2**64
    int64_t sample_after_ns    # when to read it again at the earliest
    int spare                  # per cent of one CPU that were idle when last read; 0: not busy
