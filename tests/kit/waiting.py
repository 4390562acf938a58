"""Waiting for a state, by polling it with a deadline."""

import time

_patience = 15.0


def patience():
    """Seconds to wait for something that must happen."""
    return _patience


def set_patience(seconds):
    """Change patience(): a test that is meant to fail need not wait for long."""
    global _patience
    _patience = seconds


STEP = 0.005
"""Seconds between two checks of a condition."""


def wait_until(condition, what, timeout=None):
    """The first true value that `condition()` returns; AssertionError naming `what` otherwise."""
    timeout = timeout or patience()
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(STEP)


def never_within(seconds, condition, what):
    """AssertionError if `condition()` becomes true within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            raise AssertionError(f"should not have happened: {what}")
        time.sleep(STEP)
