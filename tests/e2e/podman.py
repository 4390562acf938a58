"""A real rootless container of Podman, in namespaces of its own on this machine.

Nothing of the machine changes: devices are given away in a mount namespace of ours, and all
processes end with the first one of their process namespace.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

USER = 65534  # an ordinary one, with no name in particular

START_TIMEOUT = 60  # seconds; it takes three, on a machine that does nothing else

OPTIONS = "--cgroup-manager=cgroupfs --events-backend=file --storage-driver=vfs --runtime=crun"

# Arguments: the folder, the command that is to run as the user.
AS_USER = """
set -e
umount /sys/fs/cgroup/unified 2>/dev/null || true
mkdir "$1/dev" && mount -t tmpfs -o mode=755 dev "$1/dev"
mknod -m 666 "$1/dev/tun" c 10 200 && mount --bind "$1/dev/tun" /dev/net/tun
mknod -m 666 "$1/dev/fuse" c 10 229 && mount --bind "$1/dev/fuse" /dev/fuse
folder=$1 user=$2; shift 2; cd "$folder"
exec setpriv --reuid="$user" --regid="$user" --clear-groups --pdeathsig KILL -- env -i \\
    PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME="$folder/home" XDG_RUNTIME_DIR="$folder/run" "$@"
"""

# It listens once it may, and answers each connection with a line.
APPLICATION = """#!/bin/sh
: >/started
until test -e /go; do sleep 0.1; done
exec nc -ll -p 80 -e /bin/answer
"""
ANSWER = '#!/bin/sh\nread word\necho "answer $word"\n'


class NoPodman(Exception):
    """Podman cannot run here; str() says why."""


class PublishedPort:
    """A container whose port is published on `port` of 127.0.0.1, and accepts at once.

    What listens behind it does so after `let_it_listen()`.
    """

    def __init__(self) -> None:
        missing = [
            tool for tool in ("podman", "crun", "busybox", "unshare") if not shutil.which(tool)
        ]
        if missing:
            raise NoPodman(f"missing: {' '.join(missing)}")
        self.folder = Path(tempfile.mkdtemp(prefix="e2e-podman-"))
        self.port = free_port()
        self._log = (self.folder / "log").open("w+")
        self._make_root()
        self._process = self._start()
        try:
            self._wait_until_it_accepts()
        except BaseException:
            self.end()
            raise

    def let_it_listen(self) -> None:
        (self.folder / "root/go").touch()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
        shutil.rmtree(self.folder)

    def _make_root(self) -> None:
        tools = self.folder / "root/bin"
        tools.mkdir(parents=True)
        shutil.copy(shutil.which("busybox") or "", tools)
        for name in ("sh", "nc", "sleep", "test"):
            (tools / name).symlink_to("busybox")
        for name, text in (("application", APPLICATION), ("answer", ANSWER)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.folder.chmod(0o755)
        for name in ("home", "run", "root"):
            (self.folder / name).mkdir(exist_ok=True)
            os.chown(self.folder / name, USER, USER)
        (self.folder / "run").chmod(0o700)

    def _start(self) -> subprocess.Popen:
        publish = f"--publish=127.0.0.1:{self.port}:80"
        run = f"podman {OPTIONS} run --cgroups=disabled --rm {publish} --rootfs"
        own = "unshare --mount --propagation=private --pid --fork --mount-proc"
        script = ["sh", "-c", AS_USER, "as-user", str(self.folder), str(USER)]
        return subprocess.Popen(
            [*own.split(), *script, *run.split(), str(self.folder / "root"), "/bin/application"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def _wait_until_it_accepts(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not ((self.folder / "root/started").exists() and accepts(self.port)):
            if self._process.poll() is not None:
                raise NoPodman(f"podman ended: {self._last_line()}")
            if time.monotonic() > deadline:
                raise NoPodman(f"no container within {START_TIMEOUT} s: {self._last_line()}")
            time.sleep(0.05)

    def _last_line(self) -> str:
        lines = (self.folder / "log").read_text(errors="replace").splitlines()
        return lines[-1] if lines else "without a word"


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Client:
    """A client of 127.0.0.1:`port` that has sent a line."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 5)
        self._socket.sendall(b"word\n")

    def answer(self, seconds: float) -> bytes | None:
        """What it is answered, nothing if the connection ends, None if it is held."""
        self._socket.settimeout(seconds)
        try:
            return self._socket.recv(100)
        except TimeoutError:
            return None
        except ConnectionError:
            return b""

    def close(self) -> None:
        self._socket.close()
