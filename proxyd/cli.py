"""The command line: argv -> Options, and main().

Options are parsed as getopt_long(3) does it, message by message, because that is what the
original uses. argparse is not: it differs in a dozen details, and importing it takes longer than
the rest of the start.
"""

import errno
import os
import sys
from _collections_abc import Callable, Iterator

from proxyd import log
from proxyd.activation import inherited, on_standard_fds, reject_mixture
from proxyd.errors import UsageError, reason
from proxyd.listen import ListenAddress, Listener, close_listener, open_listener
from proxyd.names import list_names, match_targets, split_pair
from proxyd.target import Target, looks_like_a_port, parse_target

PROXY_V1, PROXY_V2 = 1, 2


class Options:
    """What the command line says, with the defaults for what it does not say.

    Time spans are microseconds, None is infinity.
    """

    __slots__ = (
        "always_hand_over",
        "buffer_size",
        "connect_timeout",
        "connections_max",
        "drain_timeout",
        "exit_idle_time",
        "idle_timeout",
        "listen",
        "proxy_protocol",
        "settle_time",
        "targets",
        "threads",
    )

    def __init__(self) -> None:
        self.always_hand_over = False
        """Whether every new connection goes to the thread that has the fewest."""
        self.buffer_size = 0
        """Bytes that a pipe may hold per direction; 0 = automatic."""
        self.connect_timeout: int | None = 10_000_000
        self.connections_max = 256
        self.drain_timeout: int | None = 0
        self.exit_idle_time: int | None = None
        self.idle_timeout: int | None = None
        self.listen: list[ListenAddress] = []
        self.proxy_protocol = 0
        """0 = off, or PROXY_V1 or PROXY_V2."""
        self.settle_time = 0
        self.targets: list[tuple[str | None, Target]] = []
        """NAME and Target; a plain TARGET is the only one, with the name None."""
        self.threads = 1


class Option:
    """One row of the table of options."""

    __slots__ = ("convert", "explain", "long", "metavar", "short")

    def __init__(
        self,
        long: str,
        explain: str,
        convert: Callable[[Options, str], None] | None = None,
        metavar: str = "",
        short: str = "",
    ) -> None:
        self.long = long
        self.explain = explain
        """For --help, lines separated by newlines."""
        self.convert = convert
        """Stores the argument in the Options; ValueError and UsageError tell that it is bad.
        None for an option without argument, which _run_at_once() knows."""
        self.metavar = metavar
        self.short = short

    @property
    def allowed(self) -> str:
        """What the argument may be, for the message about one that it may not be."""
        allowed = _ALLOWED.get(self.long) or _ALLOWED.get(self.metavar)
        return allowed or self.metavar.replace("|", " or ")


def parse_args(argv: list[str]) -> Options | Option:
    """Read the command line, `argv[0]` being the program.

    Returns the option itself if it was one that only prints: --help, --version. As in the
    original, what follows it is not even looked at. Raises UsageError.
    """
    options = Options()
    operands: list[str] = []
    for option, argument in _getopt(argv, operands):
        if option.convert is None:
            return option
        try:
            option.convert(options, argument)
        except ValueError:
            raise UsageError(_not_allowed(option, argument)) from None
    options.targets = _parse_operands(operands)
    return options


def _not_allowed(option: Option, argument: str) -> str:
    """The message of the original, word for word where it has the option."""
    text = f"Failed to parse --{option.long}= argument: {argument}"
    return text if option.long in _ORIGINAL else f"{text}: expected {option.allowed}"


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    _open_standard_fds()
    log.setup(os.environ)
    try:
        return _run_or_say_why(sys.argv if argv is None else argv)
    finally:
        log.finish()


def _run_or_say_why(argv: list[str]) -> int:
    try:
        return _run(argv)
    except UsageError as error:
        log.error(str(error))
    except OSError as error:
        log.error(f"Failed: {reason(error)}")
    except ImportError as error:  # most often no fd or no memory left to load the relay with
        log.error(f"Failed to start: {error}")
    except MemoryError:
        log.error("Out of memory.")
    except Exception as error:  # noqa: BLE001 - our own fault, and still one line
        _log_our_fault(error)
    return 1


