"""The relay's event loop, as the policy uses it: fds, and what to call when they are ready."""

from _collections_abc import Callable

from proxyd import log
from proxyd._relay import Ready, Relay

TYPE_CHECKING = False  # as typing has it
if TYPE_CHECKING:
    from proxyd._relay import Event
    from proxyd.race import Race

EPOLLIN = 1
EPOLLET = 1 << 31

Handler = Callable[[int], object]
"""Called with the epoll events that have come."""


class Loop:
    """A relay, the handlers of the fds it watches for us, and what the log calls connections."""

    __slots__ = ("handlers", "heard", "notes", "races", "relay")

    def __init__(self, buffer_size: int = 0) -> None:
        """`buffer_size`: bytes that may be on their way in each direction; 0: as measured."""
        self.relay = Relay(buffer_size, buffer_size) if buffer_size else Relay()
        self.heard = True
        """Whether the last run() has brought any event."""
        self.handlers: dict[int, Handler] = {}
        self.notes: dict[int, str] | None = {} if log.enabled(log.DEBUG) else None
        """Connection id → who it is. None unless the log is at debug level."""
        self.races: list[Race] = []
        """Of all targets: their connects share a number of fds."""
        self.relay.report_ends = self.notes is not None

    def watch(self, fd: int, handler: Handler, events: int = EPOLLIN) -> None:
        """Call `handler` when `fd`, which stays the caller's, is ready. Raises OSError."""
        self.relay.watch(fd, events)
        self.handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """Forget `fd`, before it is closed; nothing happens where it is not watched."""
        self.relay.unwatch(fd)
        self.handlers.pop(fd, None)

    def run(self, timeout_ms: int) -> "list[Event]":
        """Forward until something happens or `timeout_ms` have passed; the events left over."""
        rest: list[Event] = []
        events = self.relay.run(timeout_ms)
        self.heard = bool(events)
        for event in events:
            if not isinstance(event, Ready):
                rest.append(event)
                continue
            handler = self.handlers.get(event.fd)
            if handler is not None:  # an earlier event of the batch may have removed it
                handler(event.events)
        return rest
