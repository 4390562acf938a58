"""Queues of descriptors: UNIX SEQPACKET sockets, whose messages are data and descriptors.

While a descriptor is in a queue it belongs to no process. Whoever holds the receiving end holds all
of them, and nobody else has to live for that.
"""

import _socket
import posix
import sys

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FDS_MAX = 253
"""Descriptors of one message (SCM_MAX_FD)."""

OTHERS = 64
"""Descriptors that are open besides those received."""

_SEND_BYTES = 1 << 23
"""The send buffer that is asked for; each message takes about 800 bytes of it."""

_SO_PEEK_OFF = 42  # asm-generic/socket.h


def pair() -> tuple[_socket.socket, _socket.socket]:
    """Return (sending end, receiving end) of a queue. Raises OSError."""
    sender, receiver = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    sender.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, _SEND_BYTES)
    return sender, receiver


def copy(fd: int) -> _socket.socket:
    """Return a copy of an end. Raises OSError."""
    duplicate = posix.dup(fd)
    try:
        return _socket.socket(fileno=duplicate)
    except OSError:
        posix.close(duplicate)
        raise


def is_queue(sock: _socket.socket) -> bool:
    """Tell whether it can be an end of a queue."""
    return sock.type == _socket.SOCK_SEQPACKET and sock.family == _socket.AF_UNIX


def send(sender: _socket.socket, messages: "Iterable[tuple[bytes, Sequence[int]]]") -> None:
    """Send messages; the descriptors stay the caller's. Raises OSError."""
    import resource

    # The kernel compares the descriptors in flight of this user with the soft limit (ETOOMANYREFS).
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    _set_limit((limits[1], limits[1]))
    try:
        for data, fds in messages:
            packed = b"".join([fd.to_bytes(4, sys.byteorder) for fd in fds])
            rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if fds else []
            sender.sendmsg([data], rights, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
    finally:
        _set_limit(limits)


def _set_limit(limits: tuple[int, int]) -> None:
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    except (OSError, ValueError):
        pass  # a security module forbids it: as a rule the limit is high enough as it is


def look_from_start(receiver: _socket.socket) -> None:
    """Have look() begin with the first message. Raises OSError."""
    receiver.setsockopt(_socket.SOL_SOCKET, _SO_PEEK_OFF, 0)


def look(receiver: _socket.socket, size: int) -> tuple[bytes, list[int]]:
    """As receive(), but the message stays in the queue, and the next look is at the one after it.

    The descriptors are copies. `size` must not be less than the data. No data: there is no more.
    Raises OSError.
    """
    try:
        return receive(receiver, size, _socket.MSG_PEEK)
    except BlockingIOError:
        return b"", []


def receive(receiver: _socket.socket, size: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """Take one message of up to `size` bytes; return (data, descriptors). Raises OSError.

    There are fewer descriptors than were sent if they do not fit into our table. No data: the end.
    """
    room = _socket.CMSG_SPACE(4 * FDS_MAX)
    flags |= _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC
    data, ancillary, _, _ = receiver.recvmsg(size, room, flags)
    fds: list[int] = []
    for level, kind, packed in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            fds += memoryview(packed[: len(packed) // 4 * 4]).cast("i").tolist()
    return data, fds


def drop(receiver: _socket.socket, count: int = -1) -> None:
    """Take `count` messages out, or all of them, and have the kernel close their descriptors.

    Raises OSError.
    """
    while count != 0:
        try:
            if not receiver.recv(1, _socket.MSG_DONTWAIT):
                return
        except BlockingIOError:
            return
        count -= 1