def _log_our_fault(error: Exception) -> None:
    """Log an error that nobody has foreseen, in one line; at debug level with all of its trace."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if trace is not None:
        code = trace.tb_frame.f_code
        where = f" in {code.co_name}, {os.path.basename(code.co_filename)}:{trace.tb_lineno}"
    log.error(f"Internal error{where}: {type(error).__name__}: {error}")
    if log.enabled(log.DEBUG):
        import traceback

        for line in traceback.format_exception(error):
            log.debug(line.rstrip())


def _run(argv: list[str]) -> int:
    options = parse_args(argv)
    if isinstance(options, Option):
        return _print(_version() if options.long == "version" else _help())
    by_name = any(name is not None for name, _ in options.targets)
    passed = {name: os.environ.get(name, "") for name in ("LISTEN_FDS", "LISTEN_PID")}
    listeners = inherited(os.environ, os.getpid(), by_name=by_name)
    try:
        _open_all(options.listen, listeners)
        if not listeners:
            log.error("Didn't get any sockets passed in.")
            log.error(_why_no_sockets(options, passed))
            return 1
        reject_mixture(listeners)
        _assign_targets(options, listeners)
        from proxyd import server  # only now: it is the most to import

        return server.run(options, listeners, os.environ)
    finally:
        for listener in listeners:
            close_listener(listener)


def _why_no_sockets(options: Options, passed: dict[str, str]) -> str:
    """Return what has most likely gone wrong. `passed`: what the environment said of sockets."""
    (_, target), *_ = options.targets
    if target.text in ("help", "version"):
        return f"'{target.text}' was taken for the target: did you mean --{target.text}?"
    setting = on_standard_fds()
    if setting:
        return f"{setting} passes the socket where it is not expected: remove it from the unit."
    if passed["LISTEN_FDS"] and passed["LISTEN_PID"] == str(os.getpid()):
        return "LISTEN_PIDFDID tells that they were passed to an earlier process of the same id."
    if passed["LISTEN_FDS"] and passed["LISTEN_PID"]:
        return (
            f"They were passed to process {passed['LISTEN_PID']}, which is another one: "
            "a shell or wrapper has to exec this program."
        )
    if passed["LISTEN_FDS"]:
        return f"LISTEN_FDS={passed['LISTEN_FDS']} is set, but LISTEN_PID, the process id, is not."
    return "Start this from a .socket unit, or let it listen itself with --listen=."


def _open_all(wanted: list[ListenAddress], listeners: list[Listener]) -> None:
    """Open what --listen= asks for and append it to `listeners`. Raises UsageError."""
    for where in wanted:
        try:
            listeners.append(open_listener(where))
        except OSError as error:
            raise UsageError(f"Failed to listen on {where.text}: {reason(error)}") from None


def _assign_targets(options: Options, listeners: list[Listener]) -> None:
    """Tell each listener its target. Raises UsageError."""
    targets, unused = match_targets(options.targets, listeners)
    for listener, target in zip(listeners, targets, strict=True):
        listener.target = target
    names = list_names(listener.name for listener in listeners)
    for name in unused:
        log.warning(
            f"No listener has the name '{name}', its target is not used. Listeners: {names}."
        )
    for target in dict.fromkeys(targets):
        if looks_like_a_port(target):
            port = target.text
            log.warning(
                f"Target {port} is a host, of which port 80 is used: "
                f"for port {port} of this machine write localhost:{port}."
            )


def _open_standard_fds() -> None:
    """Open /dev/null in place of a closed stdin, stdout or stderr.

    Otherwise the next socket would get its number, and the log lines meant for stderr.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                continue  # it is open
            try:
                os.open("/dev/null", os.O_RDWR)  # the lowest free number, which is fd
            except OSError:  # pragma: no cover - no /dev/null: `faults` has it
                return


