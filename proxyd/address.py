"""Socket addresses, packed as for connect(2) and bind(2).

An address is a sockaddr as `bytes`. It begins with the family, two bytes in host order:

    sockaddr_in   ip(7)    family, port (2, big-endian), IPv4 address (4), zeroes (8)
    sockaddr_in6  ipv6(7)  family, port (2, big-endian), flow label (4), IPv6 address (16),
                           scope, an interface index (4, host order)
    sockaddr_un   unix(7)  family, path with its NUL; or NUL and the name in the abstract
                           namespace; or nothing (an unnamed socket)
    sockaddr_vm   vsock(7) family, reserved (2), port (4), CID (4), flags (1), zeroes (3),
                           all in host order
"""

import _socket
import errno
import sys

from proxyd import os_text

AF_UNIX = 1
AF_INET = 2
AF_INET6 = 10
AF_VSOCK = 40

VMADDR_CID_ANY = 2**32 - 1

# asm-generic/socket.h; `_socket` lacks the second, and the first depends on the build
_SO_BINDTODEVICE = 25
_SO_BINDTOIFINDEX = 62

_INTERFACE_MAX = 15  # IFNAMSIZ is 16 bytes, including the NUL

_UNIX_PATH_MAX = 107  # sun_path is 108 bytes, including the NUL
_V4_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, RFC 4291 2.5.5.2


class UnknownInterfaceError(ValueError):
    """A scope names a network interface that does not exist, or does not exist yet."""


# ── text forms ────────────────────────────────────────────────────────────────────────────────────


def parse_local(target: str) -> bytes | None:
    """Pack a UNIX or VSOCK address in text form; None if `target` is neither.

    `unix:` without a slash and `vsock:` without a second colon remain host names, because for the
    original `unix:80` is port 80 of a host called unix. Raises ValueError.
    """
    if target.startswith(("/", "@")):
        return pack_unix(target)
    if target.startswith("unix:") and ("/" in target or target[5:6] == "@"):
        return pack_unix(target[5:])
    if target.startswith("vsock:") and target.count(":") > 1:
        return _parse_vsock(target[6:])
    return None


def _parse_vsock(target: str) -> bytes:
    cid, _, number = target.partition(":")
    any_cid = VMADDR_CID_ANY
    return pack_vsock(
        parse_number(cid, 0, any_cid, f"CID from 0 to {any_cid}") if cid else any_cid,
        parse_number(number, 0, any_cid, f"VSOCK port number from 0 to {any_cid}"),
    )


def split_host(target: str) -> tuple[str, str | None]:
    """Split `HOST:PORT`, `[V6]:PORT`, `HOST` or `[V6]`; without a port, it is None.

    The split is at the last colon, so `::1:80` is port 80 of ::1. Raises ValueError.
    """
    scheme, is_url, rest = target.partition("://")
    if is_url:
        raise ValueError(f"a URL is not an address; write {_without_url(scheme, rest)}")
    if "=" in target:
        raise ValueError(
            "'=' is not part of a host or port; a NAME in front of it is not empty, contains no "
            "colon, and does not begin with a slash, @ or ["
        )
    if target.startswith("["):
        host, bracket, rest = target[1:].rpartition("]")
        if not bracket or ":" not in host or (rest and rest[0] != ":"):
            raise ValueError("expected [IPV6-ADDRESS]:PORT")
        return host, rest[1:] if rest else None
    host, colon, service = target.rpartition(":")
    return (host, service) if colon else (target, None)


def _without_url(scheme: str, rest: str) -> str:
    """Return the address of the URL SCHEME://REST."""
    host = rest.partition("/")[0].rpartition("@")[2]
    if not host:
        return "HOST:PORT"
    port = {"http": 80, "https": 443}.get(scheme.lower(), "PORT")
    has_port = host.rpartition("]")[2].rpartition(":")[2].isdigit()
    return host if has_port else f"{host.rstrip(':')}:{port}"


def parse_port(digits: str, minimum: int = 1) -> int:
    """Read a TCP port number. Raises ValueError."""
    return parse_number(digits, minimum, 65535, f"port number from {minimum} to 65535")


def parse_number(digits: str, minimum: int, maximum: int, what: str) -> int:
    """Read a plain decimal number. The message of the ValueError says that it is not a `what`."""
    # The limit on the length keeps int() fast; isascii() rejects the digits of other scripts.
    if digits.isascii() and digits.isdigit() and len(digits) <= 20:
        number = int(digits)
        if minimum <= number <= maximum:
            return number
    raise ValueError(f"'{digits}' is not a {what}")


