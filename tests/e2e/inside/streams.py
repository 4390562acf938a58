"""Both ends of many connections through a proxy, in all states; every byte is compared.

    streams.py LISTENERS TARGET KIND=COUNT...

Clients connect to LISTENERS in turn, with `,` between them: ports of 127.0.0.1, and paths. This
program is the server behind them as well, on port TARGET or at that path. It says "open" once every
connection is in its state, and ends them when it has read a line. Then one JSON object says how
that went,
{KIND: {outcome: count}}, with the five longest times that each `ping` waited in "pauses_ms".

    ping     some bytes there and back, all the time
    talk     the same four times a second
    idle     nothing moves
    bulk     64 KiB there and back, ten times a second
    half     the client has ended its direction, and the server goes on
    answer   the server has ended its direction, and the client goes on
    stalled  the server writes 1 MB, which the client does not read
    held     to the last listener, whose target, port TARGET + 1, listens only at the end
"""

import asyncio
import collections
import heapq
import json
import random
import resource
import sys
import time

AT_A_TIME = 50  # connections that are being opened
LARGEST = 1 << 16
STALLED = 1_000_000
PATIENCE = 60  # seconds for all to end
PAUSES = 5  # how many of the longest are told

PERIOD = 1_000_003
BYTES = random.Random(7).randbytes(PERIOD)
BYTES += BYTES[:LARGEST]


class Wrong(Exception):
    """A byte is lost, or another one, or one too many has come."""


class Flow:
    """One direction of a connection: no other one has the same bytes at the same place."""

    def __init__(self, number: int):
        self._place = number * 7919 % PERIOD
        self.count = 0

    def take(self, size: int) -> bytes:
        place = self._place
        self._place = (place + size) % PERIOD
        self.count += size
        return BYTES[place : place + size]

    def compare(self, data: bytes) -> None:
        for begin in range(0, len(data), LARGEST):
            at, piece = self.count, data[begin : begin + LARGEST]
            if piece != self.take(len(piece)):
                raise Wrong(f"other bytes after {at}")


class End:
    """One of the two ends of connection `number`."""

    def __init__(self, run: "Run", number: int, mine: int, reader, writer):
        self.run = run
        self.reader, self.writer = reader, writer
        self.sent, self.received = Flow(2 * number + mine), Flow(2 * number + 1 - mine)

    async def send(self, size: int) -> None:
        self.writer.write(self.sent.take(size))
        await self.writer.drain()

    async def receive(self, size: int) -> None:
        self.received.compare(await self.reader.readexactly(size))

    async def receive_to_end(self) -> None:
        while data := await self.reader.read(LARGEST):
            self.received.compare(data)

    def end(self) -> None:
        self.writer.write_eof()

    async def exchange(self, size: int) -> None:
        await self.send(size)
        await self.receive(size)

    async def finish(self) -> None:
        await self.exchange(1000)
        self.end()
        await self.receive_to_end()

    async def go_on(self) -> None:
        """Send a little now and then, and more at the end."""
        while await self.run.goes_on(0.3):
            await self.send(50)
        await self.send(5000)
        self.end()


async def ping(client: End) -> None:
    waits = [0.0] * PAUSES
    while await client.run.goes_on(0.005):
        began = time.monotonic()
        await client.exchange(64)
        heapq.heappushpop(waits, time.monotonic() - began)
    client.run.pauses_ms += [round(1000 * wait) for wait in waits]
    await client.finish()


async def talk(client: End) -> None:
    while await client.run.goes_on(0.2 + random.random() / 10):
        await client.exchange(random.randint(1, 3000))
    await client.finish()


async def idle(client: End) -> None:
    await client.run.ending.wait()
    await client.finish()


async def held(client: End) -> None:
    await client.run.ending.wait()
    await client.reader.readexactly(1)
    await client.finish()


async def bulk(client: End) -> None:
    while await client.run.goes_on(0.1):
        await client.exchange(LARGEST)
    await client.finish()


async def echo(server: End) -> None:
    """Answer with bytes of its own, as many as come."""
    while data := await server.reader.read(LARGEST):
        server.received.compare(data)
        await server.send(len(data))
    server.end()


async def half(client: End) -> None:
    await client.send(5000)
    client.end()
    await client.receive_to_end()


async def half_server(server: End) -> None:
    await server.receive_to_end()
    await server.go_on()


async def answer(client: End) -> None:
    await client.receive_to_end()
    await client.go_on()


async def answer_server(server: End) -> None:
    await server.send(5000)
    server.end()
    await server.receive_to_end()


