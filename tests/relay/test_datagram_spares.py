"""A flow that has ended leaves its socket to a new one, and nothing else."""

import socket

import pytest
from kit.datagram_rig import FAMILIES, open_datagram_socket, receive_all
from kit.rig import open_fds

from proxyd._datagram import TargetDown
from proxyd._relay import socket_names


def end_flow(rig, sender):
    """End the flow whose own socket has this address; its socket is spare then."""
    own = [row.flow for row in rig.datagrams.rows() if row.own[2:4] == packed_port(sender)]
    assert len(own) == 1
    assert rig.datagrams.terminate(own[0])


def packed_port(sender):
    return sender[1].to_bytes(2, "big")


@pytest.mark.parametrize("family", ["udp4", "udp6"])
def test_a_new_flow_takes_over_the_socket(datagram_rigs, family):
    rig = datagram_rigs(family, family)
    rig.ask(rig.client())
    client = rig.client()
    ended = rig.ask(rig.client())
    fds = open_fds()
    end_flow(rig, ended)
    rig.ask(client)
    assert open_fds() == fds
    assert rig.datagrams.flows == 2


def test_what_came_for_the_old_flow_is_not_told_to_the_new_client(datagram_rigs):
    rig = datagram_rigs()
    rig.ask(rig.client())
    ended = rig.ask(rig.client())
    for _ in range(100):
        rig.server.sendto(b"secret", ended)
    end_flow(rig, ended)
    client = rig.client()
    rig.ask(client)
    rig.settle()
    assert receive_all(client) == []


def test_what_came_while_it_was_spare_keeps_nothing_busy(datagram_rigs):
    rig = datagram_rigs()
    rig.ask(rig.client())
    ended = rig.ask(rig.client())
    rig.server.sendto(b"secret", ended)
    end_flow(rig, ended)
    rig.settle()
    assert rig.relay.run(0) == []
    client = rig.client()
    rig.ask(client)
    assert receive_all(client) == []


def test_its_port_is_free_at_once(datagram_rigs):
    rig = datagram_rigs()
    rig.ask(rig.client())
    ended = rig.ask(rig.client())
    end_flow(rig, ended)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(ended)


def test_an_error_of_the_old_flow_is_not_the_new_ones(datagram_rigs):
    rig = datagram_rigs()
    rig.ask(rig.client())
    client = rig.client()
    ended = rig.ask(client)
    rig.server_ends()
    client.send(b"refused")
    rig.turn()  # it was sent, and the error is there
    end_flow(rig, ended)
    rig.server_begins()
    rig.ask(rig.client())
    assert rig.of_kind(TargetDown) == []


def test_a_spare_socket_of_another_family_is_of_no_use(datagram_rigs, tmp_path):
    rig = datagram_rigs()
    rig.ask(rig.client())
    end_flow(rig, rig.ask(rig.client()))
    rig.server = rig.keep(open_datagram_socket("udp6", tmp_path))
    rig.target.set_address(socket_names(rig.server.fileno())[1])
    assert rig.server.family == FAMILIES["udp6"]
    rig.ask(rig.client())


def test_a_socket_that_had_bursts_is_not_kept(datagram_rigs):
    rig = datagram_rigs()
    rig.ask(rig.client())
    client = rig.client()
    ended = rig.ask(client)
    fds = open_fds()
    for _ in range(10):
        rig.server.sendto(b"more", ended)
    rig.replies(client, 10)
    end_flow(rig, ended)
    assert len(open_fds()) == len(fds) - 1


# ── how many, and for how long ───────────────────────────────────────────────────────────────────


def test_none_is_kept_without_flows(datagram_rigs):
    rig = datagram_rigs()
    clients = [rig.client() for _ in range(5)]
    fds = open_fds()
    senders = [rig.ask(client) for client in clients]
    for sender in senders:
        end_flow(rig, sender)
    rig.turn()
    assert open_fds() == fds


def test_there_are_no_more_than_the_limit_allows(datagram_rigs):
    rig = datagram_rigs()
    rig.relay.connections_max = 4
    rig.ask(rig.client())
    senders = [rig.ask(rig.client()) for _ in range(3)]
    fds = open_fds()
    for sender in senders:
        end_flow(rig, sender)
    rig.turn()
    assert open_fds() == fds
    rig.relay.connections_max = 2
    rig.turn()
    assert len(open_fds()) == len(fds) - 2


def test_there_are_64_at_most(datagram_rigs):
    rig = datagram_rigs()
    rig.ask(rig.client())
    senders = [rig.ask(rig.client()) for _ in range(70)]
    fds = open_fds()
    for sender in senders:
        end_flow(rig, sender)
    rig.turn()
    assert len(open_fds()) == len(fds) - 6


def test_they_are_closed_when_no_flow_has_needed_them(datagram_rigs):
    rig = datagram_rigs()
    talker = rig.client()
    rig.ask(talker)
    sender = rig.ask(rig.client())
    fds = open_fds()
    end_flow(rig, sender)
    rig.turn()
    assert open_fds() == fds
    rig.pass_time(1000)
    rig.ask(talker)
    assert len(open_fds()) == len(fds) - 1
