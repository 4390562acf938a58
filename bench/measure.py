"""One run: one work with one contender in a network and a folder of its own."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import contenders, sockets
from bench.contenders import Contender, Failed, Proxy
from bench.works import Work

PROGRAMS = contenders.CACHE / "bin"
PATIENCE = 30  # seconds past the run's own length


@dataclass(frozen=True)
class Settings:
    """Durations in seconds, CPUs (-1: any), maximum of idle connections, number of starts."""

    seconds: float
    warmup: float
    proxy_cpu: int
    load_cpu: int
    idle: int
    starts: int


@dataclass(frozen=True)
class Sample:
    """The result of one run.

    ``cpu``      seconds of CPU in the proxy per unit of the work
    ``rate``     units per second
    ``p50``, ``p99``   microseconds; 0 if the work has no latency
    ``load``     share of its CPU that the load generator used
    ``machine``  seconds that all CPUs together were not idle, per unit; 0 if that is not known
    ``extra``    values that only some works have, by name
    """

    cpu: float
    rate: float
    p50: float
    p99: float
    load: float
    extra: dict[str, float]
    machine: float = 0


@dataclass(frozen=True)
class Scene:
    """A started contender, the backend socket behind it, and the program that makes the load."""

    proxy: Proxy
    backend: int
    program: str


@contextmanager
def scene(contender: Contender, pair: str, settings: Settings) -> Iterator[Scene]:
    """Start ``contender`` between the families of ``pair``; then end it and remove its files."""
    front, back = pair.split("-")
    sockets.enter_network()
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        backend, target = sockets.bind(back, folder / "backend")
        with backend:
            cpu = settings.proxy_cpu
            proxy = contenders.start(contender, front, target, folder, cpu, backend)
            program = PROGRAMS / ("datagrams" if sockets.is_datagram(front) else "load")
            try:
                yield Scene(proxy, backend.fileno(), str(program))
            finally:
                proxy.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_command(work_load: tuple[str, ...], place: Scene, settings: Settings) -> list[str]:
    """The command line of load.c, or of datagrams.c."""
    return [
        place.program,
        f"cpu={settings.load_cpu}",
        f"backend={place.backend}",
        f"connect={place.proxy.address}",
        f"light={int(settings.load_cpu < 0)}",
        f"warmup={settings.warmup}",
        f"seconds={settings.seconds}",
        *(f"{'parent' if place.proxy.forks else 'pid'}={pid}" for pid in place.proxy.pids),
        *work_load,
    ]


def run(work: Work, contender: Contender, settings: Settings) -> Sample:
    """Run a work of kind ``load``. Raises Failed."""
    with scene(contender, work.pair, settings) as place:
        done = subprocess.run(
            load_command(work.load, place, settings),
            pass_fds=[place.backend],
            capture_output=True,
            text=True,
            timeout=settings.seconds + settings.warmup + PATIENCE,
            check=False,
        )
        if done.returncode != 0:
            raise Failed(f"{done.stderr.strip()} {place.proxy.last_words()}")
        check_store(work, place.proxy)
    return sample(work, json.loads(done.stdout))


def check_store(work: Work, proxy: Proxy) -> None:
    """Raise Failed if what is measured was to be kept in a store, and was not."""
    if proxy.store and work.lasts and not proxy.store.names:
        raise Failed(f"nothing was stored: {proxy.last_words()}")


def sample(work: Work, result: dict[str, float]) -> Sample:
    """Turn load.c's totals into costs per unit."""
    units = result[work.counter] / work.per
    if not units:
        raise Failed("no unit of work was done")
    extra = {}
    if result["dial_failures"]:
        lost = sockets.is_datagram(work.pair)
        extra["lost" if lost else "failures"] = result["dial_failures"]
    if work.name == "mixed":
        extra["GB/s"] = result["bytes"] / 1e9 / result["wall"]
    return Sample(
        cpu=result["proxy_cpu"] / units,
        rate=units / result["wall"],
        p50=result["p50"] if work.latency_of else 0,
        p99=result["p99"] if work.latency_of else 0,
        load=result["load_cpu"] / result["wall"],
        extra=extra,
        machine=result["machine_cpu"] / units,
    )
