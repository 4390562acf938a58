"""One run, from the start of the proxies to the verdict."""

import json
import platform
import queue
import shutil
import signal
import tempfile
import time

from kit.logs import too_many_lines
from soak.chaos import Chaos
from soak.sampling import Samples, growth, growth_max, warm_up
from soak.world import GO_ON, World

CHECKPOINTS = 3, 12
"""Minimum and maximum; in between, one every five minutes."""

POOLED_PIPES = 8
"""Idle pipes that a worker keeps: POOL_MAX in proxyd/relay/types.pxd."""

PATIENCE = 150
"""Seconds until the traffic must be at rest: longer than PATIENCE of the load processes."""

WATCHED = 2.0
"""Seconds of rest in which a proxy that spins is detected."""

LONG = 1800.0
"""Seconds; in a run of this length or more, the stream must keep its rate."""

MB = 1 << 20


class Interrupted(Exception):
    """Ctrl-C, or SIGTERM."""


class ProxyEnded(Exception):
    """A proxy has exited, so the run cannot go on."""


class Soak:
    def __init__(self, chosen):
        self.chosen = chosen
        self.seconds = chosen.minutes * 60
        self.faults = []
        self.counts = {}
        self.checkpoints = []
        self.events = {}
        self.latencies = None
        self.finishing = False
        self.start = 0.0

    def run(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupt)
        self.chosen.folder.mkdir(parents=True, exist_ok=True)
        sockets = tempfile.mkdtemp(prefix="soak-")
        threads = self.chosen.threads
        self.world = World(
            self.chosen.executable, sockets, threads, self.chosen.rate, self.chosen.seed
        )
        interrupted = False
        try:
            self.world.build()
            self.begin()
            self.soak()
            self.end()
        except Interrupted:
            interrupted = True
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
        except ProxyEnded:
            pass  # recorded as a fault already
        finally:
            self.world.close()
            shutil.rmtree(sockets, ignore_errors=True)
        if not self.start:
            return 130
        return self.report(interrupted)

    # ── the run ──────────────────────────────────────────────────────────────────────────────

    def begin(self):
        self.chaos = Chaos(self.world, self.world.dice)
        self.samples = Samples(self.world, 1.0 if self.seconds <= 600 else 5.0)
        self.start = time.monotonic()
        self.log_from = {one.name: 0 for one in self.world.served}

    def soak(self):
        """Let the traffic run, with checkpoints in between and one at the end."""
        count_min, count_max = CHECKPOINTS
        count = max(count_min, min(count_max, int(self.seconds / 300)))
        for number in range(1, count + 1):
            until = self.start + self.seconds * number / count
            self.wait(lambda until=until: time.monotonic() >= until, chaos=True)
            self.checkpoint()
            self.say_where()

    def say_where(self):
        row = self.samples.rows[-1]
        memory = " ".join(
            f"{one.name} {row[f'{one.name}.private'] / MB:.1f} M" for one in self.world.served
        )
        whole = sum(count for name, count in self.counts.items() if name.endswith(": whole"))
        print(f"{row['seconds'] / 60:.1f} min: {whole} whole exchanges; {memory}", flush=True)

    def wait(self, condition, *, chaos=False, patience=None):
        """Sample, listen and (with `chaos`) disturb until the condition holds. Returns False if it
        does not hold within `patience` seconds."""
        deadline = time.monotonic() + patience if patience else None
        counts_at = 0.0
        while not condition():
            if deadline and time.monotonic() > deadline:
                return False
            self.samples.tick()
            if chaos:
                self.chaos.tick()
                for text in self.chaos.faults:
                    self.fault(text)
                self.chaos.faults.clear()
            if time.monotonic() > counts_at:
                counts_at = time.monotonic() + 5
                for load in self.world.loads:
                    load.order("counts")
            self.listen(0.05)
            self.look_after_proxies()
        return True

    def listen(self, timeout):
        """Take a report of a load process, if one comes in time, and all that are queued."""
        try:
            self.take(*self.world.reports.get(timeout=timeout))
            while True:
                self.take(*self.world.reports.get_nowait())
        except queue.Empty:
            pass

    def take(self, load, report):
        event = report["event"]
        if event == "fault":
            self.fault(f"{report['who']}: {report['what']}")
        elif event == "ended" and load is not self.world.shaky and not self.finishing:
            self.fault(f"{load.name}: the load process has ended")
        elif event in ("counts", "finished"):
            for name, amount in report["counts"].items():
                self.counts[name] = self.counts.get(name, 0) + amount
            self.latencies = report.get("latencies") or self.latencies
        self.events[load.name, event] = self.events.get((load.name, event), 0) + 1

    def fault(self, text):
        self.faults.append(text)
        if len(self.faults) <= 50:
            print(f"FAULT after {time.monotonic() - self.start:.0f} s: {text}", flush=True)

    def look_after_proxies(self):
        for one in self.world.served:
            if one.proxy.status is None and one.proxy.has_ended():
                last = one.proxy.log()[-2000:]
                self.fault(f"{one.name} has ended with {one.proxy.status}: {last}")
                raise ProxyEnded(one.name)

    # ── checkpoints ──────────────────────────────────────────────────────────────────────────

    def checkpoint(self):
        """Let all but the lasting connections end, and check what is still open."""
        self.chaos.settle()
        clients = self.world.clients()
        before = [self.events.get((load.name, "quiet"), 0) for load in clients]
        for load in clients:
            load.order("pause")

        def quiet():
            now = [self.events.get((load.name, "quiet"), 0) for load in clients]
            return all(a > b for a, b in zip(now, before, strict=True))

        if not self.wait(quiet, patience=PATIENCE):
            self.fault("the traffic did not come to rest")
        leftovers = self.wait_for_sockets(self.world.lasting)
        self.watch_for_spinning()
        self.samples.take()
        self.checkpoints.append(round(time.monotonic() - self.start, 1))
        for text in leftovers:
            self.fault(text)
        self.chaos.resume()
        for load in clients:
            load.order("resume")

    def wait_for_sockets(self, lasting):
        """Wait until each proxy has exactly the sockets that it should have; return the faults."""

        def surplus(one):
            wanted = one.sockets_at_start + 2 * lasting(one)
            return one.proxy.socket_count() - wanted

        self.wait(lambda: not any(map(surplus, self.world.served)), patience=30)
        wrong = [
            f"{one.name} has {surplus(one):+} sockets at rest"
            for one in self.world.served
            if surplus(one)
        ]
        return wrong + self.too_many_pipes()

    def too_many_pipes(self):
        """Return the faults of proxies with more pipes than the pools and the stream need."""
        found = []
        for one in self.world.served:
            workers = max(int(self.chosen.threads or 1), 1) if one.name == "main" else 1
            pipes = sum(what.startswith("pipe:") for what in one.proxy.fds().values())
            allowed = 2 * (POOLED_PIPES * workers + 1)
            if pipes > allowed:
                found.append(f"{one.name} has {pipes} pipe ends at rest, expected <= {allowed}")
        return found

    def watch_for_spinning(self):
        """Find proxies that use CPU time while there is next to nothing to do."""
        before = {one.name: one.proxy.cpu_seconds() for one in self.world.served}
        start = time.monotonic()
        self.wait(lambda: time.monotonic() - start >= WATCHED)
        for one in self.world.served:
            share = (one.proxy.cpu_seconds() - before[one.name]) / (time.monotonic() - start)
            if share > 0.5:
                self.fault(f"{one.name} uses {share:.0%} of a CPU at rest")

    # ── the end ──────────────────────────────────────────────────────────────────────────────

    def end(self):
        """End the lasting connections, then the proxies: each must be empty, and exit with 0."""
        self.finishing = True
        self.chaos.settle()
        clients = self.world.clients()
        for load in clients:
            load.order("finish")
        done = self.wait(
            lambda: all(self.events.get((load.name, "finished")) for load in clients),
            patience=PATIENCE,
        )
        if not done:
            self.fault("the lasting connections did not end")
        for text in self.wait_for_sockets(lambda one: 0):
            self.fault(f"at the end: {text}")
        self.samples.take()
        for one in self.world.served:
            if not one.proxy.end() or one.proxy.status != 0:
                self.fault(f"{one.name}: SIGTERM ended it with status {one.proxy.status}")
        self.judge()

    def judge(self):
        """Find the faults that only the whole run shows."""
        allowed = growth_max(self.seconds)
        for one in self.world.served:
            gained = self.gained(one.name, "private")
            if gained > allowed:
                self.fault(f"{one.name}: private memory has grown by {gained / MB:.2f} MiB")
            counted = {value for _, value in self.samples.column(f"{one.name}.threads", 1.0)}
            if len(counted) > 1:
                self.fault(f"{one.name}: threads came and went: {sorted(counted)}")
            for text in too_many_lines(one.proxy.log(), time.monotonic() - self.start):
                self.fault(f"{one.name}: {text}")
        for text in self.not_done():
            self.fault(text)

    def not_done(self):
        """Return the traffic that is missing: a run without it proves nothing."""
        missing = [
            f"{listener['name']}: nothing arrived whole"
            for one in self.world.served
            for listener in one.listeners
            if not self.counts.get(f"{listener['name']}: whole")
        ]
        missing += [
            f"{name}: no burst was answered whole"
            for name in self.world.datagram_names
            if not self.counts.get(f"{name}: answered")
        ]
        moved = self.counts.get("bytes of the stream", 0)
        # A short run only shows that all kinds of traffic pass; how much depends on the machine.
        wanted = 200e9 / 3600 * self.seconds if self.seconds >= LONG else 1e6
        if moved < 0.9 * wanted:
            missing.append(f"the stream moved {moved / 1e9:.1f} GB instead of {wanted / 1e9:.1f}")
        missing += [
            f"{one.name}: no connection went from one process to the next"
            for one in self.world.served
            if one.name in GO_ON and not one.carried
        ]
        if not self.counts.get("bytes one at a time"):
            missing.append("the slow connections moved nothing")
        missing += [
            f"{one.name} inspected: no {what}"
            for one in self.world.served
            for what in ("list", "metrics", "watch")
            if one.name not in GO_ON and not self.counts.get(f"{one.name} inspected: {what}")
        ]
        return missing

    def total(self, what):
        return sum(getattr(one, what) for one in self.world.served)

    # ── the report ───────────────────────────────────────────────────────────────────────────

    def report(self, interrupted):
        took = time.monotonic() - self.start
        folder = self.chosen.folder
        self.samples.write(folder / "samples.csv")
        text = "\n".join(self.summary(took, interrupted)) + "\n"
        (folder / "summary.txt").write_text(text, encoding="utf-8")
        (folder / "result.json").write_text(json.dumps(self.result(took), indent=1) + "\n")
        for one in self.world.served:
            (folder / f"{one.name}.log").write_text(one.last_log)
        print(text, end="", flush=True)
        return 130 if interrupted else 1 if self.faults else 0

    def result(self, took):
        return {
            "about": self.about(),
            "minutes": took / 60,
            "threads": self.chosen.threads,
            "seed": self.chosen.seed,
            "faults": self.faults,
            "counts": dict(sorted(self.counts.items())),
            "disturbances": self.chaos.counts,
            "carried": self.total("carried"),
            "reset": self.total("reset"),
            "checkpoints": self.checkpoints,
            "ping_us": self.latencies,
            "growth": {one.name: self.gained(one.name, "private") for one in self.world.served},
        }

    def gained(self, name, what):
        return round(growth(self.samples.column(f"{name}.{what}", warm_up(self.seconds))))

    def summary(self, took, interrupted):
        counts = self.counts
        whole = sum(n for name, n in counts.items() if name.endswith(": whole"))
        short = sum(n for name, n in counts.items() if name.endswith(": cut short"))
        yield f"{took / 60:.1f} minutes, {self.about()}"
        yield (
            f"exchanges: {whole} whole, {short} cut short by plan or by a disturbance; "
            f"{counts.get('bytes', 0) / 1e9:.1f} GB compared byte by byte"
        )
        yield (
            f"one stream of {counts.get('bytes of the stream', 0) / 1e9:.1f} GB; "
            f"{counts.get('bytes one at a time', 0)} bytes at one a second"
        )
        yield (
            f"datagrams: {counts.get('datagrams at targets', 0)} at their targets, "
            f"{counts.get('datagrams answered', 0)} answered, "
            f"{counts.get('datagrams lost', 0)} lost on the way"
        )
        done = self.chaos.counts
        yield (
            f"disturbed by {done['stop']} stops, {done['restart']} restarts of targets "
            f"({done['kill']} killed), {done['squeeze']} times short of fds"
        )
        yield (
            f"one proxy was restarted {done['renew'] - done['reload']} times and reloaded "
            f"{done['reload']} times, another one killed {done['crash']} times; "
            f"{self.total('carried')} connections went on in the next process, and "
            f"{self.total('reset')} that were kept could not"
        )
        if self.latencies:
            p50, p99, worst = self.latencies
            yield f"ping-pong meanwhile: p50 {p50} µs, p99 {p99} µs, max {worst / 1000:.0f} ms"
        calls = sum(count for name, count in counts.items() if " inspected: " in name)
        yield f"{calls} calls of the inspection sockets were answered"
        yield from self.table()
        yield f"CPU: proxies {self.cpu(False):.1f} s, load {self.cpu(True):.1f} s"
        if interrupted:
            yield "INTERRUPTED: nothing is judged"
        elif self.faults:
            yield f"FAILED: {len(self.faults)} faults"
            yield from self.faults[:20]
        else:
            yield f"ok: no fault, {len(self.checkpoints)} checkpoints"

    def table(self):
        head = f"{'private MiB':>20} {'gained':>9} {'fds at rest':>20} {'CPU s':>8} {'log':>5}"
        yield f"{'':6} {head}"
        for one in self.world.served:
            memory = [value / MB for _, value in self.samples.column(f"{one.name}.private")]
            rest = [row[f"{one.name}.fds"] for row in self.samples.rows
                    if any(abs(row["seconds"] - at) < 1 for at in self.checkpoints)]  # fmt: skip
            cpu = self.samples.rows[-1][f"{one.name}.cpu"]
            yield (
                f"{one.name:6} {memory[0]:8.1f} to {max(memory):8.1f} "
                f"{self.gained(one.name, 'private') / 1024:+7.0f} K "
                f"{min(rest, default=0):8} to {max(rest, default=0):8} {cpu:8.1f} "
                f"{len(one.last_log.splitlines()):5}"
            )

    def cpu(self, of_load):
        last = self.samples.rows[-1]
        if of_load:
            return last["load.cpu"]
        return sum(last[f"{one.name}.cpu"] for one in self.world.served)

    def about(self):
        threads = f", main with --threads={self.chosen.threads}" if self.chosen.threads else ""
        return f"Linux {platform.release()}, Python {platform.python_version()}{threads}"


def _interrupt(number, _frame):
    raise Interrupted(number)
