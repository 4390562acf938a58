"""When writing to one side fails, what that side had already sent is still delivered."""

import socket
import time

import pytest
from kit.differences import differs
from kit.socket_state import wait_unread, write_error
from kit.sockets import (
    TCP,
    UNIX,
    every_pair,
    main_pairs,
    read_exactly,
    read_to_end,
    send_until_stuck,
)
from kit.traffic import Payload, in_background, receive_digest, send_payload
from kit.waiting import wait_until

MIB = 1 << 20
REJECTION = b"413 too large\r\n" + b"." * 3000

lost_with_the_request = differs(
    "original",
    reason="a request that cannot be written any more takes the answer with it",
    always=False,
)


@lost_with_the_request
@every_pair
def test_server_rejects_after_the_head(stage, listen, target):
    """The server reads only the head of the request, answers, half-closes and closes."""
    client, server = stage.pair(listen, target, target_buffer=65536)
    send_until_stuck(client, b"r" * 65536, limit=8 * MIB, still=0.1)
    read_exactly(server, 100)
    server.sendall(REJECTION)
    server.shutdown(socket.SHUT_WR)
    server.close()
    received, _ = read_to_end(client)
    assert received == REJECTION


@differs(
    "original", reason="closes at once, which resets a client that is still sending", always=False
)
@main_pairs
def test_answer_can_be_read_after_a_failed_write(stage, listen, target):
    """A client that sends until its writes fail can still read the whole answer."""
    client, server = stage.pair(listen, target)
    client.sendall(b"head")
    assert read_exactly(server, 4) == b"head"
    server.sendall(REJECTION)
    server.close()
    wait_unread(client, len(REJECTION))
    wait_until(lambda: write_error(client), "writes of the client fail")
    assert read_exactly(client, len(REJECTION)) == REJECTION


@differs(
    "original",
    reason="closes with the client's bytes unread, which resets the client before it has read",
    always=False,
)
@main_pairs
def test_large_answer_of_a_server_that_reads_nothing(stage, listen, target):
    """Four megabytes of answer, sent before the close, reach a client whose sending is blocked.

    The server half-closes after the answer and closes when the client has received it, so nothing
    is reset.
    """
    client, server = stage.pair(listen, target, target_buffer=65536)
    send_until_stuck(client, b"r" * 65536, limit=8 * MIB, still=0.1)
    answer = Payload(4 * MIB)
    sending = send_payload(server, answer)
    reading = receive_digest(client, answer.size)
    sending.result()
    assert reading.result() == (answer.size, answer.digest())


@pytest.mark.parametrize("listen", [*TCP, *UNIX])
def test_answer_of_a_unix_server_that_closes(stage, listen):
    """A UNIX server's large answer, closed at once with the request unread, is delivered whole."""
    client, server = stage.pair(listen, "unix")
    client.sendall(b"request that is never read")
    wait_unread(server, 26)
    answer = Payload(MIB)
    reading = read_in_background(client)
    send_payload(server, answer, half_close=False).result()
    server.close()
    assert reading.result() == answer.bytes()


def read_in_background(connection):
    """Read to the end, clean or not, in a thread; `.result()` is the bytes."""
    return in_background(lambda: read_to_end(connection)[0])


@pytest.mark.parametrize(("listen", "target"), [("tcp4", "tcp4"), ("tcp4", "unix")])
def test_client_of_a_closed_server_learns_of_it(stage, listen, target):
    """A client that continues to send to a closed server gets an error within seconds."""
    client, server = stage.pair(listen, target)
    server.sendall(b"bye")
    server.close()
    assert read_to_end(client) == (b"bye", "eof")
    assert not write_error(client)
    wait_until(lambda: write_error(client), "writes of the client fail")


@every_pair
def test_server_learns_soon_that_its_client_is_gone(stage, listen, target):
    """A client sends a byte and closes; the server sends a byte every millisecond.

    On a direct connection the second one fails. With a delay of a second, 800 would be lost.
    """
    client, server = stage.pair(listen, target)
    client.sendall(b"x")
    client.close()
    assert read_exactly(server, 1) == b"x"
    sent = 0
    while not write_error(server):
        sent += 1
        assert sent < 400
        time.sleep(0.001)
