"""Going on with what another process has left."""

import _socket

from proxyd import address as sockaddr
from proxyd import log
from proxyd._relay import socket_names
from proxyd.acceptor import upstream_of
from proxyd.errors import reason
from proxyd.held import HeldClient
from proxyd.received_header import HeaderError, ReceivedHeader, parse

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from proxyd.continuity.blocks import Block
    from proxyd.continuity.parcel import Parcel
    from proxyd.continuity.parts import Parts
    from proxyd.listen import Listener

_INET = (sockaddr.AF_INET, sockaddr.AF_INET6)

_ADDRESS_MAX = 128
"""Of any address, in bytes (sockaddr_storage)."""

_INDEXES_MAX = 1 << 16
"""More listeners or targets than there can be."""


def take(
    parts: "Parts", parcel: "Parcel", before_thaw: "Callable[[], object]" = lambda: None
) -> None:
    """Go on with the connections and held clients of a parcel, which is closed.

    What cannot go on is reset, with one line. Clients are accepted only afterwards. `before_thaw`
    is called while all that goes on still rests.
    """
    connections, waiting, dropped = _take_all(parts, parcel)
    before_thaw()
    parts.loop.relay.thaw()
    parts.acceptor.taken_over = connections + waiting
    if connections or waiting:
        log.info(f"Going on with {connections} open and {waiting} waiting connections.")
    _log_dropped(dropped)


def take_recovered(
    parts: "Parts", parcel: "Parcel", dropped: int, before_thaw: "Callable[[], object]"
) -> None:
    """Likewise, after the last process was killed; `dropped`: connections reset by now."""
    connections, _, more = _take_all(parts, parcel)
    before_thaw()
    parts.loop.relay.thaw()
    parts.acceptor.taken_over = connections
    if connections:
        log.info(f"Going on with {connections} open connections: the last process was killed.")
    _log_dropped(dropped + more)


def _log_dropped(count: int) -> None:
    if count:
        log.warning(f"Had to reset {count} connections of the last process.")


def _take_all(parts: "Parts", parcel: "Parcel") -> tuple[int, int, int]:
    """Return (connections that rest, clients that wait, how many of both were reset)."""
    try:
        connections, failed = _take_connections(parts, parcel)
        waiting, dropped = _take_waiting(parts, parcel)
    except (OSError, ValueError, MemoryError) as error:
        log.warning(f"Failed to go on with the connections of the last process: {reason(error)}")
        connections, failed, dropped = parts.loop.relay.resting, 0, 0
        waiting = sum(len(one.held) for one in parts.upstreams) + parts.acceptor.awaiting_header
    finally:
        parcel.close()
    return connections, waiting, failed + dropped


def _take_connections(parts: "Parts", parcel: "Parcel") -> tuple[int, int]:
    """Return (connections that go on, connections that were reset). Raises OSError, ValueError."""
    listeners = _indexes(parcel.blocks, "listener", lambda one: _find_listener(parts, one))
    targets = {target.text: target.index for target in parts.targets}
    former = former_index(parts)
    found = _indexes(parcel.blocks, "target", lambda one: targets.get(one.text("text"), former))
    upstreams = [former if index < 0 else index for index in found]
    offset, fds = parcel.offset, parcel.take_connections()
    result = parts.loop.relay.import_connections(parcel.file, offset, fds, listeners, upstreams)
    for block in parcel.blocks:
        if block.kind == "label":
            parts.loop.set_label(block.number("id"), block.text("text"))
    return result


def former_index(parts: "Parts") -> int:
    """Return the index under which connections count whose target is not configured any more."""
    return len(parts.targets)


def _indexes(blocks: "Iterable[Block]", kind: str, find: "Callable[[Block], int]") -> list[int]:
    """Return the index that each listener or target has here, by its old one. Raises ValueError."""
    found: dict[int, int] = {}
    for block in blocks:
        if block.kind == kind:
            found[block.number("index", -1)] = find(block)
    if any(not 0 <= index < _INDEXES_MAX for index in found):
        raise ValueError(f"a {kind} has no index")
    return [found.get(index, -1) for index in range(max(found, default=-1) + 1)]


