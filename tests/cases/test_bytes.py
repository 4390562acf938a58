"""Cases 11 to 14 and 17: how bytes get through."""

import select
import socket

import pytest
from cases.messages import send_byte_by_byte
from cases.pairs import assert_same, costs_nothing, every_pair, hear, not_applicable, say, sides
from kit.sockets import UNIX, read_exactly, read_to_end, send_until_stuck, stuck_bytes
from kit.traffic import (
    Payload,
    exchange,
    in_background,
    send_in_segments,
    send_payload,
)
from kit.waiting import patience

KIB = 1 << 10
MIB = 1 << 20
SEGMENT = Payload(MIB).bytes()


@every_pair
@pytest.mark.parametrize("segment", [1, 100, 1448, 65536])
def test_11_pipe_out_of_slots_before_bytes(stage, listen, target, segment):
    """pipe out of slots before bytes: no CPU while the server does not read, then every byte.

    Small segments fill the slots of a pipe long before its bytes.
    """
    client, server = stage.pair(listen, target, listen_buffer=64 * KIB, target_buffer=64 * KIB)
    sent = send_in_segments(client, segment)
    costs_nothing(stage)
    reading = in_background(lambda: read_to_end(server))
    client.shutdown(socket.SHUT_WR)
    received, end = reading.result()
    assert_same(received, sent, "the stream")
    assert end == "eof", "the stream ends with a reset"


@every_pair
def test_12_pipe_holding_more_than_its_size(stage, faults, listen, target):
    """pipe holding more than its size: every byte once and in order, whatever the slots hold.

    If a user has too many pipes, new ones cannot grow: they have 16 slots, each of which takes up
    to 32 KiB of a large segment. One fills up before a server that does not read; then both sides
    send megabytes at once.
    """
    with faults.of("pipesize", "EPERM"):
        client, server = stage.pair(listen, target)
        size = send_until_stuck(client, SEGMENT, still=0.1)
        received = read_exactly(server, size)
        assert_same(received, stuck_bytes(SEGMENT, size), "the stream")
        exchange(client, server, Payload(8 * MIB, 1), Payload(8 * MIB, 2), half_close=False)


@every_pair
def test_13_a_million_1_byte_messages_to_a_slow_reader(stage, listen, target):
    """a million 1-byte messages to a slow reader: all of them, in order, then the end."""
    client, server = stage.pair(listen, target)
    messages = SEGMENT[:1_000_000]
    sending = in_background(lambda: send_byte_by_byte(client, messages))
    received = bytearray()
    while len(received) < len(messages):
        received += read_exactly(server, min(1000, len(messages) - len(received)))
    sending.result()
    client.shutdown(socket.SHUT_WR)
    hear(server, b"", "what follows the last message")
    assert_same(bytes(received), messages, "the messages")


@every_pair
@pytest.mark.parametrize("actor", ["client", "server"])
@pytest.mark.parametrize("size", [6, 300_000])
def test_14_an_urgent_byte(stage, listen, target, actor, size):
    """an urgent byte: it is not lost, and the stream continues behind it.

    A direct connection delivers it as urgent; delivering it in its place is right too.
    """
    if (listen if actor == "client" else target) in UNIX and not unix_has_urgent_bytes():
        not_applicable("this kernel has no urgent bytes on UNIX sockets")
    client, server = stage.pair(listen, target)
    sender, receiver = sides(client, server, actor)
    before, after = SEGMENT[:size], SEGMENT[size : 2 * size]

    def work():
        sender.sendall(before)
        sender.send(b"!", socket.MSG_OOB)
        sender.sendall(after)
        sender.shutdown(socket.SHUT_WR)

    sending = in_background(work)
    assert_same(read_exactly(receiver, size), before, "the stream before the urgent byte")
    urgent = urgent_byte(receiver)
    rest, end = read_to_end(receiver)
    assert rest or end == "reset", "the stream ends at the urgent byte"
    assert urgent + rest != after, "the urgent byte is lost"
    assert_same(urgent + rest, b"!" + after, "the stream behind the urgent byte")
    assert end == "eof", "the stream ends with a reset"
    sending.result()


def unix_has_urgent_bytes():
    left, right = socket.socketpair()
    with left, right:
        try:
            return left.send(b"!", socket.MSG_OOB) == 1
        except OSError:
            return False


def urgent_byte(connection):
    """The out-of-band byte behind the bytes that were read; b"" if it comes in its place."""
    poller = select.poll()
    poller.register(connection, select.POLLIN | select.POLLPRI)
    events = dict(poller.poll(patience() * 1000)).get(connection.fileno(), 0)
    return connection.recv(1, socket.MSG_OOB) if events & select.POLLPRI else b""


@every_pair
def test_17a_pipe2_failing_mid_session(stage, faults, listen, target):
    """pipe2 failing mid-session: an open connection continues to carry bulk in both directions."""
    client, server = stage.pair(listen, target)
    say(client, b"hello", "the client")
    assert read_exactly(server, 5) == b"hello"
    with faults.of("pipe", "EMFILE"):
        exchange(client, server, Payload(8 * MIB, 1), Payload(8 * MIB, 2), half_close=False)


@every_pair
def test_17b_pipe2_failing_for_a_new_client(stage, faults, listen, target):
    """pipe2 failing mid-session: a client that connects meanwhile is served too."""
    backend = stage.forward(listen, target)
    first = stage.connect()
    first.sendall(b"hello")
    assert read_exactly(backend.accept(), 5) == b"hello"
    with faults.of("pipe", "ENFILE"):
        client = stage.connect()
        payload = Payload(4 * MIB)
        sending = send_payload(client, payload)
        received, _ = read_to_end(backend.accept())
        assert_same(received, payload.bytes(), "the new client's stream")
        sending.result()
