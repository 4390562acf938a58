"""Clients that are refused: how many, when the last ones, and what the log says of them."""

from proxyd import log
from proxyd._relay import Relay
from proxyd.listen import Listener
from proxyd.peers import address_field, address_note


class Refusals:
    """Counts the clients that the policy refuses; the relay counts its own.

    Whoever refuses a client closes it.
    """

    __slots__ = (
        "_relay",
        "count",
        "headerless",
        "headerless_ms",
        "limit_ms",
        "source_limit_ms",
        "unknown",
    )

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self.count = 0
        """Over a limit, without an address to tell the target, or without a header."""
        self.unknown = 0
        """Of these, the ones without an address …"""
        self.headerless = 0
        """… and those that should have sent a PROXY header, but have not."""
        self.limit_ms: int | None = None
        """When a client was last refused at the limit, …"""
        self.source_limit_ms: int | None = None
        """… at that of its source, …"""
        self.headerless_ms: int | None = None
        """… and for lack of a PROXY header."""

    def note_limit(self, listener: Listener, peer: bytes) -> None:
        """Tell of one at the limit, which the caller, or the relay, counts."""
        self.limit_ms = self._relay.now_ms
        log.limited(
            "limit",
            f"Hit connection limit, refusing connection.{address_note(peer)}",
            MESSAGE_ID=log.REFUSED,
            LISTENER=listener.text,
            LIMIT=str(self._relay.connections_max),
            CLIENT=address_field(peer),
        )

    def note_source_limit(self, listener: Listener, peer: bytes, limit: int) -> None:
        """Tell of one at the limit of its source, which the caller, or the relay, counts."""
        self.source_limit_ms = self._relay.now_ms
        log.limited(
            "source limit",
            f"Hit connection limit of a source, refusing connection.{address_note(peer)}",
            MESSAGE_ID=log.REFUSED_SOURCE,
            LISTENER=listener.text,
            LIMIT=str(limit),
            CLIENT=address_field(peer),
        )

    def add_headerless(self, listener: Listener, peer: bytes, why: str) -> None:
        """Count and tell of one that has not sent its PROXY header."""
        self.count += 1
        self.headerless += 1
        self.headerless_ms = self._relay.now_ms
        log.limited(
            "header",
            f"Refusing connection to {listener.text}: {why}.{address_note(peer)}",
        )

    def add_unknown(self, listener: Listener) -> None:
        """Count and tell of one whose address is not known any more."""
        self.count += 1
        self.unknown += 1
        log.limited(
            "unknown",
            f"Refusing connection to {listener.text}: "
            "the client's address is not known any more, for a PROXY header.",
        )
