"""Held clients: what happens to those that leave; and every client is in one counter."""

import os
import random
import re
import signal
import socket

import pytest
from kit.differences import differs
from kit.sockets import read_exactly, read_to_end, reset
from kit.waiting import wait_until

pytestmark = differs("original", reason="gives up at the first refusal", run=False)


def counters(stage):
    """What SIGUSR1 logs, as {name: count}."""
    before = len(stage.proxy.log_lines(" accepted, "))
    stage.proxy.send_signal(signal.SIGUSR1)
    wait_until(lambda: len(stage.proxy.log_lines(" accepted, ")) > before, "the counters")
    first, _, last = stage.proxy.log_lines(" accepted, ")[-1].split("; ")
    return {
        word: int(count)
        for count, word in re.findall(r"(\d+) ([a-z]+(?: gone)?)", f"{first}, {last}")
    }


def assert_they_add_up(found):
    """Assert that `accepted` is the sum of all others."""
    assert found["accepted"] == sum(found.values()) - found["accepted"], found


@pytest.mark.parametrize("listen", ["tcp4", "unix", "abstract"])
@pytest.mark.parametrize("target", ["tcp4", "unix"])
def test_a_client_that_sends_and_closes_while_held_is_served(stage, listen, target):
    """A message is delivered, whether or not its sender waits."""
    backend = stage.absent(target)
    stage.launch(backend.target, listeners=[stage.listener(listen)])
    for number in range(5):
        client = stage.connect()
        client.sendall(b"message %d" % number)
        client.close()
    wait_until(lambda: counters(stage)["waiting"] == 5, "five that wait")
    backend.start_listening()
    received = sorted(read_to_end(backend.accept()) for _ in range(5))
    assert received == [(b"message %d" % number, "eof") for number in range(5)]
    assert_they_add_up(counters(stage))


def test_a_message_that_the_relay_has_read_already_is_delivered(stage):
    """The first connect takes the bytes from the client before it fails."""
    backend = stage.absent("tcp4")
    stage.launch(backend.target, listeners=[stage.listener("unix")])
    clients = []
    for number in range(20):  # at once, so that the relay connects some of them by itself
        clients.append(stage.connect())
        clients[-1].sendall(b"%02d" % number)
    for client in clients:
        client.close()
    wait_until(lambda: counters(stage)["waiting"] == 20, "all that wait")
    backend.start_listening()
    assert sorted(read_to_end(backend.accept()) for _ in range(20)) == [
        (b"%02d" % number, "eof") for number in range(20)
    ]


@pytest.mark.parametrize("listen", ["tcp4", "unix"])
def test_clients_that_leave_while_held_are_counted(stage, listen):
    backend = stage.absent()
    stage.launch(backend.target, listeners=[stage.listener(listen)])
    clients = [stage.connect() for _ in range(4)]
    wait_until(lambda: counters(stage)["waiting"] == 4, "all that wait")
    for client in clients[:3]:
        reset(client)
    wait_until(lambda: counters(stage).get("client gone") == 3, "three that are gone")
    found = counters(stage)
    assert found["waiting"] == 1
    assert_they_add_up(found)


@pytest.mark.parametrize("listen", ["tcp4", "unix"])
def test_whatever_happens_the_counters_add_up(stage, listen):
    """Also while events of one batch are on their way to the policy."""
    chance = random.Random(12)
    backend = stage.absent()
    stage.launch(
        "-c30", "--connect-timeout=300ms", backend.target, listeners=[stage.listener(listen)]
    )
    clients, listens = [], False
    for step in range(300):
        what = chance.choice(["come", "come", "come", "send", "close", "reset", "count"])
        if step == 150:
            backend.start_listening()
            backend.listener.setblocking(False)
            listens = True
        if what == "come" and len(clients) < 60:
            clients.append(stage.connect())
        elif what == "count":
            assert_they_add_up(counters(stage))
        elif clients:
            client = clients.pop(chance.randrange(len(clients)))
            try:
                if what == "send":
                    client.sendall(b"x")
            except OSError:
                pass  # it was given up or refused
            client.close() if what == "close" else reset(client)
        if listens:
            try:
                backend.accept(timeout=0.001).close()
            except AssertionError:
                pass
    assert_they_add_up(counters(stage))


