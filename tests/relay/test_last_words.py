"""Promise: when a side cannot be written any more, what it had already sent is still delivered."""

import pytest
from relaykit.rig import payload
from relaykit.sockets import (
    RELUCTANT,
    Outgoing,
    close,
    half_close,
    reset,
    send_once,
    unacknowledged,
    unread,
    write_error,
)

VERDICT = b"HTTP/1.1 413 Content Too Large\r\n\r\n"


def test_server_rejects_an_upload_and_closes(rigs, pair, way):
    """The client is still sending; the answer to it was sent before the server closed."""
    rig = rigs(*pair, **way)
    link = rig.link()
    rig.stuff(link.client)
    link.target.send(VERDICT)
    close(link.target)
    received, _ = rig.read_to_end(link.client)
    assert received == VERDICT
    rig.until(lambda: write_error(link.client), "a write that fails")
    rig.until_ended(link.id)


def test_server_rejects_before_the_relay_hears_of_it(rigs, pair, way):
    """Answer and close lie there when the relay still has bytes to write."""
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
    """A UNIX server's close loses nothing that it has sent, however slowly it is read."""
    rig = rigs("tcp4", "unix", **way, client_buffers={"receive_buffer": 4096})
    link = rig.link()
    sent = rig.stuff(link.target)
    close(link.target)
    assert rig.is_calm()
    received, _ = rig.read_to_end(link.client)
    assert len(received) == sent


def test_client_that_reads_after_the_server_is_gone(rigs, pair, way):
    """A clean end in one direction, the peer wholly gone: the rest is still read in peace."""
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
    """SHUT_RD of a UNIX server makes writes fail; what it goes on to say is still delivered."""
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
    """Each side sends and closes without reading: each stream is its own affair."""
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
    """The answer and the reset behind it wait for such a client; its upload is taken meanwhile."""
    buffers = {"receive_buffer": RELUCTANT, "send_buffer": 16384}
    rig = rigs("tcp4", "tcp4", **way, client_buffers=buffers)
    link = rig.link()
    answer = payload(size)
    rig.send(link.target, answer)
    rig.until(lambda: not unacknowledged(link.target.fileno()), "all of it with the relay")
    reset(link.target)
    rig.settle()
    rig.run(Outgoing(link.client, b"x" * 500_000), what="the upload")
    assert rig.read_to_end(link.client) == (answer, "reset")
    assert rig.until_ended(link.id)[0] == "reset"


def test_drained_side_is_not_reset_while_it_goes_on_sending(rigs, way):
    """Closing with input unread would reset the client and might take the answer from it."""
    rig = rigs("tcp4", "unix", **way)
    link = rig.link()
    rig.send(link.target, VERDICT)
    close(link.target)
    rig.settle()
    for _ in range(5):
        assert send_once(link.client, b"x" * 1000)
        rig.settle()
    assert rig.read_to_end(link.client) == (VERDICT, "eof")
    half_close(link.client)
    assert rig.until_ended(link.id)[0] == "ended"
