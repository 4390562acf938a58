"""Promise: each side gets exactly what the other sent, in order, then the end as it happened."""

import pytest
from kit.stepped import Incoming, Outgoing, close, half_close
from kit.traffic import payload

MEGABYTES = 3 * 1024 * 1024 + 17
"""More than a pipe and the socket buffers hold: part of it is in transit when the end is sent."""


def test_nothing_at_all(rigs, pair, way):
    """A connection may end without a byte."""
    rig = rigs(*pair, **way)
    link = rig.link()
    half_close(link.client)
    assert rig.read_to_end(link.target) == (b"", "eof")
    close(link.target)
    assert rig.read_to_end(link.client) == (b"", "eof")
    assert rig.until_ended(link.id) == ("ended", 0, 0)


def test_sizes_around_the_units_of_the_relay(rigs, pair, mode):
    """A read that exactly fills the buffer may not have emptied the socket."""
    rig = rigs(*pair, **mode)
    for size in (1, 16383, 16384, 16385, 65536, 131072, 131073):
        link = rig.link()
        data = payload(size)
        there, back = Incoming(link.target), Incoming(link.client)
        rig.run(Outgoing(link.client, data, half_close), there)
        rig.run(Outgoing(link.target, data, close), back)
        assert (there.data, there.end) == (data, "eof")
        assert (back.data, back.end) == (data, "eof")
        assert rig.until_ended(link.id) == ("ended", size, size)


def test_ping_pong(rigs, pair, way):
    """Short messages back and forth; none of them waits for more bytes."""
    rig = rigs(*pair, **way)
    link = rig.link()
    for turn in range(50):
        question, answer = payload(1 + turn, turn), payload(100 + turn, turn)
        rig.send(link.client, question)
        assert rig.read(link.target, len(question)) == question
        rig.send(link.target, answer)
        assert rig.read(link.client, len(answer)) == answer


def test_both_ways_at_once(rigs, pair, mode):
    """Two streams in opposite directions do not disturb each other."""
    rig = rigs(*pair, **mode)
    link = rig.link()
    up, down = payload(MEGABYTES, 1), payload(MEGABYTES, 2)
    there, back = Incoming(link.target), Incoming(link.client)
    rig.run(
        Outgoing(link.client, up, half_close), Outgoing(link.target, down, half_close), there, back
    )
    assert (there.data, there.end) == (up, "eof")
    assert (back.data, back.end) == (down, "eof")
    assert rig.until_ended(link.id) == ("ended", MEGABYTES, MEGABYTES)


def test_half_close_of_the_client(rigs, pair, mode):
    """The end follows megabytes still in transit, and the answer still arrives."""
    rig = rigs(*pair, **mode)
    link = rig.link()
    request, answer = payload(MEGABYTES, 1), payload(MEGABYTES, 2)
    there = Incoming(link.target)
    rig.run(Outgoing(link.client, request, half_close), there)
    assert (there.data, there.end) == (request, "eof")
    assert rig.is_calm()
    back = Incoming(link.client)
    rig.run(Outgoing(link.target, answer, close), back)
    assert (back.data, back.end) == (answer, "eof")
    assert rig.until_ended(link.id) == ("ended", MEGABYTES, MEGABYTES)


def test_half_close_of_the_target(rigs, pair, mode):
    """The same in the other direction: the target ends its stream first and continues to read."""
    rig = rigs(*pair, **mode)
    link = rig.link()
    greeting, request = payload(MEGABYTES, 1), payload(MEGABYTES, 2)
    back = Incoming(link.client)
    rig.run(Outgoing(link.target, greeting, half_close), back)
    assert (back.data, back.end) == (greeting, "eof")
    assert rig.is_calm()
    there = Incoming(link.target)
    rig.run(Outgoing(link.client, request, close), there)
    assert (there.data, there.end) == (request, "eof")
    assert rig.until_ended(link.id) == ("ended", MEGABYTES, MEGABYTES)


