# What Python gets from the relay: events, connections and numbers; and how they are made of the
# relay's own structures. Included by _relay.pyx.

from proxyd.relay cimport records
from proxyd.relay.records cimport CONNECT_BUCKETS, Address, HalfRow, Peer, Row
from proxyd.relay.sys cimport int64_t, uint64_t
from proxyd.relay.types cimport (
    EVENT_ACCEPTED, EVENT_ACCEPT_FAILED, EVENT_DATAGRAMS_CHANGED, EVENT_NOT_KEPT, EVENT_OLD,
    EVENT_READY, EVENT_REFUSED, EVENT_WORKERS_WANTED, TO_CLIENT, TO_TARGET, Connection, PolicyEvent,
)
from proxyd.relay.upstream cimport connect_bucket_us

# How a connection can end, by ENDING_* in relay/records.pxd: the words of the log, and the keys of
# Totals.endings. The policy counts held clients under the two that have names of their own.
ENDINGS = ("ended", "reset", "idle", "cut", "client gone")
ENDING_CUT = ENDINGS[records.ENDING_CUT]
ENDING_CLIENT_GONE = ENDINGS[records.ENDING_CLIENT_GONE]

# ConnectionInfo.state, and HalfInfo.state
STATES = ("connecting", "open", "lingering")
HALF_STATES = ("flowing", "draining", "shut", "dead")

# The longest time, in µs, of each element of TargetTotals.connects but the last.
CONNECT_BUCKETS_US = tuple([connect_bucket_us(i) for i in range(records.CONNECT_BUCKETS - 1)])


# ── events, as run() returns them ────────────────────────────────────────────────────────────────

cdef class Ready:
    """A watched fd is ready."""

    cdef readonly int fd
    cdef readonly unsigned int events      # EPOLLIN …, as epoll_wait(2) has them

    def __init__(self, int fd, unsigned int events):
        self.fd = fd
        self.events = events


cdef class Accepted:
    """A client that is not connected automatically: its fd is the caller's now."""

    cdef readonly int listener             # index
    cdef readonly int client               # fd
    cdef readonly bytes peer               # packed address; b"": socket_names() can tell it
    cdef readonly bint sends_header        # it begins with a PROXY header

    def __init__(self, int listener, int client, bytes peer not None, bint sends_header=False):
        self.listener = listener
        self.client = client
        self.peer = peer
        self.sends_header = sends_header


cdef class AcceptFailed:
    """accept(2) failed. ELOOP: the client was one of our own outgoing sockets, and was closed."""

    cdef readonly int listener             # index
    cdef readonly int error                # errno

    def __init__(self, int listener, int error):
        self.listener = listener
        self.error = error


cdef class Refused:
    """A client over a limit was closed."""

    cdef readonly int listener             # index
    cdef readonly bytes peer               # packed address; b"": not known
    cdef readonly bint by_source           # the limit of its source, not that of all

    def __init__(self, int listener, bytes peer not None=b"", bint by_source=False):
        self.listener = listener
        self.peer = peer
        self.by_source = by_source


cdef class ConnectFailed:
    """A client could not be connected: its fd is the caller's again.

    `pending` has to be sent first when another target is tried: the preamble, and bytes that were
    already read from the client.
    """

    cdef readonly int listener             # index, as connect() was given it
    cdef readonly int client               # fd
    cdef readonly int error                # errno; ELOOP: the target was the socket itself
    cdef readonly bytes pending
    cdef readonly int64_t opened_ms        # when the connect began
    cdef readonly long long connection     # id; 0: the connect failed before there was any
    cdef readonly bytes peer               # packed address of the client; b"": not known
    cdef readonly bint has_unsent          # bytes of the client are among those pending

    def __init__(self, int listener, int client, int error, bytes pending not None,
                 int64_t opened_ms, long long connection, bytes peer not None=b"",
                 bint has_unsent=False):
        self.listener = listener
        self.client = client
        self.error = error
        self.pending = pending
        self.opened_ms = opened_ms
        self.connection = connection
        self.peer = peer
        self.has_unsent = has_unsent


