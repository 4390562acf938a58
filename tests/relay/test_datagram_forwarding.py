"""Datagrams reach the target and their replies the client: each one whole, once, and in order."""

import socket

import pytest
from kit.datagram_rig import FAMILIES, receive_all
from kit.rig import values

from proxyd._datagram import DROP_TOO_LARGE, DROP_UNANSWERABLE, FlowBegun, FlowEnded

PAIRS = [
    ("udp4", "udp4"),
    ("udp6", "udp6"),
    ("udp4", "unix"),
    ("unix", "udp6"),
    ("unix", "unix"),
    ("dual", "udp4"),
    ("abstract", "abstract"),
]

SO_SNDBUFFORCE = 32  # asm-generic/socket.h; CAP_NET_ADMIN

every_pair = pytest.mark.parametrize(
    ("listen", "target"), PAIRS, ids=["-".join(pair) for pair in PAIRS]
)


@every_pair
def test_a_question_and_its_answer(datagram_rigs, listen, target):
    rig = datagram_rigs(listen, target)
    rig.ask(rig.client())
    assert rig.datagrams.flows == rig.relay.connections == 1
    assert rig.is_calm()


@every_pair
@pytest.mark.parametrize("size", [0, 1, 1472, 9000, 65507])
def test_any_size(datagram_rigs, listen, target, size):
    rig = datagram_rigs(listen, target)
    question, answer = bytes(size), b"\xa5" * size
    rig.ask(rig.client(), question, answer)
    rig.ask(rig.client(), question, answer)
    totals = rig.datagrams.totals()
    assert totals.bytes_to_targets == totals.bytes_to_clients == 2 * size
    assert totals.datagrams_to_targets == totals.datagrams_to_clients == 2


def test_unix_datagrams_may_be_larger_than_udp_ones(datagram_rigs):
    rig = datagram_rigs("unix", "unix")
    rig.ask(rig.client(), b"q" * 200_000, b"a" * 200_000)


def test_what_no_buffer_has_room_for_is_dropped_and_never_cut(datagram_rigs):
    rig = datagram_rigs("unix", "unix")
    client = rig.client()
    try:
        client.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 1 << 20)
    except PermissionError:
        pytest.skip("SKIPPED LOUDLY: only root may have a larger send buffer than others")
    client.send(b"x" * 400_000)
    client.send(b"small")
    assert [data for data, _ in rig.received()] == [b"small"]
    assert rig.dropped() == {DROP_TOO_LARGE: 1}


@every_pair
def test_each_client_has_its_own_flow(datagram_rigs, listen, target):
    rig = datagram_rigs(listen, target)
    clients = [rig.client() for _ in range(40)]
    found = []
    for number, client in enumerate(clients):
        rig.send(client, b"%d" % number)
        found += rig.received()
    assert len({sender for _, sender in found}) == 40
    for data, sender in found:
        rig.server.sendto(b"to " + data, sender)
    for number, client in enumerate(clients):
        assert rig.replies(client) == [b"to %d" % number]
    assert rig.datagrams.flows == 40


@every_pair
def test_order_and_number_are_kept(datagram_rigs, listen, target):
    rig = datagram_rigs(listen, target)
    clients = [rig.client() for _ in range(3)]
    senders = {}
    for count in range(60):
        sizes = (1, 100, 100, 0)[: count % 5]
        sent = [b"%d" % count + bytes(size) for size in sizes]
        for data in sent:
            for number, client in enumerate(clients):
                rig.send(client, b"%d" % number + data)
                if listen in ("unix", "abstract") or target in ("unix", "abstract"):
                    rig.settle()
        found = {}
        for data, sender in rig.received(3 * len(sent)):
            senders[sender] = data[:1]
            found.setdefault(data[:1], []).append(data[1:])
            rig.server.sendto(data[1:], sender)
        for number, client in enumerate(clients):
            assert found.get(b"%d" % number, []) == sent
            assert rig.replies(client, len(sent)) == sent
    assert sorted(senders.values()) == [b"0", b"1", b"2"]


def test_nothing_of_a_stranger_is_passed_on(datagram_rigs):
    rig = datagram_rigs()
    client = rig.client()
    own = rig.ask(client)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"from elsewhere", own)
    rig.server.sendto(b"from the server", own)
    assert rig.replies(client) == [b"from the server"]


def test_two_listeners_share_a_target(datagram_rigs):
    rig = datagram_rigs()
    first = rig.client()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        other = rig.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        other.setblocking(False)
        other.bind(("127.0.0.1", 0))
        rig.add_listener(other)
        client.connect(other.getsockname())
        one, two = rig.ask(first), rig.ask(client)
    assert one != two
    assert [row.listener for row in rig.datagrams.rows()] == [0, 1]


