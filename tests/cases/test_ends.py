"""Cases 1 to 9: how streams end."""

import socket

import pytest
from cases.pairs import (
    assert_same,
    costs_nothing,
    each_resetting_side,
    end_of_reset,
    every_pair,
    hear,
    needs_a_program,
    say,
    sides,
    stays_open,
)
from kit.socket_state import unread, wait_unread, write_error
from kit.sockets import TCP, read_exactly, read_to_end, reset, send_until_stuck, stuck_bytes
from kit.traffic import Payload, in_background, receive_all
from kit.waiting import patience, wait_until

MIB = 1 << 20
SEGMENT = Payload(MIB).bytes()


@every_pair
@pytest.mark.parametrize("size", [10, MIB])
def test_01_client_fin_before_the_reply(stage, listen, target, size):
    """client FIN before the reply: the reply is delivered whole, then its end."""
    client, server = stage.pair(listen, target)
    reply = SEGMENT[:size]
    client.sendall(b"request")
    client.shutdown(socket.SHUT_WR)
    hear(server, b"request", "the request")
    reading = receive_all(client)
    say(server, reply)
    server.close()
    received, end = reading.result()
    assert_same(received, reply, "the reply")
    assert end == "eof", "the reply ends with a reset"


@every_pair
@pytest.mark.parametrize("how", ["half-close", "close"])
def test_02_eof_while_the_pipe_is_not_empty(stage, listen, target, how):
    """EOF while the pipe is not empty: everything inside is delivered, then the end.

    The client fills everything up to a server that does not read, and ends its stream.
    """
    client, server = stage.pair(listen, target, target_buffer=16384)
    size = send_until_stuck(client, SEGMENT, still=0.1)
    client.shutdown(socket.SHUT_WR) if how == "half-close" else client.close()
    hear(server, stuck_bytes(SEGMENT, size), "the stream")


@every_pair
def test_03_half_closed_peer_that_never_finishes(stage, listen, target):
    """half-closed peer that never finishes: the other may send as long as it likes, at no CPU."""
    client, server = stage.pair(listen, target)
    say(client, b"hello", "the client")
    client.shutdown(socket.SHUT_WR)
    hear(server, b"hello", "the client's stream")
    costs_nothing(stage)
    for number in range(3):
        stays_open(client, 0.1, "the end of one direction ends the other")
        say(server, b"word %d" % number)
        assert read_exactly(client, 6) == b"word %d" % number


@each_resetting_side
@pytest.mark.parametrize("when", ["at once", "once all has arrived"])
def test_04_rst_right_after_data(stage, listen, target, actor, when):
    """RST right after data: the data is delivered, then the reset; on UNIX, the end.

    "At once" means that the data has not been read when the reset comes.
    """
    client, server = stage.pair(listen, target)
    say(client, b"hello")
    assert read_exactly(server, 5) == b"hello"
    sender, receiver = sides(client, server, actor)
    sender.sendall(SEGMENT[:5000])
    sender.sendall(SEGMENT[5000:10_000])
    if when == "once all has arrived":
        wait_unread(receiver, 10_000)
    reset(sender)
    received, end = read_to_end(receiver)
    assert_same(received, SEGMENT[:10_000], "the data")
    assert end == end_of_reset(listen, target, actor), "the reset arrives as a clean end"


@each_resetting_side
def test_05_rst_mid_stream(stage, listen, target, actor):
    """RST mid-stream: what arrives is the beginning of the stream, and never looks complete."""
    client, server = stage.pair(listen, target)
    sender, receiver = sides(client, server, actor)
    reading = receive_all(receiver)

    def send_and_reset():
        sender.settimeout(patience())
        for _ in range(6):
            sender.sendall(SEGMENT)
        reset(sender)

    in_background(send_and_reset).result()
    received, end = reading.result()
    assert (SEGMENT * 6).startswith(received), "not the bytes that were sent"
    assert end == end_of_reset(listen, target, actor), "the reset arrives as a clean end"