def _parse_operands(operands: list[str]) -> list[tuple[str | None, Target]]:
    """Read one TARGET, or NAME=TARGET pairs. Raises UsageError."""
    if not operands:
        raise UsageError("Not enough parameters.")
    pairs = [split_pair(operand) for operand in operands]
    if len(pairs) > 1 and any(name is None for name, _ in pairs):
        raise UsageError("Too many parameters.")
    seen: set[str | None] = set()
    for name, _ in pairs:
        if name in seen:
            raise UsageError(f"There is more than one target for '{name}'.")
        seen.add(name)
    return [(name, parse_target(text)) for name, text in pairs]


# What follows is getopt_long(3).


def _getopt(argv: list[str], operands: list[str]) -> Iterator[tuple[Option, str]]:
    """Yield each option with its argument; append what is not an option to `operands`.

    The messages, and argv[0] before them, are those of glibc. Raises UsageError.
    """
    program = argv[0] if argv else ""
    rest = iter(argv[1:])
    for word in rest:
        if word == "--":
            break
        if word.startswith("--"):
            yield _long_option(program, word[2:], rest)
        elif word.startswith("-") and word != "-":
            yield from _short_options(program, word[1:], rest)
        else:
            operands.append(word)
            if "POSIXLY_CORRECT" in os.environ:
                break
    operands.extend(rest)


def _long_option(program: str, word: str, rest: Iterator[str]) -> tuple[Option, str]:
    """Read `word`, NAME or NAME=ARGUMENT, taking the argument from `rest` if need be."""
    name, equals, argument = word.partition("=")
    option = _find_long(program, word, name)
    if option.convert is None:
        if equals:
            raise UsageError(f"{program}: option '--{option.long}' doesn't allow an argument")
        return option, ""
    if equals:
        return option, argument
    for argument in rest:
        return option, argument
    raise UsageError(f"{program}: option '--{option.long}' requires an argument")


def _find_long(program: str, word: str, name: str) -> Option:
    """Find the option called `name`, or the only one that begins with it."""
    for option in OPTIONS:
        if option.long == name:
            return option
    candidates = [option for option in OPTIONS if option.long.startswith(name)]
    # What is unique among the original's options keeps its meaning: --conn, --connect.
    originals = [option for option in candidates if option.long in _ORIGINAL]
    if len(candidates) == 1 or len(originals) == 1:
        return (originals or candidates)[0]
    if not candidates:
        raise UsageError(f"{program}: unrecognized option '--{word}'")
    possibilities = " ".join(f"'--{option.long}'" for option in candidates)
    raise UsageError(f"{program}: option '--{word}' is ambiguous; possibilities: {possibilities}")


def _short_options(program: str, word: str, rest: Iterator[str]) -> Iterator[tuple[Option, str]]:
    """Read a cluster such as `hc5`, taking an argument from `rest` if need be."""
    for at, char in enumerate(word, 1):
        option = next((option for option in OPTIONS if option.short == char), None)
        if option is None:
            raise UsageError(f"{program}: invalid option -- '{char}'")
        if option.convert is None:
            yield option, ""
            continue  # pragma: no cover - the one such option, -h, has ended the program
        argument = word[at:] or next(rest, None)
        if argument is None:
            raise UsageError(f"{program}: option requires an argument -- '{char}'")
        yield option, argument
        return


# One function per option: it reads the argument and stores it.


def _set_connections_max(options: Options, text: str) -> None:
    options.connections_max = _unsigned(text)
    if options.connections_max < 1:
        raise UsageError("Connection limit is too low.")


def _set_exit_idle_time(options: Options, text: str) -> None:
    options.exit_idle_time = _span(text)


def _set_proxy_protocol(options: Options, text: str) -> None:
    options.proxy_protocol = ("v1", "v2").index(text) + 1


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
    from proxyd.listen import parse_listen

    try:
        options.listen.append(parse_listen(text))
    except ValueError as error:
        raise UsageError(f"Failed to parse --listen= argument: {text}: {error}") from None


