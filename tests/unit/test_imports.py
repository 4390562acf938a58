"""What a start imports: the first client waits for it. Run on the installed command."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import proxyd

PATIENCE = 30
"""Seconds after which something that has not happened counts as failed."""

COMMAND = Path(sys.executable).parent / "systemd-socket-proxyd"

SLOW = {
    "_collections_abc",
    "argparse",
    "asyncio",
    "collections",
    "contextlib",
    "dataclasses",
    "encodings.idna",
    "enum",
    "functools",
    "importlib.metadata",
    "inspect",
    "logging",
    "os",
    "re",
    "selectors",
    "signal",
    "socket",
    "struct",
    "threading",
    "traceback",
    "typing",
}
"""Each of them costs more than everything that the program needs. Their submodules count too."""

RARE = {
    "proxyd._datagram",
    "proxyd.bind",
    "proxyd.continuity",
    "proxyd.datagram_upstream",
    "proxyd.crc32c",
    "proxyd.datagrams",
    "proxyd.header_reader",
    "proxyd.inspection",
    "proxyd.journal",
    "proxyd.log_level",
    "proxyd.lookup",
    "proxyd.networks",
    "proxyd.ports",
    "proxyd.proxy_protocol",
    "proxyd.received_header",
    "proxyd.resolver",
    "proxyd.source_address",
    "proxyd.source_setup",
    "proxyd.sources",
    "proxyd.timespan",
    "proxyd.user_namespace",
    "proxyd.workers",
}
"""Our own modules that most starts do not need."""


def interpreter():
    """The words of the installed command's first line."""
    with COMMAND.open() as file:
        first = file.readline()
    assert first.startswith("#!"), first
    return shlex.split(first[2:])


def environment(**more):
    """An environment as a service manager makes it; what sanitizers are told stays."""
    told = {name: value for name, value in os.environ.items() if name.endswith("SAN_OPTIONS")}
    return {"PATH": os.environ["PATH"]} | told | more


def imported(log):
    """The modules that `-X importtime` names."""
    found = re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)$", log, re.MULTILINE)
    assert found, log
    return set(found)


