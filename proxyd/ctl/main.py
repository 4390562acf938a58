"""The command socket-proxyctl."""

import argparse
import sys

from proxyd import subcommands
from proxyd.ctl import ask
from proxyd.ctl.find import Found, Proxy, find
from proxyd.errors import UsageError
from proxyd.inspection.interfaces import PROXY
from proxyd.subcommands import Arguments, Commands, make_parser

PROGRAM = "socket-proxyctl"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return subcommands.run(PROGRAM, lambda: _call(arguments))


def _call(arguments: list[str]) -> int:
    status = _serve(arguments)
    if status is not None:
        return status
    parser = make_parser(PROGRAM, "Show what running proxies are doing.", _commands(), _ARGUMENTS)
    options = parser.parse_args(arguments)
    return int(options.run(options))


def _serve(arguments: list[str]) -> int | None:
    """Without a command, serve the caller that was passed; None if there is none."""
    if arguments not in ([], ["--user"]):
        return None
    from proxyd.ctl.serve import caller, serve

    peer = caller()
    return None if peer is None else serve(peer, user=bool(arguments))


def _commands() -> Commands:
    return {
        "list": (_list, "list connections", "List the live connections, held clients included."),
        "top": (_top, "show connections as they change", "Show live connections and their rates."),
        "watch": (_watch, "print connections that begin and end", "Print a line for each event."),
        "metrics": (
            _metrics,
            "print metrics",
            "Print all metrics in the text format of Prometheus.",
        ),
        "status": (
            _status,
            "show listeners, targets and limits",
            "Show the state of each proxy: its listeners, its targets and whether they are up.",
        ),
        "terminate": (
            _terminate,
            "end connections",
            "Reset connections in both directions. The proxy must be named if several run.",
        ),
    }


_ALL = "list top watch metrics status terminate"

_ARGUMENTS: Arguments = (
    ("terminate", "id", {"nargs": "+", "type": int, "metavar": "ID"}),
    (
        _ALL,
        "--unit",
        {
            "action": "append",
            "default": [],
            "metavar": "UNIT",
            "help": "this service only; may be given more than once",
        },
    ),
    (
        _ALL,
        "--socket",
        {
            "action": "append",
            "default": [],
            "metavar": "PATH",
            "help": "the proxy with this inspection socket",
        },
    ),
    (_ALL, "--user", {"action": "store_true", "help": "services of the user's manager"}),
    ("list", "--target", {"metavar": "TARGET", "help": "only connections to this target"}),
    (
        "list",
        "--state",
        {
            "choices": ("open", "held", "connecting", "lingering", "header", "flow"),
            "help": "only connections in this state",
        },
    ),
    (
        "list status",
        "--full",
        {"action": "store_true", "help": "cut nothing, even if lines become too long"},
    ),
    ("top", "--interval", {"metavar": "SPAN", "default": "1s", "help": "time between two looks"}),
    (
        "list watch metrics status terminate",
        "--json",
        {"choices": ("pretty", "short", "off"), "default": "off", "help": "print JSON"},
    ),
)


def _list(options: argparse.Namespace) -> int:
    from proxyd.ctl import listing
    from proxyd.ctl.table import paper

    answers = ask.connections(_find(options), options.target, options.state)
    rows = listing.rows_of(answers.results)
    if options.json != "off":
        sys.stdout.write(listing.as_json(rows, options.json))
    elif rows:
        sys.stdout.write("\n".join(listing.table(rows, paper(full=options.full))) + "\n")
    elif answers.results:
        print("No connections.", file=sys.stderr)
    return _complain_all(answers.errors)


def _find(options: argparse.Namespace) -> list[Proxy]:
    """Return the proxies to ask. What has no socket gets a line."""
    found = _look(options)
    for note in found.notes:
        _complain(note)
    if not found.proxies:
        _complain("no proxy is running that could be asked")
    return found.proxies


def _look(options: argparse.Namespace) -> Found:
    return find(options.unit, options.socket, options.user)


def _complain(message: str) -> None:
    subcommands.complain(PROGRAM, message)


def _complain_all(errors: list[str]) -> int:
    for error in errors:
        _complain(error)
    return 1 if errors else 0


def _top(options: argparse.Namespace) -> int:
    from proxyd.ctl.top import top

    return top(lambda: _look(options), _seconds(options.interval))


def _seconds(text: str) -> float:
    from proxyd import timespan

    try:
        usec = timespan.parse(text)
    except ValueError as error:
        raise UsageError(f"--interval={text}: {error}") from None
    if usec is None or not 100_000 <= usec <= 3_600_000_000:
        raise UsageError(f"--interval={text}: not between 100ms and 1h")
    return usec / 1_000_000


def _watch(options: argparse.Namespace) -> int:
    from proxyd.ctl.watch import watch

    return watch(_find(options), options.json, _complain)


def _metrics(options: argparse.Namespace) -> int:
    from proxyd.ctl import listing, prometheus

    answers = ask.metrics(_find(options))
    if options.json == "off":
        sys.stdout.write(prometheus.text(answers.results))
    else:
        values = [
            {"unit": proxy.unit or None, "socket": proxy.path} | one
            for proxy, (_, metrics) in answers.results
            for one in metrics
        ]
        sys.stdout.write(listing.as_json(values, options.json))
    return _complain_all(answers.errors)


def _status(options: argparse.Namespace) -> int:
    from proxyd.ctl import listing
    from proxyd.ctl.table import paper

    answers = ask.statuses(_find(options))
    if options.json == "off":
        sheet = paper(full=options.full)
        blocks = [listing.status_lines(*one, sheet) for one in answers.results]
        sys.stdout.write("\n".join("".join(f"{line}\n" for line in block) for block in blocks))
    else:
        replies = [
            {"unit": proxy.unit or None, "socket": proxy.path} | status
            for proxy, status in answers.results
        ]
        sys.stdout.write(listing.as_json(replies, options.json))
    return _complain_all(answers.errors)


def _terminate(options: argparse.Namespace) -> int:
    from proxyd.ctl import listing
    from proxyd.ctl.client import Client, ReplyError

    proxies = _find(options)
    if len(proxies) != 1:
        if proxies:
            _complain("several proxies are running; --unit= or --socket= says which one is meant")
        return 1
    ended, errors = [], []
    for number in options.id:
        try:
            with Client(proxies[0].path) as client:
                client.call(f"{PROXY}.Terminate", {"id": number})
        except (OSError, ReplyError) as error:
            errors.append(f"{number}: {ask.describe(proxies[0], error)}")
        else:
            ended.append(number)
    if options.json != "off":
        sys.stdout.write(listing.as_json({"terminated": ended}, options.json))
    return _complain_all(errors)
