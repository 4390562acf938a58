# Every structure of the relay, and the names of its states.
#
# A structure that is embedded in another stands above it. Limits and intervals are not here, but in
# the file whose functions obey them, unless an array has their size. Times end in _ms or _ns and
# are on CLOCK_MONOTONIC, if they are not durations.

from proxyd.relay.records cimport (
    ENDING_COUNT, ROWS_MAX, Binding, Busy, Machine, Origin, Peer, Row, Senders, SourceTable, Sweep,
    UpstreamTotals,
)
from proxyd.relay.slate_types cimport Intent, KeptHalf, Slate, Slot
from proxyd.relay.sys cimport (
    epoll_event, int64_t, pthread_mutex_t, pthread_t, sockaddr_storage, socklen_t, uint16_t,
    uint32_t, uint64_t, uint8_t,
)


# ── lists ────────────────────────────────────────────────────────────────────────────────────────

ctypedef struct Link:
    Link *prev                 # itself: not in a list
    Link *next
    void *owner                # what the link is part of; NULL for the head of a list


# ── pipes ────────────────────────────────────────────────────────────────────────────────────────

cdef enum:
    POOL_MAX = 8               # idle pipes kept, 2 fds each

ctypedef struct Pipe:
    int rd                     # -1: no pipe
    int wr                     # -1: nothing more is to go in
    size_t filled              # bytes inside; may exceed capacity (slots hold whole fragments)
    size_t capacity            # bytes, as F_GETPIPE_SZ says
    uint32_t number            # in a page; 0: in none …
    int *page_alive            # … and what that counts it in

ctypedef struct PipePool:
    Pipe idle[POOL_MAX]        # empty pipes
    int count                  # of them
    size_t size                # bytes asked for; pipe-max-size may grant less
    int64_t refused_ms         # when a pipe was last refused; 0: never


# ── the pump ─────────────────────────────────────────────────────────────────────────────────────

# directions
cdef enum:
    TO_TARGET, TO_CLIENT

# states of a half: see pump.pxd
cdef enum:
    FLOWING, DRAINING, SHUT, DEAD

# which descriptors the queue of a UNIX socket may hold: see rights.pxd
cdef enum:
    RIGHTS_UNKNOWN             # nothing has been done about them yet
    RIGHTS_NONE                # none, now and for ever
    RIGHTS_QUEUED              # those that were queued before they were refused
    RIGHTS_LEFT                # likewise, and `Rights.left` bytes are yet to be read with care
    RIGHTS_MAYBE               # any, at any time
    RIGHTS_AHEAD               # some, with the next message
    RIGHTS_ANY                 # any; but the connection is in quarantine, where a wait does no harm

# what an epoll event points to, in the first field of Watch, Listener, Mailbox, Endpoint, and, of
# datagrams, FlowListener and Flow
cdef enum:
    KIND_WATCH, KIND_LISTENER, KIND_MAILBOX, KIND_CLIENT, KIND_TARGET, KIND_FLOW_LISTENER, KIND_FLOW

ctypedef struct Counters:
    uint64_t forwarded[2]      # bytes delivered, by direction
    uint64_t spliced           # of these, bytes that never entered this process …
    uint64_t copied            # … and the others

ctypedef struct PumpContext:
    int epoll                  # fd of the worker's epoll instance
    int64_t now_ms             # read once per batch of events
    char *buffer               # for copying, shared by all halves: empty between two calls
    size_t first_unit          # bytes asked of one recv while connecting,
    size_t copy_unit           # … until the half proves to be a stream,
    size_t stream_unit         # … and of a stream; the size of `buffer`
    bint may_splice            # False: everything is copied
    bint may_refuse            # descriptors: the kernel has SO_PASSRIGHTS, as far as is known
    const Binding *binding     # of sockets to targets; NULL: the kernel is to choose
    Slate *slate               # the program's; NULL: nothing is kept for the next process
    Intent *intent             # of this worker, in it; NULL: this worker keeps nothing
    PipePool pool              # idle pipes
    Counters counters          # of this worker

ctypedef struct Rights:
    uint8_t state              # RIGHTS_*
    int left                   # bytes to be read with care; RIGHTS_ANY: seen, but not yet taken

ctypedef struct Endpoint:
    int kind                   # KIND_CLIENT or KIND_TARGET
    int fd                     # -1: closed
    int family                 # AF_*
    int error                  # the errno that ended it; 0: none
    uint8_t readable           # a recv may find something: see pump.pxd
    uint8_t writable           # a send may find room
    uint8_t ending             # FIN, RST or hang-up announced: read on until it comes
    uint8_t urgent             # an urgent byte is ahead: splice stops there, recv does not
    uint8_t ended              # its end was read
    uint8_t gone               # nothing can be written to it any more
    uint8_t refused            # … and bytes for it were lost: the reset of a UNIX socket
    uint8_t armed              # EPOLLOUT is asked for
    uint8_t registered         # with epoll
    Rights rights              # what its queue may hold; AF_UNIX
    int orphan_fd              # its socket, left to the quarantine to close; -1: none
    void *connection           # the Connection it is part of

