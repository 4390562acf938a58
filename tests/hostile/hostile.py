"""The run: one scene after another, and the verdict."""

import asyncio
import contextlib
import os
import queue
import shutil
import signal
import socket
import tempfile
import time

from hostile import spoofed
from hostile.attacks import ATTACKS, PAIRS, Place, dice
from hostile.callers import INSPECT
from hostile.held import Held
from kit.load import Load
from kit.logs import too_many_lines
from kit.notify import NotifySocket
from kit.privileges import WITH_PARENT
from kit.proxy import SIGNS_OF_A_CRASH, Proxy
from kit.waiting import wait_until

from bench import memory

PATIENCE = 60
KIB, MIB = 1 << 10, 1 << 20

STRUCT_MAX = 4 * KIB
"""What a connection takes that has no bytes on their way."""

FIRST_MAX = 16 * KIB
"""What the program reads from a client before the connect to its target is known to have succeeded
(FIRST_UNIT in relay/pump.pxd), and keeps while the client is held."""

UNSENT_MAX = 256 * KIB
"""What a connection may hold in the program's own memory, per direction: one read of a stream that
the other side did not take (stream_unit in _relay.pyx)."""

PIPE_MAX = 1 * MIB
"""… and in a pipe, per direction (pipe_size in _relay.pyx)."""

BUFFER_SIZE = 64 * KIB
"""The value of --buffer-size= in these tests, which replaces both."""

ALLOWANCE = 2 * MIB
"""In addition, in the program's own memory: late imports, and what malloc(3) rounds up."""


