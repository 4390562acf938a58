"""The show of ci/demo: a web server, the proxy in front of it, and traffic through both.

Usage: ci/show COMMAND [--stay]

Everything lives in one temporary folder and ends with this program. Exit status 1 and one line on
stderr if anything is not as it should be.
"""

import hashlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from backend import BLOCK, large_file

LARGE = 256 << 20
PATIENCE = 60
"""Seconds until a step that should take one counts as failed."""


class ShowFailedError(Exception):
    """A step went wrong; str() is for the user."""


def check(fine: bool, what: str) -> None:
    """End the show unless `fine`."""
    if not fine:
        raise ShowFailedError(what)


def tell(label: str, text: str) -> None:
    """One line of the show."""
    print(f"  {label:<22} {text}", flush=True)


def free_port() -> int:
    """A TCP port that is free at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Proxy:
    """The running program, its own notification socket and what the kernel says about it."""

    def __init__(self, stack: ExitStack, folder: Path, command: list[str]) -> None:
        self.notifications = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.notifications.bind(str(folder / "notify"))
        self.notifications.settimeout(PATIENCE)
        self.log = folder / "proxy.log"
        environment = os.environ | {"NOTIFY_SOCKET": str(folder / "notify")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stderr=log)
        stack.callback(end, self.process)

    def wait_until_ready(self) -> None:
        """Wait for READY=1, as the service manager does."""
        self.notifications.settimeout(0.2)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            check(self.process.poll() is None, f"the proxy ended: {self.log.read_text().strip()}")
            try:
                if b"READY=1" in self.notifications.recv(4096).split(b"\n"):
                    return
            except TimeoutError:
                continue
        raise ShowFailedError("the proxy did not say READY=1")

    def cpu_seconds(self) -> float:
        """Processor time used so far."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def fds(self) -> int:
        """Open file descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory(self) -> str:
        """Resident memory, most of it the interpreter's."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return f"{int(status.split('VmRSS:')[1].split()[0]) / 1024:.1f} MB"


def end(process: subprocess.Popen[bytes]) -> int:
    """Ask `process` to end and wait for it; return its exit status."""
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise ShowFailedError(f"{process.args!r} does not end on SIGTERM") from None


def start_backend(stack: ExitStack, path: Path) -> None:
    """Start the web server on the UNIX socket `path` and wait until it listens."""
    script = Path(__file__).with_name("backend.py")
    backend = subprocess.Popen([sys.executable, script, path], stdout=subprocess.PIPE)
    stack.callback(end, backend)
    assert backend.stdout is not None
    check(backend.stdout.readline() == b"ready\n", "the web server did not start")


def request(port: int) -> http.client.HTTPConnection:
    """A connection to the proxy."""
    return http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)


def fetch_page(port: int) -> int:
    """Get the page; return its size."""
    connection = request(port)
    connection.request("GET", "/")
    body = connection.getresponse().read()
    connection.close()
    check(b"<h1>It works</h1>" in body, "the page is not the one the web server has")
    return len(body)


def download(port: int) -> str:
    """Get the large file; return its SHA-256."""
    connection = request(port)
    connection.request("GET", f"/large?bytes={LARGE}")
    digest = hashlib.sha256()
    with connection.getresponse() as response:
        while block := response.read(BLOCK):
            digest.update(block)
    connection.close()
    return digest.hexdigest()


def upload(port: int) -> str:
    """Send the large file; return the SHA-256 of what arrived."""
    connection = request(port)
    headers = {"Content-Length": str(LARGE)}
    connection.request("PUT", "/", body=large_file(LARGE), headers=headers)
    digest = connection.getresponse().read().decode()
    connection.close()
    return digest


