"""The bytes that each side receives are exactly the bytes that the other side sent, in order."""

import time

import pytest
from kit.differences import differs
from kit.sockets import every_pair, main_pairs, read_exactly, read_to_end
from kit.traffic import Payload, exchange, expected, receive_digest, send_payload

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

AWKWARD_SIZES = (1, 2, 1447, 1448, 1449, 4095, 4096, 4097, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1)
"""Around the sizes at which segments, pages and buffers end."""


@every_pair
def test_first_bytes_each_way(stage, listen, target):
    """A request gets through and its answer comes back, for each family on each side."""
    client, server = stage.pair(listen, target)
    client.sendall(b"request")
    assert read_exactly(server, 7) == b"request"
    server.sendall(b"the answer")
    assert read_exactly(client, 10) == b"the answer"


@every_pair
def test_server_speaks_first(stage, listen, target):
    """A protocol in which the server speaks first (SSH, SMTP) works."""
    client, server = stage.pair(listen, target)
    server.sendall(b"220 ready\r\n")
    assert read_exactly(client, 11) == b"220 ready\r\n"


@main_pairs
def test_nothing_at_all(stage, listen, target):
    """A client that sends nothing and closes is an empty stream at the server."""
    client, server = stage.pair(listen, target)
    client.close()
    assert read_to_end(server) == (b"", "eof")


@main_pairs
@pytest.mark.parametrize("size", AWKWARD_SIZES)
def test_awkward_sizes_upward(stage, listen, target, size):
    """A payload that ends just before, at or after the boundary of a buffer arrives whole."""
    client, server = stage.pair(listen, target)
    payload = Payload(size)
    send_payload(client, payload, half_close=False).result()
    client.close()
    assert read_to_end(server) == (payload.bytes(), "eof")


@every_pair
def test_one_megabyte_each_way_in_turn(stage, listen, target):
    """A request and an answer that are larger than any buffer on the way."""
    client, server = stage.pair(listen, target)
    payload = Payload(MIB)
    for sender, receiver in ((client, server), (server, client)):
        sending = send_payload(sender, payload, half_close=False)
        assert read_exactly(receiver, MIB) == payload.bytes()
        sending.result()


@every_pair
def test_upload(stage, listen, target):
    """Eight megabytes from the client, hashed at both ends."""
    client, server = stage.pair(listen, target)
    payload = Payload(8 * MIB)
    sending, receiving = send_payload(client, payload, half_close=False), receive_digest(server)
    sending.result()
    client.close()
    assert receiving.result() == expected(payload)


@every_pair
def test_download(stage, listen, target):
    """Eight megabytes from the server, hashed at both ends."""
    client, server = stage.pair(listen, target)
    payload = Payload(8 * MIB)
    sending, receiving = send_payload(server, payload, half_close=False), receive_digest(client)
    sending.result()
    server.close()
    assert receiving.result() == expected(payload)


@main_pairs
def test_both_ways_at_once(stage, listen, target):
    """64 MiB up while 48 MiB come down, both hashed."""
    client, server = stage.pair(listen, target)
    exchange(client, server, Payload(64 * MIB, seed=1), Payload(48 * MIB, seed=2), half_close=False)


@pytest.mark.big
@every_pair
def test_a_gigabyte_both_ways_at_once(stage, listen, target):
    """1 GiB each way at the same time, hashed at both ends."""
    client, server = stage.pair(listen, target)
    exchange(client, server, Payload(GIB, seed=1), Payload(GIB, seed=2), half_close=False)


@differs(
    "original",
    reason="no TCP_NODELAY: the second small write waits for an acknowledgement (about 43 ms)",
    always=False,
)
@pytest.mark.parametrize(
    ("listen", "target"), [("tcp4", "tcp4"), ("tcp6", "tcp6"), ("unix", "tcp4"), ("tcp4", "unix")]
)
def test_a_message_in_two_writes_is_not_held_back(stage, listen, target):
    """Two small writes and a read: the second does not wait for a delayed acknowledgement.

    TCP delays acknowledgements by 40 ms (after a phase of quick ones), and a round takes well
    under 1 ms. Rounds of 35 ms or more are counted; a few of them may be due to the machine.
    """
    client, server = stage.pair(listen, target)
    held_back = 0
    for _ in range(200):
        start = time.monotonic()
        client.sendall(b"head")
        client.sendall(b"body")
        assert read_exactly(server, 8) == b"headbody"
        server.sendall(b"re")
        server.sendall(b"ply")
        assert read_exactly(client, 5) == b"reply"
        held_back += time.monotonic() - start >= 0.035
        assert held_back < 20


@main_pairs
def test_connections_do_not_mix(stage, listen, target):
    """Forty connections at once, each with its own payload each way."""
    backend = stage.forward(listen, target)
    transfers = []
    for number in range(40):
        client = stage.connect()
        server = backend.accept()
        up, down = Payload(200_000 + number, seed=number), Payload(150_000, seed=1000 + number)
        for sender, receiver, payload in ((client, server, up), (server, client, down)):
            sending = send_payload(sender, payload, half_close=False)
            transfers.append((sending, receive_digest(receiver, payload.size), payload))
    for sending, receiving, payload in transfers:
        sending.result()
        assert receiving.result() == expected(payload)


@main_pairs
def test_slow_reader_gets_everything(stage, listen, target):
    """A reader of small pieces gets the same bytes in the same order."""
    client, server = stage.pair(listen, target, target_buffer=8192)
    payload = Payload(MIB)
    sending = send_payload(client, payload, half_close=False)
    received = bytearray()
    while len(received) < payload.size:
        received += read_exactly(server, min(1500, payload.size - len(received)))
    sending.result()
    assert bytes(received) == payload.bytes()
