"""TARGET: where connections and datagrams are forwarded to."""

from proxyd import address as sockaddr
from proxyd.errors import UsageError

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd.lookup import Interface, Lookup
    from proxyd.resolver import Resolver
    from proxyd.source_address import SourceAddress

_DEFAULT_PORT = 80  # as in the original

# No host name and no address contains any of these; usually `unix:` was forgotten.
_NOT_IN_HOSTS = "/=@[]*"

_IN_IPV6 = "0123456789abcdefABCDEF:."

_HOST_MAX = 255  # RFC 1035 2.3.4


class Target:
    """A TARGET of the command line.

    A literal address is packed here, once; a name is left to the resolver.
    """

    __slots__ = (
        "_for_datagrams",
        "address",
        "datagram",
        "host",
        "index",
        "scope",
        "service",
        "source",
        "text",
        "where",
    )

    text: str
    """As given, without NAME=; for messages."""
    host: bytes | None
    """The name to look up; None for a literal address. Bytes, because getaddrinfo() of a str loads
    the IDNA codec, which takes longer than the rest of the start."""
    service: int | None
    """The port; None for `*`, the port that the client connected to; 0 if the address has none."""
    address: bytes | None
    """The packed address; None for a name. With `*`, its port is 0."""
    scope: str
    """The interface of a link-local address, if given by name; "" otherwise. `address` lacks it,
    because the index of that interface may change."""

    def __init__(  # noqa: PLR0913 - the parts of the text
        self,
        text: str,
        host: bytes | None,
        service: int | None,
        address: bytes | None,
        scope: str = "",
        *,
        datagram: bool = False,
        where: str = "",
    ) -> None:
        self.text = text
        self.where = where or text
        """`text` without `udp:` or `unix-dgram:`."""
        self.datagram = datagram
        """Whether it is for datagrams; if not, for_datagrams() is."""
        self._for_datagrams: Target | None = None
        self.index = 0
        """Under which the relay counts its connections; set by the server."""
        self.source: SourceAddress | None = None
        """What sockets to it are bound to; None: the kernel chooses. Set by the server."""
        self.scope = scope
        self.host = host
        self.service = service
        self.address = address

    @property
    def any_port(self) -> bool:
        """Tell whether this is `HOST:*`."""
        return self.service is None

    def for_datagrams(self) -> "Target":
        """Return the same target for a listener of datagrams. Raises UsageError."""
        if self.datagram:
            return self
        if self._for_datagrams is None:
            self._for_datagrams = _parse_or_explain(self.text, datagram=True)
        return self._for_datagrams


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
    """Read a TARGET without NAME=. Raises UsageError.

    It is for streams, unless it says that it is for datagrams, or names a service of UDP only.
    """
    return _parse_or_explain(text, datagram=False)


def _parse_or_explain(text: str, *, datagram: bool) -> Target:
    try:
        return _parse_words(text) or _parse(text, text, datagram=datagram)
    except ValueError as error:
        raise UsageError(f"Failed to parse target '{text}': {error}") from None


def _parse_words(text: str) -> Target | None:
    """Read `udp:HOST:PORT` or `unix-dgram:PATH`; None if `text` is neither. Raises ValueError.

    `udp:53` remains port 53 of a host called udp, as in the original.
    """
    kind, _, rest = text.partition(":")
    if kind == "unix-dgram" and (not rest or "/" in rest or rest.startswith("@")):
        if not rest.startswith(("/", "@")):
            raise ValueError("expected unix-dgram:/PATH or unix-dgram:@NAME")
        return _parse(text, rest, datagram=True)
    if kind != "udp" or ":" not in rest or rest.startswith("//"):
        return None
    target = _parse(text, rest, datagram=True)
    if target.host is None and not _is_inet(target):
        raise ValueError("expected udp:HOST:PORT")
    if rest.endswith("]"):
        raise ValueError("no port; expected udp:[ADDRESS]:PORT")
    return target


def _is_inet(target: Target) -> bool:
    family = sockaddr.family(target.address or b"")
    return family in (sockaddr.AF_INET, sockaddr.AF_INET6)


def _parse(text: str, where: str, *, datagram: bool) -> Target:
    """Read the address `where` of the target `text`. Raises ValueError."""
    local = sockaddr.parse_local(where)
    if local is not None:
        if sockaddr.family(local) == sockaddr.AF_VSOCK and where.startswith("vsock::"):
            raise ValueError("expected vsock:CID:PORT")
        if sockaddr.family(local) == sockaddr.AF_VSOCK and datagram:
            raise ValueError("datagrams cannot be sent to a VSOCK address")
        return Target(text, None, 0, local, datagram=datagram, where=where)
    if where in ("unix:", "vsock:"):
        raise ValueError("expected " + ("unix:PATH" if where == "unix:" else "vsock:CID:PORT"))
    host, service = sockaddr.split_host(where)
    if not host:
        raise ValueError("no host; expected HOST:PORT")
    port, datagram = _parse_service(service, datagram)
    try:
        literal, scope = sockaddr.split_scope(host) if ":" in host else (host, "")
        if scope and not sockaddr.is_index(scope):
            packed = sockaddr.pack_inet6(literal, port or 0)
        else:
            packed, scope = sockaddr.pack_inet(host, port or 0), ""
        return Target(text, None, port, packed, scope, datagram=datagram, where=where)
    except ValueError as error:
        if ":" in host:
            raise ValueError(_why_no_address(host, error)) from None
        return Target(text, _encode(host), port, None, datagram=datagram, where=where)


def _why_no_address(host: str, error: ValueError) -> str:
    if "::" in host or "%" in host or not host.strip(_IN_IPV6):
        return f"{error}; write IPv6 addresses as [ADDRESS]:PORT"
    return f"'{host}' is neither a host name nor an IPv6 address; expected HOST:PORT"


def _parse_service(service: str | None, datagram: bool) -> tuple[int | None, bool]:
    """Return the port number, None for `*`, and whether it is for datagrams. Raises ValueError."""
    if service is None:
        return _DEFAULT_PORT, datagram
    if service == "*":
        return None, datagram
    if not service:
        raise ValueError("no port; expected HOST:PORT")
    if service.isdigit():
        return sockaddr.parse_port(service), datagram
    number = _service_port(service, "udp" if datagram else "tcp")
    if number:
        return number, datagram
    number = _service_port(service, "udp")
    if not number:
        kind = "UDP" if datagram else "TCP"
        raise ValueError(f"'{service}' is not a port number, nor a {kind} service")
    return number, True


def _service_port(name: str, protocol: str) -> int:
    """Return the port of a service in services(5), 0 if it is not there."""
    import _socket

    try:
        return sockaddr.parse_port(str(_socket.getservbyname(name, protocol)))
    except (OSError, ValueError):
        return 0


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
