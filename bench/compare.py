"""Try out what each forwarder does and does not do: the facts of the README's table.

Every contender forwards one listener to one target, with its defaults, and the table records what a
client sees. The answers are words and counts, not times, so other load on the machine does not
matter.
"""

import argparse
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench import contenders, memory, sockets
from bench.store import Store

PATIENCE = 15.0
"""Seconds after which something that has not come counts as missing."""

ACTIVATED = """LISTEN_PID=$$; LISTEN_FDS=1; export LISTEN_PID LISTEN_FDS; exec "$@" """
RESET = struct.pack("ii", 1, 0)
AT_REST = 20


@dataclass(frozen=True)
class Route:
    """What a forwarder is asked for: where from, where to, and further features.

    ``front`` is the port to listen on, 0 for an inherited listener (fd 3). ``target`` is
    ``tcp:PORT``, ``abstract:NAME`` or, for datagrams on both sides, ``udp:PORT``.
    """

    front: int
    target: str
    proxy: str = ""
    drain: bool = False
    reload: bool = False

    @property
    def datagrams(self) -> bool:
        """Whether it is datagrams that are to be forwarded."""
        return self.target.startswith("udp:")


Argv = Callable[[Route, Path], list[str]]


@dataclass(frozen=True)
class Peer:
    """A program, and its command line for a Route; None if it cannot do what is asked."""

    name: str
    version: str
    argv: Callable[[Route, Path], list[str] | None]


# --- the programs -------------------------------------------------------------------------------


def peers(executable: Path) -> list[Peer]:
    """Return all that are installed here."""
    found = contenders.find(executable)
    ours_or_original = [
        Peer(name, contender.version, like_the_original(contender.argv, name == "ours"))
        for name, contender in found.items()
        if (name == "ours" or name.startswith("original")) and contender.argv
    ]
    others = {"haproxy": haproxy, "nginx": nginx}
    known = [
        Peer(name, found[name].version, argv) for name, argv in others.items() if name in found
    ]
    if shutil.which("socat"):
        known.append(
            Peer("socat", contenders.first_line(["sh", "-c", "socat -V | sed -n 2p"]), socat_argv)
        )
    if shutil.which("nc"):
        known.append(Peer("nc loop", contenders.first_line(["nc", "-h"]), nc_loop))
    return ours_or_original + known


def like_the_original(argv: Argv, ours: bool) -> Callable[[Route, Path], list[str] | None]:
    """Return the command line of systemd-socket-proxyd: of this one, or of an original in C."""

    def command(route: Route, folder: Path) -> list[str] | None:
        program = [word for word in argv("", "tcp:1", folder)[:-1] if not word.startswith("--conn")]
        transport = "udp:" if route.datagrams else ""
        listen = [f"--listen={transport}127.0.0.1:{route.front}"] if route.front else []
        proxy = [f"--proxy-protocol={route.proxy}"] if route.proxy else []
        drain = ["--drain-timeout=10s"] if route.drain else []
        if not ours and (listen or drain):
            return None
        kind, _, rest = route.target.partition(":")
        target = f"@{rest}" if kind == "abstract" else f"127.0.0.1:{rest}"
        return [*program, *listen, *proxy, *drain, target]

    return command


def haproxy(route: Route, folder: Path) -> list[str] | None:
    kind, _, rest = route.target.partition(":")
    if route.datagrams:
        return None
    target = f"abns@{rest}" if kind == "abstract" else f"127.0.0.1:{rest}"
    bind = f"127.0.0.1:{route.front}" if route.front else "fd@3"
    send = {"": "", "v1": "send-proxy", "v2": "send-proxy-v2"}[route.proxy]
    settings = folder / "haproxy.cfg"
    settings.write_text(
        "global\n  nbthread 1\ndefaults\n  mode tcp\n"
        "  option splice-request\n  option splice-response\n"
        "  timeout connect 10s\n  timeout client 1h\n  timeout server 1h\n"
        f"listen proxy\n  bind {bind}\n  server target {target} {send}\n"
    )
    mode = ["-W"] if route.reload else []
    return [shutil.which("haproxy") or "/usr/sbin/haproxy", *mode, "-db", "-f", str(settings)]