class Scene:
    """A proxy with its listeners, targets and guests. Closed with `close()`."""

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
        pairs = self._targets("targets", "", 701) | self._targets("attacked", "-attacked", 702)
        pairs |= {"tcp-to-nobody": "127.0.0.1:704", "tcp-to-full": self._full_target()}
        sockets = {name: self._listener(name) for name in pairs}
        os.chmod(self.folder, 0o711)  # for callers of other users
        always = "--hand-over=always"
        threads = [f"--threads={chosen.threads}", always] if chosen.threads else []
        self.proxy = Proxy(
            [*WITH_PARENT, chosen.executable, "--connections-max=4096", *threads, *options,
             f"--inspect={self.folder}/{INSPECT}",
             *(f"{name}={target}" for name, target in pairs.items())],
            inherit=list(sockets.values()),
            names=":".join(pairs),
            notify=self.notify,
        )  # fmt: skip
        self.proxy.wait_until_ready()
        self.started = time.monotonic()
        self.sockets_at_start = self.proxy.socket_count()
        self.private_at_start = memory.private([self.proxy.pid])
        self.addresses = {name: sock.getsockname() for name, sock in sockets.items()}
        self.addresses[INSPECT] = f"{self.folder}/{INSPECT}"
        self.guests = None
        if guests:
            listeners = [
                {"family": pair.split("-")[0], "address": self.addresses[pair]} for pair in PAIRS
            ]
            self.guests = self._load("hostile.guests", {"name": "guests", "listeners": listeners})

    def _targets(self, name, suffix, port):
        """Start a process of targets; return the target of each listener, by its name."""
        path = f"{self.folder}/{name}"
        listen = [
            {"family": "tcp", "address": ["127.0.0.1", port]},
            {"family": "unix", "address": path},
        ]
        self._load("hostile.targets", {"name": name, "listen": listen})
        targets = {"tcp": f"127.0.0.1:{port}", "unix": path}
        return {pair + suffix: targets[pair.split("-")[2]] for pair in PAIRS}

    def _load(self, module, settings):
        load = Load(module, settings, self.reports)
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
        """Return the address of a listener whose backlog is full: a connect does not end."""
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
        """Return the next report of this kind. Faults are recorded, an exit is fatal."""
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
        """Return how the guests were served since the last call."""
        self.guests.order("mark")
        return self.wait_for(self.guests, "marked")

    def let_pass(self, seconds):
        """Let the guests alone be served for this time; return how they were."""
        self.mark()
        time.sleep(seconds)  # an interval that is measured
        return self.mark()

    def wait_for_sockets(self, wanted):
        """Wait until at most `wanted` more sockets are open than at the start; False if not."""
        allowed = self.sockets_at_start + wanted
        try:
            wait_until(lambda: self.proxy.socket_count() <= allowed, "sockets are closed", PATIENCE)
        except AssertionError:
            return False
        return True

    def end(self):
        """End the proxy; record sockets left open, a wrong exit status, and too many log lines."""
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
        for sign in (*SIGNS_OF_A_CRASH, "Internal error"):
            if sign in self.proxy.log():
                self.faults.append(f"{sign} in the log: {self.proxy.log()[-1000:]}")

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
            if "spoofed" in wanted:
                self.spoofed()
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
            place = Place(
                scene.addresses,
                self.chosen.seconds,
                dice(self.chosen.seed),
                scene.proxy.socket_count,
            )
            try:
                note = asyncio.run(work(place))
                scene.faults += place.faults
                during = scene.mark()
                self.memory(scene, place.callers_bytes)
            finally:
                place.close()
            # The guests have two connections per listener, with two sockets each.
            if not scene.wait_for_sockets(2 * 2 * len(PAIRS)):
                scene.faults.append("connections of clients that are gone are still open")
            after = scene.let_pass(1.0)
            scene.end()
        finally:
            log = scene.proxy.log() if scene.proxy else ""
            scene.close()
        print(f"{name}: {note}; log: {len(log.splitlines())} lines")
        for when, served in (("before", before), ("during", during), ("after", after)):
            print(f"  {when:7}{told(served)}")
        self.tell(name, scene.faults + unserved(name, before, during, after))

    def memory(self, scene, callers_bytes):
        """Check that the proxy has no more memory of its own than its connections may hold, and
        what callers of the inspection socket may."""
        held = Held(scene.proxy)
        connections = max(held.sockets - scene.sockets_at_start, 0) // 2
        grown = held.private - scene.private_at_start
        allowed = connections * (2 * UNSENT_MAX + STRUCT_MAX) + ALLOWANCE + callers_bytes
        print(
            f"  with {connections} connections: {grown / KIB:.0f} KiB of its own memory more, "
            f"{held.pipe_bytes / MIB:.1f} MiB in {held.pipes} pipes, "
            f"{(held.received + held.sending) / MIB:.1f} MiB in sockets"
        )
        if grown > allowed:
            scene.faults.append(f"{grown} bytes of memory, expected at most {allowed}")

    def spoofed(self):
        """Send datagrams with forged sources."""
        note, faults = spoofed.run(self.chosen.executable, self.chosen.sources)
        print(f"spoofed: {note}")
        self.tell("spoofed", faults)

    # ── what one client can make the proxy hold ──────────────────────────────────────────────

    def held(self):
        """Measure clients that send and never read, with targets that do the same, per listener."""
        print("held for each client, in KiB; in brackets the maximum that the code allows:")
        print(f"  {'':14}{'own memory':>16}{'pipes':>16}{'received':>10}{'sending':>10}")
        for pair in PAIRS:
            self.held_at(pair, 50 * self.chosen.clients, idle, (), 0, 0)
        self.held_at("tcp-to-nobody", 10 * self.chosen.clients, wait, (), FIRST_MAX, 0)
        for pair in PAIRS:
            self.held_at(pair, self.chosen.clients, stuff, (), UNSENT_MAX, PIPE_MAX)
        option = f"--buffer-size={BUFFER_SIZE}"
        for pair in PAIRS:
            self.held_at(pair, self.chosen.clients, stuff, (option,), BUFFER_SIZE, BUFFER_SIZE)

    def held_at(self, pair, count, behave, options, unsent, pipe):
        """Let `count` clients behave so. `unsent`, `pipe`: bytes allowed per direction."""
        scene = Scene(self.chosen, options, guests=False)
        listener = f"{pair}-attacked" if pair in PAIRS else pair
        clients = []
        try:
            clients.extend(connect(scene.addresses[listener]) for _ in range(count))
            held = behave(scene, clients)
            own = held.private - scene.private_at_start
            own_max, pipe_max = 2 * unsent + STRUCT_MAX, 2 * pipe
            print(
                f"  {pair:14}{own / count / KIB:8.1f}{f'({own_max // KIB})':>8}"
                f"{held.pipe_bytes / count / KIB:8.0f}{f'({pipe_max // KIB})':>8}"
                f"{held.received / count / KIB:10.0f}{held.sending / count / KIB:10.0f}"
                f"   {count} {behave.__doc__}",
                *options,
            )
            if own > count * own_max + ALLOWANCE:
                scene.faults.append(f"{pair}: {own} bytes of its own memory")
            if held.pipe_bytes > count * pipe_max:
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
    """that are at rest"""
    for client in clients:
        client.sendall(b"ex")
        client.settimeout(PATIENCE)
        assert client.recv(1) == b"x"
    return Held(scene.proxy)


def wait(scene, clients):
    """that have sent much and wait for their target"""
    for client in clients:
        client.sendall(bytes(64 * KIB))
    return at_rest(scene, clients)


def stuff(scene, clients):
    """that send and never read, as their targets do"""
    for client in clients:
        client.send(b"f")
    return at_rest(scene, clients)


def at_rest(scene, clients):
    """Send until what is held has not changed for a second, and return it."""
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
    """Connect a client that will not read, and that resets when it is closed."""
    client = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.connect(address)
    return client


def unserved(name, before, during, after):
    """Return the faults: well-behaved clients that were not served."""
    found = []
    for when, served in (("before", before), ("during", during), ("after", after)):
        if not served["stay"][0]:
            found.append(f"{when}: the client that stayed was not served")
        if not served["come"][0] and not (name == "flood" and when == "during"):
            found.append(f"{when}: a client that came was not served")
        if served["refused"] and not (name == "flood" and when == "during"):
            found.append(f"{when}: {served['refused']} were refused")
    return found


def told(served):
    return "; ".join(
        f"{what} {count:5} times, p50 {p50:6} µs, p99 {p99:7} µs, worst {worst / 1000:6.0f} ms"
        for what, (count, p50, p99, worst) in (("ping", served["stay"]), ("come", served["come"]))
    ) + (f"; {served['refused']} refused" if served["refused"] else "")