def _set_threads(options: Options, text: str) -> None:
    options.threads = len(os.sched_getaffinity(0)) if text == "auto" else _unsigned(text)
    if not 1 <= options.threads <= 1024:
        raise ValueError(text)


def _set_hand_over(options: Options, text: str) -> None:
    if text not in ("busy", "always"):
        raise ValueError(text)
    options.always_hand_over = text == "always"


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

    That is strtoul(3) with base 0, plus the prefixes 0b and 0o: white space before it, a sign, a
    leading 0 for octal and 0x are all allowed.
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


OPTIONS: tuple[Option, ...] = (
    Option(
        "connections-max",
        "Set the maximum number of connections",
        _set_connections_max,
        "N",
        "c",
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
        "Tell the target who calls, in a PROXY header",
        _set_proxy_protocol,
        "v1|v2",
    ),
    Option(
        "connect-timeout",
        "Hold clients this long (10s) while the target\ncannot be reached; 0 for one attempt",
        _set_connect_timeout,
        "SPAN",
    ),
    Option(
        "settle-time",
        "Watch a target that is not proven for this long (0)\nbefore anything is sent to it",
        _set_settle_time,
        "SPAN",
    ),
    Option(
        "idle-timeout",
        "Close a connection over which nothing has moved\nfor this duration",
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
        "listen",
        "Listen here as well: PORT, HOST:PORT, [V6]:PORT,\n"
        "/PATH, @NAME or vsock:CID:PORT; with NAME= before\n"
        "it for NAME=TARGET. May be given more than once",
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
        "Hand connections to other threads when one is busy,\nor always (busy)",
        _set_hand_over,
        "busy|always",
    ),
    Option(
        "buffer-size",
        "Let this much, such as 256K, be under way per\nconnection and direction (auto)",
        _set_buffer_size,
        "BYTES",
    ),
    Option("help", "Show this help", short="h"),
    Option("version", "Show package version"),
)
"""The options that are accepted, in the order of --help."""

_ALLOWED = {
    "BYTES": "a number of bytes from 4096 to 2047M, with K or M for KiB or MiB, or auto",
    "N": "a number from 1 to 1024, or auto",  # of threads: --connections-max= has its own words
    "SPAN": "a time span, such as 90, 5min 20s or infinity",
    "settle-time": "a time span, such as 100ms or 2s",
}
"""What an argument may be, by the option or the word that stands for the argument in --help."""

_ORIGINAL = ("connections-max", "exit-idle-time", "help", "version")

_USAGE = """\
systemd-socket-proxyd [OPTIONS...] HOST:PORT
systemd-socket-proxyd [OPTIONS...] SOCKET
systemd-socket-proxyd [OPTIONS...] NAME=TARGET...

Bidirectionally proxy local sockets to another (possibly remote) socket.

"""


def _help() -> str:
    lines = [_USAGE]
    for option in OPTIONS:
        short = f"-{option.short}" if option.short else "  "
        long = f"--{option.long}={option.metavar}" if option.convert else f"--{option.long}"
        head = f"  {short} {long}"
        for text in option.explain.split("\n"):
            lines.append(f"{head:<29}{text}\n")
            head = ""
    lines.append("\nSee the systemd-socket-proxyd(1) man page for details.\n")
    return "".join(lines)


def _version() -> str:
    from proxyd import __version__

    return f"systemd-socket-proxyd {__version__}\n"


def _print(text: str) -> int:
    """Write to stdout; return the exit status."""
    if sys.stdout is None:  # it was closed, and is /dev/null by now
        raise UsageError("Failed to write to standard output: it is closed")
    data = text.encode()
    try:
        while data:
            data = data[os.write(1, data) :]
    except BrokenPipeError:
        pass  # the reader has seen enough
    except OSError as error:
        raise UsageError(f"Failed to write to standard output: {reason(error)}") from None
    return 0
