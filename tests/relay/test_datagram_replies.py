"""Replies leave from the address that the client had sent to; GRO and GSO cut and merge nothing."""

import contextlib
import os
import shutil
import socket
import subprocess

import pytest
from kit.child import in_child
from kit.datagram_rig import (
    SOL_UDP,
    UDP_GRO,
    open_datagram_socket,
    receive_all,
    send_segmented,
)
from kit.namespaces import in_own_network
from kit.rig import open_fds

from proxyd._datagram import DROP_CLIENT, DROP_TOO_LARGE

IP_PKTINFO = 8


# ── addresses ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("listen", "host", "address"),
    [
        ("udp4", "0.0.0.0", "127.0.0.2"),
        ("udp4", "127.0.0.3", "127.0.0.3"),
        ("dual", "::", "127.0.0.4"),
        ("dual", "::", "::1"),
        ("udp6", "::", "::1"),
        ("udp6", "::1", "::1"),
    ],
)
def test_the_reply_comes_from_where_the_question_went(datagram_rigs, listen, host, address):
    """The client is connected: from elsewhere, the kernel would not give it the reply."""
    rig = datagram_rigs(listen, "udp4", host=host)
    client = rig.client(address)
    rig.ask(client)
    rig.ask(client)
    assert rig.dropped() == {}


def test_two_addresses_of_ours_make_two_flows(datagram_rigs):
    rig = datagram_rigs("udp4", "udp4", host="0.0.0.0")
    port = rig.listen_socket.getsockname()[1]
    client = rig.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    client.setblocking(False)
    client.sendto(b"one", ("127.0.0.1", port))
    client.sendto(b"two", ("127.0.0.2", port))
    for data, sender in rig.received(2):
        rig.server.sendto(data, sender)
    found = []
    rig.until(lambda: found.extend(receive_all(client)) or len(found) == 2, "both replies")
    assert sorted(found) == [(b"one", ("127.0.0.1", port)), (b"two", ("127.0.0.2", port))]
    assert rig.datagrams.flows == 2


@pytest.mark.parametrize(
    ("listen", "host", "address"),
    [("udp4", "0.0.0.0", "127.0.0.2"), ("dual", "::", "127.0.0.4"), ("dual", "::", "::1")],
)
def test_what_came_before_the_program_is_answered_from_there_too(
    datagram_rigs, listen, host, address
):
    """It was queued before IP_PKTINFO was set: the datagram that starts a service on demand."""
    rig = datagram_rigs(listen, "udp4")
    kind = socket.AF_INET if listen == "udp4" else socket.AF_INET6
    late = rig.keep(socket.socket(kind, socket.SOCK_DGRAM))
    late.setblocking(False)
    if kind == socket.AF_INET6:
        late.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    late.bind((host, 0))
    rig.listen_socket = late
    client = rig.client(address)
    client.send(b"first")
    rig.add_listener(late)
    ((data, sender),) = rig.received()
    rig.server.sendto(data, sender)
    assert rig.replies(client) == [b"first"]


def test_a_broadcast_is_answered(datagram_rigs):
    rig = datagram_rigs("udp4", "udp4", host="0.0.0.0")
    port = rig.listen_socket.getsockname()[1]
    client = rig.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    client.setblocking(False)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    client.sendto(b"anybody?", ("127.255.255.255", port))
    ((data, sender),) = rig.received()
    rig.server.sendto(data, sender)
    assert rig.replies(client) == [b"anybody?"]


def test_a_broadcast_that_came_before_the_program_is_answered(datagram_rigs):
    rig = datagram_rigs()
    late = rig.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    late.setblocking(False)
    late.bind(("0.0.0.0", 0))
    client = rig.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    client.setblocking(False)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    client.sendto(b"anybody?", ("127.255.255.255", late.getsockname()[1]))
    rig.add_listener(late)
    ((data, sender),) = rig.received()
    rig.server.sendto(data, sender)
    assert rig.replies(client) == [b"anybody?"]


def test_a_unix_client_that_has_gone_costs_its_replies_only(datagram_rigs):
    rig = datagram_rigs("unix", "udp4")
    gone, there = rig.client(), rig.client()
    own = rig.ask(gone)
    rig.ask(there)
    gone.close()
    rig.server.sendto(b"reply", own)
    rig.until(lambda: rig.dropped() == {DROP_CLIENT: 1}, "the drop")
    rig.ask(there)


