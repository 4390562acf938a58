"""Sockets inherited from the service manager: the protocol of sd_listen_fds(3)."""

import _socket
import posix

from proxyd import address as sockaddr
from proxyd import log
from proxyd.errors import UsageError, reason
from proxyd.listen import UNNAMED, Listener

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import MutableMapping

PARCEL_NAME = "proxyd-parcel"
"""How connections are called that are kept for the next start: see continuity/parcel.py."""

PAGES_NAME = "proxyd-pages"
"""How that is called which the next process needs if this one is killed: see continuity/root.py."""

_STORED = "stored"
"""How systemd calls a stored descriptor without a name."""

_OF_A_VERSION = "proxyd-"
"""How the name begins of what any version has stored: a later one may know more than this."""

_FDS_START = 3
_FDS_MAX = 1 << 30  # more than a process can have

# LISTEN_PIDFDID: systemd 259 and newer.
_NOT_A_STREAM = "Passed in socket is not a stream socket."  # the original's words

_PROTOCOLS = {
    sockaddr.AF_UNIX: 0,
    sockaddr.AF_INET: _socket.IPPROTO_UDP,
    sockaddr.AF_INET6: _socket.IPPROTO_UDP,
}
"""Family → protocol of the datagram sockets that can be forwarded."""

_SO_PROTOCOL = 38  # asm-generic/socket.h

_VARIABLES = ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES")


def inherited(
    environ: "MutableMapping[str, str]",
    pid: int,
    *,
    by_name: bool = False,
    stored: dict[str, list[int]] | None = None,
) -> list[Listener]:
    """Return the sockets passed to process `pid`, checked, close-on-exec and non-blocking.

    With `by_name`, each of them must have a name. The LISTEN_ variables are removed from `environ`,
    so that no child takes them for its own. If the sockets are meant for another process, the list
    is empty. What an earlier process has stored is added to `stored`, by its name. Raises
    UsageError.
    """
    values = {name: environ.pop(name) for name in _VARIABLES if name in environ}
    if not values or not _meant_for(values, pid):
        return []
    count = _number(values, "LISTEN_FDS", 1)
    count = _split_stored(values, count, {} if stored is None else stored)
    if count == 0:
        return []
    names = _names(values, count, by_name)
    # The first fd that is not open raises, however large the number is.
    return [_inherit(_FDS_START + n, names[n] if names else UNNAMED) for n in range(count)]


def on_standard_fds() -> str:
    """Return which setting of the service passes its socket as a standard fd; "" if none does.

    systemd then passes it nowhere else, see systemd.exec(5). Other sockets that may be standard
    fds, the journal's and the socketpair of a remote shell, have no address at our end.
    """
    for fd, setting in enumerate(("StandardInput", "StandardOutput", "StandardError")):
        try:
            sock = _socket.socket(fileno=fd)
        except OSError:
            continue
        try:
            kinds = _socket.SOCK_STREAM, _socket.SOCK_DGRAM
            if sock.type in kinds and sock.getsockname():
                return f"{setting}=socket"
        except OSError:
            pass
        finally:
            sock.detach()
    return ""


def reject_mixture(listeners: list[Listener]) -> None:
    """Raise UsageError unless all `listeners` listen, or the only one is a connection."""
    if len(listeners) > 1 and any(listener.connected for listener in listeners):
        raise UsageError(
            "A connected socket (Accept=yes) must be the only one, "
            f"but there are {len(listeners)} sockets."
        )


def _meant_for(values: dict[str, str], pid: int) -> bool:
    """Tell whether the sockets are meant for us. Raises UsageError for garbage."""
    if "LISTEN_PID" not in values or _number(values, "LISTEN_PID", 1) != pid:
        return False
    if "LISTEN_PIDFDID" in values:
        own = _pidfd_inode(pid)
        if own is not None and _number(values, "LISTEN_PIDFDID", 0) != own:
            return False
    return "LISTEN_FDS" in values


def _split_stored(values: dict[str, str], count: int, stored: dict[str, list[int]]) -> int:
    """Return how many of the descriptors are sockets, drop the other names, and add what is ours.

    Stored descriptors come last. Their names tell ours apart, and those that systemd calls "stored"
    because who stored them did not name them. Of others, what is no socket is skipped, too.
    """
    names = values.get("LISTEN_FDNAMES", "").split(":")
    while 0 < count <= _FDS_MAX and names:
        fd = _FDS_START + count - 1
        if names[-1] in (PARCEL_NAME, PAGES_NAME):
            stored.setdefault(names[-1], []).append(fd)
        elif not _is_file(names[-1], fd) and (not _may_be_stored(names[-1]) or _is_useful(fd)):
            break
        else:
            log.warning(f"Ignoring the stored file descriptor {fd}, which is no socket to serve.")
        names.pop()
        count -= 1
    if "LISTEN_FDNAMES" in values:
        values["LISTEN_FDNAMES"] = ":".join(names)
    return count


