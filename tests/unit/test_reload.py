"""SIGHUP, step by step, and whatever may fail; tests/blackbox/test_reload.py has the rest."""

import errno
import gc
import os
import posix
import shutil
import signal
from types import SimpleNamespace

import pytest

from proxyd.continuity import reload as reload_module
from proxyd.continuity.reload import Reload
from proxyd.event_loop import EventLoop


class World:
    """A program without listeners, whose trial and whose execve(2) are the test's."""

    def __init__(self, monkeypatch):
        self.patch = monkeypatch
        self.said = []
        self.executed = None
        self.loop = EventLoop()
        self.acceptor = SimpleNamespace(
            listeners=[],
            passed_in=0,
            header_reader=None,
            stop=lambda: self.said.append("stop"),
            resume_soon=lambda: self.said.append("accept"),
        )
        self.parts = SimpleNamespace(
            loop=self.loop,
            acceptor=self.acceptor,
            notifier=SimpleNamespace(
                reloading=lambda: self.said.append("reloading"),
                ready=lambda: self.said.append("ready"),
                removes=False,
            ),
            options=SimpleNamespace(listen=[], inspect=None),
            entrance=None,
            upstreams=[],
            targets=[],
            handle=lambda event: None,
            busy=lambda: False,
        )
        self.try_with("true")
        # Otherwise those that other tests have left are sent to this process again.
        monkeypatch.setattr(reload_module, "take_signals", list)

    def try_with(self, program, *arguments):
        """Have the trial run this instead."""
        path = shutil.which(program)

        def spawn():
            return posix.posix_spawn(path, [program, *arguments], {})

        self.patch.setattr(reload_module, "_spawn_trial", spawn)

    def execute_with(self, execve):
        self.patch.setattr(reload_module.posix, "execve", execve)

    def run(self, *arguments, steps=1):
        """Reload, and wait for the end of the trial."""
        reload = Reload(self.parts, *arguments)
        while reload._status is None and not reload.done:
            self.loop.run(5000)
        for _ in range(steps):
            reload.step(self.loop.relay.now_ms)
        return reload


@pytest.fixture
def world(monkeypatch):
    gc.collect()  # what other tests have left
    before = set(os.listdir("/proc/self/fd"))
    world = World(monkeypatch)
    yield world
    del world.parts, world.loop
    assert set(os.listdir("/proc/self/fd")) == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def why(capfd):
    (line,) = capfd.readouterr().err.splitlines()[-1:]
    start = "Not reloaded, going on with the same version: the program "
    assert line.startswith(start)
    return line.removeprefix(start)


class Keeper:
    """What keeps connections in case of a kill; its root is descriptor 2."""

    waits = True

    def bequeath(self):
        return 2


def test_what_the_service_manager_has_to_be_told_comes_first(world):
    """It is asked to store root while the trial runs: the new program has to know of it."""
    environs = []

    def execve(_path, _command, environ):
        environs.append(environ)
        raise OSError(errno.EIO, "not really")

    world.execute_with(execve)
    keepers = []
    reload = world.run(lambda: keepers[0] if keepers else None, steps=0)
    keepers.append(Keeper())
    world.parts.notifier.removes = True
    for attribute in (keepers[0], "waits"), (world.parts.notifier, "removes"):
        reload.step(world.loop.relay.now_ms)
        assert not reload.done
        setattr(*attribute, False)
    reload.step(world.loop.relay.now_ms)
    assert [one[b"PROXYD_PAGES"] for one in environs] == [b"2:%d" % os.getpid()]


def test_a_service_manager_that_does_not_listen(world):
    world.execute_with(fails)
    world.parts.notifier.removes = True
    reload = world.run(steps=0)
    reload.step(reload.until_ms - 1)
    assert not reload.done
    reload.step(reload.until_ms)
    assert reload.done


def fails(*_arguments):
    raise OSError(errno.E2BIG, "Argument list too long")


def test_the_new_program_is_executed_after_the_batch_of_events(world):
    seen = []

    def execve(path, command, environ):
        seen.append((path, command, environ))
        raise OSError(errno.EIO, "not really")

    world.execute_with(execve)
    reload = Reload(world.parts)
    while reload._status is None:
        world.loop.run(5000)
    assert not seen
    reload.step(world.loop.relay.now_ms)
    ((path, command, environ),) = seen
    assert command[0] == path == reload_module.sys.executable
    fd, _, pid = environ[b"PROXYD_PARCEL"].decode().partition(":")
    assert int(pid) == os.getpid()
    assert int(fd) > 2
    assert b"LISTEN_FDS" not in environ


