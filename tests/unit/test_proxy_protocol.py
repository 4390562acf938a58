"""PROXY headers of real sockets, byte for byte as proxy-protocol.txt defines them."""

import os
import socket
import struct

import pytest
from kit.sockets import reset

from proxyd._relay import socket_names
from proxyd.proxy_protocol import UnknownAddressError, header

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")


@pytest.fixture
def accepted(tmp_path):
    """Connect to a listener; return the client's socket and the accepted one."""
    opened = []

    def make(listen_kind, listen_to, connect_kind=None, connect_to=None, bind_to=None):
        listener = socket.socket(listen_kind)
        opened.append(listener)
        if listen_kind == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            listener.bind(listen_to)
        except OSError as error:
            pytest.skip(f"SKIPPED LOUDLY: cannot listen on {listen_to}: {error}")
        listener.listen()
        client = socket.socket(connect_kind or listen_kind)
        opened.append(client)
        if bind_to is not None:
            client.bind(bind_to)
        name = listener.getsockname()
        client.connect((connect_to, name[1]) if connect_to else name)
        served, _ = listener.accept()
        opened.append(served)
        return client, served

    yield make
    for one in opened:
        one.close()


def ports(client):
    return client.getsockname()[1], client.getpeername()[1]


def peer_of(served):
    return socket_names(served.fileno())[0]


def header_of(version, served):
    return header(version, served.fileno(), peer_of(served))


def test_tcp4(accepted):
    client, served = accepted(socket.AF_INET, ("127.0.0.1", 0), bind_to=("127.0.0.2", 0))
    theirs, ours = ports(client)
    assert header_of(1, served) == b"PROXY TCP4 127.0.0.2 127.0.0.1 %d %d\r\n" % (theirs, ours)
    assert header_of(2, served) == (
        SIGNATURE
        + b"\x21\x11\x00\x0c"
        + bytes([127, 0, 0, 2, 127, 0, 0, 1])
        + struct.pack(">HH", theirs, ours)
    )


def test_tcp6(accepted):
    client, served = accepted(socket.AF_INET6, ("::1", 0))
    theirs, ours = ports(client)
    assert header_of(1, served) == b"PROXY TCP6 ::1 ::1 %d %d\r\n" % (theirs, ours)
    assert header_of(2, served) == (
        SIGNATURE
        + b"\x21\x21\x00\x24"
        + (bytes(15) + b"\x01") * 2
        + struct.pack(">HH", theirs, ours)
    )


def test_mapped_addresses_are_ipv4(accepted):
    client, served = accepted(
        socket.AF_INET6, ("::", 0), socket.AF_INET, "127.0.0.1", bind_to=("127.0.0.3", 0)
    )
    assert served.getpeername()[0] == "::ffff:127.0.0.3"
    theirs, ours = ports(client)
    assert header_of(1, served) == b"PROXY TCP4 127.0.0.3 127.0.0.1 %d %d\r\n" % (theirs, ours)
    assert header_of(2, served) == (
        SIGNATURE
        + b"\x21\x11\x00\x0c"
        + bytes([127, 0, 0, 3, 127, 0, 0, 1])
        + struct.pack(">HH", theirs, ours)
    )


def assert_unknown(fd):
    for peer in (socket_names(fd)[0], b""):
        assert header(1, fd, peer) == b"PROXY UNKNOWN\r\n"
        assert header(2, fd, peer) == SIGNATURE + b"\x20\x00\x00\x00"


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("abstract", [False, True])
def test_unix_clients_are_unknown(accepted, tmp_path, bound, abstract):
    path = f"\0test{os.getpid()}" if abstract else str(tmp_path / "listener")
    bind_to = str(tmp_path / "client") if bound else None
    _, served = accepted(socket.AF_UNIX, path, bind_to=bind_to)
    assert_unknown(served.fileno())


def test_a_socket_pair():
    one, other = socket.socketpair()
    with one, other:
        assert_unknown(one.fileno())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("listen", "connect"),
    [
        ((socket.AF_INET, ("127.0.0.1", 0)), ()),
        ((socket.AF_INET6, ("::1", 0)), ()),
        ((socket.AF_INET6, ("::", 0)), (socket.AF_INET, "127.0.0.1")),
    ],
)
def test_a_client_that_has_reset_already(accepted, listen, connect, version):
    """The address from accept(2) is still known, and so is our own."""
    client, served = accepted(*listen, *connect)
    peer = peer_of(served)
    expected = header(version, served.fileno(), peer)
    reset(client)
    with pytest.raises(ConnectionResetError):
        served.recv(1)
    assert peer_of(served) == b""
    assert header(version, served.fileno(), peer) == expected
    assert b"UNKNOWN" not in expected
    # Without an address it must not be announced as a connection of the proxy itself.
    with pytest.raises(UnknownAddressError):
        header(version, served.fileno(), b"")


def test_a_file_has_no_address():
    with open("/dev/null") as file, pytest.raises(UnknownAddressError):
        header(1, file.fileno(), b"")


def test_v1_fits_the_buffer_of_the_specification(accepted):
    """107 characters at most, section 2.1."""
    _, served = accepted(socket.AF_INET6, ("::1", 0))
    assert len(header_of(1, served)) <= 107
