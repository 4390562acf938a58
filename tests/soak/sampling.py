"""The resources that proxies and machine use over time, and whether that use grows."""

import csv
import itertools
import re
import statistics
import time
from pathlib import Path

from bench import memory

PAGE = 4096
WARM_UP = 600
"""Seconds until memory has reached its size; in a shorter run, a quarter of it."""

GROWTH_MAX = 512 * 1024
"""Bytes of private memory that a proxy may gain after that. A leak of ten bytes per connection of
the busiest proxy would exceed it within an hour at the default rate."""

GROWTH_MAX_COLD = 2 * GROWTH_MAX
"""… in a run too short for WARM_UP, in which the heap is still reaching its maximum."""

FIELDS = ("private", "rss", "fds", "threads", "cpu")


class Samples:
    """Rows of numbers, one per sample: {"seconds": …, "main.rss": …, "slab": …}."""

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
        """Return [(seconds, value)]."""
        return [(row["seconds"], row[name]) for row in self.rows if row["seconds"] >= since]

    def write(self, path):
        with open(path, "w", newline="", encoding="ascii") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)


def threads(pid):
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def sockstat():
    """Count the sockets of this network namespace, and the machine's memory for TCP buffers."""
    text = Path("/proc/net/sockstat").read_text()
    return {
        "sockets": int(re.search(r"sockets: used (\d+)", text)[1]),
        "tcp_memory": int(re.search(r"^TCP: .*mem (\d+)", text, re.MULTILINE)[1]) * PAGE,
    }


def slope(points, count_max=400):
    """Return the Theil–Sen estimate: the median slope of all pairs, which ignores spikes."""
    points = points[:: max(len(points) // count_max, 1)]
    slopes = [
        (b - a) / (later - earlier)
        for (earlier, a), (later, b) in itertools.combinations(points, 2)
        if later > earlier
    ]
    return statistics.median(slopes) if slopes else 0.0


def growth(points):
    """Return the growth between the first point and the last, according to the slope."""
    return slope(points) * (points[-1][0] - points[0][0]) if len(points) > 1 else 0.0


def warm_up(seconds):
    """Return how many seconds at the start of a run are not judged."""
    return min(seconds / 4, WARM_UP)


def growth_max(seconds):
    return GROWTH_MAX if warm_up(seconds) == WARM_UP else GROWTH_MAX_COLD
