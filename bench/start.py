"""Start-up: from exec to the first byte for a client that already waits in the backlog."""

import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

from bench import contenders, memory, sockets
from bench.contenders import Contender, Failed
from bench.measure import Sample, Settings
from bench.works import Work

Runs = list[dict[str, float]]

SETTLE = 0.1  # seconds after the first byte, for work that a program has put off until then
DISTRO_PYTHON = "/usr/bin/python3"


def applies(contender: Contender) -> bool:
    """Whether it can be socket-activated at all."""
    return contender.activated and contender.argv is not None


def run(work: Work, contender: Contender, settings: Settings) -> Sample:
    """Return the median of several starts, each after one of a bare interpreter. Raises Failed."""
    each, nothing = [], []
    for _ in range(settings.starts):
        nothing.append(bare(contender, settings))
        each.append(start_once(work, contender, settings))
    return Sample(
        cpu=median(one["proxy_cpu"] for one in each),
        rate=1 / median(one["wall"] for one in each),
        p50=median(one["wall"] for one in each) * 1e6,
        p99=max(one["wall"] for one in each) * 1e6,
        load=0,
        extra={
            "RSS MB": median(one["resident"] for one in each) / 1e6,
            "private MB": median(one["private"] for one in each) / 1e6,
            "×bare": times(each, nothing, "wall"),
            "CPU ×bare": times(each, nothing, "proxy_cpu"),
        },
    )


def start_once(work: Work, contender: Contender, settings: Settings) -> dict[str, float]:
    """Start once; return wall and CPU seconds to the first byte, resident and private bytes."""
    assert contender.argv
    front, back = work.pair.split("-")
    sockets.enter_network()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        listener, address = sockets.bind(front, folder / "front")
        backend, target = sockets.bind(back, folder / "backend")
        for one in (listener, backend):
            one.setblocking(True)
        with listener, backend:
            fds = [listener.fileno(), backend.fileno()]
            where = [str(settings.proxy_cpu), *map(str, fds), address]
            return first_byte([*where, *contender.argv(address, target, folder)], fds)


def first_byte(arguments: list[str], passed: list[int]) -> dict[str, float]:
    """Run the stopwatch of launch.c, measure the memory while the program runs, then let it end."""
    with subprocess.Popen(
        [contenders.LAUNCH, "time", *arguments],
        pass_fds=passed,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as stopwatch:
        assert stopwatch.stdin
        assert stopwatch.stdout
        assert stopwatch.stderr
        answer = stopwatch.stdout.readline()
        if not answer:
            raise Failed(f"no first byte: {stopwatch.stderr.read().strip()}")
        result: dict[str, float] = json.loads(answer)
        time.sleep(SETTLE)
        pid = int(result["pid"])
        result |= {"resident": memory.resident([pid]), "private": memory.private([pid])}
        stopwatch.stdin.write("\n")
    return result


def bare(contender: Contender, settings: Settings) -> dict[str, float]:
    """Start an interpreter that does nothing: the contender's own, if it has one."""
    command = [interpreter(contender), "-I", "-c", "pass"]
    arguments = [contenders.LAUNCH, "time", str(settings.proxy_cpu), "-1", "-1", "-", *command]
    result: dict[str, float] = json.loads(
        subprocess.run(arguments, capture_output=True, check=True).stdout
    )
    return result


def times(each: Runs, nothing: Runs, what: str) -> float:
    """Return the program's median as a multiple of the bare interpreter's."""
    return median(one[what] for one in each) / median(one[what] for one in nothing)


def interpreter(contender: Contender) -> str:
    """The interpreter named in the first line of the contender's program, or the distribution's."""
    assert contender.argv
    program = contender.argv("", "tcp:0", Path())[0]
    with open(shutil.which(program) or program, "rb") as file:
        found = re.match(rb"#!\s*(\S*python\S*)", file.readline())
    return found.group(1).decode() if found else DISTRO_PYTHON
