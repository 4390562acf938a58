"""TARGET: where connections are forwarded to."""

from proxyd import address as sockaddr
from proxyd.errors import UsageError

_DEFAULT_PORT = 80  # as in the original

# No host name and no address contains one of these; most often somebody forgot `unix:`.
_NOT_IN_HOSTS = "/=@[]*"

_IN_IPV6 = "0123456789abcdefABCDEF:."

_HOST_MAX = 255  # RFC 1035 2.3.4


class Target:
    """A TARGET of the command line.

    Literal addresses are packed here, once; names are left for the resolver.
    """

    __slots__ = ("address", "host", "scope", "service", "text")

    text: str
    """As it was given, without NAME=; for messages."""
    host: bytes | None
    """The name to look up, None for a literal address. Bytes, because getaddrinfo() of a str
    loads the IDNA codec, which takes longer than the rest of the start."""
    service: int | None
    """The TCP port; None for `*`, the port that the client connected to. 0 where the address is
    not a TCP one."""
    address: bytes | None
    """The packed address, None for a name. With `*` its port is 0."""
    scope: str
    """The interface of a link-local address, where it was given by its name; "" otherwise.
    `address` lacks it, for the same name may be another interface tomorrow."""

    def __init__(
        self,
        text: str,
        host: bytes | None,
        service: int | None,
        address: bytes | None,
        scope: str = "",
    ) -> None:
        self.text = text
        self.scope = scope
        self.host = host
        self.service = service
        self.address = address

    @property
    def any_port(self) -> bool:
        """Tell whether this is `HOST:*`."""
        return self.service is None

    def scoped(self) -> bytes:
        """Return `address` with the present index of `scope`. Raises OSError."""
        return sockaddr.with_scope(self.address or b"", sockaddr.interface_index(self.scope))


def parse_target(text: str) -> Target:
    """Read a TARGET without NAME=. Raises UsageError."""
    try:
        return _parse(text)
    except ValueError as error:
        raise UsageError(f"Failed to parse target '{text}': {error}") from None


def _parse(text: str) -> Target:
    local = sockaddr.parse_local(text)
    if local is not None:
        if sockaddr.family(local) == sockaddr.AF_VSOCK and text.startswith("vsock::"):
            raise ValueError("expected vsock:CID:PORT")
        return Target(text, None, 0, local)
    if text in ("unix:", "vsock:"):
        raise ValueError("expected " + ("unix:PATH" if text == "unix:" else "vsock:CID:PORT"))
    host, service = sockaddr.split_host(text)
    if not host:
        raise ValueError("no host; expected HOST:PORT")
    port = _parse_service(service)
    try:
        literal, scope = sockaddr.split_scope(host) if ":" in host else (host, "")
        if scope and not sockaddr.is_index(scope):
            return Target(text, None, port, sockaddr.pack_inet6(literal, port or 0), scope)
        return Target(text, None, port, sockaddr.pack_inet(host, port or 0))
    except ValueError as error:
        if ":" in host:
            raise ValueError(_why_no_address(host, error)) from None
        return Target(text, _encode(host), port, None)


def _why_no_address(host: str, error: ValueError) -> str:
    if "::" in host or "%" in host or not host.strip(_IN_IPV6):
        return f"{error}; write IPv6 addresses as [ADDRESS]:PORT"
    return f"'{host}' is neither a host name nor an IPv6 address; expected HOST:PORT"


def _parse_service(service: str | None) -> int | None:
    """Return the port number, None for `*`. Raises ValueError."""
    if service is None:
        return _DEFAULT_PORT
    if service == "*":
        return None
    if not service:
        raise ValueError("no port; expected HOST:PORT")
    if service.isdigit():
        return sockaddr.parse_port(service)
    import _socket

    try:
        return sockaddr.parse_port(str(_socket.getservbyname(service, "tcp")))
    except (OSError, ValueError):
        raise ValueError(f"'{service}' is not a port number, nor a TCP service") from None


def looks_like_a_port(target: Target) -> bool:
    """Tell whether somebody has most likely forgotten the host: 8080 is port 80 of a host 8080."""
    return target.text.isascii() and target.text.isdigit()


def _encode(host: str) -> bytes:
    """Return the host name as the resolver wants it. Raises ValueError."""
    if len(host) <= _HOST_MAX and not any(map(_never_in_host, host)):
        try:
            return host.encode("ascii" if host.isascii() else "idna")
        except UnicodeError:
            pass
    hint = "; a path begins with a slash, or with unix:" if "/" in host else ""
    raise ValueError(f"'{host}' is not a host name{hint}")


def _never_in_host(char: str) -> bool:
    return char in _NOT_IN_HOSTS or char.isspace() or not char.isprintable()
