"""Idle connections: what each costs in descriptors and memory, and whether the others slow down.

64 connections exchange messages, alongside first 100 and then many idle connections. Each cost is
given per idle connection, as the slope between these two levels; that of a direct connection is
subtracted from the kernel memory.
"""

import json
import resource
import subprocess
import time
from dataclasses import dataclass
from functools import cache

from bench import contenders, measure, memory
from bench.contenders import Contender, Failed, Proxy
from bench.measure import Sample, Settings
from bench.works import Work

FEW, PINGS = 100, 64
SPARE = 200  # descriptors for everything else
SETTLE = 0.3  # seconds, because the kernel frees some memory late


@dataclass(frozen=True)
class Level:
    """What is in use with ``count`` idle connections: bytes, and numbers of descriptors."""

    count: int
    slab: int
    resident: int
    descriptors: int
    round_trip: Sample


def run(work: Work, contender: Contender, settings: Settings) -> Sample:
    """Measure at both levels. Raises Failed."""
    with measure.scene(contender, work.pair, settings) as place:
        before = memory.descriptors(place.proxy.pids)
        command = measure.load_command((*work.load, "idle=1", f"pings={PINGS}"), place, settings)
        load = subprocess.Popen(
            command,
            pass_fds=[place.backend],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            few = level(load, FEW, work, place.proxy)
            each = (few.descriptors - before) / (FEW + PINGS)
            many = level(load, affordable(settings.idle, each), work, place.proxy)
        finally:
            load.kill()
            load.wait()
    if not place.proxy.pids:
        return summed_up(few, many, 0)
    return summed_up(few, many, sockets_alone(work, settings))


@cache
def sockets_alone(work: Work, settings: Settings) -> float:
    """KB of kernel memory per direct connection, which does not count as the proxy's."""
    return run(work, contenders.direct(), settings).extra["kernel KB"]


def affordable(wanted: int, each: float) -> int:
    """As many as the limit of open files allows: ``each`` in the proxy, two in the load."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE
    return min(wanted, int(limit / max(each, 2)) - PINGS)


def level(load: "subprocess.Popen[str]", count: int, work: Work, proxy: Proxy) -> Level:
    """Measure with ``count`` idle connections."""
    assert load.stdin
    assert load.stdout
    load.stdin.write(f"{count}\n")
    load.stdin.flush()
    answer = load.stdout.readline()
    if not answer:
        raise Failed(f"the load ended at {count} connections: {proxy.last_words()}")
    time.sleep(SETTLE)
    return Level(
        count,
        memory.kernel_slab(),
        memory.resident(proxy.pids),
        memory.descriptors(proxy.pids),
        measure.sample(work, json.loads(answer)),
    )


def summed_up(few: Level, many: Level, sockets_alone: float) -> Sample:
    """Return the slopes, and the cost of a round trip with many relative to that with few."""
    between = many.count - few.count
    with_few = few.round_trip.cpu
    extra = {
        "connections": float(many.count),
        "fds": (many.descriptors - few.descriptors) / between,
        "kernel KB": (many.slab - few.slab) / between / 1e3 - sockets_alone,
        "RSS KB": (many.resident - few.resident) / between / 1e3,
    }
    if with_few:
        extra[f"CPU ×(at {FEW})"] = many.round_trip.cpu / with_few
    trip = many.round_trip
    return Sample(trip.cpu, trip.rate, trip.p50, trip.p99, trip.load, extra)