ctypedef struct Half:
    Endpoint *src              # where bytes come from
    Endpoint *dst              # where they go
    int state                  # FLOWING …
    int direction              # TO_TARGET or TO_CLIENT
    Pipe pipe                  # bytes on their way by splice
    char *unsent               # bytes that recv has taken and send has not; NULL: none
    size_t unsent_start        # offset of the first of them
    size_t unsent_end          # … and behind the last
    KeptHalf *kept             # its part of a slot; NULL: it is not kept for the next process
    char *spill_limit          # behind the spill of its slot. What is unsent is there, at its end
    size_t spill_most          # bytes that were in it at once
    uint64_t moved             # bytes taken from src
    uint64_t given             # bytes for dst that are not from src: the preamble
    uint64_t lost              # bytes that dst can no longer be given
    uint64_t counted           # bytes given to dst that UpstreamTotals has already
    uint8_t full_reads         # in a row
    uint8_t small_reads        # in a row, of a stream
    uint8_t streaming          # large units, by splice or by copy as half_splices() decides
    uint8_t sndbuf_grown       # dst has the largest send buffer that it can get
    uint8_t copy_only          # the kernel refuses to splice these sockets


# ── recognising ourselves ────────────────────────────────────────────────────────────────────────

cdef enum:
    SELF_CONNECT_BUCKETS = 4096  # by port; local ports rarely repeat

ctypedef struct SelfConnectKey:
    uint8_t address[16]        # IPv4 as ::ffff:a.b.c.d, so that both families compare
    uint16_t port              # network byte order; 0: not TCP

ctypedef struct SelfConnect:
    SelfConnectKey local       # the address of an outgoing socket
    SelfConnectKey remote      # where it leads
    SelfConnect *next          # in its bucket
    bint listed                # in the table
    bint self_possible         # its own port is the target's: it may be connected to itself

ctypedef struct SelfConnectTable:
    pthread_mutex_t lock       # any worker may close such a socket
    SelfConnect *bucket[SELF_CONNECT_BUCKETS]


# ── rows on their way ────────────────────────────────────────────────────────────────────────────

ctypedef struct RowBatch:
    Link link                  # in Worker.batches or Worker.begun, or on its way
    int sweep                  # number; 0: of no sweep
    int *on_the_way            # the gauge of its worker; NULL: not counted
    int count                  # of `rows`
    Row rows[ROWS_MAX]


# ── what threads share ───────────────────────────────────────────────────────────────────────────

# orders to a worker, bits
cdef enum:
    ORDER_STOP = 1             # cut everything and end the thread
    ORDER_TRIM = 2             # close the idle pipes
    ORDER_ANSWER = 4           # answer the ping
    ORDER_SWEEP = 8            # begin with Mailbox.sweep
    ORDER_SWEEP_END = 16       # answer that sweep, since nothing more can come for it
    ORDER_GATHER = 32          # give all connections to the main worker, where they rest
    ORDER_ENTER = 64           # see whether connections are to be entered
    ORDER_TIDY = 128           # empty a page, which may block

ctypedef struct Mailbox:
    int kind                   # KIND_MAILBOX
    int wake_fd                # eventfd; -1: there is only one thread, and nothing ever comes
    pthread_mutex_t lock       # of what follows
    Link begin                 # connections to forward from now on
    Link failed                # connections whose connect failed in another thread
    Link ended                 # connections closed in another thread, to be reported
    Link batches               # rows of a sweep
    Sweep sweep                # the last one ordered
    uint32_t orders            # ORDER_*

ctypedef struct Gauges:
    int connections            # from connect(2) until closed or given back
    int in_quarantine          # sockets that the quarantine has yet to close, by their connections
    int wake_at_count          # the main worker sleeps until `connections` falls to this
    int64_t last_end_ms        # when a connection last ended
    int worker_error           # errno of a worker that cannot go on; 0: none
    int reports                # REPORT_*: what the policy wants to be told
    int terminated             # the sweep has found what it was to cut
    int rows_lost              # rows of this sweep for which there was no memory
    int gathering              # connections begin nowhere: they rest in the main worker
    int old                    # a worker has a connection that is to be kept
    int not_kept               # errno: why a connection could not be entered; 0: told, or none
    int tcp_alone              # connections with a UNIX socket are never entered

