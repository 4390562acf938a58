"""The run: one scene after the other, and the verdict."""

import asyncio
import contextlib
import queue
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

from attacks import ATTACKS, PAIRS, Place, dice
from harness.notify import NotifySocket
from harness.process import Proxy
from held import Held
from logs import too_many_lines
from world import WITH_PARENT, Load

from bench import memory

HERE = Path(__file__).resolve().parent
PATIENCE = 60
KIB, MIB = 1 << 10, 1 << 20

STRUCT_MOST = 4 * KIB
"""What a connection without bytes on their way takes."""

FIRST_MOST = 16 * KIB
"""What is taken from a client before it is known whether its target is there (FIRST_UNIT in
relay/pump.pxd), and waits with it if not."""

UNSENT_MOST = 256 * KIB
"""What the code lets a connection hold in the program's own memory, per direction: one read of a
stream that the other side did not take (stream_unit in _relay.pyx)."""

PIPE_MOST = 1 * MIB
"""… and in a pipe, per direction (pipe_size in _relay.pyx)."""

BUFFER_SIZE = 64 * KIB
"""With --buffer-size= it is this, in both places."""

ALLOWANCE = 2 * MIB
"""Of the program's own memory: modules that are imported late, and what malloc(3) rounds up."""


class Scene:
    """A proxy between targets and doors, with its guests. Closed with `close()`."""

    def __init__(self, chosen, options, *, guests):
        self.folder = tempfile.mkdtemp(prefix="hostile-")
        self.reports = queue.Queue()
        self.faults = []
        self.sockets = []
        self.loads = []
        self.proxy = None
        self.notify = NotifySocket()
        try:
            self._start(chosen, options, guests)
        except BaseException:
            self.close()
            raise

    def _start(self, chosen, options, guests):
        pairs = self._targets("targets", "", 701) | self._targets("foes", "-foes", 702)
        pairs |= {"tcp-to-nobody": "127.0.0.1:704", "tcp-to-full": self._full_target()}
        listeners = {name: self._listener(name) for name in pairs}
        always = "--hand-over=always"
        threads = [f"--threads={chosen.threads}", always] if chosen.threads else []
        self.proxy = Proxy(
            [*WITH_PARENT, chosen.executable, "--connections-max=4096", *threads, *options,
             *(f"{name}={target}" for name, target in pairs.items())],
            inherit=list(listeners.values()),
            names=":".join(pairs),
            notify=self.notify,
        )  # fmt: skip
        self.proxy.wait_until_ready()
        self.started = time.monotonic()
        self.sockets_at_start = self.proxy.socket_count()
        self.private_at_start = memory.private([self.proxy.pid])
        self.doors = {name: sock.getsockname() for name, sock in listeners.items()}
        self.guests = None
        if guests:
            doors = [{"family": pair.split("-")[0], "address": self.doors[pair]} for pair in PAIRS]
            self.guests = self._load("guests.py", {"name": "guests", "doors": doors})

    def _targets(self, name, suffix, port):
        """Start a process of targets; {name of a pair: its target as an argument}."""
        path = f"{self.folder}/{name}"
        listen = [
            {"family": "tcp", "address": ["127.0.0.1", port]},
            {"family": "unix", "address": path},
        ]
        self._load("targets.py", {"name": name, "listen": listen})
        targets = {"tcp": f"127.0.0.1:{port}", "unix": path}
        return {pair + suffix: targets[pair.split("-")[2]] for pair in PAIRS}

    def _load(self, script, settings):
        load = Load(HERE / script, settings, self.reports)
        self.loads.append(load)
        self.wait_for(load, "ready")
        return load

    def _listener(self, name):
        sock = socket.socket(socket.AF_UNIX if name.startswith("unix") else socket.AF_INET)
        self.sockets.append(sock)
        sock.bind(f"{self.folder}/{name}" if name.startswith("unix") else ("127.0.0.1", 0))
        sock.listen(4096)
        return sock

    def _full_target(self):
        """The address of a listener whose backlog has no room: a connect goes on and on."""
        full = socket.socket()
        self.sockets.append(full)
        full.bind(("127.0.0.1", 703))
        full.listen(0)
        for _ in range(3):
            waiting = socket.socket()
            waiting.setblocking(False)
            self.sockets.append(waiting)
            waiting.connect_ex(full.getsockname())
        return "127.0.0.1:703"

    def wait_for(self, load, event):
        """The next report of this kind. Faults are kept, an end is fatal."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                who, report = self.reports.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                raise AssertionError(f"{load.name} does not answer") from None
            if report["event"] == "fault":
                self.faults.append(report["what"])
            elif report["event"] == "ended":
                raise AssertionError(f"{who.name} has ended")
            elif who is load and report["event"] == event:
                return report

    def mark(self):
        """What the guests got since the last time."""
        self.guests.order("mark")
        return self.wait_for(self.guests, "marked")

    def let_pass(self, seconds):
        """Time in which the guests are served, and nothing else happens."""
        self.mark()
        time.sleep(seconds)  # an interval that is measured
        return self.mark()

    def wait_for_sockets(self, wanted):
        """Whether so many sockets more than at the start remain."""
        deadline = time.monotonic() + PATIENCE
        while self.proxy.socket_count() > self.sockets_at_start + wanted:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def end(self):
        """Faults of the end, and of the log."""
        took = time.monotonic() - self.started
        if self.guests:
            self.loads.remove(self.guests)
            self.guests.kill()
        if not self.wait_for_sockets(0):
            surplus = self.proxy.socket_count() - self.sockets_at_start
            self.faults.append(f"{surplus} sockets are left open")
        if not self.proxy.end() or self.proxy.status != 0:
            self.faults.append(f"SIGTERM ended it with {self.proxy.status}")
        self.faults += too_many_lines(self.proxy.log(), took)

    def close(self):
        for load in self.loads:
            load.kill()
        if self.proxy:
            self.proxy.release()
        for sock in self.sockets:
            sock.close()
        self.notify.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Hostile:
    def __init__(self, chosen):
        self.chosen = chosen
        self.failed = 0

    def run(self):
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)
        wanted = self.chosen.only.split(",")
        try:
            for name in [name for name in ATTACKS if name in wanted]:
                self.attack(name)
            if "held" in wanted:
                self.held()
        except KeyboardInterrupt:
            print("INTERRUPTED")
            return 130
        print("ok" if not self.failed else f"FAILED: {self.failed}")
        return 1 if self.failed else 0

    def tell(self, name, faults):
        for fault in faults:
            print(f"  FAULT: {fault}", flush=True)
        self.failed += len(faults)
        if name and not faults:
            print(f"  ok {name}", flush=True)

    # ── attacks ──────────────────────────────────────────────────────────────────────────────

    def attack(self, name):
        work, options = ATTACKS[name]
        scene = Scene(self.chosen, options, guests=True)
        try:
            before = scene.let_pass(1.0)
            place = Place(scene.doors, self.chosen.seconds, dice(self.chosen.seed))
            try:
                note = asyncio.run(work(place))
                during = scene.mark()
                self.memory(scene)
            finally:
                place.close()
            # What the guests have is two connections at each of four doors, of two sockets each.
            if not scene.wait_for_sockets(2 * 2 * len(PAIRS)):
                scene.faults.append("connections of those who have gone are still open")
            after = scene.let_pass(1.0)
            scene.end()
        finally:
            log = scene.proxy.log() if scene.proxy else ""
            scene.close()
        print(f"{name}: {note}; log: {len(log.splitlines())} lines")
        for when, served in (("before", before), ("during", during), ("after", after)):
            print(f"  {when:7}{told(served)}")
        self.tell(name, scene.faults + unserved(name, before, during, after))

    def memory(self, scene):
        """No more of its own memory than what its connections may hold."""
        held = Held(scene.proxy)
        connections = max(held.sockets - scene.sockets_at_start, 0) // 2
        grown = held.private - scene.private_at_start
        most = connections * (2 * UNSENT_MOST + STRUCT_MOST) + ALLOWANCE
        print(
            f"  with {connections} connections: {grown / KIB:.0f} KiB of its own memory more, "
            f"{held.pipe_bytes / MIB:.1f} MiB in {held.pipes} pipes, "
            f"{(held.received + held.sending) / MIB:.1f} MiB in sockets"
        )
        if grown > most:
            scene.faults.append(f"{grown} bytes of memory, {most} at most expected")

    # ── what one client can make the proxy hold ──────────────────────────────────────────────

    def held(self):
        """Clients that send and never read, to targets that do the same, at each door alone."""
        print("held for each client, in KiB; in brackets the most that the code allows:")
        print(f"  {'':14}{'own memory':>16}{'pipes':>16}{'received':>10}{'sending':>10}")
        for pair in PAIRS:
            self.held_at(pair, 50 * self.chosen.clients, idle, (), 0, 0)
        self.held_at("tcp-to-nobody", 10 * self.chosen.clients, wait, (), FIRST_MOST, 0)
        for pair in PAIRS:
            self.held_at(pair, self.chosen.clients, stuff, (), UNSENT_MOST, PIPE_MOST)
        option = f"--buffer-size={BUFFER_SIZE}"
        for pair in PAIRS:
            self.held_at(pair, self.chosen.clients, stuff, (option,), BUFFER_SIZE, BUFFER_SIZE)

    def held_at(self, pair, count, behave, options, unsent, pipe):
        """Let `count` clients behave so; `unsent` and `pipe`: bytes held per direction, at most."""
        scene = Scene(self.chosen, options, guests=False)
        door = f"{pair}-foes" if pair in PAIRS else pair
        clients = []
        try:
            clients.extend(connect(scene.doors[door]) for _ in range(count))
            held = behave(scene, clients)
            own = held.private - scene.private_at_start
            own_most, pipe_most = 2 * unsent + STRUCT_MOST, 2 * pipe
            print(
                f"  {pair:14}{own / count / KIB:8.1f}{f'({own_most // KIB})':>8}"
                f"{held.pipe_bytes / count / KIB:8.0f}{f'({pipe_most // KIB})':>8}"
                f"{held.received / count / KIB:10.0f}{held.sending / count / KIB:10.0f}"
                f"   {count} {behave.__doc__}",
                *options,
            )
            if own > count * own_most + ALLOWANCE:
                scene.faults.append(f"{pair}: {own} bytes of its own memory")
            if held.pipe_bytes > count * pipe_most:
                scene.faults.append(f"{pair}: {held.pipe_bytes} bytes in pipes")
            for client in clients:
                client.close()
            scene.end()
        finally:
            for client in clients:
                client.close()
            scene.close()
        self.tell("", scene.faults)


def idle(scene, clients):
    """who rest"""
    for client in clients:
        client.sendall(b"ex")
        client.settimeout(PATIENCE)
        assert client.recv(1) == b"x"
    return Held(scene.proxy)


def wait(scene, clients):
    """who have said much and wait for their target"""
    for client in clients:
        client.sendall(bytes(64 * KIB))
    return at_rest(scene, clients)


def stuff(scene, clients):
    """who send and never read, as their targets do"""
    for client in clients:
        client.send(b"f")
    return at_rest(scene, clients)


def at_rest(scene, clients):
    """What is held once nobody has taken anything for a second, however much is sent."""
    piece = bytes(256 * KIB)
    last, since = None, time.monotonic()
    while time.monotonic() - since < 1.0:
        for client in clients:
            with contextlib.suppress(BlockingIOError):
                client.send(piece, socket.MSG_DONTWAIT)
        held = Held(scene.proxy)
        state = held.private, held.pipe_bytes, held.received, held.sending
        if state != last:
            last, since = state, time.monotonic()
    return held


def connect(address):
    """A client that will not read, and resets when it is closed."""
    client = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.connect(address)
    return client


def unserved(name, before, during, after):
    """Guests who got nothing."""
    found = []
    for when, served in (("before", before), ("during", during), ("after", after)):
        if not served["stay"][0]:
            found.append(f"{when}: who stayed was not served")
        if not served["come"][0] and not (name == "flood" and when == "during"):
            found.append(f"{when}: who came was not served")
        if served["refused"] and not (name == "flood" and when == "during"):
            found.append(f"{when}: {served['refused']} were refused")
    return found


def told(served):
    return "; ".join(
        f"{what} {count:5} times, p50 {p50:6} µs, p99 {p99:7} µs, worst {worst / 1000:6.0f} ms"
        for what, (count, p50, p99, worst) in (("ping", served["stay"]), ("come", served["come"]))
    ) + (f"; {served['refused']} refused" if served["refused"] else "")
