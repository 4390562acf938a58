"""Two hosts and a cable between them that can be cut: network namespaces joined by a veth pair."""

from kit.namespaces import Namespace

KEEPALIVE = {"time": 1, "intvl": 1, "probes": 2}
"""Kernel settings (seconds, and a count) with which keepalive detects a dead peer in seconds."""


class Host(Namespace):
    """One of the two hosts."""

    def __init__(self, number):
        super().__init__()
        self.address = {"tcp4": f"10.99.0.{number}", "tcp6": f"fd99::{number}"}

    def set_up(self):
        """Bring up loopback and this end of the cable, and make keepalive quick."""
        settings = [
            f"echo {value} >/proc/sys/net/ipv4/tcp_keepalive_{name}"
            for name, value in KEEPALIVE.items()
        ]
        addresses = [
            f"ip address add {self.address['tcp4']}/24 dev cable",
            f"ip address add {self.address['tcp6']}/64 dev cable nodad",
        ]
        links = ["ip link set lo up", "ip link set cable up"]
        self.run("\n".join([*settings, *addresses, *links]))


class Lan:
    """`here` is where the program or its listener is; `there` is the host that vanishes."""

    def __init__(self):
        self.here = Host(1)
        self.there = Host(2)
        self.here.run(f"ip link add cable type veth peer name cable netns {self.there.path}")
        for host in (self.here, self.there):
            host.set_up()

    def cut(self):
        """From now on packets are lost without an error."""
        self.there.run("ip link set cable down")

    def close(self):
        for host in (self.here, self.there):
            host.close()
