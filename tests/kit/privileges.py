"""Command prefixes that need privileges or drop them. Where they cannot work, the test skips."""

import ctypes
import mmap
import os
import subprocess

import pytest

UNUSED_UID = 61200 + os.getpid() % 1000
"""A user id that is not used on this machine, so that its processes can be counted."""

WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]
"""A prefix that has the program killed when its parent ends in any way."""


def may_lock_memory():
    """Whether mlock(2) is allowed: package builds in systemd-nspawn filter it away."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        place = ctypes.c_char.from_buffer(page)
        allowed = ctypes.CDLL(None).mlock(ctypes.byref(place), 1) == 0
        del place
    return allowed


locks_memory = pytest.mark.skipif(
    not may_lock_memory(), reason="SKIPPED LOUDLY: no memory can be locked, so UNIX is not kept"
)
"""For tests that need connections with a UNIX socket to be kept for the next process."""


def skip_unix_unless_kept(items):
    """Apply locks_memory to all of these tests that have a UNIX socket among their parameters."""
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any("unix" in str(value) or "abstract" in str(value) for value in values):
            item.add_marker(locks_memory)


def may_lock_no_memory():
    """A prefix that runs the program where mlock(2) is refused."""
    need_root("to take a capability away")
    without = [f"--{which}=-ipc_lock" for which in ("bounding-set", "inh-caps")]
    return ["prlimit", "--memlock=0:0", "setpriv", *without]


def need_root(what):
    """Skip the test unless it runs as root; `what` says what root is needed for."""
    if os.geteuid() != 0:
        pytest.skip(f"needs root: {what}")


def as_unprivileged_user(executable):
    """A prefix that runs the program as a user of its own, without capabilities."""
    need_root("to become another user")
    prefix = [
        "setpriv",
        f"--reuid={UNUSED_UID}",
        f"--regid={UNUSED_UID}",
        "--clear-groups",
        "--no-new-privs",
    ]
    probe = subprocess.run([*prefix, executable, "--version"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"another user cannot run {executable} here")
    return prefix
