"""`HOST:*` behind Transparent=yes: a firewall redirects every port to one listener (TPROXY).

The tests run in a network namespace of their own, in which 198.51.100.0/24 is local.
"""

import contextlib
import shutil
import socket
import subprocess

import pytest
from kit.differences import differs
from kit.namespaces import Namespace
from kit.sockets import open_connection, read_exactly, read_to_end
from kit.stage import Backend
from kit.traffic import talk
from kit.waiting import patience

OURS = "198.51.100.1"
"""Where clients connect to."""

HOST = "127.0.0.2"
"""Where the target is."""

DIVERTED = range(4000, 5000)

RULES = """
ip link set lo up
ip route add local 198.51.100.0/24 dev lo
nft add table ip t
nft 'add chain ip t divert {{ type filter hook prerouting priority mangle; }}'
nft add rule ip t divert ip daddr {ours} tcp dport {first}-{last} tproxy to 127.0.0.1:{port}
"""

pytestmark = differs("original", reason="has no HOST:*", run=False)


class Diverted(Namespace):
    """A network namespace and the sockets in it. The rules redirect to `listener`."""

    def __init__(self):
        if shutil.which("nft") is None:
            pytest.skip("no nft, for TPROXY rules")
        self.stack = contextlib.ExitStack()
        super().__init__()
        self.listener = self.open(("127.0.0.1", 0), transparent=True)
        port = self.listener.getsockname()[1]
        rules = RULES.format(ours=OURS, first=DIVERTED[0], last=DIVERTED[-1], port=port)
        try:
            self.run(rules)
        except subprocess.CalledProcessError as error:
            self.close()
            pytest.skip(f"no TPROXY here: {error.stderr.decode().strip()}")

    def open(self, address, transparent=False):
        """A listening socket."""

        def work():
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if transparent:
                listener.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, 1)
            listener.bind(address)
            listener.listen()
            return listener

        return self.stack.enter_context(self.enter(work))

    def backend(self, port):
        """A target that listens on `port`."""
        backend = Backend(self.open((HOST, port)))
        self.stack.callback(backend.close)
        return backend

    def connect(self, port):
        """A client that connects to `port`."""
        client = self.enter(lambda: open_connection((OURS, port), socket.AF_INET))
        return self.stack.enter_context(client)

    def close(self):
        """Close all sockets, and the namespace."""
        self.stack.close()
        super().close()


_IP_TRANSPARENT = 19  # linux/in.h


@pytest.fixture
def namespace():
    """A network namespace with a transparent listener."""
    one = Diverted()
    yield one
    one.close()


def launch(stage, namespace, *arguments, **options):
    """Start the program in the namespace."""
    notify = stage.notify_socket(stage.path("notify"))  # abstract names end at the namespace
    options |= {"prefix": namespace.prefix, "notify": notify}
    stage.launch(*arguments, listeners=[namespace.listener], **options)


@pytest.mark.parametrize("arguments", [[], ["--proxy-protocol=v1"]], ids=["relay", "policy"])
def test_each_client_is_forwarded_to_the_port_that_it_connected_to(stage, namespace, arguments):
    """Not to the port of the listener."""
    backends = {port: namespace.backend(port) for port in DIVERTED[:3]}
    launch(stage, namespace, *arguments, f"{HOST}:*")
    for port, backend in [*backends.items()] * 2:
        client = namespace.connect(port)
        server = backend.accept()
        if arguments:
            peer = client.getsockname()
            header = f"PROXY TCP4 {peer[0]} {OURS} {peer[1]} {port}\r\n".encode()
            assert read_exactly(server, len(header)) == header
        talk(client, server)
    assert stage.proxy.log() == ""


def test_a_port_whose_target_comes_later(stage, namespace):
    """Each port has an outage of its own: clients of other ports are served meanwhile."""
    absent, there = DIVERTED[:2]
    launch(stage, namespace, f"{HOST}:*")
    waiting = [namespace.connect(absent) for _ in range(3)]
    stage.proxy.wait_for_log(f"({HOST}:{absent}), holding clients")
    backend = namespace.backend(there)
    talk(namespace.connect(there), backend.accept())
    late = namespace.backend(absent)
    for client in waiting:
        talk(client, late.accept())


def test_many_ports_are_not_kept(stage, namespace):
    """A client for each of 300 ports: they cost neither descriptors nor a flood of lines."""
    launch(stage, namespace, "--connect-timeout=0", f"{HOST}:*")
    for port in DIVERTED[:300]:
        assert read_to_end(namespace.connect(port))[0] == b""
    assert 1 <= len(stage.proxy.log_lines("Failed to connect")) <= 5
    stage.proxy.send_signal(_SIGUSR1)
    stage.proxy.wait_for_log("300 accepted, 0 open, 0 waiting, 0 refused, 300 failed")
    (line,) = stage.proxy.log_lines(f"{HOST}:*:")
    assert "0 served, 0 waiting, 300 failed" in line


def test_a_target_that_leads_back_is_a_loop(stage, namespace):
    """Rules that redirect every port to the program redirect its own connections, too."""
    launch(stage, namespace, f"{OURS}:*")
    try:
        client = namespace.connect(DIVERTED[0])
    except ConnectionResetError:
        pass  # the reset came before connect(2) had returned
    else:
        assert read_to_end(client, timeout=patience())[0] == b""
    stage.proxy.wait_for_log("leads back to our own listener")


_SIGUSR1 = 10
