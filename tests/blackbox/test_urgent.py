"""An urgent (out-of-band) byte is delivered in its place in the stream."""

import socket

import pytest
from kit.differences import differs
from kit.sockets import TCP, read_exactly, read_to_end, send_until_stuck, stuck_bytes
from kit.traffic import Payload

pytestmark = differs(
    "original", reason="takes an urgent byte for the end of the stream and loses the rest"
)

from_tcp = pytest.mark.parametrize(
    ("listen", "target"), [(a, b) for a in TCP for b in ("tcp4", "unix")]
)


@from_tcp
def test_urgent_byte_first(stage, listen, target):
    """The very first byte may be urgent."""
    client, server = stage.pair(listen, target)
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b"rest")
    assert read_exactly(server, 5) == b"!rest"


@from_tcp
def test_urgent_byte_alone(stage, listen, target):
    """An urgent byte with nothing after it does not wait for more, and costs no CPU."""
    client, server = stage.pair(listen, target)
    client.send(b"!", socket.MSG_OOB)
    assert read_exactly(server, 1) == b"!"
    assert stage.proxy.cpu_share(0.3) < 0.2


@from_tcp
def test_urgent_byte_last(stage, listen, target):
    """An urgent byte right before the end arrives before the end."""
    client, server = stage.pair(listen, target)
    client.sendall(b"rest")
    client.send(b"!", socket.MSG_OOB)
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(server) == (b"rest!", "eof")


@from_tcp
def test_many_urgent_bytes(stage, listen, target):
    """One urgent byte after each of two hundred lines: later marks do not swallow earlier ones."""
    client, server = stage.pair(listen, target)
    whole = b""
    for number in range(200):
        line = b"line %d" % number
        client.sendall(line)
        client.send(b"!", socket.MSG_OOB)
        whole += line + b"!"
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(server) == (whole, "eof")


@from_tcp
def test_urgent_byte_in_bulk(stage, listen, target):
    """Urgent bytes between megabytes, which the program forwards in bulk."""
    client, server = stage.pair(listen, target)
    block = Payload(300_000).bytes()
    whole = b""
    for _ in range(4):
        client.sendall(block)
        client.send(b"!", socket.MSG_OOB)
        whole += block + b"!"
        assert read_exactly(server, len(block) + 1) == block + b"!"


@from_tcp
def test_urgent_byte_behind_a_stalled_reader(stage, listen, target):
    """An urgent byte in a stream that is stuck costs no CPU and arrives in its place."""
    client, server = stage.pair(listen, target, listen_buffer=65536, target_buffer=65536)
    segment = Payload(1 << 20).bytes()
    sent = send_until_stuck(client, segment, still=0.1)
    client.setblocking(False)
    try:
        urgent = client.send(b"!", socket.MSG_OOB)
    except BlockingIOError:
        urgent = 0  # no room for it until the reader has read
    assert stage.proxy.cpu_share() < 0.2
    assert read_exactly(server, sent) == stuck_bytes(segment, sent)
    if not urgent:
        client.send(b"!", socket.MSG_OOB)
    assert read_exactly(server, 1) == b"!"
