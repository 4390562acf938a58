"""The table of flows is bounded, and flows end when they were silent for too long."""

import errno
import os
import resource
import socket

import pytest
from kit.child import in_child
from kit.datagram_rig import receive_all
from kit.rig import FAMILIES
from kit.sockets import open_listener

from proxyd._datagram import (
    DROP_LIMIT,
    DROP_LOOP,
    DROP_NO_SOCKET,
    FlowEnded,
    FlowFailed,
    FlowsRefused,
    ListenerFailed,
    LoopFound,
)
from proxyd._relay import Accepted, RelayListener, socket_names


def establish(rig, client):
    """Make a client's flow an established one."""
    rig.ask(client)
    return rig.ask(client)


# ── the limit ────────────────────────────────────────────────────────────────────────────────────


def test_an_established_flow_keeps_its_place(datagram_rigs):
    rig = datagram_rigs()
    rig.relay.connections_max = 3
    talkers = [rig.client() for _ in range(3)]
    own = [establish(rig, client) for client in talkers]
    others = [rig.client() for _ in range(20)]
    for client in others:
        client.send(b"spoofed")
    event = rig.wait_for(FlowsRefused)
    assert event.listener == 0
    rig.until(lambda: rig.dropped() == {DROP_LIMIT: 20}, "the drops")
    assert event.peer[4:8] == bytes([127, 0, 0, 1])
    assert [rig.ask(client) for client in talkers] == own
    assert rig.datagrams.flows == rig.relay.connections == 3
    # The first datagram is told of at once, the others after a second.
    rig.until(lambda: sum(one.count for one in rig.of_kind(FlowsRefused)) == 20, "all of them")
    assert len(rig.of_kind(FlowsRefused)) <= 2


def test_who_has_its_answer_makes_room_first(datagram_rigs):
    rig = datagram_rigs()
    rig.datagrams.report_flows = True
    rig.relay.connections_max = 3
    unanswered, answered, established = (rig.client() for _ in range(3))
    unanswered.send(b"?")
    rig.received()
    rig.ask(answered)
    establish(rig, established)
    ids = [row.flow for row in rig.datagrams.rows()]
    for _ in range(3):
        rig.client().send(b"new")
        rig.received()
    ended = rig.of_kind(FlowEnded)
    rig.until(lambda: len(rig.of_kind(FlowEnded)) == 3, "three ends")
    ended = [(one.info.flow, one.ending) for one in rig.of_kind(FlowEnded)]
    assert ended[:2] == [(ids[1], "evicted"), (ids[0], "evicted")]
    assert ids[2] in [row.flow for row in rig.datagrams.rows()]
    assert rig.datagrams.totals().endings["evicted"] == 3
    rig.ask(established)


def test_of_one_class_the_longest_silent_goes(datagram_rigs):
    rig = datagram_rigs()
    rig.relay.connections_max = 3
    clients = [rig.client() for _ in range(3)]
    for client in clients:
        client.send(b"?")
        rig.received()
    rig.pass_time(3)
    clients[0].send(b"again")
    rig.received()
    rig.client().send(b"new")
    rig.received()
    left = {row.client[2:4] for row in rig.datagrams.rows()}
    ports = [client.getsockname()[1].to_bytes(2, "big") for client in clients]
    assert ports[0] in left
    assert ports[1] not in left
    assert ports[2] in left


def test_a_stream_client_takes_the_place_of_a_flow(datagram_rigs, tmp_path):
    rig = datagram_rigs()
    rig.relay.connections_max = 2
    for _ in range(2):
        rig.ask(rig.client())
    with open_listener("tcp4", tmp_path) as tcp:
        tcp.setblocking(False)
        listener = RelayListener(rig.relay, tcp.fileno(), FAMILIES["tcp4"], 0, 0)
        listener.start()
        with socket.create_connection(tcp.getsockname()):
            rig.wait_for(Accepted)
        listener.stop()
    assert rig.datagrams.flows == 1


