"""The clients: exchanges at a steady rate, and connections that last as long as the run.

Settings: `name`, `seed`, `seconds`; `doors`: [{"name", "family", "address", "backend" (its
family), "strict", "header", "rate" (a second), "most" (at a time), "stall_ms", "sleeps_ms",
"last": [what lasts]}]. Orders on stdin: "pause" (answered by "quiet" once nothing but what lasts
is open), "resume", "counts", "finish".
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


class Door:
    """A listener of a proxy, and what is to be done there."""

    def __init__(self, settings):
        self.__dict__.update(settings)
        self.may_urge = self.family != "unix", self.backend != "unix"
        self.open = 0

    async def connect(self):
        sock = open_socket(self.family)
        await connect(sock, self.address)
        return sock

    def port_of(self, sock):
        """What a PROXY header is to say of `sock`."""
        return sock.getsockname()[1] if self.header and self.family != "unix" else 0


class Clients:
    def __init__(self, settings):
        self.tally = Tally(settings["name"])
        self.dice = random.Random(settings["seed"])
        self.doors = [Door(one) for one in settings["doors"]]
        self.number = settings["first_number"]
        self.running = asyncio.Event()
        self.running.set()
        self.finished = asyncio.Event()
        self.tasks = set()
        self.lasting = []
        self.latencies = []

    def start(self):
        for door in self.doors:
            self.tasks.add(asyncio.ensure_future(self.generate(door)))
            for kind in door.last:
                self.lasting.append(asyncio.ensure_future(self.last(door, kind)))

    def next_number(self):
        self.number += 1
        return self.number

    # ── exchanges ────────────────────────────────────────────────────────────────────────────

    async def generate(self, door):
        """Start exchanges at the door's rate. What could not be started in time is left out."""
        while door.rate:
            await self.running.wait()
            await asyncio.sleep(self.dice.expovariate(door.rate))
            if self.running.is_set() and door.open < door.most:
                door.open += 1
                task = asyncio.ensure_future(self.exchange(door))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)

    async def exchange(self, door):
        sleeps = door.sleeps_ms and self.dice.random() < 0.05
        try:
            if self.dice.random() < 0.03:
                await self.connect_and_reset(door)
            elif sleeps:
                await self.sleep(door)
            else:
                await self.play(door)
        finally:
            door.open -= 1

    async def connect_and_reset(self, door):
        """Gone before a byte is sent."""
        close(await door.connect(), True)
        self.tally.add(f"{door.name}: connect and reset")

    async def play(self, door):
        plan = plans.draw(
            self.dice, self.next_number(), stall_ms=door.stall_ms, may_urge=door.may_urge
        )
        try:
            side = await self.follow(door, plan)
        except (Fault, Corrupt) as error:
            self.tally.fault(f"{door.name}: {plan}: {error}")
            return
        except GONE as error:
            if door.strict:
                self.tally.fault(f"{door.name}: {plan}: {error!r}")
            self.tally.add(f"{door.name}: refused")
            return
        whole = side.received == plan.server.length and side.sent == plan.client.length
        self.tally.add(f"{door.name}: {'whole' if whole else 'cut short'}")
        self.tally.add("bytes", side.sent + side.received)

    async def follow(self, door, plan):
        budget = PATIENCE + (plan.client.stall_ms + plan.server.stall_ms) / 1000
        sock = await door.connect()
        try:
            plan = plans.Plan(plan.number, plan.kind, plan.client, plan.server, door.port_of(sock))
            await asyncio.get_running_loop().sock_sendall(sock, plan.pack())
            side = Side(sock, plan.number, plan.client, plan.server, UP)
            await side.play(budget)
        finally:
            sock.close()
        resets = door.family != "unix" and door.backend != "unix"
        side.judge(strict=door.strict, resets=resets)
        return side

    async def sleep(self, door):
        """Do nothing until the proxy ends the connection for it."""
        plan = plans.Plan(self.next_number(), plans.SLEEP)
        loop = asyncio.get_running_loop()
        start = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE):
                with await door.connect() as sock:
                    await loop.sock_sendall(sock, plan.pack())
                    if await loop.sock_recv(sock, 1):
                        raise Fault("a byte came from nowhere")
        except TimeoutError:
            self.tally.fault(f"{door.name}: {plan}: not cut off after {PATIENCE} s")
        except Fault as error:
            self.tally.fault(f"{door.name}: {plan}: {error}")
        except GONE:
            self.tally.add(f"{door.name}: sleeper reset")
        else:
            if (time.monotonic() - start) * 1000 < door.sleeps_ms:
                self.tally.fault(f"{door.name}: {plan}: cut off too early")
            self.tally.add(f"{door.name}: sleeper cut off")

    # ── what lasts ───────────────────────────────────────────────────────────────────────────

    async def last(self, door, kind):
        try:
            work = {"ping": self.ping, "drip": self.drip, "stream": self.stream}
            await work[kind](door)
        except (Fault, Corrupt, EOFError, TimeoutError, OSError) as error:
            self.tally.fault(f"{door.name}: {kind}: {error!r}")

    async def ping(self, door):
        await self.echoes(door, PING, PING_PAUSE, self.latencies)

    async def drip(self, door):
        self.tally.add("bytes one at a time", await self.echoes(door, DRIP, DRIP_PAUSE, []))

    async def echoes(self, door, size, pause, latencies):
        """One message after the other, each answered, to the end of the run; bytes sent."""
        loop = asyncio.get_running_loop()
        plan = plans.Plan(self.next_number(), plans.ECHO)
        out, at = Stream(plan.number, 0), 0
        with await door.connect() as sock:
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

    async def stream(self, door):
        """One connection that moves bytes at STREAM_RATE to the end; the count comes back."""
        loop = asyncio.get_running_loop()
        plan = plans.Plan(self.next_number(), plans.SINK)
        out, at = Stream(plan.number, 0), 0
        with await door.connect() as sock:
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
        while any(door.open for door in self.doors):
            await asyncio.sleep(0.05)
        tell("quiet", lasting=sum(not task.done() for task in self.lasting))

    async def finish(self):
        self.running.clear()
        self.finished.set()
        while any(door.open for door in self.doors):
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
            self.tally.send(open=sum(door.open for door in self.doors))
        elif word == "finish":
            self.keep(self.finish())

    def keep(self, work):
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def summary(latencies):
    """Median, 99th percentile and the worst, in microseconds."""
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
