"""The inspection socket: where it is opened, and how callers are accepted."""

import errno
import os
import socket
import stat
import sys
from types import SimpleNamespace

import pytest
from kit.fake_relay import FakeRelay

from proxyd import address as sockaddr
from proxyd.command_line import parse_args
from proxyd.errors import UsageError
from proxyd.event_loop import EventLoop
from proxyd.inspection import entrance as entrance_module
from proxyd.inspection.entrance import (
    _ACCEPTS_MAX,
    _PARTS,
    PAUSE_MS,
    Entrance,
    check_inherited,
    open_at,
    open_by_default,
)
from proxyd.limits import CALLERS_MAX
from proxyd.listen import Listener, close_listener
from proxyd.options import Option


@pytest.fixture
def opened():
    """Close these listeners at the end."""
    listeners = []
    yield listeners
    for listener in listeners:
        close_listener(listener)


@pytest.fixture
def _private():
    """A umask as in hardening.conf."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_private")
@pytest.mark.parametrize("default", [True, False])
def test_everybody_may_call_whatever_the_umask_is(tmp_path, opened, default):
    path = tmp_path / "inspect"
    opened.append(open_by_default(str(tmp_path)) if default else open_at(str(path)))
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
    close_listener(opened[0])
    assert not path.exists()


def test_a_socket_that_cannot_be_opened_by_default_is_one_warning(tmp_path, capfd):
    assert open_by_default(str(tmp_path / "absent")) is None
    path = f"{tmp_path}/absent/inspect"
    assert capfd.readouterr().err == (
        f"No inspection socket: failed to open {path}: No such file or directory\n"
    )
    assert open_by_default("/" + "x" * 200) is None
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_socket_that_is_asked_for_must_be_opened(tmp_path):
    with pytest.raises(UsageError, match="Failed to open the inspection socket .*: No such file"):
        open_at(str(tmp_path / "absent" / "x"))


def test_a_socket_in_use_is_left_alone(tmp_path, opened, capfd):
    opened.append(open_by_default(str(tmp_path)))
    assert open_by_default(str(tmp_path)) is None
    assert "Address already in use" in capfd.readouterr().err
    assert (tmp_path / "inspect").exists()


def test_a_stale_socket_is_replaced(tmp_path, opened):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "inspect"))
    opened.append(open_by_default(str(tmp_path)))
    assert opened[0] is not None


def test_a_mode_that_cannot_be_set_leaves_no_socket(tmp_path, monkeypatch, capfd):
    def refuse(path, mode):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(entrance_module.posix, "chmod", refuse)
    assert open_by_default(str(tmp_path)) is None
    assert "Function not implemented" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def inherited(name, address, connected=False):
    return Listener(-1, name, address, connected)


def test_an_inherited_socket_is_found_by_its_name():
    unix = sockaddr.pack_unix("/run/x")
    listeners = [inherited("a", unix), inherited("b", unix)]
    assert check_inherited("b", listeners) is listeners[1]
    with pytest.raises(UsageError, match="no inherited socket with the name 'c'"):
        check_inherited("c", listeners)
    with pytest.raises(UsageError, match="more than one"):
        check_inherited("a", [*listeners, listeners[0]])
    with pytest.raises(UsageError, match="not a listening UNIX socket"):
        check_inherited("a", [inherited("a", sockaddr.pack_inet("127.0.0.1", 80))])
    with pytest.raises(UsageError, match="not a listening UNIX socket"):
        check_inherited("a", [inherited("a", unix, connected=True)])


@pytest.mark.parametrize(
    ("argument", "value"),
    [("/run/x", "/run/x"), ("fd:a", "fd:a"), ("no", ""), ("/no", "/no")],
)
def test_the_option(argument, value):
    options = parse_args(["x", f"--inspect={argument}", "/t"])
    assert not isinstance(options, Option)
    assert options.inspect == value


@pytest.mark.parametrize("argument", ["", "x", "fd:", "yes", "./x"])
def test_a_bad_argument(argument):
    with pytest.raises(UsageError, match="expected an absolute path, fd:NAME for an inherited"):
        parse_args(["x", f"--inspect={argument}", "/t"])


@pytest.mark.parametrize(("argument", "wanted"), [("yes", True), ("no", False)])
def test_log_addresses(argument, wanted):
    options = parse_args(["x", f"--log-addresses={argument}", "/t"])
    assert not isinstance(options, Option)
    assert options.log_addresses == wanted
    with pytest.raises(UsageError, match="expected yes or no"):
        parse_args(["x", "--log-addresses=1", "/t"])


# ── callers ───────────────────────────────────────────────────────────────────────────────────────


class World:
    """An entrance on a fake relay, with a service that only collects callers."""

    def __init__(self, tmp_path):
        self.relay = FakeRelay(start_ms=0)
        self.relay.connections_max = 16
        self.loop = EventLoop()
        self.loop.relay = self.relay
        self.path = str(tmp_path / "inspect")
        self.listener = open_at(self.path)
        self.accepted = []
        self.steps = []
        self.makes = []
        self.entrance = Entrance(self.loop, self.listener, self.make)

    def make(self, callers_max):
        self.makes.append(callers_max)
        callers = SimpleNamespace(
            add=self.accepted.append,
            step=self.steps.append,
            next_ms=lambda _now_ms: 77,
            close_all=lambda: None,
        )
        return SimpleNamespace(callers=callers)

    def call(self):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(self.path)

    def ready(self):
        """A caller is reported, and again as long as it is not accepted."""
        while self.entrance._parts:
            self.loop._handlers[self.listener.fd](1)
        self.loop._handlers[self.listener.fd](1)

    def close(self):
        close_listener(self.listener)
        for fd in self.accepted:
            os.close(fd)


@pytest.fixture
def world(tmp_path):
    one = World(tmp_path)
    yield one
    one.close()


def test_nothing_is_made_before_the_first_caller(world):
    world.entrance.step(5)
    assert world.entrance.next_ms(5) is None
    assert world.makes == []
    world.call()
    world.ready()
    assert world.makes == [CALLERS_MAX]
    world.call()
    world.ready()
    assert len(world.accepted) == 2
    assert len(world.makes) == 1
    assert [os.get_blocking(fd) for fd in world.accepted] == [False, False]
    assert [os.get_inheritable(fd) for fd in world.accepted] == [False, False]
    world.entrance.step(6)
    assert world.steps == [6]
    assert world.entrance.next_ms(6) == 77


def test_imports_do_not_keep_the_loop_for_long(world):
    """One part in a turn, and what is left over at the end is little."""
    world.call()
    for left in reversed(range(len(_PARTS))):
        world.loop._handlers[world.listener.fd](1)
        assert len(world.entrance._parts) == left
    assert world.makes == []
    before = set(sys.modules)
    import proxyd.inspection.service  # noqa: F401

    assert set(sys.modules) == before


def test_few_callers_are_accepted_at_once(world):
    callers = [socket.socket(socket.AF_UNIX) for _ in range(3 * _ACCEPTS_MAX)]
    for caller in callers:
        caller.connect(world.path)
    for turn in range(1, 4):
        world.ready()
        assert len(world.accepted) == turn * _ACCEPTS_MAX
    for caller in callers:
        caller.close()


def test_callers_are_served_while_no_further_one_is_accepted(world, monkeypatch):
    world.call()
    world.ready()

    def fail(*_):
        raise OSError(errno.EMFILE, "x")

    monkeypatch.setattr(entrance_module, "_accept_one", fail)
    world.ready()
    assert world.entrance.next_ms(0) == 77
    world.entrance.step(77)
    assert world.steps == [77]
    world.entrance._service.callers.next_ms = lambda _now_ms: None
    assert world.entrance.next_ms(0) == PAUSE_MS


def test_a_listener_that_others_have_made_blocking_does_not_block(world):
    """O_NONBLOCK belongs to all processes that share it."""
    os.set_blocking(world.listener.fd, True)
    world.call()
    world.ready()
    assert len(world.accepted) == 1
    assert not os.get_blocking(world.listener.fd)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "x"), ImportError("x"), MemoryError()])
def test_a_failure_pauses_the_entrance(world, capfd, error):
    def fail(callers_max):
        raise error

    make, world.entrance._make = world.entrance._make, fail
    world.call()
    world.ready()
    assert "Failed to serve the inspection socket: " in capfd.readouterr().err
    assert world.listener.fd not in world.relay.watched  # it would spin
    assert world.entrance.next_ms(0) == PAUSE_MS
    world.entrance._make = make
    world.entrance.step(PAUSE_MS - 1)
    assert world.listener.fd not in world.relay.watched
    world.entrance.step(PAUSE_MS)
    world.ready()
    assert len(world.accepted) == 1


def test_callers_are_no_events_that_put_off_an_idle_exit(world):
    world.relay.ready(world.listener.fd, 1)
    world.loop.run(0)
    assert not world.loop.had_events
    rd, wr = os.pipe()
    world.loop.watch(rd, lambda _events: None)
    world.relay.ready(rd, 1)
    world.loop.run(0)
    assert world.loop.had_events
    os.close(rd)
    os.close(wr)


def test_a_fault_of_ours_while_an_event_is_handled_ends_the_callers(world):
    world.call()
    world.ready()
    faults = []
    world.entrance._service.callers.fail = faults.append
    world.entrance._service.handle = lambda _event: 1 // 0
    world.entrance.handle(object())
    assert len(faults) == 1
    assert isinstance(faults[0], ZeroDivisionError)


def test_callers_rest_while_the_program_looks_whether_to_end(world):
    world.call()
    world.ready()
    world.entrance.rest()
    world.entrance.step(6)
    assert world.steps == []
    world.entrance.resume()
    world.entrance.step(7)
    assert world.steps == [7]
