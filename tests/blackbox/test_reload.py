"""Promise: SIGHUP executes the program again in place, and connections see no more than a pause."""

import os
import shutil
import signal
import socket
import sys

import pytest
from kit.differences import differs
from kit.sockets import read_exactly, read_to_end, reset
from kit.traffic import greet, in_background, payload
from kit.waiting import wait_until

pytestmark = differs("original", reason="SIGHUP ends it")


def reload(stage):
    """Reload, and wait until the new program serves."""
    proxy = stage.proxy
    reloads = len(proxy.log_lines("Reloading with"))
    proxy.notify.clear()
    proxy.send_signal(signal.SIGHUP)
    proxy.notify.wait_for("READY=1")
    lines = [line for line in proxy.notify.lines() if line in {"RELOADING=1", "READY=1"}]
    assert lines[0] == "RELOADING=1"
    assert len(proxy.log_lines("Reloading with")) == reloads + 1, proxy.log()


families = pytest.mark.parametrize("family", ["tcp4", "tcp6", "unix"])


@families
@pytest.mark.parametrize("threads", ["1", "3"])
def test_connections_go_on(stage, family, threads):
    echo = stage.echo(family)
    stage.launch(f"--threads={threads}", echo, listeners=[stage.listener(family)])
    pid = stage.proxy.pid
    clients = [stage.connect() for _ in range(20)]
    for client in clients:
        greet(client)
    for _ in range(3):
        reload(stage)
        for client in clients:
            greet(client)
    greet(stage.connect())
    assert stage.proxy.pid == pid
    assert "Going on with 20 open and 0 waiting connections." in stage.proxy.log()


@families
@pytest.mark.parametrize("threads", [[], ["--threads=3", "--hand-over=always"]], ids=["1", "3"])
def test_a_stream_during_reloads(stage, family, threads):
    client, target = stage.pair(family, family, *threads)
    up, down = payload(30_000_000), payload(30_000_000, 2)
    jobs = [
        in_background(lambda: client.sendall(up)),
        in_background(lambda: target.sendall(down)),
        in_background(lambda: read_exactly(client, len(down))),
        in_background(lambda: read_exactly(target, len(up))),
    ]
    for _ in range(3):
        reload(stage)
    assert jobs[2].result() == down
    assert jobs[3].result() == up
    client.shutdown(socket.SHUT_WR)
    reload(stage)
    assert read_to_end(target) == (b"", "eof")
    target.sendall(b"last words")
    target.close()
    assert read_to_end(client) == (b"last words", "eof")


def test_held_clients_keep_their_deadline_and_their_words(stage):
    backend = stage.absent()
    stage.launch("--connect-timeout=1min", backend.target, listeners=[stage.listener()])
    client = stage.connect()
    client.sendall(b"question")
    stage.proxy.wait_for_log("holding")
    reload(stage)
    assert "Going on with 0 open and 1 waiting connections." in stage.proxy.log()
    backend.start_listening()
    server = backend.accept()
    assert read_exactly(server, 8) == b"question"
    server.sendall(b"answer")
    assert read_exactly(client, 6) == b"answer"


def test_its_own_listeners_keep_their_backlog(stage):
    path = stage.path("socket")
    stage.launch(f"--listen={path}", "--listen=127.0.0.1:0", stage.echo())
    client = stage.connect_to(path, socket.AF_UNIX)
    greet(client)
    inode = os.stat(path).st_ino
    reload(stage)
    greet(client)
    greet(stage.connect_to(path, socket.AF_UNIX))
    assert os.stat(path).st_ino == inode
    stage.proxy.send_signal(signal.SIGTERM)
    assert stage.proxy.wait() == 0
    assert not os.path.exists(path)


def test_a_version_that_does_not_start(stage):
    """The old one goes on, and says so in one line."""
    stage.executable = shutil.copy(stage.executable, stage.path("command"))
    stage.launch(stage.echo(), listeners=[stage.listener()])
    client = stage.connect()
    greet(client)
    with open(stage.executable, "r+") as script:
        first = script.readline()
        script.truncate(0)
        script.seek(0)
        script.write(f"{first}raise SystemExit(3)\n")
    stage.proxy.notify.clear()
    stage.proxy.send_signal(signal.SIGHUP)
    stage.proxy.notify.wait_for("READY=1")
    (line,) = stage.proxy.log_lines("Not reloaded")
    assert "its exit status is 3" in line
    greet(client)
    greet(stage.connect())


def test_sighup_is_ignored_while_stopping(stage):
    """A service manager may send it after SIGTERM (SendSIGHUP=)."""
    stage.launch("--drain-timeout=1min", stage.echo(), listeners=[stage.listener()])
    client = stage.connect()
    greet(client)
    stage.proxy.send_signal(signal.SIGTERM)
    stage.proxy.notify.wait_for("STOPPING=1")
    stage.proxy.send_signal(signal.SIGHUP)
    greet(client)
    client.close()
    assert stage.proxy.wait() == 0
    assert not stage.proxy.log_lines("Reloading")


TAKE_TERMINAL = """
import os, sys
os.setsid()
os.open(sys.argv[1], os.O_RDWR)  # the first terminal of a session controls it
os.execvp(sys.argv[2], sys.argv[2:])
"""


def test_with_a_terminal_sighup_ends_it(stage):
    """There it says that the terminal is gone. As SIGTERM does, after connections have finished."""
    keyboard, terminal = os.openpty()
    stage.launch(
        "--drain-timeout=1min",
        stage.echo(),
        listeners=[stage.listener()],
        prefix=[sys.executable, "-c", TAKE_TERMINAL, os.ttyname(terminal)],
    )
    client = stage.connect()
    greet(client)
    stage.proxy.send_signal(signal.SIGHUP)
    stage.proxy.notify.wait_for("STOPPING=1")
    greet(client)
    client.close()
    assert stage.proxy.wait() == 0
    os.close(terminal)
    os.close(keyboard)


def test_a_reset_after_a_reload_is_passed_on(stage):
    client, target = stage.pair("tcp4", "tcp4")
    client.sendall(b"word")
    assert read_exactly(target, 4) == b"word"
    reload(stage)
    reset(client)
    with pytest.raises(ConnectionResetError):
        target.recv(1)


def test_what_is_open_stays_the_same(stage):
    """No descriptor is left over, however often it reloads."""
    stage.launch(stage.echo(), listeners=[stage.listener()])
    client = stage.connect()
    greet(client)
    reload(stage)
    greet(client)
    before = len(stage.proxy.fds())
    for _ in range(3):
        reload(stage)
    greet(client)
    wait_until(lambda: len(stage.proxy.fds()) == before, "no more descriptors than before")
