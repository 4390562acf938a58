"""Promise: an urgent (out-of-band) byte is delivered in its place in the stream."""

import socket

import pytest
from kit.socket_state import is_writable, unread
from kit.stepped import Incoming, Outgoing, half_close, send_once
from kit.traffic import payload

BIG = 1024 * 1024


@pytest.fixture(params=["client", "target"])
def speaker(request):
    """The side that sends the urgent byte."""
    return request.param


@pytest.fixture
def ends(rigs, pair, way, speaker):
    """(rig, the sending side, the receiving side) of a connection that has settled."""
    rig = rigs(*pair, **way)
    link = rig.link()
    rig.settle()
    return (
        rig,
        *((link.client, link.target) if speaker == "client" else (link.target, link.client)),
    )


def urgently(connection, byte=b"!"):
    """Send one byte out of band."""
    assert connection.send(byte, socket.MSG_OOB) == len(byte)


def test_urgent_byte_first(ends):
    rig, speaker, listener = ends
    urgently(speaker)
    speaker.send(b"rest")
    assert rig.read(listener, 5) == b"!rest"
    assert rig.is_calm()


def test_urgent_byte_in_the_middle(ends):
    rig, speaker, listener = ends
    speaker.send(b"before")
    urgently(speaker)
    speaker.send(b"after")
    assert rig.read(listener, 12) == b"before!after"
    assert rig.is_calm()


def test_urgent_byte_last(ends):
    rig, speaker, listener = ends
    speaker.send(b"before")
    urgently(speaker)
    half_close(speaker)
    assert rig.read_to_end(listener) == (b"before!", "eof")


def test_urgent_byte_alone(ends):
    """Nothing follows it, and the relay is calm meanwhile."""
    rig, speaker, listener = ends
    urgently(speaker)
    assert rig.read(listener, 1) == b"!"
    assert rig.is_calm()
    speaker.send(b"later")
    assert rig.read(listener, 5) == b"later"


def test_urgent_bytes_step_by_step(ends):
    """Several of them, each noticed by the relay separately."""
    rig, speaker, listener = ends
    for number in range(6):
        speaker.send(b"word")
        rig.turn(number % 2)
        urgently(speaker, b"%d" % number)
        rig.turn(number % 3)
    speaker.send(b".")
    assert rig.read(listener, 31) == b"word0word1word2word3word4word5."


def test_several_urgent_bytes_at_once(ends):
    """Only the last one stays urgent; none is lost."""
    rig, speaker, listener = ends
    for number in range(5):
        speaker.send(b"word")
        urgently(speaker, b"%d" % number)
    half_close(speaker)
    assert rig.read_to_end(listener) == (b"word0word1word2word3word4", "eof")


def test_urgent_byte_within_a_stream(ends):
    """Splice stops at an urgent byte; the relay must not."""
    rig, speaker, listener = ends
    data = payload(BIG)
    incoming = Incoming(listener)
    rig.run(Outgoing(speaker, data), incoming_part := Incoming(listener, limit=BIG))
    assert incoming_part.data == data
    urgently(speaker)
    rig.run(Outgoing(speaker, data, half_close), incoming)
    assert incoming.end == "eof"
    assert incoming.data == b"!" + data


def stuck_stream(rigs, pair, way):
    """(rig, link, bytes sent): a stream in large units that is stuck, since it is not read."""
    rig = rigs(*pair, **way, target_buffers={"receive_buffer": 65536})
    link = rig.link()
    flowing = Incoming(link.target, limit=BIG)
    rig.run(Outgoing(link.client, payload(BIG)), flowing)
    return rig, link, rig.fill(link.client, limit=8 * BIG)


def read_without_the_relay(connection):
    """Read what is there, so that the relay can write again; the number of bytes."""
    incoming = Incoming(connection)
    incoming.step()
    return len(incoming.data)


def urgently_if_there_is_room(rig, link):
    """Send an urgent byte into the client's full stream; the bytes read to make room for it."""
    taken = 0
    while not send_once(link.client, b"!", socket.MSG_OOB):
        taken += read_without_the_relay(link.target)
        rig.settle()
    return taken


def test_urgent_byte_into_a_stuck_stream(rigs, pair, way):
    """The relay holds bytes that it cannot write when the urgent one arrives."""
    rig, link, sent = stuck_stream(rigs, pair, way)
    taken = urgently_if_there_is_room(rig, link)
    assert rig.is_calm()
    rig.run(Outgoing(link.client, b"tail", half_close), rest := Incoming(link.target))
    assert rest.end == "eof"
    assert rest.data[-5:] == b"!tail"
    assert taken + len(rest.data) == sent + 5


@pytest.mark.parametrize("speaker", ["client", "target"])
def test_urgent_byte_and_end_behind_a_stuck_stream(rigs, way, speaker):
    """The relay first learns that it can write again, and only then of the urgent byte and the end
    behind it. With the end queued, splice returns 0 at the urgent mark, before the last byte.
    """
    small = {"receive_buffer": 65536}
    rig = rigs("tcp4", "tcp4", **way, client_buffers=small, target_buffers=small)
    link = rig.adopted_link()
    speaker, from_fd, listener, to_fd = (
        (link.client, link.client_fd, link.target, link.target_fd)
        if speaker == "client"
        else (link.target, link.target_fd, link.client, link.client_fd)
    )
    rig.run(Outgoing(speaker, payload(BIG)), Incoming(listener, limit=BIG))
    sent = 0
    while not unread(from_fd):  # the relay takes it, until it is stuck with what it holds
        sent += speaker.send(b"x" * 16384)
        rig.settle()
    taken = 0
    while not is_writable(to_fd):
        taken += read_without_the_relay(listener)
    speaker.send(b"head")
    urgently(speaker)
    speaker.send(b"tail")
    half_close(speaker)
    rest, end = rig.read_to_end(listener)
    assert end == "eof"
    assert rest[-9:] == b"head!tail"
    assert taken + len(rest) == sent + 9
