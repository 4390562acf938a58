"""Fixtures of several unit tests."""

import pytest
from kit.upstream_world import World

from proxyd import happy_eyeballs, log


@pytest.fixture
def world(monkeypatch):
    """Make an Upstream on a fake relay, with the main loop around it."""
    worlds = []

    def make(*arguments, **keywords):
        one = World(*arguments, **keywords)
        monkeypatch.setattr(happy_eyeballs, "connected", one.relay.connected)
        monkeypatch.setattr(happy_eyeballs, "peek", one.relay.peek)
        monkeypatch.setattr(log.time, "monotonic", lambda: one.relay.now_ms / 1000)
        worlds.append(one)
        return one

    log.setup({})
    yield make
    log.setup({})
    for one in worlds:
        one.close()


@pytest.fixture
def levels(monkeypatch):
    """(level, text) of every line that is logged."""
    lines = []
    monkeypatch.setattr(log, "_log", lambda level, text: lines.append((level, text)))
    return lines
