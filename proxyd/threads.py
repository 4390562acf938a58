"""Further relay threads: when they start, and by which rule they get connections."""

import os

from proxyd import log
from proxyd._relay import Relay

MANY_CPUS = 32
"""On a larger machine /proc/uptime is read, although it counts a CPU that waits for a disk as busy:
for /proc/stat the kernel adds up every interrupt of every CPU, which takes milliseconds."""

WAIT_MOST = 25
"""Per cent of the time for which a busy thread may have waited for a CPU itself."""


def share(relay: Relay) -> None:
    """Have further threads only when one has too much to do: WorkersWanted asks for hire() then."""
    usable, online = os.sched_getaffinity(0), os.sysconf("SC_NPROCESSORS_ONLN")
    whole = len(usable) >= online
    try:
        path = "/proc/uptime" if whole and online > MANY_CPUS else "/proc/stat"
        stat = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # ProcSubset=pid; as the man page says, a CPU is taken to be idle then
        stat = -1
    limits = [limit for limit in (cpu_quota(), 0 if whole else 100 * len(usable)) if limit]
    relay.offload_when_busy(
        stat,
        cpus=None if whole else usable,
        quota=min(limits, default=0),
        wait_max=WAIT_MOST,
    )


def cpu_quota(root: str = "") -> int:
    """Return how much of a CPU this process may use, in per cent; 0: no limit, or none is seen.

    That is the least quota of its cgroup and those above it, cgroups(7): CPUQuota= of a unit, or a
    container's limit.
    """
    quotas = []
    for line in _read(f"{root}/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folders, files = ["", "/unified"], ["cpu.max"]
        elif "cpu" in controllers.split(","):
            folders, files = [f"/{controllers}", "/cpu"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        names = [name for name in path.split("/") if name]
        for folder in folders:
            for depth in range(len(names) + 1):
                place = "/".join([f"{root}/sys/fs/cgroup{folder}", *names[:depth]])
                quotas.append(_quota(" ".join([_read(f"{place}/{file}") for file in files])))
    return min([quota for quota in quotas if quota], default=0)


def _quota(text: str) -> int:
    """Read "QUOTA PERIOD", both in µs; "max" or -1 is no limit."""
    words = text.split()
    if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words):
        return 0
    quota, period = map(int, words)
    return max(quota * 100 // period, 1) if period else 0


def _read(path: str) -> str:
    """Return a file of the kernel's, "" where it cannot be read."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def hire(relay: Relay, threads: int) -> None:
    """Have so many threads from now on; fewer where the system refuses them."""
    for number in range(relay.thread_count, threads):
        try:
            relay.start_worker()
        except OSError as error:
            log.warning(
                f"Failed to start a relay thread: {os.strerror(error.errno or 0)}. "
                f"Going on with {number} of {threads}."
            )
            return
