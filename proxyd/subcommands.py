"""What socket-proxyctl and systemd-socket-proxyd-units share: how they are called and how they end.

The daemon imports nothing from here.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from proxyd import __version__
from proxyd.errors import UsageError, reason
from proxyd.log import printable

Commands = Mapping[str, tuple[Callable[[argparse.Namespace], int], str, str]]
"""{command: what runs it, its line in the help, its own help}"""

Arguments = tuple[tuple[str, str, dict[str, Any]], ...]
"""(commands that have it, name, what argparse is told), in the order of the help."""


def make_parser(
    program: str, description: str, known: Commands, arguments: Arguments
) -> argparse.ArgumentParser:
    """Return the parser of a command line."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=f"See the {program}(1) man page for details.",
    )
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (run, summary, about) in known.items():
        command = commands.add_parser(name, help=summary, description=about, allow_abbrev=False)
        command.set_defaults(run=run)
        for users, argument, settings in arguments:
            if name in users.split():
                command.add_argument(argument, **settings)
    return parser


def run(program: str, call: Callable[[], int]) -> int:
    """Call `call`; return the exit status. What it raises is one line."""
    stdout_is_closed = sys.stdout is None
    _prepare_streams()
    if stdout_is_closed:
        complain(program, "standard output is closed")
        return 1
    try:
        return _run(program, call)
    finally:
        # What cannot be written has been reported, and must not be tried again at the exit.
        for stream, fd in ((sys.stdout, 1), (sys.stderr, 2)):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def _prepare_streams() -> None:
    """Have all three standard streams, and let them take any text."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # otherwise a file or a socket would be a standard stream
    os.close(fd)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the locale may not have what a name is written in
            stream.reconfigure(errors="backslashreplace")


def _run(program: str, call: Callable[[], int]) -> int:
    try:
        try:
            return call()
        finally:
            sys.stdout.flush()  # after --help, too
    except BrokenPipeError:  # the reader has seen enough
        return 0
    except KeyboardInterrupt:
        return 130
    except UsageError as error:
        complain(program, str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        complain(program, where + reason(error))
    return 1


def complain(program: str, message: str) -> None:
    """Print a line to stderr."""
    try:
        print(f"{program}: {printable(message)}", file=sys.stderr, flush=True)
    except OSError:  # nobody reads it
        pass
