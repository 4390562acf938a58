"""Terminate: the worker that has a connection resets it, and answers."""

from proxyd.inspection.caller import Stream
from proxyd.inspection.interfaces import PROXY
from proxyd.inspection.varlink import CallError, reply

TYPE_CHECKING = False  # as in typing
if TYPE_CHECKING:
    from collections.abc import Callable

    from proxyd._relay import Relay, Terminated


class Terminations:
    """The calls of Terminate that wait for the relay's answer."""

    __slots__ = ("_relay", "_streams")

    def __init__(self, relay: "Relay") -> None:
        self._relay = relay
        self._streams: list[TerminateStream] = []

    def begin(self, connection: int) -> "TerminateStream":
        """Have a connection terminated."""
        stream = TerminateStream(connection, self._streams.remove)
        self._streams.append(stream)
        self._relay.terminate(connection)
        return stream

    def answer(self, event: "Terminated") -> None:
        """Take an answer of the relay: it is for the oldest call with this id."""
        for stream in self._streams:
            if stream.connection == event.connection and stream.found is None:
                stream.answer(found=event.found)
                return


class TerminateStream(Stream):
    """The reply to Terminate."""

    __slots__ = ("_on_close", "_wake", "connection", "found")

    def __init__(self, connection: int, on_close: "Callable[[TerminateStream], None]") -> None:
        super().__init__()
        self.connection = connection
        self.found: bool | None = None
        """The answer, once there is one."""
        self._on_close = on_close
        self._wake: Callable[[], None] | None = None

    def answer(self, *, found: bool) -> None:
        """Record whether there was such a connection."""
        self.found = found
        if self._wake is not None:
            self._wake()

    def on_more(self, wake: "Callable[[], None]") -> None:
        """Call `wake` when there is an answer."""
        self._wake = wake

    def next(self) -> bytes | None:
        """Return the reply, once there is one. Raises CallError."""
        if self.found is None:
            return None
        self.finished = True
        if not self.found:
            raise CallError(f"{PROXY}.NoSuchConnection")
        return reply({})

    def close(self) -> None:
        """Forget the call."""
        self._on_close(self)