ctypedef struct Quarantine:
    pthread_mutex_t lock       # of `waiting` and `mailbox`
    Link waiting               # connections with a socket to close, while there is no thread
    Mailbox *mailbox           # of its thread; NULL: there is none yet
    Mailbox *main_mailbox      # of the main worker, which starts it
    int wanted                 # the thread is to be started
    int orphan_sockets         # in it, sockets that were no connection's
    int64_t retry_ms           # not to be started before


# ── connections ──────────────────────────────────────────────────────────────────────────────────

# states of a connection
cdef enum:
    CONNECTING, CONNECTED, LINGERING, CLOSED

ctypedef struct Connection:
    Link live                  # in Worker.live, later in .failed, .ended or .dead, or on its way
    Link timed                 # in Worker.timed
    Link ready                 # in Worker.ready
    Link to_quarantine         # in Worker.to_quarantine
    Link member                # in Worker.members
    Link entering              # in Worker.enter_later or Worker.enter_again
    Quarantine *quarantine     # the program's
    Origin origin
    int sweep                  # the last one that has passed it, or that began before it
    Row *row                   # as it was when it ended; NULL: not wanted
    Endpoint client
    Endpoint target
    Half up                    # client → target
    Half down                  # target → client
    SelfConnect self_connect   # the target socket's entry in the table
    long long id
    int state                  # CONNECTING …
    int ending                 # ENDING_*, valid once CLOSED
    int64_t timeout_ms         # of the connect; 0: as long as the kernel tries
    int64_t opened_ms          # when the connect began
    int64_t began_ns           # the same, more exactly; 0: dial() has connected it
    int64_t connect_us         # how long the connect took; -1: not connected yet, or not known
    int64_t active_ms          # when a byte last moved
    int64_t timer_ms           # when its timer is due; 0: none
    int64_t progress_ms        # when the queue towards the last side last moved
    uint64_t queue             # what it was then, bytes
    uint64_t moved             # bytes moved in both directions when last looked at
    int recheck_ms             # until the queue is looked at again
    size_t drained             # bytes read and thrown away, since their receiver is gone
    Endpoint *last             # LINGERING: the side that is still open
    bint reset                 # … and is to be reset in the end
    bint has_rested            # it has begun before, perhaps in another process: see gather.pxd
    bint has_orphans           # a socket of it is left to the quarantine to close
    bint orphan_only           # … and it is no more than that: a socket without a connection
    bint placeless             # … which takes no place in the limit
    Slot *slot                 # of the slate; NULL: it is not kept for the next process

# kinds of PolicyEvent; connects that fail later, and ends, are lists of connections
cdef enum:
    EVENT_READY, EVENT_ACCEPTED, EVENT_ACCEPT_FAILED, EVENT_REFUSED, EVENT_CONNECT_FAILED
    EVENT_WORKERS_WANTED, EVENT_DATAGRAMS_CHANGED, EVENT_OLD, EVENT_NOT_KEPT

ctypedef struct PolicyEvent:
    int kind                   # EVENT_*
    int fd                     # that is ready, or the client's
    uint32_t value             # epoll events, an errno, or a flag
    int listener               # index
    Peer peer                  # of an accepted client

ctypedef struct Watch:
    int kind                   # KIND_WATCH
    int fd                     # the policy's
    SelfConnect self_connect   # of a socket that dial() made
    int64_t began_ns           # when it did; 0: it did not
    int64_t connect_us         # how long the connect took; -1: not connected yet

ctypedef struct Terms:
    sockaddr_storage target
    socklen_t target_size
    int64_t timeout_ms         # of a connect; 0: as long as the kernel tries
    UpstreamTotals *upstream   # where the connections count

# what a listener checks each client for, bits
cdef enum:
    CHECK_TCP = 1              # its address is that of one of our outgoing sockets
    CHECK_UNIX = 2             # its process is this one
    CHECK_PORT = 4             # it connected to another port than the listener's

ctypedef struct Listener:
    int kind                   # KIND_LISTENER
    int fd                     # the policy's
    int family                 # AF_*
    int check                  # CHECK_*
    int index                  # what the policy calls it
    uint16_t port              # its own, in network byte order; for CHECK_PORT
    bint watched               # registered with epoll
    bint auto_connect          # connect clients at once …
    Terms terms                # … on these terms
    uint64_t connected_count   # clients connected, or on their way
    int64_t last_turn          # the worker's turn in which it was last ready
    int ready_turns            # in a row, up to READY_TURNS_MAX
    Link waiting               # in Worker.waiting_listeners
    bint refuses               # there was no room in time: clients are accepted to be closed
    bint contested             # a process that shares the listener has made it blocking
    int64_t nonblock_checked_ms  # when O_NONBLOCK was last looked at
    uint32_t early             # clients to come that may be older than the listener's settings


# ── workers ──────────────────────────────────────────────────────────────────────────────────────