@pytest.mark.parametrize("signals", [1, 2])
def test_held_clients_are_cut_with_a_reset(stage, signals):
    """At the end of the program they have not been served, so a clean end would be wrong."""
    backend = stage.absent()
    stage.launch(
        "--connect-timeout=1h",
        *(["--drain-timeout=1h"] if signals == 2 else []),
        backend.target,
        listeners=[stage.listener("tcp4")],
    )
    client = stage.connect()
    wait_until(lambda: counters(stage)["waiting"] == 1, "a client that waits")
    for _ in range(signals):
        stage.proxy.send_signal(signal.SIGTERM)
        if signals == 2:
            wait_until(lambda: "STOPPING=1" in stage.proxy.notify.lines(), "the stop")
    assert stage.proxy.wait() == 0
    assert read_to_end(client) == (b"", "reset")


def test_a_reset_of_a_held_client_is_no_clean_end_at_the_target(stage):
    """Also of clients that reset at the moment at which the target begins to accept."""
    backend = stage.absent()
    stage.launch(backend.target, listeners=[stage.listener("tcp4")])
    clients = [stage.connect() for _ in range(10)]
    wait_until(lambda: counters(stage)["waiting"] == 10, "all that wait")
    backend.start_listening()
    for client in clients[:9]:
        reset(client)
    clients[9].sendall(b"x")
    ends = []
    while not ends or ends[-1] != b"x":
        server = backend.accept()
        try:
            ends.append(server.recv(1))
        except ConnectionResetError:
            continue
        assert ends[-1] == b"x"


# ── a full backlog ───────────────────────────────────────────────────────────────────────────────


def test_a_full_backlog_is_congestion(stage):
    """No outage is logged, and clients are connected in order as room becomes free."""
    backend = stage.backend("unix", backlog=1)
    connections = stage.fill_backlog(backend)
    stage.launch(backend.target, listeners=[stage.listener("unix")])
    clients = []
    for number in range(20):
        clients.append(stage.connect())
        clients[-1].sendall(b"%02d" % number)
        wait_until(lambda: counters(stage)["accepted"] == len(clients), "the next client")
    for _ in connections:
        backend.accept()
    for number in range(20):
        assert read_exactly(backend.accept(), 2) == b"%02d" % number
    assert stage.proxy.log_lines("holding") == []


def test_a_backlog_that_stays_full_is_logged_once(stage):
    backend = stage.backend("unix", backlog=1)
    stage.fill_backlog(backend)
    stage.launch(backend.target, listeners=[stage.listener("unix")])
    stage.connect()
    stage.proxy.wait_for_log("Resource temporarily unavailable")
    assert len(stage.proxy.log_lines("holding clients until it answers")) == 1
    assert stage.proxy.cpu_share(0.5) < 0.2


def test_a_symbolic_link_to_itself_is_a_permanent_error(stage):
    """ELOOP does not pass here, while on TCP it means that nothing listens."""
    os.symlink(stage.path("loop"), stage.path("loop"))
    stage.launch("--connect-timeout=1h", stage.path("loop"), listeners=[stage.listener()])
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.wait_for_log("Failed to connect to remote host: Too many levels of symbolic links")


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_target_of_another_socket_type_is_a_permanent_error(stage, kind):
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(stage.path("other"))
        if kind == socket.SOCK_SEQPACKET:
            other.listen()
        stage.launch("--connect-timeout=1h", stage.path("other"), listeners=[stage.listener()])
        assert read_to_end(stage.connect())[0] == b""
        stage.proxy.wait_for_log("Failed to connect to remote host: Protocol wrong type for socket")
