"""The command: prepares the process and its listeners, and runs the server.

Whatever goes wrong becomes one line on stderr, and an exit status.
"""

import errno
import posix
import sys

from proxyd import log, os_text
from proxyd.activation import (
    PAGES_NAME,
    PARCEL_NAME,
    inherited,
    on_standard_fds,
    reject_mixture,
)
from proxyd.command_line import parse_args
from proxyd.errors import UsageError, reason
from proxyd.listen import Listener, close_listener, list_names, match_targets
from proxyd.options import OPTIONS, PROXY_V1, Option, Options
from proxyd.peers import log_addresses
from proxyd.target import looks_like_a_port

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from typing import NoReturn, TypeVar

    from proxyd.bind import ListenAddress
    from proxyd.continuity.parcel import Parcel
    from proxyd.continuity.root import Root

    Left = TypeVar("Left", Parcel, Root)

_USAGE = """\
systemd-socket-proxyd [OPTIONS...] HOST:PORT
systemd-socket-proxyd [OPTIONS...] SOCKET
systemd-socket-proxyd [OPTIONS...] NAME=TARGET...

Bidirectionally proxy local sockets to another (possibly remote) socket.

"""

_HELP_INDENT = 29
"""The column in which --help explains an option."""


def run() -> "NoReturn":
    """Run the program as the command, and end the process.

    Nothing is left to be flushed then, and tidying the interpreter up takes 2 ms; but a tool that
    measures or profiles may have registered something to be called. With PYTHONINSPECT, sys.exit()
    would start the interactive interpreter.
    """
    import atexit

    status = main()
    if sys.flags.inspect or not atexit._ncallbacks():
        posix._exit(status)
    sys.exit(status)


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    _open_standard_fds()
    environ = os_text.environ()
    log.setup(environ)
    try:
        return _run_or_explain(sys.argv if argv is None else argv, environ)
    finally:
        log.finish()


