"""The options: their defaults, their table, and the conversion of their arguments."""

import posix

from proxyd.errors import UsageError
from proxyd.target import Target

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

    from proxyd.bind import ListenAddress
    from proxyd.networks import Network
    from proxyd.source_address import SourceAddress

PROXY_V1, PROXY_V2 = 1, 2


class Options:
    """The settings of the command line, with their defaults.

    Time spans are in microseconds; None is infinity.
    """

    __slots__ = (
        "accept_proxy_protocol",
        "always_hand_over",
        "buffer_size",
        "connect_timeout",
        "connections_max",
        "connections_max_per_source",
        "crash_recovery",
        "drain_timeout",
        "exit_idle_time",
        "idle_timeout",
        "inspect",
        "listen",
        "log_addresses",
        "proxy_protocol",
        "settle_time",
        "source",
        "targets",
        "threads",
    )

    def __init__(self) -> None:
        self.accept_proxy_protocol: tuple[list[Network], bool] | None = None
        """Networks whose clients begin with a PROXY header, and whether UNIX clients do."""
        self.always_hand_over = False
        """Whether each new connection goes to the thread with the fewest connections."""
        self.buffer_size = 0
        """Capacity of a pipe per direction, in bytes; 0: automatic."""
        self.connect_timeout: int | None = 10_000_000
        self.connections_max = 256
        self.connections_max_per_source = 0
        """0: no limit."""
        self.crash_recovery = "tcp"
        """Which connections outlive a kill, if there is a store: "tcp", "all" or "no"."""
        self.drain_timeout: int | None = 0
        self.exit_idle_time: int | None = None
        self.idle_timeout: int | None = None
        self.inspect: str | None = None
        """Where the inspection socket is: a path, fd:NAME, or "" for none; None: by default."""
        self.listen: list[ListenAddress] = []
        self.log_addresses = True
        """Whether the log contains the addresses of clients."""
        self.proxy_protocol = 0
        """0: off; otherwise PROXY_V1 or PROXY_V2."""
        self.settle_time = 0
        self.source: SourceAddress | None = None
        """What sockets to targets are bound to; None: the kernel chooses."""
        self.targets: list[tuple[str | None, Target]] = []
        """(NAME, Target) pairs; a plain TARGET is the only one, with the name None."""
        self.threads = 1


class Option:
    """One row of the table of options."""

    __slots__ = ("convert", "explain", "long", "metavar", "short")

    def __init__(
        self,
        long: str,
        explain: str,
        convert: "Callable[[Options, str], None] | None" = None,
        metavar: str = "",
        short: str = "",
    ) -> None:
        self.long = long
        self.explain = explain
        """For --help; lines are separated by newlines."""
        self.convert = convert
        """Stores the argument in the Options; raises ValueError or UsageError for a bad one.
        None for an option without an argument, which only prints: --help, --version."""
        self.metavar = metavar
        self.short = short

    @property
    def allowed(self) -> str:
        """The permitted arguments, for the message about a bad one."""
        allowed = _ALLOWED.get(self.long) or _ALLOWED.get(self.metavar)
        return allowed or self.metavar.replace("|", " or ")


