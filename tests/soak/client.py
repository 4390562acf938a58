"""The clients: exchanges at a steady rate, and connections that last as long as the run.

Settings: `name`, `seed`, `seconds`; `listeners`: [{"name", "family", "address", "backend" (its
family), "strict", "only_resets", "header", "rate" (a second), "open_max", "stall_ms", "sleeps_ms",
"last": [kinds of lasting connections]}]. Orders on stdin: "pause" (answered by "quiet" once only
lasting connections are open), "resume", "counts", "finish".
"""

import asyncio
import random
import socket
import struct
import time

from kit.asynchronous import GONE, connect, open_socket, read_exactly
from kit.load import Tally, cancelled, orders, read_settings, run, tell
from kit.pattern import Corrupt, Stream
from soak import plan as plans
from soak.sides import UP, Fault, Side, close

PATIENCE = 90
"""As in backend.py."""

STREAM_RATE = 200e9 / 3600
"""Bytes a second of the stream: 200 GB an hour."""

WRITE = 256 * 1024
PING, PING_PAUSE = 64, 0.05
DRIP, DRIP_PAUSE = 1, 1.0


class Listener:
    """A listener of a proxy, and the traffic that it gets."""

    def __init__(self, settings):
        self.__dict__.update(settings)
        self.may_urge = self.family != "unix", self.backend != "unix"
        self.open = 0

    async def connect(self):
        sock = open_socket(self.family)
        await connect(sock, self.address)
        return sock

    def port_of(self, sock):
        """Return the port that the PROXY header must give for `sock`; 0 for none."""
        return sock.getsockname()[1] if self.header and self.family != "unix" else 0