def _open_standard_fds() -> None:
    """Open /dev/null in place of a closed stdin, stdout or stderr.

    Otherwise the next socket would get its number, and with 2 the lines meant for stderr.
    """
    for fd in range(3):
        try:
            posix.fstat(fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                continue  # it is open
            try:
                posix.open("/dev/null", posix.O_RDWR)  # the lowest free number, which is fd
            except OSError:  # pragma: no cover - no /dev/null: `ci/test faults` has it
                return


def _run_or_explain(argv: list[str], environ: dict[str, str]) -> int:
    try:
        return _run(argv, environ)
    except UsageError as error:
        log.error(str(error))
    except OSError as error:
        log.error(f"Failed: {reason(error)}")
    except ImportError as error:  # usually no fd or memory is left to load the relay
        log.error(f"Failed to start: {error}")
    except MemoryError:
        log.error("Out of memory.")
    except Exception as error:  # noqa: BLE001 - a bug of ours is one line, too
        _log_internal_error(error)
    return 1


def _run(argv: list[str], environ: dict[str, str]) -> int:
    options = parse_args(argv)
    if isinstance(options, Option):
        return _print(_version() if options.long == "version" else _help())
    by_name = any(name is not None for name, _ in options.targets)
    passed = {name: environ.get(name, "") for name in ("LISTEN_FDS", "LISTEN_PID")}
    log_addresses(wanted=options.log_addresses)
    stored: dict[str, list[int]] = {}
    listeners = inherited(environ, posix.getpid(), by_name=by_name, stored=stored)
    parcel = _take_parcel(environ, stored.get(PARCEL_NAME, []))
    root = _find_root(environ, stored.get(PAGES_NAME, []))
    entrance: Listener | None = None
    try:
        if options.inspect is not None and options.inspect.startswith("fd:"):
            entrance = _take_entrance(options.inspect[3:], listeners)
        _open_all(options.listen, listeners, parcel)
        if not listeners:
            log.error("Didn't get any sockets passed in.")
            log.error(_why_no_sockets(options, passed))
            return 1
        reject_mixture(listeners)
        _assign_targets(options, listeners)
        entrance = _open_entrance(options, listeners, entrance, environ)
        from proxyd import server  # late: importing it takes longest

        taken = [name for name in stored if name != PAGES_NAME or root is None]  # root stays there
        return server.run(options, listeners, environ, entrance, parcel, root, stored=taken)
    finally:
        if root is not None:
            root.close()
        if parcel is not None:
            parcel.close()
        for listener in [*listeners, *([entrance] if entrance is not None else [])]:
            close_listener(listener)


def _take_parcel(environ: dict[str, str], stored: list[int]) -> "Parcel | None":
    """Take what an earlier process has left: in the store, or this process at a reload."""
    where = environ.pop("PROXYD_PARCEL", None)
    if where is None and not stored:
        return None
    from proxyd.continuity.parcel import inherited as inherited_parcel
    from proxyd.continuity.parcel import receive_or_warn

    found = inherited_parcel(where, posix.getpid()) if where is not None else None
    return _first(found, [receive_or_warn(fd) for fd in stored])


def _find_root(environ: dict[str, str], stored: list[int]) -> "Root | None":
    """Find what there is in case that the last process was killed; at a reload this one has it."""
    where = environ.pop("PROXYD_PAGES", None)
    if where is None and not stored:
        return None
    from proxyd.continuity.root import inherited as inherited_root
    from proxyd.continuity.root import stored as stored_root

    found = inherited_root(where, posix.getpid()) if where is not None else None
    return _first(found, [stored_root(fd) for fd in stored])


def _first(one: "Left | None", others: "list[Left | None]") -> "Left | None":
    """Return the first that there is, and close the others."""
    for other in others:
        if one is None:
            one = other
        elif other is not None:
            other.close()
    return one


def _print(text: str) -> int:
    """Write to stdout; return the exit status."""
    if sys.stdout is None:  # it was closed, and is /dev/null now
        raise UsageError("Failed to write to standard output: it is closed")
    data = text.encode()
    try:
        while data:
            data = data[posix.write(1, data) :]
    except BrokenPipeError:
        pass  # a reader such as head(1) has seen enough
    except OSError as error:
        raise UsageError(f"Failed to write to standard output: {reason(error)}") from None
    return 0


def _version() -> str:
    from proxyd import __version__

    return f"systemd-socket-proxyd {__version__}\n"


def _help() -> str:
    lines = [_USAGE]
    for option in OPTIONS:
        short = f"-{option.short}" if option.short else "  "
        long = f"--{option.long}={option.metavar}" if option.convert else f"--{option.long}"
        head = f"  {short} {long}"
        if len(head) >= _HELP_INDENT:
            lines.append(f"{head}\n")
            head = ""
        for text in option.explain.split("\n"):
            lines.append(f"{head:<{_HELP_INDENT}}{text}\n")
            head = ""
    lines.append("\nSee the systemd-socket-proxyd(1) man page for details.\n")
    return "".join(lines)


def _take_entrance(name: str, listeners: list[Listener]) -> Listener:
    """Take the inherited inspection socket out of `listeners`. Raises UsageError."""
    from proxyd.inspection.entrance import check_inherited

    entrance = check_inherited(name, listeners)
    listeners.remove(entrance)
    return entrance


def _open_entrance(
    options: Options,
    listeners: list[Listener],
    entrance: Listener | None,
    environ: dict[str, str],
) -> Listener | None:
    """Open the inspection socket, if one is wanted and none was inherited. Raises UsageError."""
    # A list of absolute paths; the name of an instance may contain colons.
    folder = environ.get("RUNTIME_DIRECTORY", "").partition(":/")[0]
    if entrance is not None or options.inspect == "":
        return entrance
    if options.inspect is None and (not folder or listeners[0].connected):
        return None  # with Accept=yes there are many processes for one path
    from proxyd.inspection.entrance import open_at, open_by_default

    return open_by_default(folder) if options.inspect is None else open_at(options.inspect)


def _open_all(
    wanted: "list[ListenAddress]", listeners: list[Listener], parcel: "Parcel | None"
) -> None:
    """Open the --listen= sockets and append them to `listeners`. Raises UsageError.

    Those of an earlier process are taken out of its parcel; what is left there is closed.
    """
    if not wanted and parcel is None:
        return
    from proxyd.bind import close_left_listeners, open_listener, take_over_listener

    for where in wanted:
        try:
            found = take_over_listener(where, parcel) if parcel is not None else None
            listeners.append(found or open_listener(where))
        except OSError as error:
            raise UsageError(f"Failed to listen on {where.text}: {reason(error)}") from None
    if parcel is not None:
        close_left_listeners(parcel)


def _why_no_sockets(options: Options, passed: dict[str, str]) -> str:
    """Return the likely cause. `passed`: the LISTEN_ variables, as they were at the start."""
    (_, target), *_ = options.targets
    if target.text in ("help", "version"):
        return f"'{target.text}' was taken for the target: did you mean --{target.text}?"
    setting = on_standard_fds()
    if setting:
        return f"{setting} passes the socket where it is not expected: remove it from the unit."
    if passed["LISTEN_FDS"] and passed["LISTEN_PID"] == str(posix.getpid()):
        return "LISTEN_PIDFDID says that they were passed to an earlier process with the same PID."
    if passed["LISTEN_FDS"] and passed["LISTEN_PID"]:
        return (
            f"They were passed to process {passed['LISTEN_PID']}, not to this one: "
            "a shell or wrapper has to exec this program."
        )
    if passed["LISTEN_FDS"]:
        return f"LISTEN_FDS={passed['LISTEN_FDS']} is set, but LISTEN_PID, the process id, is not."
    return "Start this from a .socket unit, or let it listen itself with --listen=."


def _assign_targets(options: Options, listeners: list[Listener]) -> None:
    """Set the target of each listener. Raises UsageError."""
    targets, unused = match_targets(options.targets, listeners)
    for listener, target in zip(listeners, targets, strict=True):
        listener.target = target
    _check_header(options, listeners)
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


def _check_header(options: Options, listeners: list[Listener]) -> None:
    """Raise UsageError if a PROXY header is wanted that datagrams cannot have."""
    datagram = next((one for one in listeners if one.datagram), None)
    if datagram is None:
        return
    where = f"'{datagram.name}' ({datagram.text}) is a datagram listener"
    if options.proxy_protocol == PROXY_V1:
        raise UsageError(f"--proxy-protocol=v1 has no header for datagrams, v2 has: {where}.")
    if options.accept_proxy_protocol is not None:
        raise UsageError(f"--accept-proxy-protocol= is for streams only: {where}.")


def _log_internal_error(error: Exception) -> None:
    """Log a bug of ours in one line; at debug level, with the full traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if trace is not None:
        code = trace.tb_frame.f_code
        file = code.co_filename.rpartition("/")[2]
        where = f" in {code.co_name}, {file}:{trace.tb_lineno}"
    log.error(f"Internal error{where}: {type(error).__name__}: {error}")
    if log.enabled(log.DEBUG):
        import traceback

        for line in traceback.format_exception(error):
            log.debug(line.rstrip())