@each_resetting_side
def test_06_rst_after_a_clean_eof(stage, listen, target, actor):
    """RST after a clean EOF: the other side, which continues after the end, learns of it."""
    client, server = stage.pair(listen, target)
    sender, receiver = sides(client, server, actor)
    say(sender, b"request", f"the {actor}")
    sender.shutdown(socket.SHUT_WR)
    hear(receiver, b"request", "the request")
    say(receiver, b"word", "the other side")
    try:
        assert read_exactly(sender, 4) == b"word"
    except (ConnectionResetError, AssertionError):
        raise AssertionError("the end of one direction ends the other") from None
    reset(sender)
    wait_until(lambda: write_error(receiver), "the other side learns of the reset")


@every_pair
def test_07_write_error_with_unread_input_the_other_way(stage, listen, target):
    """write error with unread input the other way: the answer of a server that rejects is complete.

    It answers and closes with the request unread, which resets the connection. The client has more
    to send, and reads only then.
    """
    client, server = stage.pair(listen, target, target_buffer=65536)
    answer = SEGMENT[:3000]
    send_until_stuck(client, b"r" * 65536, limit=8 * MIB, still=0.1)
    wait_unread(server, 1)
    server.sendall(answer)
    server.close()
    assert_same(read_to_end(client)[0], answer, "the answer")


@every_pair
def test_08_close_with_unread_input(stage, listen, target):
    """close with unread input: what was sent before is delivered, and the other side learns of it.

    Between two TCP connections it arrives as a reset, which it is.
    """
    client, server = stage.pair(listen, target)
    say(server, b"a greeting that nobody reads")
    wait_unread(client, 28)
    client.sendall(b"my last words")
    wait_unread(server, 13)
    client.close()
    received, end = read_to_end(server)
    assert_same(received, b"my last words", "the last words")
    if listen in TCP and target in TCP:
        assert end == "reset", "the reset arrives as a clean end"
    wait_until(lambda: write_error(server), "the server learns of it")


@every_pair
@pytest.mark.parametrize("segment", [100, 65536])
def test_09a_hup_while_paused(stage, listen, target, segment):
    """HUP/ERR while paused: remembered at no CPU, and passed on after the last byte.

    The client closes while the server does not read; on a UNIX socket that is a hang-up, which the
    kernel keeps reporting.
    """
    client, server = stage.pair(listen, target, listen_buffer=65536, target_buffer=65536)
    size = send_until_stuck(client, SEGMENT[:segment], still=0.1)
    client.close()
    costs_nothing(stage)
    hear(server, stuck_bytes(SEGMENT[:segment], size), "the stream")


@each_resetting_side
def test_09b_err_while_paused(stage, listen, target, actor):
    """HUP/ERR while paused: a reset costs no CPU while the reader does not read.

    The reader gets what had reached it before, then the reset.
    """
    client, server = stage.pair(listen, target, listen_buffer=65536, target_buffer=65536)
    sender, receiver = sides(client, server, actor)
    size = send_until_stuck(sender, SEGMENT, still=0.1)
    waiting = unread(receiver)
    reset(sender)
    costs_nothing(stage)
    received, end = read_to_end(receiver)
    assert stuck_bytes(SEGMENT, size).startswith(received), "not the bytes that were sent"
    assert len(received) >= waiting, f"only {len(received)} bytes; {waiting} were there already"
    assert end == end_of_reset(listen, target, actor), "the reset arrives as a clean end"


@each_resetting_side
def test_09c_err_of_the_reader_while_paused(stage, listen, target, actor):
    """HUP/ERR while paused: a reader that resets instead of reading is passed on, at no CPU."""
    client, server = stage.pair(listen, target, listen_buffer=65536, target_buffer=65536)
    reader, sender = sides(client, server, actor)
    send_until_stuck(sender, SEGMENT, still=0.1)
    reset(reader)
    wait_until(lambda: write_error(sender), "the sender learns of it")
    costs_nothing(stage, "has nothing more to do")


@every_pair
def test_09d_both_paused_and_both_gone(stage, listen, target):
    """HUP/ERR while paused: with both directions stuck and both sides gone, nothing is left."""
    client, server = stage.pair(listen, target, listen_buffer=65536, target_buffer=65536)
    say(client, b"hello", "the client")
    assert read_exactly(server, 5) == b"hello"
    needs_a_program(stage)
    before = stage.proxy.socket_count()
    for side in (client, server):
        send_until_stuck(side, SEGMENT, still=0.1)
    reset(client)
    reset(server)
    wait_until(lambda: stage.proxy.socket_count() <= before - 2, "both sockets are closed")
    costs_nothing(stage, "has nothing more to do")
