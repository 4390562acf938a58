"""A service manager that refuses to store late. What others do is in the black-box tests."""

import os
import socket
from types import SimpleNamespace

import pytest

from proxyd.continuity import departure, store


class Refusing:
    """A service manager that takes a descriptor, and closes it only after its answer."""

    def __init__(self):
        self.stored = None
        self.send = None

    def store(self, send):
        self.send = None if send() else send

    def forget_store(self):
        self.send = None

    def send_fd(self, text, fd):
        if text.startswith("FDSTORE"):
            self.stored = socket.socket(fileno=socket.dup(fd))
        return True

    def refuse(self):
        self.stored.close()


@pytest.fixture
def parts():
    loop = SimpleNamespace(
        relay=SimpleNamespace(now_ms=0, trim_pipes=lambda: None),
        watch=lambda fd, then, quiet: None,
        unwatch=lambda fd: None,
    )
    calls = []
    acceptor = SimpleNamespace(stop=lambda: calls.append("stop"))
    return SimpleNamespace(
        loop=loop, notifier=Refusing(), busy=lambda: True, acceptor=acceptor, calls=calls
    )


@pytest.fixture
def steps(parts, monkeypatch):
    """The steps that are taken."""
    for name in ("resume", "leave"):
        monkeypatch.setattr(departure, name, lambda *_, name=name: parts.calls.append(name))
    return parts.calls


@pytest.mark.parametrize("late", [False, True])
def test_a_refusal_while_everything_is_sent(parts, steps, monkeypatch, late):
    one = store.Store(parts)
    one._deposit._answered()

    def pack(_parts, _sender):
        steps.append("pack")
        if late:
            parts.notifier.refuse()

    monkeypatch.setattr(departure, "pack", pack)
    assert one.fill() is not late
    assert steps == (["pack", "resume", "stop"] if late else ["pack", "leave"])
    one.close()
    parts.notifier.refuse()


class Busy(Refusing):
    """One that takes a message only when it is told to, or is gone."""

    def __init__(self):
        super().__init__()
        self.takes = 0
        self.taken = []
        self.gone = False

    def send_fd(self, text, fd):
        if self.gone:
            raise ConnectionRefusedError
        if self.takes == 0:
            return False
        self.takes -= 1
        self.taken.append(text.partition("=")[0])
        os.fstat(fd)
        return True


@pytest.fixture
def busy(parts):
    before = set(os.listdir("/proc/self/fd"))
    parts.notifier = Busy()
    yield parts.notifier
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_busy_service_manager_is_waited_for(parts, busy, taken):
    one = store.Store(parts)
    assert one.waits
    for _ in range(taken):
        assert busy.send is not None
        busy.takes = 1
        if busy.send():
            busy.send = None
    assert busy.taken == ["FDSTORE", "BARRIER"][:taken]
    assert (busy.send is None) == (taken == 2)
    one.step(1999)
    assert one.waits
    one.step(2000)
    assert not one.waits
    assert busy.send is None


def test_a_service_manager_that_is_gone_is_not_waited_for(parts, busy):
    busy.gone = True
    one = store.Store(parts)
    assert busy.send is None
    one.step(0)
    assert not one.waits
    assert not one.fill()
