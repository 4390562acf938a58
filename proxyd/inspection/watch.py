"""Watch: connections that begin and end. Nothing is told, or paid, without a watcher."""

from proxyd.event_loop import EventLoop
from proxyd.inspection.caller import Stream
from proxyd.inspection.rows import Row, RowMaker
from proxyd.inspection.varlink import message

TYPE_CHECKING = False  # as in typing
if TYPE_CHECKING:
    from collections.abc import Callable

    from proxyd._datagram import FlowInfo
    from proxyd._relay import ConnectionInfo, Ended, Relay
    from proxyd.datagrams import DatagramPolicy
    from proxyd.header_reader import Sender
    from proxyd.held import HeldClient

UNREAD_MAX = 256 * 1024
"""A watcher for which more bytes than this wait is dropped."""


class Watchers:
    """Tells watchers what begins and ends, and the relay whether there are any."""

    __slots__ = ("_datagrams", "_loop", "_make_rows", "_relay", "_streams")

    def __init__(
        self,
        loop: EventLoop,
        relay: "Relay",
        make_rows: "Callable[[], RowMaker]",
        datagrams: "DatagramPolicy | None" = None,
    ) -> None:
        self._loop = loop
        self._relay = relay
        self._make_rows = make_rows
        self._datagrams = datagrams
        if datagrams is not None:
            datagrams.on_flow = self._flow
        self._streams: list[WatchStream] = []

    def add(self) -> "WatchStream":
        """Add a watcher."""
        stream = WatchStream(self._remove)
        self._streams.append(stream)
        self._relay.report_begins = self._relay.report_ends = True
        self._loop.on_held = self._waiting
        if self._datagrams is not None:
            self._datagrams.report(wanted=True)
        return stream

    def _remove(self, stream: "WatchStream") -> None:
        self._streams.remove(stream)
        if not self._streams:
            self._relay.report_begins = False
            self._relay.report_ends = self._loop.labelled
            self._loop.on_held = None
            if self._datagrams is not None:
                self._datagrams.report(wanted=False)

    def begun(self, info: "ConnectionInfo") -> None:
        """Tell that a connection has begun, whose client was not held before."""
        if self._streams:  # the last one may have left in this turn
            self._tell("begin", self._make_rows().connection(info), "")

    def ended(self, event: "Ended") -> None:
        """Tell that a connection has ended."""
        info = event.info
        if info is not None and self._streams:
            self._tell("end", self._make_rows().connection(info), event.ending)

    def _flow(self, info: "FlowInfo", how: str | None) -> None:
        """Tell that a flow has begun, or, with how, that it has ended."""
        if self._streams:
            self._tell("begin" if how is None else "end", self._make_rows().flow(info), how or "")

    def _waiting(self, target: str, client: "HeldClient | Sender", how: str) -> None:
        """Tell that a client waits from its accept on, or how one that has waited ends."""
        row = self._make_rows().waiting(target, client)
        self._tell("end" if how else "begin", row, how)

    def _tell(self, event: str, row: Row, how: str) -> None:
        ending = f',"how":"{how}"' if how else ""
        told = message(f'{{"event":"{event}","connection":{row}{ending}}}', continues=True)
        for stream in self._streams:
            stream.push(told)


class WatchStream(Stream):
    """The replies to Watch; they end with the connection of the caller."""

    __slots__ = ("_messages", "_on_close", "_size", "_wake")

    def __init__(self, on_close: "Callable[[WatchStream], None]") -> None:
        super().__init__()
        self._on_close = on_close
        self._messages: list[bytes] = []
        self._size = 0
        self._wake: Callable[[], None] = _nothing

    def push(self, message: bytes) -> None:
        """Add a message; too many of them are noticed by next()."""
        if self._size <= UNREAD_MAX:
            self._messages.append(message)
            self._size += len(message)
        self._wake()

    def on_more(self, wake: "Callable[[], None]") -> None:
        """Call `wake` when there is a message."""
        self._wake = wake

    @property
    def overflows(self) -> bool:
        """Tell whether the caller reads too slowly."""
        return self._size > UNREAD_MAX

    def next(self) -> bytes | None:
        """Return all messages; None if there are none."""
        data = b"".join(self._messages)
        self._messages.clear()
        self._size = 0
        return data or None

    def close(self) -> None:
        """Stop watching."""
        self._on_close(self)


def _nothing() -> None:
    """Stand in for `wake` before the stream has a caller."""