def _find_listener(parts: "Parts", block: "Block") -> int:
    """Return the index of the same listener: by its name, or if several have it, its address."""
    named = [one for one in parts.acceptor.listeners if one.name == block.text("name")]
    same = [one for one in named if one.address == block.raw("address")]
    found = same or (named if len(named) == 1 else [])
    return found[0].index if found and not found[0].datagram else -1


def _take_waiting(parts: "Parts", parcel: "Parcel") -> tuple[int, int]:
    """Go on with clients without a connection; return (their number, clients that were reset)."""
    taken = dropped = 0
    places = _indexes(parcel.blocks, "listener", lambda one: _find_listener(parts, one))
    for block in parcel.blocks:
        if block.kind not in _WAITING or len(block.fds) != 1:
            continue
        fd, block.fds = block.fds[0], []
        place = block.number("listener", -1)
        index = places[place] if 0 <= place < len(places) else -1
        if fd >= 0 and index >= 0 and _take(parts, parts.acceptor.listeners[index], fd, block):
            taken += 1
        else:
            dropped += 1
            if fd >= 0:
                parts.loop.relay.hang_up(fd, reset=True)
    return taken, dropped


def _take(parts: "Parts", listener: "Listener", fd: int, block: "Block") -> bool:
    """Go on with a client; False if that cannot be: then the fd is still the caller's.

    It must be a client of that listener, at least by its family.
    """
    try:
        if _family(fd) != listener.family:
            return False
        return _WAITING[block.kind](parts, listener, fd, block)
    except (OSError, ValueError, HeaderError, parts.acceptor.no_header):
        return False


def _take_held(parts: "Parts", listener: "Listener", fd: int, block: "Block") -> bool:
    """Hold a client, with the PROXY header that our own options want."""
    peer = _peer(fd, block)
    client = HeldClient(
        fd,
        listener.family,
        (_header(parts, fd, peer, block) or b"") + block.raw("unsent") or None,
        block.text("name"),
        min(block.number("since_ms"), parts.loop.relay.now_ms),
        peer,
    )
    client.listener = listener.index
    client.has_unsent = bool(block.raw("unsent"))
    client.id = block.number("id")
    client.connection = block.number("connection")
    upstream = upstream_of(listener, fd, peer)
    parts.loop.relay.count_again(fd, peer)
    upstream.hold(client)
    return True


def _take_sender(parts: "Parts", listener: "Listener", fd: int, block: "Block") -> bool:
    """Wait on for the PROXY header of a client."""
    peer, deadline_ms = _peer(fd, block), block.number("deadline_ms")
    parts.acceptor.go_on(listener, fd, peer, deadline_ms, block.number("id"))
    return True


_WAITING = {"held": _take_held, "sender": _take_sender}
"""Kinds of blocks about clients without a connection, and what is done with them."""


def _peer(fd: int, block: "Block") -> bytes:
    """Return the packed address of a client: that of its PROXY header, if it came with one."""
    peer = block.raw("peer")
    return peer if len(peer) <= _ADDRESS_MAX else socket_names(fd)[0]


def _header(parts: "Parts", fd: int, peer: bytes, block: "Block") -> bytes | None:
    """Return the PROXY header that a client is announced with; None if it is not.

    Raises HeaderError, Acceptor.no_header, ValueError.
    """
    version, known = parts.options.proxy_protocol, block.raw("header")
    if not version:
        return None
    if known and (known[:1] == b"P") == (version == 1):
        return known  # what it says may come from a header that was received
    from proxyd.proxy_protocol import pass_on

    received = parse(known) if known else None
    own = socket_names(fd)[1]
    kind, own_kind = (sockaddr.family(sockaddr.unmapped(one)) for one in (peer, own))
    if received is None and own and kind in _INET and own_kind != kind:
        # Its own header is not known any more, nor, therefore, where it had connected to.
        received = ReceivedHeader(0, peer, peer[:2] + bytes(len(peer) - 2))
    if received is not None and (received.peer or kind in _INET):
        return pass_on(version, received)
    return parts.acceptor.header_for(fd, peer)


def _family(fd: int) -> int:
    """Return the family of a socket. Raises OSError."""
    sock = _socket.socket(fileno=fd)
    try:
        return sock.family
    finally:
        sock.detach()
