"""Promise: when a side can no longer be written to, what it had already sent is still delivered."""

import time

import pytest
from kit.socket_state import unacknowledged, unread, was_reset, write_error
from kit.sockets import reset
from kit.stepped import TINY_BUFFER, Incoming, Outgoing, close, half_close, send_once
from kit.traffic import payload

VERDICT = b"HTTP/1.1 413 Content Too Large\r\n\r\n"


def test_server_rejects_an_upload_and_closes(rigs, pair, way):
    """The client is still sending; the server sent its answer before it closed."""
    rig = rigs(*pair, **way)
    link = rig.link()
    rig.fill(link.client)
    link.target.send(VERDICT)
    close(link.target)
    received, _ = rig.read_to_end(link.client)
    assert received == VERDICT
    rig.until(lambda: write_error(link.client), "a write that fails")
    rig.until_ended(link.id)


def test_server_has_rejected_before_the_relay_looks(rigs, pair, way):
    """Answer and close are waiting while the relay still has bytes to write."""
    rig = rigs(*pair, **way)
    link = rig.link()
    rig.send(link.client, b"POST / HTTP/1.1\r\n")
    rig.until(lambda: unread(link.target) > 0, "the request")
    send_once(link.client, b"x" * 100_000)
    link.target.send(VERDICT)
    close(link.target)
    received, _ = rig.read_to_end(link.client)
    assert received == VERDICT


def test_long_last_words_for_a_slow_reader(rigs, way):
    """The close of a UNIX server loses nothing that it has sent, however slowly it is read."""
    rig = rigs("tcp4", "unix", **way, client_buffers={"receive_buffer": 4096})
    link = rig.link()
    sent = rig.fill(link.target)
    close(link.target)
    assert rig.is_calm()
    received, _ = rig.read_to_end(link.client)
    assert len(received) == sent


def test_client_that_reads_after_the_server_is_gone(rigs, pair, way):
    """A clean end in one direction, then the server has closed: the rest can still be read."""
    rig = rigs(*pair, **way)
    link = rig.link()
    data = payload(150_000)
    rig.send(link.target, data)
    close(link.target)
    rig.settle()
    assert rig.read_to_end(link.client) == (data, "eof")
    half_close(link.client)
    assert rig.until_ended(link.id)[0] == "ended"


def test_reader_that_only_stops_reading(rigs, way):
    """SHUT_RD of a UNIX server makes writes fail; what it sends later is still delivered."""
    rig = rigs("unix", "unix", **way)
    link = rig.link()
    link.target.shutdown(0)
    rig.send(link.client, b"nobody listens")
    rig.settle()
    for _ in range(3):
        rig.send(link.target, VERDICT)
        assert rig.read(link.client, len(VERDICT)) == VERDICT
    close(link.target)
    assert rig.read_to_end(link.client)[0] == b""


def test_last_words_both_ways(rigs, pair, way):
    """Each side sends and half-closes without reading: the two streams are independent."""
    rig = rigs(*pair, **way)
    link = rig.link()
    rig.settle()
    link.client.send(b"from the client")
    half_close(link.client)
    link.target.send(b"from the target")
    half_close(link.target)
    assert rig.read_to_end(link.target) == (b"from the client", "eof")
    assert rig.read_to_end(link.client) == (b"from the target", "eof")
    assert rig.until_ended(link.id) == ("ended", 15, 15)


@pytest.mark.parametrize("size", [50_000, 500_000])
def test_client_that_reads_only_after_its_upload(rigs, way, size):
    """The answer and the reset behind it wait for the client, and its upload is taken meanwhile."""
    buffers = {"receive_buffer": TINY_BUFFER, "send_buffer": 16384}
    rig = rigs("tcp4", "tcp4", **way, client_buffers=buffers)
    link = rig.link()
    answer = payload(size)
    rig.send(link.target, answer)
    rig.until(lambda: not unacknowledged(link.target.fileno()), "the relay to have all of it")
    reset(link.target)
    rig.settle()
    rig.run(Outgoing(link.client, b"x" * 500_000), what="the upload")
    assert rig.read_to_end(link.client) == (answer, "reset")
    assert rig.until_ended(link.id)[0] == "reset"


GONE_WITHIN = 20
"""One of this many sends, a millisecond apart, must fail. On a direct connection the second one
does; if the relay waited for a second, hundreds would succeed."""


def sends_into_nothing(rig, side):
    """The number of sends of `side` until one fails."""
    for count in range(GONE_WITHIN):
        if write_error(side):
            return count
        rig.turn(1)
        rig.settle()
        time.sleep(0.001)
    return GONE_WITHIN


@pytest.mark.parametrize("leaver", ["client", "target"])
@pytest.mark.parametrize("how", [close, reset])
def test_sends_to_a_side_that_is_gone_soon_fail(rigs, pair, way, leaver, how):
    """It had half-closed before it left; what it had sent stays readable."""
    rig = rigs(*pair, **way)
    link = rig.link()
    gone, survivor = (
        (link.client, link.target) if leaver == "client" else (link.target, link.client)
    )
    rig.send(gone, VERDICT)
    rig.until(lambda: unread(survivor) == len(VERDICT), "the last words")
    half_close(gone)
    rig.settle()
    how(gone)
    assert sends_into_nothing(rig, survivor) < GONE_WITHIN
    assert rig.read_to_end(survivor) == (VERDICT, "eof")
    rig.until_ended(link.id)


@pytest.mark.parametrize("leaver", ["client", "target"])
def test_reset_after_a_clean_end_is_passed_on_without_a_send(rigs, way, leaver):
    """The survivor is reset as soon as it has everything, although it sends nothing."""
    rig = rigs("tcp4", "tcp4", **way)
    link = rig.link()
    broken, survivor = (
        (link.client, link.target) if leaver == "client" else (link.target, link.client)
    )
    half_close(broken)
    assert rig.read_to_end(survivor) == (b"", "eof")
    reset(broken)
    looks = 0
    while not was_reset(survivor):
        looks += 1
        assert looks < GONE_WITHIN
        rig.turn(1)
    assert rig.until_ended(link.id)[0] == "reset"


@pytest.mark.parametrize("size", [300_000, 3_000_000])
@pytest.mark.parametrize("how", [close, reset])
def test_slow_reader_gets_everything_after_a_clean_end(rigs, pair, way, size, how):
    """The queues towards it are kept, whatever happens to the side that has sent its end."""
    rig = rigs(*pair, **way, target_buffers={"receive_buffer": TINY_BUFFER})
    link = rig.link()
    data = payload(size)
    words = Outgoing(link.client, data, half_close)
    heard = Incoming(link.target, unit=10_000)
    rig.until(lambda: (words.step(), heard.step(), words.done)[2], "the sending")
    rig.settle()
    if how is reset:  # not before the relay has passed the end on: it would pass on the reset

        def all_forwarded():
            heard.step()
            return rig.totals().bytes_to_targets == size

        rig.until(all_forwarded, "the last byte")
        rig.settle()
    how(link.client)
    rig.run(heard)
    assert (bytes(heard.data), heard.end) == (data, "eof")
