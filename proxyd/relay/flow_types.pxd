# Every structure of datagram forwarding. flows.pxd says how they belong together.
#
# A structure that is embedded in another stands above it. Times are as in types.pxd.

from proxyd.relay.records cimport Source, SourceTable
from proxyd.relay.sys cimport (
    int64_t, iovec, mmsghdr, sockaddr_storage, socklen_t, uint16_t, uint32_t, uint64_t, uint8_t,
)
from proxyd.relay.types cimport FlowHooks, Link, Worker


# ── addresses ────────────────────────────────────────────────────────────────────────────────────

ctypedef struct Name:
    socklen_t size             # 0: none; a UNIX sender without a name has one of 0 bytes, too
    sockaddr_storage address

ctypedef struct LocalAddress:
    uint8_t address[16]        # IPv4 as ::ffff:a.b.c.d; all zero: the listener's own, or not known
    uint32_t interface         # index, for a link-local address; otherwise 0


# ── counting ─────────────────────────────────────────────────────────────────────────────────────

# why a datagram was dropped
cdef enum:
    DROP_LIMIT                 # the table was full
    DROP_DOWN                  # the target was down for too long
    DROP_TOO_LARGE             # for the target's socket, or for our buffers
    DROP_LOOP                  # it came from one of our own flows
    DROP_NO_SOCKET             # there was none for its flow
    DROP_UNANSWERABLE          # a reply to a sender without a name
    DROP_CLIENT                # a reply that could not be sent
    DROP_TARGET                # it could not be sent to the target for another reason
    DROP_RIGHTS                # file descriptors came with it
    DROP_SOURCE                # its source had its share of flows
    DROP_COUNT

# how a flow ended
cdef enum:
    FLOW_EXPIRED, FLOW_EVICTED, FLOW_CUT, FLOW_ENDING_COUNT

ctypedef struct FlowTotals:
    uint64_t flows             # begun
    uint64_t endings[FLOW_ENDING_COUNT]
    uint64_t datagrams[2]      # delivered, by direction
    uint64_t bytes[2]          # in them, without PROXY headers
    uint64_t dropped[DROP_COUNT]
    uint64_t kernel_dropped    # by the receive queues of flows that have ended

# what is told of a listener at most once a second
cdef enum:
    NOTICE_LIMIT, NOTICE_LOOP, NOTICE_NO_SOCKET, NOTICE_SOURCE, NOTICE_COUNT

ctypedef struct Notice:
    uint64_t count             # of datagrams since it was last told
    int64_t told_ms            # when that was; 0: never
    int error                  # errno of the last one
    Name peer                  # sender of the last one


# ── flows ────────────────────────────────────────────────────────────────────────────────────────

# Classes of flows, in the order in which they make room for others.
cdef enum:
    FLOW_ANSWERED              # it got a reply, and its client has been silent since
    FLOW_UNANSWERED
    FLOW_ESTABLISHED           # its client has sent again after a reply
    FLOW_CLASSES

cdef enum:
    FLOW_HEADER_MAX = 52       # of PROXY v2, for IPv6

ctypedef struct FlowTarget     # below
ctypedef struct FlowListener

ctypedef struct FlowSource:
    Source source
    Link classes[FLOW_CLASSES]  # its flows, as in Flows.classes