cdef class Ended:
    """A connection has ended. Only with Relay.report_ends."""

    cdef readonly long long connection     # id
    cdef readonly str ending               # one of ENDINGS
    cdef readonly uint64_t bytes_up        # read from the client
    cdef readonly uint64_t bytes_down      # read from the target
    cdef readonly int64_t duration_ms
    cdef readonly int client_error         # errno with which the client's side failed; 0: none
    cdef readonly int target_error
    cdef readonly ConnectionInfo info      # just before; None without Relay.report_begins

    def __init__(self, long long connection, str ending not None, uint64_t bytes_up,
                 uint64_t bytes_down, int64_t duration_ms, int client_error, int target_error,
                 ConnectionInfo info=None):
        self.connection = connection
        self.ending = ending
        self.bytes_up = bytes_up
        self.bytes_down = bytes_down
        self.duration_ms = duration_ms
        self.client_error = client_error
        self.target_error = target_error
        self.info = info


cdef class Begun:
    """A connection has begun, or its connect has, and not with an id of new_id(). Only with
    Relay.report_begins."""

    cdef readonly ConnectionInfo info

    def __init__(self, ConnectionInfo info not None):
        self.info = info


cdef class SnapshotRows:
    """Connections that were there when a snapshot began, and had not ended when they were passed.

    Some are missing if the quarantine blocks, which forwards them, or if there is no memory.
    """

    cdef readonly int number               # of the snapshot, as start_snapshot() has told it
    cdef readonly list rows                # of ConnectionInfo; 64 at most
    cdef readonly bint last                # the snapshot is complete
    cdef readonly int missing              # with the last rows: how many could not be told of

    def __init__(self, int number, list rows not None, bint last, int missing=0):
        self.number = number
        self.rows = rows
        self.last = last
        self.missing = missing


cdef class Terminated:
    """What has become of Relay.terminate()."""

    cdef readonly long long connection     # id
    cdef readonly bint found               # it has been cut; False: there was none with this id

    def __init__(self, long long connection, bint found):
        self.connection = connection
        self.found = found


cdef class WorkersWanted:
    """One thread has more to do than it can, a CPU is idle, and there are no workers yet."""


cdef class DatagramsChanged:
    """Datagrams.take_events() has something to tell."""


cdef class Old:
    """There is a connection that the next process should go on with if this one is killed, and no
    slate: see Relay.report_old."""


cdef class NotKept:
    """A connection could not be kept for the next process. Only the first one is told of; all are
    tried again."""

    cdef readonly int error                # errno; EUSERS: there are too many UNIX sockets

    def __init__(self, int error):
        self.error = error


# ── what a connection is ─────────────────────────────────────────────────────────────────────────

cdef class HalfInfo:
    """One direction of a connection."""

    cdef readonly uint64_t bytes           # that the receiver has taken, the preamble included
    cdef readonly uint64_t in_flight       # read from the sender, but not taken yet
    cdef readonly str state                # one of HALF_STATES

    def __init__(self, uint64_t bytes, uint64_t in_flight, str state not None):
        self.bytes = bytes
        self.in_flight = in_flight
        self.state = state


