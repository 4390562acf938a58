"""TARGET, in every form of the command line."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import address
from proxyd.errors import UsageError
from proxyd.target import address_source, parse_target, split_pair, valid_name

HTTP = 80


@pytest.mark.parametrize(
    ("text", "packed"),
    [
        ("127.0.0.1:8080", address.pack_inet("127.0.0.1", 8080)),
        ("127.0.0.1", address.pack_inet("127.0.0.1", HTTP)),
        ("127.0.0.1:http", address.pack_inet("127.0.0.1", HTTP)),
        ("::1:8080", address.pack_inet("::1", 8080)),
        ("[::1]:8080", address.pack_inet("::1", 8080)),
        ("[::1]", address.pack_inet("::1", HTTP)),
        ("[fe80::1%2]:8080", address.pack_inet6("fe80::1", 8080, 2)),
        ("/run/a=b:c", address.pack_unix("/run/a=b:c")),
        ("@a", address.pack_unix("@a")),
        ("unix:/run/x", address.pack_unix("/run/x")),
        ("vsock:2:80", address.pack_vsock(2, 80)),
        (os.fsdecode(b"/\xff"), address.pack_unix(b"/\xff")),
    ],
)
def test_literals_are_packed(text, packed):
    target = parse_target(text)
    assert (target.address, target.host, target.text) == (packed, None, text)
    assert not target.any_port


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:8080", b"localhost", 8080),
        ("localhost", b"localhost", HTTP),
        ("localhost:http", b"localhost", HTTP),
        ("unix:8080", b"unix", 8080),
        ("udp:53", b"udp", 53),
        ("unix-dgram:53", b"unix-dgram", 53),
        ("vsock:8080", b"vsock", 8080),
        ("127.1:8080", b"127.1", 8080),  # which getaddrinfo(3) understands
        ("b\u00fccher.example:8080", b"xn--bcher-kva.example", 8080),
        ("a_b-c.example.:8080", b"a_b-c.example.", 8080),
    ],
)
def test_names_are_left_to_the_resolver(text, host, port):
    target = parse_target(text)
    assert (target.host, target.service, target.address) == (host, port, None)


@pytest.mark.parametrize("scope", ["lo", "nope", "a-b.c"])
@pytest.mark.parametrize(("port", "service"), [("8080", 8080), ("*", None)])
def test_the_interface_of_a_literal_is_looked_up_later(scope, port, service):
    target = parse_target(f"[fe80::1%{scope}]:{port}")
    assert (target.host, target.scope, target.service) == (None, scope, service)
    assert target.address == address.pack_inet6("fe80::1", service or 0)


def test_the_index_of_an_interface_is_never_kept(monkeypatch):
    target = parse_target("[fe80::1%eth0]:8080")
    for index in (3, 7):
        monkeypatch.setattr(address, "interface_index", {"eth0": index}.__getitem__)
        assert address_source(target, 8080, None).prompt(0) == address.pack_inet6(
            "fe80::1", 8080, index
        )


@pytest.mark.parametrize(
    ("text", "packed"),
    [
        ("udp:127.0.0.1:53", address.pack_inet("127.0.0.1", 53)),
        ("udp:127.0.0.1:tftp", address.pack_inet("127.0.0.1", 69)),
        ("127.0.0.1:tftp", address.pack_inet("127.0.0.1", 69)),  # a service of UDP alone
        ("udp:[::1]:53", address.pack_inet("::1", 53)),
        ("udp:::1:53", address.pack_inet("::1", 53)),
        ("unix-dgram:/run/a=b:c", address.pack_unix("/run/a=b:c")),
        ("unix-dgram:@a", address.pack_unix("@a")),
    ],
)
def test_targets_that_say_that_they_are_for_datagrams(text, packed):
    target = parse_target(text)
    assert (target.address, target.host, target.text) == (packed, None, text)
    assert target.datagram
    assert target.for_datagrams() is target


@pytest.mark.parametrize("text", ["udp:53", "unix-dgram:53", "localhost:53", "@a", "127.0.0.1:53"])
def test_other_targets_become_ones_for_datagrams(text):
    target = parse_target(text)
    other = target.for_datagrams()
    assert (target.datagram, other.datagram) == (False, True)
    assert target.for_datagrams() is other
    assert (other.text, other.address, other.host) == (text, target.address, target.host)


def test_a_name_for_datagrams():
    target = parse_target("udp:localhost:tftp")
    assert (target.host, target.service, target.datagram) == (b"localhost", 69, True)
    assert parse_target("udp:[fe80::1%eth0]:*").scope == "eth0"


def test_the_port_of_a_service_may_depend_on_the_kind(monkeypatch):
    ports = {("x", "tcp"): 1, ("x", "udp"): 2}
    monkeypatch.setattr("_socket.getservbyname", lambda *service: ports[service])
    target = parse_target("localhost:x")
    assert (target.service, target.for_datagrams().service) == (1, 2)


def test_any_port_of_a_literal():
    target = parse_target("[::1]:*")
    assert target.any_port
    assert target.address == address.pack_inet("::1", 0)


def test_any_port_of_a_name():
    target = parse_target("localhost:*")
    assert target.any_port
    assert (target.host, target.service) == (b"localhost", None)


@pytest.mark.parametrize("text", ["/x", "@x", "vsock:2:80"])
def test_targets_without_a_port_do_not_look_like_any_port(text):
    assert not parse_target(text).any_port


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no host"),
        (":80", "no host"),
        ("h:", "no port"),
        ("h:0", "is not a port number from 1 to 65535"),
        ("h:65536", "is not a port number"),
        ("h:-1", "'-1' is not a port"),
        ("h:nosuchservice", "'nosuchservice' is not a port"),
        ("h:\udcff", "is not a port"),
        ("h:\u0665", "is not a port"),
        ("::1", r"write IPv6 addresses as \[ADDRESS\]:PORT"),
        ("fe80::1", r"write IPv6 addresses as \[ADDRESS\]:PORT"),
        ("fe80:1:2:3:4:5:6:7", r"write IPv6 addresses as \[ADDRESS\]:PORT"),
        ("tcp:localhost:80", "neither a host name nor an IPv6 address; expected HOST:PORT"),
        ("localhost:http:80", "'localhost:http' is neither a host name"),
        ("unix:", "expected unix:PATH"),
        ("vsock:", "expected vsock:CID:PORT"),
        ("[::1", "expected"),
        ("[::g]:80", "is not an IP address"),
        ("[fe80::1%]:80", "'' is not a network interface"),
        ("[fe80::1%a/b]:80", "'a/b' is not a network interface"),
        ("[fe80::1%a b]:80", "'a b' is not a network interface"),
        ("[fe80::1%a-very-long-name]:80", "'a-very-long-name' is not a network interface"),
        ("[fe80::1%4294967296]:80", "is not a scope number"),
        ("[fe80::g%eth0]:80", "is not an IP address"),
        ("a/b", "is not a host name"),
        ("=/run/x", "a NAME in front of it is not empty"),
        ("a:b=@x", "a NAME in front of it is not empty, contains no colon"),
        ("run/x", "a path begins with a slash"),
        ("http://localhost:80", "a URL is not an address; write localhost:80$"),
        ("http://localhost/x/y:z", "write localhost:80$"),
        ("HTTPS://user:word@[::1]/", r"write \[::1\]:443$"),
        ("tcp://host", "write host:PORT$"),
        ("http://[::1]:8080/x", r"write \[::1\]:8080$"),
        ("http://h:/", "write h:80$"),
        ("://", "write HOST:PORT$"),
        ("a b:80", "is not a host name"),
        ("\udcff:80", "is not a host name"),
        ("\u0665\u200b..:80", "is not a host name"),
        ("a" * 256, "is not a host name"),
        ("\u00fc" * 64, "is not a host name"),
        ("@", "empty path"),
        ("/" + "a" * 107, "doesn't fit in an AF_UNIX address"),
        ("vsock::80", "expected vsock:CID:PORT"),
        ("vsock:a:80", "is not a CID from 0"),
        ("udp:", "no port"),
        ("udp::53", "no host"),
        ("udp:[::1]", r"no port; expected udp:\[ADDRESS\]:PORT"),
        ("udp:h:", "no port"),
        ("udp:h:http", "'http' is not a port number, nor a UDP service"),
        ("udp:/run/x:1", "expected udp:HOST:PORT"),
        ("udp:vsock:2:80", "datagrams cannot be sent to a VSOCK address"),
        ("udp://localhost:53", "a URL is not an address; write localhost:53$"),
        ("unix-dgram:", "expected unix-dgram:/PATH or unix-dgram:@NAME"),
        ("unix-dgram:run/x", "expected unix-dgram:/PATH or unix-dgram:@NAME"),
        ("unix-dgram:@", "empty path"),
    ],
)
def test_garbage(text, why):
    with pytest.raises(UsageError, match=f"^Failed to parse target '.*': .*{why}"):
        parse_target(text)


@given(st.one_of(st.text(), st.text("ab:/@[]%*=.1\udcff\u00fc"), st.characters()))
def test_anything_is_a_target_or_a_usage_error(text):
    try:
        target = parse_target(text)
    except UsageError:
        return
    assert (target.host is None) != (target.address is None)
    assert target.service is None or 0 <= target.service <= 65535


@given(st.ip_addresses(v=6), st.integers(1, 65535))
def test_brackets_and_last_colon_mean_the_same(ip, port):
    assert parse_target(f"{ip}:{port}").address == parse_target(f"[{ip}]:{port}").address


# ── NAME=TARGET ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["web", "proxy@web.socket", "a b", "-", "0", "a/b", "\u00fc"])
def test_names_of_pairs(name):
    assert valid_name(name)
    assert split_pair(f"{name}=x=y") == (name, "x=y")


@pytest.mark.parametrize("name", ["", "/web", "@web", "[web", "a:b", "unix:x"])
def test_not_names_of_pairs(name):
    assert not valid_name(name)
    assert split_pair(f"{name}=x") == (None, f"{name}=x")


@pytest.mark.parametrize("text", ["localhost", "/run/a=b", "@a=b", "[::1]:80", ""])
def test_targets_without_a_name(text):
    assert split_pair(text) == (None, text)
