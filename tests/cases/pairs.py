"""Pairs of families, and checks that say in a few words what was seen instead."""

import pytest
from kit.socket_state import is_quiet
from kit.sockets import TCP, UNIX, read_to_end
from kit.waiting import never_within, wait_until

FAMILIES = ("tcp4", "tcp6", "unix")

every_pair = pytest.mark.parametrize(
    ("listen", "target"), [(a, b) for a in FAMILIES for b in FAMILIES]
)
"""The client's family, and the target's."""

to_tcp = pytest.mark.parametrize(("listen", "target"), [(a, b) for a in FAMILIES for b in TCP])
to_unix = pytest.mark.parametrize(("listen", "target"), [(a, "unix") for a in FAMILIES])

each_resetting_side = pytest.mark.parametrize(
    ("listen", "target", "who"),
    [(a, b, "client") for a in TCP for b in FAMILIES]
    + [(a, b, "server") for a in FAMILIES for b in TCP],
)
"""As every_pair, with the side that resets: a UNIX socket cannot."""


def sides(client, server, who):
    """(the side that acts, the family's other side)."""
    return (client, server) if who == "client" else (server, client)


def end_of_reset(listen, target, who):
    """How the other side's stream ends: a UNIX socket has no reset."""
    return "eof" if (target if who == "client" else listen) in UNIX else "reset"


def not_applicable(reason):
    """Leave the test: the case cannot be made for this program."""
    pytest.skip(f"not applicable: {reason}")


def needs_a_program(stage):
    """Leave a test that a direct connection has no part in."""
    if stage.contender == "direct":
        not_applicable("there is no program")


def costs_nothing(stage, doing="waits"):
    """The program comes to want no CPU: a busy loop wants it all the time, whoever has it.

    On a loaded machine it may still have work that is left for it.
    """
    if stage.contender == "direct":
        return
    try:
        wait_until(lambda: stage.proxy.cpu_demand() < 0.8, "")
    except AssertionError:
        raise AssertionError(f"burns a CPU while it {doing}") from None


def stays_open(side, seconds, what):
    """Nothing comes to that side for so long, no byte and no end."""
    try:
        never_within(seconds, lambda: not is_quiet(side), "")
    except AssertionError:
        raise AssertionError(what) from None


def say(side, data, who="the server"):
    """Send all of it, from a side that must still be able to."""
    try:
        side.sendall(data)
    except OSError as error:
        raise AssertionError(f"{who} can send no more: {error.strerror or error}") from None


def hear(side, expected, what):
    """The stream to its end is these bytes and a clean end."""
    received, end = read_to_end(side)
    assert_same(received, expected, what)
    assert end == "eof", f"{what} ends with a reset"


def assert_same(received, expected, what):
    """Byte for byte; says how much there was, and not what."""
    if received == expected:
        return
    if expected.startswith(received):
        raise AssertionError(f"{what}: {len(received)} of {len(expected)} bytes, then the end")
    raise AssertionError(f"{what}: not the bytes that were sent")