def test_execve_fails(world, capfd):
    world.execute_with(fails)
    assert world.run().done
    assert why(capfd) == "cannot go on with the connections: Argument list too long"
    assert world.said == ["reloading", "stop", "accept", "ready"]


def test_there_is_no_memory_for_a_parcel(world, capfd):
    world.patch.setattr(posix, "memfd_create", fails)
    assert world.run().done
    assert "Argument list too long" in why(capfd)
    assert world.said[-2:] == ["accept", "ready"]


def test_a_signal_that_comes_meanwhile_is_not_lost(world):
    """It waits for the new program; if there is none, it is ours again."""
    got = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: got.append(number))
    world.patch.setattr(reload_module, "take_signals", lambda: [signal.SIGUSR1])

    def execve(*_arguments):
        assert signal.SIGUSR1 in signal.sigpending()
        assert not got
        fails()

    world.execute_with(execve)
    assert world.run().done
    signal.signal(signal.SIGUSR1, before)
    assert got == [signal.SIGUSR1]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "does not start: its exit status is 3"),
        ("kill -9 $$", "does not start: it was ended by signal 9"),
    ],
)
def test_the_trial_fails(world, capfd, script, reason):
    world.execute_with(fails)
    world.try_with("sh", "-c", script)
    assert world.run().done
    assert why(capfd) == reason
    assert world.said == ["reloading", "ready"]


def test_the_trial_takes_too_long(world, capfd):
    world.try_with("sleep", "1000")
    reload = Reload(world.parts)
    reload.step(reload.until_ms - 1)
    assert not reload.done
    pid = reload._pid
    reload.step(reload.until_ms)
    assert reload.done
    assert why(capfd) == "does not start within 10 s"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_trial_cannot_be_started(world, capfd):
    world.patch.setattr(reload_module, "_spawn_trial", fails)
    assert Reload(world.parts).done
    assert why(capfd) == "cannot be tried: Argument list too long"


def test_the_trial_cannot_be_watched(world, capfd):
    world.try_with("sleep", "1000")
    world.patch.setattr(posix, "pidfd_open", fails)
    assert Reload(world.parts).done
    assert "cannot be tried" in why(capfd)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_the_end_of_the_program_ends_the_trial(world):
    world.try_with("sleep", "1000")
    reload = Reload(world.parts)
    reload.cancel()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_the_listeners_that_were_passed_in(world):
    """In the order of their descriptors, the inspection socket included."""

    def listener(fd, name):
        return SimpleNamespace(fd=fd, name=name)

    world.acceptor.listeners = [listener(3, "a"), listener(5, "c"), listener(9, "own")]
    world.parts.options = SimpleNamespace(listen=["own"], inspect="fd:b")
    world.parts.entrance = listener(4, "b")
    found = reload_module._inherited(world.parts)
    assert found == [(3, "a"), (4, "b"), (5, "c")]
    environ = reload_module._environ({"PROXYD_PARCEL": 7, "PROXYD_PAGES": -1}, found)
    assert environ[b"PROXYD_PARCEL"] == b"7:%d" % os.getpid()
    assert b"PROXYD_PAGES" not in environ
    assert environ[b"LISTEN_FDS"] == b"3"
    assert environ[b"LISTEN_FDNAMES"] == b"a:b:c"
    assert environ[b"LISTEN_PID"] == str(os.getpid()).encode()


def test_what_an_earlier_reload_has_told(world):
    """Its descriptors have other numbers by now."""
    for name in ("PROXYD_PARCEL", "PROXYD_PAGES"):
        world.patch.setitem(posix.environ, name.encode(), b"99:%d" % os.getpid())
    environ = reload_module._environ({"PROXYD_PARCEL": 7}, [])
    assert environ[b"PROXYD_PARCEL"] == b"7:%d" % os.getpid()
    assert b"PROXYD_PAGES" not in environ


def test_a_listener_that_is_not_where_it_was(world):
    world.acceptor.listeners = [SimpleNamespace(fd=4, name="a")]
    with pytest.raises(OSError, match="not where it was"):
        reload_module._inherited(world.parts)


def test_the_only_connection_of_accept_yes_is_not_carried_on(world):
    world.acceptor.passed_in = 1
    assert not reload_module.is_possible(world.acceptor)


@pytest.mark.parametrize("there", [True, False])
def test_with_a_terminal_sighup_is_no_reload(world, there):
    path = "/dev/null" if there else "/dev/nowhere"
    opened = posix.open
    world.patch.setattr(posix, "open", lambda _path, flags: opened(path, flags))
    assert reload_module.is_possible(world.acceptor) == (not there)