def test_a_sender_without_a_name_is_heard_but_not_answered(datagram_rigs):
    rig = datagram_rigs("unix", "unix")
    client = rig.client(named=False)
    client.send(b"one")
    ((data, sender),) = rig.received()
    assert data == b"one"
    rig.server.sendto(b"reply", sender)
    rig.until(lambda: rig.dropped() == {DROP_UNANSWERABLE: 1}, "the drop")
    assert [row.client for row in rig.datagrams.rows()] == [b""]


def test_a_stopped_listener_leaves_its_queue_alone(datagram_rigs):
    rig = datagram_rigs()
    client = rig.client()
    own = rig.ask(client)
    rig.listener.stop()
    client.send(b"later")
    rig.settle()
    assert receive_all(rig.server) == []
    rig.server.sendto(b"a reply", own)  # replies go on
    assert rig.replies(client) == [b"a reply"]
    rig.listener.start()
    assert [data for data, _ in rig.received()] == [b"later"]


def test_rows_and_totals_say_what_there_is(datagram_rigs):
    rig = datagram_rigs("udp4", "udp4", host="0.0.0.0")
    rig.datagrams.report_flows = True
    client = rig.client("127.0.0.3")
    own = rig.ask(client, b"four", b"thirteen chars")
    (row,) = rig.datagrams.rows()
    assert row.client[4:8] == bytes([127, 0, 0, 1])
    assert row.local[2:8] == rig.listen_socket.getsockname()[1].to_bytes(2, "big") + bytes(
        [127, 0, 0, 3]
    )
    assert row.target == rig.address
    assert int.from_bytes(row.own[2:4], "big") == own[1]
    assert (row.answered, row.established, row.kernel_drops) == (True, False, 0)
    assert (row.listener, row.target_index) == (0, 7)
    assert 0 < row.opened_ms <= row.active_ms <= rig.relay.now_ms
    assert row.active_ms == rig.datagrams.last_ms
    assert (row.datagrams_up, row.bytes_up) == (1, 4)
    assert (row.datagrams_down, row.bytes_down) == (1, 14)
    rig.ask(client, b"four", b"")
    assert rig.datagrams.rows()[0].established
    assert rig.datagrams.rows(after=row.flow) == []
    assert rig.datagrams.terminate(row.flow)
    assert not rig.datagrams.terminate(row.flow)
    rig.settle()
    begun, ended = rig.of_kind(FlowBegun), rig.of_kind(FlowEnded)
    assert [one.info.flow for one in begun + ended] == [row.flow] * 2
    assert (ended[0].ending, ended[0].info.bytes_up) == ("cut", 8)
    totals = values(rig.datagrams.totals())
    assert totals == values(rig.target.totals())
    assert totals["flows"] == 1
    assert totals["endings"] == {"expired": 0, "evicted": 0, "cut": 1}
    assert (totals["datagrams_to_targets"], totals["bytes_to_targets"]) == (2, 8)
    assert (totals["datagrams_to_clients"], totals["bytes_to_clients"]) == (2, 14)


def test_rows_come_in_pieces(datagram_rigs):
    rig = datagram_rigs()
    clients = [rig.client() for _ in range(10)]
    for client in clients:
        client.send(b"x")
    rig.received(10)
    found, after = [], 0
    while rows := rig.datagrams.rows(after, 4):
        found += [row.flow for row in rows]
        after = found[-1]
    assert found == sorted(set(found))
    assert len(found) == 10


def test_there_is_one_of_it_in_a_relay(datagram_rigs):
    rig = datagram_rigs()
    with pytest.raises(ValueError, match="already"):
        type(rig.datagrams)(rig.relay)


def test_what_the_kernel_drops_is_counted(datagram_rigs):
    rig = datagram_rigs(started=False)
    client = rig.client()
    for _ in range(1000):
        client.send(b"flood")
    dropped = rig.listener.kernel_dropped
    assert 0 < dropped < 1000
    assert rig.datagrams.totals().kernel_dropped == dropped
    rig.listener.start()
    left = 1000 - dropped
    rig.until(lambda: rig.datagrams.totals().datagrams_to_targets == left, "the rest")


@pytest.mark.parametrize("address", [b"", b"\2", bytes(200)])
def test_a_bad_address_is_refused(datagram_rigs, address):
    rig = datagram_rigs()
    with pytest.raises(ValueError, match="address"):
        rig.target.set_address(address)


def test_families_are_those_of_the_kit():
    assert {one for pair in PAIRS for one in pair} == set(FAMILIES)