def _is_file(name: str, fd: int) -> bool:
    """Tell whether this has a name, and is what no socket unit passes: a memfd, say, or an eventfd.

    They have the type of a regular file, or none.
    """
    try:
        return bool(name) and posix.fstat(fd).st_mode & 0o170000 in (0o100000, 0)
    except OSError:
        return False


def _may_be_stored(name: str) -> bool:
    """Tell whether it is the name of what no socket unit passes; but units have such names, too."""
    return name == _STORED or name.startswith(_OF_A_VERSION)


def _is_useful(fd: int) -> bool:
    try:
        _inherit(fd, _STORED)
    except UsageError:
        return False
    return True


def _names(values: dict[str, str], count: int, by_name: bool) -> list[str]:
    """Return the names of `count` sockets, or nothing if they have none. Raises UsageError.

    The name of a unit may contain the colon that separates names, as in
    web@127.0.0.1:8080.socket. Then there are more names than sockets. For a single socket, all of
    it is the name; for several, the names cannot be assigned.
    """
    if "LISTEN_FDNAMES" not in values:
        return []
    names = values["LISTEN_FDNAMES"].split(":")
    if len(names) == count:
        return names
    if count == 1:
        return [values["LISTEN_FDNAMES"]]
    if by_name:
        raise _garbage(
            values,
            "LISTEN_FDNAMES",
            f"{len(names)} name{'s' * (len(names) != 1)} for {count} sockets. "
            "NAME=TARGET needs one name for each, without a colon in it: "
            "set FileDescriptorName= in the socket units.",
        )
    return []


def _pidfd_inode(pid: int) -> int | None:
    """Return the number that distinguishes `pid` from an earlier process with the same pid.

    None if the kernel has no such number: before pidfs (Linux 6.9), all pidfds share one inode,
    which is also that of eventfds.
    """
    try:
        pidfd, shared = _stat_and_close(posix.pidfd_open(pid)), _stat_and_close(posix.eventfd(0))
    except (AttributeError, OSError):
        return None
    return pidfd.st_ino if pidfd.st_dev != shared.st_dev else None


def _stat_and_close(fd: int) -> posix.stat_result:
    try:
        return posix.fstat(fd)
    finally:
        posix.close(fd)


def _inherit(fd: int, name: str) -> Listener:
    """Check one fd, and make it a Listener. Raises UsageError."""
    try:
        posix.set_inheritable(fd, False)
        posix.set_blocking(fd, False)
    except OSError as error:
        raise UsageError(
            f"Failed to receive sockets from parent: fd {fd} ('{name}'): {reason(error)}"
        ) from None
    try:
        sock = _socket.socket(fileno=fd)
    except OSError:  # not a socket at all
        raise UsageError(_NOT_A_STREAM) from None
    try:
        return _listener(sock, name)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"Failed to use passed in socket fd {fd} ('{name}'): {reason(error)}"
        ) from None
    finally:
        sock.detach()  # otherwise it would close the fd


def _listener(sock: _socket.socket, name: str) -> Listener:
    """Make a Listener of `sock`, without owning it. Raises UsageError, OSError, ValueError."""
    if sock.type == _socket.SOCK_DGRAM:
        return _datagram_listener(sock, name)
    if sock.type != _socket.SOCK_STREAM:
        raise UsageError(_NOT_A_STREAM)
    address = sockaddr.from_socket_name(sock.family, sock.getsockname())
    listening = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ACCEPTCONN)
    if not listening and not _was_connected(sock):
        raise UsageError("Passed in socket is neither listening nor connected.")
    return Listener(sock.fileno(), name, address, connected=not listening)


def _datagram_listener(sock: _socket.socket, name: str) -> Listener:
    """Make a Listener of a datagram socket that is bound, and not connected. Raises UsageError."""
    protocol = sock.getsockopt(_socket.SOL_SOCKET, _SO_PROTOCOL)
    if _PROTOCOLS.get(sock.family) != protocol or _has_peer(sock):
        raise UsageError(_NOT_A_STREAM)
    address = sockaddr.from_socket_name(sock.family, sock.getsockname())
    bound = (
        sockaddr.unix_name(address) if sock.family == sockaddr.AF_UNIX else sockaddr.port(address)
    )
    if not bound:
        raise UsageError("Passed in datagram socket is not bound.")
    return Listener(sock.fileno(), name, address, datagram=True)


def _has_peer(sock: _socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _was_connected(sock: _socket.socket) -> bool:
    """Tell whether `sock` is a connection, even if the client has reset it."""
    try:
        sock.getpeername()
    except OSError:  # ENOTCONN; but after a reset, an error is pending
        return sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR) != 0
    return True


def _number(values: dict[str, str], name: str, minimum: int) -> int:
    """Read a variable as a decimal number of 64 bits. Raises UsageError."""
    try:
        return sockaddr.parse_number(values[name], minimum, 2**64 - 1, "valid number")
    except ValueError:
        raise _garbage(values, name, "not a valid number") from None


def _garbage(values: dict[str, str], name: str, why: str) -> UsageError:
    return UsageError(f"Failed to receive sockets from parent: {name}={values[name]}: {why}")