def nginx(route: Route, folder: Path) -> list[str] | None:
    kind, _, rest = route.target.partition(":")
    if not route.front or route.proxy == "v2":
        return None
    target = f"unix:@{rest}" if kind == "abstract" else f"127.0.0.1:{rest}"
    udp = " udp" if route.datagrams else ""
    settings = folder / "nginx.conf"
    settings.write_text(
        f"load_module {contenders.NGINX_STREAM};\nuser root;\ndaemon off;\nworker_processes 1;\n"
        f"pid {folder}/nginx.pid;\nerror_log stderr crit;\nevents {{ }}\n"
        f"stream {{ server {{ listen 127.0.0.1:{route.front}{udp}; proxy_pass {target};\n"
        f"{'proxy_protocol on;' if route.proxy else ''} }} }}\n"
    )
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    return [program, "-p", str(folder), "-c", str(settings), "-e", "stderr"]


def socat_argv(route: Route, _folder: Path) -> list[str] | None:
    kind, _, rest = route.target.partition(":")
    if route.proxy:
        return None
    if route.datagrams:
        listen = f"UDP4-LISTEN:{route.front},bind=127.0.0.1,reuseaddr,fork"
        return ["socat", listen, f"UDP4:127.0.0.1:{rest}"] if route.front else None
    listen = (
        f"TCP-LISTEN:{route.front},bind=127.0.0.1,reuseaddr,fork"
        if route.front
        else "ACCEPT-FD:3,fork"
    )
    target = f"ABSTRACT-CONNECT:{rest}" if kind == "abstract" else f"TCP:127.0.0.1:{rest}"
    return ["socat", listen, target]


def nc_loop(route: Route, folder: Path) -> list[str] | None:
    kind, _, rest = route.target.partition(":")
    if not route.front or route.proxy or route.datagrams:
        return None
    target = f"-U @{rest}" if kind == "abstract" else f"127.0.0.1 {rest}"
    listen = f"nc -l 127.0.0.1 {route.front}"
    loop = f"while {listen} <{folder}/back | nc {target} >{folder}/back; do :; done"
    return ["sh", "-c", f"mkfifo {folder}/back && {loop}"]


# --- running one --------------------------------------------------------------------------------


@dataclass
class Running:
    """A started program with all its children, and the port to connect to."""

    process: subprocess.Popen[bytes]
    port: int
    argv: list[str]

    def pids(self) -> list[int]:
        """Its processes: those of the session that it was started in."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                if int(stat.read_text().rpartition(")")[2].split()[3]) == self.process.pid:
                    found.append(int(stat.parent.name))
        return found

    def kill(self) -> None:
        """End all of them."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def connect(self) -> socket.socket:
        """A client; it waits until the program listens."""
        deadline = time.monotonic() + PATIENCE
        while True:
            client = socket.socket()
            client.settimeout(PATIENCE)
            try:
                client.connect(("127.0.0.1", self.port))
                return client
            except ConnectionRefusedError:
                client.close()
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.02)


@contextmanager
def running(
    peer: Peer,
    target: str,
    *,
    activated: bool = False,
    environment: Mapping[str, str] | None = None,
    **asked: object,
) -> Iterator[Running]:
    """Start ``peer``, and end it afterwards. Raises LookupError if it cannot do what is asked.

    It opens its own listener if it can, and inherits one otherwise.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cmp-")))
        kind = socket.SOCK_DGRAM if target.startswith("udp:") else socket.SOCK_STREAM
        listener = stack.enter_context(closing(bound(kind)))
        if kind == socket.SOCK_STREAM:
            listener.listen(64)
        port = listener.getsockname()[1]
        front = 0 if activated else port
        argv = peer.argv(Route(front, target, **asked), folder)  # type: ignore[arg-type]
        inherits = activated or argv is None
        if argv is None and not activated:  # an original: it can only inherit its listener
            argv = peer.argv(Route(0, target, **asked), folder)  # type: ignore[arg-type]
        if argv is None:
            raise LookupError(peer.name)
        if not inherits:
            listener.close()
        log = stack.enter_context((folder / "log").open("wb"))
        process = subprocess.Popen(
            ["/bin/sh", "-c", ACTIVATED, "sh", *argv] if inherits else argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            preexec_fn=(lambda: os.dup2(listener.fileno(), 3)) if inherits else None,  # noqa: PLW1509 - no threads here
            pass_fds=[3] if inherits else [],
            start_new_session=True,
            env=os.environ | (environment or {}),
        )
        program = Running(process, port, argv)
        try:
            yield program
        finally:
            program.kill()


def bound(kind: socket.SocketKind, port: int = 0) -> socket.socket:
    """A socket at a port of the loopback; at a free one without ``port``."""
    one = socket.socket(type=kind)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
    one.settimeout(PATIENCE)
    one.bind(("127.0.0.1", port))
    return one


@contextmanager
def backend(port: int = 0) -> Iterator[socket.socket]:
    """A listening target."""
    with closing(socket.create_server(("127.0.0.1", port), backlog=64)) as listener:
        listener.settimeout(PATIENCE)
        yield listener


def accept(listener: socket.socket) -> socket.socket:
    connection = listener.accept()[0]
    connection.settimeout(PATIENCE)
    return connection


def target_of(listener: socket.socket) -> str:
    return f"tcp:{listener.getsockname()[1]}"


def read_all(sock: socket.socket) -> tuple[bytes, str]:
    """Return everything that came, and how it ended: `end`, `reset` or `nothing`."""
    got = b""
    try:
        while data := sock.recv(1 << 16):
            got += data
    except ConnectionResetError:
        return got, "reset"
    except TimeoutError:
        return got, "nothing"
    return got, "end"


@contextmanager
def connected(
    peer: Peer, **asked: object
) -> Iterator[tuple[Running, socket.socket, socket.socket]]:
    """A program, a client, and the target's end of its connection; a byte has gone each way."""
    with ExitStack() as stack:
        listener = stack.enter_context(backend())
        program = stack.enter_context(running(peer, target_of(listener), **asked))
        client = stack.enter_context(closing(program.connect()))
        client.sendall(b"?")
        server = stack.enter_context(closing(accept(listener)))
        while server.recv(1) not in (b"?", b""):
            pass
        server.sendall(b"!")
        assert client.recv(1) == b"!"
        yield program, client, server


