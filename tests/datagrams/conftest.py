"""Real clients and servers of datagrams through the installed program.

    pytest tests/datagrams --programs=FOLDER --quic=PYTHON

FOLDER has the unpacked packages of the distribution, which are laid over the root folder in a mount
namespace; without it, only programs that are installed are used. PYTHON can import aioquic. What is
not there is skipped, with the reason.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from kit.waiting import patience, wait_until

OVERLAY = """
mount -t tmpfs programs {place}
mkdir {place}/programs {place}/root
cp -a {programs}/. {place}/programs
mount -t overlay programs -o lowerdir={place}/programs:/ {place}/root
for folder in proc dev sys run tmp; do mount --rbind /$folder {place}/root/$folder; done
echo ready
exec cat
"""
"""In a mount namespace: the root folder, with the programs in it. Ends with its input."""


def pytest_addoption(parser, pluginmanager):
    pluginmanager.import_plugin("kit.suite")
    group = parser.getgroup("datagrams")
    group.addoption("--programs", default="", help="a folder with unpacked packages")
    group.addoption("--quic", default="", help="an interpreter that can import aioquic")


class Programs:
    """Runs programs of the distribution, installed or unpacked."""

    def __init__(self, folder):
        self._keeper = None
        self._root = ""
        self.why_not = ""
        if folder and Path(folder).is_dir():
            self._enter(folder)

    def _enter(self, folder):
        if os.geteuid() != 0:
            self.why_not = ", and only root can use the unpacked ones"
            return
        self._place = tempfile.mkdtemp(prefix="programs-")
        script = OVERLAY.format(place=shlex.quote(self._place), programs=shlex.quote(str(folder)))
        self._keeper = subprocess.Popen(
            ["unshare", "--mount", "sh", "-ec", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if self._keeper.stdout.readline() != "ready\n":
            _, why = self._keeper.communicate()
            self.why_not = f", and the unpacked ones cannot be used: {why}"
            self._keeper = None
            return
        self._root = f"{self._place}/root"

    def command(self, program, *arguments, network=()):
        """What runs a program; skips the test if it is not there. `network`: a prefix."""
        name = program
        for folder in ("bin", "sbin", "games"):
            if self._keeper and os.path.exists(f"{self._inside}/usr/{folder}/{program}"):
                enter = ["nsenter", f"--mount=/proc/{self._keeper.pid}/ns/mnt"]
                return [*network, *enter, "chroot", self._root, f"/usr/{folder}/{name}", *arguments]
        found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/games")
        if found is None:
            pytest.skip(f"no {program} here{self.why_not}")
        return [*network, found, *arguments]

    @property
    def _inside(self):
        return f"/proc/{self._keeper.pid}/root{self._root}"

    def close(self):
        if self._keeper:
            self._keeper.communicate()  # it ends with its input
            shutil.rmtree(self._place, ignore_errors=True)


class Running:
    """Programs that run until the end of the test."""

    def __init__(self, folder):
        self._folder = folder
        self._processes = []

    def start(self, command, **options):
        """Start a program; its output is in a file."""
        log = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - until the end
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
        process.log = log
        self._processes.append(process)
        return process

    def output(self, process):
        """What it has written."""
        return os.pread(process.log.fileno(), 1 << 20, 0).decode(errors="replace")

    def wait_for_output(self, process, part):
        """Wait until it has written `part`."""
        wait_until(
            lambda: part in self.output(process) or process.poll() is not None,
            f"{part!r}; there: {self.output(process)!r}",
        )
        assert part in self.output(process), self.output(process)

    def stop(self, process):
        """End it, with all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.log.close()
        self._processes.remove(process)

    def close(self):
        for process in list(self._processes):
            self.stop(process)


@pytest.fixture(scope="session")
def programs(request):
    found = Programs(request.config.getoption("--programs"))
    yield found
    found.close()


@pytest.fixture
def running(stage):
    started = Running(stage.directory)
    yield started
    started.close()


@pytest.fixture
def quic(request):
    """An interpreter that can import aioquic."""
    python = request.config.getoption("--quic")
    if not python or not os.path.exists(python):
        pytest.skip("no aioquic here")
    return python


@pytest.fixture
def run():
    """Run a command to its end; its output."""

    def call(command, timeout=None, **options):
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout or 4 * patience(),
            check=False,
            **options,
        )
        assert done.returncode == 0, f"{command}: {done.returncode} {done.stdout}{done.stderr}"
        return done.stdout

    return call