ctypedef struct Flow:
    int kind                   # KIND_FLOW
    int fd                     # connected to the target, or in Flows.spares; -1: closed
    Flow *next                 # in its bucket of FlowTable.buckets
    Flow *own_next             # in its bucket of FlowTable.own_buckets
    uint32_t hash              # of the key: listener, peer and local
    uint32_t generation        # of the target's address that it is connected to
    FlowListener *listener     # NULL: it is a spare one
    FlowSource *source         # NULL: it counts nowhere
    Link silent                # in Flows.classes
    Link of_source             # in FlowSource.classes
    Link member                # in Flows.members, or in Flows.spares
    uint8_t flow_class         # FLOW_*
    uint8_t answered           # there was a reply
    uint8_t asked              # its client has sent one datagram since then
    uint8_t verdict_at_once    # SO_ERROR says at once whether the target refuses
    uint8_t gro                # its socket has UDP_GRO
    uint8_t local_refused      # replies cannot be sent from `local`
    uint8_t wants_room         # EPOLLOUT is on: a send has found the queue full
    uint8_t failed             # an error has come for it, and no reply since
    uint8_t transparent        # its own address is the client's
    uint8_t header_size        # of the PROXY header
    uint32_t gso_limit         # replies of this size or larger cannot be segmented by the kernel
    long long id
    int64_t opened_ms
    int64_t active_ms          # when a datagram last moved, either way
    uint64_t datagrams[2]      # delivered, by direction
    uint64_t bytes[2]
    LocalAddress local         # that the client has sent to
    Name peer                  # the client
    Name own                   # of `fd`
    uint8_t header[FLOW_HEADER_MAX]

cdef enum:
    EVICTED_KEPT = 1024        # a power of two

ctypedef struct FlowTable:
    Flow **buckets             # by FlowKey
    Flow **own_buckets         # by Flow.own
    uint32_t mask              # number of buckets - 1
    uint32_t count             # of flows
    uint64_t secret[2]         # so that nobody can choose addresses that fall into one bucket
    uint32_t evicted[EVICTED_KEPT]   # hashes of Flow.own, of flows that were evicted …
    int64_t evicted_ms[EVICTED_KEPT]  # … and when


# ── what was read, and is to be sent ─────────────────────────────────────────────────────────────

cdef enum:
    BUFFERS = 32               # for one batch
    BUFFER_SIZE = 64 * 1024    # what one recvmsg takes; UDP allows no more
    BUFFER_STRIDE = BUFFER_SIZE + 4096 + 320  # buffers must not share their cache sets
    UNIX_SPAN = 4              # buffers that are taken together for UNIX sockets
    CONTROL_SIZE = 128         # for IP_PKTINFO or IPV6_PKTINFO, and UDP_GRO or UDP_SEGMENT
    IOVS = 192                 # of one sendmmsg

ctypedef struct Piece:
    Flow *flow
    char *data
    uint32_t size
    uint32_t segment           # size of each datagram in it, but the last may be smaller

ctypedef struct Cursor:
    int piece                  # index
    uint32_t offset            # of the next datagram in it

ctypedef struct Outgoing:
    Cursor start
    uint32_t datagrams
    uint32_t bytes             # without headers

ctypedef struct Control:
    uint8_t bytes[CONTROL_SIZE]

ctypedef struct Inbox:
    char *buffers
    bint wide                  # they are laid out for UNIX sockets, or not at all
    mmsghdr messages[BUFFERS]
    iovec iovs[BUFFERS]
    Name names[BUFFERS]        # of the senders
    LocalAddress locals[BUFFERS]  # that they have sent to
    Control controls[BUFFERS]
    Piece pieces[BUFFERS]      # what has come, complete; data == NULL: it was too large

ctypedef struct Outbox:
    mmsghdr messages[BUFFERS]
    Outgoing about[BUFFERS]
    iovec iovs[IOVS]
    Control controls[BUFFERS]
    int count                  # of messages
    int iov_count
    Cursor end                 # behind the last one

# A message that was read from a listener, and that its target cannot be given yet.
ctypedef struct Held:
    Link link                  # in FlowListener.held
    Name peer
    LocalAddress local
    int64_t since_ms           # when it was read
    uint32_t size
    uint32_t start             # of the next datagram in it
    uint32_t segment
    char *data                 # right behind this structure


# ── listeners and targets ────────────────────────────────────────────────────────────────────────

# states of a target: see flow_target.pxd
cdef enum:
    TARGET_DOUBT, TARGET_UP, TARGET_DOWN

