"""System calls per unit of work, counted by strace in separate runs.

Tracing slows a program down, so each of its calls may find more data than otherwise: the counts of
bulk works are a little low, those per message and per connection are right.
"""

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench import measure
from bench.contenders import Contender, Failed
from bench.measure import Scene, Settings
from bench.report import number
from bench.works import Work

MIB = 2**20
SUMMARY_LINE = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:(\d+)\s+)?(\w+)$", re.MULTILINE)
SHOWN = 0.005  # calls per unit below which a call is left out


def count(work: Work, contender: Contender, settings: Settings) -> dict[str, tuple[float, float]]:
    """Return calls and failed calls per unit (per MiB of a bulk work), by name."""
    at_once = replace(settings, warmup=0)
    with measure.scene(contender, work.pair, settings) as place:
        # The first measurement warms up. Between the two nothing moves, and strace attaches.
        command = measure.load_command((*work.load, "idle=1"), place, at_once)
        with subprocess.Popen(
            command,
            pass_fds=[place.backend],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as load:
            answer(load)
            with traced(place) as summary:
                result = answer(load)
            load.kill()
        counted = SUMMARY_LINE.findall(summary.read_text())
    units = result[work.counter] / (MIB if work.counter == "bytes" else 1)
    return {
        name: (int(calls) / units, int(failed or 0) / units)
        for calls, failed, name in counted
        if name != "total"
    }


def answer(load: "subprocess.Popen[str]") -> dict[str, float]:
    """Let the load measure once, without idle connections."""
    assert load.stdin
    assert load.stdout
    load.stdin.write("0\n")
    load.stdin.flush()
    line = load.stdout.readline()
    if not line:
        raise Failed("the load ended")
    result: dict[str, float] = json.loads(line)
    return result


@contextmanager
def traced(place: Scene) -> Iterator[Path]:
    """Count the calls of all threads during the block; yields the file that then has them."""
    summary = Path(place.proxy.log.parent if place.proxy.log else "/tmp", "strace")
    processes = [word for pid in place.proxy.pids for word in ("-p", str(pid))]
    with subprocess.Popen(
        ["strace", "-f", "-c", "-o", str(summary), *processes], stderr=subprocess.DEVNULL
    ) as strace:
        while not all(is_traced(pid) for pid in place.proxy.pids):
            if strace.poll() is not None:
                raise Failed("strace could not attach")
            time.sleep(0.01)
        yield summary
        strace.send_signal(signal.SIGINT)


def is_traced(pid: int) -> bool:
    """Whether every thread of ``pid`` has a tracer."""
    files = Path(f"/proc/{pid}/task").glob("*/status")
    return all("\nTracerPid:\t0\n" not in file.read_text() for file in files)


def table(chosen: Sequence[Contender], works: Sequence[Work], settings: Settings) -> Iterator[str]:
    """The report, line by line as it is counted."""
    for work in works:
        for contender in chosen:
            if work.kind == "load" and contender.argv:
                unit = "MiB" if work.counter == "bytes" else work.unit
                try:
                    calls = count(work, contender, settings)
                except Failed as error:
                    yield f"{work.title:<33}{contender.name:<14}{error}"
                else:
                    yield f"{work.title:<33}{contender.name:<14}{described(calls)}  per {unit}"


def described(calls: dict[str, tuple[float, float]]) -> str:
    """The sum, then each call, the most frequent first."""
    ranked = sorted(calls.items(), key=lambda item: -item[1][0])
    words = [
        f"{name} {number(all_of_it)}{failures(failed)}"
        for name, (all_of_it, failed) in ranked
        if all_of_it >= SHOWN
    ]
    total = sum(all_of_it for all_of_it, _ in calls.values())
    return f"{number(total):>7} = " + " + ".join(words)


def failures(failed: float) -> str:
    """Return how many of the calls failed (nearly always with EAGAIN), if any did."""
    return f" ({number(failed)} failed)" if failed >= SHOWN else ""