def datagram_text(address: bytes) -> str:
    """Format the address of a datagram socket: udp:127.0.0.1:53, unix-dgram:/run/x."""
    return f"{'unix-dgram' if family(address) == AF_UNIX else 'udp'}:{text(address)}"


def text(address: bytes) -> str:
    """Format `address` for messages: 127.0.0.1:80, [::1]:80, /run/x, @x, vsock:2:80."""
    kind = family(address)
    if kind == AF_INET:
        return f"{_socket.inet_ntop(AF_INET, address[4:8])}:{port(address)}"
    if kind == AF_INET6:
        host = _socket.inet_ntop(AF_INET6, address[8:24])
        return f"[{host}{_scope_text(address)}]:{port(address)}"
    if kind == AF_VSOCK:
        cid = _cid(address)
        return f"vsock:{'' if cid == VMADDR_CID_ANY else cid}:{port(address)}"
    if kind == AF_UNIX:
        return _unix_text(unix_name(address))
    return f"address family {kind}"


def _unix_text(raw: bytes) -> str:
    if not raw:
        return "unix client"
    if raw.startswith(b"\0"):
        raw = b"@" + raw[1:]
    return os_text.decode(raw)


def _scope_text(address: bytes) -> str:
    scope = _scope(address)
    if not scope:
        return ""
    try:
        return f"%{_socket.if_indextoname(scope)}"
    except OSError:
        return f"%{scope}"


# ── packing ───────────────────────────────────────────────────────────────────────────────────────


def from_socket_name(family: int, name: object) -> bytes:
    """Pack what `_socket` returns for getsockname(2) or getpeername(2).

    Raises ValueError for an unsupported family.
    """
    if family == AF_UNIX and isinstance(name, (bytes, str)):
        return _pack_sun_path(os_text.encode(name))
    if isinstance(name, tuple):
        if family == AF_INET:
            return pack_inet(name[0], name[1])
        if family == AF_INET6:
            return pack_inet6(name[0], name[1], name[3])
        if family == AF_VSOCK:
            return pack_vsock(name[0], name[1])
    raise ValueError(f"address family {family} is not supported")


def to_socket_name(address: bytes) -> tuple[str | int, ...] | bytes:
    """Return `address` in the form that `_socket` expects for bind() and connect()."""
    kind = family(address)
    if kind == AF_INET:
        return _socket.inet_ntop(AF_INET, address[4:8]), port(address)
    if kind == AF_INET6:
        return _socket.inet_ntop(AF_INET6, address[8:24]), port(address), 0, _scope(address)
    if kind == AF_VSOCK:
        return _cid(address), port(address)
    return unix_name(address)


def pack_inet(host: str, port: int) -> bytes:
    """Pack an IPv4 literal, or an IPv6 literal with an optional `%SCOPE`. Raises ValueError."""
    if ":" in host:
        literal, scope = split_scope(host)
        return pack_inet6(literal, port, _scope_id(scope) if scope else 0)
    return _head(AF_INET) + port.to_bytes(2, "big") + _literal(AF_INET, host) + bytes(8)


def split_scope(host: str) -> tuple[str, str]:
    """Split `V6%SCOPE`; without a scope, it is "". Raises ValueError."""
    literal, percent, scope = host.partition("%")
    if percent and ":" in literal and not can_be_interface(scope):
        raise ValueError(f"'{scope}' is not a network interface")
    return literal, scope


def can_be_interface(name: str) -> bool:
    """Tell whether this can be the name of an interface (dev_valid_name()), or its number."""
    try:
        size = len(os_text.encode(name))
    except UnicodeError:
        return False
    return 0 < size <= _INTERFACE_MAX and not any(c in "/:\0" or c.isspace() for c in name)


def pack_inet6(host: str, port: int, scope_id: int = 0) -> bytes:
    """Pack an IPv6 literal; `scope_id` is an interface index or 0. Raises ValueError."""
    return (
        _head(AF_INET6)
        + port.to_bytes(2, "big")
        + bytes(4)
        + _literal(AF_INET6, host)
        + scope_id.to_bytes(4, sys.byteorder)
    )


def pack_host(kind: int, host: bytes, number: bytes) -> bytes:
    """Pack an address and a port that are in network byte order."""
    if kind == AF_INET:
        return _head(kind) + number + host + bytes(8)
    return _head(kind) + number + bytes(4) + host + bytes(4)


def _literal(kind: int, host: str) -> bytes:
    try:
        return _socket.inet_pton(kind, host)
    except (OSError, ValueError):
        raise ValueError(f"'{host}' is not an IP address") from None


def _scope_id(scope: str) -> int:
    if is_index(scope):
        return parse_number(scope, 0, 2**32 - 1, "scope number")
    try:
        return interface_index(scope)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        raise UnknownInterfaceError(f"there is no network interface '{scope}'") from None


