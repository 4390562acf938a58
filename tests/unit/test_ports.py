"""`HOST:*`: upstreams to ports without a listener are made when needed, and few are kept."""

import os
import socket

import pytest
from kit.sockets import reset

from proxyd import acceptor as acceptor_module
from proxyd import ports as ports_module
from proxyd._relay import CHECK_PORT
from proxyd.acceptor import Acceptor, upstream_of
from proxyd.address import AF_UNIX, pack_inet, pack_unix
from proxyd.event_loop import EventLoop
from proxyd.held import HeldClient
from proxyd.listen import Listener
from proxyd.ports import Ports
from proxyd.target import parse_target
from proxyd.upstream import Upstream

IDLE_MAX = ports_module._IDLE_MAX
TARGET = "127.0.0.2:*"


class World:
    """Ports of a target, with real upstreams."""

    def __init__(self):
        self.loop = EventLoop()
        self.target = parse_target(TARGET)
        self.made = []
        self.all = []
        self.ports = Ports(self.make, self.all.remove)

    def make(self, port, client=b""):
        self.made.append(port)
        self.all.append(Upstream(self.loop, None, self.target, port, 10_000, client))
        return self.all[-1]


@pytest.fixture
def world():
    return World()


def test_each_port_has_an_upstream_of_its_own(world):
    upstreams = [world.ports.upstream(port) for port in (80, 443, 80)]
    assert [upstream.text for upstream in upstreams] == [
        "127.0.0.2:80",
        "127.0.0.2:443",
        "127.0.0.2:80",
    ]
    assert upstreams[0] is upstreams[2]
    assert world.made == [80, 443]
    assert world.all == upstreams[:2]
    assert upstreams[1].auto_connect_address == pack_inet("127.0.0.2", 443)
    # Their log lines are limited together, or a port scan would flood the log.
    assert [one.group for one in upstreams] == [TARGET] * 3
    assert upstreams[0].outage.group == TARGET


def test_the_port_of_a_listener_uses_its_upstream(world):
    fixed = world.make(80)
    world.ports.add_fixed(fixed)
    assert world.ports.upstream(80) is fixed
    assert world.made == [80]


def test_few_upstreams_are_kept(world):
    for port in range(1, 1001):
        upstream = world.ports.upstream(port)
        upstream.served += 1
        upstream.held.failed += 2
    assert len(world.all) == IDLE_MAX == len(world.loop.budget._surpluses)
    assert [one.port for one in world.all] == list(range(1001 - IDLE_MAX, 1001))
    # Nothing that was counted is lost with them.
    assert sum(one.served for one in world.all) == 1000
    assert sum(one.held.failed for one in world.all) == 2000


def test_the_upstreams_used_last_are_kept(world):
    for port in range(1, IDLE_MAX + 1):
        world.ports.upstream(port)
    first = world.ports.upstream(1)
    world.ports.upstream(1000)
    assert world.ports.upstream(1) is first
    assert 2 not in [upstream.port for upstream in world.all]


def test_upstreams_with_held_clients_are_kept(world):
    busy = [world.ports.upstream(port) for port in range(1, IDLE_MAX)]
    for upstream in busy[:5]:
        fd = os.open("/dev/null", os.O_RDONLY)
        upstream.held.add(HeldClient(fd, AF_UNIX, None, "", 0))
    for port in range(1000, 1000 + 3 * IDLE_MAX):
        world.ports.upstream(port)
    assert world.ports.held == 5
    assert set(busy[:5]) <= set(world.all)
    assert len(world.all) == IDLE_MAX
    assert sum(upstream.drop_all() for upstream in world.all) == 5


def test_each_address_of_clients_has_an_upstream_of_its_own(world):
    world.ports = Ports(world.make, world.all.remove, by_client=True)
    fixed = world.make(80)
    world.ports.add_fixed(fixed)
    peers = {
        pack_inet("192.0.2.1", 5000): pack_inet("192.0.2.1", 0),
        pack_inet("192.0.2.2", 5000): pack_inet("192.0.2.2", 0),
        pack_inet("::ffff:192.0.2.1", 5001): pack_inet("192.0.2.1", 0),
        pack_inet("2001:db8::1", 5000): pack_inet("2001:db8::1", 0),
    }
    found = {peer: world.ports.upstream(80, peer) for peer in peers}
    assert [one._attempts.client for one in found.values()] == list(peers.values())
    assert len(set(found.values())) == 3
    assert fixed not in found.values()
    assert world.ports.upstream(80, pack_unix("/run/x")) is fixed  # which has no address
    assert world.ports.upstream(443, pack_inet("192.0.2.1", 1)) not in found.values()


@pytest.fixture
def unchecked_listeners(fake_listeners, monkeypatch):
    """Fake listeners, without the check for loops, which needs real ones."""
    monkeypatch.setattr(acceptor_module, "what_to_check", lambda listener: 0)


def listener_with(world, ports):
    listener = Listener(-1, "x", pack_inet("127.0.0.1", 80))
    listener.target = world.target
    listener.upstream, listener.ports = world.make(80), ports
    Acceptor(world.loop, [listener], 256, 0)
    return listener


def test_the_upstream_of_a_client_is_that_of_its_port(world, unchecked_listeners, monkeypatch):
    one = listener_with(world, world.ports)
    assert one.relay_listener.check == CHECK_PORT
    world.ports.add_fixed(one.upstream)
    for port, text in ((80, "127.0.0.2:80"), (443, "127.0.0.2:443"), (0, "127.0.0.2:80")):
        names = (b"", pack_inet("198.51.100.1", port))
        monkeypatch.setattr(acceptor_module, "socket_names", lambda fd, names=names: names)
        assert upstream_of(one, 7).text == text


def test_a_client_that_has_reset_still_has_its_port(world, unchecked_listeners):
    one = listener_with(world, world.ports)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            reset(client)
            with pytest.raises(ConnectionResetError):
                accepted.recv(1)
            port = listener.getsockname()[1]
            assert upstream_of(one, accepted.fileno()).port == port


def test_other_targets_need_no_port_of_a_client(world, unchecked_listeners, monkeypatch):
    monkeypatch.setattr(acceptor_module, "socket_names", None)
    one = listener_with(world, None)
    assert upstream_of(one, 7) is one.upstream
    assert one.relay_listener.check == 0
