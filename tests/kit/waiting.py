"""Waiting for a state, by polling it with a deadline; nothing here sleeps and hopes."""

import time

_patience = 15.0


def patience():
    """Seconds after which something that should have happened has failed to."""
    return _patience


def set_patience(seconds):
    """Less for a test that is meant to fail, which may do so without wasting time."""
    global _patience
    _patience = seconds


STEP = 0.005
"""Seconds between two looks at a condition."""


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
    """AssertionError if `condition()` becomes true within `seconds`: for promises of silence."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            raise AssertionError(f"should not have happened: {what}")
        time.sleep(STEP)
