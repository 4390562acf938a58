"""Rows: what is told about one client, as the Connection of the interface."""

import time

from proxyd import address as sockaddr
from proxyd.acceptor import Acceptor
from proxyd.held import HeldClient
from proxyd.inspection.varlink import Fields, plain

TYPE_CHECKING = False  # as in typing
if TYPE_CHECKING:
    from proxyd._relay import ConnectionInfo, HalfInfo
    from proxyd.listen import Listener

_NOTHING: Fields = {"bytes": 0, "inFlight": 0, "state": "flowing"}
"""The halves of a client that is held."""


class RowMaker:
    """Makes the rows of one moment."""

    __slots__ = ("_listeners", "_now_ms", "_real_us")

    def __init__(self, acceptor: Acceptor, now_ms: int) -> None:
        self._listeners = acceptor.listeners
        self._now_ms = now_ms
        self._real_us = time.time_ns() // 1000

    def connection(self, info: "ConnectionInfo") -> Fields:
        """Return the row of a connection."""
        listener = self._listeners[info.listener]
        accepted_ms = info.opened_ms - info.held_ms
        return {
            "id": info.connection,
            "state": info.state,
            "listener": plain(listener.text),
            "client": _text(info.client),
            "clientPID": info.client_pid or None,
            "target": target_text(listener, info.target),
            "targetAddress": _text(info.target) or None,
            "localAddress": _local(info.local),
            "sinceUSec": self.since_us(accepted_ms),
            "ageUSec": self._span(accepted_ms),
            "idleUSec": self._span(info.active_ms),
            "heldUSec": info.held_ms * 1000 if info.held_ms else None,
            "connectUSec": None if info.connect_us < 0 else info.connect_us,
            "up": _half(info.up),
            "down": _half(info.down),
            "thread": info.thread,
        }

    def held(self, target: str, client: HeldClient) -> Fields:
        """Return the row of a client that is held, or was at this moment."""
        age_us = self._span(client.since_ms)
        return {
            "id": client.id,
            "state": "held",
            "listener": plain(self._listeners[client.listener].text),
            "client": _text(client.peer),
            "clientPID": client.pid or None,
            "target": plain(target),
            "targetAddress": None,
            "localAddress": None,
            "sinceUSec": self.since_us(client.since_ms),
            "ageUSec": age_us,
            "idleUSec": age_us,
            "heldUSec": age_us,
            "connectUSec": None,
            "up": _NOTHING,
            "down": _NOTHING,
            "thread": 0,
        }

    def since_us(self, since_ms: int) -> int:
        """Convert a moment of the relay's clock to microseconds since 1970."""
        return self._real_us - (self._now_ms - since_ms) * 1000

    def _span(self, since_ms: int) -> int:
        """Return the microseconds since a moment, which another thread may have set just now."""
        return max(self._now_ms - since_ms, 0) * 1000


def target_text(listener: "Listener", address: bytes) -> str:
    """Return the target of a connection as it is called on the command line."""
    target = listener.target
    if target.any_port:
        port = sockaddr.port(address) if address else listener.upstream.port
        return plain(target.text.removesuffix("*") + str(port))
    return plain(target.text)


def _text(address: bytes) -> str:
    return plain(sockaddr.text(sockaddr.unmapped(address))) if address else ""


def _local(address: bytes) -> str | None:
    """Return our own address, unless it is that of an unbound UNIX socket."""
    if not address or (
        sockaddr.family(address) == sockaddr.AF_UNIX and not sockaddr.unix_name(address)
    ):
        return None
    return _text(address)


def _half(half: "HalfInfo") -> Fields:
    return {"bytes": half.bytes, "inFlight": half.in_flight, "state": half.state}
