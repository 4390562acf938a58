"""What the proxies and the machine use, over time; and whether a line is flat."""

import csv
import itertools
import re
import statistics
import time
from pathlib import Path

from bench import memory

PAGE = 4096
WARM_UP = 600
"""Seconds, or a quarter of a shorter run, until memory has its size."""

GROWTH_MOST = 512 * 1024
"""Bytes of private memory that a proxy may seem to gain after that. Ten bytes lost with every
connection of the busiest proxy would exceed it within an hour at the default rate."""

GROWTH_MOST_COLD = 2 * GROWTH_MOST
"""… in a run too short for WARM_UP: the heap still comes to its highest mark."""

FIELDS = ("private", "rss", "fds", "threads", "cpu")


class Samples:
    """Rows of numbers, one per moment: {"seconds": …, "main.rss": …, "slab": …}."""

    def __init__(self, world, every):
        self.world = world
        self.every = every
        self.start = time.monotonic()
        self.rows = []
        self._next = self.start

    def tick(self):
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self.every
            self.take()

    def take(self):
        row = {"seconds": round(time.monotonic() - self.start, 2)}
        for one in self.world.served:
            pids = [one.proxy.pid]
            row[f"{one.name}.private"] = memory.private(pids)
            row[f"{one.name}.rss"] = memory.resident(pids)
            row[f"{one.name}.fds"] = memory.descriptors(pids)
            row[f"{one.name}.threads"] = threads(one.proxy.pid)
            row[f"{one.name}.cpu"] = round(one.proxy.cpu_seconds(), 4)
        row["load.cpu"] = round(sum(load.cpu_seconds() for load in self.world.loads), 4)
        row["slab"] = memory.kernel_slab()
        row["sunreclaim"] = memory.kib(Path("/proc/meminfo"), "SUnreclaim")
        row.update(sockstat())
        self.rows.append(row)

    def column(self, name, since=0.0):
        """[(seconds, value)]"""
        return [(row["seconds"], row[name]) for row in self.rows if row["seconds"] >= since]

    def write(self, path):
        with open(path, "w", newline="", encoding="ascii") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)


def threads(pid):
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def sockstat():
    """Sockets of this network, and the machine's memory for TCP buffers."""
    text = Path("/proc/net/sockstat").read_text()
    return {
        "sockets": int(re.search(r"sockets: used (\d+)", text)[1]),
        "tcp_memory": int(re.search(r"^TCP: .*mem (\d+)", text, re.MULTILINE)[1]) * PAGE,
    }


def slope(points, most=400):
    """Theil and Sen's: the median of the slopes of all pairs. A spike does not move it."""
    points = points[:: max(len(points) // most, 1)]
    slopes = [
        (b - a) / (later - earlier)
        for (earlier, a), (later, b) in itertools.combinations(points, 2)
        if later > earlier
    ]
    return statistics.median(slopes) if slopes else 0.0


def growth(points):
    """What the slope makes of the time from the first point to the last."""
    return slope(points) * (points[-1][0] - points[0][0]) if len(points) > 1 else 0.0


def warm_up(seconds):
    """How much of the beginning of a run is not judged."""
    return min(seconds / 4, WARM_UP)


def growth_most(seconds):
    return GROWTH_MOST if warm_up(seconds) == WARM_UP else GROWTH_MOST_COLD
