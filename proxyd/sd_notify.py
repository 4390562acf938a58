"""Notifications to the service manager, sd_notify(3), and its watchdog, sd_watchdog_enabled(3)."""

import _socket
import errno
import posix
import sys
import time

from proxyd import address as sockaddr
from proxyd import log
from proxyd._relay import Relay
from proxyd.errors import reason

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

STATUS_MS = 2000
"""Minimum interval between two STATUS= messages, which are sent only if they say something new."""

EXTEND_EVERY_MS = 10_000
EXTEND_BY_USEC = 30_000_000
"""While connections drain, the stop timeout is extended by this much, this often."""

RETRY_MS = 10
"""Pause before a failed message is sent again; it doubles …"""

RETRY_MS_MAX = 1000
"""… up to this while the queue of NOTIFY_SOCKET is full …"""

RETRY_GONE_MS_MAX = 10_000
"""… and up to this while no process reads from that socket."""

_TEMPORARY = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EINTR)
"""Errors that mean that the service manager, or this machine, is busy."""

_ORDER = ("REMOVE", "STORE", "RELOADING", "READY", "STOPPING", "WATCHDOG", "EXTEND", "STATUS")
"""There may be room for one descriptor only. READY=1 precedes STOPPING=1 even if both are late; the
watchdog precedes what can wait."""


