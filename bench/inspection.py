"""What a busy inspection socket costs those whose bytes are forwarded.

One connection sends 64 bytes, waits until they have come back, and pauses for half a millisecond.
The program meanwhile has thousands of other connections, which somebody lists again and again. The
round trips show how long the list keeps the program from forwarding. What else runs on the machine
shows in the time that the program had to wait for a CPU.

Both ends of the stream are in one process. It and the program have real-time priority, so that
neither the callers nor anything else on the machine delays them. If the program has no rest, as
with 64 callers, the kernel stops it for 50 ms of each second (sched_rt_runtime_us). Run it as root:
ci/bench inspection.
"""

import argparse
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import socket

from bench import machine, memory, sockets

EXECUTABLE = Path(__file__).parent.parent / ".venv/bin/systemd-socket-proxyd"
MESSAGE = bytes(64)
PAUSE = 0.0005  # seconds between two round trips
SETTLE = 0.5  # seconds, in which the program finishes what a phase has left
PRIORITY = 10  # of this process; the program has one less
PATIENCE = 10  # seconds, for a connection
SPARE = 200  # descriptors for everything else

LIST = '{"method":"net.socketproxyd.Proxy.List","more":true}'
METRICS = '{"method":"io.systemd.Metrics.List","more":true}'


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="ci/bench inspection", description=__doc__)
    parser.add_argument("--executable", type=Path, default=EXECUTABLE)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--pair", default="tcp-tcp", help="FRONT-BACK, each tcp or unix")
    parser.add_argument("--threads", default="1,3", help="a run for each of them")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a phase")
    parser.add_argument("--phases", default=",".join(PHASES), help="those whose names begin so")
    return parser.parse_args(arguments)


# ── the program and its connections ──────────────────────────────────────────────────────────────


class Scene:
    """A running program, and the stream through it."""

    def __init__(self, pid: int, path: str, client: socket, target: socket, executable: Path):
        self.pid = pid
        self.path = path
        self.client = client
        self.target = target
        self.executable = executable


@contextmanager
def scene(options: argparse.Namespace, threads: str) -> Iterator[Scene]:
    """Start the program and make the connections; end it all."""
    front, back = options.pair.split("-")
    sockets.enter_network()
    proxy_cpu, load_cpu = machine.cpus()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        backend, target = sockets.bind(back, folder / "backend")
        stack.enter_context(backend)
        address = sockets.free_address(front, folder / "front")
        cpus = f"{proxy_cpu}" if threads == "1" else f"{load_cpu},{proxy_cpu}"
        command = ["taskset", "-c", cpus, str(options.executable), f"--inspect={folder}/inspect"]
        command += [f"--connections-max={options.connections}", f"--threads={threads}"]
        command += [f"--listen={sockets.host_form(address)}", sockets.host_form(target)]
        if threads != "1":
            command.insert(-1, "--hand-over=always")
        program = subprocess.Popen(command)
        stack.callback(end, program)
        backend.settimeout(PATIENCE)
        ends = Ends(address, backend, stack)
        client, behind = ends.one(await_socket=True)
        for _ in range(options.connections - 1):
            ends.one()
        yield Scene(program.pid, f"{folder}/inspect", client, behind, options.executable)


