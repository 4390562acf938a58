"""A reset is passed on as a reset, after all that was read before; on UNIX it is a full close.

A UNIX socket has no reset: its peer sees the end of the stream, and then a write that fails.
"""

import pytest
from kit.differences import differs
from kit.socket_state import is_quiet, wait_unread, write_error
from kit.sockets import (
    TCP,
    UNIX,
    main_pairs,
    read_exactly,
    read_to_end,
    reset,
    send_until_stuck,
    stuck_bytes,
)
from kit.traffic import Payload
from kit.waiting import wait_until

MIB = 1 << 20

from_tcp = pytest.mark.parametrize(
    ("listen", "target"),
    [(a, b) for a in TCP for b in (*TCP, *UNIX)],
)
"""Pairs whose client's side can reset."""

to_tcp = pytest.mark.parametrize(
    ("listen", "target"),
    [(a, b) for a in (*TCP, *UNIX) for b in TCP],
)
"""Pairs whose server's side can reset."""

reset_becomes_end = differs(
    "original", reason="a reset arrives as a clean end", when={"listen": TCP, "target": TCP}
)


def end_of_reset(family):
    """How a stream ends on a socket of `family` when the other side was reset."""
    return "eof" if family in UNIX else "reset"


@reset_becomes_end
@from_tcp
def test_client_resets(stage, listen, target):
    """An idle client that resets is a reset at the server."""
    client, server = stage.pair(listen, target)
    client.sendall(b"hello")
    assert read_exactly(server, 5) == b"hello"
    reset(client)
    assert read_to_end(server) == (b"", end_of_reset(target))
    wait_until(lambda: write_error(server), "writes of the server fail")


@reset_becomes_end
@to_tcp
def test_server_resets(stage, listen, target):
    """An idle server that resets is a reset at the client."""
    client, server = stage.pair(listen, target)
    server.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"
    reset(server)
    assert read_to_end(client) == (b"", end_of_reset(listen))
    wait_until(lambda: write_error(client), "writes of the client fail")


@reset_becomes_end
@from_tcp
def test_reset_waits_for_what_was_read_before(stage, listen, target):
    """Bytes inside the program at the time of the reset are delivered to a slow reader.

    The program has read more from the client by then than fits into the server's buffers. None of
    it is dropped because of the reset.
    """
    client, server = stage.pair(listen, target, listen_buffer=65536, target_buffer=8192)
    segment = Payload(MIB).bytes()
    sent = send_until_stuck(client, segment, still=0.1)
    inside = sent // 4  # at least this much has left the client's buffers
    received = read_exactly(server, 1)
    reset(client)
    rest, end = read_to_end(server)
    received += rest
    assert end == end_of_reset(target)
    assert stuck_bytes(segment, sent).startswith(received)
    assert len(received) >= min(inside, 65536)


@differs("original", reason="nothing is noticed while a pipe is full, at 100 % CPU", run=False)
def test_reset_behind_a_reader_that_has_stopped(stage):
    """The reset of a client behind a full pipe is passed on once the queue has not moved for 5 s.

    This is tested for four kinds of target at once, each with a program of its own.
    """
    servers = {}
    for target in (*TCP, *UNIX):
        client, servers[target] = stage.pair("tcp4", target, target_buffer=8192)
        send_until_stuck(client, Payload(MIB).bytes(), still=0.1)
        reset(client)
    assert all(proxy.cpu_share(0.3) < 0.2 for proxy in stage.proxies)
    for target, server in servers.items():
        wait_until(lambda server=server: write_error(server), f"{target} learns of the reset")
        received, _ = read_to_end(server)
        assert stuck_bytes(Payload(MIB).bytes(), len(received)) == received


@pytest.mark.parametrize("target", [*TCP, *UNIX])
def test_unix_client_that_closes_without_reading(stage, target):
    """A UNIX client that closes without having read the answer ends the server's connection too."""
    client, server = stage.pair("unix", target)
    server.sendall(b"never read")
    wait_unread(client, 10)
    client.close()
    assert read_to_end(server)[0] == b""
    wait_until(lambda: write_error(server), "writes of the server fail")


@main_pairs
def test_others_are_not_disturbed(stage, listen, target):
    """Fifty connections that are reset in various ways do not disturb a quiet one."""
    backend = stage.forward(listen, target)
    client = stage.connect()
    server = backend.accept()
    for number in range(50):
        other = stage.connect()
        other_server = backend.accept()
        if number % 2:
            other.sendall(b"x" * number * 100)
        reset(other if number % 3 else other_server)
        (other_server if number % 3 else other).close()
    client.sendall(b"still there?")
    assert read_exactly(server, 12) == b"still there?"
    server.sendall(b"yes")
    assert read_exactly(client, 3) == b"yes"
    assert is_quiet(client)


@main_pairs
def test_connect_and_reset_at_once(stage, listen, target):
    """Thirty clients that reset right after connecting; the next one is served as usual."""
    stage.launch(stage.echo(target), listeners=[stage.listener(listen)])
    for _ in range(30):
        reset(stage.connect())
    client = stage.connect()
    client.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"
