"""What the numbers were measured on, and the limits that a run needs."""

import datetime
import os
import platform
import re
import resource
from collections.abc import Iterable
from pathlib import Path

from bench.contenders import Contender

DESCRIPTORS = 200_000  # the originals hold up to eight per connection, and idle opens 9000


def describe(contenders: Iterable[Contender]) -> dict[str, object]:
    """Kernel, processor, memory, versions and date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "kernel": platform.release(),
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "Linux"),
        "python": platform.python_version(),
        "contenders": {contender.name: contender.version for contender in contenders},
    }


def cpu_model() -> str:
    """The processor's name, as the kernel reports it."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else platform.machine()


def raise_limits() -> int:
    """Allow as many descriptors as the largest work needs; return the new limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(hard, DESCRIPTORS), max(hard, DESCRIPTORS)))
    except (ValueError, PermissionError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def cpus() -> tuple[int, int]:
    """The CPU of the proxy and the CPU of the load; the same if there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[-1], allowed[0]


def line(about: dict[str, object]) -> str:
    """The description in one line."""
    return (
        f"{about['date']}, Linux {about['kernel']}, {about['cpus']} × {about['cpu']}, "
        f"{about['memory_GiB']} GiB, {about['system']}"
    )


def text(about: dict[str, object]) -> str:
    """The description for the head of the report."""
    names = about["contenders"]
    assert isinstance(names, dict)
    versions = "".join(f"  {name:<14}{version}\n" for name, version in names.items())
    return f"{line(about)}\n{versions}"
