"""PROXY v2 before each datagram, as HAProxy's specification has it."""

import socket
import struct

import pytest
from kit.datagram_rig import send_segmented

from proxyd._datagram import DROP_TOO_LARGE

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def header_of(client, address, port):
    """The header that announces this client, which has sent to `address`."""
    source, source_port = client.getsockname()[:2]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    body = socket.inet_pton(family, source) + socket.inet_pton(family, address)
    body += struct.pack("!HH", source_port, port)
    kind = 0x22 if family == socket.AF_INET6 else 0x12
    return SIGNATURE + bytes([0x21, kind]) + struct.pack("!H", len(body)) + body


@pytest.mark.parametrize(
    ("listen", "host", "address"),
    [
        ("udp4", "127.0.0.1", "127.0.0.1"),
        ("udp4", "0.0.0.0", "127.0.0.2"),
        ("udp6", "::1", "::1"),
        ("dual", "::", "::1"),
        ("dual", "::", "127.0.0.4"),
    ],
)
@pytest.mark.parametrize("target", ["udp4", "unix"])
def test_each_datagram_has_a_header(datagram_rigs, listen, host, address, target):
    rig = datagram_rigs(listen, target, host=host, proxy=True)
    client = rig.client(address)
    header = header_of(client, address, rig.listen_socket.getsockname()[1])
    for data in (b"one", b"", b"three"):
        client.send(data)
        ((found, sender),) = rig.received()
        assert found == header + data
        rig.server.sendto(b"answer to " + data, sender)
        assert rig.replies(client) == [b"answer to " + data]
    totals = rig.datagrams.totals()
    assert (totals.datagrams_to_targets, totals.bytes_to_targets) == (3, 8)


@pytest.mark.parametrize(("size", "segment"), [(5000, 1000), (50_000, 800), (4500, 1000)])
def test_each_segment_has_a_header(datagram_rigs, size, segment):
    rig = datagram_rigs(proxy=True)
    client = rig.client()
    header = header_of(client, "127.0.0.1", rig.listen_socket.getsockname()[1])
    data = bytes(range(250)) * (size // 250)
    for _ in range(2):
        send_segmented(client, data, segment)
        parts = [header + data[i : i + segment] for i in range(0, size, segment)]
        assert [found for found, _ in rig.received(len(parts))] == parts
    totals = rig.datagrams.totals()
    assert (totals.datagrams_to_targets, totals.bytes_to_targets) == (2 * len(parts), 2 * size)


def test_a_unix_client_has_no_address_to_tell(datagram_rigs):
    rig = datagram_rigs("unix", "udp4", proxy=True)
    rig.client().send(b"data")
    assert rig.received()[0][0] == SIGNATURE + b"\x20\0\0\0" + b"data"


def test_what_becomes_too_large_is_dropped(datagram_rigs):
    rig = datagram_rigs(proxy=True)
    client = rig.client()
    for size in (65507, 65507 - 27, 65507 - 28):
        client.send(bytes(size))
    assert [len(found) for found, _ in rig.received()] == [65507]
    assert rig.dropped() == {DROP_TOO_LARGE: 2}
    client.send(b"small")
    rig.received()
