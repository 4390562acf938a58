"""Root: the queue that has all that a process needs to go on after the last one was killed.

Its receiving end is in the store of the service manager, in the queue of the socket that is stored:
what we have stored itself we could not keep a copy of and still see whether it was refused.

    S GENERATION            a generation begins: its slate, and root's own sending end
    P GENERATION NUMBER     a page: its receiving end, and its sending end
    C GENERATION ATTEMPTS   the generation is complete, and counts instead of all before it;
                            pages are added to it later
    A                       an attempt: a process is about to go on with the generation that counts
    L                       it has lasted, and so have all attempts before it

Nothing is taken out by looking, so a process may be killed at any time while it recovers, and the
next one finds the same. It also finds how many in a row have tried in vain: if what they went on
with is what kills them, somebody has to stop.
"""

import _socket
import errno
import posix

from proxyd import log
from proxyd._relay import raise_fd_limit
from proxyd.continuity import fd_queue
from proxyd.errors import reason

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Sequence

_DATA_MAX = 64
"""More than any message has, in bytes."""

_KINDS = {b"S": (2, 2), b"P": (3, 2), b"C": (3, 0), b"A": (1, 0), b"L": (1, 0)}
"""Kind of message → (words, descriptors)."""


class Generation:
    """What a generation has. Owns its descriptors."""

    __slots__ = ("lost", "number", "pages", "slate")

    def __init__(self, number: int, slate: int) -> None:
        self.number = number
        self.slate = slate
        """-1: it could not be received."""
        self.pages: list[int] = []
        """Their receiving ends."""
        self.lost = 0
        """Pages that could not be received."""

    def add(self, receiver: int, sender: int) -> None:
        """Add a page. Only the dead process has sent into it."""
        close_all([sender])
        if receiver < 0:
            self.lost += 1
        else:
            self.pages.append(receiver)

    def close(self) -> None:
        """Close everything."""
        close_all([self.slate, *self.pages])
        self.slate = -1
        self.pages = []


class _Generations:
    """Those that are found in root's queue: the last one that is complete, and the last one."""

    __slots__ = ("begun", "complete")

    def __init__(self) -> None:
        self.begun: Generation | None = None
        self.complete: Generation | None = None
        """It may be the same."""

    def begin(self, generation: Generation) -> None:
        """A generation begins. Takes ownership of it."""
        self.close_begun()
        self.begun = generation

    def complete_begun(self) -> None:
        """The generation that was begun last counts."""
        if self.complete is not None and self.complete is not self.begun:
            self.complete.close()
        self.complete = self.begun

    def fd_count(self) -> int:
        """Return how many descriptors both have."""
        both = {self.begun, self.complete}
        return sum(1 + len(one.pages) for one in both if one is not None)

    def close_begun(self) -> None:
        """Close the one that does not count."""
        if self.begun is not None and self.begun is not self.complete:
            self.begun.close()
        self.begun = None

    def close(self) -> None:
        """Close both."""
        self.close_begun()
        if self.complete is not None:
            self.complete.close()


