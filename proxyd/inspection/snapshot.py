"""Snapshots: the clients of one moment, without stopping the proxy.

The relay copies its connections in pieces, and forwards in between. Clients that wait, for their
target or with a header that has not come, are Python's. One whose connect fails meanwhile may have
left the relay before it was copied, so the held ones are looked at once more at the end.
"""

from proxyd.held import HeldClient
from proxyd.inspection.rows import Names, RowMaker

TYPE_CHECKING = False  # as in typing
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from proxyd._relay import ConnectionInfo, Relay, SnapshotRows
    from proxyd.header_reader import Sender

SNAPSHOTS_MAX = 2
"""How many may be in memory. Further callers wait, and share the next one."""


class Snapshot:
    """All clients at the moment when it was started."""

    __slots__ = (
        "complete",
        "last_id",
        "makes",
        "missing",
        "names",
        "number",
        "rows",
        "users",
        "waiting",
        "wakes",
    )

    def __init__(self, names: Names) -> None:
        self.names = names
        self.number = 0
        """The relay's; 0: it has not been started."""
        self.rows: list[ConnectionInfo] = []
        """Those that the relay has sent so far."""
        self.waiting: list[tuple[str, HeldClient | Sender]] = []
        """Target and client, for those that waited then; final once it is complete."""
        self.missing = 0
        """How many connections the relay could not tell of; final once it is complete."""
        self.complete = False
        self.last_id = 0
        """No flow with a higher id belongs to it."""
        self.users = 0
        self.makes: RowMaker
        self.wakes: list[Callable[[], None]] = []
        """What to call whenever there are more rows, and at the end."""


class Snapshots:
    """Starts snapshots, one after the other, and collects their rows."""

    __slots__ = (
        "_alive",
        "_clock",
        "_names",
        "_next",
        "_relay",
        "_running",
        "_start_ms",
        "_waiting",
    )

    def __init__(
        self,
        relay: "Relay",
        clock: "Callable[[], int]",
        names: Names,
        waiting: "Callable[[], Iterator[tuple[str, HeldClient | Sender]]]",
    ) -> None:
        """`clock` returns the relay's time in milliseconds, `waiting` the clients that wait."""
        self._relay = relay
        self._clock = clock
        self._names = names
        self._waiting = waiting
        self._running: Snapshot | None = None
        self._next: Snapshot | None = None
        """Asked for, but not started."""
        self._alive: list[Snapshot] = []
        """Those started whose rows are not all used up."""
        self._start_ms = 0

    def request(self) -> Snapshot:
        """Return a snapshot that starts now or later. It is used until release()."""
        if self._next is None:
            self._next = Snapshot(self._names)
        snapshot = self._next
        snapshot.users += 1
        self._start_next()
        return snapshot

    def release(self, snapshot: Snapshot) -> None:
        """Record that one of those who requested it does not need it any more."""
        snapshot.users -= 1
        if snapshot.users:
            return
        if snapshot is self._next:
            self._next = None
        if snapshot is not self._running and snapshot in self._alive:
            self._alive.remove(snapshot)
        self._start_next()

    def _start_next(self) -> None:
        if self._next is None or self._running is not None or len(self._alive) >= SNAPSHOTS_MAX:
            return
        snapshot = self._running = self._next
        self._next = None
        self._alive.append(snapshot)
        self._start_ms = self._clock()
        snapshot.makes = RowMaker(self._names, self._start_ms)
        snapshot.waiting = list(self._waiting())
        snapshot.last_id = self._relay.new_id()
        snapshot.number = self._relay.start_snapshot()

    def handle(self, event: "SnapshotRows") -> None:
        """Take the rows of an event."""
        snapshot = self._running
        if snapshot is None or event.number != snapshot.number:
            return
        if snapshot.users:
            snapshot.rows += event.rows
        if event.last:
            snapshot.missing = event.missing
            self._complete(snapshot)
        for wake in snapshot.wakes:
            wake()

    def _complete(self, snapshot: Snapshot) -> None:
        returned = [
            (target, client)
            for target, client in self._waiting()
            if isinstance(client, HeldClient)
            and client.connection
            and client.since_ms <= self._start_ms
        ]
        if returned:
            told = {info.connection for info in snapshot.rows}
            told |= {client.id for _, client in snapshot.waiting}
            snapshot.waiting += [one for one in returned if one[1].id not in told]
        snapshot.complete = True
        self._running = None
        if not snapshot.users:
            self._alive.remove(snapshot)
        self._start_next()