def test_a_unix_client_that_does_not_read_costs_its_replies_only(datagram_rigs):
    """If it is connected, it is the listener's send buffer that bounds them, unix(7)."""
    rig = datagram_rigs("unix", "udp4")
    slow, quick = rig.keep(open_datagram_socket("abstract", "")), rig.client()
    slow.sendto(b"question", rig.listen_socket.getsockname())
    ((_, own),) = rig.received()
    for _ in range(30):
        rig.server.sendto(b"reply", own)
    found = []
    rig.until(lambda: rig.dropped().get(DROP_CLIENT, 0) > 0, "a drop")
    rig.until(
        lambda: found.extend(receive_all(slow)) or len(found) + rig.dropped()[DROP_CLIENT] == 30,
        "all replies",
    )
    assert set(found) == {(b"reply", rig.listen_socket.getsockname())}
    rig.ask(quick)


def test_a_full_send_buffer_of_the_listener_costs_replies_only(datagram_rigs):
    """A connected client that does not read fills it: replies are dropped, for others too. Nothing
    spins, questions pass, and there are replies again as soon as it reads."""
    rig = datagram_rigs("unix", "unix")
    rig.listen_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
    slow, quick = rig.client(), rig.client()
    own = rig.ask(slow)
    sent = 0
    while not rig.dropped():
        rig.send(rig.server, bytes(1000), own)
        sent += 1
        rig.settle()
    assert rig.is_calm()
    quick.send(b"question")
    ((data, other),) = rig.received()
    assert data == b"question"
    rig.server.sendto(b"lost", other)
    rig.until(lambda: rig.dropped() == {DROP_CLIENT: 2}, "the drop of the other's reply")
    assert receive_all(quick) == []
    assert len(receive_all(slow)) == sent - 1
    rig.ask(quick)
    rig.ask(slow)
    assert rig.dropped() == {DROP_CLIENT: 2}


@pytest.mark.skipif(shutil.which("tc") is None, reason="no tc")
def test_a_slow_device_costs_replies_only(datagram_rigs):
    """While it has not sent the last ones, the kernel refuses the next, which is dropped."""

    def scenario():
        slow = "qdisc add dev lo root tbf rate 64kbit burst 2000 limit 1000000"
        subprocess.run(["tc", *slow.split()], check=True)
        rig = datagram_rigs("udp4", "unix")
        rig.listen_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        client = rig.client()
        own = rig.ask(client)
        sent = 0
        while not rig.dropped():
            rig.send(rig.server, bytes(1000), own)
            sent += 1
            rig.settle()
        assert rig.is_calm()
        rig.replies(client, sent - 1)
        rig.ask(client)
        assert rig.dropped() == {DROP_CLIENT: 1}

    in_child(in_own_network(scenario), patience=30)


def test_a_reply_that_is_too_large_is_dropped(datagram_rigs):
    rig = datagram_rigs("udp4", "unix")
    client = rig.client()
    own = rig.ask(client)
    rig.server.sendto(bytes(100_000), own)
    rig.until(lambda: rig.dropped() == {DROP_TOO_LARGE: 1}, "the drop")
    rig.ask(client)


# ── GRO and GSO ──────────────────────────────────────────────────────────────────────────────────


def datagrams_of(data, segment):
    return [data[i : i + segment] for i in range(0, len(data), segment)]


PATTERN = bytes(range(256)) * 250


@pytest.mark.parametrize("listen", ["udp4", "udp6", "dual"])
@pytest.mark.parametrize("target", ["udp4", "udp6"])
@pytest.mark.parametrize(("size", "segment"), [(6000, 1200), (6100, 1200), (100, 3), (60000, 1000)])
def test_segments_stay_what_they_are(datagram_rigs, listen, target, size, segment):
    rig = datagram_rigs(listen, target)
    client = rig.client()
    own = rig.ask(client)
    data = PATTERN[:size]
    parts = datagrams_of(data, segment)
    send_segmented(client, data, segment)
    assert [one for one, _ in rig.received(len(parts))] == parts
    for _ in range(3):  # the first burst makes the relay want GRO
        send_segmented(rig.server, data, segment, own)
        assert rig.replies(client, len(parts)) == parts
    totals = rig.datagrams.totals()
    assert totals.bytes_to_targets == size + 8
    assert totals.bytes_to_clients == 3 * size + 6