class Notifier:
    """Keeps the service manager informed. `status` returns the text of STATUS=.

    Messages are kept until they are sent, one of each kind, in the order of `_ORDER`.
    """

    def __init__(self, sock: "NotifySocket", status: "Callable[[], str]", relay: Relay) -> None:
        self._sock = sock
        self._relay = relay
        self._status = status
        self._sent_status = ""
        """The last STATUS= that was sent."""
        self._removals: set[str] = set()
        """Names of what the service manager is to drop."""
        self._due: dict[str, Callable[[], bool]] = {}
        """Kind → what sends it."""
        self._pause_ms = RETRY_MS
        self._retry_ms: int | None = None
        """When to send again what could not be sent."""
        self._status_ms: int | None = None
        self._extend_ms: int | None = None
        # Half the interval, sd_watchdog_enabled(3).
        self._watchdog_every_ms = max(sock.watchdog_usec // 2000, 1)
        self._watchdog_ms: int | None = None
        self._alive_ms = relay.now_ms
        """When WATCHDOG=1 was last sent."""
        if sock.watchdog_usec:
            self._watchdog_ms = relay.now_ms + self._watchdog_every_ms
            relay.ping_workers()

    def ready(self) -> None:
        """Report that every listener accepts."""
        if self.enabled:
            self._sent_status = self._status()
            text = f"READY=1\nSTATUS={self._sent_status}"
            self._send("READY", lambda: self._sock.send(text), self._relay.now_ms)

    def reloading(self) -> None:
        """Report that the program reloads, for Type=notify-reload; ready() is to follow."""
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        text = f"RELOADING=1\nMONOTONIC_USEC={usec}"
        self._send("RELOADING", lambda: self._sock.send(text), self._relay.now_ms)

    def remove_stored(self, name: str) -> None:
        """Have the service manager drop what is stored under this name."""
        self._removals.add(name)
        self._send("REMOVE", self._remove, self._relay.now_ms)

    def _remove(self) -> bool:
        while self._removals:
            (name, *_) = self._removals
            if not self._sock.send(f"FDSTOREREMOVE=1\nFDNAME={name}"):
                return False
            self._removals.remove(name)
        return True

    @property
    def removes(self) -> bool:
        """Tell whether the service manager has yet to be told what to drop."""
        return "REMOVE" in self._due

    def store(self, send: "Callable[[], bool]") -> None:
        """Have `send` called after all removals, until it returns that it has sent all."""
        self._send("STORE", send, self._relay.now_ms)

    def forget_store(self) -> None:
        """Do not call it any more."""
        self._due.pop("STORE", None)

    def send_fd(self, text: str, fd: int) -> bool:
        """Send a message with a descriptor, which stays the caller's; tell whether it was sent.

        False: the service manager is busy. Raises OSError if it cannot be sent at all.
        """
        if self._sock.send(text, fd):
            return True
        if self._sock.error not in _TEMPORARY:
            raise OSError(self._sock.error, posix.strerror(self._sock.error))
        return False

    def stopping(self, now_ms: int, waits: bool) -> None:
        """Report that no more clients are accepted; with `waits`, connections drain.

        Otherwise it is the last message, and the end does not wait until it is sent.
        """
        self._send("STOPPING", self._sock.stopping, now_ms)
        self._extend_ms = now_ms if waits and self.enabled else None

    def close(self) -> None:
        """Send nothing more."""
        self._sock.close()

    def next_ms(self) -> int | None:
        """Return when tick() is to be called at the latest."""
        times = (self._status_ms, self._extend_ms, self._watchdog_ms, self._retry_ms)
        return min((time for time in times if time is not None), default=None)

    def tick(self, now_ms: int, busy: bool) -> None:
        """Send what is due. `busy`: there are connections, so the status changes."""
        if self._watchdog_ms is not None and now_ms >= self._watchdog_ms:
            self._feed_watchdog(now_ms)
        if self._extend_ms is not None and now_ms >= self._extend_ms:
            self._extend_ms = now_ms + EXTEND_EVERY_MS
            self._send("EXTEND", lambda: self._sock.extend(EXTEND_BY_USEC), now_ms)
        if self._status_ms is None:
            self._status_ms = now_ms + STATUS_MS if busy and self.enabled else None
        elif now_ms >= self._status_ms:
            self._status_ms = now_ms + STATUS_MS if busy else None
            text = self._status()
            if text != self._sent_status:
                self._sent_status = text
                self._send("STATUS", lambda: self._sock.status(text), now_ms)
        if self._retry_ms is not None and now_ms >= self._retry_ms:
            self._flush(now_ms)

    @property
    def has_certain_store(self) -> bool:
        """Tell whether the service manager has said that there is one."""
        return self.has_store and self._sock.store_max != ""

    @property
    def has_store(self) -> bool:
        """Tell whether there may be a descriptor store."""
        return self.enabled and self._sock.store_max != "0"

    @property
    def enabled(self) -> bool:
        """Tell whether there is a service manager; if so, tick() is for the first client, too."""
        return self._sock.enabled

    def _feed_watchdog(self, now_ms: int) -> None:
        """Send WATCHDOG=1 if every thread has answered; otherwise look again soon."""
        if not self._relay.workers_answered:
            self._watchdog_ms = now_ms + -(-self._watchdog_every_ms // 8)
            self._due.pop("WATCHDOG", None)  # no longer true
            self._warn_if_late(now_ms, "a thread does not answer")
            return
        self._watchdog_ms = now_ms + self._watchdog_every_ms
        self._relay.ping_workers()
        self._send("WATCHDOG", self._sock.watchdog, now_ms)

    def _send(self, kind: str, send: "Callable[[], bool]", now_ms: int) -> None:
        """Send a message now, or as soon as the service manager takes it."""
        if self.enabled:
            self._due[kind] = send
            self._flush(now_ms)

    def _flush(self, now_ms: int) -> None:
        """Send what is due, the most urgent first, until a message cannot be sent."""
        for kind in _ORDER:
            if kind not in self._due:
                continue
            if not self._due[kind]():
                self._retry_later(now_ms)
                return
            del self._due[kind]
            if kind == "WATCHDOG":
                self._alive_ms = now_ms
        self._retry_ms = None
        self._pause_ms = RETRY_MS

    def _retry_later(self, now_ms: int) -> None:
        """Wait before the next attempt, longer each time."""
        error = self._sock.error
        pause_ms_max = RETRY_MS_MAX if error in _TEMPORARY else RETRY_GONE_MS_MAX
        if self._watchdog_ms is not None:
            pause_ms_max = min(pause_ms_max, -(-self._watchdog_every_ms // 8))
        self._retry_ms = now_ms + min(self._pause_ms, pause_ms_max)
        self._pause_ms = min(self._pause_ms * 2, pause_ms_max)
        if "WATCHDOG" in self._due:
            full = error == errno.EAGAIN
            why = "the queue of NOTIFY_SOCKET is full" if full else posix.strerror(error)
            self._warn_if_late(now_ms, why)

    def _warn_if_late(self, now_ms: int, why: str) -> None:
        """Log that the service manager has waited longer than WatchdogSec=, and why."""
        late_ms = now_ms - self._alive_ms - self._sock.watchdog_usec // 1000
        if late_ms >= 0:
            log.limited("watchdog", f"WATCHDOG=1 is {late_ms} ms late: {why}.")


class NotifySocket:
    """Sends messages to NOTIFY_SOCKET, if it is set. Owns a datagram socket.

    Nothing here blocks or raises. A message that cannot be sent is the caller's to send again; the
    reason is logged once, until a message is sent.
    """

    __slots__ = ("_address", "_sock", "_warned", "error", "store_max", "watchdog_usec")

    def __init__(self, environ: "Mapping[str, str]") -> None:
        self._warned = False
        self._address = b""
        # Both came with systemd 254.
        self.store_max = environ.get("FDSTORE", "0" if "MEMORY_PRESSURE_WATCH" in environ else "")
        """How many descriptors may be stored; "" if that is not known, before systemd 254."""
        self.error = 0
        """The errno of the last send(), 0 if it succeeded."""
        where = environ.get("NOTIFY_SOCKET")
        self._sock = self._open(where) if where else None
        self.watchdog_usec = _watchdog_usec(environ) if self._sock is not None else 0
        """Maximum interval between two calls of watchdog(), in microseconds; 0: no watchdog."""

    def _open(self, where: str) -> _socket.socket | None:
        """Create the socket, and keep the address to send to; None, with a warning, on failure."""
        if not where.startswith(("/", "@")):  # vsock: and vsock-*: are for virtual machines
            self._warn(f"Ignoring NOTIFY_SOCKET={where}: only UNIX sockets are supported.")
            return None
        try:
            self._address = sockaddr.unix_name(sockaddr.pack_unix(where))
            return _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
        except (OSError, ValueError) as error:
            self._warn(f"Ignoring NOTIFY_SOCKET={where}: {reason(error)}")
            return None

    @property
    def enabled(self) -> bool:
        """Tell whether messages go anywhere, for callers to whom building one has a cost."""
        return self._sock is not None

    def status(self, text: str) -> bool:
        """Send what the program is doing, one line for people."""
        return self.send("STATUS=" + text.replace("\n", " "))

    def stopping(self) -> bool:
        """Send that the program is about to end."""
        return self.send("STOPPING=1")

    def watchdog(self) -> bool:
        """Send that the main loop is alive."""
        return self.send("WATCHDOG=1")

    def extend(self, usec: int) -> bool:
        """Ask for `usec` more microseconds, from now on, before a timeout ends the program."""
        return self.send(f"EXTEND_TIMEOUT_USEC={usec}")

    def send(self, text: str, fd: int = -1) -> bool:
        """Send newline-separated assignments, perhaps with a descriptor; tell whether they were."""
        if self._sock is None:
            return False
        data = text.encode("utf-8", "backslashreplace")
        flags = _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL
        packed = fd.to_bytes(4, sys.byteorder, signed=True)
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if fd >= 0 else []
        try:
            self._sock.sendmsg([data], rights, flags, self._address)
        except OSError as error:
            self.error = error.errno or errno.EIO
            if self.error not in _TEMPORARY:
                self._warn(f"Failed to send to NOTIFY_SOCKET: {reason(error)}")
            return False
        self.error = 0
        self._warned = False
        return True

    def close(self) -> None:
        """Close the socket; nothing is sent any more."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(text)


def _watchdog_usec(environ: "Mapping[str, str]") -> int:
    """Return WATCHDOG_USEC if it is meant for this process, else 0; garbage costs a warning."""
    try:
        interval = _number(environ, "WATCHDOG_USEC")
        if interval == 0:
            return 0
        return interval if _number(environ, "WATCHDOG_PID") in (0, posix.getpid()) else 0
    except ValueError as error:
        log.warning(str(error))
        return 0


def _number(environ: "Mapping[str, str]", name: str) -> int:
    """Read a positive number of 64 bits; 0 if the variable is not set. Raises ValueError."""
    text = environ.get(name)
    if text is None:
        return 0
    try:
        return sockaddr.parse_number(text, 1, 2**64 - 2, "positive number")
    except ValueError as error:
        raise ValueError(f"Ignoring {name}={text}: {error}.") from None