def modules_of_bare_python():
    """What the interpreter itself imports."""
    program = interpreter()[0]
    done = subprocess.run(
        [program, "-X", "importtime", "-I", "-c", "pass"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return imported(done.stderr)


def modules_of_a_start(tmp_path, listener, *arguments, answers, command=COMMAND, flags=()):
    """What the command has imported when the first byte arrives at `answers`.

    It inherits `listener`, to which a client has connected before the start.
    """
    # Not a variable, as the interpreter may be told to ignore the environment.
    command = [*interpreter(), *flags, "-X", "importtime", str(command), *arguments]
    log = tmp_path / "log"
    with socket.socket(listener.family) as client, log.open("wb") as stderr:
        client.settimeout(PATIENCE)
        client.connect(listener.getsockname())
        client.sendall(b"x")
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(listener.fileno(), 3)
                os.dup2(stderr.fileno(), 2)
                os.set_inheritable(3, True)
                own = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
                os.execve(command[0], command, environment(**own))
            finally:
                os._exit(127)
        try:
            served, _ = answers.accept()
            with served:
                served.settimeout(PATIENCE)
                assert served.recv(1) == b"x"
                # All that was imported by now is in the file: it was written before the byte.
                before = log.read_text()
        finally:
            os.kill(pid, 15)
            status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0, log.read_text()
    return imported(before)


@pytest.fixture
def sockets(tmp_path):
    opened = []

    def make(kind):
        sock = socket.socket(kind)
        opened.append(sock)
        name = str(tmp_path / f"s{len(opened)}")
        sock.bind(("127.0.0.1", 0) if kind == socket.AF_INET else name)
        sock.listen()
        sock.settimeout(PATIENCE)
        return sock

    yield make
    for sock in opened:
        sock.close()


def target(sock):
    name = sock.getsockname()
    return name if isinstance(name, str) else f"{name[0]}:{name[1]}"


def unwanted(modules, names):
    """Those of `modules` that are among `names`, or submodules of them."""
    return {one for one in modules if any(f"{one}.".startswith(f"{name}.") for name in names)}


@pytest.mark.skipif(not COMMAND.exists(), reason=f"SKIPPED LOUDLY: no {COMMAND}")
@pytest.mark.parametrize("kind", [socket.AF_INET, socket.AF_UNIX])
def test_a_start_imports_little(tmp_path, sockets, kind):
    listener, backend = sockets(kind), sockets(kind)
    modules = modules_of_a_start(tmp_path, listener, target(backend), answers=backend)
    modules -= modules_of_bare_python()
    assert "proxyd._relay" in modules  # otherwise this was another program
    assert unwanted(modules, SLOW) == set()
    assert unwanted(modules, RARE) == set()
    # Apart from our own, only a handful of small C modules of the interpreter.
    others = {one for one in modules if not one.startswith("proxyd")}
    assert len(others) <= 8, others


@pytest.mark.skipif(not COMMAND.exists(), reason=f"SKIPPED LOUDLY: no {COMMAND}")
def test_a_start_without_site_does_not_import_what_site_would_have(tmp_path, sockets):
    """As from the DEB and the RPM: isolated, and told where the modules are."""
    command = tmp_path / "command"
    folder = str(Path(proxyd.__file__).parents[1])
    text = re.sub(
        "# A package whose interpreter .*?(?=^try:)",
        "",
        COMMAND.read_text(),
        flags=re.DOTALL | re.MULTILINE,
    )
    assert "PYTHONPATH" not in text
    command.write_text(text.replace("try:\n", f"sys.path.append({folder!r})\n\ntry:\n"))
    listener, backend = sockets(socket.AF_INET), sockets(socket.AF_INET)
    modules = modules_of_a_start(
        tmp_path, listener, target(backend), answers=backend, command=command, flags=("-I", "-S")
    )
    assert unwanted(modules, SLOW) == set()
    assert "_socket" in modules


@pytest.mark.skipif(not COMMAND.exists(), reason=f"SKIPPED LOUDLY: no {COMMAND}")
@pytest.mark.parametrize(
    "option", ["--exit-idle-time=5min", "--proxy-protocol=v2", "--connections-max=9"]
)
def test_options_import_nothing_slow(tmp_path, sockets, option):
    listener, backend = sockets(socket.AF_UNIX), sockets(socket.AF_UNIX)
    if option == "--proxy-protocol=v2":
        pytest.importorskip("proxyd.proxy_protocol")
        modules = modules_of_a_start_with_header(tmp_path, listener, option, backend)
    else:
        modules = modules_of_a_start(tmp_path, listener, option, target(backend), answers=backend)
    assert unwanted(modules - modules_of_bare_python(), SLOW) == set()


def modules_of_a_start_with_header(tmp_path, listener, option, backend):
    """The same with a PROXY header before the client's byte."""

    class AfterHeader:
        """Accepts a connection, and reads the header from it."""

        @staticmethod
        def accept():
            served, name = backend.accept()
            served.settimeout(PATIENCE)
            assert len(served.recv(16, socket.MSG_WAITALL)) == 16
            return served, name

    return modules_of_a_start(tmp_path, listener, option, target(backend), answers=AfterHeader)


@pytest.mark.skipif(not COMMAND.exists(), reason=f"SKIPPED LOUDLY: no {COMMAND}")
def test_a_name_does_not_load_the_idna_codec(tmp_path, sockets):
    listener, backend = sockets(socket.AF_INET), sockets(socket.AF_INET)
    port = backend.getsockname()[1]
    modules = modules_of_a_start(tmp_path, listener, f"localhost:{port}", answers=backend)
    assert unwanted(modules - modules_of_bare_python(), SLOW) == set()
    assert "proxyd.resolver" in modules


def test_the_package_itself_imports_nothing():
    program = (
        "import sys; before = set(sys.modules); import proxyd; print(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert done.stdout.split() == ["proxyd"]
