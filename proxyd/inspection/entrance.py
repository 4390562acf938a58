"""The inspection socket, until somebody calls: it is bound, and watched."""

import errno
import posix

from proxyd import address as sockaddr
from proxyd import log
from proxyd.errors import UsageError, reason
from proxyd.event_loop import EventLoop
from proxyd.limits import fit_callers
from proxyd.listen import Listener, close_listener

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

    from proxyd.event_loop import InspectionEvent
    from proxyd.inspection.service import Service

MODE = 0o666
"""Of the socket file: what a caller may do depends on the method."""

NAME = "inspect"

PAUSE_MS = 1000
"""How long no caller is accepted after that has failed."""

_ACCEPTS_MAX = 4
"""How many callers are accepted in one turn: the relay waits meanwhile."""

_PARTS = (
    "collections",
    "enum",
    "functools",
    "re",
    "json",
    "proxyd.inspection.callers",
    "proxyd.inspection.metrics",
    "proxyd.inspection.listing",
    "proxyd.inspection.service",
)
"""What is imported for the first caller, one of them in a turn: all at once takes 15 ms."""


def check_inherited(name: str, listeners: list[Listener]) -> Listener:
    """Return the inherited socket `name`, if it can be the inspection socket. Raises UsageError."""
    found = [one for one in listeners if one.name == name]
    if len(found) != 1:
        count = "no" if not found else "more than one"
        raise UsageError(f"There is {count} inherited socket with the name '{name}' of --inspect=.")
    (entrance,) = found
    if entrance.family != sockaddr.AF_UNIX or entrance.connected or entrance.datagram:
        raise UsageError(
            f"The socket '{name}' ({entrance.text}) of --inspect= is not a listening UNIX socket."
        )
    return entrance


def open_at(path: str) -> Listener:
    """Open the socket where --inspect= wants it. Raises UsageError."""
    try:
        return _open(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"Failed to open the inspection socket {path}: {reason(error)}") from None


def open_by_default(folder: str) -> Listener | None:
    """Open the socket in a folder of $RUNTIME_DIRECTORY; on failure, None and a warning."""
    path = f"{folder}/{NAME}"
    try:
        return _open(path)
    except (OSError, ValueError, ImportError) as error:
        log.warning(f"No inspection socket: failed to open {path}: {reason(error)}")
        return None


def _open(path: str) -> Listener:
    """Bind and listen. The umask does not restrict who may call. Raises OSError, ValueError."""
    from proxyd.bind import ListenAddress, open_listener

    entrance = open_listener(ListenAddress(NAME, sockaddr.pack_unix(path), path, False))
    try:
        posix.chmod(path, MODE)
    except OSError:
        close_listener(entrance)
        raise
    return entrance


class Entrance:
    """Accepts the callers, and makes the service with the first of them."""

    __slots__ = (
        "_fd",
        "_listener",
        "_loop",
        "_make",
        "_parts",
        "_paused_ms",
        "_resting",
        "_service",
    )

    def __init__(
        self, loop: EventLoop, listener: Listener, make: "Callable[[int], Service]"
    ) -> None:
        """`make` returns the service for up to as many callers as it is told.

        The listener stays the caller's. Raises OSError.
        """
        self._loop = loop
        self._listener = listener
        self._make = make
        self._parts = list(_PARTS)
        """What is yet to be imported."""
        self._service: Service | None = None
        self._paused_ms: int | None = None
        """When to accept again."""
        self._resting = False
        """Whether the program is about to end, and looks for clients only."""
        self._watch()

    def _watch(self) -> None:
        self._loop.watch(self._listener.fd, lambda _events: self._accept(), quiet=True)

    def _accept(self) -> None:
        """Accept callers. Whatever fails harms no connection."""
        try:
            if self._parts:
                __import__(self._parts[0])
                del self._parts[0]
                return  # the caller is reported again
            service = self._load()
            posix.set_blocking(
                self._listener.fd, False
            )  # others may share it, and have cleared that
            for _ in range(_ACCEPTS_MAX):
                service.callers.add(_accept_one(self._listener.fd))
        except BlockingIOError:
            pass
        except (OSError, ImportError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno == errno.ECONNABORTED:
                return
            log.limited("inspect", f"Failed to serve the inspection socket: {reason(error)}.")
            self._loop.unwatch(self._listener.fd)
            self._paused_ms = self._loop.relay.now_ms + PAUSE_MS

    def _load(self) -> "Service":
        """Return the service; the first time, that makes it."""
        if self._service is None:
            self._service = self._make(fit_callers(self._loop.relay.connections_max))
        return self._service

    def handle(self, event: "InspectionEvent") -> None:
        """Pass on an event."""
        if self._service is None:
            return
        try:
            self._service.handle(event)
        except Exception as error:  # noqa: BLE001 - a fault in there must not end the forwarding
            self._service.callers.fail(error)

    def rest(self) -> None:
        """Serve no caller until resume()."""
        self._resting = True

    def resume(self) -> None:
        """Serve callers again: a client has come."""
        self._resting = False

    def step(self, now_ms: int) -> None:
        """Do what is due."""
        if self._paused_ms is not None and now_ms >= self._paused_ms:
            self._paused_ms = None
            try:
                self._watch()
            except OSError:
                self._paused_ms = now_ms + PAUSE_MS
        if self._service is not None and not self._resting:
            self._service.callers.step(now_ms)

    def next_ms(self, now_ms: int) -> int | None:
        """When to call step() at the latest; None: not before the next event."""
        served_ms = self._service.callers.next_ms(now_ms) if self._service is not None else None
        if self._paused_ms is None or served_ms is None:
            return served_ms if self._paused_ms is None else self._paused_ms
        return min(served_ms, self._paused_ms)

    def close(self) -> None:
        """Drop all callers."""
        if self._service is not None:
            self._service.callers.close_all()


def _accept_one(fd: int) -> int:
    """Accept a caller; return its fd, close-on-exec and non-blocking. Raises OSError."""
    import _socket

    sock = _socket.socket(sockaddr.AF_UNIX, _socket.SOCK_STREAM, 0, fileno=fd)
    try:
        accepted, _ = sock._accept()  # type: ignore[attr-defined]
    finally:
        sock.detach()
    try:
        posix.set_blocking(accepted, False)
    except OSError:
        pass  # each call on it says that it is not to wait
    return int(accepted)
