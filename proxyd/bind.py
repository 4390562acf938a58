"""--listen=: reads its addresses, binds and listens, and replaces or unlinks socket files."""

import _socket
import errno
import posix

from proxyd import address as sockaddr
from proxyd.errors import UsageError, reason
from proxyd.listen import SO_PASSRIGHTS, UNNAMED, Listener, close_listener
from proxyd.target import split_pair

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd.continuity.blocks import Block
    from proxyd.continuity.parcel import Parcel

_BACKLOG = 65535  # the kernel caps it at net.core.somaxconn

_NO_SUCH_ADDRESS = (
    "No interface has it yet: start this after network-online.target, or from a socket unit with "
    "FreeBind=yes"
)

_UDP, _UNIX_DATAGRAM = "udp:", "unix-dgram:"
"""What stands in front of the address of a datagram socket."""

LOCK_S = 5.0
"""How long to wait at the start while other processes bind in the same folder."""

_LOCK_AT_EXIT_S = 0.1
_LOCK_PAUSE_S = 0.01


class ListenAddress:
    """The value of --listen=[NAME=]ADDRESS."""

    __slots__ = ("address", "any_family", "datagram", "name", "text")

    def __init__(
        self, name: str, address: bytes, text: str, any_family: bool, datagram: bool = False
    ) -> None:
        self.name = name
        self.address = address
        """Packed, for bind(2)."""
        self.text = text
        """ADDRESS as given."""
        self.any_family = any_family
        """A bare PORT: IPv6 and IPv4 in one socket, or IPv4 alone on a host without IPv6."""
        self.datagram = datagram


def parse_listen(text: str) -> ListenAddress:
    """Read [NAME=]ADDRESS, with the ADDRESS forms of ListenStream= (systemd.socket(5)).

    Those of ListenDatagram= have `udp:` or `unix-dgram:` in front. Port 0 lets the kernel choose
    one. Raises ValueError, UsageError.
    """
    name, rest = split_pair(text)
    kind, where = _split_kind(rest)
    bare_port = where.isascii() and where.isdigit()
    _check_kind(kind, where)
    try:
        packed = _parse_address(where, bare_port)
        return ListenAddress(name or UNNAMED, packed, rest, bare_port, datagram=kind != "")
    except sockaddr.UnknownInterfaceError as error:
        raise UsageError(
            f"Failed to listen on {rest}: {error}. Start this once it is there, or from a socket "
            "unit with BindToDevice=, which waits for it."
        ) from None


def _split_kind(text: str) -> tuple[str, str]:
    """Split off `udp:` or `unix-dgram:`; "" without one."""
    for kind in (_UDP, _UNIX_DATAGRAM):
        if text.startswith(kind):
            return kind, text.removeprefix(kind)
    return "", text


def _check_kind(kind: str, where: str) -> None:
    """Raise ValueError unless an address is of the kind that the word in front of it says."""
    if kind == _UDP and (not where or sockaddr.parse_local(where) is not None):
        raise ValueError("expected udp:PORT, udp:HOST:PORT or udp:[V6]:PORT")
    if kind == _UNIX_DATAGRAM and not where.startswith(("/", "@")):
        raise ValueError("expected unix-dgram:/PATH or unix-dgram:@NAME")


def _parse_address(text: str, bare_port: bool) -> bytes:
    if bare_port:
        return sockaddr.pack_inet6("::", sockaddr.parse_port(text, minimum=0))
    local = sockaddr.parse_local(text)
    if local is not None:
        return local
    host, service = sockaddr.split_host(text)
    if service is None:
        raise ValueError("expected a port, HOST:PORT, a path, @NAME or vsock:CID:PORT")
    return sockaddr.pack_inet(host, sockaddr.parse_port(service, minimum=0))


def open_listener(where: ListenAddress) -> Listener:
    """Bind and listen, close-on-exec and non-blocking.

    A stale UNIX socket file, on which no process listens, is replaced. Raises OSError.
    """
    if where.any_family:
        try:
            return _open(where, where.address)
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
            port = sockaddr.port(where.address)
            return _open(where, sockaddr.pack_inet("0.0.0.0", port))
    try:
        return _open(where, where.address)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        why = f"{error.strerror}. {_NO_SUCH_ADDRESS}"
        raise OSError(error.errno, why) from None


def take_over_listener(where: ListenAddress, parcel: "Parcel") -> Listener | None:
    """Return the listener that an earlier process has opened for the same option, if it has."""
    for block in parcel.blocks:
        kind = block.number("datagram") == where.datagram
        if _has_listener(block) and block.text("wanted") == where.text and kind:
            return _take_listener(block, where.name)
    return None


def close_left_listeners(parcel: "Parcel") -> None:
    """Close the listeners of an earlier process that no option wants, and unlink their files."""
    for block in parcel.blocks:
        if _has_listener(block):
            close_listener(_take_listener(block, UNNAMED))


def _has_listener(block: "Block") -> bool:
    return block.kind == "listener" and len(block.fds) == 1 and block.fds[0] >= 0


def _take_listener(block: "Block", name: str) -> Listener:
    (fd,), block.fds = block.fds, []
    datagram = block.number("datagram") != 0
    listener = Listener(fd, name, block.raw("address"), datagram=datagram)
    if "inode" in block.values:
        listener.inode = block.number("device"), block.number("inode")
    listener.before_close = _unlink_at_exit
    return listener


