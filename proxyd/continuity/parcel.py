"""A parcel: a sealed file, and a queue with every descriptor that goes to the next process.

The queue is that of a UNIX SEQPACKET socket. While the descriptors are in it they belong to no
process, and whoever holds the receiving end holds them all: a service manager stores one
descriptor, however many connections there are.

    file    "proxyd-parcel VERSION OFFSET" in a line, the text of blocks.py up to OFFSET, and what
            Relay.export() writes
    queue   the file, the descriptors of the blocks, and those of the connections, in this order;
            each message says in its data how many it has: if some do not fit into the table of
            the receiver, it knows which
"""

import _socket
import fcntl
import posix

from proxyd import log
from proxyd._relay import raise_fd_limit
from proxyd.continuity import blocks as text_blocks
from proxyd.continuity import fd_queue
from proxyd.continuity.blocks import Block

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxyd._relay import Relay

NAME = "proxyd-parcel"
"""Its name in the store of the service manager."""

_VERSION = 1

_HEAD_SIZE = 40
"""Of the file, in bytes; filled up with spaces."""

_TEXT_MAX = 1 << 30

_DATA_MAX = 16
"""Bytes of one message."""

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class ParcelError(Exception):
    """A parcel that cannot be used; the text says why."""


# ── sending ───────────────────────────────────────────────────────────────────────────────────────


def send(sender: _socket.socket, blocks: list[Block], relay: "Relay") -> None:
    """Send everything. The relay has been frozen.

    All descriptors stay the caller's. Raises OSError.
    """
    file = make_file(blocks)
    try:
        connections = relay.export(file, posix.fstat(file).st_size)
        seal(file)
        own = [fd for block in blocks for fd in block.fds]
        fd_queue.send(sender, _messages([file, *own, *connections]))
    finally:
        posix.close(file)


def make_file(blocks: list[Block]) -> int:
    """Return the fd of a new file with the text of `blocks`; what export() writes is to follow.

    Raises OSError.
    """
    text = text_blocks.write(blocks)
    head = f"{NAME} {_VERSION} {_HEAD_SIZE + len(text)}".ljust(_HEAD_SIZE - 1) + "\n"
    file = posix.memfd_create(NAME, posix.MFD_CLOEXEC | posix.MFD_ALLOW_SEALING)
    try:
        data = head.encode("ascii") + text
        while data:
            data = data[posix.write(file, data) :]
    except OSError:
        posix.close(file)
        raise
    return file


def seal(file: int) -> None:
    """Nothing in it can be changed any more. Raises OSError."""
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)


def _messages(fds: list[int]) -> "Iterator[tuple[bytes, list[int]]]":
    for start in range(0, len(fds), fd_queue.FDS_MAX):
        part = fds[start : start + fd_queue.FDS_MAX]
        yield f"{len(part)} {len(fds)}".encode(), part


# ── receiving ─────────────────────────────────────────────────────────────────────────────────────