def test_a_stream_client_does_not_take_the_place_of_one_that_talks(datagram_rigs, tmp_path):
    rig = datagram_rigs()
    rig.relay.connections_max = 1
    client = rig.client()
    own = establish(rig, client)
    with open_listener("tcp4", tmp_path) as tcp:
        tcp.setblocking(False)
        listener = RelayListener(rig.relay, tcp.fileno(), FAMILIES["tcp4"], 0, 0)
        listener.start()
        with socket.create_connection(tcp.getsockname()):
            rig.wait_for(Accepted)  # to be closed by the policy
            assert rig.datagrams.flows == 1
        listener.stop()
    assert rig.ask(client) == own


def test_connections_count_for_flows_too(datagram_rigs):
    rig = datagram_rigs()
    rig.relay.connections_max = 2
    rig.relay.held = 2  # clients that the policy has
    rig.client().send(b"no room")
    rig.until(lambda: rig.dropped() == {DROP_LIMIT: 1}, "the drop")


def test_more_flows_than_the_table_began_with(datagram_rigs):
    """It grows, and every client keeps its flow."""
    rig = datagram_rigs()
    clients = [rig.client() for _ in range(300)]
    flows = [rig.ask(client) for client in clients]
    assert rig.datagrams.flows == len(set(flows)) == 300
    assert [rig.ask(client) for client in clients] == flows
    assert rig.datagrams.flows == 300


def test_without_a_free_fd_datagrams_are_dropped(datagram_rigs):
    def scenario():
        rig = datagram_rigs()
        client, other = rig.client(), rig.client()
        rig.ask(client)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        other.send(b"no socket")
        event = rig.wait_for(FlowFailed)
        assert (event.listener, event.error, event.count) == (0, errno.EMFILE, 1)
        assert rig.dropped() == {DROP_NO_SOCKET: 1}
        rig.ask(client)

    in_child(scenario)


# ── idle times ───────────────────────────────────────────────────────────────────────────────────


def test_flows_expire_by_class(datagram_rigs):
    rig = datagram_rigs(fresh_ms=600, established_ms=60_000)
    rig.datagrams.report_flows = True
    silent, answered, established = (rig.client() for _ in range(3))
    establish(rig, established)
    rig.ask(answered)
    silent.send(b"?")
    rig.received()
    rig.wait_for(FlowEnded, 2)
    assert rig.datagrams.flows == rig.relay.connections == 1
    for event in rig.of_kind(FlowEnded):
        assert (event.ending, event.info.established) == ("expired", False)
        assert event.info.active_ms + 600 <= rig.relay.now_ms
    rig.datagrams.idle_ms = 100
    event = rig.wait_for(FlowEnded, 3)
    assert (event.ending, event.info.established) == ("expired", True)
    assert rig.datagrams.totals().endings["expired"] == 3
    assert rig.relay.connections == 0
    rig.ask(established)  # a new flow


@pytest.mark.parametrize("direction", ["up", "down"])
def test_each_direction_renews_a_flow(datagram_rigs, direction):
    rig = datagram_rigs()
    client = rig.client()
    own = rig.ask(client)
    for _ in range(3):
        (before,) = rig.datagrams.rows()
        rig.pass_time(3)
        if direction == "up":
            client.send(b"more")
            assert rig.received()[0][1] == own
        else:
            rig.server.sendto(b"more", own)
            rig.replies(client)
        (after,) = rig.datagrams.rows()
        assert before.active_ms < after.active_ms <= rig.relay.now_ms


def test_the_idle_timeout_only_shortens(datagram_rigs):
    rig = datagram_rigs(fresh_ms=600, established_ms=60_000)
    rig.datagrams.idle_ms = 900_000
    rig.client().send(b"?")
    rig.received()
    rig.until(lambda: rig.datagrams.flows == 0, "the end")
    client = rig.client()
    establish(rig, client)
    rig.datagrams.idle_ms = 30
    assert rig.datagrams.idle_ms == 30
    rig.until(lambda: rig.datagrams.flows == 0, "the end")


