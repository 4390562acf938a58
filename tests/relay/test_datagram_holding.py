"""A target that is down: nothing is lost that can be kept, and nothing is sent twice."""

import errno
import socket

import pytest
from kit.child import in_child
from kit.datagram_rig import receive_all
from kit.namespaces import in_own_network

from proxyd._datagram import DROP_DOWN, TargetDown, TargetHolds, TargetUp
from proxyd._relay import socket_names

KINDS = ("udp4", "udp6", "unix", "abstract")


@pytest.fixture(params=KINDS)
def target(request):
    return request.param


def down_rig(datagram_rigs, target, **options):
    """A rig whose target is down, with one datagram in hand; and the client that has sent it."""
    rig = datagram_rigs("udp4", target, **options)
    rig.server_ends()
    client = rig.client()
    client.send(b"0")
    assert rig.wait_for(TargetDown).error in (errno.ECONNREFUSED, errno.ENOENT)
    return rig, client


def test_the_state_at_the_start(datagram_rigs):
    rig = datagram_rigs(known=False)
    assert (rig.target.state, rig.target.held, rig.target.held_since_ms) == ("down", 0, 0)
    rig.target.set_address(rig.address)
    assert rig.target.state == "doubt"
    rig.ask(rig.client())
    assert rig.target.state == "up"
    assert rig.events == []


def test_datagrams_wait_for_a_target(datagram_rigs, target):
    rig, client = down_rig(datagram_rigs, target)
    assert rig.of_kind(TargetDown)[0].target == 7
    assert (rig.target.state, rig.target.held) == ("down", 1)
    assert 0 < rig.target.held_since_ms <= rig.relay.now_ms
    for number in range(1, 100):
        client.send(b"%d" % number)
    rig.settle()
    assert rig.target.held == 1  # the others wait in the kernel's queue
    assert rig.is_calm()
    rig.server_begins()
    rig.settle()
    assert rig.target.held == 1  # nobody has probed
    rig.target.probe()
    found = []

    def all_there():
        found.extend(data for data, _ in receive_all(rig.server))
        return len(found) >= 100

    rig.until(all_there, "all of them")
    rig.settle()
    assert found + receive_all(rig.server) == [b"%d" % number for number in range(100)]
    assert (rig.target.state, rig.target.held, rig.target.held_since_ms) == ("up", 0, 0)
    assert [type(event) for event in rig.events] == [TargetDown, TargetUp]
    assert rig.dropped() == {}


def test_a_probe_that_fails_is_told(datagram_rigs, target):
    rig, _ = down_rig(datagram_rigs, target)
    for count in range(2, 5):
        rig.target.probe()
        rig.wait_for(TargetDown, count)
        assert (rig.target.state, rig.target.held) == ("down", 1)
    rig.server_begins()
    rig.target.probe()
    assert [data for data, _ in rig.received()] == [b"0"]
    rig.settle()
    assert receive_all(rig.server) == []


def test_a_probe_without_need_does_nothing(datagram_rigs):
    rig = datagram_rigs()
    rig.target.probe()
    rig.ask(rig.client())
    rig.target.probe()
    rig.settle()
    assert rig.events == []
    assert rig.target.state == "up"


def test_what_is_held_for_too_long_is_dropped_with_the_queue(datagram_rigs, target):
    rig, client = down_rig(datagram_rigs, target)
    for number in range(1, 60):
        client.send(b"%d" % number)
    rig.settle()
    assert rig.target.drop_held() == 60
    assert rig.dropped() == {DROP_DOWN: 60}
    assert (rig.target.state, rig.target.held, rig.target.held_since_ms) == ("down", 0, 0)
    rig.settle()
    assert rig.of_kind(TargetHolds) == []
    client.send(b"next")
    rig.wait_for(TargetHolds)
    assert rig.target.held == 1
    rig.server_begins()
    rig.target.probe()
    assert [data for data, _ in rig.received()] == [b"next"]
    rig.wait_for(TargetUp)


def test_a_target_without_an_address_is_waited_for(datagram_rigs):
    rig = datagram_rigs(known=False)
    client = rig.client()
    client.send(b"early")
    assert rig.wait_for(TargetHolds).target == 7
    rig.target.probe()
    rig.settle()
    assert rig.target.state == "down"
    rig.target.set_address(rig.address)
    assert rig.target.state == "down"
    rig.target.probe()
    assert [data for data, _ in rig.received()] == [b"early"]
    rig.wait_for(TargetUp)
    rig.target.set_address(None)
    assert rig.target.state == "down"
    client.send(b"late")
    rig.wait_for(TargetHolds, 2)


