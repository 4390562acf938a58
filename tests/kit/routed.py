"""Three networks in a row: the client's, the proxy's and the target's.

Client and target have no other neighbour than the proxy's network. What the target sends to the
address of the client comes to the proxy, whose routes lead it into a socket that is bound to that
address, as the manual describes.
"""

import contextlib
import errno
import shutil
import socket

from kit.namespaces import Namespace
from kit.sockets import open_connection
from kit.stage import Backend
from kit.waiting import patience

CLIENT = {socket.AF_INET: "192.0.2.2", socket.AF_INET6: "2001:db8:1::2"}
OTHER_CLIENT = {socket.AF_INET: "192.0.2.3", socket.AF_INET6: "2001:db8:1::3"}
FRONT = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8:1::1"}
"""Where clients connect to."""
BACK = {socket.AF_INET: "198.51.100.1", socket.AF_INET6: "2001:db8:2::1"}
"""The proxy's, towards the target …"""
SPARE = {socket.AF_INET: "198.51.100.7", socket.AF_INET6: "2001:db8:2::7"}
"""… and another one of it."""
TARGET = {socket.AF_INET: "198.51.100.2", socket.AF_INET6: "2001:db8:2::2"}

_INTERFACE = """
ip link set lo up
ip link set {name} up
"""
_ADDRESS = """
ip address add {address}/{bits} dev {name} {flags}
"""
_BY_INTERFACE = """
ip {v} rule add iif back lookup 100
ip {v} route add local default dev lo table 100
"""
_BY_MARK = """
ip {v} rule add fwmark 1 lookup 100
ip {v} route add local default dev lo table 100
"""
_MARK = """
nft add table inet source
nft 'add chain inet source divert { type filter hook prerouting priority mangle; }'
nft add rule inet source divert socket transparent 1 meta mark set 1
"""


class Routed:
    """The three networks, and the sockets in them."""

    def __init__(self):
        self.stack = contextlib.ExitStack()
        try:
            self.client, self.proxy, self.target = (self._network() for _ in range(3))
            self._connect()
            self._introduce()
        except BaseException:
            self.close()
            raise

    def _network(self):
        made = Namespace()
        self.stack.callback(made.close)
        return made

    def _connect(self):
        self.proxy.run(
            f"ip link add front type veth peer name uplink netns {self.client.path}\n"
            f"ip link add back type veth peer name uplink netns {self.target.path}"
        )
        for network, name in (
            (self.client, "uplink"),
            (self.target, "uplink"),
            (self.proxy, "front"),
            (self.proxy, "back"),
        ):
            network.run(_INTERFACE.format(name=name))
        for family, bits in ((socket.AF_INET, 24), (socket.AF_INET6, 64)):
            for network, name, places in (
                (self.client, "uplink", (CLIENT, OTHER_CLIENT)),
                (self.proxy, "front", (FRONT,)),
                (self.proxy, "back", (BACK, SPARE)),
                (self.target, "uplink", (TARGET,)),
            ):
                flags = "nodad" if family == socket.AF_INET6 else ""
                for place in places:
                    about = {"address": place[family], "bits": bits, "name": name, "flags": flags}
                    network.run(_ADDRESS.format(**about))
            self.target.run(f"ip {_v(family)} route add default via {BACK[family]}")

    def _introduce(self):
        """Have neighbours find each other, which may take IPv6 more than a second.

        While a target is silent for so long, the proxy makes a second connection to it.
        """
        for family in (socket.AF_INET, socket.AF_INET6):
            for network, place in ((self.client, FRONT), (self.proxy, TARGET)):
                with network.enter(lambda to=place[family]: _reach(to)):
                    pass

    def lead_back(self, *, by_mark=False):
        """Lead to the proxy what the target sends to clients."""
        self.proxy.run("echo 1 | tee /proc/sys/net/ipv4/conf/*/rp_filter")
        for family in (socket.AF_INET, socket.AF_INET6):
            rules = _BY_MARK if by_mark else _BY_INTERFACE
            self.proxy.run(rules.format(v=_v(family)))
        if by_mark:
            assert shutil.which("nft")
            self.proxy.run(_MARK)

    def listener(self, family, host=None, port=0):
        """A listening socket of the proxy."""
        host = FRONT[family] if host is None else host
        return self._keep(self.proxy, lambda: _listen(family, (host, port)))

    def backend(self, family, port=0):
        """A target for which the test plays the server."""
        made = Backend(self._keep(self.target, lambda: _listen(family, (TARGET[family], port))))
        self.stack.callback(made.close)
        return made

    def connect(self, address, family, source=None):
        """A client's connection, from another address of it perhaps."""

        def work():
            if source is None:
                return open_connection(address, family)
            made = socket.socket(family)
            made.settimeout(patience())
            made.bind((source, 0))
            made.connect(address)
            return made

        return self._keep(self.client, work)

    def datagram_socket(self, network, family, host, port=0):
        """A bound datagram socket in one of the networks."""

        def work():
            made = socket.socket(family, socket.SOCK_DGRAM)
            made.settimeout(patience())
            made.bind((host, port))
            return made

        return self._keep(network, work)

    def _keep(self, network, work):
        return self.stack.enter_context(network.enter(work))

    def close(self):
        """Close all sockets and networks."""
        self.stack.close()


def _reach(host):
    """Connect to a port on which nobody listens, which only a neighbour refuses."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.settimeout(patience())
    assert made.connect_ex((host, 9)) == errno.ECONNREFUSED
    return made


def _listen(family, address):
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
    made.bind(address)
    made.listen()
    return made


def _v(family):
    return "-6" if family == socket.AF_INET6 else "-4"