def _open(where: ListenAddress, address: bytes) -> Listener:
    path = _file_path(address)
    if not path:
        return _open_locked(where, address, None)
    lock = _FolderLock(path, LOCK_S)
    try:
        return _open_locked(where, address, lock)
    finally:
        lock.release()


def _open_locked(where: ListenAddress, address: bytes, lock: "_FolderLock | None") -> Listener:
    family = sockaddr.family(address)
    kind = _socket.SOCK_DGRAM if where.datagram else _socket.SOCK_STREAM
    sock = _socket.socket(family, kind | _socket.SOCK_NONBLOCK)
    try:
        # With SO_REUSEADDR a second UDP socket may bind the port, and get the datagrams instead.
        if family in (sockaddr.AF_INET, sockaddr.AF_INET6) and not where.datagram:
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        if family == sockaddr.AF_INET6:
            sock.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 0)
        if family == sockaddr.AF_UNIX:
            _refuse_descriptors(sock)
        inode = _bind(sock, address, lock)
        try:
            if not where.datagram:
                sock.listen(_BACKLOG)
            bound = sockaddr.from_socket_name(family, sock.getsockname())
        except OSError:
            _unlink_ours(address, inode)
            raise
        listener = Listener(sock.fileno(), where.name, bound, datagram=where.datagram)
        listener.inode, listener.before_close = inode, _unlink_at_exit
        sock.detach()
        return listener
    finally:
        sock.close()  # no effect once it is detached


def _refuse_descriptors(sock: _socket.socket) -> None:
    """Refuse file descriptors from the first client on; an inherited listener is set up later."""
    try:
        sock.setsockopt(_socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        pass  # an older kernel: the relay looks before every read instead


def _bind(
    sock: _socket.socket, address: bytes, lock: "_FolderLock | None"
) -> tuple[int, int] | None:
    """Bind `sock`; return device and inode of the socket file, if there is one."""
    path = _file_path(address)
    try:
        sock.bind(sockaddr.to_socket_name(address))
    except OSError as error:
        inode = _stale(path) if path else None
        if not path or not lock or inode is None:
            raise
        if lock.missing:
            raise OSError(
                error.errno,
                "there is a stale socket file, which cannot be replaced safely: "
                f"failed to lock its folder: {lock.missing}",
            ) from None
        # Another process may have replaced it in the meantime, without the lock.
        if _inode(path) != inode or not _unlink(path):
            raise
        sock.bind(path)
    return _inode(path) if path else None


def _unlink_at_exit(listener: Listener) -> None:
    """Unlink the socket file of a listener that still listens.

    While it listens, no process takes the file for stale, and no other file gets its inode.
    """
    inode, listener.inode = listener.inode, None
    path = _file_path(listener.address)
    if inode is None or not path:
        return
    lock = _FolderLock(path, _LOCK_AT_EXIT_S)  # against a process that binds after the unlink
    _unlink_ours(listener.address, inode)
    lock.release()


def _unlink_ours(address: bytes, inode: tuple[int, int] | None) -> None:
    """Unlink the socket file of `address` if it is still the one with our `inode`."""
    path = _file_path(address)
    if path and inode is not None and _inode(path) == inode:
        _unlink(path)


def _unlink(path: bytes) -> bool:
    try:
        posix.unlink(path)
    except OSError:  # pragma: no cover - it was removed after _inode() looked
        return False
    return True


class _FolderLock:
    """An exclusive flock(2) on the folder of a socket file, which leaves nothing behind.

    It is held from before bind(2) until after listen(2): in between, the socket looks stale, and
    another start would replace it. If the lock cannot be taken, `missing` says why. A new file may
    still be created then, but none replaced: a process that would replace ours needs the lock, too.
    """

    __slots__ = ("_fd", "missing")

    def __init__(self, path: bytes, patience_s: float) -> None:
        self._fd = -1
        self.missing = ""
        try:
            flags = posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC
            self._fd = posix.open(_folder_of(path), flags)
            self._take(patience_s)
        except BlockingIOError:
            self.missing = "another process holds it"
        except (OSError, ImportError) as error:
            self.missing = reason(error)
        if self.missing:
            self.release()

    def release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            posix.close(fd)

    def _take(self, patience_s: float) -> None:
        """Wait for the lock, but not forever. Raises BlockingIOError."""
        import fcntl
        import time

        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_LOCK_PAUSE_S)
            else:
                return


def _stale(path: bytes) -> tuple[int, int] | None:
    """Return device and inode if `path` is a stale socket file, None otherwise."""
    inode = _inode(path)
    if inode is None:
        return None
    probe = _socket.socket(sockaddr.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        return inode
    except OSError:
        return None  # in use (EAGAIN), or not for us to judge
    finally:
        probe.close()
    return None


def _folder_of(path: bytes) -> bytes:
    folder, slash, _ = path.rpartition(b"/")
    return folder or slash or b"."


def _file_path(address: bytes) -> bytes | None:
    """Return the path of a UNIX address, None for an abstract or unnamed one."""
    name = sockaddr.unix_name(address) if sockaddr.family(address) == sockaddr.AF_UNIX else b""
    return name if name[:1] not in (b"", b"\0") else None


def _inode(path: bytes) -> tuple[int, int] | None:
    """Return device and inode of the socket file at `path`, None if there is none."""
    try:
        stat = posix.lstat(path)
    except OSError:
        return None
    is_socket = stat.st_mode & 0o170000 == 0o140000  # inode(7); importing stat costs more
    return (stat.st_dev, stat.st_ino) if is_socket else None