def milliseconds(usec: int | None) -> int | None:
    """Convert a span to ms, rounded up, so that only 0 becomes 0."""
    return None if usec is None else -(-usec // 1000)


# ── one function per option: reads the argument and stores it ─────────────────────────────────────


def _set_connections_max(options: Options, text: str) -> None:
    options.connections_max = _unsigned(text)
    if options.connections_max < 1:
        raise UsageError("Connection limit is too low.")


def _set_connections_max_per_source(options: Options, text: str) -> None:
    options.connections_max_per_source = _unsigned(text)
    if not 1 <= options.connections_max_per_source < 1 << 31:
        raise ValueError(text)


def _set_exit_idle_time(options: Options, text: str) -> None:
    options.exit_idle_time = _span(text)


def _set_proxy_protocol(options: Options, text: str) -> None:
    options.proxy_protocol = ("v1", "v2").index(text) + 1


def _add_accept_proxy_protocol(options: Options, text: str) -> None:
    from proxyd.networks import parse_networks

    try:
        networks, unix_clients = parse_networks(text)
    except ValueError as error:
        option = "--accept-proxy-protocol="
        raise UsageError(f"Failed to parse {option} argument: {text}: {error}") from None
    before, unix_before = options.accept_proxy_protocol or ([], False)
    options.accept_proxy_protocol = before + networks, unix_clients or unix_before


def _add_source(options: Options, text: str) -> None:
    from proxyd.source_address import SourceAddress

    options.source = options.source or SourceAddress()
    try:
        options.source.add(text)
    except ValueError as error:
        raise UsageError(f"Failed to parse --source= argument: {text}: {error}") from None


def _set_connect_timeout(options: Options, text: str) -> None:
    options.connect_timeout = _span(text)


def _set_settle_time(options: Options, text: str) -> None:
    span = _span(text)
    if span is None:
        raise UsageError("Settle time is too high, no client would ever be served.")
    options.settle_time = span


def _set_idle_timeout(options: Options, text: str) -> None:
    options.idle_timeout = _span(text)
    if options.idle_timeout == 0:
        raise UsageError("Idle timeout is too low, use infinity to switch it off.")


def _set_drain_timeout(options: Options, text: str) -> None:
    options.drain_timeout = _span(text)


def _add_listen(options: Options, text: str) -> None:
    from proxyd.bind import parse_listen

    try:
        options.listen.append(parse_listen(text))
    except ValueError as error:
        raise UsageError(f"Failed to parse --listen= argument: {text}: {error}") from None


def _set_inspect(options: Options, text: str) -> None:
    if text != "no" and not text.startswith("/") and not (text.startswith("fd:") and text[3:]):
        raise ValueError(text)
    options.inspect = "" if text == "no" else text


def _set_log_addresses(options: Options, text: str) -> None:
    options.log_addresses = ("no", "yes").index(text) == 1


def _set_threads(options: Options, text: str) -> None:
    options.threads = len(posix.sched_getaffinity(0)) if text == "auto" else _unsigned(text)
    if not 1 <= options.threads <= 1024:
        raise ValueError(text)


def _set_hand_over(options: Options, text: str) -> None:
    if text not in ("busy", "always"):
        raise ValueError(text)
    options.always_hand_over = text == "always"


def _set_crash_recovery(options: Options, text: str) -> None:
    if text not in ("tcp", "all", "no"):
        raise ValueError(text)
    options.crash_recovery = text


def _set_buffer_size(options: Options, text: str) -> None:
    if text == "auto":
        options.buffer_size = 0
        return
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper(), 1)
    options.buffer_size = _unsigned(text[:-1] if unit > 1 else text) * unit
    if not 4096 <= options.buffer_size < 1 << 31:  # a page; F_SETPIPE_SZ takes an int
        raise ValueError(text)


def _span(text: str) -> int | None:
    from proxyd import timespan

    return timespan.parse(text)


def _unsigned(text: str) -> int:
    """Read a number of 32 bits as systemd's safe_atou() does. Raises ValueError.

    That is strtoul(3) with base 0, plus the prefixes 0b and 0o: leading white space, a sign, 0x,
    and a leading 0 for octal are all allowed.
    """
    text = text.lstrip(" \t\n\r")
    base = {"0b": 2, "0o": 8}.get(text[:2].lower(), 0)
    text = (text[2:] if base else text).lstrip(" \t\n\v\f\r")
    sign = text[:1] if text[:1] in ("+", "-") else ""
    text = text.removeprefix(sign)
    if base == 0:
        base = 16 if text[:2].lower() == "0x" else 8 if text[:1] == "0" else 10
        text = text[2:] if base == 16 else text
    if not text or text.lower().strip("0123456789abcdef"[:base]):
        raise ValueError("not a number")
    number = int(text, base)
    if number >= 1 << 32 or (sign == "-" and number):
        raise ValueError("out of range")
    return number


# ── the table ─────────────────────────────────────────────────────────────────────────────────────

