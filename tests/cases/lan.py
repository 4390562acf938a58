"""Two hosts and a cable between them that can be cut: network namespaces joined by a veth pair."""

import subprocess

import pytest
from kit.kernel import in_network_namespace_of
from kit.privileges import need_root

KEEPALIVE = {"time": 1, "intvl": 1, "probes": 2}
"""Seconds and counts, so that a keepalive that is on finds a silent peer within seconds."""


class Host:
    """A network namespace, kept by a process that does nothing else."""

    def __init__(self, number):
        self.address = {"tcp4": f"10.99.0.{number}", "tcp6": f"fd99::{number}"}
        self.process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if not self.process.stdout.read(1):
            self.close()
            pytest.skip("no network namespaces here")

    def enter(self, work):
        """Run `work()` there; a socket that it returns stays there."""
        return in_network_namespace_of(self.process.pid, work)

    def prefix(self):
        """A prefix that runs the program there."""
        return ["nsenter", f"--net=/proc/{self.process.pid}/ns/net"]

    def run(self, command):
        """Run a shell command there."""
        subprocess.run([*self.prefix(), "sh", "-c", command], check=True, capture_output=True)

    def set_up(self):
        """Bring up loopback and the cable's end, and let keepalive be quick."""
        settings = [
            f"echo {value} >/proc/sys/net/ipv4/tcp_keepalive_{name}"
            for name, value in KEEPALIVE.items()
        ]
        addresses = [
            f"ip address add {self.address['tcp4']}/24 dev cable",
            f"ip address add {self.address['tcp6']}/64 dev cable nodad",
        ]
        links = ["ip link set lo up", "ip link set cable up"]
        self.run(" && ".join([*settings, *addresses, *links]))

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Lan:
    """`here`, where the program or its listener is, and `there`, which may vanish."""

    def __init__(self):
        need_root("for network namespaces")
        self.here = Host(1)
        self.there = Host(2)
        peer = f"/proc/{self.there.process.pid}/ns/net"
        self.here.run(f"ip link add cable type veth peer name cable netns {peer}")
        for host in (self.here, self.there):
            host.set_up()

    def cut(self):
        """From now on no packet arrives, and nobody is told."""
        self.there.run("ip link set cable down")

    def close(self):
        for host in (self.here, self.there):
            host.close()
