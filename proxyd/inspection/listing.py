"""List: the clients of one snapshot, piece by piece; then the flows, as they are by then."""

import json

from proxyd.inspection.caller import SharedStream
from proxyd.inspection.interfaces import PROXY
from proxyd.inspection.rows import Row
from proxyd.inspection.snapshot import Snapshot, Snapshots
from proxyd.inspection.varlink import CallError, message

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Iterable

    from proxyd._datagram import FlowInfo
    from proxyd.datagrams import DatagramPolicy

ROWS_MAX = 32
"""How many rows a piece has: the relay waits while they are made into text."""


class ListStream(SharedStream):
    """The replies to List."""

    __slots__ = (
        "_at",
        "_datagrams",
        "_flow",
        "_kept",
        "_snapshot",
        "_snapshots",
        "_state",
        "_target",
        "_waiting_at",
    )

    def __init__(
        self,
        snapshots: Snapshots,
        target: str | None,
        state: str | None,
        datagrams: "DatagramPolicy | None" = None,
    ) -> None:
        """Only rows of this target and in this state are wanted, if they are given."""
        self._datagrams = datagrams
        self._flow = 0
        """The id of the last flow that was told."""
        self._snapshots = snapshots
        self._snapshot: Snapshot = snapshots.request()
        super().__init__(self._snapshot.wakes)
        self._target = None if target is None else json.dumps(target)
        self._state = state
        self._at = self._waiting_at = 0
        self._kept: Row | None = None
        """The last row, which is sent after the next one or as the end of all."""

    def next(self) -> bytes | None:
        """Return the next piece; None before it is there.

        Raises CallError if there is none, or, after all others, if some are missing.
        """
        snapshot = self._snapshot
        infos = snapshot.rows[self._at : self._at + ROWS_MAX]
        self._at += len(infos)
        if infos:
            return self._take(
                snapshot.makes.connection(info)
                for info in infos
                if self._wants(snapshot.names.target(info), info.state)
            )
        if not snapshot.complete:
            return None
        waiting = snapshot.waiting[self._waiting_at : self._waiting_at + ROWS_MAX]
        self._waiting_at += len(waiting)
        if waiting:
            return self._take(
                snapshot.makes.waiting(target, client)
                for target, client in waiting
                if self._wants(target, client.state)
            )
        flows = self._next_flows()
        if flows:
            return self._take(
                snapshot.makes.flow(flow)
                for flow in flows
                if self._wants(snapshot.names.flow_target(flow), "flow")
            )
        if snapshot.missing and self._kept is not None:
            last, self._kept = self._kept, None
            return _reply(last, continues=True)
        self.finished = True
        if snapshot.missing:
            raise CallError(f"{PROXY}.Incomplete", missing=snapshot.missing)
        if self._kept is None:
            raise CallError(f"{PROXY}.NoSuchConnection")
        return _reply(self._kept)

    def _next_flows(self) -> "list[FlowInfo]":
        if self._datagrams is None:
            return []
        flows = self._datagrams.relay_part.rows(self._flow, ROWS_MAX)
        self._flow = flows[-1].flow if flows else self._flow
        return [flow for flow in flows if flow.flow <= self._snapshot.last_id]

    def _wants(self, target: str, state: str) -> bool:
        if self._state not in (None, state):
            return False
        return self._target is None or self._snapshot.names.quoted(target) == self._target

    def _take(self, rows: "Iterable[Row]") -> bytes:
        """Return all rows but the last, after the one kept before."""
        messages = []
        for row in rows:
            if self._kept is not None:
                messages.append(_reply(self._kept, continues=True))
            self._kept = row
        return b"".join(messages)

    def close(self) -> None:
        """Release the snapshot."""
        super().close()
        self._snapshots.release(self._snapshot)


def _reply(row: Row, *, continues: bool = False) -> bytes:
    return message(f'{{"connection":{row}}}', continues=continues)
