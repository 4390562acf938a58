"""A slow or stuck reader costs memory bounded by the socket buffers and one pipe, and no CPU."""

import itertools
import select
import socket
import time

import pytest
from harness.differences import differs
from harness.sockets import (
    TCP,
    UNIX,
    is_quiet,
    main_pairs,
    read_exactly,
    read_to_end,
    send_until_stuck,
    stuck_bytes,
)
from harness.traffic import Payload, in_background
from harness.waiting import never_within, patience, wait_until

KIB = 1 << 10
MIB = 1 << 20

IDLE = 0.2
"""A share of one CPU that no program reaches which waits for something; a busy one has 1.0."""

BURNS = "burns a core: the pipe is out of slots before it is out of bytes"
burns = differs("original", reason=BURNS, always=False)

small_segments = pytest.mark.parametrize("segment", [1, 100, 1000, 1448, 65536])
small_buffers = {"listen_buffer": 64 * KIB, "target_buffer": 64 * KIB}
stalled_pairs = pytest.mark.parametrize(
    ("listen", "target"),
    [("tcp4", "tcp4"), ("tcp6", "unix"), ("unix", "tcp4"), ("unix", "unix")],
)


def fill(connection, segment, seconds=1.2):
    """Send segments of that many bytes until everything up to the reader is full.

    A short pause after each segment lets the program take it by itself, as from a network; without
    it the kernel joins them in one queue. Ends after `seconds` too. Returns what was sent.
    """
    pattern = Payload(64 * KIB).bytes()
    pieces = [pattern[i : i + segment] for i in range(0, len(pattern), segment)]
    sent = bytearray()
    deadline = time.monotonic() + seconds
    connection.setblocking(False)
    for piece in itertools.cycle(pieces):
        try:
            count = connection.send(piece)
            sent += piece[:count]
            if count < len(piece):
                break  # the rest of it would be a smaller segment
            time.sleep(0.00005)
        except BlockingIOError:
            if not select.select([], [connection], [], 0.15)[1]:
                break
        if time.monotonic() > deadline:
            break
    connection.settimeout(patience())
    return bytes(sent)


@differs("original", reason=BURNS, when={"segment": (1000, 1448)})
@differs("original", reason=BURNS, when={"segment": (1, 100)}, always=False)
@stalled_pairs
@small_segments
def test_stalled_server_costs_no_cpu(stage, listen, target, segment):
    """Whatever the size of the segments: no CPU while the server does not read, then every byte."""
    client, server = stage.pair(listen, target, **small_buffers)
    sent = fill(client, segment)
    assert stage.proxy.cpu_share() < IDLE
    reading = in_background(lambda: read_to_end(server))
    client.shutdown(socket.SHUT_WR)
    assert reading.result() == (sent, "eof")


@burns
@pytest.mark.parametrize("segment", [100, 1448])
@pytest.mark.parametrize(("listen", "target"), [("tcp4", "tcp4"), ("unix", "tcp4")])
def test_stalled_client_costs_no_cpu(stage, listen, target, segment):
    """The same the other way: a client that does not read its download."""
    client, server = stage.pair(listen, target, **small_buffers)
    sent = fill(server, segment)
    assert stage.proxy.cpu_share() < IDLE
    reading = in_background(lambda: read_exactly(client, len(sent)))
    assert reading.result() == sent


@burns
@pytest.mark.parametrize("segment", [100, 65536])
def test_both_directions_stalled(stage, segment):
    """Two peers that both only write, each waiting for the other to read."""
    client, server = stage.pair("tcp4", "tcp4", **small_buffers)
    upward, downward = fill(client, segment), fill(server, segment)
    assert stage.proxy.cpu_share() < IDLE
    at_server = in_background(lambda: read_exactly(server, len(upward)))
    assert read_exactly(client, len(downward)) == downward
    assert at_server.result() == upward


@burns
@main_pairs
def test_a_stalled_direction_does_not_stop_the_other(stage, listen, target):
    """While the upload is stuck the download goes on, at no CPU once it pauses."""
    client, server = stage.pair(listen, target, **small_buffers)
    sent = fill(client, 1000)
    download = Payload(4 * MIB).bytes()
    sending = in_background(lambda: server.sendall(download))
    assert read_exactly(client, len(download)) == download
    sending.result()
    assert stage.proxy.cpu_share(0.3) < IDLE
    assert read_exactly(server, len(sent)) == sent


@burns
@stalled_pairs
def test_client_leaves_while_the_server_is_stalled(stage, listen, target):
    """The client's close behind a stuck reader is remembered at no CPU: every byte, then the end.

    On a UNIX socket the close is a hang-up, which the kernel reports for ever.
    """
    client, server = stage.pair(listen, target, **small_buffers)
    sent = fill(client, 1448)
    client.close()
    assert stage.proxy.cpu_share() < IDLE
    assert read_to_end(server) == (sent, "eof")


@differs("original", reason="burns a core, and drops the connection at the first end", always=False)
@stalled_pairs
def test_server_leaves_while_it_is_stalled(stage, listen, target):
    """A server that never read and goes away ends the connection: nothing is left behind."""
    client, server = stage.pair(listen, target, **small_buffers)
    before = stage.proxy.socket_count()
    fill(client, 1448)
    server.close()
    read_to_end(client)
    assert stage.proxy.cpu_share(0.3) < IDLE
    wait_until(lambda: stage.proxy.socket_count() <= before - 2, "both sockets are closed")


@burns
@pytest.mark.parametrize("target", [*TCP, *UNIX])
def test_trickle_into_a_stalled_reader(stage, target):
    """Small segments that arrive one by one while nobody reads never start a busy loop."""
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
    """What one sender can put into the program stops growing, and its memory hardly grows."""
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
    """Fifty stuck downloads together cost as little as one, and leave a fresh client alone."""
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
def test_reader_that_stops_and_goes_on(stage, listen, target):
    """A reader that stops five times gets every byte; each resumption empties what was stuck."""
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