class Root:
    """Both ends of root."""

    __slots__ = ("_before", "attempts", "generation", "receiver", "sender")

    def __init__(self, receiver: _socket.socket, sender: _socket.socket | None) -> None:
        self.receiver = receiver
        self.sender = sender
        """None before read() has found it."""
        self.attempts = 0
        """Processes in a row that went on with what is there, and have not lasted."""
        self.generation = 0
        """The last one that was begun."""
        self._before = 0
        """Messages before its beginning."""

    # ── what is there ─────────────────────────────────────────────────────────────────────────────

    def read(self) -> Generation | None:
        """Return the generation that counts, if there is one, and find the sending end.

        Raises OSError, and then all of it is closed but what is in the queue.
        """
        found = _Generations()
        try:
            fd_queue.look_from_start(self.receiver)
            self._before = self.attempts = 0
            while self._read_one(found):
                self._before += 1
        except OSError:
            found.close()
            raise
        found.close_begun()
        return found.complete

    def _read_one(self, found: _Generations) -> bool:
        """Look at a message; return False if there is no more. Raises OSError."""
        raise_fd_limit(found.fd_count() + fd_queue.OTHERS)
        data, fds = fd_queue.look(self.receiver, _DATA_MAX)
        kind, numbers, fds = _parse(data, fds)
        begun = found.begun
        if kind == b"S":
            slate, sender = fds
            found.begin(Generation(numbers[0], slate))
            self._use_sender(sender)
            self.generation = max(self.generation, numbers[0])
        elif kind == b"A":
            self.attempts += 1
        elif kind == b"L":
            self.attempts = 0
        elif begun is None or numbers[:1] != [begun.number]:
            close_all(fds)
        elif kind == b"P":
            begun.add(*fds)
        elif kind == b"C":
            found.complete_begun()
            self.attempts = numbers[1]
        return bool(data)

    def _use_sender(self, fd: int) -> None:
        """Send with this one from now on, unless there is one already. Raises OSError."""
        if self.sender is None and fd >= 0:
            self.sender = _queue(fd)
        else:
            close_all([fd])

    # ── what is added and taken out ───────────────────────────────────────────────────────────────

    def begin(self, slate: int) -> None:
        """Begin a generation, whose pages the relay sends. Raises OSError."""
        self.generation += 1
        self._send(b"S %d" % self.generation, [slate, self.sender_fd])

    def commit(self) -> None:
        """Have this generation count; take out what is before it. begin() has begun it.

        Raises OSError.
        """
        self._send(b"C %d %d" % (self.generation, self.attempts))
        fd_queue.drop(self.receiver, self._before)
        self._before = 0

    def empty(self) -> None:
        """Take everything out: no generation counts. Raises OSError."""
        fd_queue.drop(self.receiver)
        self._before = self.attempts = 0

    # ── attempts ──────────────────────────────────────────────────────────────────────────────────

    def attempt(self) -> None:
        """Note that this process is about to go on with what was read. Raises OSError."""
        self._send(b"A")
        self._before += 1
        self.attempts += 1

    def last(self) -> None:
        """Note that it has lasted. Raises OSError."""
        self._send(b"L")
        self.attempts = 0

    # ── both ends ─────────────────────────────────────────────────────────────────────────────────

    @property
    def sender_fd(self) -> int:
        """The sending end; -1: not known."""
        return -1 if self.sender is None else self.sender.fileno()

    def _send(self, data: bytes, fds: "Sequence[int]" = ()) -> None:
        if self.sender is None:
            raise OSError(errno.ENOTCONN, posix.strerror(errno.ENOTCONN))
        fd_queue.send(self.sender, [(data, fds)])

    def close(self) -> None:
        """Close our ends."""
        self.receiver.close()
        if self.sender is not None:
            self.sender.close()


def _parse(data: bytes, fds: list[int]) -> tuple[bytes, list[int], list[int]]:
    """Return (kind, numbers, descriptors) of a message; -1 for each descriptor that was lost.

    The kind is b"" if it is none of ours.
    """
    words = data.split()
    wanted = _KINDS.get(words[0] if words else b"")
    if wanted is None or len(words) != wanted[0] or len(fds) > wanted[1]:
        close_all(fds)
        return b"", [], []
    if not all(word.isdigit() for word in words[1:]):
        close_all(fds)
        return b"", [], []
    return words[0], [int(word) for word in words[1:]], [*fds, -1, -1][: wanted[1]]


def close_all(fds: list[int]) -> None:
    """Close descriptors; -1 is none."""
    for fd in fds:
        if fd >= 0:
            posix.close(fd)


# ── where it is found ─────────────────────────────────────────────────────────────────────────────


def make() -> Root:
    """Return a new one. Raises OSError."""
    sender, receiver = fd_queue.pair()
    return Root(receiver, sender)


def inherited(text: str, pid: int) -> Root | None:
    """Return the one whose receiving end "FD:PID" names, if it is for process `pid`."""
    fd, _, whose = text.partition(":")
    if not fd.isdigit() or whose != str(pid):
        return None
    try:
        posix.set_inheritable(int(fd), False)
        return Root(_queue(int(fd)), None)
    except OSError as error:
        log.warning(f"Cannot use what the last process has left: {reason(error)}")
        return None


def stored(fd: int) -> Root | None:
    """Return the one in the queue of a stored socket, which is closed.

    None, with a warning, if there is none.
    """
    try:
        return Root(_queue(_first(_queue(fd))), None)
    except OSError as error:
        log.warning(f"Cannot use what the last process has left: {reason(error)}")
        return None


def _first(outer: _socket.socket) -> int:
    """Return the descriptor in the first message of a queue, which is closed. Raises OSError."""
    try:
        _, fds = fd_queue.receive(outer, _DATA_MAX, _socket.MSG_PEEK)
    finally:
        outer.close()
    if len(fds) != 1:
        close_all(fds)
        raise OSError(errno.EBADF, posix.strerror(errno.EBADF))
    return fds[0]


def _queue(fd: int) -> _socket.socket:
    """Return the socket of `fd`, which is closed if it is no queue. Raises OSError."""
    try:
        sock = _socket.socket(fileno=fd)
    except OSError:
        posix.close(fd)
        raise
    if not fd_queue.is_queue(sock):
        sock.close()
        raise OSError(errno.EPROTOTYPE, posix.strerror(errno.EPROTOTYPE))
    return sock