async def stalled(client: End) -> None:
    await client.run.ending.wait()
    await client.receive(STALLED)
    await client.finish()


async def stalled_server(server: End) -> None:
    for _ in range(STALLED // 10_000):
        await server.send(10_000)
    await echo(server)


KINDS = {
    "ping": (ping, echo),
    "talk": (talk, echo),
    "idle": (idle, echo),
    "bulk": (bulk, echo),
    "half": (half, half_server),
    "answer": (answer, answer_server),
    "stalled": (stalled, stalled_server),
    "held": (held, echo),
}


class Run:
    """All connections, by number: first those of the first kind."""

    def __init__(self, listeners: list[str], target: str, counts: dict[str, int]):
        self.listeners, self.target = listeners, target
        self.kinds = [kind for kind, count in counts.items() for _ in range(count)]
        self.ending = asyncio.Event()
        self.pauses_ms: list[int] = []
        self.places = asyncio.Semaphore(AT_A_TIME)
        self.missing = len(self.kinds) - counts.get("held", 0)
        self.all_open = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.served = [loop.create_future() for _ in self.kinds]
        """Of each connection, the server's end when it is done, or a Wrong."""

    async def goes_on(self, seconds: float) -> bool:
        """Wait that long; tell whether it is not over."""
        try:
            await asyncio.wait_for(self.ending.wait(), seconds)
        except TimeoutError:
            return True
        return False

    async def run(self) -> dict:
        server = await self.listen(self.target)
        clients = [asyncio.create_task(self.outcome(one)) for one in range(len(self.kinds))]
        opened = asyncio.create_task(self.all_open.wait())
        await asyncio.wait([opened, *clients], return_when=asyncio.FIRST_COMPLETED)
        print("open" if opened.done() else "failed", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        others = [await self.listen(str(int(self.target) + 1))] if "held" in self.kinds else []
        self.ending.set()
        outcomes = await asyncio.gather(*clients)
        for each in (server, *others):
            each.close()
        counts: dict[str, collections.Counter] = {}
        for kind, how in zip(self.kinds, outcomes, strict=True):
            counts.setdefault(kind, collections.Counter())[how] += 1
        return {**counts, "pauses_ms": sorted(self.pauses_ms)}

    async def listen(self, target: str) -> asyncio.Server:
        if target.isdigit():
            return await asyncio.start_server(self.serve, "127.0.0.1", int(target), backlog=4096)
        return await asyncio.start_unix_server(self.serve, target, backlog=4096)

    async def outcome(self, number: int) -> str:
        """Open a connection, and tell how it has ended: "ok", or what went wrong."""
        try:
            client = await self.connect(number)
            kind = self.kinds[number]
            await KINDS[kind][0](client)
            server = await asyncio.wait_for(self.served[number], PATIENCE)
            if isinstance(server, Wrong):
                raise server
            if client.received.count != server.sent.count:
                raise Wrong(f"{client.received.count} of {server.sent.count} bytes to the client")
            if server.received.count != client.sent.count:
                raise Wrong(f"{server.received.count} of {client.sent.count} bytes to the server")
        except (OSError, EOFError, TimeoutError, Wrong) as error:
            return f"{type(error).__name__}: {error}"
        return "ok"

    async def connect(self, number: int) -> End:
        held = self.kinds[number] == "held"
        usual = self.listeners[:-1] if "held" in self.kinds else self.listeners
        where = self.listeners[-1] if held else usual[number % len(usual)]
        async with self.places:
            if where.isdigit():
                streams = await asyncio.open_connection("127.0.0.1", int(where))
            else:
                streams = await asyncio.open_unix_connection(where)
            client = End(self, number, 0, *streams)
            client.writer.write(number.to_bytes(8, "big"))
            if not held:  # the server's first byte
                await client.reader.readexactly(1)
                self.missing -= 1
                if not self.missing:
                    self.all_open.set()
        return client

    async def serve(self, reader, writer) -> None:
        number = int.from_bytes(await reader.readexactly(8), "big")
        server = End(self, number, 1, reader, writer)
        try:
            writer.write(b"k")
            await KINDS[self.kinds[number]][1](server)
            result = server
        except (OSError, EOFError, Wrong) as error:
            result = Wrong(f"server: {type(error).__name__}: {error}")
        self.served[number].set_result(result)
        writer.close()


async def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    listeners, target, *counts = sys.argv[1:]
    kinds = {kind: int(count) for kind, count in (one.split("=") for one in counts)}
    print(json.dumps(await Run(listeners.split(","), target, kinds).run()))


asyncio.run(main())
