"""The command systemd-socket-proxyd-units."""

import argparse
import os
import sys
import textwrap

from proxyd import subcommands
from proxyd.errors import UsageError
from proxyd.subcommands import Arguments, Commands, make_parser
from proxyd.units import check, create, report, switch, text
from proxyd.units.rule import SEVERITIES, Rule
from proxyd.units.text import Text

PROGRAM = "systemd-socket-proxyd-units"

_WIDTH = 79


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return subcommands.run(PROGRAM, lambda: _call(argv))


def _call(argv: list[str] | None) -> int:
    about = "Check, write and switch the units around systemd-socket-proxyd."
    options = make_parser(PROGRAM, about, _commands(), _ARGUMENTS).parse_args(argv)
    return int(options.run(options))


def _commands() -> Commands:
    return {
        "check": (
            _check,
            "tell what goes wrong with units",
            "Check the units that run the proxy, or systemd's own, and those around it.",
        ),
        "create": (
            _create,
            "write units that heal",
            "Write the units of a proxy, files or one text. Nothing that runs is touched.",
        ),
        "switch": (
            _switch,
            "turn units for systemd's own proxy into units for this one",
            "Print what makes a unit run this proxy and heal. Nothing that runs is touched.",
        ),
    }


_FLAG: dict[str, object] = {"action": "store_true"}

_ARGUMENTS: Arguments = (
    ("check", "what", {"nargs": "*", "metavar": "UNIT|FILE|FOLDER"}),
    ("switch", "what", {"metavar": "UNIT|FILE"}),
    (
        "create",
        "--listen",
        {
            "action": "append",
            "metavar": "[NAME=]ADDRESS",
            "help": "where clients connect, as in ListenStream=, or, with udp: or unix-dgram: "
            "before it, send datagrams; may be given more than once",
        },
    ),
    (
        "create",
        "--target",
        {
            "action": "append",
            "metavar": "[NAME=]TARGET",
            "help": "where the backend listens; may be left out for a .container that publishes "
            "one port",
        },
    ),
    (
        "create",
        "--backend",
        {
            "metavar": "UNIT|FILE",
            "help": "the service to start, a .container file of Quadlet, or a compose file",
        },
    ),
    ("create", "--name", {"metavar": "NAME", "help": "what the units are called"}),
    (
        "create",
        "--on-demand",
        {**_FLAG, "help": "stop proxy and backend when nobody uses them"},
    ),
    (
        "create",
        "--idle",
        {"metavar": "SPAN", "default": "15min", "help": "how long that takes (15min)"},
    ),
    (
        "create",
        "--start-time",
        {"metavar": "SPAN", "help": "the slowest start of the backend (1min; 2min)"},
    ),
    (
        "create",
        "--namespace",
        {**_FLAG, "help": "a private network for proxy and backend"},
    ),
    (
        "create",
        "--accept",
        {**_FLAG, "help": "a process for each connection"},
    ),
    (
        "create",
        "--systemd",
        {
            "metavar": "VERSION",
            "help": "the oldest systemd that has to run the units; before 249 they heal in another "
            "way",
        },
    ),
    (
        "check create switch",
        "--user",
        {**_FLAG, "help": "units of a user's service manager"},
    ),
    (
        "check switch",
        "--root",
        {"metavar": "PATH", "default": "", "help": "units below this folder"},
    ),
    (
        "create switch",
        "--output",
        {"metavar": "FOLDER", "help": "write files, instead of to stdout"},
    ),
    (
        "check",
        "--json",
        {
            "choices": ("pretty", "short", "off"),
            "default": "off",
            "help": "print findings as JSON",
        },
    ),
    (
        "check",
        "--threshold",
        {
            "choices": SEVERITIES,
            "default": "error",
            "help": "the least severity for which the exit status is 1 (error)",
        },
    ),
    (
        "check",
        "--explain",
        {"metavar": "RULE", "help": "explain a rule, or 'list' them"},
    ),
)


def _create(options: argparse.Namespace) -> int:
    request = create.read_request(options)
    files, findings = create.create(request)
    sys.stderr.write(report.text(findings))
    if report.reaches(findings, "error"):
        return _fail("nothing was written")
    _deliver(files, options.output, create.next_commands(request))
    return 0


def _switch(options: argparse.Namespace) -> int:
    result = switch.switch(options.what, _scope(options))
    if not result.files:
        print(f"{PROGRAM}: {options.what}: there is nothing to change", file=sys.stderr)
        return 0
    for remark in result.remarks:
        print(f"{PROGRAM}: {remark}", file=sys.stderr)
    sys.stderr.write(report.text(result.findings))
    if result.spoils:
        return _fail("nothing was written")
    systemctl = "systemctl --user" if options.user else "systemctl"
    _deliver(result.files, options.output, [f"{systemctl} daemon-reload"])
    return 0


def _deliver(files: list[Text], folder: str | None, commands: list[str]) -> None:
    """Print or write the files, and print the next commands to stderr."""
    if folder is None:
        sys.stdout.write(text.show(files))
    else:
        text.write(files, folder)
    place = "" if folder is None else f" (once the files in {folder} are where units are)"
    print(f"Then{place}:", *commands, sep="\n    ", file=sys.stderr)


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


def _fail(message: str) -> int:
    subcommands.complain(PROGRAM, message)
    return 1
