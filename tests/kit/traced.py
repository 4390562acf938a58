"""Which system calls a relay makes in chosen turns, as strace sees them.

A module of tests has scenarios. Each is played by a program of its own, which runs the module:
`python tests MODULE SCENARIO ARGUMENT...`. The calls of its `watched()` turns are returned.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
BEGIN, END = "/begin", "/end"

CALL = re.compile(r"^(\w+)\((.*)\)\s+= (-?\d+)", re.MULTILINE)

OF_THE_ALLOCATOR = {"brk", "madvise", "mmap", "munmap"}
"""Made when malloc() needs memory, which a sanitizer's does at any time."""


def watched(rig):
    """Run one turn of the relay, between two marks in the trace."""
    os.access(BEGIN, os.F_OK)
    rig.turn()
    os.access(END, os.F_OK)


class Call:
    def __init__(self, name, arguments, result):
        self.name = {"epoll_pwait": "epoll_wait"}.get(name, name)
        self.arguments = arguments.split(", ")
        self.result = int(result)

    def __repr__(self):
        return f"{self.name}({', '.join(self.arguments)}) = {self.result}"


def names(found):
    return [call.name for call in found]


def tracer(module, directory):
    """A function that runs a scenario of `module`, with arguments; it returns a list of calls for
    each of its watched turns. Skips the test where strace cannot be used."""
    if not shutil.which("strace"):
        pytest.skip("SKIPPED LOUDLY: no strace here")
    probe = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"SKIPPED LOUDLY: strace may not trace here: {probe.stderr.decode()[-200:]}")

    def trace(scenario, pair, *options):
        out = directory / "trace"
        command = [sys.executable, str(TESTS), module, scenario, *pair, *options]
        strace = ["strace", "-o", str(out), "-s", "8", "-e", "signal=none"]
        done = subprocess.run(
            [*strace, *command], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        turns = re.findall(rf'{BEGIN}".*\n((?s:.*?)).*"{END}"', out.read_text())
        return [
            [Call(*call) for call in CALL.findall(turn) if call[0] not in OF_THE_ALLOCATOR]
            for turn in turns
        ]

    return trace
