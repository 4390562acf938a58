"""Fixtures of several unit tests."""

import pytest
from kit.fake_relay import FakeListener
from kit.upstream_world import World

from proxyd import acceptor, log


@pytest.fixture(autouse=True)
def _default_log():
    """Begin and end with the log as it is without variables, and with nothing left out."""
    log.setup({})
    yield
    log.setup({})


@pytest.fixture
def world(monkeypatch):
    """Make an Upstream on a fake relay, with the main loop around it."""
    worlds = []

    def make(*arguments, **keywords):
        one = World(*arguments, **keywords)
        one.relay.replace_functions(monkeypatch)
        monkeypatch.setattr(log.time, "monotonic", lambda: one.relay.now_ms / 1000)
        worlds.append(one)
        return one

    yield make
    for one in worlds:
        one.close()


@pytest.fixture
def fake_listeners(monkeypatch):
    """Put fake listeners in place of those of the relay."""
    monkeypatch.setattr(acceptor, "RelayListener", FakeListener)


@pytest.fixture
def clock(monkeypatch):
    """The clock of the log, which leaves out lines of one kind within 5 s of each other."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(log.time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def levels(monkeypatch):
    """(level, text) of every line that is logged."""
    lines = []
    monkeypatch.setattr(log, "_log", lambda level, text, fields=None: lines.append((level, text)))
    return lines