# --- what is tried ------------------------------------------------------------------------------


def inherits(peer: Peer) -> str:
    """Serves a listener passed in as LISTEN_FDS (sd_listen_fds)"""
    with backend() as listener, running(peer, target_of(listener), activated=True) as program:
        return reaches(program, listener)


def reaches(program: Running, listener: socket.socket) -> str:
    with closing(program.connect()) as client:
        client.sendall(b"x")
        with closing(accept(listener)) as server:
            return "yes" if server.recv(1) == b"x" else "no"


def waits(peer: Peer) -> str:
    """Serves a client that came 1 s / 8 s before its target listened"""
    return " / ".join("yes" if waits_for(peer, seconds) else "no" for seconds in (1, 8))


def waits_for(peer: Peer, seconds: float) -> bool:
    with backend() as reserved:
        port = reserved.getsockname()[1]
    with running(peer, f"tcp:{port}") as program, closing(program.connect()) as client:
        client.sendall(b"x")
        client.settimeout(seconds)
        if read_all(client)[1] != "nothing":
            return False
        with backend(port) as listener:
            listener.settimeout(5)
            with closing(accept(listener)) as server:
                return server.recv(1) == b"x"


def half_close(peer: Peer) -> str:
    """Delivers a reply that begins 1 s after the client has ended its direction"""
    with connected(peer) as (_, client, server):
        client.shutdown(socket.SHUT_WR)
        assert read_all(server)[1] != "nothing"
        time.sleep(1)
        with suppress(OSError):
            server.sendall(b"reply")
        server.close()
        return "yes" if read_all(client)[0] == b"reply" else "no"


def reset(peer: Peer) -> str:
    """A reset by the target reaches the client as a reset"""
    with connected(peer) as (_, client, server):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        server.close()
        return {"reset": "yes", "end": "no: as a clean end", "nothing": "no"}[read_all(client)[1]]


def urgent(peer: Peer) -> str:
    """An urgent byte in mid-stream, and what follows it"""
    with connected(peer) as (_, client, server):
        client.send(b"u", socket.MSG_OOB)
        time.sleep(0.2)
        with suppress(OSError):
            client.sendall(b"after")
            client.shutdown(socket.SHUT_WR)
        got = read_all(server)[0]
        return {b"uafter": "in its place", b"after": "the byte is lost"}.get(got, "both are lost")


def zero_copy(peer: Peer) -> str:
    """Uses splice(2) for a stream of 64 MiB"""
    if not shutil.which("strace"):
        return "?"
    with connected(peer) as (program, client, server), tempfile.NamedTemporaryFile() as log:
        attach = [word for pid in program.pids() for word in ("-p", str(pid))]
        command = ["strace", "-f", "-qq", "-e", "trace=splice", "-o", log.name, *attach]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
        try:
            while not all(traced(pid) for pid in program.pids()):
                time.sleep(0.02)
            pump(client, server, 64 << 20)
        finally:
            tracer.terminate()
            tracer.communicate()
        return "yes" if b"splice(" in Path(log.name).read_bytes() else "no"


def traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


