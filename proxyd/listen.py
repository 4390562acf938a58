"""Listeners: what one is, how it is closed, and which target its clients are for."""

import _socket
import posix

from proxyd import address as sockaddr
from proxyd.errors import UsageError
from proxyd.target import Target, valid_name

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from proxyd._datagram import DatagramListener
    from proxyd._relay import RelayListener
    from proxyd.datagram_upstream import DatagramUpstream
    from proxyd.ports import Ports
    from proxyd.upstream import Upstream

UNNAMED = "unknown"
"""What sd_listen_fds_with_names(3) calls a socket without a name."""

SO_PASSRIGHTS = 83  # asm-generic/socket.h; Linux 6.16

_NAMES_MAX = 10
"""A message lists at most this many names."""


class Listener:
    """A socket that connections come from, or datagrams.

    Usually it listens; with `connected` it is itself the only connection (Accept=yes). It owns its
    fd. The parts of the program complete it one after another: first the socket is there, then its
    target, then what serves it.
    """

    __slots__ = (
        "accepting",
        "address",
        "before_close",
        "broken",
        "connected",
        "datagram",
        "datagram_relay",
        "datagram_upstream",
        "family",
        "fd",
        "index",
        "inode",
        "name",
        "ports",
        "relay_listener",
        "target",
        "text",
        "upstream",
    )

    target: Target
    index: int
    """Its place among all listeners, by which the relay's events refer to it."""
    upstream: "Upstream"
    """Where its clients go …"""
    ports: "Ports | None"
    """… unless the target is `HOST:*` and they connected to another port than the listener's."""
    relay_listener: "RelayListener"
    """The relay's side of it."""
    datagram_upstream: "DatagramUpstream"
    """Where the datagrams of a datagram listener go …"""
    datagram_relay: "DatagramListener"
    """… and the relay's side of it: such a listener has neither of the other three."""

    def __init__(
        self,
        fd: int,
        name: str,
        address: bytes,
        connected: bool = False,
        *,
        datagram: bool = False,
    ) -> None:
        self.fd = fd
        self.name = name
        self.address = address
        """Packed, from getsockname(2)."""
        self.family = sockaddr.family(address)
        self.text = sockaddr.datagram_text(address) if datagram else sockaddr.text(address)
        """The address, for messages."""
        self.connected = connected
        self.datagram = datagram
        """Whether datagrams come from it; a datagram socket is never `connected`."""
        self.inode: tuple[int, int] | None = None
        """Device and inode of the socket file, if it is ours to unlink."""
        self.before_close: Callable[[Listener], None] | None = None
        """Unlinks this file."""
        self.accepting = False
        self.broken = False
        """Whether accept(2) or recvmmsg(2) has failed for good."""

    @property
    def involves_unix(self) -> bool:
        """Tell whether its clients come from a UNIX socket, or go to one."""
        target = self.target.address
        return sockaddr.AF_UNIX in (self.family, sockaddr.family(target) if target else None)


def close_listener(listener: Listener) -> None:
    """Close the fd, and unlink the socket file if we made it. Does not raise.

    If the backlog of a UNIX listener may contain file descriptors, the fd stays open until the
    process ends: closing the fd closes them, which may take as long as their sender likes.
    """
    if listener.before_close is not None:
        listener.before_close(listener)
    fd, listener.fd = listener.fd, -1
    if fd >= 0 and (listener.family != sockaddr.AF_UNIX or _refuses_descriptors(fd)):
        try:
            posix.close(fd)
        except OSError:
            pass  # closed before


def _refuses_descriptors(fd: int) -> bool:
    try:
        sock = _socket.socket(fileno=fd)
    except OSError:
        return True  # closed before, or not a socket
    try:
        return sock.getsockopt(_socket.SOL_SOCKET, SO_PASSRIGHTS) == 0
    except OSError:
        return False
    finally:
        sock.detach()


def match_targets(
    targets: list[tuple[str | None, Target]], listeners: list[Listener]
) -> tuple[list[Target], list[str]]:
    """Find the target of each listener.

    Returns one target per listener, in the same order, and the names without a listener. Raises
    UsageError for a listener without a target, or with one of another kind, and for a `HOST:*`
    target whose listener has no port to pass on.
    """
    by_name = dict(targets)
    plain = by_name.get(None)
    matched: list[Target] = []
    for listener in listeners:
        target = plain or by_name.get(listener.name)
        if target is None:
            raise UsageError(
                f"No target for listener '{listener.name}' ({listener.text})"
                f"{_instead(listener.name, by_name)}."
            )
        matched.append(_for_kind(target, listener))
    used = {listener.name for listener in listeners}
    return matched, [name for name in by_name if name is not None and name not in used]


def _for_kind(target: Target, listener: Listener) -> Target:
    """Return a target as it serves one listener. Raises UsageError."""
    if target.any_port and listener.family not in (sockaddr.AF_INET, sockaddr.AF_INET6):
        raise UsageError(
            f"Target {target.text} needs a TCP or UDP listener, to take the port from: "
            f"'{listener.name}' ({listener.text}) is not one."
        )
    if target.datagram and not listener.datagram:
        raise UsageError(
            f"Target {target.text} is for datagrams: "
            f"'{listener.name}' ({listener.text}) is a stream listener."
        )
    return target.for_datagrams() if listener.datagram else target


def _instead(name: str, by_name: "dict[str | None, Target]") -> str:
    """Return which names have targets, and the likely fault of `name`."""
    from difflib import get_close_matches

    names = [one for one in by_name if one is not None]
    there_are = f": the targets are for {list_names(names)}"
    if name in ("", UNNAMED):
        return (
            f"{there_are}, and this one has no name: set FileDescriptorName= in the socket unit, "
            "or use --listen=NAME=ADDRESS"
        )
    if not valid_name(name):
        return (
            f"{there_are}, and this name cannot be a NAME: set FileDescriptorName= "
            f"in the socket unit to one {_what_a_name_is(name)}"
        )
    close = get_close_matches(name, names, n=1)
    return f"{there_are}; is '{close[0]}' meant for it?" if close else there_are


def _what_a_name_is(bad: str) -> str:
    if ":" in bad:
        return "without a colon"
    return "without an equals sign, which does not begin with a slash, @ or ["


def list_names(names: "Iterable[str]") -> str:
    """Quote names for a message; of a long list, only the first ones."""
    quoted = [f"'{name}'" for name in dict.fromkeys(names)]
    more = f" and {len(quoted) - _NAMES_MAX} more" if len(quoted) > _NAMES_MAX else ""
    return ", ".join(quoted[:_NAMES_MAX]) + more