def test_new_flows_go_to_the_new_address_of_a_target(datagram_rigs, target):
    rig = datagram_rigs("udp4", "udp4")
    client, late = rig.client(), rig.client()
    own = rig.ask(client)
    first = rig.server
    other = datagram_rigs("udp4", target)
    rig.target.set_address(other.address)
    rig.target.set_address(other.address)
    assert rig.ask(client) == own  # at the old one
    rig.server = other.server
    rig.ask(late)
    rig.server = first
    assert rig.ask(client) == own
    targets = [row.target for row in rig.datagrams.rows()]
    assert targets == [rig.address, other.address]


def test_a_flow_follows_when_nobody_is_there_any_more(datagram_rigs, target):
    rig = datagram_rigs("udp4", "udp4")
    client = rig.client()
    rig.ask(client)
    other = datagram_rigs("udp4", target)
    rig.target.set_address(other.address)
    rig.server_ends()
    rig.server = other.server
    rig.ask(client)
    assert rig.datagrams.flows == 1
    (row,) = rig.datagrams.rows()
    assert row.established
    assert row.target == other.address
    assert rig.events == []


def test_a_flow_that_was_refused_follows(datagram_rigs, target):
    rig = datagram_rigs("udp4", "udp4")
    client = rig.client()
    rig.ask(client)
    rig.server_ends()
    client.send(b"lost")
    rig.until(lambda: rig.target.state == "doubt", "the refusal")
    other = datagram_rigs("udp4", target)
    rig.target.set_address(other.address)
    rig.server = other.server
    rig.ask(client)
    assert rig.events == []


def test_a_target_may_end_between_two_datagrams(datagram_rigs, target):
    """Over IP it is the first datagram after the end that finds out, and is lost."""
    rig = datagram_rigs("udp4", target)
    client = rig.client()
    rig.ask(client)
    rig.server_ends()
    client.send(b"0")
    rig.until(lambda: rig.target.state != "up", "the refusal")
    for number in range(1, 20):
        client.send(b"%d" % number)
    rig.wait_for(TargetDown)
    rig.server_begins()
    rig.target.probe()
    first = 0 if target in ("unix", "abstract") else 1
    sent = [b"%d" % number for number in range(first, 20)]
    assert [data for data, _ in rig.received(len(sent))] == sent
    rig.settle()
    assert receive_all(rig.server) == []


def test_a_target_may_restart_between_two_datagrams(datagram_rigs, target):
    rig = datagram_rigs("udp4", target)
    client = rig.client()
    own = rig.ask(client)
    rig.server_ends()
    rig.server_begins()
    assert rig.ask(client) == own
    assert rig.events == []


def test_a_stale_refusal_swallows_nothing(datagram_rigs):
    """It is told to the next send, which sends nothing then: fault 2 of other proxies."""
    rig = datagram_rigs()
    client = rig.client()
    rig.ask(client)
    rig.server_ends()
    client.send(b"refused")
    rig.until(lambda: rig.target.state == "doubt", "the refusal")
    rig.server_begins()
    client.send(b"not lost")
    assert [data for data, _ in rig.received()] == [b"not lost"]
    assert rig.events == []


@pytest.mark.parametrize("flows", [1, 5])
def test_an_error_ends_no_flow(datagram_rigs, flows):
    rig = datagram_rigs()
    clients = [rig.client() for _ in range(flows)]
    own = [rig.ask(client) for client in clients]
    rig.server_ends()
    for client in clients:
        client.send(b"refused")
    rig.settle()
    rig.server_begins()
    rig.target.probe()
    rig.until(lambda: rig.target.held == 0, "the end of the outage")
    receive_all(rig.server)
    assert [rig.ask(client) for client in clients] == own
    assert rig.datagrams.flows == flows


