# What a listener has in hand: datagrams that were read, and that the target cannot be given yet.
#
# The kernel's own queue is where datagrams wait. In hand is only what was read before it was known
# that the target is down: usually one datagram, at most one batch.

from proxyd.relay.flow_batch cimport piece_datagrams
from proxyd.relay.flow_types cimport DROP_TARGET, FlowListener, Held, LocalAddress, Name, Piece
from proxyd.relay.list cimport link_init, list_append, list_empty, list_remove
from proxyd.relay.sys cimport free, int64_t, malloc, memcpy, uint32_t


cdef inline void held_add(
    FlowListener *listener, const Name *peer, const LocalAddress *local, const Piece *piece,
    uint32_t offset, int64_t now_ms
) noexcept nogil:
    """Keep a copy of what is in a piece from `offset` on. Without memory it is dropped."""
    cdef uint32_t size = piece.size - offset
    cdef Held *held = <Held *>malloc(sizeof(Held) + size)
    if held == NULL:
        listener.target.totals.dropped[DROP_TARGET] += piece_datagrams(piece, offset)
        return
    link_init(&held.link, held)
    held.peer = peer[0]
    held.local = local[0]
    held.since_ms = now_ms
    held.size = size
    held.start = 0
    held.segment = piece.segment
    held.data = <char *>held + sizeof(Held)
    memcpy(held.data, piece.data + offset, size)
    list_append(&listener.held, &held.link)
    listener.target.held += piece_datagrams(piece, offset)


cdef inline int held_drop_all(FlowListener *listener, int cause) noexcept nogil:
    """Drop what is in hand; how many datagrams that were."""
    cdef int count = 0
    cdef Held *held = held_first(listener)
    cdef Piece piece
    while held != NULL:
        held_piece(held, &piece)
        count += piece_datagrams(&piece, 0)
        held_take(listener, held, held.size)
        held = held_first(listener)
    listener.target.totals.dropped[cause] += count
    return count


cdef inline void held_drop_one(FlowListener *listener, int cause) noexcept nogil:
    """Drop the first datagram in hand."""
    cdef Held *held = held_first(listener)
    if held == NULL:
        return
    listener.target.totals.dropped[cause] += 1
    held_take(listener, held, held_next_start(held))


cdef inline void held_take(FlowListener *listener, Held *held, uint32_t start) noexcept nogil:
    """All before `start` is not held any more."""
    cdef Piece before, after
    held_piece(held, &before)
    held.start = start
    held_piece(held, &after)
    listener.target.held -= piece_datagrams(&before, 0)
    if start < held.size:
        listener.target.held += piece_datagrams(&after, 0)
        return
    list_remove(&held.link)
    free(held)


cdef inline Held *held_first(const FlowListener *listener) noexcept nogil:
    """NULL: nothing is held."""
    return NULL if list_empty(&listener.held) else <Held *>listener.held.next.owner


cdef inline uint32_t held_next_start(const Held *held) noexcept nogil:
    """Where the second datagram begins."""
    return held.start + min(held.segment, held.size - held.start)


cdef inline void held_piece(const Held *held, Piece *piece) noexcept nogil:
    """What is left of it."""
    piece.flow = NULL
    piece.data = held.data + held.start
    piece.size = held.size - held.start
    piece.segment = held.segment
