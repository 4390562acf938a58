"""The programs that are compared, and how each is started and stopped."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench import sockets
from bench.store import Store

CACHE = Path(__file__).parent.parent / ".cache" / "bench"  # made by ci/bench
LAUNCH = str(CACHE / "bin" / "launch")
CONNECTIONS_MAX = 9_200  # two sockets each and a few pipes fit in 20000 descriptors
NGINX_STREAM = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
ORIGINAL = Path("lib/systemd/systemd-socket-proxyd")


class Failed(Exception):
    """A contender did not start, or did not do what was asked of it."""


@dataclass(frozen=True)
class Contender:
    """A program under test.

    ``argv`` makes its command line from (front address, target address, folder for its files).
    ``activated``: it inherits its listening socket as fd 3 instead of opening one itself.
    ``streams``, ``datagrams``: what it is measured with.
    ``forks``: it makes a process for each client.
    ``stores``: a service manager with a descriptor store has started it.
    """

    name: str
    version: str
    argv: Callable[[str, str, Path], list[str]] | None
    activated: bool = True
    streams: bool = True
    datagrams: bool = True
    forks: bool = False
    stores: bool = False


@dataclass
class Proxy:
    """A running contender; ``pids`` are all its processes, and empty for a direct connection.

    ``forks``: there is one for each client, too. ``store``: where it may leave descriptors.
    """

    address: str
    process: subprocess.Popen[bytes] | None = None
    pids: list[int] = field(default_factory=list)
    log: Path | None = None
    forks: bool = False
    store: Store | None = None

    def stop(self) -> None:
        """End it with SIGTERM, then SIGKILL. Raises Failed if it had exited before."""
        if self.process is None:
            return
        try:
            self._end(self.process)
        finally:
            if self.store:
                self.store.close()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        ended = process.poll()
        if self.forks:
            for pid in children(process.pid):
                os.kill(pid, signal.SIGTERM)
        if ended is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if ended is not None:
            raise Failed(f"ended by itself with {ended}: {self.last_words()}")

    def last_words(self) -> str:
        """Return the end of what it wrote to stderr."""
        text = self.log.read_text(errors="replace") if self.log else ""
        return text.strip()[-300:]


def start(
    contender: Contender,
    front: str,
    target: str,
    folder: Path,
    cpu: int,
    backend: socket.socket | None = None,
) -> Proxy:
    """Start ``contender`` on ``cpu`` between a listener of family ``front`` and ``target``.

    ``backend``: the socket of the target, which datagrams need.
    """
    if contender.argv is None:
        return Proxy(target)
    log = folder / "log"
    listener, address = sockets.bind(front, folder / "front")
    fd = listener.fileno()
    if not contender.activated:
        listener.close()
        (folder / "front").unlink(missing_ok=True)
    command = contender.argv(address, target, folder)
    store = Store(folder / "notify") if contender.stores else None
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [LAUNCH, str(cpu), str(fd if contender.activated else -1), *command],
            pass_fds=[fd] if contender.activated else [],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env=os.environ | (store.environment if store else {}),
        )
    listener.close()
    proxy = Proxy(address, process, [process.pid], log, contender.forks, store)
    try:
        await_service(proxy, backend if sockets.is_datagram(front) else None)
    except Failed:
        process.kill()
        process.wait()
        if store:
            store.close()
        raise
    if not contender.forks:
        proxy.pids += children(process.pid)
    return proxy


def await_service(proxy: Proxy, backend: socket.socket | None) -> None:
    """Wait until a connection has been accepted, so that the work of a start is done.

    ``backend``: wait until a datagram has come there instead.
    """
    assert proxy.process is not None
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and proxy.process.poll() is None:
        try:
            if backend is None:
                sockets.connect(proxy.address).close()
            else:
                send_one(proxy.address, backend)
        except OSError:
            time.sleep(0.01)
        else:
            time.sleep(0.05)
            return
    raise Failed(f"does not serve: {proxy.last_words()}")


def send_one(address: str, backend: socket.socket) -> None:
    """Send a datagram; raises BlockingIOError if it does not reach ``backend`` soon."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"anybody?", ("127.0.0.1", int(address.rpartition(":")[2])))
        time.sleep(0.02)
        backend.recv(100)


