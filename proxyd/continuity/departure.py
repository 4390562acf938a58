"""What a process leaves to the next one: its connections, and the clients that it holds."""

import posix

from proxyd.continuity import parcel
from proxyd.continuity.blocks import Block

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    import _socket

    from proxyd.continuity.blocks import Value
    from proxyd.continuity.parts import Parts
    from proxyd.header_reader import Sender
    from proxyd.held import HeldClient
    from proxyd.listen import Listener


def pack(parts: "Parts", sender: "_socket.socket") -> str:
    """Stop serving, and send everything; return what that is, for the log.

    Nothing is given up: resume() goes on as if nothing had happened. Raises OSError.
    """
    parts.acceptor.stop()
    for event in parts.loop.freeze():
        parts.handle(event)
    held = [
        _held_client(client, upstream.target.index)
        for upstream in parts.upstreams
        for client in upstream.held
    ]
    senders = [_sender(one) for one in parts.acceptor.header_reader or ()]
    blocks = [
        *[_listener(parts, one) for one in parts.acceptor.listeners],
        *_targets(parts),
        *[Block("label", {"id": id_, "text": text}) for id_, text in parts.loop.labels()],
        *held,
        *senders,
    ]
    parcel.send(sender, blocks, parts.loop.relay)
    waiting = len(held) + len(senders)
    return f"{parts.loop.relay.resting} open and {waiting} waiting connections"


def leave(parts: "Parts") -> None:
    """Forget all that pack() has sent, so that nothing of it is shut down, reset or unlinked."""
    held = sum(len(one.held) for one in parts.upstreams) + parts.acceptor.awaiting_header
    parts.acceptor.kept = parts.loop.relay.resting + held
    parts.loop.relay.release()
    if parts.acceptor.header_reader is not None:
        parts.acceptor.header_reader.forget()
    for upstream in parts.upstreams:
        for client in list(upstream.held):
            upstream.held.remove(client)
            posix.close(client.fd)
    for listener in parts.acceptor.listeners:
        listener.before_close = None


def resume(parts: "Parts") -> None:
    """Serve again, after pack() or what should have followed it has failed."""
    parts.loop.relay.thaw()
    parts.acceptor.resume_soon()


def places(parts: "Parts") -> list[Block]:
    """Describe where connections come from and lead to, without any descriptor."""
    listeners = [Block("listener", _values(one)) for one in parts.acceptor.listeners]
    return [*listeners, *_targets(parts)]


def _targets(parts: "Parts") -> list[Block]:
    targets = [Block("target", {"index": one.index, "text": one.text}) for one in parts.targets]
    return [*targets, Block("target", {"index": len(parts.targets)})]  # see arrival.former_index()


def _listener(parts: "Parts", listener: "Listener") -> Block:
    """Describe a listener. One of --listen= goes along: clients may wait in its backlog."""
    place = listener.index - (len(parts.acceptor.listeners) - len(parts.options.listen))
    own = place >= 0 and listener.fd >= 0
    values = _values(listener)
    if own:
        values["wanted"] = parts.options.listen[place].text
        if listener.inode is not None:
            values["device"], values["inode"] = listener.inode
    return Block("listener", values, [listener.fd] if own else [])


def _values(listener: "Listener") -> "dict[str, Value]":
    return {
        "index": listener.index,
        "name": listener.name,
        "address": listener.address,
        "datagram": listener.datagram,
    }


def _held_client(client: "HeldClient", target: int) -> Block:
    values: dict[str, Value] = {
        "target": target,
        "listener": client.listener,
        "peer": client.peer,
        "header" if not client.has_unsent else "unsent": client.preamble or b"",
        "name": client.name,
        "since_ms": client.since_ms,
        "id": client.id,
        "connection": client.connection,
    }
    return Block("held", values, [client.fd])


def _sender(sender: "Sender") -> Block:
    """Describe a client that has not sent its PROXY header yet: nothing of it was taken."""
    values: dict[str, Value] = {
        "listener": sender.listener.index,
        "peer": sender.peer,
        "deadline_ms": sender.deadline_ms,
        "id": sender.id,
    }
    return Block("sender", values, [sender.fd])