def is_index(scope: str) -> bool:
    """Tell whether a scope is the number of an interface, not its name."""
    return scope.isascii() and scope.isdigit()


def interface_index(name: str) -> int:
    """Return the index of a network interface. Raises OSError: ENODEV if it does not exist.

    The main loop calls this, so it must not block. if_nametoindex(3) may: if the interface does not
    exist, its ioctl makes the kernel load a module, given CAP_NET_ADMIN.
    """
    probe = _socket.socket(AF_INET6, _socket.SOCK_DGRAM)
    try:
        probe.setsockopt(_socket.SOL_SOCKET, _SO_BINDTODEVICE, os_text.encode(name))
        return probe.getsockopt(_socket.SOL_SOCKET, _SO_BINDTOIFINDEX)
    finally:
        probe.close()


def pack_unix(path: bytes | str) -> bytes:
    """Pack a path, or `@NAME` for the abstract namespace. Raises ValueError."""
    raw = os_text.encode(path)
    if raw.startswith(b"@"):
        raw = b"\0" + raw[1:]
        limit = _UNIX_PATH_MAX + 1  # an abstract name has no NUL at the end
    elif b"\0" in raw:
        raise ValueError("a path cannot contain a NUL")
    else:
        limit = _UNIX_PATH_MAX
    if raw in (b"", b"\0"):
        raise ValueError("empty path; expected /PATH or @NAME")
    if len(raw) > limit:
        raise ValueError(f"it doesn't fit in an AF_UNIX address of at most {limit} bytes")
    return _pack_sun_path(raw)


def _pack_sun_path(raw: bytes) -> bytes:
    terminated = raw and not raw.startswith(b"\0")
    return _head(AF_UNIX) + raw + (b"\0" if terminated else b"")


def pack_vsock(cid: int, port: int) -> bytes:
    """Pack an AF_VSOCK address; both numbers have 32 bits."""
    return (
        _head(AF_VSOCK)
        + bytes(2)
        + port.to_bytes(4, sys.byteorder)
        + cid.to_bytes(4, sys.byteorder)
        + bytes(4)
    )


def _head(kind: int) -> bytes:
    return kind.to_bytes(2, sys.byteorder)


# ── parts of a packed address ─────────────────────────────────────────────────────────────────────


def without_port(address: bytes) -> bytes:
    """Return the IP address of a packed one, IPv4-mapped as IPv4; b"" if it is of another kind."""
    inner = unmapped(address)
    return with_port(inner, 0) if family(inner) in (AF_INET, AF_INET6) else b""


def unmapped(address: bytes) -> bytes:
    """Return the IPv4 address inside an IPv4-mapped IPv6 one; any other address unchanged."""
    if family(address) == AF_INET6 and address[8:20] == _V4_MAPPED:
        return _head(AF_INET) + address[2:4] + address[20:24] + bytes(8)
    return address


def with_port(address: bytes, number: int) -> bytes:
    """Return an IPv4 or IPv6 `address` with another port."""
    return address[:2] + number.to_bytes(2, "big") + address[4:]


def host(address: bytes) -> bytes:
    """Return the 4 or 16 bytes of an IPv4 or IPv6 address."""
    return address[4:8] if family(address) == AF_INET else address[8:24]


def is_link_local(address: bytes) -> bool:
    """Tell whether an IPv6 `address` is in fe80::/10, RFC 4291 2.5.6."""
    return address[8] == 0xFE and address[9] & 0xC0 == 0x80


def with_scope(address: bytes, scope_id: int) -> bytes:
    """Return an IPv6 `address` with another scope."""
    return address[:24] + scope_id.to_bytes(4, sys.byteorder)


def unix_name(address: bytes) -> bytes:
    """Return the name of a UNIX `address`: path, NUL and abstract name, or b"" if unnamed."""
    raw = address[2:]
    return raw if raw.startswith(b"\0") else raw.partition(b"\0")[0]


def port(address: bytes) -> int:
    """Return the port; 0 for a UNIX address."""
    kind = family(address)
    if kind == AF_VSOCK:
        return int.from_bytes(address[4:8], sys.byteorder)
    if kind in (AF_INET, AF_INET6):
        return int.from_bytes(address[2:4], "big")
    return 0


def family(address: bytes) -> int:
    """Return the address family, an AF_ number."""
    return int.from_bytes(address[:2], sys.byteorder)


def _scope(address: bytes) -> int:
    return int.from_bytes(address[24:28], sys.byteorder)


def _cid(address: bytes) -> int:
    return int.from_bytes(address[8:12], sys.byteorder)
