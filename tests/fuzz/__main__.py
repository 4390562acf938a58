"""Start the program with thousands of bad command lines, environments and passed-in fds.

    ci/test fuzz                      half of the time the parsers (atheris), half whole starts
    ci/test fuzz -- --seconds N       for N seconds (60)
    ci/test fuzz -- --replay NUMBER   repeat one start, and show its output
    ci/test fuzz -- --seed N          other inputs than by default

Whatever the input, the program runs, or exits with status 1 after one line on stderr that says why
(two lines if there are no sockets). It never prints a traceback or "Internal error", and never
hangs.

The same seed gives the same starts. Exit status: 0 all passed, 1 a fault was found, 77 this machine
cannot run it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fuzz.cases import case
from fuzz.runs import Fault, run
from kit.namespaces import enter_network_for

TESTS = Path(__file__).resolve().parent.parent

NOBODY = 61199
"""A user id that owns nothing, because generated arguments may name files."""

FAULTS_MAX = 10


def options():
    parser = argparse.ArgumentParser(
        prog="ci/test fuzz --",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=int)
    parser.add_argument("--executable", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--packages", required=True, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    chosen = options()
    if not enter_network_for("ci/test fuzz"):
        return 77
    Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").write_text("0")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.chmod(folder, 0o777)
        if chosen.replay is not None:
            return one_process(lambda: show(chosen, folder))
        faults = parsers_failed(chosen, folder) + starts_failed(chosen, folder)
    return 1 if faults else 0


def one_process(work):
    """Do the work in a child process, which also gets Ctrl-C; return its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = work()
        except KeyboardInterrupt:
            status = 130
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def parsers_failed(chosen, folder):
    """Run atheris; return 1, and show its output, if it made a parser fail."""
    seconds = max(int(chosen.seconds / 2), 1)
    command = [sys.executable, "-B", str(TESTS), "fuzz.parsers", str(seconds), str(chosen.seed)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": chosen.packages},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    text = done.stdout.decode(errors="replace")
    runs = [line.split()[-1] for line in text.splitlines() if "number_of_executed_units" in line]
    if done.returncode or not runs:
        print(f"FAULT in a parser:\n{text[-4000:]}", flush=True)
        return 1
    print(f"parsers: {runs[0]} inputs, no fault", flush=True)
    return 0


def starts_failed(chosen, folder):
    """Run whole starts from several processes; return the number of faults."""
    workers = min(os.cpu_count() or 1, 4)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda worker: one_process(
            lambda: starts(chosen, folder, range(worker, 1 << 30, workers))
        ), range(workers)))  # fmt: skip
    counts = dict.fromkeys(("refused", "told", "ran", "faults"), 0)
    for file in Path(folder).glob("counts-*"):
        for what, count in json.loads(file.read_text()).items():
            counts[what] += count
    ended_early = workers - len(list(Path(folder).glob("counts-*")))
    missing = [what for what, count in counts.items() if not count and what != "faults"]
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    print(f"starts: {sum(counts.values())}: {told}")
    if missing or ended_early:
        print(f"FAULT: no start {' or '.join(missing) or 'counted: a process ended early'}")
    return counts["faults"] + len(missing) + ended_early


def become_nobody(folder):
    os.chdir(folder)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def show(chosen, folder):
    """Repeat one start, and show its outcome."""
    become_nobody(folder)
    one = case(chosen.seed, chosen.replay)
    print(one.shell())
    try:
        print(run(chosen.executable, one))
    except (Fault, ValueError) as fault:
        print(f"FAULT: {fault}")
        return 1
    return 0


def starts(chosen, folder, numbers):
    """Run one start after another until time is up, and write the counts into the folder."""
    become_nobody(folder)
    end = time.monotonic() + chosen.seconds / 2
    counts = {}
    for number in numbers:
        if time.monotonic() > end or counts.get("faults", 0) >= FAULTS_MAX:
            break
        one = case(chosen.seed, number)
        try:
            what = run(chosen.executable, one)
        except (Fault, ValueError) as fault:
            what = "faults"
            small = shrunk(chosen.executable, one)
            print(f"FAULT in start {number}: {fault}\n  {small.shell()}", flush=True)
        counts[what] = counts.get(what, 0) + 1
    Path(folder, f"counts-{numbers.start}").write_text(json.dumps(counts))
    return 0


def shrunk(executable, one):
    """Remove from the case whatever the fault does not need."""
    for part in ("environment", "arguments", "fds"):
        for key in reversed(list(keys(getattr(one, part)))):
            whole = getattr(one, part)
            setattr(one, part, without(whole, key))
            if not fails(executable, one):
                setattr(one, part, whole)
    return one


def keys(things):
    return things if isinstance(things, dict) else range(len(things))


def without(things, key):
    if isinstance(things, dict):
        return {name: value for name, value in things.items() if name != key}
    return things[:key] + things[key + 1 :]


def fails(executable, one):
    try:
        run(executable, one)
    except (Fault, ValueError):
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