def digest_of(blocks: Iterable[bytes]) -> str:
    """The SHA-256 of the blocks, one after the other."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def transfer(label: str, proxy: Proxy, expected: str, move: Callable[[], str]) -> None:
    """Move the large file one way and show that it is the same at both ends."""
    cpu, start = proxy.cpu_seconds(), time.monotonic()
    digest = move()
    seconds, cpu = time.monotonic() - start, proxy.cpu_seconds() - cpu
    check(digest == expected, f"{label}: SHA-256 {digest} arrived, {expected} was sent")
    tell(
        label,
        f"{LARGE >> 20} MiB in {seconds:.2f} s, SHA-256 equal at both ends ({digest[:12]}…), "
        f"{cpu:.2f} s of CPU in the proxy",
    )


def show_idle_connections(proxy: Proxy, port: int) -> None:
    """Count the descriptors that idle connections cost, while there are no other ones."""
    before = proxy.fds()
    idle = [request(port) for _ in range(10)]
    for connection in idle:
        connection.connect()
        connection.request("GET", "/")
        connection.getresponse().read()
    tell("ten idle connections", f"{proxy.fds() - before} descriptors, {proxy.memory()} resident")
    for connection in idle:
        connection.close()


def show_counters(proxy: Proxy) -> None:
    """Have the proxy log its counters."""
    size = proxy.log.stat().st_size
    proxy.process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + PATIENCE
    while not (text := proxy.log.read_text()[size:]).endswith("\n"):
        check(time.monotonic() < deadline, "the proxy does not answer SIGUSR1")
        time.sleep(0.01)
    tell("SIGUSR1, its counters", text.strip().replace("\n", "\n" + " " * 25))


def show_activation(stack: ExitStack, folder: Path, command: str, target: str) -> None:
    """The same, started by its first client through systemd-socket-activate."""
    activate = shutil.which("systemd-socket-activate")
    if activate is None:
        tell("socket activation", "not shown: there is no systemd-socket-activate here")
        return
    port = free_port()
    with (folder / "activate.log").open("wb") as log:
        service = subprocess.Popen(
            [activate, f"--listen=127.0.0.1:{port}", command, target], stderr=log
        )
    stack.callback(end, service)
    wait_for_listener(service, port)
    start = time.monotonic()
    size = fetch_page(port)
    seconds = time.monotonic() - start
    check(end(service) == 0, "the activated proxy did not exit with 0")
    tell(
        "socket activation",
        f"the first client started it, and received {size} bytes {seconds:.3f} s later",
    )


def wait_for_listener(service: subprocess.Popen[bytes], port: int) -> None:
    """Wait until a process listens on `port`, without connecting, which would start the service."""
    wanted = f"0100007F:{port:04X} 00000000:0000 0A"
    deadline = time.monotonic() + PATIENCE
    while wanted not in Path("/proc/net/tcp").read_text():
        check(service.poll() is None and time.monotonic() < deadline, "nothing listens")
        time.sleep(0.01)


def show(command: str, stay: bool) -> None:
    """The whole show."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="proxyd-demo-")))
        backend = folder / "web.socket"
        start_backend(stack, backend)
        port = free_port()
        arguments = [command, f"--listen=127.0.0.1:{port}", str(backend)]
        print("$", " ".join([Path(command).name, *arguments[1:]]))
        proxy = Proxy(stack, folder, arguments)
        proxy.wait_until_ready()
        tell("ready", f"process {proxy.process.pid}, {proxy.memory()} resident")
        show_idle_connections(proxy, port)
        tell("a page", f"{fetch_page(port)} bytes")
        expected = digest_of(large_file(LARGE))
        transfer("download", proxy, expected, lambda: download(port))
        transfer("upload", proxy, expected, lambda: upload(port))
        show_counters(proxy)
        show_activation(stack, folder, command, str(backend))
        if stay:
            stay_up(port)
        status = end(proxy.process)
        check(status == 0, f"the proxy ended with status {status}: {proxy.log.read_text()}")
        tell("SIGTERM", "ended with status 0")


def stay_up(port: int) -> None:
    """Wait for Ctrl-C or SIGTERM."""
    print(f"\nhttp://127.0.0.1:{port}/ stays up until Ctrl-C", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        print()


def main() -> int:
    """Run the show; return the exit status."""
    # SIGTERM, like Ctrl-C, unwinds the stack, and so ends everything that was started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        show(sys.argv[1], stay="--stay" in sys.argv[2:])
    except KeyboardInterrupt:
        return 130
    except ShowFailedError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except (OSError, http.client.HTTPException) as error:
        print(f"demo: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
