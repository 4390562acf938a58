"""A restart keeps what is known of each client: its header, its address, and its source's share."""

import os
import socket

import pytest
from kit.datagrams import status
from kit.differences import differs
from kit.manager import restart, start, stop
from kit.proxy_header import LOCAL, V1, V2, V2_TLV
from kit.sockets import read_exactly, read_to_end
from kit.traffic import greet, is_served
from kit.waiting import wait_until

pytestmark = differs("original", reason="it cuts its connections", run=False)

FROM = "--accept-proxy-protocol=127.0.0.0/8,unix"
SHARE = "--connections-max-per-source="
SOURCE_REFUSED = "Hit connection limit of a source, refusing connection."


@pytest.fixture
def launch(stage, manager):
    """Launch the program with a store."""

    def launched(*arguments, family="tcp4", **options):
        listeners = [stage.listener(family)]
        stage.launch(*arguments, listeners=listeners, names="web", notify=manager, **options)

    return launched


def introduced(number):
    """A header of a client with an address of its own."""
    return V1.replace(b"192.0.2.1 ", b"192.0.2.%d " % number)


# ── places of sources ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["tcp4", "unix"])
def test_connections_keep_their_places(stage, manager, launch, family):
    """And give them back when they end."""
    arguments = [f"{SHARE}2", stage.echo()]
    launch(*arguments, family=family)
    clients = [stage.connect() for _ in range(2)]
    for client in clients:
        greet(client)
    for _ in range(2):
        restart(stage, manager, *arguments)
        for client in clients:
            greet(client)
        assert not is_served(stage.connect())
    clients[0].close()
    wait_until(lambda: is_served(stage.connect()), "a free place")


def test_held_clients_keep_their_places(stage, manager, launch):
    absent = stage.absent()
    arguments = [f"{SHARE}2", "--connect-timeout=1min", absent.target]
    launch(*arguments)
    clients = [stage.connect() for _ in range(2)]
    status(stage.proxy, "2 waiting for")
    restart(stage, manager, *arguments)
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.wait_for_log(SOURCE_REFUSED)
    absent.start_listening()
    for connection in [*[absent.accept() for _ in clients], *clients]:
        connection.close()
    status(stage.proxy, "0 connections")
    stage.connect().sendall(b"x")
    assert read_exactly(absent.accept(), 1) == b"x"


def test_a_lower_limit_cuts_nobody(stage, manager, launch):
    """The clients that are there may stay; the source has no place until they are few enough."""
    echo = stage.echo()
    launch(echo)
    clients = [stage.connect() for _ in range(4)]
    for client in clients:
        greet(client)
    restart(stage, manager, f"{SHARE}2", "-c3", echo)
    for client in clients:
        greet(client)
    assert not is_served(stage.connect())
    for client in clients[:3]:
        client.close()
    wait_until(lambda: is_served(stage.connect()), "a free place")
    greet(clients[3])


def test_a_client_counts_by_the_address_of_its_header(stage, manager, launch):
    """Open or held; one without an address in its header counts nowhere."""
    absent = stage.absent()
    echo = stage.echo()
    arguments = [FROM, f"{SHARE}2", "--connect-timeout=1min"]
    launch(*arguments, echo)
    clients = []
    for header in [introduced(1)] * 2 + [introduced(2)] * 2 + [LOCAL] * 4:
        clients.append(stage.connect())
        clients[-1].sendall(header)
        greet(clients[-1])
    restart(stage, manager, *arguments, absent.target)
    held = [stage.connect() for _ in range(4)]
    for client, header in zip(held, [introduced(3)] * 2 + [LOCAL] * 2, strict=True):
        client.sendall(header)
    status(stage.proxy, "4 waiting for")
    restart(stage, manager, *arguments, absent.target)
    for client in clients:
        greet(client)
    for number in (1, 2, 3):
        late = stage.connect()
        late.sendall(introduced(number))
        assert read_to_end(late)[0] == b""
    for header in (introduced(4), LOCAL):
        held.append(stage.connect())
        held[-1].sendall(header)
    status(stage.proxy, "6 waiting for", "3 refused at the limit of their source")


# ── clients without their header ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["tcp4", "unix"])
def test_a_client_sends_the_rest_of_its_header_to_the_next_process(stage, manager, launch, family):
    backend = stage.backend()
    arguments = [FROM, "--proxy-protocol=v2", backend.target]
    launch(*arguments, family=family)
    client, silent = stage.connect(), stage.connect()
    client.sendall(V2_TLV[:20])
    wait_until(lambda: stage.proxy.socket_count() >= stage.proxy.sockets_at_start + 2, "both")
    restart(stage, manager, *arguments)
    assert "Going on with 0 open and 2 waiting connections." in stage.proxy.log()
    client.sendall(V2_TLV[20:] + b"request")
    server = backend.accept()
    assert read_exactly(server, len(V2_TLV) + 7) == V2_TLV + b"request"
    server.sendall(b"answer")
    assert read_exactly(client, 6) == b"answer"
    assert read_to_end(silent)[0] == b""
    stage.proxy.wait_for_log("no PROXY header within 5 s")
    client.close()
    server.close()
    stop(stage)
    assert "Totals: 2 accepted, 0 open, 0 waiting, 1 refused" in stage.proxy.log()


