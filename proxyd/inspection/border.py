"""What the relay tells about its connections, as far as the inspection uses it.

To be replaced by the classes of `_relay`, which have the same names and fields.
"""

from typing import Protocol, cast, runtime_checkable

from proxyd._relay import Ended, Relay


class HalfInfo(Protocol):
    """One direction of a connection."""

    @property
    def bytes(self) -> int:
        """Delivered so far."""

    @property
    def in_flight(self) -> int:
        """Read, and not delivered yet."""

    @property
    def state(self) -> str:
        """One of flowing, draining, shut and dead."""


class ConnectionInfo(Protocol):
    """A connection at the moment of the snapshot."""

    @property
    def connection(self) -> int:
        """The id."""

    @property
    def state(self) -> str:
        """One of connecting, open and lingering."""

    @property
    def listener(self) -> int:
        """The index of its listener."""

    @property
    def client(self) -> bytes:
        """Packed; b"" if it is not known."""

    @property
    def client_pid(self) -> int:
        """The process of a UNIX client; 0 if it is not known."""

    @property
    def target(self) -> bytes:
        """Packed; b"" if it is not known."""

    @property
    def local(self) -> bytes:
        """Our own address towards the target, packed; b"" without one."""

    @property
    def opened_ms(self) -> int:
        """When it began."""

    @property
    def active_ms(self) -> int:
        """When it last moved a byte."""

    @property
    def held_ms(self) -> int:
        """How long the client was held before."""

    @property
    def connect_us(self) -> int:
        """How long the connect took; -1: it is not connected yet."""

    @property
    def up(self) -> HalfInfo:
        """From the client to the target."""

    @property
    def down(self) -> HalfInfo:
        """From the target to the client."""

    @property
    def thread(self) -> int:
        """0 for the main worker."""


@runtime_checkable
class SnapshotRows(Protocol):
    """An event: some rows of a snapshot."""

    @property
    def number(self) -> int:
        """What start_snapshot() has returned."""

    @property
    def rows(self) -> list[ConnectionInfo]:
        """At most 64."""

    @property
    def last(self) -> bool:
        """Whether the snapshot is complete."""


class Begun(Protocol):
    """An event: a connection has begun."""

    @property
    def info(self) -> ConnectionInfo:
        """The connection."""


class EndedWithInfo(Protocol):
    """What the event of an end has, too."""

    @property
    def info(self) -> ConnectionInfo | None:
        """The connection as it was at its end; None unless `report_begins` was set."""


@runtime_checkable
class Terminated(Protocol):
    """An event: the answer to terminate()."""

    @property
    def connection(self) -> int:
        """The id."""

    @property
    def found(self) -> bool:
        """Whether there was such a connection; it is reset."""


class InspectedRelay(Protocol):
    """What the inspection asks of the relay."""

    report_begins: bool
    report_ends: bool

    def start_snapshot(self) -> int:
        """Begin to collect the rows of all connections; return the snapshot's number."""

    def terminate(self, connection: int) -> None:
        """Reset a connection in both directions; a Terminated event says whether there was one."""


def inspected(relay: Relay) -> InspectedRelay:
    """Return the relay as it is asked here."""
    return cast(InspectedRelay, relay)


def info_of(ended: Ended) -> ConnectionInfo | None:
    """Return the connection that has ended, if the relay has been asked to keep it."""
    return cast(EndedWithInfo, ended).info