OPTIONS: tuple[Option, ...] = (
    Option(
        "connections-max",
        "Set the maximum number of connections",
        _set_connections_max,
        "N",
        "c",
    ),
    Option(
        "connections-max-per-source",
        "Set the maximum number of connections of one\n"
        "client: an address, an IPv6 /64, a user or a CID",
        _set_connections_max_per_source,
        "N",
    ),
    Option(
        "exit-idle-time",
        "Exit when without a connection for this duration.\n"
        "See the systemd.time(7) man page for the format",
        _set_exit_idle_time,
        "SPAN",
    ),
    Option(
        "proxy-protocol",
        "Send the client's address to the target, in a\nPROXY header",
        _set_proxy_protocol,
        "v1|v2",
    ),
    Option(
        "accept-proxy-protocol",
        "Expect a PROXY header from clients of these\n"
        "networks, with `unix` from UNIX clients, and\n"
        "take the client's address from it. May be given\n"
        "more than once",
        _add_accept_proxy_protocol,
        "NETWORK[,NETWORK...]",
    ),
    Option(
        "source",
        "Connect to TCP and UDP targets from this address\n"
        "or network interface, or from the address of the\n"
        "client. May be given more than once",
        _add_source,
        "ADDRESS[:PORT]|INTERFACE|client",
    ),
    Option(
        "connect-timeout",
        "Hold clients this long (10s) while the target\ncannot be reached; 0 for one attempt",
        _set_connect_timeout,
        "SPAN",
    ),
    Option(
        "settle-time",
        "Watch an unproven target for this long (0) before\nanything is sent to it",
        _set_settle_time,
        "SPAN",
    ),
    Option(
        "idle-timeout",
        "Close a connection that has moved no byte for this\nduration",
        _set_idle_timeout,
        "SPAN",
    ),
    Option(
        "drain-timeout",
        "Let open connections finish this long on SIGTERM",
        _set_drain_timeout,
        "SPAN",
    ),
    Option(
        "crash-recovery",
        "With a descriptor store, go on after a crash with\n"
        "connections over TCP, with all, or with none (tcp)",
        _set_crash_recovery,
        "tcp|all|no",
    ),
    Option(
        "listen",
        "Listen here as well: PORT, HOST:PORT, [V6]:PORT,\n"
        "/PATH, @NAME or vsock:CID:PORT; for datagrams\n"
        "udp:PORT, udp:HOST:PORT or unix-dgram:/PATH; with\n"
        "NAME= before it for NAME=TARGET. May be given more\n"
        "than once",
        _add_listen,
        "ADDRESS",
    ),
    Option(
        "threads",
        "Forward in up to this many threads (1), or auto:\none for each CPU",
        _set_threads,
        "N",
    ),
    Option(
        "hand-over",
        "Hand connections over to other threads when one is\nbusy, or always (busy)",
        _set_hand_over,
        "busy|always",
    ),
    Option(
        "buffer-size",
        "Buffer up to this much, such as 256K, for each\nconnection and direction (auto)",
        _set_buffer_size,
        "BYTES",
    ),
    Option(
        "inspect",
        "Answer Varlink calls, such as those of\nsocket-proxyctl, on this socket, or on none\n"
        "($RUNTIME_DIRECTORY/inspect)",
        _set_inspect,
        "PATH|fd:NAME|no",
    ),
    Option(
        "log-addresses",
        "Whether the log may contain the addresses of\nclients (yes)",
        _set_log_addresses,
        "yes|no",
    ),
    Option("help", "Show this help", short="h"),
    Option("version", "Show package version"),
)
"""All options, in the order of --help."""

_ALLOWED = {
    "BYTES": "a number of bytes from 4096 to 2047M, with K or M for KiB or MiB, or auto",
    "N": "a number from 1 to 1024, or auto",  # --connections-max= has a message of its own
    "crash-recovery": "tcp, all or no",
    "connections-max-per-source": "a number of connections from 1 to 2147483647",
    "inspect": "an absolute path, fd:NAME for an inherited socket, or no",
    "SPAN": "a time span, such as 90, 5min 20s or infinity",
    "settle-time": "a time span, such as 100ms or 2s",
}
"""The permitted arguments, by option, or by the placeholder in --help."""

ORIGINAL = ("connections-max", "exit-idle-time", "help", "version")
"""Those that the original has, too."""
