"""What sockets to targets are bound to: an address, an interface, the client's address."""

import errno
import os
import socket
import struct

import pytest
from kit.child import in_child
from kit.namespaces import in_own_network
from kit.rig import open_fds
from kit.socket_state import option

from proxyd._datagram import FlowFailed
from proxyd._relay import ConnectFailed, socket_names
from proxyd.address import pack_inet, pack_unix

OTHER = pack_inet("127.0.0.9", 0)
IP_BIND_ADDRESS_NO_PORT, SO_BINDTODEVICE = 24, 25
LOOPBACK = {"tcp4": OTHER, "tcp6": pack_inet("::1", 0)}


def peer_of(rig):
    """The address from which the next connection comes to the backend."""
    return rig.accept_at_backend().getpeername()[:2]


# ── streams ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", ["tcp4", "tcp6"])
def test_connect_dial_and_accepted_clients(rigs, target):
    rig = rigs("tcp4", target)
    rig.relay.bind_outgoing(LOOPBACK["tcp4"], LOOPBACK["tcp6"])
    host = {"tcp4": "127.0.0.9", "tcp6": "::1"}[target]
    _, fd = rig.new_client()
    rig.connect(fd)
    assert peer_of(rig)[0] == host
    dialled = rig.relay.dial(rig.address)
    assert peer_of(rig)[0] == host
    assert option(dialled, socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT) == 1
    rig.relay.hang_up(dialled)
    rig.listener.auto_connect(rig.address)
    rig.keep(socket.create_connection(rig.listen_socket.getsockname()))
    assert peer_of(rig)[0] == host


def test_a_unix_target_is_not_bound(rigs):
    rig = rigs("tcp4", "unix")
    rig.relay.bind_outgoing(OTHER, b"", b"no-interface")
    _, fd = rig.new_client()
    assert not isinstance(rig.connect(fd), ConnectFailed)


@pytest.mark.parametrize("client", [False, True])
def test_no_address_of_the_family(rigs, client):
    """It is refused, and nothing goes out from another address."""
    rig = rigs("unix", "tcp4")
    rig.relay.bind_outgoing(b"", b"" if client else LOOPBACK["tcp6"], b"", client)
    _, fd = rig.new_client()
    fds = open_fds()
    for peer in (b"", pack_unix("/run/x"), pack_inet("::1", 80)):
        failed = rig.connect(fd, peer=peer)
        assert isinstance(failed, ConnectFailed)
        assert failed.error == errno.EAFNOSUPPORT
        with pytest.raises(OSError, match=".") as caught:
            rig.relay.dial(rig.address, peer)
        assert caught.value.errno == errno.EAFNOSUPPORT
    assert open_fds() == fds
    os.close(fd)


def test_a_port(rigs):
    rig = rigs()
    with socket.create_server(("127.0.0.9", 0)) as free:
        port = free.getsockname()[1]
    rig.relay.bind_outgoing(pack_inet("127.0.0.9", port))
    first = rig.relay.dial(rig.address)
    assert peer_of(rig) == ("127.0.0.9", port)
    with pytest.raises(OSError, match=".") as caught:
        rig.relay.dial(rig.address)
    assert caught.value.errno == errno.EADDRNOTAVAIL
    rig.relay.hang_up(first, reset=True)
    rig.relay.hang_up(rig.relay.dial(rig.address))


def test_an_interface(rigs):
    rig = rigs()
    rig.relay.bind_outgoing(b"", b"", b"lo")
    dialled = rig.relay.dial(rig.address)
    sock = socket.socket(fileno=os.dup(dialled))
    assert sock.getsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, 16).rstrip(b"\0") == b"lo"
    sock.close()
    rig.relay.hang_up(dialled)
    rig.relay.bind_outgoing(b"", b"", b"no-interface")
    with pytest.raises(OSError, match=".") as caught:
        rig.relay.dial(rig.address)
    assert caught.value.errno == errno.ENODEV


@pytest.mark.parametrize(
    "arguments", [(bytes(117),), (b"", bytes(117)), (b"", b"", b"sixteen-letters-")]
)
def test_what_does_not_fit(rigs, arguments):
    with pytest.raises(ValueError, match="too long"):
        rigs().relay.bind_outgoing(*arguments)


@pytest.mark.parametrize("mapped", [False, True])
def test_the_address_of_the_client(rigs, mapped):
    """Without its port, and IPv4-mapped as IPv4; also one that is not this machine's."""

    @in_own_network
    def work():
        rig = rigs()
        rig.relay.bind_outgoing(b"", b"", b"", True)
        peer = pack_inet("127.0.0.77", 4321)
        if mapped:
            peer = pack_inet("::ffff:127.0.0.77", 4321)
        _, fd = rig.new_client()
        assert not isinstance(rig.connect(fd, peer=peer), ConnectFailed)
        host, port = peer_of(rig)
        assert host == "127.0.0.77"
        assert port != 4321
        rig.relay.hang_up(rig.relay.dial(rig.address, peer))
        assert peer_of(rig)[0] == "127.0.0.77"
        foreign = rig.relay.dial(rig.address, pack_inet("192.0.2.1", 4321))  # its answers get lost
        assert socket_names(foreign)[1][:2] + socket_names(foreign)[1][4:8] == (
            struct.pack("=H4s", socket.AF_INET, bytes([192, 0, 2, 1]))
        )
        rig.relay.hang_up(foreign)

    in_child(work)


# ── datagrams ────────────────────────────────────────────────────────────────────────────────────


def test_a_flow_and_the_next_one_with_its_socket(datagram_rigs):
    rig = datagram_rigs(host="127.0.0.1")
    rig.relay.bind_outgoing(OTHER)
    for _ in range(2):
        assert rig.ask(rig.client())[0] == "127.0.0.9"
        for row in rig.datagrams.rows():
            rig.datagrams.terminate(row.flow)


def test_no_address_of_a_flows_family(datagram_rigs):
    """Its datagrams are dropped; the target is not taken to be down."""
    rig = datagram_rigs()
    rig.relay.bind_outgoing(b"", LOOPBACK["tcp6"])
    rig.send(rig.client(), b"lost")
    rig.until(lambda: rig.of_kind(FlowFailed), "a flow that has failed")
    assert rig.of_kind(FlowFailed)[0].error == errno.EAFNOSUPPORT
    assert rig.target.state == "doubt"
    assert rig.target.held == 0


def test_flows_of_clients_share_no_socket(datagram_rigs):
    """One that has ended leaves none, since the next client has another address."""

    @in_own_network
    def work():
        rig = datagram_rigs()
        rig.relay.bind_outgoing(b"", b"", b"", True)
        for host in ("127.0.0.77", "127.0.0.78", "127.0.0.77"):
            client = rig.client(source=host)
            assert rig.ask(client)[0] == host
            fds = open_fds()
            (row,) = rig.datagrams.rows()
            rig.datagrams.terminate(row.flow)
            assert len(open_fds()) == len(fds) - 1

    in_child(work)
