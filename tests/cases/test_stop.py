"""Case 25: the end of the program, and events that arrive too late."""

import os
import signal

import pytest
from cases.pairs import assert_same, every_pair, needs_a_program, say
from kit.sockets import TCP, read_exactly, read_to_end, reset, send_until_stuck
from kit.traffic import Payload
from kit.waiting import wait_until

MIB = 1 << 20
SEGMENT = Payload(MIB).bytes()
CLEAN_EXITS = (0, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM)
"""What a service manager takes for success in the units of these programs."""


@every_pair
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_25a_stop_with_live_connections(stage, listen, target, number):
    """stop with live connections: it ends at once and successfully, and every peer sees an end.

    One connection is idle, one is stuck in the middle of a stream.
    """
    needs_a_program(stage)
    backend = stage.forward(listen, target, listen_buffer=65536, target_buffer=65536)
    idle = stage.connect()
    idle_server = backend.accept()
    say(idle, b"hello", "the client")
    assert read_exactly(idle_server, 5) == b"hello"
    busy = stage.connect()
    busy_server = backend.accept()
    sent = send_until_stuck(busy, SEGMENT, still=0.1)
    stage.proxy.send_signal(number)
    status = stage.proxy.wait()
    assert status in ([0] if stage.is_ours else CLEAN_EXITS), f"exit status {status}"
    for side in (idle, idle_server, busy):
        assert read_to_end(side)[0] == b"", "bytes from nowhere"
    received, end = read_to_end(busy_server)
    assert (SEGMENT * 64)[:sent].startswith(received), "not the bytes that were sent"
    if stage.is_ours and target in TCP:
        assert end == "reset"


@every_pair
def test_25b_event_for_a_closed_fd_that_was_reused(stage, listen, target):
    """an event for a closed fd that was reused: it affects no other connection.

    While the program is stopped, both sides of many connections leave and as many new clients come:
    it then finds all of this in one batch of events, and new sockets get the numbers of old ones.
    """
    needs_a_program(stage)
    backend = stage.forward(listen, target)
    old = [(stage.connect(), backend.accept()) for _ in range(24)]
    for _ in range(6):
        for client, _ in old:
            client.sendall(b"x")
        for _, server in old:
            assert read_exactly(server, 1) == b"x"
        os.kill(stage.proxy.worker, signal.SIGSTOP)
        clients = []
        for number, (client, server) in enumerate(old):
            if number % 3:
                client.sendall(SEGMENT[:1000])
                server.sendall(SEGMENT[:1000])
            (reset if number % 2 else type(client).close)(client)
            (reset if number % 4 < 2 else type(server).close)(server)
            clients.append(stage.connect())
        os.kill(stage.proxy.worker, signal.SIGCONT)
        old = serve(backend, clients)
    if stage.proxy.sockets_at_start is not None:
        expected = stage.proxy.sockets_at_start + 2 * len(old)
        wait_until(lambda: stage.proxy.socket_count() <= expected, "the old sockets are closed")


def serve(backend, clients):
    """Accept the clients; (client, server) of each, once both have identified themselves."""
    for number, client in enumerate(clients):
        client.sendall(b"%03d" % number)
    pairs = []
    for _ in clients:
        server = backend.accept()
        number = int(read_exactly(server, 3))
        say(server, SEGMENT[number : number + 100])
        pairs.append((clients[number], server))
        assert_same(
            read_exactly(clients[number], 100), SEGMENT[number : number + 100], "the answer"
        )
    return pairs
