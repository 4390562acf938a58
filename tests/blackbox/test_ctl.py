"""The command socket-proxyctl on a running proxy. tests/ctl has its faults, with a stand-in."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from ctl.tmux import Tmux
from kit.differences import differs
from kit.file_limit import files_allowed
from kit.privileges import as_unprivileged_user
from kit.socket_state import was_reset
from kit.sockets import read_exactly, reset
from kit.traffic import in_background
from kit.varlink import text_of
from kit.waiting import patience, wait_until

pytestmark = differs("original", reason="cannot be inspected", run=False)

NORMAL = "0 1 1"
"""No alternate screen, a cursor, and lines that wrap."""


@pytest.fixture
def command(executable):
    """The installed command."""
    return Path(executable).parent / "socket-proxyctl"


@pytest.fixture
def ask(command, folder):
    """Run a command on the proxy of this test."""

    def run(*arguments, prefix=()):
        return subprocess.run(
            [*prefix, command, *arguments, f"--socket={folder}/inspect"],
            capture_output=True,
            text=True,
            timeout=patience() * 2,
            check=False,
        )

    return run


@pytest.fixture
def terminal(stage, folder):
    """A terminal of a size."""
    if not shutil.which("tmux"):
        pytest.skip("no tmux here")
    opened = []

    def call(columns, rows):
        environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TERM": "xterm-256color"}
        opened.append(Tmux(Path(stage.directory), environment, columns, rows))
        return opened[-1]

    yield call
    for one in opened:
        one.close()


def greet(client, server):
    client.sendall(b"x")
    assert read_exactly(server, 1) == b"x"


def test_list_and_terminate(stage, inspected, ask):
    backend = stage.backend()
    inspected(backend.target)
    clients = [stage.connect() for _ in range(3)]
    for client in clients:
        greet(client, backend.accept())
    title, *lines = ask("list").stdout.splitlines()
    assert title.split()[:3] == ["ID", "STATE", "CLIENT"]
    assert [line.split()[2] for line in lines] == [text_of(one.getsockname()) for one in clients]
    numbers = [line.split()[0] for line in lines]
    done = ask("terminate", numbers[0], numbers[2])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wait_until(lambda: was_reset(clients[0]) and was_reset(clients[2]), "the resets")
    (left,) = json.loads(ask("list", "--json=short").stdout)
    assert left["client"] == text_of(clients[1].getsockname())
    done = ask("terminate", numbers[0])
    assert done.returncode == 1
    assert done.stderr.endswith(": no such connection\n")


def test_what_another_user_may_do(stage, inspected, ask, command):
    prefix = as_unprivileged_user(command)
    inspected(stage.echo())
    for allowed in ("status", "metrics"):
        assert ask(allowed, prefix=prefix).returncode == 0
    for refused in (["list"], ["watch"], ["terminate", "1"]):
        done = ask(*refused, prefix=prefix)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "only root and the proxy's own user may do this" in done.stderr


def test_status(stage, inspected, ask):
    target = stage.absent().target
    inspected("--connect-timeout=1min", target)
    stage.connect()
    wait_until(lambda: "Connection refused" in ask("status").stdout, "the outage")
    text = ask("status").stdout
    assert f"Main PID: {stage.proxy.worker}\n" in text
    assert "Clients: 0 open, 1 held\n" in text
    line = next(line for line in text.splitlines() if re.match(rf" +{re.escape(target)} ", line))
    assert re.search(r" 1 +0 +0 +down since \d\d:\d\d:\d\d \(Connection refused\)$", line)


def test_watch_until_the_proxy_ends(stage, inspected, command, folder):
    backend = stage.backend()
    inspected(backend.target)
    with subprocess.Popen(
        [command, "watch", f"--socket={folder}/inspect"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        lines = []
        reading = in_background(lambda: lines.extend(iter(process.stdout.readline, "")))
        # The first ones may be too early for it.
        deadline = time.monotonic() + patience()
        while not lines and time.monotonic() < deadline:
            client = stage.connect()
            greet(client, backend.accept())
            client.close()
            backend.connections[-1].close()
        client = stage.connect()
        name = re.escape(text_of(client.getsockname()))
        greet(client, backend.accept())
        reset(client)
        begin = rf"[\d:.]{{12}} begin \d+ {name} -> {re.escape(backend.target)}\n"
        end = rf"[\d:.]{{12}} end   \d+ {name} -> .*: reset after \S+, 1B up, 0B down\n"
        wait_until(lambda: any(re.fullmatch(end, line) for line in lines), f"the end: {lines}")
        assert sum(bool(re.fullmatch(begin, line)) for line in lines) == 1
        assert stage.proxy.end()
        assert process.wait(patience()) == 1
        reading.result()
        assert process.stderr.read().endswith(
            "the proxy has ended, or has dropped a watcher that is slow\n"
        )


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (200, 60)])
def test_top_while_a_proxy_ends_and_comes_again(
    stage, inspected, command, folder, terminal, columns, rows
):
    backend, listener = stage.backend(), stage.listener()
    inspected(backend.target, listeners=[listener])
    for _ in range(rows + 5):
        greet(stage.connect(), backend.accept())
    screen = terminal(columns, rows)
    screen.start(command, "top", f"--socket={folder}/inspect", "--interval=100ms")
    screen.shows(f"Clients: {rows + 5} total, {rows + 5} open, 0 held")
    lines = screen.lines()
    assert len(lines) == rows
    assert all(len(line) <= columns for line in lines)
    assert "127.0.0.1:" in lines[5]
    stage.proxy.end()
    screen.shows("no answer: No such file or directory")
    inspected(backend.target, listeners=[listener])
    greet(stage.connect(), backend.accept())
    screen.shows("Clients: 1 total, 1 open")
    screen.press("q")
    screen.wait_for(lambda: screen.modes() == NORMAL, "the normal screen")


@pytest.fixture
def many_files():
    """Allow the files of a thousand clients, and of their echoes."""
    with files_allowed(8192):
        yield


@pytest.mark.usefixtures("many_files")
def test_many_connections_and_long_names(stage, inspected, ask, terminal, command, folder):
    path = stage.path("t" * (100 - len(stage.directory)))
    target = stage.echo("unix")
    Path(path).symlink_to(target)
    inspected("--connections-max=1100", path, listeners=[stage.listener()])
    clients = [stage.connect() for _ in range(1000)]
    for client in clients:
        client.sendall(b"x")
    for client in clients:
        assert read_exactly(client, 1) == b"x"
    lines = ask("list").stdout.splitlines()
    assert len(lines) == 1001
    assert all(path in line for line in lines[1:])
    assert len({len(line) - len(line.split()[-1]) for line in lines[1:]}) == 1  # straight columns
    screen = terminal(80, 24)
    screen.start(command, "top", f"--socket={folder}/inspect", "--interval=100ms")
    screen.shows("of 1000")
    assert all(len(line) <= 80 for line in screen.lines())
    assert re.search(r"…t+ ", screen.lines()[5])
    screen.press("q")
    screen.wait_for(lambda: screen.modes() == NORMAL, "the normal screen")
