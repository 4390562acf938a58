"""Messages to the service manager, sd_notify(3), and its watchdog, sd_watchdog_enabled(3)."""

import _socket
import errno
import os
from _collections_abc import Mapping

from proxyd import address as sockaddr
from proxyd import log
from proxyd.errors import reason

PASSING = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EINTR)
"""Errors of a service manager that is busy, or of a machine that is."""


class Notifier:
    """Sends messages to NOTIFY_SOCKET, if there is one. Owns a datagram socket.

    Nothing here blocks or raises. A message that does not go out is the caller's to send again; why
    it did not is logged, once until another one does.
    """

    __slots__ = ("_complained", "_sock", "_to", "error", "watchdog_usec")

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._complained = False
        self._to = b""
        self.error = 0
        """The errno of the last send(), 0 if it went out."""
        where = environ.get("NOTIFY_SOCKET")
        self._sock = self._open(where) if where else None
        self.watchdog_usec = _watchdog_usec(environ) if self._sock is not None else 0
        """Interval in which watchdog() must be called at least once, in microseconds; 0 = off."""

    @property
    def enabled(self) -> bool:
        """Tell whether anybody wants messages, for callers that would build one at a cost."""
        return self._sock is not None

    def send(self, text: str) -> bool:
        """Send newline-separated assignments; tell whether they went out."""
        if self._sock is None:
            return False
        data = text.encode("utf-8", "backslashreplace")
        try:
            self._sock.sendto(data, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL, self._to)
        except OSError as error:
            self.error = error.errno or errno.EIO
            if self.error not in PASSING:
                self._complain(f"Failed to send to NOTIFY_SOCKET: {reason(error)}")
            return False
        self.error = 0
        self._complained = False
        return True

    def ready(self) -> bool:
        """Tell that every listener is armed."""
        return self.send("READY=1")

    def status(self, text: str) -> bool:
        """Tell what we are doing, one line for people."""
        return self.send("STATUS=" + text.replace("\n", " "))

    def stopping(self) -> bool:
        """Tell that we are on the way out."""
        return self.send("STOPPING=1")

    def watchdog(self) -> bool:
        """Tell that the main loop is alive."""
        return self.send("WATCHDOG=1")

    def extend(self, usec: int) -> bool:
        """Ask for `usec` more microseconds, counted from now, before a timeout strikes."""
        return self.send(f"EXTEND_TIMEOUT_USEC={usec}")

    def close(self) -> None:
        """Close the socket; what is sent from now on is lost."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _open(self, where: str) -> _socket.socket | None:
        """Make the socket and remember where to send to; None, with a warning, if we cannot."""
        if not where.startswith(("/", "@")):  # vsock: and vsock-*: are for virtual machines
            self._complain(f"Ignoring NOTIFY_SOCKET={where}: only UNIX sockets are supported.")
            return None
        try:
            self._to = sockaddr.unix_name(sockaddr.pack_unix(where))
            return _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
        except (OSError, ValueError) as error:
            self._complain(f"Ignoring NOTIFY_SOCKET={where}: {reason(error)}")
            return None

    def _complain(self, text: str) -> None:
        if not self._complained:
            self._complained = True
            log.warning(text)


def _watchdog_usec(environ: Mapping[str, str]) -> int:
    """Return WATCHDOG_USEC if it is meant for us, else 0; garbage is a warning and 0."""
    try:
        interval = _number(environ, "WATCHDOG_USEC")
        if interval == 0:
            return 0
        return interval if _number(environ, "WATCHDOG_PID") in (0, os.getpid()) else 0
    except ValueError as error:
        log.warning(str(error))
        return 0


def _number(environ: Mapping[str, str], name: str) -> int:
    """Read a positive number of 64 bits; 0 if the variable is not there. Raises ValueError."""
    text = environ.get(name)
    if text is None:
        return 0
    try:
        return sockaddr.parse_number(text, 1, 2**64 - 2, "positive number")
    except ValueError as error:
        raise ValueError(f"Ignoring {name}={text}: {error}.") from None
