"""Prefixes for the command under test that need or take away privileges; loud skips otherwise."""

import os
import subprocess
from pathlib import Path

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


def with_hosts(directory, lines):
    """A prefix that runs the program with this /etc/hosts, and no other source of names."""
    return _with_files(
        directory,
        {
            "hosts": "".join(f"{line}\n" for line in lines),
            "nsswitch.conf": "hosts: files\nservices: files\n",
        },
    )


def with_name_server(directory, address, hosts=(), timeout=30):
    """A prefix that runs the program with this name server, at port 53, and no other.

    `hosts` are lines of /etc/hosts, which is looked at before. A look-up without an answer fails
    after `timeout` seconds.
    """
    return _with_files(
        directory,
        {
            "hosts": "".join(f"{line}\n" for line in ["127.0.0.1 localhost", *hosts]),
            "resolv.conf": f"nameserver {address}\noptions timeout:{timeout} attempts:1\n",
            "nsswitch.conf": "hosts: files dns\nservices: files\n",
        },
    )


def _with_files(directory, files):
    """A prefix that runs the program with these files in /etc, by name and text."""
    need_root("for private files in /etc")
    mounts = []
    for name, text in files.items():
        file = Path(directory, name)
        file.write_text(text)
        mounts.append(f"mount --bind {file} /etc/{name}")
    prefix = ["unshare", "--mount", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]
    probe = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no private mounts here: {probe.stderr.decode().strip()}")
    return prefix


def namespace_prefix(setup="ip link set lo up"):
    """A prefix that runs the program in a new network namespace, prepared by a shell command."""
    need_root("for a network namespace")
    prefix = ["unshare", "--net", "sh", "-c", f'{setup} && exec "$@"', "sh"]
    probe = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no network namespaces here: {probe.stderr.decode().strip()}")
    return prefix
