"""TARGET: where connections are forwarded to."""

from proxyd import address as sockaddr
from proxyd.errors import UsageError

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd.lookup import Interface, Lookup
    from proxyd.resolver import Resolver

_DEFAULT_PORT = 80  # as in the original

# No host name and no address contains any of these; usually `unix:` was forgotten.
_NOT_IN_HOSTS = "/=@[]*"

_IN_IPV6 = "0123456789abcdefABCDEF:."

_HOST_MAX = 255  # RFC 1035 2.3.4


class Target:
    """A TARGET of the command line.

    A literal address is packed here, once; a name is left to the resolver.
    """

    __slots__ = ("address", "host", "index", "scope", "service", "text")

    text: str
    """As given, without NAME=; for messages."""
    host: bytes | None
    """The name to look up; None for a literal address. Bytes, because getaddrinfo() of a str loads
    the IDNA codec, which takes longer than the rest of the start."""
    service: int | None
    """The TCP port; None for `*`, the port that the client connected to; 0 if the address is not a
    TCP address."""
    address: bytes | None
    """The packed address; None for a name. With `*`, its port is 0."""
    scope: str
    """The interface of a link-local address, if given by name; "" otherwise. `address` lacks it,
    because the index of that interface may change."""

    def __init__(
        self,
        text: str,
        host: bytes | None,
        service: int | None,
        address: bytes | None,
        scope: str = "",
    ) -> None:
        self.text = text
        self.index = 0
        """Under which the relay counts its connections; set by the server."""
        self.scope = scope
        self.host = host
        self.service = service
        self.address = address

    @property
    def any_port(self) -> bool:
        """Tell whether this is `HOST:*`."""
        return self.service is None


def split_pair(text: str) -> tuple[str | None, str]:
    """Split NAME=REST; without a valid NAME, the name is None and REST all of `text`."""
    name, equals, rest = text.partition("=")
    return (name, rest) if equals and valid_name(name) else (None, text)


def valid_name(text: str) -> bool:
    """Tell whether `text` can be the NAME of NAME=TARGET or --listen=NAME=ADDRESS.

    By this rule no TARGET that contains an equals sign, such as /run/a=b, looks like a pair.
    """
    return bool(text) and text[0] not in "/@[" and ":" not in text and "=" not in text


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
    """Tell whether the host was probably forgotten: 8080 means port 80 of a host called 8080."""
    return target.text.isascii() and target.text.isdigit()


def _encode(host: str) -> bytes:
    """Encode a host name for the resolver. Raises ValueError."""
    if len(host) <= _HOST_MAX and not any(map(_never_in_host, host)):
        try:
            return host.encode("ascii" if host.isascii() else "idna")
        except UnicodeError:
            pass
    hint = "; a path begins with a slash, or with unix:" if "/" in host else ""
    raise ValueError(f"'{host}' is not a host name{hint}")


def _never_in_host(char: str) -> bool:
    return char in _NOT_IN_HOSTS or char.isspace() or not char.isprintable()


# ── the addresses of a target ─────────────────────────────────────────────────────────────────────


def address_source(
    target: Target, port: int, resolver: "Resolver | None"
) -> "Literal | Interface | Lookup":
    """Return what knows where to connect to; `port` is for `HOST:*`."""
    if target.host is not None and resolver is not None:
        from proxyd.lookup import Lookup

        return Lookup(target.host, port, resolver)
    address = target.address or b""
    if target.any_port or target.scope:
        address = sockaddr.with_port(address, port)
    if target.scope:
        from proxyd.lookup import Interface

        return Interface(address, target.scope, target.text)
    return Literal(address)


class Literal:
    """A literal address, with the interface of a Lookup (lookup.py): nothing is looked up."""

    __slots__ = ("fixed", "only")

    failure = ""
    late_ms = None
    pause_ms = 0
    several = looking = temporary = False

    def __init__(self, address: bytes) -> None:
        self.fixed = self.only = address

    def prompt(self, _now_ms: int) -> bytes:
        """See Lookup."""
        return self.fixed

    def addresses(self, _now_ms: int) -> list[bytes]:
        """See Lookup."""
        return [self.fixed]

    def succeeded(self, address: bytes, prompt: bool) -> None:
        """See Lookup."""

    def failed(self) -> None:
        """See Lookup."""