def test_without_holding_what_is_refused_is_dropped(datagram_rigs, target):
    rig = datagram_rigs("udp4", target)
    rig.target.holds = False
    assert not rig.target.holds
    rig.server_ends()
    client = rig.client()
    for _ in range(20):
        client.send(b"lost")
    rig.until(lambda: rig.dropped() == {DROP_DOWN: 20}, "the drops")
    assert (rig.target.state, rig.target.held) == ("doubt", 0)
    assert len(rig.of_kind(TargetDown)) == 1  # at most one in a second
    rig.server_begins()
    rig.ask(client)
    rig.wait_for(TargetUp)


def test_each_listener_has_one_datagram_in_hand(datagram_rigs):
    rig, _ = down_rig(datagram_rigs, "udp4")
    other = rig.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    other.setblocking(False)
    other.bind(("127.0.0.1", 0))
    rig.add_listener(other)
    client = rig.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    client.connect(other.getsockname())
    client.send(b"other")
    client.send(b"queued")
    rig.until(lambda: rig.target.held == 2, "the other one")
    rig.server_begins()
    rig.target.probe()
    assert {data for data, _ in rig.received(3)} == {b"0", b"other", b"queued"}


def test_a_full_queue_of_a_unix_target_is_no_outage(datagram_rigs):
    rig = datagram_rigs("udp4", "unix")
    client, other = rig.client(), rig.client()
    for number in range(50):
        (client if number % 2 else other).send(b"%d" % number)
    rig.settle()
    assert rig.is_calm()
    found = []

    def all_there():
        found.extend(data for data, _ in receive_all(rig.server))
        return len(found) >= 50

    rig.until(all_there, "all of them")
    assert sorted(found, key=int) == [b"%d" % number for number in range(50)]
    assert rig.events == []
    assert rig.dropped() == {}
    assert rig.is_calm()


def test_the_flow_that_waits_for_room_may_end(datagram_rigs):
    rig = datagram_rigs("udp4", "unix")
    client = rig.client()
    for number in range(30):
        client.send(b"%d" % number)
    rig.settle()
    assert rig.datagrams.terminate(rig.datagrams.rows()[0].flow)
    rig.settle()
    assert rig.datagrams.flows == 1  # a new one, which waits now
    found = []
    rig.until(lambda: found.extend(receive_all(rig.server)) or len(found) >= 30, "the rest")
    assert [data for data, _ in found] == [b"%d" % number for number in range(30)]


def test_a_target_that_is_connected_to_itself_is_down(datagram_rigs):
    """The kernel may give a flow's socket the very port that it is to connect to."""

    def scenario():
        rig = datagram_rigs()
        rig.server_ends()
        port = int.from_bytes(rig.address[2:4], "big")
        client = rig.client()
        with open("/proc/sys/net/ipv4/ip_local_port_range", "w") as file:
            file.write(f"{port} {port}")
        client.send(b"question")
        rig.until(lambda: rig.events, "an outage")
        assert rig.wait_for(TargetDown).error == errno.ECONNREFUSED
        assert rig.datagrams.flows == 0

    in_child(in_own_network(scenario))


@pytest.mark.parametrize("target", ["udp4", "udp6"])
def test_the_unspecified_address_means_this_machine(datagram_rigs, target):
    """A refusal is seen at once, and so is a loop of one."""
    rig = datagram_rigs("udp4", target)
    loopback = socket_names(rig.server.fileno())[1]
    zero = loopback[:4] + bytes(4) + loopback[8:]
    if target == "udp6":
        zero = loopback[:8] + bytes(16) + loopback[24:]
    rig.target.set_address(zero)
    client = rig.client()
    rig.ask(client)
    assert rig.datagrams.rows()[0].target == loopback
    rig.server_ends()
    client.send(b"refused")
    rig.until(lambda: rig.target.state == "doubt", "the refusal")
    client.send(b"held")
    rig.wait_for(TargetDown)
    assert rig.target.held == 1


def test_no_route_is_an_outage(datagram_rigs):
    def scenario():
        rig = datagram_rigs(known=False)
        packed = bytearray(socket_names(rig.server.fileno())[1])
        packed[4:8] = socket.inet_aton("192.0.2.1")
        rig.target.set_address(bytes(packed))
        rig.client().send(b"question")
        assert rig.wait_for(TargetDown).error == errno.ENETUNREACH
        assert (rig.target.held, rig.datagrams.flows) == (1, 0)
        rig.target.set_address(rig.address)
        rig.target.probe()
        assert [data for data, _ in rig.received()] == [b"question"]

    in_child(in_own_network(scenario))