def pump(source: socket.socket, sink: socket.socket, size: int) -> None:
    """Send ``size`` bytes, and read them on the other side."""
    block = b"x" * (1 << 18)
    source.setblocking(False)
    sent = received = 0
    while received < size:
        if sent < size:
            with suppress(BlockingIOError):
                sent += source.send(block[: size - sent])
        received += len(sink.recv(1 << 20))


def proxy_protocol(peer: Peer) -> str:
    """Sends a PROXY protocol header"""
    signs = {"v1": b"PROXY TCP4 ", "v2": b"\r\n\r\n\0\r\nQUIT\n"}
    sent = [version for version, sign in signs.items() if sends(peer, version, sign)]
    return ", ".join(sent) or "no"


def sends(peer: Peer, version: str, sign: bytes) -> bool:
    try:
        with backend() as listener, running(peer, target_of(listener), proxy=version) as program:
            listener.settimeout(3)
            with closing(program.connect()) as client:
                client.sendall(b"x")
                with closing(accept(listener)) as server:
                    return server.recv(len(sign), socket.MSG_WAITALL) == sign
    except (LookupError, OSError):
        return False


def abstract(peer: Peer) -> str:
    """Reaches a target at an abstract UNIX address"""
    name = f"compare-{os.getpid()}"
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        listener.settimeout(3)
        with running(peer, f"abstract:{name}") as program:
            return reaches(program, listener)


def drains(peer: Peer) -> str:
    """An open connection outlives the signal to stop"""
    if outlives(peer, signal.SIGTERM):
        return "yes"
    other = OTHER_STOPS.get(peer.name)
    return f"on {other.name}" if other and outlives(peer, other) else "no"


OTHER_STOPS = {"haproxy": signal.SIGUSR1, "nginx": signal.SIGQUIT}


def outlives(peer: Peer, number: signal.Signals) -> bool:
    with connected(peer, drain=peer.name == "ours") as (program, client, server):
        for pid in program.pids():  # as a service manager does
            os.kill(pid, number)
        time.sleep(1)
        server.settimeout(3)
        with suppress(OSError):
            client.sendall(b"still")
            return server.recv(5) == b"still"
        return False


def reloads(peer: Peer) -> str:
    """An open connection goes on after a reload, and in the new program"""
    with connected(peer, reload=True) as (program, client, server):
        time.sleep(1)  # HAProxy's parent process is not ready for it when it serves
        before = images(program)
        os.kill(program.process.pid, OTHER_RELOADS.get(peer.name, signal.SIGHUP))
        deadline = time.monotonic() + PATIENCE / 3
        while time.monotonic() < deadline and not images(program) - before:
            time.sleep(0.02)
        if not images(program) - before:
            return "no"
        time.sleep(1)
        client.sendall(b"still")
        if server.recv(5) != b"still":
            return "no"
        program.connect().close()
        stays = len({pid for pid, _ in images(program)}) > len(before)
        return "in the old process, which stays" if stays else "yes"


OTHER_RELOADS = {"haproxy": signal.SIGUSR2}


def images(program: Running) -> set[tuple[int, bytes]]:
    """The processes, each with what tells two programs apart that it has executed."""
    found = set()
    for pid in program.pids():
        with suppress(OSError):
            found.add((pid, Path(f"/proc/{pid}/auxv").read_bytes()))
    return found


def survives(peer: Peer) -> str:
    """An open connection after the program was killed by SIGKILL, 3 s after its start"""
    with tempfile.TemporaryDirectory(prefix="cmp-") as folder:
        store = Store(Path(folder) / "notify")
        with closing(store), connected(peer, environment=store.environment) as ends:
            program, client, server = ends
            time.sleep(3)
            program.kill()
            if not store.kept:
                return {"end": "ends as if complete"}.get(read_all(client)[1], "is reset")
            next_one = start_again(program, store)
            try:
                client.sendall(b"still")
                return "goes on in the next process" if server.recv(5) == b"still" else "no"
            finally:
                next_one.kill()
                next_one.wait()


