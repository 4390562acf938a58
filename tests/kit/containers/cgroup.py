"""Control groups of the host: one for the container, and limits where the container has none.

On a host with cgroup v1 (or hybrid) controllers, MemoryMax= and TasksMax= inside the container are
accepted and silently not applied. There the same limits are set from outside, through v1 groups.
"""

import os
import time
from pathlib import Path


def own_groups() -> dict[str, str]:
    """Our own group in each hierarchy, by controller; "" is the v2 hierarchy."""
    groups = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = group
    return groups


def hierarchy(controller: str) -> Path | None:
    """Where the v1 hierarchy of `controller` ("" for v2) is mounted, or None."""
    with open("/proc/self/mounts", encoding="utf-8") as table:
        for line in table:
            _, point, kind, options, *_ = line.split()
            if kind == "cgroup2" and not controller:
                return Path(point)
            if kind == "cgroup" and controller and controller in options.split(","):
                return Path(point)
    return None


def make_group(controller: str, name: str) -> Path | None:
    """A new group below our own, or None where that hierarchy cannot be used."""
    mount = hierarchy(controller)
    if mount is None:
        return None
    group = mount / own_groups().get(controller, "/").lstrip("/") / name
    try:
        group.mkdir()
    except OSError:
        return None
    return group


def remove_group(group: Path) -> None:
    """Remove a group and those below it. A v1 group stays busy for a moment after its last task."""
    deadline = time.monotonic() + 1
    while group.exists() and time.monotonic() < deadline:
        for folder, _, _ in os.walk(group, topdown=False):
            try:
                os.rmdir(folder)
            except OSError:
                time.sleep(0.02)


def remove_leftovers(prefix: str) -> None:
    """Remove the groups below our own that a killed run has left, by the start of their names.

    A name ends with the pid of the run or of its container: groups of a run that lives are kept.
    """
    for controller in ("", "name=systemd", "memory", "pids"):
        mount = hierarchy(controller)
        if mount is not None:
            own = mount / own_groups().get(controller, "/").lstrip("/")
            for group in own.glob(f"{prefix}*"):
                if not Path("/proc", group.name.rpartition("-")[2]).exists():
                    remove_group(group)


class Limits:
    """v1 limits for one process of the container; `remove()` once the process is gone."""

    def __init__(self, name: str):
        self.name = name
        self.groups: list[Path] = []

    def apply(self, pid: int, memory: int, tasks: int) -> bool:
        """Limit the process `pid` (bytes, tasks); False where this host has no v1 controllers."""
        return self._limit(pid, "memory", "memory.limit_in_bytes", memory) and self._limit(
            pid, "pids", "pids.max", tasks
        )

    def _limit(self, pid: int, controller: str, knob: str, value: int) -> bool:
        group = make_group(controller, self.name)
        if group is None:
            return False
        self.groups.append(group)
        (group / knob).write_text(str(value))
        (group / "cgroup.procs").write_text(str(pid))
        return True

    def remove(self) -> None:
        for group in self.groups:
            remove_group(group)
