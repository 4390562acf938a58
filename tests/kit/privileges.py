"""Prefixes for the command under test that need or take away privileges; loud skips otherwise."""

import os
import subprocess

import pytest

NOBODY_ELSE = 61200 + os.getpid() % 1000
"""A user id that nobody uses here, so that its processes can be counted."""

WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]
"""A prefix that runs the program until its parent ends, however that happens."""


def need_root(what):
    """Skip the test, saying what it would have needed root for."""
    if os.geteuid() != 0:
        pytest.skip(f"needs root: {what}")


def as_unprivileged_user(executable):
    """A prefix that runs the program as a user of its own, without capabilities."""
    need_root("to become another user")
    prefix = [
        "setpriv",
        f"--reuid={NOBODY_ELSE}",
        f"--regid={NOBODY_ELSE}",
        "--clear-groups",
        "--no-new-privs",
    ]
    probe = subprocess.run([*prefix, executable, "--version"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"another user cannot run {executable} here")
    return prefix
