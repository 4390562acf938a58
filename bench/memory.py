"""What processes and the kernel use, read from /proc."""

import os
import re
from collections.abc import Iterable
from pathlib import Path


def kernel_slab() -> int:
    """Bytes of kernel objects on the whole machine."""
    return kib(Path("/proc/meminfo"), "Slab")


def resident(pids: Iterable[int]) -> int:
    """Bytes of memory that are resident in the processes."""
    return sum(kib(Path(f"/proc/{pid}/smaps_rollup"), "Rss") for pid in pids)


def private(pids: Iterable[int]) -> int:
    """Bytes of memory that the processes share with no other process."""
    return sum(
        kib(Path(f"/proc/{pid}/smaps_rollup"), field)
        for pid in pids
        for field in ("Private_Clean", "Private_Dirty")
    )


def descriptors(pids: Iterable[int]) -> int:
    """Open file descriptors of the processes."""
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def kib(file: Path, field: str) -> int:
    """Read the line ``FIELD:  N kB``; return bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    assert found
    return int(found.group(1)) * 1024
