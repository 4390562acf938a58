"""Pairs of families, and checks whose errors say in a few words what was seen instead."""

import pytest
from kit.socket_state import is_quiet
from kit.sockets import TCP, UNIX, read_to_end
from kit.waiting import never_within, wait_until

FAMILIES = ("tcp4", "tcp6", "unix")

every_pair = pytest.mark.parametrize(
    ("listen", "target"), [(a, b) for a in FAMILIES for b in FAMILIES]
)
"""(family of the client, family of the target)."""

to_tcp = pytest.mark.parametrize(("listen", "target"), [(a, b) for a in FAMILIES for b in TCP])
to_unix = pytest.mark.parametrize(("listen", "target"), [(a, "unix") for a in FAMILIES])

each_resetting_side = pytest.mark.parametrize(
    ("listen", "target", "actor"),
    [(a, b, "client") for a in TCP for b in FAMILIES]
    + [(a, b, "server") for a in FAMILIES for b in TCP],
)
"""The same with the side that resets, which is not a UNIX socket: those cannot."""


def sides(client, server, actor):
    """(the side that acts, the other side)."""
    return (client, server) if actor == "client" else (server, client)


def end_of_reset(listen, target, actor):
    """How the stream to the other side ends: a UNIX socket has no reset."""
    return "eof" if (target if actor == "client" else listen) in UNIX else "reset"


def not_applicable(reason):
    """Skip the test: the case cannot be produced for this program."""
    pytest.skip(f"not applicable: {reason}")


def needs_a_program(stage):
    """Skip a test that makes no sense for a direct connection."""
    if stage.contender == "direct":
        not_applicable("there is no program")


def costs_nothing(stage, doing="waits"):
    """The program stops using CPU time, which a busy loop never does.

    It has time for that: on a loaded machine it may still have work to do.
    """
    if stage.contender == "direct":
        return
    try:
        wait_until(lambda: stage.proxy.cpu_demand() < 0.8, "")
    except AssertionError:
        raise AssertionError(f"burns a CPU while it {doing}") from None


def stays_open(side, seconds, what):
    """Nothing arrives at that side for that many seconds, neither a byte nor the end."""
    try:
        never_within(seconds, lambda: not is_quiet(side), "")
    except AssertionError:
        raise AssertionError(what) from None


def say(side, data, actor="the server"):
    """Send all of `data` from a side that must still be able to send."""
    try:
        side.sendall(data)
    except OSError as error:
        raise AssertionError(f"{actor} can send no more: {error.strerror or error}") from None


def hear(side, expected, what):
    """What that side still receives is `expected` and a clean end."""
    received, end = read_to_end(side)
    assert_same(received, expected, what)
    assert end == "eof", f"{what} ends with a reset"


def assert_same(received, expected, what):
    """The bytes are equal; the error says how many there were, not which."""
    if received == expected:
        return
    if expected.startswith(received):
        raise AssertionError(f"{what}: {len(received)} of {len(expected)} bytes, then the end")
    raise AssertionError(f"{what}: not the bytes that were sent")
