"""--source=: what may be given, what could never work, and the words for what has failed."""

import errno

import pytest

from proxyd import options as options_module
from proxyd import source_setup
from proxyd.address import AF_INET, AF_INET6, pack_inet, pack_unix
from proxyd.errors import UsageError
from proxyd.listen import Listener
from proxyd.options import Options
from proxyd.source_address import SourceAddress
from proxyd.source_setup import use_source
from proxyd.target import parse_target

EXPECTED = "expected an address, ADDRESS:PORT, [V6]:PORT, a network interface, or client"
V4, V6 = pack_inet("192.0.2.1", 0), pack_inet("2001:db8::1", 0)


def made(*texts):
    source = SourceAddress()
    for text in texts:
        source.add(text)
    return source


class BoundRelay:
    """Records what it is told to bind to."""

    def __init__(self):
        self.bound = None

    def bind_outgoing(self, *arguments):
        self.bound = arguments


def listener_for(target, address=None, *, datagram=False):
    one = Listener(-1, "x", address or pack_inet("192.0.2.9", 80), datagram=datagram)
    one.target = parse_target(target)
    return one


# ── the argument ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", V4),
        ("192.0.2.1:4321", pack_inet("192.0.2.1", 4321)),
        ("2001:db8::1", V6),
        ("[2001:db8::1]", V6),
        ("[2001:db8::1]:4321", pack_inet("2001:db8::1", 4321)),
        ("::ffff:192.0.2.1", V4),
        ("[::ffff:192.0.2.1]:4321", pack_inet("192.0.2.1", 4321)),
        ("fe80::1", pack_inet("fe80::1", 0)),
    ],
)
def test_an_address(text, address):
    source = made(text)
    assert list(source.addresses.values()) == [address]
    assert (source.client, source.interface) == (False, "")


def test_an_interface_and_the_client():
    assert made("eth0.100").interface == "eth0.100"
    assert made("client").client
    both = made("192.0.2.1", "2001:db8::1", "eth0", "eth0")
    assert both.addresses == {AF_INET: V4, AF_INET6: V6}
    assert both.interface == "eth0"
    routed = made("client", "eth0")
    assert (routed.client, routed.interface) == (True, "eth0")


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ([""], EXPECTED),
        (["192.0.2"], EXPECTED),
        (["192.0.2.256"], EXPECTED),
        (["192.0.2.1.1"], EXPECTED),
        (["2001:db8:::1"], EXPECTED),
        (["[2001:db8::1"], EXPECTED),
        (["[2001:db8::1]4321"], EXPECTED),
        (["host:80"], EXPECTED),
        (["/run/x"], EXPECTED),
        (["an interface"], EXPECTED),
        (["sixteen-letters-"], EXPECTED),
        (["[eth0]"], EXPECTED),
        (["192.0.2.1:"], "'' is not a port number from 1 to 65535"),
        (["192.0.2.1:0"], "'0' is not a port number from 1 to 65535"),
        (["192.0.2.1:65536"], "'65536' is not a port number from 1 to 65535"),
        (["[::1]:x"], "'x' is not a port number from 1 to 65535"),
        (["0.0.0.0"], "'0.0.0.0' stands for any address, which is the default"),
        (["[::]:80"], "'[::]:80' stands for any address, which is the default"),
        (
            ["fe80::1%eth0"],
            "an address is without %INTERFACE here: give that in a second --source=",
        ),
        (["192.0.2.1", "192.0.2.2"], "there is another IPv4 address already, 192.0.2.1"),
        (["2001:db8::1", "::1"], "there is another IPv6 address already, 2001:db8::1"),
        (["eth0", "eth1"], "there is another interface already, eth0"),
        (["client", "192.0.2.1"], "client and an address exclude each other"),
        (["2001:db8::1", "client"], "client and an address exclude each other"),
    ],
)
def test_bad_arguments(texts, why):
    parsed = Options()
    for text in texts[:-1]:
        options_module._add_source(parsed, text)
    with pytest.raises(UsageError) as caught:
        options_module._add_source(parsed, texts[-1])
    assert str(caught.value) == f"Failed to parse --source= argument: {texts[-1]}: {why}"


# ── at the start ─────────────────────────────────────────────────────────────────────────────────


def test_the_relay_is_told():
    relay, one = BoundRelay(), listener_for("127.0.0.1:80")
    source = made("127.0.0.1", "[::1]:4321")
    use_source(source, relay, [one], unix_headers=False)
    assert relay.bound == (pack_inet("127.0.0.1", 0), pack_inet("::1", 4321), b"", False)
    assert one.target.source is source