class Parcel:
    """What was received. Owns all of its descriptors, until they are taken out of it."""

    __slots__ = ("blocks", "connections", "file", "lost", "offset")

    def __init__(self, file: int, fds: list[int]) -> None:
        """Read the file. Raises ParcelError, OSError; then the descriptors are closed."""
        self.file = file
        self.blocks: list[Block] = []
        self.connections = fds
        """The descriptors of the connections; -1 for each that was lost on the way."""
        self.lost = fds.count(-1)
        self.offset = 0
        """Where in the file the connections begin."""
        try:
            self._read()
        except (ParcelError, OSError):
            self.close()
            raise
        except ValueError as error:
            self.close()
            raise ParcelError(str(error)) from None

    def _read(self) -> None:
        if self.file < 0 or fcntl.fcntl(self.file, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ParcelError("it has no sealed file")
        words = posix.pread(self.file, _HEAD_SIZE, 0).decode("ascii", "replace").split()
        if len(words) != 3 or words[0] != NAME or not words[2].isdigit():
            raise ParcelError("it is none")
        if words[1] != str(_VERSION):
            raise ParcelError(f"it is of version {words[1]}, which is not known")
        self.offset = int(words[2])
        size = self.offset - _HEAD_SIZE
        if not 0 <= size <= _TEXT_MAX:
            raise ParcelError("its text has no end")
        text = posix.pread(self.file, size, _HEAD_SIZE)
        if len(text) != size:
            raise ParcelError("its text is cut short")
        self.blocks = text_blocks.read(text)
        place = 0
        for block in self.blocks:
            count = len(block.fds)
            if place + count > len(self.connections):
                raise ParcelError("descriptors are missing")
            block.fds = self.connections[place : place + count]
            place += count
        self.connections = self.connections[place:]

    def take_connections(self) -> list[int]:
        """Return the descriptors of the connections; they are the caller's now."""
        fds, self.connections = self.connections, []
        return fds

    def close(self) -> None:
        """Close what was not taken."""
        for fd in [self.file, *self.connections, *[fd for one in self.blocks for fd in one.fds]]:
            if fd >= 0:
                posix.close(fd)
        self.file = -1
        self.connections = []
        for block in self.blocks:
            block.fds = [-1] * len(block.fds)


def inherited(text: str, pid: int) -> Parcel | None:
    """Return the parcel that "FD:PID" names, if it is for process `pid`.

    One that cannot be used is closed, which resets its connections, with a warning.
    """
    fd, _, whose = text.partition(":")
    if not fd.isdigit() or whose != str(pid):
        return None
    return receive_or_warn(int(fd))


def receive_or_warn(fd: int) -> Parcel | None:
    """As receive(), with a warning if the parcel cannot be used."""
    try:
        return receive(fd)
    except (ParcelError, OSError, ValueError) as error:
        log.warning(f"Resetting the connections of the last process: its parcel is bad: {error}")
        return None


def receive(fd: int) -> Parcel | None:
    """Return the parcel of a queue whose receiving end is `fd`; None if it is empty.

    `fd` is closed. Raises ParcelError, OSError; everything is closed then, which resets the
    connections.
    """
    receiver = _socket.socket(fileno=fd)
    fds: list[int] = []
    try:
        _check_queue(receiver)
        while _receive_some(receiver, fds):
            pass
    except BaseException:
        _close_all(fds)
        raise
    finally:
        receiver.close()
    return Parcel(fds[0], fds[1:]) if fds else None


def _check_queue(receiver: _socket.socket) -> None:
    if not fd_queue.is_queue(receiver):
        raise ParcelError("it is no queue")


def _receive_some(receiver: _socket.socket, fds: list[int]) -> bool:
    """Append the descriptors of one message; return False at the end of the queue."""
    try:
        if not fds:
            _make_room(receiver)
        data, got = fd_queue.receive(receiver, _DATA_MAX)
    except BlockingIOError:
        raise ParcelError("its sender has not finished it") from None
    if not data:
        return False
    fds += got
    count, _ = _numbers(data)
    if not len(got) <= count <= fd_queue.FDS_MAX:
        raise ParcelError("descriptors are missing")
    fds += [-1] * (count - len(got))
    return True


def _make_room(receiver: _socket.socket) -> None:
    """Raise the limit of descriptors to what the first message says."""
    data = receiver.recv(_DATA_MAX, _socket.MSG_DONTWAIT | _socket.MSG_PEEK)
    if data:
        raise_fd_limit(_numbers(data)[1] + fd_queue.OTHERS)


def _numbers(data: bytes) -> tuple[int, int]:
    """Return how many descriptors a message has, and how many the parcel. Raises ParcelError."""
    words = data.split()
    if len(words) != 2 or not (words[0].isdigit() and words[1].isdigit()):
        raise ParcelError("it is none")
    return int(words[0]), int(words[1])


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        if fd >= 0:
            posix.close(fd)