def test_the_relay_wakes_up_when_the_last_flow_has_ended(datagram_rigs):
    """So that an idle exit is not late."""
    rig = datagram_rigs(fresh_ms=30)
    rig.relay.wake_on_first = True
    rig.client().send(b"?")
    assert rig.relay.run(5000) == []
    assert rig.relay.connections == 1
    rig.relay.wake_on_first = False
    rig.relay.wake_at_count = 0
    began = rig.relay.now_ms
    assert rig.relay.run(5000) == []
    assert (rig.relay.connections, rig.datagrams.flows) == (0, 0)
    assert rig.relay.last_end_ms > began


# ── ourselves ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["udp4", "udp6", "dual", "unix", "abstract"])
def test_a_loop_is_found(datagram_rigs, kind):
    target = {"dual": "udp4"}.get(kind, kind)
    rig = datagram_rigs(kind, target)
    rig.target.set_address(socket_names(rig.listen_socket.fileno())[1])
    if kind == "dual":
        port = rig.listen_socket.getsockname()[1]
        rig.target.set_address(b"\2\0" + port.to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8))
    client = rig.client()
    rig.send(client, b"round and round")
    event = rig.wait_for(LoopFound)
    assert (event.listener, event.count) == (0, 1)
    assert rig.datagrams.flows == 1
    assert event.peer[2:] != b""
    assert rig.dropped() == {DROP_LOOP: 1}
    assert rig.is_calm()


@pytest.mark.parametrize("kind", ["udp4", "unix"])
def test_a_loop_of_more_datagrams_than_flows_ends(datagram_rigs, kind):
    """Each comes back from a flow that was evicted for another one.

    Of two evicted addresses that have the same place among the 1024 of the table, the older one is
    forgotten: then a datagram goes round twice.
    """
    rig = datagram_rigs(kind, kind)
    rig.relay.connections_max = 4
    rig.target.set_address(socket_names(rig.listen_socket.fileno())[1])
    clients = [rig.client() for _ in range(9)]
    for client in clients:
        client.send(b"round and round")
    rig.until(lambda: rig.dropped().get(DROP_LOOP) == len(clients), "all are dropped")
    assert 0 <= rig.target.totals().flows - len(clients) <= 2
    assert rig.is_calm()


def test_a_client_with_the_port_of_an_evicted_flow_is_none(datagram_rigs):
    rig = datagram_rigs()
    rig.relay.connections_max = 1
    first, second = rig.client(), rig.client()
    first.send(b"evicted")
    ((_, own),) = rig.received()
    second.send(b"instead")
    rig.received()
    assert rig.datagrams.totals().endings["evicted"] == 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as third:
        third.bind(own)
        third.sendto(b"with its port", rig.listen_socket.getsockname())
        assert rig.received()[0][0] == b"with its port"
    assert rig.of_kind(LoopFound) == []


def test_a_listener_elsewhere_proves_no_loop(datagram_rigs):
    """In another network namespace the same address is somebody else's."""
    rig = datagram_rigs(guarded=False)
    client = rig.client()
    own = rig.ask(client)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError):
            made.bind(own)
    assert rig.of_kind(LoopFound) == []


# ── a listener that breaks ───────────────────────────────────────────────────────────────────────


def test_a_listener_that_is_no_socket_any_more(datagram_rigs):
    rig = datagram_rigs()
    null = os.open("/dev/null", os.O_RDONLY)
    client = rig.client()
    client.send(b"last")
    os.dup2(null, rig.listen_socket.fileno())
    os.close(null)
    event = rig.wait_for(ListenerFailed)
    assert (event.listener, event.error) == (0, errno.ENOTSOCK)
    assert receive_all(rig.server) == []
    assert rig.is_calm()