def test_other_targets_are_not_bound():
    one, other = listener_for("/run/x"), listener_for("localhost:80")
    use_source(made("127.0.0.1"), BoundRelay(), [one, other], unix_headers=False)
    assert one.target.source is None
    assert other.target.source is not None


@pytest.mark.parametrize(
    ("texts", "targets", "why"),
    [
        (["eth0"], ["/run/x"], "--source= is for TCP and UDP targets, and there is none: /run/x."),
        (
            ["client"],
            ["vsock:2:80"],
            "--source= is for TCP and UDP targets, and there is none: vsock:2:80.",
        ),
        (
            ["::1"],
            ["/run/x", "10.0.0.1:80"],
            "--source= has no IPv4 address, which target 10.0.0.1:80 needs.",
        ),
        (
            ["fe80::1"],
            ["name:80"],
            "--source=fe80::1 is a link-local address: give its interface in a second --source=.",
        ),
    ],
)
def test_what_could_never_work(texts, targets, why):
    relay = BoundRelay()
    with pytest.raises(UsageError) as caught:
        use_source(made(*texts), relay, [listener_for(one) for one in targets], unix_headers=False)
    assert str(caught.value) == why
    assert relay.bound is None


def test_clients_without_an_ip_address(monkeypatch):
    monkeypatch.setattr(source_setup, "_make_transparent", lambda probe, family: None)
    streams = listener_for("10.0.0.1:80", pack_unix("/run/listener"))
    datagrams = listener_for("udp:10.0.0.1:80", pack_unix("/run/datagrams"), datagram=True)
    inside = listener_for("/run/x", pack_unix("/run/listener"))
    ip = listener_for("10.0.0.1:80")
    source = made("client")
    use_source(source, BoundRelay(), [inside, ip], unix_headers=False)
    use_source(
        source, BoundRelay(), [streams, ip], unix_headers=True
    )  # their headers have another one
    for listeners, unix_headers in (([ip, streams], False), ([ip, datagrams], True)):
        with pytest.raises(UsageError, match="is for clients with an IP address"):
            use_source(source, BoundRelay(), listeners, unix_headers=unix_headers)


def test_what_is_not_there_yet(levels):
    source = made("192.0.2.77", "no-interface")
    use_source(source, BoundRelay(), [listener_for("127.0.0.1:80")], unix_headers=False)
    assert [text for _, text in levels] == [
        "There is no network interface no-interface yet (--source=).",
        "There is no local address 192.0.2.77 yet (--source=).",
    ]


# ── the words ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("texts", "error", "target", "why"),
    [
        (["eth0"], errno.ENODEV, V4, "there is no network interface eth0"),
        (["192.0.2.1"], errno.ENODEV, V4, ""),
        (["192.0.2.1"], errno.ECONNREFUSED, V4, ""),
        (["eth0"], errno.EADDRNOTAVAIL, V4, ""),
        (["192.0.2.1"], errno.EAFNOSUPPORT, V6, "--source= has no address of its family"),
        (
            ["client"],
            errno.EAFNOSUPPORT,
            V6,
            "the client has no address of its family, for --source=client",
        ),
        (
            ["client"],
            errno.EADDRNOTAVAIL,
            V4,
            "no local port is free from the client's address",
        ),
        (["127.0.0.1"], errno.EADDRNOTAVAIL, V4, "no local port is free from 127.0.0.1"),
        (["127.0.0.1"], errno.EAGAIN, None, "no local port is free from 127.0.0.1"),
        (["127.0.0.1:9"], errno.EADDRINUSE, V4, "local port 9 of 127.0.0.1 is in use"),
        (["127.0.0.1:9"], errno.EADDRNOTAVAIL, V4, "local port 9 of 127.0.0.1 is in use"),
        (["192.0.2.77"], errno.EADDRNOTAVAIL, V4, "there is no local address 192.0.2.77"),
        (["192.0.2.77", "::1"], errno.EADDRNOTAVAIL, V6, "no local port is free from ::1"),
        (["192.0.2.77"], errno.EADDRNOTAVAIL, None, "there is no local address 192.0.2.77"),
    ],
)
def test_why_it_has_failed(texts, error, target, why):
    assert made(*texts).explain(error, target) == why


def test_addresses_of_a_name_that_fit():
    assert made("192.0.2.1").fitting([V6, V4]) == [V4]
    assert made("192.0.2.1").fitting([V6]) == [V6]
    assert made("client").fitting([V6, V4]) == [V6, V4]
