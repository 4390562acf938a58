"""Messages, and who may call what."""

import json
import os
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxyd.inspection.access import is_privileged, peer_of
from proxyd.inspection.varlink import (
    CallError,
    MessageError,
    failure,
    parse,
    plain,
    reply,
)

INVALID = "org.varlink.service.InvalidParameter"


def call(**fields):
    return parse(json.dumps({"method": "a.b.C"} | fields).encode())


@pytest.mark.parametrize("parameters", [{}, {"parameters": {}}, {"parameters": None}])
def test_parameters_may_be_left_out(parameters):
    """varlinkctl 262 leaves them out, 257 sends an empty object."""
    made = call(**parameters)
    assert made.method == "a.b.C"
    assert made.parameters == {}
    assert not made.more
    assert not made.oneway


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"x",
        b"null",
        b"[]",
        b"1",
        b"{}",
        b'{"method": 1}',
        b'{"method": "a.B", "parameters": []}',
        b'{"method": "a.B", "more": 1}',
        b'{"method": "a.B", "more": "yes"}',
        b'{"method": "a.B", "more": true, "oneway": true}',
        b'{"method": "a.B"} {"method": "a.B"}',
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"method": "a.B", "parameters": {"id": ' + b"9" * 5000 + b"}}",
    ],
)
def test_what_is_not_a_call(message):
    with pytest.raises(MessageError):
        parse(message)


@given(st.binary())
@example(b'{"method": "\\ud800"}')
def test_any_message_is_a_call_or_not(message):
    try:
        parse(message)
    except MessageError:
        pass


def test_messages_end_with_nul():
    assert reply({"a": 1}) == b'{"parameters":{"a":1}}\0'
    assert reply({}, continues=True) == b'{"parameters":{},"continues":true}\0'
    assert failure(CallError("a.b.C", x="y")) == b'{"error":"a.b.C","parameters":{"x":"y"}}\0'


@pytest.mark.parametrize("text", ["/run/\udcff", "@a\0b", "\x1b[2J", "a\nb"])
def test_what_peers_choose_is_escaped(text):
    escaped = plain(text)
    assert escaped.isprintable()
    escaped.encode()


@pytest.mark.parametrize("value", [None, "1", 1.0, True, 2**63, -(2**63) - 1, [], {}])
def test_what_is_not_an_integer(value):
    with pytest.raises(CallError, match=INVALID):
        call(parameters={"id": value}).integer("id")


@pytest.mark.parametrize("value", [0, -1, 2**63 - 1, -(2**63)])
def test_an_integer(value):
    assert call(parameters={"id": value}).integer("id") == value


def test_a_string_may_be_null():
    assert call(parameters={"target": None}).text("target") is None
    assert call().text("target") is None
    assert call(parameters={"target": "x"}).text("target") == "x"
    with pytest.raises(CallError, match=INVALID):
        call(parameters={"target": 1}).text("target")


def test_unknown_parameters_are_an_error():
    call(parameters={"a": 1}).allow("a", "b")
    with pytest.raises(CallError, match=INVALID) as error:
        call(parameters={"c\n": 1}).allow("a", "b")
    assert error.value.fields == {"parameter": "c\\n"}


@pytest.mark.parametrize(
    ("uid", "own_uid", "overflow_uid", "allowed"),
    [
        (0, 1000, 65534, True),
        (0, 0, 65534, True),
        (1000, 1000, 65534, True),
        (1001, 1000, 65534, False),
        (65534, 1000, 65534, False),
        # Under PrivateUsers=yes it stands for everybody else, also if it is our own.
        (65534, 65534, 65534, False),
        (99, 99, 99, False),
        (65534, 65534, 99, False),
    ],
)
def test_root_and_our_own_user_may_do_everything(uid, own_uid, overflow_uid, allowed):
    assert is_privileged(uid, own_uid, overflow_uid) == allowed


def test_the_kernel_tells_who_calls():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = peer_of(ours)
    assert peer.uid == os.geteuid()
    assert peer.privileged == (os.geteuid() != 65534)
