"""--idle-timeout=: a connection is closed after that time without traffic."""

import time

import pytest
from kit.differences import differs
from kit.socket_state import hung_up, is_quiet, write_error
from kit.sockets import main_pairs, read_exactly, read_to_end, send_until_stuck
from kit.traffic import Payload
from kit.waiting import never_within, wait_until

pytestmark = differs("original", reason="has no --idle-timeout=", run=False)


@main_pairs
def test_idle_connection_is_closed(stage, listen, target):
    """Both sides are closed, not before the time has passed."""
    client, server = stage.pair(listen, target, "--idle-timeout=400ms")
    client.sendall(b"hello")
    assert read_exactly(server, 5) == b"hello"
    start = time.monotonic()
    assert read_to_end(client)[0] == b""
    assert time.monotonic() - start >= 0.35
    assert read_to_end(server)[0] == b""
    wait_until(lambda: write_error(server), "the server is closed")


@pytest.mark.parametrize(("listen", "target"), [("tcp4", "tcp4"), ("unix", "tcp4")])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_traffic_in_one_direction_is_enough(stage, listen, target, direction):
    """A byte now and then in one direction keeps the connection open."""
    client, server = stage.pair(listen, target, "--idle-timeout=700ms")
    sender, receiver = (client, server) if direction == "up" else (server, client)
    for _ in range(11):
        sender.sendall(b".")
        assert read_exactly(receiver, 1) == b"."
        never_within(0.1, lambda: not is_quiet(sender), "the end of a busy connection")


def test_connection_without_any_traffic(stage):
    """A client that connects and does nothing is closed too."""
    client, server = stage.pair("tcp4", "tcp4", "--idle-timeout=300ms")
    assert read_to_end(client)[0] == b""
    assert read_to_end(server)[0] == b""


def test_stalled_connection_counts_as_idle(stage):
    """A connection whose reader does not read moves no byte, so it is closed."""
    client, server = stage.pair(
        "tcp4", "tcp4", "--idle-timeout=500ms", listen_buffer=65536, target_buffer=65536
    )
    send_until_stuck(client, Payload(1 << 20).bytes(), still=0.1)
    wait_until(lambda: hung_up(client), "the client is closed")
    wait_until(lambda: stage.proxy.socket_count() <= stage.proxy.sockets_at_start, "all is closed")
    server.close()


def test_half_closed_connection_counts_too(stage):
    """After one direction has ended, silence in the other ends it as well."""
    client, server = stage.pair("tcp4", "tcp4", "--idle-timeout=400ms")
    server.shutdown(1)
    assert read_to_end(client)[0] == b""
    assert read_to_end(server)[0] == b""
    wait_until(lambda: stage.proxy.socket_count() <= stage.proxy.sockets_at_start, "all is closed")


def test_each_connection_has_its_own_timer(stage):
    """A busy connection does not keep an idle one open, and stays open itself."""
    backend = stage.forward("tcp4", "tcp4", "--idle-timeout=500ms")
    idle = stage.connect()
    backend.accept()
    busy = stage.connect()
    its_server = backend.accept()
    deadline = time.monotonic() + 10
    while is_quiet(idle):
        assert time.monotonic() < deadline
        busy.sendall(b".")
        assert read_exactly(its_server, 1) == b"."
        time.sleep(0.02)  # the busy client's rhythm
    busy.sendall(b"!")
    assert read_exactly(its_server, 1) == b"!"


def test_no_idle_timeout_by_default(stage):
    """Without the option an idle connection stays."""
    client, _ = stage.pair("tcp4", "tcp4")
    never_within(0.8, lambda: not is_quiet(client), "the end of an idle connection")


def test_hundred_idle_connections_cost_nothing(stage):
    """The timers of a hundred idle connections use hardly any CPU, and all expire."""
    backend = stage.forward("unix", "unix", "--idle-timeout=1500ms")
    clients = [stage.connect() for _ in range(100)]
    for _ in clients:
        backend.accept()
    assert stage.proxy.cpu_share(0.5) < 0.2
    for client in clients:
        assert read_to_end(client)[0] == b""