def test_what_it_sent_meanwhile_is_read(stage, manager, launch):
    backend = stage.backend()
    launch(FROM, backend.target)
    client = stage.connect()
    wait_until(lambda: stage.proxy.socket_count() > stage.proxy.sockets_at_start, "the client")
    stop(stage)
    client.sendall(V1 + b"request")
    client.shutdown(socket.SHUT_WR)
    start(stage, manager, FROM, backend.target)
    assert read_to_end(backend.accept()) == (b"request", "eof")


def test_a_header_that_is_not_expected_any_more_is_for_the_target(stage, manager, launch):
    backend = stage.backend()
    launch(FROM, backend.target)
    client = stage.connect()
    client.sendall(V1[:10])
    wait_until(lambda: stage.proxy.socket_count() > stage.proxy.sockets_at_start, "the client")
    restart(stage, manager, f"{SHARE}1", backend.target)
    client.sendall(V1[10:])
    assert read_exactly(backend.accept(), len(V1)) == V1
    assert not is_served(stage.connect())


def test_a_plain_stop_resets_them(stage, manager, launch):
    launch(FROM, stage.echo())
    client = stage.connect()
    client.sendall(V1[:10])
    wait_until(lambda: stage.proxy.socket_count() > stage.proxy.sockets_at_start, "the client")
    stop(stage)
    assert "0 open and 1 waiting connections are kept" in stage.proxy.log()
    manager.drop()
    assert read_to_end(client) == (b"", "reset")


# ── headers that were received ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["tcp4", "unix"])
@pytest.mark.parametrize(
    ("received", "before", "after", "sent"),
    [
        (V1, "v1", "v1", V1),
        (V1, "v1", "v2", V2),
        (V2_TLV, "v2", "v2", V2_TLV),
        (V2_TLV, "v2", "v1", V1),
        (LOCAL, "v2", "v2", LOCAL),
        (V1, "v2", None, b""),
    ],
)
def test_a_held_client_keeps_its_header(
    stage, manager, launch, family, received, before, after, sent
):
    absent = stage.absent()
    arguments = [FROM, "--connect-timeout=1min", absent.target]
    launch(f"--proxy-protocol={before}", *arguments, family=family)
    client = stage.connect()
    client.sendall(received + b"request")
    status(stage.proxy, "1 waiting for")
    restart(stage, manager, *([f"--proxy-protocol={after}"] if after else []), *arguments)
    absent.start_listening()
    assert read_exactly(absent.accept(), len(sent) + 7) == sent + b"request"


@pytest.mark.parametrize("family", ["tcp4", "unix"])
def test_a_client_whose_header_is_not_known_any_more_keeps_its_address(
    stage, manager, launch, family
):
    """The target was to have no header; the next process announces the client all the same."""
    absent = stage.absent()
    arguments = [FROM, "--connect-timeout=1min", absent.target]
    launch(*arguments, family=family)
    client = stage.connect()
    client.sendall(V1 + b"request")
    status(stage.proxy, "1 waiting for")
    restart(stage, manager, "--proxy-protocol=v1", *arguments)
    absent.start_listening()
    own = "0.0.0.0 5000 0" if family == "unix" else f"127.0.0.1 5000 {client.getpeername()[1]}"
    expected = f"PROXY TCP4 192.0.2.1 {own}\r\nrequest".encode()
    assert read_exactly(absent.accept(), len(expected)) == expected


@pytest.mark.parametrize("held", [False, True])
def test_the_inspection_shows_the_address_of_the_header(stage, manager, launch, callers, held):
    folder = stage.path("runtime")
    os.mkdir(folder)
    target = stage.absent().target if held else stage.echo()
    options = {"environment": {"RUNTIME_DIRECTORY": folder}}
    launch(FROM, target, **options)
    client = stage.connect()
    client.sendall(V1)
    if held:
        status(stage.proxy, "1 waiting for")
    else:
        greet(client)
    (before,) = callers(f"{folder}/inspect").connections()
    restart(stage, manager, FROM, target, **options)
    (after,) = callers(f"{folder}/inspect").connections()
    assert after["client"] == before["client"] == "192.0.2.1:5000"
    assert after["id"] == before["id"]