def start_again(program: Running, store: Store) -> "subprocess.Popen[bytes]":
    """Start it once more, with the descriptor that it has stored."""
    name, fd = store.kept[0]
    return subprocess.Popen(
        ["/bin/sh", "-c", ACTIVATED, "sh", *program.argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.dup2(fd, 3),  # noqa: PLW1509 - the store's thread forks nothing
        pass_fds=[3],
        env=os.environ | store.environment | {"LISTEN_FDNAMES": name},
    )


def datagrams(peer: Peer) -> str:
    """Forwards datagrams (UDP), and gives each of two clients its own answer"""
    with closing(bound(socket.SOCK_DGRAM)) as target, ExitStack() as stack:
        program = stack.enter_context(running(peer, f"udp:{target.getsockname()[1]}"))
        first, second = (stack.enter_context(closing(datagram_client(program))) for _ in "12")
        flows = [ask(client, target, b"?") for client in (first, second)]
        for flow, answer in zip(flows, (b"first", b"second"), strict=True):
            target.sendto(answer, flow)
        return "yes" if (first.recv(10), second.recv(10)) == (b"first", b"second") else "no"


def datagram_waits(peer: Peer) -> str:
    """Delivers a datagram that came 1 s before its target was there"""
    with closing(bound(socket.SOCK_DGRAM)) as target, ExitStack() as stack:
        port = target.getsockname()[1]
        program = stack.enter_context(running(peer, f"udp:{port}"))
        client = stack.enter_context(closing(datagram_client(program)))
        ask(client, target, b"it serves")
        target.close()
        client.send(b"made sure of")  # what it had forwarded before could not be answered
        time.sleep(0.2)
        client.send(b"early")
        time.sleep(1)
        with closing(bound(socket.SOCK_DGRAM, port)) as later, suppress(TimeoutError):
            later.settimeout(3)
            while later.recv(20) != b"early":
                pass
            return "yes"
        return "no"


def datagram_client(program: Running) -> socket.socket:
    client = bound(socket.SOCK_DGRAM)
    client.connect(("127.0.0.1", program.port))
    return client


def ask(client: socket.socket, target: socket.socket, question: bytes) -> tuple[str, int]:
    """Send until it comes to the target; return where it comes from."""
    target.settimeout(0.1)
    deadline = time.monotonic() + PATIENCE / 3
    while time.monotonic() < deadline:
        with suppress(ConnectionRefusedError, TimeoutError):
            client.send(question)
            return target.recvfrom(100)[1]
        time.sleep(0.02)
    raise TimeoutError


def at_rest(peer: Peer) -> str:
    """Processes, file descriptors and private memory for each connection at rest"""
    with backend() as listener, running(peer, target_of(listener)) as program, ExitStack() as stack:
        counts = []
        for many in (1, AT_REST):
            for _ in range(many):
                client = stack.enter_context(closing(program.connect()))
                client.sendall(b"x")
                stack.enter_context(closing(accept(listener))).recv(1)
            pids = program.pids()
            counts.append((len(pids), memory.descriptors(pids), memory.private(pids)))
        few, all_of_them = counts
        processes, fds, private = ((b - a) / AT_REST for a, b in zip(few, all_of_them, strict=True))
        return f"{processes:.0f}, {fds:.0f}, {private / 1024:.0f} KiB"


def private_memory(peer: Peer) -> str:
    """Private memory with one connection"""
    with connected(peer) as (program, _, _):
        return f"{memory.private(program.pids()) / (1 << 20):.1f} MiB"


CHECKS = (
    inherits,
    waits,
    half_close,
    reset,
    urgent,
    zero_copy,
    proxy_protocol,
    abstract,
    drains,
    reloads,
    survives,
    datagrams,
    datagram_waits,
    at_rest,
    private_memory,
)


# --- the table ----------------------------------------------------------------------------------


def answer(check: Callable[[Peer], str], peer: Peer) -> str:
    """Return what a check finds; "no" if the program lacks the feature, or does not respond."""
    try:
        return check(peer)
    except LookupError:
        return "no"
    except (OSError, AssertionError):
        return "no"


def main() -> int:
    parser = argparse.ArgumentParser(prog="ci/bench compare", description=__doc__)
    parser.add_argument("--executable", type=Path, default=Path(".venv/bin/systemd-socket-proxyd"))
    parser.add_argument("--only", default="", help="checks by name, with commas between")
    parser.add_argument("--peers", default="", help="programs by name, with commas between")
    options = parser.parse_args()
    if not sockets.enter_network():
        print("not root: using the machine's own loopback", file=sys.stderr)
    here = [
        p
        for p in peers(options.executable.resolve())
        if not options.peers or p.name in options.peers
    ]
    for peer in here:
        print(f"{peer.name}: {peer.version}")
    print("\n| |", " | ".join(peer.name for peer in here), "|")
    print("| --- |" + " --- |" * len(here))
    for check in CHECKS:
        if not options.only or check.__name__ in options.only.split(","):
            print(f"| {check.__doc__} |", end="", flush=True)
            for peer in here:
                print(f" {answer(check, peer)} |", end="", flush=True)
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
