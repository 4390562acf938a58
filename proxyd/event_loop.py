"""The relay's event loop, as the policy uses it: handlers for fds, and labels for connections."""

from proxyd import log
from proxyd._relay import Ready, Relay
from proxyd.limits import AttemptBudget

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

    from proxyd._relay import (
        Accepted,
        AcceptFailed,
        Begun,
        ConnectFailed,
        DatagramsChanged,
        Ended,
        Event,
        NotKept,
        Old,
        Refused,
        SnapshotRows,
        Terminated,
        WorkersWanted,
    )

    Handler = Callable[[int], object]
    """Called with the epoll events of its fd."""

    InspectionEvent = Ended | Begun | SnapshotRows | Terminated
    PolicyEvent = (
        Accepted
        | AcceptFailed
        | Refused
        | ConnectFailed
        | DatagramsChanged
        | WorkersWanted
        | Old
        | NotKept
        | InspectionEvent
    )

EPOLLIN = 1
EPOLLET = 1 << 31


class EventLoop:
    """A relay, and the handlers of the fds that it watches for the policy."""

    __slots__ = (
        "_handlers",
        "_labels",
        "_quiet",
        "budget",
        "had_events",
        "on_held",
        "relay",
    )

    def __init__(self, buffer_size: int = 0) -> None:
        """`buffer_size`: bytes under way in each direction; 0: the relay's default."""
        self.relay = Relay(buffer_size, buffer_size) if buffer_size else Relay()
        self.budget = AttemptBudget()
        """For the sockets that dial() makes."""
        self.had_events = True
        """Whether the last run() has returned or handled any event that is not of a quiet fd."""
        self.on_held: Callable[..., None] | None = None
        """Called with the target's text and a HeldClient or Sender that waits for the first time
        (""), or that ends without a connection (how). None: nothing wants to know."""
        self._handlers: dict[int, Handler] = {}
        self._quiet: set[int] = set()
        """Fds whose events put off no idle exit."""
        self._labels: dict[int, str] | None = {} if log.enabled(log.DEBUG) else None
        """Connection id → its name in the log. None unless the log is at debug level."""
        self.relay.report_ends = self._labels is not None

    def run(self, timeout_ms: int) -> "list[PolicyEvent]":
        """Forward until something happens or `timeout_ms` have passed.

        Calls the handlers of fds that are ready, and returns the other events, for the policy.
        """
        return self._dispatch(self.relay.run(timeout_ms))

    def freeze(self) -> "list[PolicyEvent]":
        """Let all connections rest; return the last events, as run() does. Raises OSError."""
        return self._dispatch(self.relay.freeze())

    def _dispatch(self, events: "list[Event]") -> "list[PolicyEvent]":
        others: list[PolicyEvent] = []
        self.had_events = False
        for event in events:
            if not isinstance(event, Ready):
                self.had_events = True
                others.append(event)
                continue
            self.had_events = self.had_events or event.fd not in self._quiet
            handler = self._handlers.get(event.fd)
            if handler is not None:  # an earlier event of the batch may have removed it
                handler(event.events)
        return others

    # ── fds ───────────────────────────────────────────────────────────────────────────────────────

    def watch(
        self, fd: int, handler: "Handler", events: int = EPOLLIN, *, quiet: bool = False
    ) -> None:
        """Call `handler` when `fd` is ready. The fd stays the caller's. Raises OSError.

        `quiet`: an idle exit does not wait for it.
        """
        self.relay.watch(fd, events)
        self._handlers[fd] = handler
        if quiet:
            self._quiet.add(fd)

    def unwatch(self, fd: int) -> None:
        """Stop watching `fd`; to be called before it is closed. No effect if it is not watched."""
        self.relay.unwatch(fd)
        self.forget(fd)

    def dial(
        self, address: bytes, handler: "Callable[[int, int], object]", client: bytes = b""
    ) -> int:
        """Start to connect a socket, for this client; return its fd, which the caller owns.

        `handler` is called with the fd and its events. Raises OSError if the connect fails at once.
        """
        fd = self.relay.dial(address, client)
        self._handlers[fd] = lambda events: handler(fd, events)
        return fd

    def forget(self, fd: int) -> None:
        """Drop the handler of a dialled socket; the relay watches it until adopt() or hang_up()."""
        self._handlers.pop(fd, None)
        self._quiet.discard(fd)

    def hang_up(self, fd: int, *, reset: bool = False) -> None:
        """Close a client or a dialled socket, watched or not. Never waits."""
        self.forget(fd)
        self.relay.hang_up(fd, reset)

    # ── labels ────────────────────────────────────────────────────────────────────────────────────

    @property
    def labelled(self) -> bool:
        """Tell whether the log wants to know each connection by name."""
        return self._labels is not None

    def set_label(self, connection: int, label: str) -> None:
        """Name a connection for the log, if it wants to know."""
        if self._labels is not None:
            self._labels[connection] = label

    def labels(self) -> "list[tuple[int, str]]":
        """Return (connection id, label) of all that have one."""
        return list((self._labels or {}).items())

    def pop_label(self, connection: int) -> str:
        """Return the label of a connection that has ended, "" without one."""
        return self._labels.pop(connection, "") if self._labels is not None else ""
