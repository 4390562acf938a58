"""The command line of the benchmark and its main loop. Run it as ci/bench."""

import argparse
import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import (
    contenders,
    idle,
    machine,
    measure,
    report,
    sockets,
    start,
    syscalls,
    works,
)
from bench.contenders import Contender, Failed
from bench.measure import Sample, Settings
from bench.report import Run
from bench.works import Work

EXECUTABLE = Path(__file__).parent.parent / ".venv/bin/systemd-socket-proxyd"
OLD = 2.5
"""Seconds until a connection is in the store, and would outlive a kill."""
FORKS_MAX = 16
"""Clients of a program that makes a process for each: socat sleeps for a second after each."""

KINDS = {"load": measure.run, "idle": idle.run, "start": start.run}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, described in ci/bench."""
    parser = argparse.ArgumentParser(prog="ci/bench", description=__doc__)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--short", action="store_true", help="fewer works and contenders (default)")
    form.add_argument("--long", action="store_true", help="every work and contender")
    parser.add_argument("--only", metavar="WORK,...", default="", help="those whose names begin so")
    parser.add_argument("--contenders", metavar="NAME,...", default="", help="the reference first")
    parser.add_argument("--rounds", type=int, metavar="N", help="runs of each (3 short, 5 long)")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of one run")
    parser.add_argument("--executable", type=Path, default=EXECUTABLE)
    parser.add_argument("--before", type=Path, metavar="PATH", help="another build of ours")
    parser.add_argument("--options", default="", help="of this program, such as --buffer-size=4K")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--syscalls", action="store_true", help="count system calls instead")
    parser.add_argument("--store", action="store_true", help="with and without a descriptor store")
    parser.add_argument("--two-cpus", action="store_true", help="one and two threads, not pinned")
    parser.add_argument("--list", action="store_true", help="list the works and end")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> Settings:
    """Lengths by form, CPUs by machine."""
    proxy_cpu, load_cpu = (-1, -1) if options.two_cpus else machine.cpus()
    machine.raise_limits()
    if proxy_cpu == load_cpu >= 0:
        note("only one CPU: the load and the proxy disturb each other, do not quote these numbers")
    return Settings(
        seconds=options.seconds or (0.6 if options.long else 0.5),
        warmup=OLD if options.store else 0.15,
        proxy_cpu=proxy_cpu,
        load_cpu=load_cpu,
        idle=9000,
        starts=15 if options.long else 7,
    )


def note(text: str) -> None:
    """Print something that must not be overlooked."""
    progress("")
    print(f"*** {text}", file=sys.stderr)


def choose(options: argparse.Namespace) -> list[Contender]:
    """The contenders asked for that are available here, the reference first."""
    found = contenders.find(options.executable, shlex.split(options.options), options.before)
    originals = [name for name in found if name.startswith("original-")]
    default = ["ours", "control", *originals[-1:], "nginx", "socat"]
    if options.store:
        default = ["ours", "store", "control"]
    elif options.before:
        default = ["ours", "before", "control"]
    elif options.two_cpus:
        default = ["ours-2", "ours"]
    elif options.long:
        default = [name for name in found if name not in ("ours-2", "store")]
    wanted = options.contenders.split(",") if options.contenders else default
    for name in wanted:
        if name not in found:
            note(f"no {name} here, going on without; there is {', '.join(found)}")
    return [found[name] for name in wanted if name in found]


def schedule(
    chosen: Sequence[Contender], selected: Sequence[Work], rounds: int
) -> Iterator[tuple[int, Work, Contender]]:
    """Contenders next to each other within a work, in another order each round."""
    for number in range(rounds):
        for work in selected:
            turn = number % len(chosen)
            for contender in (*chosen[turn:], *chosen[:turn]):
                if applies(work, contender, number):
                    yield number, work, contender


def applies(work: Work, contender: Contender, number: int) -> bool:
    """Whether to make this run. A direct connection is only a reference: one round is enough."""
    if contender.name == "direct" and number > 0:
        return False
    if not (contender.datagrams if sockets.is_datagram(work.pair) else contender.streams):
        return False
    if contender.forks and work.clients > FORKS_MAX:
        return False
    return work.kind != "start" or start.applies(contender)


def run_one(work: Work, contender: Contender, number: int, settings: Settings) -> Run:
    """Run once; a failure is recorded as a result too."""
    try:
        sample: Sample | None = KINDS[work.kind](work, contender, settings)
    except (Failed, OSError, subprocess.TimeoutExpired) as error:
        note(f"{work.title} {contender.name}: {error}")
        return Run(work, contender.name, number, None, str(error))
    return Run(work, contender.name, number, sample)


def run_all(
    chosen: Sequence[Contender], selected: Sequence[Work], rounds: int, settings: Settings
) -> list[Run]:
    """Make every run, with a progress line on stderr."""
    plan = list(schedule(chosen, selected, rounds))
    began = time.monotonic()
    runs: list[Run] = []
    for count, (number, work, contender) in enumerate(plan):
        first_of_round = not runs or runs[-1].round != number
        left = (time.monotonic() - began) / count * (len(plan) - count) if count else 0
        what = f"round {number + 1} of {rounds}, {work.title} {contender.name}"
        progress(f"{count + 1}/{len(plan)} {what}, {left:.0f} s left", keep=first_of_round)
        try:
            runs.append(run_one(work, contender, number, settings))
        except KeyboardInterrupt:
            note("interrupted: reporting what there is")
            break
    progress("")
    return runs


def progress(text: str, *, keep: bool = False) -> None:
    """Replace the progress line; in a log, which cannot replace it, print only those to keep."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif keep:
        print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Measure what the command line asks for and report it."""
    options = parse()
    # An exception unwinds the stack, and so ends the processes that were started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    patterns = [part for part in options.only.split(",") if part]
    if options.two_cpus and not patterns:
        patterns = [*works.TWO_CPUS]
    selected = works.select(patterns, short=not options.long)
    if options.list:
        print("\n".join(work.title for work in selected))
        return 0
    settings = settings_of(options)
    chosen = choose(options)
    if not chosen or not selected:
        note("nothing to measure")
        return 1
    if not sockets.enter_network():
        note("no network of our own (not root): others on this machine disturb the numbers")
    if options.syscalls:
        for line in syscalls.table(chosen, selected, settings):
            print(line, flush=True)
        return 0
    runs = run_all(chosen, selected, options.rounds or (5 if options.long else 3), settings)
    about = machine.describe(chosen) | {"settings": dataclasses.asdict(settings)}
    publish(options, report.rows(runs, selected, [one.name for one in chosen]), runs, about)
    return 1 if any(run.failure for run in runs) else 0


def publish(
    options: argparse.Namespace,
    rows: Sequence[report.Row],
    runs: Sequence[Run],
    about: dict[str, object],
) -> None:
    """Print the table, and write everything to the file of --json."""
    print(machine.text(about))
    print(report.table(rows))
    if options.json:
        options.json.write_text(json.dumps(report.as_json(runs, rows, about), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
