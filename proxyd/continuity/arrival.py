"""Going on with what another process has left."""

import _socket

from proxyd import log
from proxyd._relay import reset_at_close
from proxyd.acceptor import upstream_of
from proxyd.address import AF_UNIX
from proxyd.held import HeldClient

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from proxyd.continuity.blocks import Block
    from proxyd.continuity.parcel import Parcel
    from proxyd.continuity.parts import Parts
    from proxyd.listen import Listener

_INDEXES_MAX = 1 << 16
"""More listeners or targets than there can be."""


def take(parts: "Parts", parcel: "Parcel") -> None:
    """Go on with the connections and held clients of a parcel, which is closed.

    What cannot go on is reset, with one line. Clients are accepted only afterwards.
    """
    try:
        connections, failed = _take_connections(parts, parcel)
        held, dropped = _take_held(parts, parcel)
    except (OSError, ValueError) as error:
        log.warning(f"Failed to go on with the connections of the last process: {error}")
        connections, held = parts.loop.relay.resting, sum(len(one.held) for one in parts.upstreams)
        failed = dropped = 0
    finally:
        parcel.close()
    parts.loop.relay.thaw()
    parts.acceptor.taken_over = connections + held
    if connections or held:
        log.info(f"Going on with {connections} open and {held} waiting connections.")
    if failed or dropped:
        log.warning(f"Had to reset {failed + dropped} connections of the last process.")


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


def _take_held(parts: "Parts", parcel: "Parcel") -> tuple[int, int]:
    """Hold the clients that were held; return (their number, clients that were reset)."""
    held = dropped = 0
    places = _indexes(parcel.blocks, "listener", lambda one: _find_listener(parts, one))
    for block in parcel.blocks:
        if block.kind != "held" or len(block.fds) != 1:
            continue
        fd, block.fds = block.fds[0], []
        place = block.number("listener", -1)
        index = places[place] if 0 <= place < len(places) else -1
        if fd >= 0 and index >= 0 and _hold(parts, parts.acceptor.listeners[index], fd, block):
            held += 1
        else:
            dropped += 1
            if fd >= 0:
                parts.loop.relay.hang_up(fd, reset=True)
    return held, dropped


def _hold(parts: "Parts", listener: "Listener", fd: int, block: "Block") -> bool:
    """Hold a client, with the PROXY header that our own options want; False if it cannot be.

    It must be a client of that listener, at least by its family.
    """
    peer, unsent = block.raw("peer"), block.raw("unsent")
    try:
        if _family(fd) != listener.family:
            return False
        header = parts.acceptor.header_for(fd, peer)
    except (OSError, parts.acceptor.no_header):
        return False
    if listener.family != AF_UNIX:
        reset_at_close(fd, wanted=False)
    preamble = (header or b"") + unsent or None
    since_ms = min(block.number("since_ms"), parts.loop.relay.now_ms)
    client = HeldClient(fd, listener.family, preamble, block.text("name"), since_ms, peer)
    client.listener = listener.index
    client.has_unsent = bool(unsent)
    client.id = block.number("id")
    client.connection = block.number("connection")
    upstream_of(listener, fd).hold(client)
    return True


def _family(fd: int) -> int:
    """Return the family of a socket. Raises OSError."""
    sock = _socket.socket(fileno=fd)
    try:
        return sock.family
    finally:
        sock.detach()
