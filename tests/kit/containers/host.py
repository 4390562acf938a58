"""What containers need of their host, and one run of them at a time."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kit.containers.root import Unavailable

EXIT_CANNOT_RUN = 77

APT_LOCK = "/run/lock/systemd-socket-proxyd-apt"
"""Taken by ci/lib.sh, too."""

TO_BOOT = ("debootstrap", "systemd-nspawn", "nsenter", "setpriv", "chroot")
"""Tools that make a root folder and boot a container in it."""


def end_on_signals() -> None:
    """Exit on a signal in the ordinary way, so that overlays and containers are removed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))


def check_host(
    tools: Sequence[str] = TO_BOOT,
    packages: str = "debootstrap systemd-container",
    namespaces: Sequence[str] = ("--mount",),
) -> None:
    """Raise Unavailable unless the tools exist here and mounts work in such namespaces.

    Missing tools are installed, from these Debian packages, if this user may.
    """
    if os.geteuid() != 0:
        raise Unavailable("not root")
    if missing(tools) and shutil.which("apt-get"):
        install(packages)
    if missing(tools):
        raise Unavailable(f"missing: {' '.join(missing(tools))}")
    probe = ["unshare", *namespaces, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        raise Unavailable(f"not permitted here: {' '.join(probe)}")


def missing(tools: Sequence[str]) -> list[str]:
    return [tool for tool in tools if not shutil.which(tool)]


def install(packages: str) -> None:
    command = f"apt-get update -q && apt-get install -qy --no-install-recommends {packages}"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # apt does not wait for another apt, but fails. What is installed must not keep the lock.
    alone = ["flock", "--close", APT_LOCK, "sh", "-c", command]
    subprocess.run(alone, stdout=subprocess.DEVNULL, check=False, env=environment)


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Wait for any other run that holds the lock `path`, and exclude others meanwhile."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"# waiting for the run that holds {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
