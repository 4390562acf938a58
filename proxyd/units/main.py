"""The command systemd-socket-proxyd-units."""

import argparse
import os
import sys
import textwrap

from proxyd import __version__
from proxyd.errors import UsageError, reason
from proxyd.units import check, create, report, switch, text
from proxyd.units.rule import SEVERITIES, Finding, Rule
from proxyd.units.text import Text

PROGRAM = "systemd-socket-proxyd-units"

_WIDTH = 79


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        options = _parser().parse_args(argv)
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        return 130
    except UsageError as error:
        return _fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(where + reason(error))
    return status


def _fail(message: str) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Check, write and switch the units around systemd-socket-proxyd.",
        epilog=f"See the {PROGRAM}(1) man page for details.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_check(commands)
    _add_create(commands)
    _add_switch(commands)
    return parser


def _add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "check",
        help="tell what goes wrong with units",
        description="Check the units that run the proxy, or systemd's own, with their sockets and "
        "backends: those named, or all of this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("what", nargs="*", metavar="UNIT|FILE|FOLDER")
    _add_scope(parser)
    parser.add_argument(
        "--json",
        choices=("pretty", "short", "off"),
        default="off",
        help="print findings as JSON",
    )
    parser.add_argument(
        "--threshold",
        choices=SEVERITIES,
        default="error",
        help="the least severity for which the exit status is 1 (error)",
    )
    parser.add_argument("--explain", metavar="RULE", help="explain a rule, or 'list' them")
    parser.set_defaults(run=_check)


def _add_create(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "create",
        help="write units that heal",
        description="Write the units of a proxy, each file with a line ---NAME--- before it. "
        "Nothing that runs is touched.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--listen",
        action="append",
        metavar="[NAME=]ADDRESS",
        help="where clients connect, as in ListenStream=; may be given more than once",
    )
    parser.add_argument(
        "--target",
        action="append",
        metavar="[NAME=]TARGET",
        help="where the backend listens; may be left out for a .container that publishes one port",
    )
    parser.add_argument(
        "--backend",
        metavar="UNIT|FILE",
        help="the service to start, a .container file of Quadlet, or a compose file",
    )
    parser.add_argument("--name", metavar="NAME", help="what the units are called")
    parser.add_argument(
        "--on-demand", action="store_true", help="stop proxy and backend when nobody uses them"
    )
    parser.add_argument(
        "--idle", metavar="SPAN", default="15min", help="how long that takes (15min)"
    )
    parser.add_argument(
        "--start-time",
        metavar="SPAN",
        help="the slowest start of the backend (1min; 2min)",
    )
    parser.add_argument(
        "--namespace", action="store_true", help="a private network for proxy and backend"
    )
    parser.add_argument("--user", action="store_true", help="units of a user's service manager")
    parser.add_argument("--output", metavar="FOLDER", help="write files, instead of to stdout")
    parser.set_defaults(run=_create)


def _add_switch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "switch",
        help="turn units for systemd's own proxy into units for this one",
        description="Print the drop-ins that make a unit run this proxy and heal, or the whole "
        "unit where a dependency has to go. Nothing that runs is touched.",
        allow_abbrev=False,
    )
    parser.add_argument("what", metavar="UNIT|FILE")
    _add_scope(parser)
    parser.add_argument("--output", metavar="FOLDER", help="write files, instead of to stdout")
    parser.set_defaults(run=_switch)


def _add_scope(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--user", action="store_true", help="units of a user's service manager")
    parser.add_argument("--root", metavar="PATH", default="", help="units below this folder")


def _create(options: argparse.Namespace) -> int:
    request = create.read_request(options)
    files, findings = create.create(request)
    return _deliver(files, findings, options.output, create.next_commands(request))


def _switch(options: argparse.Namespace) -> int:
    scope = _scope(options)
    files, findings, remarks = switch.switch(options.what, scope)
    if not files:
        print(f"{PROGRAM}: {options.what}: there is nothing to change", file=sys.stderr)
        return 0
    for remark in remarks:
        print(f"{PROGRAM}: {remark}", file=sys.stderr)
    systemctl = "systemctl --user" if options.user else "systemctl"
    return _deliver(files, findings, options.output, [f"{systemctl} daemon-reload"])


def _deliver(
    files: list[Text], findings: list[Finding], folder: str | None, commands: list[str]
) -> int:
    """Hand the files over; what is still wrong, and what comes next, goes to stderr."""
    sys.stderr.write(report.text(findings))
    if report.reaches(findings, "error"):
        return _fail("nothing was written")
    if folder is None:
        sys.stdout.write(text.show(files))
    else:
        text.write(files, folder)
    place = "" if folder is None else f" (once the files in {folder} are where units are)"
    print(f"Then{place}:", *commands, sep="\n    ", file=sys.stderr)
    return 0


def _scope(options: argparse.Namespace) -> check.Scope:
    if options.root and not os.path.isdir(options.root):
        raise UsageError(f"{options.root}: no such folder")
    return check.Scope(options.root, options.user)


def _check(options: argparse.Namespace) -> int:
    if options.explain is not None:
        return _explain(options.explain)
    findings, proxies = check.check(options.what, _scope(options))
    if options.json == "off":
        sys.stdout.write(report.text(findings))
    else:
        sys.stdout.write(report.as_json(findings, options.json == "pretty"))
    if not proxies:
        print(f"{PROGRAM}: no unit here runs systemd-socket-proxyd", file=sys.stderr)
    return 1 if report.reaches(findings, options.threshold) else 0


def _explain(name: str) -> int:
    if name == "list":
        for rule in check.RULES:
            print(f"{rule.name:30} {rule.severity}")
        return 0
    found = [rule for rule in check.RULES if rule.name == name]
    if not found:
        return _fail(f"no rule '{name}'; --explain=list names them")
    print(_explained(found[0]))
    return 0


def _explained(rule: Rule) -> str:
    paragraphs = [*rule.explain.split("\n"), f"Mend: {rule.mend}"]
    wrapped = [textwrap.fill(text, _WIDTH, break_on_hyphens=False) for text in paragraphs]
    return "\n\n".join([f"{rule.name} ({rule.severity})", *wrapped])
