"""The end of one direction is passed on after everything before it; the other direction goes on."""

import socket

import pytest
from kit.differences import differs
from kit.socket_state import is_quiet, write_error
from kit.sockets import TCP, UNIX, every_pair, main_pairs, read_to_end
from kit.traffic import Payload, exchange, expected, receive_digest, send_payload
from kit.waiting import never_within, wait_until

MIB = 1 << 20

drops_the_rest = differs(
    "original", reason="the end of one direction ends the connection: the other direction is lost"
)


@drops_the_rest
@every_pair
def test_request_after_the_servers_end(stage, listen, target):
    """The server half-closes first, and the client continues to send."""
    client, server = stage.pair(listen, target)
    server.sendall(b"all I have to say")
    server.shutdown(socket.SHUT_WR)
    assert read_to_end(client) == (b"all I have to say", "eof")
    client.sendall(b"but listen")
    client.close()
    assert read_to_end(server) == (b"but listen", "eof")


@drops_the_rest
@main_pairs
def test_end_before_any_byte(stage, listen, target):
    """A client that half-closes at once, without a byte, still gets what the server sends."""
    client, server = stage.pair(listen, target)
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(server) == (b"", "eof")
    server.sendall(b"hello")
    server.close()
    assert read_to_end(client) == (b"hello", "eof")


@drops_the_rest
@every_pair
def test_megabytes_in_flight_both_ways(stage, listen, target):
    """16 MiB up and 24 MiB down at once; both arrive, and their ends after the last byte."""
    client, server = stage.pair(listen, target)
    exchange(client, server, Payload(16 * MIB, 1), Payload(24 * MIB, 2), half_close=True)


@drops_the_rest
@main_pairs
def test_upload_then_large_answer(stage, listen, target):
    """The answer begins only after the whole request and its end were read."""
    client, server = stage.pair(listen, target)
    request, answer = Payload(8 * MIB, 1), Payload(8 * MIB, 2)
    answer_at_client = receive_digest(client)
    send_payload(client, request)
    assert receive_digest(server).result() == expected(request)
    send_payload(server, answer)
    assert answer_at_client.result() == expected(answer)


@drops_the_rest
@main_pairs
def test_both_ends_at_the_same_time(stage, listen, target):
    """Both sides send and half-close at once; both get the other's bytes and end."""
    client, server = stage.pair(listen, target)
    for side, message in ((client, b"from the client"), (server, b"from the server")):
        side.sendall(message)
        side.shutdown(socket.SHUT_WR)
    assert read_to_end(client) == (b"from the server", "eof")
    assert read_to_end(server) == (b"from the client", "eof")


@drops_the_rest
@main_pairs
def test_the_end_is_passed_on_as_a_half_close_only(stage, listen, target):
    """After the client's half-close the server can still write, for as long as it likes."""
    client, server = stage.pair(listen, target)
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(server) == (b"", "eof")
    never_within(0.2, lambda: write_error(server), "the server cannot write any more")
    server.close()
    assert read_to_end(client)[1] == "eof"


@every_pair
def test_everything_is_closed_after_both_ends(stage, listen, target):
    """A connection is two sockets in the program, and none once both directions have ended."""
    backend = stage.forward(listen, target)
    kept_open = stage.connect()  # so that what the program opens for its first client is open
    backend.accept()
    wait_until(lambda: stage.proxy.socket_count() >= 3, "listener and two sockets")
    before = stage.proxy.socket_count()
    client = stage.connect()
    server = backend.accept()
    wait_until(lambda: stage.proxy.socket_count() == before + 2, "two sockets more")
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(server) == (b"", "eof")
    server.close()
    read_to_end(client)
    wait_until(lambda: stage.proxy.socket_count() == before, "two sockets fewer")
    assert is_quiet(kept_open)


@pytest.mark.parametrize("target", [*TCP, *UNIX])
def test_unix_client_that_closes_is_an_end(stage, target):
    """A UNIX client's full close is the end of its stream, not a reset."""
    client, server = stage.pair("unix", target)
    client.sendall(b"last message")
    client.close()
    assert read_to_end(server) == (b"last message", "eof")