ctypedef struct FlowTarget:
    Link link                  # in Flows.targets
    int index                  # the policy's
    int state                  # TARGET_*
    bint holds                 # False: what is refused is dropped
    Name address               # size 0: not known yet
    uint32_t generation        # of the address
    bint reported              # the policy believes that it is down
    int held                   # datagrams, of all its listeners
    FlowListener *judged       # whose first held datagram was sent; NULL: none is under way
    Flow *judged_flow          # … over this flow; NULL: it has ended since
    int64_t verdict_ms         # when silence counts as a good sign
    bint unreachable           # the last error came from the way to it, not from itself
    uint32_t gso_limit         # datagrams of this size or larger cannot be segmented by the kernel
    int64_t told_ms            # when the policy was last told of a failure, without `holds`
    bint untold                # there was no memory to tell it …
    int untold_kind            # … this: TELL_*
    int untold_error           # its errno
    FlowTotals totals

ctypedef struct FlowListener:
    int kind                   # KIND_FLOW_LISTENER
    int fd                     # the policy's
    int family                 # AF_*
    int index                  # the policy's
    Link link                  # in Flows.listeners
    FlowTarget *target
    Name name                  # its own address
    bint any_address           # it is bound to the unspecified address
    bint guarded               # in our network namespace: clients may be our own flows
    bint proxy                 # send a PROXY header before each datagram
    bint started
    bint readable              # a recv may find something
    bint careful               # datagrams may come with descriptors: see flow_rights.pxd
    bint refuses_rights        # … but none that is sent from now on
    int64_t rights_ms          # the next one does; when to look again; 0: not known
    Flow *blocked              # the flow whose queue is full; NULL: none
    Link held                  # what was read and not sent
    uint64_t kernel_dropped    # before the start of the program
    Notice notices[NOTICE_COUNT]


# ── what the policy is told ──────────────────────────────────────────────────────────────────────

cdef enum:
    TELL_DOWN, TELL_UP, TELL_HOLDS, TELL_LISTENER_FAILED, TELL_BEGUN, TELL_ENDED
    TELL_LIMIT, TELL_LOOP, TELL_NO_SOCKET, TELL_SOURCE  # in the order of the notices

ctypedef struct FlowRow:
    long long id
    int listener               # index
    int target                 # index
    int family                 # of the listener
    uint16_t port              # of the listener, network byte order
    Name client
    LocalAddress local
    Name address               # of the target
    Name own
    int64_t opened_ms
    int64_t active_ms
    bint established
    bint answered
    uint64_t datagrams[2]
    uint64_t bytes[2]
    uint64_t kernel_dropped

ctypedef struct FlowEvent:
    Link link                  # in Flows.events
    int kind                   # TELL_*
    int index                  # of the target, or of the listener
    int value                  # errno, or FLOW_EXPIRED …
    uint64_t count
    Name peer
    FlowRow row


# ── descriptors ──────────────────────────────────────────────────────────────────────────────────

ctypedef struct RightsDropper:
    int fd                     # the socket of which one datagram is to be dropped
    int busy                   # a thread does so


# ── all of it ────────────────────────────────────────────────────────────────────────────────────

ctypedef struct Flows:
    FlowHooks hooks            # first, since Worker.flows points to it
    Worker *worker
    FlowTable table
    SourceTable sources        # how many flows each source has
    Link targets
    Link listeners
    Link classes[FLOW_CLASSES]  # flows; the one that was silent for the longest comes first
    Link members               # all flows, in the order in which they came
    Link spares                # flows that have ended, whose sockets new ones can take over
    int spare_count
    Link dead                  # to be freed after the batch
    Link events                # for the policy
    RightsDropper *dropper     # kept if its thread outlives us
    bint announced             # it was told that there are some
    bint report_flows          # tell of each flow
    int64_t fresh_ms           # how long a flow that is not established may be silent
    int64_t established_ms     # … and one that is
    int64_t idle_ms            # both at most this; 0: no limit
    int64_t last_ms            # when a datagram last moved
    Inbox inbox
    Outbox outbox
    Piece replies[BUFFERS]     # in the inbox
    int reply_count
    int buffers_used           # by them
