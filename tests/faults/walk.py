"""Let every call of the program that can fail fail once, in many runs, and check what happens.

    ci/test faults                           all scenarios, up to 40 calls of each kind: 25 minutes
    ci/test --quick faults                   a part of it, in a few minutes
    ci/test faults -- SCENARIO...            these scenarios
    ci/test faults -- --only SCOPE.CALL      these calls (relay.recv, python.open=EMFILE)
    ci/test faults -- --list                 the scenarios
    ci/test faults -- --replay POINT         one run again, as the report of a fault names it
    ci/test faults -- --left-out             which of the system calls that strace sees never fail

A preloaded library (tests/faults/interpose.c) makes call number n fail or transfer less. Each
scenario first runs undisturbed, and its calls are counted; then n goes over all of them. After each
failure the program must continue, or refuse to start in one line. No other connection may notice;
the affected one must be complete or see an error; a new client must be served; every fd and block
of memory must be given back.

Exit status: 0 no faults found, 1 faults, 77 this machine cannot run it.
"""

import argparse
import os
import shlex
import signal
import sys
import time
from collections import Counter

from faults import left_out, points
from faults.continuity import SCENARIOS
from faults.program_run import ONE_WAS_HIT, REFUSED_TO_START, SERVED_ON
from faults.startup import KINDS, QUICK, StartupRuns
from faults.table import LEFT_OUT
from faults.workers import Worker, for_each

POINTS_MAX, POINTS_MAX_QUICK = 40, 3
"""The number of calls of one kind in one scenario that are made to fail in each way."""


class Summary:
    """The results of all points so far."""

    def __init__(self):
        self.rows = {}
        self.faults = []

    def add(self, point, outcome):
        row = self.rows.setdefault((point.scope, point.call, point.failure), Counter())
        row["points"] += 1
        if outcome.faults:
            row["faults"] += 1
            self.faults.append((point, outcome))
            show_fault(point, outcome)
        elif outcome.hits == 0:
            row["not reached"] += 1
        else:
            row[outcome.kind] += 1

    def show(self):
        columns = ("points", SERVED_ON, ONE_WAS_HIT, REFUSED_TO_START, "not reached", "faults")
        print(f"\n{'call and failure':<34}" + "".join(f"{name:>18}" for name in columns))
        total = Counter()
        for key in sorted(self.rows):
            self._show_row("{}.{} {}".format(*key), self.rows[key], columns)
            total.update(self.rows[key])
        self._show_row("all", total, columns)

    def _show_row(self, name, row, columns):
        print(f"{name:<34}" + "".join(f"{row[column] or '-':>18}" for column in columns))


class Both:
    """A worker whose runs share a process, and one that starts the program for each run."""

    def __init__(self, options):
        self._runs = Worker(options.library)
        self._startups = StartupRuns(options.library, options.executable)

    def record(self, name):
        return self._for(name).record(name)

    def run(self, point):
        return self._for(point.scenario).run(point)

    def _for(self, name):
        return self._startups if name in KINDS else self._runs

    def end(self):
        self._runs.end()
        self._startups.end()


def show_fault(point, outcome):
    """Print what is wrong, and the command that repeats it."""
    print(f"FAULT {points.text(point)}")
    for fault in outcome.faults:
        print(f"      {fault}")
    print(f"      again: ci/test faults -- --replay {shlex.quote(points.text(point))}", flush=True)


def main():
    options = parse_arguments()
    if options.left_out:
        return left_out.main(options.executable)
    if options.list:
        for one in SCENARIOS.values():
            print(f"{one.name:<26} {one.title}")
        for name in KINDS:
            print(f"{name:<26} A process of its own, from its first line to SIGTERM.")
        return 0
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    workers = [Both(options) for _ in range(options.workers)]
    try:
        if options.replay:
            return replay(workers[0], options.replay)
        return walk(workers, options)
    finally:
        for worker in workers:
            worker.end()


def parse_arguments():
    parser = argparse.ArgumentParser(
        prog="ci/test faults --",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO")
    parser.add_argument("--library", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--executable", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--left-out", action="store_true")
    parser.add_argument("--replay", metavar="POINT")
    parser.add_argument("--only", metavar="SCOPE.CALL[=FAILURE]", default="")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    for name in options.scenarios:
        if name not in SCENARIOS and name not in KINDS:
            parser.error(f"there is no scenario {name}: see --list")
    return options


def replay(worker, what):
    """Run one point again; 1 if there is a fault."""
    point = points.parse(*what.split(maxsplit=1))
    outcome = worker.run(point)
    print(f"{points.text(point)}: {outcome.kind}, {outcome.hits} calls failed")
    for line in outcome.log.splitlines():
        print(f"  stderr: {line}")
    for fault in outcome.faults:
        print(f"  FAULT: {fault}")
    return 1 if outcome.faults else 0


def walk(workers, options):
    """Count the calls of each scenario, then let each of them fail; 1 if there are faults."""
    start = time.monotonic()
    chosen = options.scenarios or [
        *(one.name for one in SCENARIOS.values() if one.quick or not options.quick),
        *(QUICK if options.quick else KINDS),
    ]
    summary = Summary()
    todo, left_out, broken = [], set(), 0
    limit = POINTS_MAX_QUICK if options.quick else POINTS_MAX
    for name, outcome in for_each(chosen, workers, lambda worker, name: worker.record(name)):
        for fault in outcome.faults:
            print(f"FAULT {name}, with no failure at all: {fault}", flush=True)
            broken = 1
        todo += points.points_of(name, outcome.calls, limit)
        left_out |= {call for scope, call in outcome.calls if scope == "relay"} & set(LEFT_OUT)
    todo = [p for p in todo if f"{p.scope}.{p.call}={p.failure}".startswith(options.only)]
    todo.sort()
    print(f"{len(chosen)} scenarios, {len(todo)} points, {len(workers)} at a time", flush=True)
    for point, outcome in for_each(todo, workers, lambda worker, point: worker.run(point)):
        summary.add(point, outcome)
    summary.show()
    for call in sorted(left_out):
        print(f"left out: {call}: {LEFT_OUT[call]}")
    faults = len(summary.faults)
    print(f"{len(todo)} points walked in {time.monotonic() - start:.0f} s, faults found: {faults}")
    return 1 if faults or broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