@no_gc  # there may be thousands, and they are in no circle
cdef class ConnectionInfo:
    """A connection, as it was when its thread has looked at it."""

    cdef readonly long long connection     # id
    cdef readonly str state                # one of STATES
    cdef readonly int listener             # index
    cdef readonly int upstream             # index
    cdef readonly bytes client             # packed address that accept(2) has told; b"": not kept
    cdef readonly int client_pid           # of a client over a UNIX socket; 0: not known
    cdef readonly bytes target             # packed address; b"": not known
    cdef readonly bytes local              # our own towards the target, likewise
    cdef readonly int64_t opened_ms        # when the connect began
    cdef readonly int64_t active_ms        # when a byte last moved
    cdef readonly int held_ms              # how long the policy has held the client before
    cdef readonly int64_t connect_us       # time to connect; -1: not connected yet, or not known
    cdef readonly HalfInfo up              # client → target
    cdef readonly HalfInfo down            # target → client
    cdef readonly int thread               # 0: the one that calls run(); -1: the quarantine

    def __init__(self, long long connection, str state not None, int listener, int upstream,
                 bytes client not None, int client_pid, bytes target not None,
                 bytes local not None, int64_t opened_ms, int64_t active_ms, int held_ms,
                 int64_t connect_us, HalfInfo up not None, HalfInfo down not None, int thread):
        self.connection = connection
        self.state = state
        self.listener = listener
        self.upstream = upstream
        self.client = client
        self.client_pid = client_pid
        self.target = target
        self.local = local
        self.opened_ms = opened_ms
        self.active_ms = active_ms
        self.held_ms = held_ms
        self.connect_us = connect_us
        self.up = up
        self.down = down
        self.thread = thread


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────

cdef class TargetTotals:
    """What has been counted for one index of `upstream`, over all threads.

    Bytes of a connection that is there are counted when a snapshot passes it. `connects` has one
    number for each of CONNECT_BUCKETS_US, and one for the connects that took longer.
    """

    cdef readonly uint64_t bytes_to_target
    cdef readonly uint64_t bytes_to_clients
    cdef readonly dict endings             # connections that have ended: {one of ENDINGS: count}
    cdef readonly tuple connects           # that succeeded, by the time they took
    cdef readonly uint64_t connect_us      # the sum of these times


cdef class Totals:
    """What has been counted since the start, over all threads."""

    cdef readonly uint64_t accepted
    cdef readonly uint64_t refused         # of these, closed at once: over the limit, or ourselves
    cdef readonly uint64_t bytes_to_targets
    cdef readonly uint64_t bytes_to_clients
    cdef readonly uint64_t spliced         # bytes, of both directions, that splice(2) moved …
    cdef readonly uint64_t copied          # … and those that were copied
    cdef readonly dict endings             # connections that have ended: {one of ENDINGS: count}


cdef object make_event(const PolicyEvent *event, int64_t now_ms):
    if event.kind == EVENT_READY:
        return Ready(event.fd, event.value)
    if event.kind == EVENT_ACCEPTED:
        return Accepted(event.listener, event.fd, peer_bytes(&event.peer), event.value)
    if event.kind == EVENT_ACCEPT_FAILED:
        return AcceptFailed(event.listener, event.value)
    if event.kind == EVENT_REFUSED:
        return Refused(event.listener, peer_bytes(&event.peer), event.value)
    if event.kind == EVENT_WORKERS_WANTED:
        return WorkersWanted()
    if event.kind == EVENT_DATAGRAMS_CHANGED:
        return DatagramsChanged()
    if event.kind == EVENT_OLD:
        return Old()
    if event.kind == EVENT_NOT_KEPT:
        return NotKept(event.value)
    return ConnectFailed(
        event.listener, event.fd, event.value, b"", now_ms, 0, peer_bytes(&event.peer))


cdef ConnectionInfo connection_info(const Row *row):
    return ConnectionInfo(
        row.id, STATES[row.state], row.listener, row.upstream, peer_bytes(&row.client),
        row.client_pid, address_bytes(&row.target), address_bytes(&row.local), row.opened_ms,
        row.active_ms, row.held_ms, row.connect_us, half_info(&row.halves[TO_TARGET]),
        half_info(&row.halves[TO_CLIENT]), row.thread)


cdef HalfInfo half_info(const HalfRow *half):
    return HalfInfo(half.delivered, half.held, HALF_STATES[half.state])


cdef bytes peer_bytes(const Peer *peer):
    return peer.address[:peer.size]


cdef bytes address_bytes(const Address *address):
    return (<const char *>&address.name)[:address.size]


cdef bytes take_pending(Connection *c):
    if c.up.unsent == NULL:
        return b""
    return c.up.unsent[c.up.unsent_start:c.up.unsent_end]
