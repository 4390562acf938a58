"""Networks and files of a test's own: the kernel's namespaces, entered in each way there is.

This process enters a new network (enter_own_network), a thread enters another's for a moment
(in_network_namespace_of), a process keeps one (Namespace), or the program under test is started in
one: the functions that return a prefix of its command.
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
    """Leave this process's network for a namespace with nothing in it but loopback. OSError."""
    if _libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "no network namespace")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def enter_network_for(program):
    """As enter_own_network(), for a program that loads it; False where it may not, and it says so.

    A fresh one per run: no sockets in TIME_WAIT left from the run before, no packet filter of the
    machine's, and nothing that others do on its loopback.
    """
    try:
        enter_own_network()
    except OSError:
        print(f"{program} CANNOT RUN HERE: no network of its own (not root?)", file=sys.stderr)
        return False
    # Short connections wear out the default range of ports within two seconds.
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("1024 65000")
    return True


def in_own_network(function):
    """Has `function` see a network namespace with nothing in it but loopback. For in_child()."""

    def run():
        try:
            enter_own_network()
        except OSError as error:
            pytest.skip(f"no network namespace: {os.strerror(error.errno)}")
        function()

    return run


# ── another process's ────────────────────────────────────────────────────────────────────────────


def in_network_namespace_of(pid, work):
    """Run `work()` in a thread that has entered the network namespace of `pid`.

    A socket stays in the namespace in which it was made, so what `work` returns may be used from
    every thread.
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
        """Run a shell script there, to its first command that fails; CalledProcessError then."""
        subprocess.run([*self.prefix, "sh", "-ec", script], check=True, capture_output=True)

    def close(self):
        self._keeper.stdin.close()
        self._keeper.stdout.close()
        self._keeper.wait()


# ── prefixes: the program is started in a new one ────────────────────────────────────────────────


def namespace_prefix(setup="ip link set lo up"):
    """A prefix that runs the program in a new network namespace, prepared by a shell command."""
    need_root("for a network namespace")
    return _probed(["unshare", "--net", "sh", "-c", f'{setup} && exec "$@"', "sh"], "networks")


def mount_prefix(*mounts):
    """A prefix that runs the program with private mounts: arguments of mount(8)."""
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
    mounts = []
    for name, text in files.items():
        file = Path(directory, name)
        file.write_text(text)
        mounts.append(f"--bind {file} /etc/{name}")
    return mount_prefix(*mounts)


def _probed(prefix, what):
    """The prefix, once a command could be run with it."""
    probe = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no {what} here: {probe.stderr.decode().strip()}")
    return prefix