cdef enum:
    EPOLL_EVENTS_MAX = 256     # per epoll_wait
    POLICY_EVENTS_MAX = 512    # per turn; listeners stop at half, the rest is for watched fds

ctypedef struct Worker         # below

# What an extension of its own adds to the loop of the main worker: see flows.pxd.
ctypedef struct FlowHooks:
    void (*event)(Worker *worker, void *place, uint32_t events) noexcept nogil
    void (*turn)(Worker *worker) noexcept nogil  # once per batch of events, after the listeners
    int64_t (*next_ms)(Worker *worker) noexcept nogil  # when to turn at the latest; -1: never
    bint (*make_room)(Worker *worker) noexcept nogil  # end a flow; whether there was one to spare

ctypedef struct Workers:
    Worker **each              # the workers other than the main one
    int count
    int size                   # of `each`
    int window_ms              # how long load is measured
    Machine machine            # where to learn whether another CPU is idle
    Worker *quarantine         # the quarantine's; NULL: not needed so far
    bint want_reported         # the policy was told that a worker could help
    int ping_sequence          # number of the last ping
    int gather_sequence        # number of the last ORDER_GATHER
    int sweep_awaited          # the answer that all workers are to give; 0: no sweep is going on
    bint sweep_over            # it has ended, which the policy is yet to be told
    int sweep_missing          # connections of a quarantine that blocks: it could not be asked
    int64_t sweep_patience_ms  # until when to wait for the quarantine

ctypedef struct Worker:
    PumpContext ctx
    Gauges *gauges             # the program's
    SelfConnectTable *self_connects  # the program's
    Quarantine *quarantine     # the program's
    SourceTable *sources       # of the main worker: how many places each source has
    const Senders *senders     # of the main worker: who sends PROXY headers; NULL: none does
    FlowHooks *flows           # of the main worker; NULL: no datagrams are forwarded
    Mailbox mailbox            # what other threads have left for this one
    Worker *main               # the worker that accepts; NULL: this is the one
    Workers workers            # of the main worker: the others
    int number                 # 0: the main worker; -1: the quarantine's
    pthread_t thread           # of the others: where it runs
    bint offloads_when_busy    # False: the main worker distributes new connections
    Busy busy                  # its load
    int asleep                 # it waits for events
    bint stopping              # it was told to end
    int answered_ping          # the last ping that it has answered
    bint gathers               # ORDER_GATHER is to be obeyed after this batch
    int gather_answer          # what answered_gather is to be after this turn
    int answered_gather        # the last ORDER_GATHER of which nothing is left to do
    Link live                  # connections; the one that was silent for the longest comes first
    Link members               # the same connections, in the order in which they came
    Link timed                 # those with a timer
    Link ready                 # those whose pump spent its budget
    Link failed                # connects that failed, for the policy
    Link ended                 # closed connections, for the policy
    Link dead                  # closed connections, to be freed after the batch
    Link to_quarantine         # connections to be moved there after the batch
    Link resting               # of the main worker: connections that rest, in the order of `live`
    int cut                    # the quarantine's: connections that it has cut in the end
    Sweep sweep                # the last one that this worker knows of
    Link cursor                # in `members`, before the connections that it has yet to pass
    Link enter_cursor          # likewise, before those that are yet to be entered: see enter.pxd
    Link enter_later           # old ones that could not be entered
    Link enter_again           # of these, those that are to be tried in this round
    int64_t enter_ms           # when to pass them; 0: not
    int64_t enter_round_ms     # when the next round begins
    int64_t tidy_ms            # when to empty pages; 0: not
    int sweep_answer           # what answered_sweep is to be after this turn
    int answered_sweep         # 2 × number: all were passed; 2 × number + 1: … and none can come
    Link batches               # rows for the policy
    int batches_on_the_way     # of this worker, that the policy has not fetched
    Link begun                 # rows of connections that have begun, for the policy
    int connection_count       # of this worker
    int connections_max        # the limit, over all workers; the policy's
    int held                   # clients that the policy has: each takes a place of the limit
    Link waiting_listeners     # those that wait for room
    int64_t room_ms            # until when they do; 0: none does
    int64_t idle_ms            # close connections that were silent for this long; 0: never
    long long last_id          # of a connection
    uint64_t handed_over       # connections moved to other workers
    uint64_t accepted          # clients
    uint64_t refused           # of these, closed at once: over the limit, or ourselves
    int64_t turns              # batches of events
    epoll_event events[EPOLL_EVENTS_MAX]
    PolicyEvent policy_events[POLICY_EVENTS_MAX]
    int policy_event_count
    int64_t next_timer_ms      # when the earliest timer is due; 0: none
    int pid                    # this process
    uint64_t ends[ENDING_COUNT]  # connections that have ended, by ENDING_*
