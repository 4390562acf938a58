"""Command prefixes that need privileges or drop them. Where they cannot work, the test skips."""

import os
import subprocess

import pytest

UNUSED_UID = 61200 + os.getpid() % 1000
"""A user id that is not used on this machine, so that its processes can be counted."""

WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]
"""A prefix that has the program killed when its parent ends in any way."""


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
