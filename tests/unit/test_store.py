"""A service manager that refuses to store late. What others do is in the black-box tests."""

import socket
from types import SimpleNamespace

import pytest

from proxyd.continuity import departure, store


class Refusing:
    """A service manager that takes a descriptor, and closes it only after its answer."""

    def __init__(self):
        self.stored = None

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
    one._answered()

    def pack(_parts, _sender):
        steps.append("pack")
        if late:
            parts.notifier.refuse()

    monkeypatch.setattr(departure, "pack", pack)
    assert one.fill() is not late
    assert steps == (["pack", "resume", "stop"] if late else ["pack", "leave"])
    one.close()
    parts.notifier.refuse()
