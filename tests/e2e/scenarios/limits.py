"""Little memory, few tasks and fds, and a crowd."""

from e2e.harness import scenario
from e2e.machine import MEGABYTE, Machine, check, same

AHEAD = "Nice=-15"
SMALL_LIMITS = "LimitNOFILE=32\nTasksMax=3\nMemoryMax=32M\n"


def parallel_downloads(m: Machine, count: int) -> dict[str, int]:
    """Run `count` downloads of 2 MiB at once; how they ended."""
    return m.load_result(m.start_load("mix", 9000, 0, count, 0))["bulk"]


@scenario(original="loses some of the downloads, or spins, when it is out of fds")
def small_limits(m: Machine) -> str:
    """LimitNOFILE=32, TasksMax=3, MemoryMax=32M: parallel downloads within and past the cap"""
    m.nginx_for_load(8000)
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000", service=SMALL_LIMITS, gated=True)
    with m.limited("proxy.service", 32 * MEGABYTE, 3) as note:
        first = m.main_pid("proxy.service")
        for _ in range(3):
            same("6 downloads", parallel_downloads(m, 6), {"ok": 6})
        crowd = parallel_downloads(m, 60)
        check(crowd["ok"] >= 6 and "Wrong: big" not in crowd, f"60 downloads: {crowd}")
        m.wait_for("the next are served", lambda: parallel_downloads(m, 6) == {"ok": 6}, 10)
        same("main process", m.main_pid("proxy.service"), first)
        lines = m.journal("proxy.service").count("\n")
        check(lines < 40, f"{lines} lines in the journal")
    return f"{crowd['ok']} of 60 at once served; {note}"


@scenario(original="counts connections that have ended, until it has noticed", since=260)
def as_many_clients_as_the_cap(m: Machine) -> str:
    """--connections-max=20 and 20 clients that each connect again and again: none is refused"""
    # A client waits 20 ms for room: on a machine that is busy elsewhere, the two come first.
    m.nginx_for_load(8000, AHEAD)
    m.proxy(
        "proxy", "127.0.0.1:9000", "127.0.0.1:8000", options="--connections-max=20", service=AHEAD
    )
    counts = m.load_result(m.start_load("steady", 9000, 20, 3))["steady"]
    same("failed", {how: count for how, count in counts.items() if how != "ok"}, {})
    return f"{counts['ok']} served"


def usage(m: Machine) -> tuple[int, int]:
    """fds and RSS (KiB) of the proxy once its connections have ended."""
    pid = m.main_pid("proxy.service")
    m.wait_for(
        "connections end",
        lambda: not m.sh("ss -Htn state established dport = 8000 or sport = 9000"),
        15,
    )
    m.sh("sleep 1.2")  # what is kept for the next connections may be given back in a while
    fds, rss = m.sh(
        f"ls /proc/{pid}/fd | wc -l; awk '/^VmRSS/ {{print $2}}' /proc/{pid}/status"
    ).split()
    return int(fds), int(rss)


@scenario(original="is out of fds with 200 connections at the default LimitNOFILE", until=259)
def crowd_leaves_no_trace(m: Machine) -> str:
    """2000 short, 200 bulk and 30 abusive connections leave fds and RSS where they were"""
    m.nginx_for_load(8000)
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000", options="-c 512", socket="Backlog=1024")
    m.load_result(m.start_load("mix", 9000, 100, 10, 5))
    fds, rss = usage(m)
    sizes = [rss]
    while len(sizes) < 3 or (sizes[-1] - sizes[-2] >= 256 and len(sizes) < CROWDS):
        counts = m.load_result(m.start_load("mix", 9000, 2000, 200, 30))
        same("counts", counts, {"short": {"ok": 2000}, "bulk": {"ok": 200}, "abusive": {"ok": 30}})
        fds_now, rss = usage(m)
        same("fds afterwards", fds_now, fds)
        sizes.append(rss)
    check(sizes[1] - sizes[0] < 2048, f"RSS grew: {sizes} KiB")
    check(sizes[-1] - sizes[-2] < 256, f"RSS goes on growing: {sizes} KiB")
    return f"{fds} fds, RSS {' '.join(str(size) for size in sizes)} KiB"


CROWDS = 6  # until the last of them at the latest, its memory is as large as it will be
