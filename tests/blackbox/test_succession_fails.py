"""Promise: a restart or reload that fails costs no more than it must, and says so in one line."""

import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
from kit.differences import differs
from kit.manager import restart, start, stop
from kit.sockets import read_exactly, read_to_end
from kit.traffic import greet
from kit.waiting import wait_until

pytestmark = differs("original", reason="it cuts its connections", run=False)


def fail_to_reload(stage):
    """Reload; the line that says why that has failed."""
    stage.proxy.notify.clear()
    stage.proxy.send_signal(signal.SIGHUP)
    stage.proxy.notify.wait_for("READY=1")
    (line,) = stage.proxy.log_lines("Not reloaded")
    return line


def own_interpreter(stage):
    """A copy of the command, run by an interpreter of its own that can be taken away."""
    script = Path(stage.executable).read_text().partition("\n")[2]
    folder = Path(stage.path("environment"))
    (folder / "bin").mkdir(parents=True)
    (folder / "lib").symlink_to(Path(sys.prefix) / "lib")
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", folder)
    interpreter = folder / "bin" / "python"
    interpreter.symlink_to(os.path.realpath(sys.executable))
    command = folder / "bin" / "command"
    command.write_text(f"#!{interpreter}\n{script}")
    command.chmod(0o755)
    return command


REMOVE_THE_INTERPRETER = "import os, sys\nos.unlink(sys.executable)\n"


def test_an_execve_that_fails(stage):
    """The trial has succeeded; connections had been stopped, and go on where they were."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("not run in a virtual environment")
    absent, echo = stage.absent(), stage.echo()
    command = own_interpreter(stage)
    stage.executable = str(command)
    first, second = stage.listener(), stage.listener()
    targets = [f"web={echo}", f"late={absent.target}", "--connect-timeout=1min"]
    stage.launch(*targets, listeners=[first, second], names="web:late")
    client, held = stage.connect(first), stage.connect(second)
    greet(client)
    held.sendall(b"question")
    stage.proxy.wait_for_log("holding")
    fds = len(stage.proxy.fds())
    command.write_text(f"#!{command.parent}/python\n{REMOVE_THE_INTERPRETER}")
    assert "cannot go on with the connections: No such file or directory" in fail_to_reload(stage)
    greet(client)
    other = stage.connect(first)
    greet(other)
    other.close()
    absent.start_listening()
    server = absent.accept()
    assert read_exactly(server, 8) == b"question"
    server.sendall(b"answer")
    server.close()
    assert read_to_end(held) == (b"answer", "eof")  # not a reset, as it would be in a parcel
    held.close()
    wait_until(lambda: len(stage.proxy.fds()) <= fds, "no more descriptors than before")


def test_a_reload_without_descriptors(stage):
    stage.launch(stage.echo(), listeners=[stage.listener()])
    client = stage.connect()
    greet(client)
    limit = stage.proxy.leave_no_fd()
    assert "Too many open files" in fail_to_reload(stage)
    greet(client)
    stage.proxy.set_fd_limit(limit)
    stage.proxy.notify.clear()
    stage.proxy.send_signal(signal.SIGHUP)
    stage.proxy.notify.wait_for("READY=1")
    assert stage.proxy.log_lines("Reloading with 1 open")
    greet(client)
    greet(stage.connect())


def test_a_stop_without_descriptors(stage, manager):
    """There is no room for a parcel: as without a store."""
    stage.launch(stage.echo(), listeners=[stage.listener()], names="web", notify=manager)
    client = stage.connect()
    greet(client)
    stage.proxy.leave_no_fd()
    stop(stage)
    assert stage.proxy.log_lines("Failed to keep the connections: Too many open files")
    assert "1 open and 0 waiting connections were cut" in stage.proxy.log()
    assert read_to_end(client) == (b"", "reset")


def test_a_process_that_ends_before_it_has_read_the_parcel(stage, manager):
    """The service manager has it still, for the start after that."""
    echo = stage.echo()
    stage.launch(echo, listeners=[stage.listener()], names="web", notify=manager)
    client = stage.connect()
    greet(client)
    stop(stage)
    ((name, stored),) = manager.stored
    listeners = [one for one in stage.proxy.listeners if isinstance(one, socket.socket)]
    outcome = stage.run("--no-such-option", echo, listeners=[*listeners, stored])
    assert (outcome.status, len(manager.stored), name) == (1, 1, "proxyd-parcel")
    start_again(stage, manager, listeners, echo)
    greet(client)


def start_again(stage, manager, listeners, *arguments):
    stage.proxy.listeners = listeners
    start(stage, manager, *arguments)
    wait_until(lambda: not manager.stored, "FDSTOREREMOVE=1")


def test_a_restart_after_a_failed_one(stage, manager):
    """What could not be kept has no effect on what comes later."""
    echo = stage.echo()
    stage.launch(echo, listeners=[stage.listener()], names="web", notify=manager)
    client = stage.connect()
    greet(client)
    stage.proxy.leave_no_fd()
    stop(stage)
    wait_until(lambda: not manager.stored, "what was stored to be removed")
    start(stage, manager, echo)
    assert read_to_end(client) == (b"", "reset")
    client = stage.connect()
    greet(client)
    restart(stage, manager, echo)
    greet(client)
