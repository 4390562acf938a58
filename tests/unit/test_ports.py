"""`HOST:*`: the ways to ports that are no listener's, made when needed and not kept."""

import socket

import pytest

from proxyd import intake as intake_module
from proxyd import ports as ports_module
from proxyd._relay import CHECK_PORT
from proxyd.address import pack_inet
from proxyd.intake import Door
from proxyd.listen import Listener
from proxyd.loop import Loop
from proxyd.ports import Ports
from proxyd.reach import Reach
from proxyd.target import parse_target

MOST = ports_module._IDLE_MOST
KIND = "127.0.0.2:*"


class World:
    """Ports of a target, with real ways."""

    def __init__(self):
        self.loop = Loop()
        self.target = parse_target(KIND)
        self.made = []
        self.all = []
        self.ports = Ports(self.make, self.all)

    def make(self, port):
        self.made.append(port)
        return Reach(self.loop, None, self.target, port, 10_000)


@pytest.fixture
def world():
    return World()


def test_each_port_has_a_way_of_its_own(world):
    ways = [world.ports.way(port) for port in (80, 443, 80)]
    assert [way.text for way in ways] == ["127.0.0.2:80", "127.0.0.2:443", "127.0.0.2:80"]
    assert ways[0] is ways[2]
    assert world.made == [80, 443]
    assert world.all == ways[:2]
    assert ways[1].express == pack_inet("127.0.0.2", 443)
    # The log limits their lines together, or a port scan would flood it.
    assert [way.kind for way in ways] == [KIND] * 3
    assert ways[0]._outages.kind == KIND


def test_the_port_of_a_listener_has_its_way_already(world):
    world.ports.fixed[80] = world.make(80)
    assert world.ports.way(80) is world.ports.fixed[80]
    assert world.made == [80]


def test_ways_are_not_kept(world):
    for port in range(1, 1001):
        way = world.ports.way(port)
        way.served += 1
        way.failed += 2
    assert len(world.all) == MOST == len(world.loop.races)
    assert [one.port for one in world.all] == list(range(1001 - MOST, 1001))
    # Nothing that was counted is lost with them.
    assert sum(one.served for one in world.all) == 1000
    assert sum(one.failed for one in world.all) == 2000


def test_those_used_last_are_kept(world):
    for port in range(1, MOST + 1):
        world.ports.way(port)
    first = world.ports.way(1)
    world.ports.way(1000)
    assert world.ports.way(1) is first
    assert 2 not in [way.port for way in world.all]


def test_ways_on_which_clients_wait_are_kept(world):
    busy = [world.ports.way(port) for port in range(1, MOST)]
    for way in busy[:5]:
        way.held[-1] = None
    for port in range(1000, 1000 + 3 * MOST):
        world.ports.way(port)
    assert world.ports.held == 5
    assert set(busy[:5]) <= set(world.all)
    assert len(world.all) == MOST


@pytest.fixture
def gates(monkeypatch):
    """What gates are made with."""
    made = []

    def make(*arguments):
        made.append(arguments)
        return arguments

    monkeypatch.setattr(intake_module, "RelayListener", make)
    monkeypatch.setattr(intake_module, "what_to_check", lambda listener: 0)
    return made


def door(world, ports):
    listener = Listener(-1, "x", pack_inet("127.0.0.1", 80))
    listener.target = world.target
    return Door(world.loop, 0, listener, world.make(80), ports)


def test_the_way_of_a_client_is_that_of_its_port(world, gates, monkeypatch):
    one = door(world, world.ports)
    assert gates[0][3] == CHECK_PORT
    world.ports.fixed[80] = one.way
    for port, text in ((80, "127.0.0.2:80"), (443, "127.0.0.2:443"), (0, "127.0.0.2:80")):
        names = (b"", pack_inet("198.51.100.1", port))
        monkeypatch.setattr(intake_module, "socket_names", lambda fd, names=names: names)
        assert one.way_of(7).text == text


def test_a_client_that_has_reset_still_has_its_port(world, gates):
    one = door(world, world.ports)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            with pytest.raises(ConnectionResetError):
                accepted.recv(1)
            port = listener.getsockname()[1]
            assert one.way_of(accepted.fileno()).port == port


def test_other_targets_ask_no_client_for_its_port(world, gates, monkeypatch):
    monkeypatch.setattr(intake_module, "socket_names", None)
    one = door(world, None)
    assert one.way_of(7) is one.way
    assert gates[0][3] == 0
