"""What a process leaves to the next one: its connections, and the clients that it holds."""

import posix

from proxyd._relay import reset_at_close
from proxyd.address import AF_UNIX
from proxyd.continuity import parcel
from proxyd.continuity.blocks import Block

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    import _socket

    from proxyd.continuity.blocks import Value
    from proxyd.continuity.parts import Parts
    from proxyd.held import HeldClient
    from proxyd.listen import Listener


def pack(parts: "Parts", sender: "_socket.socket") -> str:
    """Stop serving, and send everything; return what that is, for the log.

    Nothing is given up: resume() goes on as if nothing had happened. Raises OSError.
    """
    parts.acceptor.stop()
    for event in parts.loop.freeze():
        parts.handle(event)
    _reset_held_at_close(parts, wanted=True)
    held = [
        _held_client(client, upstream.target.index)
        for upstream in parts.upstreams
        for client in upstream.held
    ]
    blocks = [
        *[_listener(parts, one) for one in parts.acceptor.listeners],
        *[Block("target", {"index": one.index, "text": one.text}) for one in parts.targets],
        Block("target", {"index": len(parts.targets)}),  # see arrival.former_index()
        *[Block("label", {"id": id_, "text": text}) for id_, text in parts.loop.labels()],
        *held,
    ]
    parcel.send(sender, blocks, parts.loop.relay)
    return f"{parts.loop.relay.resting} open and {len(held)} waiting connections"


def leave(parts: "Parts") -> None:
    """Forget all that pack() has sent, so that nothing of it is shut down, reset or unlinked."""
    parts.acceptor.kept = parts.loop.relay.resting + sum(len(one.held) for one in parts.upstreams)
    parts.loop.relay.release()
    for upstream in parts.upstreams:
        for client in list(upstream.held):
            upstream.held.remove(client)
            posix.close(client.fd)
    for listener in parts.acceptor.listeners:
        listener.before_close = None


def resume(parts: "Parts") -> None:
    """Serve again, after pack() or what should have followed it has failed."""
    _reset_held_at_close(parts, wanted=False)
    parts.loop.relay.thaw()
    parts.acceptor.resume_soon()


def _reset_held_at_close(parts: "Parts", *, wanted: bool) -> None:
    """Have held clients reset if the parcel is dropped, as the relay does for connections."""
    for upstream in parts.upstreams:
        for client in upstream.held:
            if client.family != AF_UNIX:  # which has no reset
                reset_at_close(client.fd, wanted)


def _listener(parts: "Parts", listener: "Listener") -> Block:
    """Describe a listener. One of --listen= goes along: clients may wait in its backlog."""
    place = listener.index - (len(parts.acceptor.listeners) - len(parts.options.listen))
    own = place >= 0 and listener.fd >= 0
    values: dict[str, Value] = {
        "index": listener.index,
        "name": listener.name,
        "address": listener.address,
        "datagram": listener.datagram,
    }
    if own:
        values["wanted"] = parts.options.listen[place].text
        if listener.inode is not None:
            values["device"], values["inode"] = listener.inode
    return Block("listener", values, [listener.fd] if own else [])


def _held_client(client: "HeldClient", target: int) -> Block:
    values: dict[str, Value] = {
        "target": target,
        "listener": client.listener,
        "peer": client.peer,
        "unsent": (client.preamble or b"") if client.has_unsent else b"",
        "name": client.name,
        "since_ms": client.since_ms,
        "id": client.id,
        "connection": client.connection,
    }
    return Block("held", values, [client.fd])
