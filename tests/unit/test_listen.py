"""NAME=TARGET: which target serves which listener."""

import re

import pytest

from proxyd import address
from proxyd.errors import UsageError
from proxyd.listen import Listener, match_targets
from proxyd.target import parse_target, split_pair

TCP = address.pack_inet("127.0.0.1", 80)
UNIX = address.pack_unix("/run/x")


def pairs(*texts):
    return [(name, parse_target(rest)) for name, rest in map(split_pair, texts)]


def listener(name, packed=TCP, **options):
    return Listener(-1, name, packed, **options)


def test_a_plain_target_serves_every_listener():
    matched, unused = match_targets(pairs("@t"), [listener("a"), listener("b"), listener("a")])
    assert [target.text for target in matched] == ["@t"] * 3
    assert unused == []


def test_pairs_serve_by_name():
    listeners = [listener("b"), listener("a"), listener("b")]
    matched, unused = match_targets(pairs("a=@1", "b=@2", "c=@3", "d=@4"), listeners)
    assert [target.text for target in matched] == ["@2", "@1", "@2"]
    assert unused == ["c", "d"]


def test_a_listener_without_a_pair_is_named():
    expected = "No target for listener 'b' (/run/x): the targets are for 'a'."
    with pytest.raises(UsageError, match=f"^{re.escape(expected)}$"):
        match_targets(pairs("a=@1"), [listener("a"), listener("b", UNIX)])


@pytest.mark.parametrize(
    ("name", "given", "end"),
    [
        ("web", ["wbe=@1", "db=@2"], "the targets are for 'wbe', 'db'; is 'wbe' meant for it?"),
        ("unknown", ["a=@1"], "set FileDescriptorName= in the socket unit, or use --listen="),
        ("web@127.0.0.1:80.socket", ["a=@1"], "set FileDescriptorName= in the socket unit to one"),
        ("web", [f"{n:x}0=@{n}" for n in range(30)], "'80', '90' and 20 more."),
    ],
)
def test_the_message_about_a_listener_without_a_pair_tells_what_there_is(name, given, end):
    with pytest.raises(UsageError) as caught:
        match_targets(pairs(*given), [listener(name)])
    assert end in str(caught.value)


@pytest.mark.parametrize("packed", [UNIX, address.pack_vsock(2, 80)])
def test_any_port_needs_a_tcp_listener(packed):
    listeners = [listener("a"), listener("b", packed)]
    with pytest.raises(UsageError, match=r"localhost:\* needs a TCP or UDP listener.*'b'"):
        match_targets(pairs("localhost:*"), listeners)
    assert match_targets(pairs("a=localhost:*", "b=@x"), listeners)[1] == []


def test_any_port_of_a_udp_listener():
    (target,), _ = match_targets(pairs("localhost:*"), [listener("a", datagram=True)])
    assert (target.any_port, target.datagram) == (True, True)
    with pytest.raises(UsageError, match="needs a TCP or UDP listener"):
        match_targets(pairs("localhost:*"), [listener("a", UNIX, datagram=True)])


@pytest.mark.parametrize("text", ["127.0.0.1:53", "localhost:53", "/run/t", "@t", "unix:/run/t"])
def test_a_target_follows_the_kind_of_its_listener(text):
    listeners = [listener("a"), listener("b", datagram=True), listener("c", UNIX, datagram=True)]
    (stream, datagram, other), _ = match_targets(pairs(text), listeners)
    assert (stream.datagram, datagram.datagram) == (False, True)
    assert datagram is other
    assert (stream.address, stream.host, stream.text) == (datagram.address, datagram.host, text)
    assert datagram.text == text


def test_listeners_of_both_kinds_may_have_one_name():
    listeners = [listener("dns"), listener("dns", datagram=True)]
    matched, unused = match_targets(pairs("dns=@t"), listeners)
    assert ([target.datagram for target in matched], unused) == ([False, True], [])


@pytest.mark.parametrize("text", ["udp:localhost:53", "unix-dgram:/run/t", "localhost:tftp"])
def test_a_target_for_datagrams_needs_a_listener_of_datagrams(text):
    (target,), _ = match_targets(pairs(text), [listener("a", datagram=True)])
    assert target.datagram
    expected = f"Target {text} is for datagrams: 'b' (127.0.0.1:80) is a stream listener."
    with pytest.raises(UsageError, match=f"^{re.escape(expected)}$"):
        match_targets(pairs(text), [listener("a", datagram=True), listener("b")])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("vsock:2:80", "datagrams cannot be sent to a VSOCK address"),
        ("localhost:http", "'http' is not a port number, nor a UDP service"),
    ],
)
def test_a_target_for_streams_alone(text, why):
    match_targets(pairs(text), [listener("a")])
    with pytest.raises(UsageError, match=f"^Failed to parse target '{text}': {why}$"):
        match_targets(pairs(text), [listener("a", datagram=True)])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("", "this one has no name"),
        ("a:b", "to one without a colon"),
        ("a=b", "to one without an equals sign"),
        ("@a", "does not begin with a slash"),
    ],
)
def test_a_name_that_cannot_have_a_target(name, hint):
    listener = Listener(-1, name, UNIX)
    with pytest.raises(UsageError, match=hint):
        match_targets([("web", parse_target("a:1"))], [listener])
