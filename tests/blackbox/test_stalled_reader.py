"""A slow or stuck reader costs memory bounded by the socket buffers and one pipe, and no CPU."""

import pytest
from kit.differences import differs
from kit.socket_state import is_quiet
from kit.sockets import (
    TCP,
    UNIX,
    main_pairs,
    read_exactly,
    read_to_end,
    send_until_stuck,
    stuck_bytes,
)
from kit.traffic import Payload, in_background, send_in_segments
from kit.waiting import never_within

KIB = 1 << 10
MIB = 1 << 20

IDLE = 0.2
"""A share of one CPU that a waiting program does not reach; a busy loop takes 1.0."""

BURNS = "burns a core: the pipe is out of slots before it is out of bytes"
burns = differs("original", reason=BURNS, always=False)

small_buffers = {"listen_buffer": 64 * KIB, "target_buffer": 64 * KIB}


@burns
@pytest.mark.parametrize("segment", [100, 1448])
@pytest.mark.parametrize(("listen", "target"), [("tcp4", "tcp4"), ("unix", "tcp4")])
def test_stalled_client_costs_no_cpu(stage, listen, target, segment):
    """A client that does not read its download."""
    client, server = stage.pair(listen, target, **small_buffers)
    sent = send_in_segments(server, segment)
    assert stage.proxy.cpu_share() < IDLE
    reading = in_background(lambda: read_exactly(client, len(sent)))
    assert reading.result() == sent


@burns
@pytest.mark.parametrize("segment", [100, 65536])
def test_both_directions_stalled(stage, segment):
    """Two peers that both only write, each waiting for the other to read."""
    client, server = stage.pair("tcp4", "tcp4", **small_buffers)
    upward, downward = send_in_segments(client, segment), send_in_segments(server, segment)
    assert stage.proxy.cpu_share() < IDLE
    at_server = in_background(lambda: read_exactly(server, len(upward)))
    assert read_exactly(client, len(downward)) == downward
    assert at_server.result() == upward


@burns
@main_pairs
def test_a_stalled_direction_does_not_stop_the_other(stage, listen, target):
    """While the upload is stuck the download continues, and no CPU is used once it pauses.

    With smaller segments the kernel may be unable to acknowledge the download: see RELIABILITY.md.
    """
    client, server = stage.pair(listen, target, **small_buffers)
    sent = send_in_segments(client, 16 * KIB)
    download = Payload(4 * MIB).bytes()
    sending = in_background(lambda: server.sendall(download))
    assert read_exactly(client, len(download)) == download
    sending.result()
    assert stage.proxy.cpu_share(0.3) < IDLE
    assert read_exactly(server, len(sent)) == sent


@burns
@pytest.mark.parametrize("target", [*TCP, *UNIX])
def test_trickle_into_a_stalled_reader(stage, target):
    """Small segments that arrive one by one without being read cause no busy loop."""
    client, server = stage.pair("tcp4", target, **small_buffers)
    message = b"0123456789" * 10
    sent = 0
    for _ in range(3000):
        client.send(message)
        sent += len(message)
    assert stage.proxy.cpu_share() < IDLE
    assert read_exactly(server, sent) == message * 3000


@main_pairs
def test_memory_behind_a_stalled_reader_is_bounded(stage, listen, target):
    """What one sender can send is bounded, and the program's memory hardly grows."""
    backend = stage.forward(listen, target, **small_buffers)
    client = stage.connect()
    server = backend.accept()
    client.sendall(b"x")
    assert read_exactly(server, 1) == b"x"
    before = stage.proxy.resident_bytes()
    sent = send_until_stuck(client, Payload(MIB).bytes())
    assert sent < 16 * MIB
    assert stage.proxy.resident_bytes() - before < 4 * MIB


def test_fifty_stalled_readers_cost_no_cpu(stage):
    """Fifty stuck downloads cost as little as one, and do not disturb a new client."""
    backend = stage.forward("tcp4", "tcp4", **small_buffers)
    sent = []
    for _ in range(50):
        stage.connect()
        server = backend.accept()
        sent.append(send_until_stuck(server, b"d" * 65536, still=0.02))
    assert stage.proxy.cpu_share() < IDLE
    client = stage.connect()
    server = backend.accept()
    client.sendall(b"ping")
    assert read_exactly(server, 4) == b"ping"
    assert all(sent)


@main_pairs
def test_idle_connection_costs_no_cpu(stage, listen, target):
    """An open connection on which nothing moves uses no CPU."""
    client, server = stage.pair(listen, target)
    client.sendall(b"x")
    assert read_exactly(server, 1) == b"x"
    assert stage.proxy.cpu_share() < IDLE
    never_within(0.05, lambda: not is_quiet(client), "something at the client")


@main_pairs
def test_reader_that_stops_and_continues(stage, listen, target):
    """A reader that stops five times gets every byte; each time it reads all that was stuck."""
    client, server = stage.pair(listen, target, **small_buffers)
    segment = Payload(MIB).bytes()
    sent = received = 0
    for _ in range(5):
        pushed = send_until_stuck(client, segment[sent % MIB :] + segment[: sent % MIB], still=0.05)
        sent += pushed
        chunk = read_exactly(server, sent - received - 1000)
        assert stuck_bytes(segment, sent)[received : received + len(chunk)] == chunk
        received += len(chunk)
    client.close()
    assert read_to_end(server) == (stuck_bytes(segment, sent)[received:], "eof")
