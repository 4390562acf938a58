"""Further relay threads: when they start, and which connections they get."""

import posix

from proxyd import log
from proxyd._relay import Relay

CPUS_MAX = 32
"""With more CPUs than this, /proc/uptime is read instead of /proc/stat. For the latter, the kernel
adds up every interrupt of every CPU, which takes milliseconds. But the former counts a CPU as busy
while it waits for a disk."""

WAIT_MAX = 25
"""Per cent of the time that a busy thread may have waited for a CPU itself."""


def use(relay: Relay, threads: int, *, at_once: bool) -> None:
    """Let relay threads help, up to this number of them; `at_once`, or when they are needed."""
    if at_once:
        start(relay, threads)
    else:
        offload_when_busy(relay)


def offload_when_busy(relay: Relay) -> None:
    """Use further threads only once one is busy: a WorkersWanted event asks for them."""
    usable, online = posix.sched_getaffinity(0), posix.sysconf("SC_NPROCESSORS_ONLN")
    whole = len(usable) >= online
    try:
        path = "/proc/uptime" if whole and online > CPUS_MAX else "/proc/stat"
        stat = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:  # ProcSubset=pid: as the manual says, a CPU is assumed to be idle then
        stat = -1
    limits = [limit for limit in (cpu_quota(), 0 if whole else 100 * len(usable)) if limit]
    relay.offload_when_busy(
        stat,
        cpus=None if whole else usable,
        quota=min(limits, default=0),
        wait_max=WAIT_MAX,
    )


def cpu_quota(root: str = "") -> int:
    """Return how much of a CPU this process may use, in per cent; 0: no limit is known.

    That is the smallest quota of its cgroup and of those above it, cgroups(7): CPUQuota= of a unit,
    or the limit of a container.
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


def _read(path: str) -> str:
    """Return the text of a kernel file, "" if it cannot be read."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _quota(text: str) -> int:
    """Read "QUOTA PERIOD", both in µs, as per cent; 0 for "max" or -1, which are no limit."""
    words = text.split()
    if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words):
        return 0
    quota, period = map(int, words)
    return max(quota * 100 // period, 1) if period else 0


def start(relay: Relay, threads: int) -> None:
    """Start threads until there are `threads`; fewer, with a warning, if the system refuses."""
    for number in range(relay.thread_count, threads):
        try:
            relay.start_worker()
        except OSError as error:
            log.warning(
                f"Failed to start a relay thread: {posix.strerror(error.errno or 0)}. "
                f"Going on with {number} of {threads}."
            )
            return
