"""Which program survives which of the cases: a table of the results that pytest has recorded.

usage: table.py [--summary] FOLDER NAME...

FOLDER has NAME.json (from pytest --record=) and NAME.version for each NAME; a name without them is
left out. Prints Markdown, or with --summary one line for each name.
"""

import datetime
import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HEADS = {
    "ours": "this program",
    "ours-copy": "… splice refused",
    "ours-2-threads": "… two threads",
    "ours-2-threads-copy": "… both",
    "original": "C original, this system's",
    "newest-original": "C original, newest",
    "haproxy": "HAProxy",
    "haproxy-copy": "HAProxy, no splice",
    "nginx": "nginx stream",
    "direct": "direct connection",
}

HOW = """\
Each case is a few tests (`tests/cases`), run on all pairs of TCP over IPv4, TCP over IPv6 and UNIX
sockets on which it can happen, on the installed program, seen from outside. A program passes if it
delivers what a direct connection between client and server would have delivered; the last column
has no program in between, and shows that the expectation is right where it applies. Where it does
not (stopping, running out of files), a program passes if its clients are served, or see an end, and
if it does not burn a CPU meanwhile.

- All programs are started as by a service manager: the listener is inherited. HAProxy and nginx get
  a configuration for that (`tests/cases/contenders`): mode tcp, generous time-outs, keepalive on,
  `option splice-auto` or not; nginx with `proxy_half_close on`. One thread each.
- Where keepalive matters, the listener has it (`KeepAlive=yes`) for every program.
- An interposer in front of libc, the same for every program, makes calls fail (accept, pipe2,
  F_SETPIPE_SZ, short sends, and splice in the columns "splice refused").
- **fail** (3 of 9) means 3 of the 9 tests of that case that apply; the words are what was seen most
  often. All failures are listed at the end.
- "differs" is an intended difference of design: giving up at once instead of holding the client, or
  no guard against a target that leads back. A direct connection has no such guard either.
- "n/a" means that the case cannot be produced for that program, for the reason given.
"""

NO_RETRY = "one attempt, by design"
NO_PAUSE = "no pause between its four attempts"
NO_GUARD = "no guard, by design"
DIFFERENCES = {
    ("original", "UNIX backlog full"): NO_RETRY,
    ("original", "EADDRNOTAVAIL"): NO_RETRY,
    ("nginx", "UNIX backlog full"): NO_RETRY,
    ("nginx", "EADDRNOTAVAIL"): NO_RETRY,
    ("haproxy", "UNIX backlog full"): NO_PAUSE,
    ("haproxy", "EADDRNOTAVAIL"): NO_PAUSE,
    ("original", "TCP self-connect"): NO_GUARD,
    ("haproxy", "TCP self-connect"): NO_GUARD,
    ("nginx", "TCP self-connect"): NO_GUARD,
    ("original", "target = own listener"): NO_GUARD,
    ("haproxy", "target = own listener"): NO_GUARD,
    ("nginx", "target = own listener"): NO_GUARD,
}
"""What a program is not designed to do, by a part of its name and the case."""


class Row(NamedTuple):
    """The result of one test with one set of parameters."""

    number: int
    part: str
    title: str
    expectation: str
    test: str
    parameters: str
    outcome: str
    seen: str


class Contender(NamedTuple):
    """The results of one program."""

    name: str
    version: str
    rows: list[Row]


def load(folder: Path, name: str) -> Contender | None:
    """The recorded results of one contender, or None."""
    file = folder / f"{name}.json"
    if not file.exists():
        return None
    version = (folder / f"{name}.version").read_text().strip()
    return Contender(name, version, [Row(**row) for row in json.loads(file.read_text())])


def commonest(rows: list[Row]) -> str:
    """What was seen most often."""
    return Counter(row.seen for row in rows).most_common(1)[0][0]


def difference(name: str, title: str) -> str | None:
    """Why that contender is not designed to pass that case, or None if it is."""
    found = [why for (part, case), why in DIFFERENCES.items() if part in name and case == title]
    return found[0] if found else None


def verdict(name: str, rows: list[Row]) -> str:
    """The text of a cell: pass, fail or not applicable."""
    failed = [row for row in rows if row.outcome == "failed"]
    passed = [row for row in rows if row.outcome == "passed"]
    if failed:
        count = f"{len(failed)} of {len(failed) + len(passed)}"
        seen = escape(commonest(failed))
        why = difference(name, rows[0].title)
        return f"differs ({why}): {seen}" if why else f"**fail** ({count}): {seen}"
    if passed:
        return "pass"
    return f"n/a: {escape(commonest(rows))}" if rows else "not run"


def escape(text: str) -> str:
    """`text` for a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def cases(contenders: list[Contender]) -> dict[tuple[int, str], str]:
    """{(number, title): expected result} of all cases, in order."""
    found: dict[tuple[int, str], str] = {}
    for row in sorted({row for one in contenders for row in one.rows}):
        found.setdefault((row.number, row.title), row.expectation)
    return found


def print_table(contenders: list[Contender]) -> None:
    """One line for each case, one column for each contender."""
    heads = [HEADS[one.name] for one in contenders]
    print("| case |", " | ".join(heads), "|")
    print("| --- " * (1 + len(heads)) + "|")
    for number, title in cases(contenders):
        cells = [
            verdict(one.name, [r for r in one.rows if (r.number, r.title) == (number, title)])
            for one in contenders
        ]
        print(f"| {number}. {title} |", " | ".join(cells), "|")


def print_failures(one: Contender) -> None:
    """Every failure of a contender: what was seen, and with which parameters."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in one.rows:
        if row.outcome == "failed":
            groups.setdefault((row.test, row.seen), []).append(row.parameters)
    if not groups:
        return
    print(f"\n### {HEADS[one.name]} ({one.version})\n")
    for (test, seen), parameters in sorted(groups.items()):
        print(f"- `{test}`: {seen}  \n  {', '.join(sorted(parameters))}")


def print_expectations(contenders: list[Contender]) -> None:
    """The expected result of each case."""
    for (number, title), expectation in cases(contenders).items():
        print(f"- {number}. {title}: {expectation}")


def print_summary(contenders: list[Contender]) -> None:
    """One line for each contender."""
    for one in contenders:
        counts = Counter(row.outcome for row in one.rows)
        failed = sorted({row.number for row in one.rows if row.outcome == "failed"})
        which = f"; cases {', '.join(map(str, failed))}" if failed else ""
        print(
            f"{one.name:20} {counts['passed']:4} passed, {counts['failed']:3} failed, "
            f"{counts['skipped']:3} not applicable{which}"
        )


def print_document(contenders: list[Contender]) -> None:
    """The whole report."""
    print("# Which program survives which case\n")
    print(f"Made by `ci/test cases` on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, of\n")
    for one in contenders:
        print(f"- {HEADS[one.name]}: {one.version}")
    print(f"\n{HOW}")
    print_table(contenders)
    print("\n## Expected results\n")
    print_expectations(contenders)
    print("\n## Every failure")
    for one in contenders:
        print_failures(one)


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    summary = arguments[0] == "--summary"
    folder, *names = arguments[1:] if summary else arguments
    contenders = [one for name in names if (one := load(Path(folder), name))]
    (print_summary if summary else print_document)(contenders)


main()
