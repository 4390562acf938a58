"""One client's way to a target with several addresses: the connects, staggered (RFC 8305)."""

import errno
from _collections_abc import Callable

from proxyd._relay import connected
from proxyd.loop import Loop

STAGGER_MS = 250
"""Connection Attempt Delay, RFC 8305 section 5."""

RETRYABLE = frozenset(
    (
        errno.ECONNREFUSED,
        errno.ENOENT,
        errno.EAGAIN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
        errno.EADDRNOTAVAIL,
        errno.ELOOP,  # it met itself: nobody listens there
        errno.EMFILE,  # and these are ours, not the target's: they pass as well
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
    )
)
"""Errors of connect(2) after which the target may be there later."""


class Race:
    """Connects to one address after the other until one answers.

    The next begins when the last has failed, or after STAGGER_MS; the first that is connected
    wins, the others are closed. `ended` tells of either end: `fd` is then the winner, the
    caller's to adopt, or -1, and `error` says why.
    """

    __slots__ = (
        "_ahead",
        "_attempts",
        "_ended",
        "_loop",
        "address",
        "error",
        "fd",
        "next_ms",
    )

    def __init__(self, loop: Loop, addresses: list[bytes], ended: Callable[[], None]) -> None:
        self._loop = loop
        self._ahead = addresses[::-1]
        self._attempts: dict[int, bytes] = {}
        self._ended = ended
        self.fd = -1
        self.address = b""
        """The winner's."""
        self.error = 0
        self.next_ms: int | None = None
        """When to call step(), None if it need not be called."""

    def start(self, now_ms: int) -> bool:
        """Begin; True if the race is over already, and `ended` is not called then."""
        self.next_ms = None
        while self._ahead:
            before = len(self._attempts)
            if self._attempt(self._ahead.pop()):
                self._stop()
                return True
            if len(self._attempts) > before:  # under way; one that failed at once takes no time
                self.next_ms = now_ms + STAGGER_MS if self._ahead else None
                return False
        return not self._attempts

    def step(self, now_ms: int) -> None:
        """Begin the next attempt, its time has come."""
        if self.start(now_ms):
            self._ended()

    def cancel(self) -> None:
        """Close whatever is under way."""
        self._stop()
        if self.fd >= 0:
            self._loop.relay.hang_up(self.fd)
            self.fd = -1

    def _attempt(self, address: bytes) -> bool:
        """Connect to one address; True if it is there at once."""
        try:
            fd = self._loop.relay.dial(address)
        except OSError as failure:
            self._note(failure.errno or errno.EIO)
            return False
        self._attempts[fd] = address
        self._loop.handlers[fd] = lambda _events: self._answered(fd)
        return self._look(fd)

    def _answered(self, fd: int) -> None:
        if self._look(fd):
            self._stop()
            self._ended()
        elif fd not in self._attempts and self.start(self._loop.relay.now_ms):
            self._ended()

    def _look(self, fd: int) -> bool:
        """True if `fd` is connected; a failed one is closed."""
        error = connected(fd)
        if error == errno.EINPROGRESS:
            return False
        # A target that accepted and has reset since was reached: the client shall see it.
        if error in (0, errno.ECONNRESET, errno.EPIPE):
            self.address = self._attempts.pop(fd)
            self.fd = fd
            self.error = error
            del self._loop.handlers[fd]
            return True
        self._note(error)
        self._close(fd)
        return False

    def _note(self, error: int) -> None:
        """Keep the error that promises most: one after which a later try may succeed."""
        if self.error not in RETRYABLE:
            self.error = error

    def _close(self, fd: int) -> None:
        del self._attempts[fd]
        del self._loop.handlers[fd]
        self._loop.relay.hang_up(fd)

    def _stop(self) -> None:
        self.next_ms = None
        self._ahead = []
        for fd in list(self._attempts):
            self._close(fd)
