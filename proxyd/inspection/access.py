"""Which caller may call what: status and metrics are for everybody, the rest is not."""

import _socket
import posix

from proxyd.user_namespace import DEFAULT_OVERFLOW_UID, overflow_uid

_SO_PEERCRED_SIZE = 12  # struct ucred: pid, uid, gid


class Peer:
    """The process that has connected, as it was at that moment."""

    __slots__ = ("privileged", "uid")

    def __init__(self, uid: int, *, privileged: bool) -> None:
        self.uid = uid
        self.privileged = privileged
        """Whether it may see single connections, and end them."""


def peer_of(sock: _socket.socket) -> Peer:
    """Return who is at the other end. Raises OSError."""
    ucred = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _SO_PEERCRED_SIZE)
    uid = int.from_bytes(ucred[4:8], "little" if _LITTLE else "big")
    return Peer(uid, privileged=is_privileged(uid, posix.geteuid(), _overflow))


def is_privileged(uid: int, own_uid: int, overflow: int) -> bool:
    """Tell whether `uid` is root or the user of this process.

    In a user namespace (PrivateUsers=yes) every user that has no name there appears as the overflow
    uid. It stands for anybody, so it is never taken for our own, even if we run under it.
    """
    if uid == 0:
        return True
    return uid == own_uid and uid not in (overflow, DEFAULT_OVERFLOW_UID)


_overflow = overflow_uid()

_LITTLE = memoryview(b"\1\0").cast("H")[0] == 1
