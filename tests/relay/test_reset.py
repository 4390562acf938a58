"""Promise: a reset is passed on as a reset, once what could still be read has been delivered."""

import errno
import select

import pytest
from kit.socket_state import is_quiet, state_of, was_reset, write_error
from kit.sockets import is_unix, reset
from kit.stepped import Incoming, Outgoing, close, half_close
from kit.traffic import payload

SMALL = 60_000
"""Bytes that the sockets between sender and reader hold while nothing is read."""


def sides(link, which):
    """(the side named `which`, the other side)."""
    return (link.client, link.target) if which == "client" else (link.target, link.client)


def end_after_reset(broken, survivor):
    """How a reset of `broken` ends the stream to `survivor`. A UNIX socket knows only the full
    close, which arrives as a clean end."""
    return "eof" if is_unix(broken) or is_unix(survivor) else "reset"


@pytest.fixture(params=["client", "target"])
def breaker(request):
    """The side that resets."""
    return request.param


def test_reset_of_an_idle_connection(rigs, pair, way, breaker):
    rig = rigs(*pair, **way)
    link = rig.link()
    broken, survivor = sides(link, breaker)
    rig.settle()
    reset(broken)
    end = end_after_reset(broken, survivor)
    assert rig.read_to_end(survivor) == (b"", end)
    assert end == "eof" or write_error(survivor)
    close(survivor)
    rig.until_ended(link.id)


def test_reset_after_bytes_already_delivered(rigs, pair, way, breaker):
    rig = rigs(*pair, **way)
    link = rig.link()
    broken, survivor = sides(link, breaker)
    rig.send(broken, b"request")
    assert rig.read(survivor, 7) == b"request"
    rig.send(survivor, b"answer")
    assert rig.read(broken, 6) == b"answer"
    reset(broken)
    assert rig.read_to_end(survivor) == (b"", end_after_reset(broken, survivor))
    close(survivor)
    rig.until_ended(link.id)


def test_reset_right_after_bytes(rigs, pair, way, breaker):
    """The relay sees bytes and reset in one event: the bytes go first."""
    rig = rigs(*pair, **way)
    link = rig.link()
    broken, survivor = sides(link, breaker)
    rig.settle()
    data = payload(SMALL)
    sent = broken.send(data)
    reset(broken)
    assert rig.read_to_end(survivor) == (data[:sent], end_after_reset(broken, survivor))
    close(survivor)
    rig.until_ended(link.id)


def test_reset_waits_until_a_slow_reader_has_everything(rigs, pair, way, breaker):
    """No RST while bytes are queued towards the reader (SIOCOUTQ): it would discard them."""
    small = {"receive_buffer": 4096}
    rig = rigs(*pair, **way, client_buffers=small, target_buffers=small)
    link = rig.link()
    broken, survivor = sides(link, breaker)
    rig.settle()
    data = payload(SMALL)
    rig.send(broken, data)
    rig.settle()
    reset(broken)
    assert rig.is_calm()
    if not is_unix(survivor):
        assert not was_reset(survivor)
    assert rig.read_to_end(survivor) == (data, end_after_reset(broken, survivor))
    close(survivor)
    rig.until_ended(link.id)


def test_reset_in_mid_stream(rigs, pair, way, breaker):
    """The stream is cut off somewhere, but nothing before that is changed or left out."""
    rig = rigs(*pair, **way)
    link = rig.link()
    broken, survivor = sides(link, breaker)
    data = payload(3 * 1024 * 1024)
    there = Incoming(survivor, limit=1_000_000)
    stream = Outgoing(broken, data)
    rig.until(lambda: (stream.step(), there.step(), there.done)[2], "a million bytes")
    reset(broken)
    there.limit = 1 << 40
    rig.run(there)
    assert data.startswith(bytes(there.data))
    assert there.end == end_after_reset(broken, survivor)
    close(survivor)
    rig.until_ended(link.id)


def test_end_and_reset_at_once(rigs, pair, way, breaker):
    """FIN and RST have both arrived before the relay looks: the bytes go first."""
    rig = rigs(*pair, **way)
    link = rig.link()
    broken, survivor = sides(link, breaker)
    rig.settle()
    data = payload(SMALL)
    sent = broken.send(data)
    half_close(broken)
    reset(broken)
    received, end = rig.read_to_end(survivor)
    assert received == data[:sent]
    assert end in ("eof", "reset")
    close(survivor)
    rig.until_ended(link.id)


def test_close_with_unread_input(rigs, pair, way, breaker):
    """Closing with unread input resets the connection; on UNIX it is ECONNRESET as well."""
    rig = rigs(*pair, **way)
    link = rig.link()
    broken, survivor = sides(link, breaker)
    rig.send(broken, b"last words")
    rig.send(survivor, b"never read")
    rig.until(lambda: not is_quiet(broken), "bytes that stay unread")
    close(broken)
    end = "eof" if is_unix(survivor) else "reset"
    assert rig.read_to_end(survivor) == (b"last words", end)
    close(survivor)
    rig.until_ended(link.id)


def test_reset_of_one_disturbs_no_other(rigs, pair, way, breaker):
    """Half of the connections are reset in one batch of events; the others continue."""
    rig = rigs(*pair, **way)
    links = [rig.link() for _ in range(20)]
    rig.settle()
    for number, link in enumerate(links):
        broken, survivor = sides(link, breaker)
        if number % 2:
            reset(broken)
            half_close(survivor)
        else:
            broken.send(b"hello")
    for link in links[::2]:
        broken, survivor = sides(link, breaker)
        assert rig.read(survivor, 5) == b"hello"
        rig.send(survivor, b"world")
        assert rig.read(broken, 5) == b"world"
    for link in links[1::2]:
        close(sides(link, breaker)[1])
    rig.until(lambda: rig.relay.connections == 10, "the end of the others")


def test_both_sides_reset(rigs, pair, way):
    rig = rigs(*pair, **way)
    link = rig.link()
    rig.settle()
    reset(link.client)
    reset(link.target)
    how, _, _ = rig.until_ended(link.id)
    assert how in ("reset", "ended")
    assert rig.relay.connections == 0


def test_paused_side_that_resets(rigs, pair, way):
    """A side that the relay does not read, since its peer is stuck, resets: no busy loop."""
    small = {"receive_buffer": 4096}
    rig = rigs(*pair, **way, target_buffers=small)
    link = rig.link()
    sent = rig.fill(link.client)
    reset(link.client)
    assert rig.is_calm()
    received, end = rig.read_to_end(link.target)
    assert 0 < len(received) <= sent
    assert end == end_after_reset(link.client, link.target)
    close(link.target)
    rig.until_ended(link.id)


def test_reset_reaches_a_stuck_writer(rigs, pair, way, breaker):
    rig = rigs(*pair, **way)
    link = rig.link()
    broken, survivor = sides(link, breaker)
    rig.fill(survivor)
    reset(broken)
    rig.until(lambda: state_of(survivor) & (select.POLLERR | select.POLLHUP), "the reset")
    assert write_error(survivor) in (errno.ECONNRESET, errno.EPIPE)
    close(survivor)
    rig.until_ended(link.id)