class Ends:
    """Makes connections through the program, with both ends here."""

    def __init__(self, address: str, backend: socket, stack: ExitStack):
        self.address = address
        self.backend = backend
        self.stack = stack

    def one(self, *, await_socket: bool = False) -> tuple[socket, socket]:
        """Return both ends of a new connection, which has forwarded a byte."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                client = sockets.connect(self.address)
                break
            except OSError:
                if not await_socket or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self.stack.enter_context(client)
        client.sendall(b"x")
        target, _ = self.backend.accept()
        self.stack.enter_context(target)
        target.recv(1)
        return client, target


def end(program: "subprocess.Popen[bytes]") -> None:
    """End it, however long it takes to close its sockets."""
    program.terminate()
    program.wait()


# ── callers ──────────────────────────────────────────────────────────────────────────────────────


def call(path: str, message: bytes, callers: int) -> None:
    """Call again and again, from several sockets; print the number of calls answered."""
    tails: dict[int, bytes] = {}
    by_fd: dict[int, socket] = {}
    poll = select.epoll()
    done = 0
    for _ in range(callers):
        caller = sockets.connect(f"unix:{path}")
        by_fd[caller.fileno()] = caller
        tails[caller.fileno()] = b""
        poll.register(caller, select.EPOLLIN)
        caller.sendall(message)
    while True:
        for fd, _ in poll.poll():
            data = by_fd[fd].recv(1 << 18)
            if not data:
                raise SystemExit("the program has dropped a caller")
            tails[fd] = (tails[fd] + data[-32:])[-32:]
            if tails[fd].endswith(b"\0") and not tails[fd].endswith(b'"continues":true}\0'):
                done += 1
                print(done, flush=True)
                by_fd[fd].sendall(message)


def command(executable: str, path: str) -> None:
    """List with socket-proxyctl again and again."""
    program = str(Path(executable).with_name("socket-proxyctl"))
    done = 0
    while True:
        arguments = [program, "list", "--json=short", f"--socket={path}"]
        subprocess.run(arguments, stdout=subprocess.DEVNULL, check=True)
        done += 1
        print(done, flush=True)


PHASES: dict[str, tuple[str, ...]] = {
    "quiet": (),
    "list": ("call", LIST, "1"),
    "command": ("command",),
    "list-2": ("call", LIST, "2"),
    "list-64": ("call", LIST, "64"),
    "metrics": ("call", METRICS, "1"),
}
"""What disturbs the stream, and how."""


@contextmanager
def disturbed(place: Scene, work: tuple[str, ...]) -> Iterator[Callable[[], int]]:
    """Have somebody call meanwhile. Yields what tells how many calls have been answered."""
    with tempfile.TemporaryFile("w+") as answered:

        def count() -> int:
            answered.seek(0)
            return len(answered.read().splitlines())

        if not work:
            yield count
            return
        kind, *rest = work
        where = place.executable if kind == "command" else ""
        caller = subprocess.Popen(
            [sys.executable, "-m", "bench.inspection", f"--{kind}", str(where), place.path, *rest],
            stdout=answered,
        )
        try:
            yield count
            if caller.poll() is not None:
                raise SystemExit(f"the caller has ended with {caller.returncode}")
        finally:
            caller.kill()
            caller.wait()


# ── the stream ───────────────────────────────────────────────────────────────────────────────────


def ping(place: Scene, seconds: float) -> list[float]:
    """Return how long each round trip took, in seconds, sorted."""
    client, target = place.client, place.target
    clock = time.perf_counter
    took = []
    until = clock() + seconds
    while (start := clock()) < until:
        for sender, receiver in ((client, target), (target, client)):
            sender.sendall(MESSAGE)
            size = 0
            while size < len(MESSAGE):
                size += len(receiver.recv(len(MESSAGE)))
        took.append(clock() - start)
        time.sleep(PAUSE)
    return sorted(took)


def measure(place: Scene, name: str, seconds: float) -> None:
    """Measure one phase and print a line."""
    Path(f"/proc/{place.pid}/clear_refs").write_text("5")  # resets VmHWM
    for task in os.listdir(f"/proc/{place.pid}/task"):
        os.sched_setscheduler(int(task), os.SCHED_FIFO, os.sched_param(PRIORITY - 1))
    with disturbed(place, PHASES[name]) as answered:
        before = cpu_of(place.pid)
        took = ping(place, seconds)
        cpu, waited = (now - then for now, then in zip(cpu_of(place.pid), before, strict=True))
        count = answered()
    peak = memory.kib(Path(f"/proc/{place.pid}/status"), "VmHWM")
    picks = [took[len(took) * share // 1000] for share in (500, 990, 999)]
    numbers = "".join(f"{value * 1e3:9.2f}" for value in [*picks, took[-1]])
    each = f"{cpu / count * 1e3:12.1f}" if count else " " * 12
    tail = f"{count:8}{each}{peak / 1e6:9.1f}{waited * 1e3:9.0f}"
    print(f"  {name:10}{len(took):7}{numbers}{tail}", flush=True)
    time.sleep(SETTLE)


def cpu_of(pid: int) -> tuple[float, float]:
    """Seconds that the threads of a process have run, and that they had to wait for a CPU."""
    stats = [stat.read_text().split() for stat in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(stat[0]) for stat in stats) / 1e9, sum(int(stat[1]) for stat in stats) / 1e9


def run(options: argparse.Namespace) -> None:
    """Measure all phases with each number of threads."""
    print(f"{options.connections} connections, {options.pair}, 64 bytes to and fro; ms")
    os.environ["SYSTEMD_LOG_LEVEL"] = "warning"
    wanted = [n for n in PHASES if n.startswith(tuple(options.phases.split(",")))]
    for threads in options.threads.split(","):
        with scene(options, threads) as place:
            print(
                f"threads={threads}   pings      p50      p99    p99.9      max   calls"
                "  CPU ms/call  peak MB  waited"
            )
            os.sched_setaffinity(0, {machine.cpus()[1]})
            os.sched_setscheduler(
                0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY)
            )
            try:
                for name in wanted:
                    measure(place, name, options.seconds)
            finally:
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
                os.sched_setaffinity(0, set(machine.cpus()))


def main() -> None:
    """Be the measurement, or one of its callers."""
    if sys.argv[1:2] == ["--call"]:
        call(sys.argv[3], sys.argv[4].encode() + b"\0", int(sys.argv[5]))
    elif sys.argv[1:2] == ["--command"]:
        command(sys.argv[2], sys.argv[3])
    else:
        options = parse()
        options.connections = min(options.connections, (machine.raise_limits() - SPARE) // 2)
        run(options)


if __name__ == "__main__":
    main()
