"""Namespaces: networks and files of a test's own, in each way that tests need them.

This process enters a new network (enter_own_network), a thread enters that of another process for a
moment (in_network_namespace_of), a process keeps one (Namespace), or the program under test is
started in one: the functions that return a prefix for its command line.
"""

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kit.privileges import need_root

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1

_libc = ctypes.CDLL(None, use_errno=True)

# ── this process ─────────────────────────────────────────────────────────────────────────────────


def enter_own_network():
    """Move this process to a network namespace with nothing but loopback. May raise OSError."""
    if _libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "no network namespace")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def enter_network_for(program):
    """The same, for a load test called `program`; prints a line and returns False if it cannot.

    A new network for each run has no sockets in TIME_WAIT from the last one, no packet filter of
    the machine, and no other traffic on loopback.
    """
    try:
        enter_own_network()
    except OSError:
        print(f"{program} CANNOT RUN HERE: no network of its own (not root?)", file=sys.stderr)
        return False
    # Short connections use up the default range of ports within two seconds.
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("1024 65000")
    return True


def in_own_network(function):
    """Wrap `function`, for in_child(), so that it runs in a network with nothing but loopback."""

    def run():
        try:
            enter_own_network()
        except OSError as error:
            pytest.skip(f"no network namespace: {os.strerror(error.errno)}")
        function()

    return run


# ── the network of another process ───────────────────────────────────────────────────────────────


def in_network_namespace_of(pid, work):
    """Run `work()` in a thread that has entered the network namespace of `pid`.

    A socket stays in the namespace in which it was created, so every thread may use what `work`
    returns.
    """
    result = []

    def enter_and_work():
        with open(f"/proc/{pid}/ns/net") as namespace:
            if _libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                result.append(OSError(ctypes.get_errno(), "setns"))
                return
        try:
            result.append(work())
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=enter_and_work)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]


def network_of(pid):
    """A prefix that runs a command in the network namespace of `pid`."""
    return ["nsenter", f"--net=/proc/{pid}/ns/net"]


class Namespace:
    """A network namespace, kept by a process that does nothing else."""

    def __init__(self):
        need_root("for a network namespace")
        self._keeper = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if not self._keeper.stdout.read(1):
            self.close()
            pytest.skip("no network namespaces here")

    @property
    def path(self):
        """Its name, for ip-link(8)."""
        return f"/proc/{self._keeper.pid}/ns/net"

    @property
    def prefix(self):
        """A prefix that runs the program there."""
        return network_of(self._keeper.pid)

    def enter(self, work):
        """Run `work()` there; a socket that it returns stays there."""
        return in_network_namespace_of(self._keeper.pid, work)

    def run(self, script):
        """Run a shell script there; CalledProcessError at the first command that fails."""
        subprocess.run([*self.prefix, "sh", "-ec", script], check=True, capture_output=True)

    def close(self):
        self._keeper.stdin.close()
        self._keeper.stdout.close()
        self._keeper.wait()


# ── prefixes that start the program in a new namespace ───────────────────────────────────────────


def namespace_prefix(setup="ip link set lo up"):
    """A prefix that runs the program in a new network namespace, prepared by a shell command."""
    need_root("for a network namespace")
    return _probed(["unshare", "--net", "sh", "-c", f'{setup} && exec "$@"', "sh"], "networks")


def mount_prefix(*mounts):
    """A prefix that runs the program with private mounts, each given as arguments of mount(8)."""
    need_root("for private mounts")
    commands = [f"mount {mount}" for mount in mounts]
    script = " && ".join([*commands, 'exec "$@"'])
    return _probed(["unshare", "--mount", "sh", "-c", script, "sh"], "private mounts")


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

    `hosts` are lines of /etc/hosts, which comes first. A look-up without an answer fails after
    `timeout` seconds.
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
    mounts = []
    for name, text in files.items():
        file = Path(directory, name)
        file.write_text(text)
        mounts.append(f"--bind {file} /etc/{name}")
    return mount_prefix(*mounts)


def _probed(prefix, what):
    """The prefix, if it can run a command; otherwise skips the test."""
    probe = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no {what} here: {probe.stderr.decode().strip()}")
    return prefix