def test_end_before_the_reader_reads(rigs, pair, mode):
    """Bytes and end are sent while the reader sleeps; it finds both, and the relay is calm."""
    rig = rigs(*pair, **mode, target_buffers={"receive_buffer": 4096})
    link = rig.link()
    sent = rig.fill(link.client)
    half_close(link.client)
    assert rig.is_calm()
    received, end = rig.read_to_end(link.target)
    assert (len(received), end) == (sent, "eof")
    close(link.target)
    assert rig.read_to_end(link.client) == (b"", "eof")


def test_half_closed_peer_that_never_finishes(rigs, pair, way):
    """A half-closed connection stays for as long as the other side wants, and costs no CPU time."""
    rig = rigs(*pair, **way)
    link = rig.link()
    half_close(link.client)
    assert rig.read_to_end(link.target) == (b"", "eof")
    for _ in range(3):
        assert rig.is_calm()
        rig.send(link.target, b"still here")
        assert rig.read(link.client, 10) == b"still here"
    assert rig.relay.connections == 1


def test_client_that_closes_at_once(rigs, pair, way):
    """It sends and closes, with nothing to read: every byte arrives, then a clean end."""
    rig = rigs(*pair, **way)
    link = rig.link()
    data = payload(MEGABYTES)
    there = Incoming(link.target)
    rig.run(Outgoing(link.client, data, close), there)
    assert (there.data, there.end) == (data, "eof")
    close(link.target)
    assert rig.until_ended(link.id) == ("ended", MEGABYTES, 0)


def test_a_stream_becomes_a_dialogue_and_a_stream_again(rigs, pair, mode):
    """The relay adapts its way of moving bytes to the traffic, and loses none of them."""
    rig = rigs(*pair, **mode)
    link = rig.link()
    for turn in range(4):
        bulk = payload(1024 * 1024, turn)
        there = Incoming(link.target, limit=len(bulk))
        rig.run(Outgoing(link.client, bulk), there)
        assert there.data == bulk
        for word in range(8):
            rig.send(link.client, bytes([word]))
            assert rig.read(link.target, 1) == bytes([word])


@pytest.mark.parametrize("how", ["connect", "adopt"])
def test_client_speaks_before_the_target_is_connected(rigs, pair, way, how):
    """The bytes that it has sent, and its end, wait for the target."""
    rig = rigs(*pair, **way)
    data = payload(100_000)
    client, fd = rig.new_client()
    outgoing = Outgoing(client, data, half_close)
    outgoing.step()
    if how == "connect":
        rig.connect(fd)
    else:
        target = rig.relay.dial(rig.address)
        rig.until(lambda: any(fd == target for fd, _ in rig.ready()), "the connection")
        rig.relay.adopt(fd, client.family, target)
    there = Incoming(rig.accept_at_backend())
    rig.run(outgoing, there)
    assert (there.data, there.end) == (data, "eof")


def test_target_speaks_first(rigs, pair, way):
    """A greeting that the target sends at once is not missed."""
    rig = rigs(*pair, **way)
    link = rig.link()
    rig.send(link.target, b"220 ready\r\n")
    assert rig.read(link.client, 11) == b"220 ready\r\n"


def test_many_connections_do_not_mix(rigs, pair, way):
    """Thirty streams at once, each with its own bytes."""
    rig = rigs(*pair, **way)
    links = [rig.link() for _ in range(30)]
    data = [payload(200_000, number) for number in range(30)]
    theirs = [Incoming(link.target) for link in links]
    flows = [Outgoing(link.client, data[n], half_close) for n, link in enumerate(links)]
    rig.run(*flows, *theirs)
    assert [bytes(one.data) for one in theirs] == data
    assert {one.end for one in theirs} == {"eof"}


def test_a_bulk_stream_leaves_the_others_their_turn(rigs, pair, way):
    """A pump moves a limited amount per turn: alongside a bulk stream, a ping arrives soon."""
    rig = rigs(*pair, **way)
    bulk, small = rig.link(), rig.link()
    flood = Outgoing(bulk.client, payload(16 * 1024 * 1024))
    drain = Incoming(bulk.target)
    rig.send(small.client, b"ping")
    for _ in range(3):
        flood.step()
        drain.step()
        rig.turn()
    assert small.target.recv(16) == b"ping"