class Clients:
    def __init__(self, settings):
        self.tally = Tally(settings["name"])
        self.dice = random.Random(settings["seed"])
        self.listeners = [Listener(one) for one in settings["listeners"]]
        self.number = settings["first_number"]
        self.running = asyncio.Event()
        self.running.set()
        self.finished = asyncio.Event()
        self.tasks = set()
        self.lasting = []
        self.latencies = []

    def start(self):
        for listener in self.listeners:
            self.tasks.add(asyncio.ensure_future(self.generate(listener)))
            for kind in listener.last:
                self.lasting.append(asyncio.ensure_future(self.last(listener, kind)))

    def next_number(self):
        self.number += 1
        return self.number

    # ── exchanges ────────────────────────────────────────────────────────────────────────────

    async def generate(self, listener):
        """Start exchanges at the listener's rate; over `open_max`, they are left out."""
        while listener.rate:
            await self.running.wait()
            await asyncio.sleep(self.dice.expovariate(listener.rate))
            if self.running.is_set() and listener.open < listener.open_max:
                listener.open += 1
                task = asyncio.ensure_future(self.exchange(listener))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)

    async def exchange(self, listener):
        sleeps = listener.sleeps_ms and self.dice.random() < 0.05
        try:
            if self.dice.random() < 0.03:
                await self.connect_and_reset(listener)
            elif sleeps:
                await self.sleep(listener)
            else:
                await self.play(listener)
        finally:
            listener.open -= 1

    async def connect_and_reset(self, listener):
        """Reset a connection before a byte is sent."""
        close(await listener.connect(), True)
        self.tally.add(f"{listener.name}: connect and reset")

    async def play(self, listener):
        plan = plans.draw(
            self.dice, self.next_number(), stall_ms=listener.stall_ms, may_urge=listener.may_urge
        )
        try:
            side = await self.follow(listener, plan)
        except (Fault, Corrupt) as error:
            self.tally.fault(f"{listener.name}: {plan}: {error}")
            return
        except GONE as error:
            if listener.strict:
                self.tally.fault(f"{listener.name}: {plan}: {error!r}")
            self.tally.add(f"{listener.name}: refused")
            return
        whole = side.received == plan.server.length and side.sent == plan.client.length
        self.tally.add(f"{listener.name}: {'whole' if whole else 'cut short'}")
        self.tally.add("bytes", side.sent + side.received)

    async def follow(self, listener, plan):
        budget = PATIENCE + (plan.client.stall_ms + plan.server.stall_ms) / 1000
        sock = await listener.connect()
        try:
            plan = plans.Plan(
                plan.number, plan.kind, plan.client, plan.server, listener.port_of(sock)
            )
            await asyncio.get_running_loop().sock_sendall(sock, plan.pack())
            side = Side(sock, plan.number, plan.client, plan.server, UP)
            await side.play(budget)
        finally:
            sock.close()
        resets = listener.family != "unix" and listener.backend != "unix"
        cuts = not (resets and listener.only_resets)
        side.judge(strict=listener.strict, resets=resets, cuts=cuts)
        return side

    async def sleep(self, listener):
        """Stay silent until the proxy cuts the connection."""
        plan = plans.Plan(self.next_number(), plans.SLEEP)
        loop = asyncio.get_running_loop()
        start = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE):
                with await listener.connect() as sock:
                    await loop.sock_sendall(sock, plan.pack())
                    if await loop.sock_recv(sock, 1):
                        raise Fault("a byte came from nowhere")
        except TimeoutError:
            self.tally.fault(f"{listener.name}: {plan}: not cut off after {PATIENCE} s")
        except Fault as error:
            self.tally.fault(f"{listener.name}: {plan}: {error}")
        except GONE:
            self.tally.add(f"{listener.name}: sleeper reset")
        else:
            if (time.monotonic() - start) * 1000 < listener.sleeps_ms:
                self.tally.fault(f"{listener.name}: {plan}: cut off too early")
            self.tally.add(f"{listener.name}: sleeper cut off")

    # ── lasting connections ──────────────────────────────────────────────────────────────────

    async def last(self, listener, kind):
        try:
            work = {"ping": self.ping, "drip": self.drip, "stream": self.stream}
            await work[kind](listener)
        except (Fault, Corrupt, EOFError, TimeoutError, OSError) as error:
            self.tally.fault(f"{listener.name}: {kind}: {error!r}")

    async def ping(self, listener):
        await self.echoes(listener, PING, PING_PAUSE, self.latencies)

    async def drip(self, listener):
        self.tally.add("bytes one at a time", await self.echoes(listener, DRIP, DRIP_PAUSE, []))

    async def echoes(self, listener, size, pause, latencies):
        """Exchange one message after another until the run ends; return the bytes sent."""
        loop = asyncio.get_running_loop()
        plan = plans.Plan(self.next_number(), plans.ECHO)
        out, at = Stream(plan.number, 0), 0
        with await listener.connect() as sock:
            await loop.sock_sendall(sock, plan.pack())
            while not self.finished.is_set():
                message = bytes(out.piece(at, size))
                start = time.perf_counter()
                await loop.sock_sendall(sock, message)
                async with asyncio.timeout(PATIENCE):
                    answer = await read_exactly(sock, len(message))
                latencies.append(time.perf_counter() - start)
                if answer != message:
                    raise Corrupt(f"byte {at}: {message.hex()} came back as {answer.hex()}")
                at += len(message)
                await asyncio.sleep(pause)
            sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(PATIENCE):
                if await loop.sock_recv(sock, 1):
                    raise Fault("bytes after the end")
        return at

    async def stream(self, listener):
        """Send at STREAM_RATE until the run ends; the target then returns the count."""
        loop = asyncio.get_running_loop()
        plan = plans.Plan(self.next_number(), plans.SINK)
        out, at = Stream(plan.number, 0), 0
        with await listener.connect() as sock:
            await loop.sock_sendall(sock, plan.pack())
            start = time.monotonic()
            while not self.finished.is_set():
                due = (time.monotonic() - start) * STREAM_RATE - at
                if due < WRITE:
                    await asyncio.sleep(0.01)
                    continue
                end = at + WRITE
                async with asyncio.timeout(PATIENCE):
                    while at < end:
                        piece = out.piece(at, end - at)
                        await loop.sock_sendall(sock, piece)
                        at += len(piece)
            sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(PATIENCE):
                (received,) = struct.unpack("!Q", await read_exactly(sock, 8))
                if received != at or await loop.sock_recv(sock, 1):
                    raise Fault(f"{at} bytes sent, {received} arrived")
        self.tally.add("bytes of the stream", at)

    # ── orders ───────────────────────────────────────────────────────────────────────────────

    async def tell_when_quiet(self):
        while any(listener.open for listener in self.listeners):
            await asyncio.sleep(0.05)
        tell("quiet", lasting=sum(not task.done() for task in self.lasting))

    async def finish(self):
        self.running.clear()
        self.finished.set()
        while any(listener.open for listener in self.listeners):
            await asyncio.sleep(0.05)
        await asyncio.gather(*self.lasting)
        self.tally.send("finished", latencies=summary(self.latencies))

    def handle(self, word):
        if word == "pause":
            self.running.clear()
            self.keep(self.tell_when_quiet())
        elif word == "resume":
            self.running.set()
        elif word == "counts":
            self.tally.send(open=sum(listener.open for listener in self.listeners))
        elif word == "finish":
            self.keep(self.finish())

    def keep(self, work):
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def summary(latencies):
    """Return the median, the 99th percentile and the maximum, in microseconds."""
    if not latencies:
        return None
    ordered = sorted(latencies)
    picks = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100], ordered[-1]
    return [round(value * 1e6) for value in picks]


async def main():
    clients = Clients(read_settings())
    clients.start()
    tell("ready")
    await orders(clients.handle)
    await cancelled([*clients.tasks, *clients.lasting])


if __name__ == "__main__":
    run(main)
