"""The command: its exit status, what it prints, and its messages when it cannot start."""

import _signal
import errno
import os
import runpy
import signal
import socket
import subprocess
import sys
import types

import pytest

from proxyd import __version__, address, cli
from proxyd.command_line import parse_args
from proxyd.errors import UsageError
from proxyd.listen import Listener
from proxyd.options import OPTIONS

PROG = "/usr/bin/prog"
UNUSED = f"@proxyd-test-cli-{os.getpid()}"


@pytest.fixture(autouse=True)
def _unchanged_process():
    """Undo what main() does to the process."""
    handler = _signal.getsignal(_signal.SIGINT)
    yield
    _signal.signal(_signal.SIGINT, handler)


@pytest.fixture
def served(monkeypatch):
    """Replace the server; return the list of what it was called with."""
    calls = []
    server = types.ModuleType("proxyd.server")
    server.run = lambda *args, **_options: calls.append(args) or 0
    monkeypatch.setitem(sys.modules, "proxyd.server", server)
    monkeypatch.setattr(sys.modules["proxyd"], "server", server, raising=False)
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "SYSTEMD_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_help(capfd):
    assert cli.main([PROG, "--help"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "Bidirectionally proxy local sockets to another (possibly remote) socket." in out
    for option in OPTIONS:
        assert f"--{option.long}" in out
    assert max(map(len, out.splitlines())) <= 80


def test_version(capfd):
    assert cli.main([PROG, "--version"]) == 0
    assert capfd.readouterr().out == f"systemd-socket-proxyd {__version__}\n"


@pytest.mark.parametrize(
    ("redirect", "status"), [(">&-", 1), (">/dev/full", 1), ("2>&- >/dev/full", 1)]
)
def test_help_that_cannot_be_written(redirect, status):
    code = "import sys; from proxyd.cli import main; sys.exit(main())"
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -c "{code}" --help {redirect}', sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "")
    lines = done.stderr.splitlines()
    assert all(line.startswith("Failed to write to standard output: ") for line in lines)
    assert len(lines) == (0 if "2>" in redirect else 1)


def test_help_whose_reader_has_gone(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    saved = os.dup(1)
    os.dup2(writer, 1)
    try:
        assert cli.main([PROG, "--help"]) == 0
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(writer)


def test_closed_standard_fds_are_not_given_to_sockets():
    code = (
        "import sys, os; from proxyd import cli;"
        "cli.main(['prog', '--foo']);"
        "sys.exit({os.readlink(f'/proc/self/fd/{n}') for n in range(3)} != {'/dev/null'})"
    )
    script = f'exec "$0" -c "{code}" <&- >&- 2>&-'
    assert subprocess.run(["/bin/sh", "-c", script, sys.executable], check=False).returncode == 0


def test_a_standard_fd_for_which_fstat_fails_is_left_alone(monkeypatch):
    def fstat(fd):
        raise OSError(errno.EIO, "")

    opened = []
    with monkeypatch.context() as patch:
        patch.setattr(cli.posix, "fstat", fstat)
        patch.setattr(cli.posix, "open", lambda *names: opened.append(names))
        cli._open_standard_fds()
    assert opened == []


def test_no_sockets(served, capfd):
    assert cli.main([PROG, "t"]) == 1
    first, second = capfd.readouterr().err.splitlines()
    assert first == "Didn't get any sockets passed in."
    assert "--listen=" in second
    assert ".socket" in second
    assert served == []


def test_main_serves(served, tmp_path):
    path = str(tmp_path / "s")
    assert cli.main([PROG, f"--listen={path}", "--listen=a=127.0.0.1:0", "host:*"]) == 1
    assert served == []
    assert cli.main([PROG, f"--listen={path}", "--listen=a=127.0.0.1:0", "/t"]) == 0
    ((options, listeners, environ, entrance, *_),) = served
    assert options.connections_max == 256
    assert entrance is None
    assert [(listener.name, listener.target.text) for listener in listeners] == [
        ("unknown", "/t"),
        ("a", "/t"),
    ]
    assert environ["PATH"] == os.environ["PATH"]
    assert [listener.fd for listener in listeners] == [-1, -1]  # closed by now
    assert not os.path.exists(path)


def test_a_listener_that_cannot_be_opened_closes_the_others(served, tmp_path, capfd):
    path = str(tmp_path / "s")
    assert cli.main([PROG, f"--listen={path}", f"--listen={path}", "/t"]) == 1
    assert capfd.readouterr().err == f"Failed to listen on {path}: Address already in use\n"
    assert not os.path.exists(path)
    assert served == []


def test_a_pair_without_a_listener_is_a_warning(served, capfd):
    assert cli.main([PROG, f"--listen=a={UNUSED}", "a=/t", "b=/u"]) == 0
    assert capfd.readouterr().err == (
        "No listener has the name 'b', its target is not used. Listeners: 'a'.\n"
    )


def test_a_listener_without_a_pair_is_an_error(served, capfd):
    assert cli.main([PROG, f"--listen=c={UNUSED}", "a=/t"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"No target for listener 'c' ({UNUSED}): the targets are for 'a'."


def test_an_internal_error_has_a_traceback_at_debug_level(served, monkeypatch, capfd):
    monkeypatch.setattr(sys.modules["proxyd.server"], "run", lambda *_, **_options: {}["x"])
    monkeypatch.setenv("SYSTEMD_LOG_LEVEL", "debug")
    assert cli.main([PROG, f"--listen={UNUSED}", "/t"]) == 1
    lines = capfd.readouterr().err.splitlines()
    (at,) = [n for n, line in enumerate(lines) if line.startswith("Internal error in <lambda>")]
    assert lines[at + 1] == "Traceback (most recent call last):"
    assert lines[-1] == "KeyError: 'x'"


def test_the_package_can_be_run():
    command = [sys.executable, "-m", "proxyd", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("systemd-socket-proxyd ")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(24, "Too many open files"), "Failed: Too many open files"),
        (MemoryError(), "Out of memory."),
        (UsageError("No."), "No."),
        (ImportError("no relay"), "Failed to start: no relay"),
        (KeyError("x"), "Internal error in fail, test_cli.py:{}: KeyError: 'x'"),
    ],
)
def test_failures_are_one_line(served, monkeypatch, capfd, error, line):
    def fail(*_arguments, **_options):
        raise error

    monkeypatch.setattr(sys.modules["proxyd.server"], "run", fail)
    assert cli.main([PROG, f"--listen={UNUSED}", "/t"]) == 1
    assert capfd.readouterr().err == line.format(fail.__code__.co_firstlineno + 1) + "\n"


def interrupt_handler(handler, monkeypatch):
    """SIGINT's handler when the installed command calls main(), if it was `handler` before."""
    command = os.path.join(os.path.dirname(sys.executable), "systemd-socket-proxyd")
    seen = []
    monkeypatch.setattr(cli, "main", lambda: seen.append(signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, handler)
    with pytest.raises(SystemExit):
        runpy.run_path(command)
    return seen[0]


def test_no_keyboard_interrupt(monkeypatch):
    assert interrupt_handler(signal.default_int_handler, monkeypatch) is signal.SIG_DFL


def test_an_ignored_sigint_stays_ignored(monkeypatch):
    assert interrupt_handler(signal.SIG_IGN, monkeypatch) is signal.SIG_IGN


def test_a_connection_and_a_listener_do_not_mix(served, monkeypatch, capfd):
    left, right = socket.socketpair()
    listener = Listener(left.detach(), "connection", address.pack_unix("@x"), connected=True)
    monkeypatch.setattr(cli, "inherited", lambda *_, **__: [listener])
    assert cli.main([PROG, "--listen=127.0.0.1:0", "/t"]) == 1
    assert "must be the only one" in capfd.readouterr().err
    right.close()


def test_sockets_of_an_earlier_process_with_the_same_pid():
    options = parse_args(["x", "a:1"])
    passed = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
    assert "an earlier process with the same PID" in cli._why_no_sockets(options, passed)