def test_a_burst_in_doubt_is_sent_whole(datagram_rigs):
    rig = datagram_rigs()
    client = rig.client()
    send_segmented(client, PATTERN[:12_345], 1200)
    assert [one for one, _ in rig.received(11)] == datagrams_of(PATTERN[:12_345], 1200)


def test_a_burst_is_held_whole(datagram_rigs):
    rig = datagram_rigs()
    rig.server_ends()
    client = rig.client()
    send_segmented(client, PATTERN[:12_345], 1200)
    rig.until(lambda: rig.target.held == 11, "the burst")
    rig.server_begins()
    rig.target.probe()
    assert [one for one, _ in rig.received(11)] == datagrams_of(PATTERN[:12_345], 1200)
    assert rig.target.held == 0


def test_a_burst_to_a_unix_target(datagram_rigs):
    rig = datagram_rigs("udp4", "unix")
    client = rig.client()
    send_segmented(client, PATTERN[:30_000], 500)
    assert [one for one, _ in rig.received(60)] == datagrams_of(PATTERN[:30_000], 500)


def test_sizes_that_change_are_kept_apart(datagram_rigs):
    rig = datagram_rigs()
    client = rig.client()
    own = rig.ask(client)
    sizes = [100, 100, 50, 100, 0, 100, 100, 200, 200, 1, 0, 0, 300]
    for size in sizes:
        client.send(bytes(size))
        rig.server.sendto(bytes(size), own)
    assert [len(one) for one, _ in rig.received(len(sizes))] == sizes
    assert [len(one) for one in rig.replies(client, len(sizes))] == sizes


def test_what_was_queued_under_gro_is_read_whole_by_the_next_program(datagram_rigs):
    """A program that crashes leaves UDP_GRO on, and several datagrams in the queue as one."""
    rig = datagram_rigs()
    late = rig.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    late.setblocking(False)
    late.bind(("127.0.0.1", 0))
    late.setsockopt(SOL_UDP, UDP_GRO, 1)
    client = rig.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    client.connect(late.getsockname())
    send_segmented(client, PATTERN[:5000], 1000)
    rig.add_listener(late)
    assert [one for one, _ in rig.received(5)] == datagrams_of(PATTERN[:5000], 1000)


def test_what_would_outlive_the_program_is_off_at_its_end(datagram_rigs):
    rig = datagram_rigs("udp4", "udp4", host="0.0.0.0")
    options = [(SOL_UDP, UDP_GRO), (socket.IPPROTO_IP, IP_PKTINFO)]
    assert [rig.listen_socket.getsockopt(*one) for one in options] == [1, 1]
    rig.listener.finish()
    assert [rig.listen_socket.getsockopt(*one) for one in options] == [0, 0]


SO_NO_CHECK = 11


def switch_off_checksums(rig):
    """Have the kernel segment nothing: without checksums it cannot."""
    for fd in open_fds():
        with contextlib.suppress(OSError):
            sock = socket.socket(fileno=os.dup(int(fd)))
            with sock:
                sock.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)


def narrow(mtu):
    def change(rig):
        subprocess.run(["ip", "link", "set", "lo", "mtu", str(mtu)], check=True)

    return change


@pytest.mark.parametrize(
    ("change", "segment"),
    [(narrow(1500), 2000), (narrow(1500), 1400), (switch_off_checksums, 1000)],
    ids=["larger than the MTU", "smaller than the MTU", "no checksums"],
)
def test_what_cannot_be_segmented_is_sent_singly(datagram_rigs, change, segment):
    """Also after it had worked: routes change."""

    def scenario():
        rig = datagram_rigs()
        client = rig.client()
        own = rig.ask(client)
        data = PATTERN[: 7 * segment]
        for round_number in range(3):
            for part in datagrams_of(data, segment):
                client.send(part)
                rig.server.sendto(part, own)
            assert [one for one, _ in rig.received(7)] == datagrams_of(data, segment)
            assert rig.replies(client, 7) == datagrams_of(data, segment)
            if round_number == 0:
                change(rig)
        assert rig.dropped() == {}
        assert rig.events == []

    in_child(in_own_network(scenario), patience=30)