def children(pid: int) -> list[int]:
    """Return the child processes of ``pid`` (the worker of nginx is one)."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[1]) == pid:
            found.append(int(status.parent.name))
    return found


def find(
    executable: Path, options: Sequence[str] = (), before: Path | None = None
) -> dict[str, Contender]:
    """All contenders that this machine has, by name, in the order of the report.

    ``options`` are for the program of this repository; ``before`` is another build of it.
    """
    originals = [found for found in (distro_original(), newest_original()) if found]
    originals.sort(key=lambda contender: contender.name)
    candidates = [
        ours(executable, options),
        control(executable, options),
        with_store(executable, options),
        earlier(before, options),
        *originals,
        haproxy(),
        nginx(),
        socat(),
        direct(),
        two_threads(executable, options),
    ]
    return {contender.name: contender for contender in candidates if contender}


def direct() -> Contender:
    """No proxy: what the load generator and the kernel can do."""
    return Contender("direct", "no proxy", None)


def ours(executable: Path, options: Sequence[str]) -> Contender | None:
    """The program of this repository."""
    if not executable.exists():
        return None
    version = first_line([str(executable), "--version"])
    return Contender("ours", " ".join([version, *options]), forwarder([str(executable), *options]))


def earlier(executable: Path | None, options: Sequence[str]) -> Contender | None:
    """The build that a change is compared with."""
    one = ours(executable, options) if executable else None
    return one and replace(one, name="before")


def control(executable: Path, options: Sequence[str]) -> Contender | None:
    """The program of this repository once more: how far two equal programs are apart."""
    one = ours(executable, options)
    return one and replace(one, name="control")


def with_store(executable: Path, options: Sequence[str]) -> Contender | None:
    """The program of this repository, with a descriptor store: its connections outlive a kill."""
    one = ours(executable, options)
    return one and replace(one, name="store", stores=True)


def two_threads(executable: Path, options: Sequence[str]) -> Contender | None:
    """The program of this repository with two threads."""
    one = ours(executable, ["--threads=2", *options])
    return one and replace(one, name="ours-2")


def forwarder(program: list[str]) -> Callable[[str, str, Path], list[str]]:
    """The command line that this program and the originals have in common."""

    def argv(_front: str, target: str, _folder: Path) -> list[str]:
        return [*program, f"--connections-max={CONNECTIONS_MAX}", sockets.host_form(target)]

    return argv


def distro_original() -> Contender | None:
    """The original that this distribution ships."""
    program = Path("/") / ORIGINAL
    return original([str(program)]) if program.exists() else None


def newest_original() -> Contender | None:
    """The original of Debian unstable, in the folder that bench/newest-original made.

    It is started by the dynamic loader of that folder, because libc there is newer than here.
    """
    root = CACHE / "unstable" / "usr"
    if not (root / ORIGINAL).exists():
        return None
    libraries = next(path.parent for path in root.glob("lib/*/ld-linux*.so*"))
    loader = next(libraries.glob("ld-linux*.so*"))
    path = f"{libraries}:{libraries}/systemd"
    return original([str(loader), "--library-path", path, str(root / ORIGINAL)])


def original(program: list[str]) -> Contender:
    """A systemd-socket-proxyd in C, named after its major version."""
    version = first_line([*program, "--version"])
    major = re.sub(r"\D.*", "", version.removeprefix("systemd "))
    return Contender(f"original-{major}", version, forwarder(program), datagrams=False)


def first_line(command: list[str]) -> str:
    """Return the first line that ``command`` prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip().partition("\n")[0]


def haproxy() -> Contender | None:
    """HAProxy, in TCP mode with `splice-auto`, one thread."""
    program = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if not program:
        return None

    def argv(front: str, target: str, folder: Path) -> list[str]:
        settings = folder / "haproxy.cfg"
        settings.write_text(HAPROXY % (CONNECTIONS_MAX, haproxy_form(front), haproxy_form(target)))
        return [program, "-db", "-f", str(settings)]

    version = version_of([program, "-v"])
    return Contender("haproxy", version, argv, activated=False, datagrams=False)


HAPROXY = """\
global
  nbthread 1
  maxconn %d
  maxpipes 500
defaults
  mode tcp
  option splice-auto
  timeout connect 10s
  timeout client 1h
  timeout server 1h
listen bench
  bind %s
  server target %s
"""


def haproxy_form(address: str) -> str:
    """``127.0.0.1:PORT`` or ``unix@/PATH``."""
    form = sockets.host_form(address)
    return f"unix@{form}" if form.startswith("/") else form


def nginx() -> Contender | None:
    """The stream module of nginx, one worker."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if not program or not NGINX_STREAM.exists():
        return None

    def argv(front: str, target: str, folder: Path) -> list[str]:
        settings = folder / "nginx.conf"
        values = {
            "module": NGINX_STREAM,
            "folder": folder,
            "connections": 2 * CONNECTIONS_MAX + 100,
            "front": nginx_form(front) + (" udp" if sockets.is_datagram(front) else ""),
            "target": nginx_form(target),
            # It would keep a flow of one question for the time-out, if nobody told it.
            "more": "proxy_responses 1;" if front.startswith("udp1") else "",
        }
        settings.write_text(NGINX % values)
        return [program, "-p", str(folder), "-c", str(settings), "-e", "stderr"]

    return Contender("nginx", version_of([program, "-v"]), argv, activated=False)


NGINX = """\
load_module %(module)s;
user root;
daemon off;
worker_processes 1;
pid %(folder)s/nginx.pid;
error_log stderr crit;
events { worker_connections %(connections)d; }
stream {
  access_log off;
  proxy_timeout 1h;
  server { listen %(front)s; proxy_pass %(target)s; %(more)s }
}
"""


def nginx_form(address: str) -> str:
    """``127.0.0.1:PORT`` or ``unix:/PATH``."""
    form = sockets.host_form(address)
    return f"unix:{form}" if form.startswith("/") else form


def socat() -> Contender | None:
    """For datagrams only, with its own listening socket: it makes a process for each client."""
    program = shutil.which("socat")
    if not program:
        return None

    def argv(front: str, target: str, _folder: Path) -> list[str]:
        port = front.rpartition(":")[2]
        listen = f"UDP4-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork"
        return [program, listen, f"UDP4:{sockets.host_form(target)}"]

    version = re.search(r"version ([\d.]+)", subprocess.check_output([program, "-V"], text=True))
    return Contender(
        "socat",
        version.group(1) if version else "unknown",
        argv,
        activated=False,
        streams=False,
        forks=True,
    )


def version_of(command: list[str]) -> str:
    """Return the first dotted number in the first line that ``command`` prints."""
    found = re.search(r"\d+\.\d+[\w.+-]*", first_line(command))
    return found.group() if found else "unknown"
