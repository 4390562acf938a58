"""Which clients begin with a PROXY header, and where they count."""

import socket

import pytest
from kit.rig import FAMILIES
from kit.stepped import open_client

from proxyd._relay import Accepted, Refused, RelayListener, socket_names

V4 = bytes([127, 0, 0, 1])


def pack(host):
    """An address with no port, packed."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        name = socket_names(probe.fileno())[1]
    raw = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    return name[:4] + raw + name[8:] if len(raw) == 4 else name[:8] + raw + name[24:]


def accept_from(rig, host):
    """The event of a client with this address, which the policy gets."""
    sock = rig.keep(socket.socket(FAMILIES[rig.client_family]))
    sock.setblocking(False)
    sock.bind((host, 0))
    sock.connect_ex(rig.listen_socket.getsockname())
    count = len(rig.of_kind(Accepted)) + 1
    rig.until(lambda: len(rig.of_kind(Accepted)) == count, "the client")
    return rig.of_kind(Accepted)[-1]


@pytest.mark.parametrize(
    ("network", "bits", "host", "sends"),
    [
        ("127.0.0.1", 32, "127.0.0.1", True),
        ("127.0.0.1", 32, "127.0.0.2", False),
        ("127.0.0.0", 8, "127.255.3.2", True),
        ("0.0.0.0", 0, "127.0.0.1", True),
        ("127.0.2.0", 23, "127.0.3.255", True),
        ("127.0.2.0", 23, "127.0.4.0", False),
        ("128.0.0.0", 1, "127.0.0.1", False),
        ("::", 0, "127.0.0.1", False),
    ],
)
def test_networks(rigs, network, bits, host, sends):
    rig = rigs()
    raw = socket.inet_pton(socket.AF_INET6 if ":" in network else socket.AF_INET, network)
    rig.relay.expect_headers([(raw, bits)], False)
    assert rig.relay.expects_header(pack(host)) == sends
    assert accept_from(rig, host).sends_header == sends


def test_without_networks_no_client_sends_one(rigs):
    rig = rigs()
    assert not rig.relay.expects_header(pack("127.0.0.1"))
    assert not accept_from(rig, "127.0.0.1").sends_header
    rig.relay.expect_headers([], False)
    assert not accept_from(rig, "127.0.0.1").sends_header


def test_ipv6(rigs):
    rig = rigs("tcp6", "tcp6")
    rig.relay.expect_headers([(bytes(15) + b"\1", 128), (V4, 32)], False)
    assert accept_from(rig, "::1").sends_header
    for host, sends in (("::1", True), ("::2", False), ("::ffff:127.0.0.1", True)):
        assert rig.relay.expects_header(pack(host)) == sends


def test_an_ipv4_client_of_an_ipv6_listener(rigs):
    rig = rigs()
    rig.relay.expect_headers([(V4, 32)], False)
    dual = rig.keep(socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True))
    dual.setblocking(False)
    listener = RelayListener(rig.relay, dual.fileno(), socket.AF_INET6, 0, 1)
    listener.start()
    rig.keep(socket.create_connection(("127.0.0.1", dual.getsockname()[1])))
    rig.until(lambda: rig.of_kind(Accepted), "the client")
    assert rig.of_kind(Accepted)[0].sends_header
    listener.stop()


@pytest.mark.parametrize("wanted", [True, False])
def test_unix_clients(rigs, wanted):
    rig = rigs("unix", "tcp4")
    rig.relay.expect_headers([(bytes(4), 0), (bytes(16), 0)], wanted)
    rig.keep(open_client(rig.listen_socket))
    rig.until(lambda: rig.of_kind(Accepted), "the client")
    assert rig.of_kind(Accepted)[0].sends_header == wanted


def test_others_are_connected_as_before(rigs):
    rig = rigs()
    rig.relay.expect_headers([(V4, 32)], False)
    rig.listener.auto_connect(rig.address)
    assert accept_from(rig, "127.0.0.1").sends_header
    sock = rig.keep(socket.socket())
    sock.bind(("127.0.0.2", 0))
    sock.connect(rig.listen_socket.getsockname())
    rig.accept_at_backend()


@pytest.mark.parametrize("bad", [(b"123", 8), (V4, 33), (V4, -1), (bytes(16), 129)])
def test_what_is_no_network(rigs, bad):
    with pytest.raises(ValueError, match="no such network"):
        rigs().relay.expect_headers([bad], False)


# ── where they count ─────────────────────────────────────────────────────────────────────────────


def test_only_the_client_in_the_header_counts(rigs):
    rig = rigs()
    rig.relay.connections_max = 64
    rig.relay.limit_sources(1)
    rig.relay.expect_headers([(V4, 32)], False)
    first, second, third = (accept_from(rig, "127.0.0.1").client for _ in range(3))
    assert not rig.of_kind(Refused)
    assert rig.relay.count_source(first, pack("192.0.2.1"))
    assert not rig.relay.count_source(second, pack("192.0.2.1"))
    assert rig.relay.count_source(second, pack("192.0.2.2"))
    assert rig.relay.refused_by_source == 1
    # A UNIX address tells nothing of the user; the name of nobody, either.
    assert rig.relay.count_source(third, b"\1\0/run/x\0")
    assert rig.relay.count_source(third, b"")
    rig.events = [one for one in rig.events if getattr(one, "client", -1) != first]
    rig.relay.hang_up(first)
    assert rig.relay.count_source(third, pack("192.0.2.1"))


def test_without_a_limit_of_sources_all_are_let_in(rigs):
    rig = rigs()
    rig.relay.expect_headers([(V4, 32)], False)
    client = accept_from(rig, "127.0.0.1").client
    assert all(rig.relay.count_source(client, pack("192.0.2.1")) for _ in range(3))


def test_a_real_client_of_the_same_address_shares_its_places(rigs):
    rig = rigs()
    rig.relay.connections_max = 64
    rig.relay.limit_sources(1)
    rig.relay.expect_headers([(V4, 32)], False)
    sender = accept_from(rig, "127.0.0.1").client
    assert rig.relay.count_source(sender, pack("127.0.0.2"))
    sock = rig.keep(socket.socket())
    sock.setblocking(False)
    sock.bind(("127.0.0.2", 0))
    sock.connect_ex(rig.listen_socket.getsockname())
    rig.until(lambda: rig.of_kind(Refused), "the refusal")
    assert rig.of_kind(Refused)[0].by_source
