"""A booted systemd in systemd-nspawn on an overlay of a root folder, and commands inside it."""

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from kit.containers import cgroup, root

# systemd 262 ends without a word on a cgroup v1 or hybrid host unless told to use v2 inside.
NSPAWN_ENVIRONMENT = {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}

BOOT_TIMEOUT = 60  # seconds; it takes less than one, on a machine that does nothing else
HALT_TIMEOUT = 20  # seconds; it takes 0.2


class ContainerError(Exception):
    """The container did not come up or does not answer; str() says why."""


class Overlay:
    """A throw-away writable view of `lower` at `.merged`; `remove()` leaves nothing behind."""

    def __init__(self, lower: Path, work: Path):
        self.folder = Path(tempfile.mkdtemp(prefix="run-", dir=work))
        self.merged = self.folder / "root"
        upper, inner = self.folder / "upper", self.folder / "work"
        for path in (self.merged, upper, inner):
            path.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={inner}"
        command = ["mount", "-t", "overlay", "overlay", "-o", options, str(self.merged)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            self.remove()
            raise root.Unavailable(f"no overlay in {work}: {done.stderr.strip()}")

    def remove(self) -> None:
        root.remove_tree(self.folder)


def remove_leftovers(work: Path) -> None:
    """Remove what runs that were killed have left (no other run is alive: we hold the lock)."""
    for folder in work.glob("run-*"):
        root.remove_tree(folder)
    cgroup.remove_leftovers("e2e-")


class Container:
    """systemd-nspawn as our child. `leader` is the host's pid of the container's pid 1."""

    def __init__(self, folder: Path, log: Path):
        self.folder = folder
        self.log = log
        self.boot()

    def boot(self) -> None:
        self.groups = container_groups()
        self.process = start_nspawn(self.folder, self.log, self.groups)
        self.leader = 0
        try:
            self.leader = self._wait_for_leader()
            self._wait_until_running()
        except BaseException:
            self.halt()
            raise

    def reboot(self) -> None:
        """Shut down and boot again, in the same overlay."""
        self.halt()
        self.boot()

    def _wait_for_leader(self) -> int:
        deadline = time.monotonic() + BOOT_TIMEOUT
        while time.monotonic() < deadline:
            self._check_alive()
            leader = find_init(self.process.pid)
            if leader:
                return leader
            time.sleep(0.02)
        raise ContainerError(f"systemd-nspawn started no init, see {self.log}")

    def _wait_until_running(self) -> None:
        deadline = time.monotonic() + BOOT_TIMEOUT
        state = ""
        while time.monotonic() < deadline:
            self._check_alive()
            state = self.run("systemctl is-system-running").stdout.strip()
            if state in ("running", "degraded"):
                return
            time.sleep(0.05)
        raise ContainerError(f"systemd did not finish booting ({state or 'no answer'})")

    def _check_alive(self) -> None:
        if self.process.poll() is not None:
            tail = self.log.read_text(errors="replace").splitlines()[-15:]
            raise ContainerError("systemd-nspawn ended:\n" + "\n".join(tail))

    def command(self, argv: list[str]) -> list[str]:
        """`argv` as a command line of the host that runs it in all the container's namespaces."""
        return [*f"nsenter -t {self.leader} -m -u -i -n -p -C -r -w --".split(), *argv]

    def popen_in_our_network(self, argv: list[str]) -> subprocess.Popen:
        """Start a program of the container on this machine: only the files are the container's."""
        command = ["nsenter", "-t", str(self.leader), "-m", "--", *argv]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def run(
        self, script: str, timeout: float = 60, stdin: str | None = None
    ) -> subprocess.CompletedProcess:
        """Run a shell script inside. timeout(1) enforces the limit there: status 124 or 137."""
        argv = ["timeout", "-k", "1", str(timeout), "/bin/bash", "-c", script]
        pipe = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        return subprocess.run(
            self.command(argv),
            capture_output=True,
            check=False,
            encoding="utf-8",
            errors="replace",
            env=inner_environment(),
            **pipe,
        )

    def host_pid(self, inner_pid: int) -> int:
        """The host's number of the process that has `inner_pid` inside, 0 if there is none."""
        namespace = os.stat(f"/proc/{self.leader}/ns/pid").st_ino
        for pid in processes():
            try:
                if (
                    nspid(pid)[-1] == inner_pid
                    and os.stat(f"/proc/{pid}/ns/pid").st_ino == namespace
                ):
                    return pid
            except OSError:
                continue  # it ended meanwhile
        return 0

    def halt(self) -> None:
        """Shut the container down: one SIGTERM to nspawn is a clean halt."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(HALT_TIMEOUT)
        except subprocess.TimeoutExpired:
            if self.leader:
                os.kill(self.leader, signal.SIGKILL)  # takes every process of its namespace along
            self.process.kill()
            self.process.wait()
            raise ContainerError("the container did not halt and was killed") from None
        finally:
            for group in self.groups:
                cgroup.remove_group(group)


# Arguments: the groups to enter, "--", the command.
IN_GROUPS = """
until [ "$1" = -- ]; do echo $$ >"$1/cgroup.procs"; shift; done
shift; exec "$@"
"""


def container_groups() -> list[Path]:
    """Groups to start nspawn in: with --keep-unit it makes its own below them, and leaves them."""
    groups = (cgroup.make_group(name, f"e2e-{os.getpid()}") for name in ("", "name=systemd"))
    return [group for group in groups if group]


def start_nspawn(folder: Path, log: Path, groups: list[Path]) -> subprocess.Popen:
    # --pdeathsig: the container halts even if this process is killed.
    argv = [
        "sh",
        "-c",
        IN_GROUPS,
        "in-groups",
        *map(str, groups),
        "--",
        "setpriv",
        "--pdeathsig",
        "TERM",
        "--",
        "systemd-nspawn",
        "--register=no",
        "--keep-unit",
        f"--machine=e2e-{os.getpid()}",
        f"--directory={folder}",
        "--private-network",
        "--capability=CAP_IPC_LOCK",  # without it mlock(2) is filtered out, whatever the limit
        "--console=pipe",
        "--link-journal=no",
        "--resolv-conf=off",
        "--timezone=off",
        "--boot",
        "systemd.unit=basic.target",
    ]
    with log.open("w") as output:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **NSPAWN_ENVIRONMENT},
            start_new_session=True,
        )


def inner_environment() -> dict[str, str]:
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "SYSTEMD_PAGER": "",
        "SYSTEMD_COLORS": "0",
    }


def find_init(ancestor: int) -> int:
    """The pid of the descendant of `ancestor` that is pid 1 of its own namespace, or 0."""
    family = {ancestor}
    for pid in sorted(processes()):
        try:
            if parent(pid) in family:
                family.add(pid)
                numbers = nspid(pid)
                if len(numbers) > len(nspid(ancestor)) and numbers[-1] == 1:
                    return pid
        except OSError:
            continue
    return 0


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def parent(pid: int) -> int:
    return int(status_field(pid, "PPid"))


def nspid(pid: int) -> list[int]:
    """The numbers of a process from the host's namespace down to its own."""
    return [int(number) for number in status_field(pid, "NSpid").split()]


def status_field(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith(name + ":"):
                return line.split(":", 1)[1].strip()
    raise ProcessLookupError(pid)
