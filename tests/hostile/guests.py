"""The well-behaved clients, two per listener: one keeps its connection, one makes new ones.

Settings: `name`; `listeners`: [{"family", "address"}]. The order "mark" is answered with what has
happened since the previous one: {"stay": numbers, "come": numbers, "refused": count}, where numbers
are [count, p50, p99, worst] in microseconds. A wrong byte or a missing answer is reported at once,
as a fault.
"""

import asyncio
import socket
import time

from kit.asynchronous import GONE, connect, open_socket, read_exactly
from kit.load import Tally, cancelled, orders, read_settings, run, tell
from kit.pattern import Stream

SIZE = 64
PAUSE = 0.005
PATIENCE = 60
"""Seconds after which an answer counts as lost."""


class Guests:
    def __init__(self, settings):
        self.tally = Tally(settings["name"])
        self.listeners = settings["listeners"]
        self.number = 0
        self.stay, self.come, self.refused = [], [], 0

    async def connect(self, listener):
        sock = open_socket(listener["family"])
        await connect(sock, listener["address"])
        return sock

    async def exchange(self, sock, stream, at):
        message = bytes(stream.piece(at, SIZE))
        async with asyncio.timeout(PATIENCE):
            await asyncio.get_running_loop().sock_sendall(sock, message)
            answer = await read_exactly(sock, len(message))
        if answer != message:
            raise ValueError(f"byte {at}: {message.hex()} came back as {answer.hex()}")
        return len(message)

    def stream(self):
        self.number += 1
        return Stream(self.number, 0)

    async def staying(self, listener):
        """Keep one connection for the whole run."""
        at, stream = 0, self.stream()
        with await self.connect(listener) as sock:
            await asyncio.get_running_loop().sock_sendall(sock, b"e")
            while True:
                start = time.perf_counter()
                at += await self.exchange(sock, stream, at)
                self.stay.append(time.perf_counter() - start)
                await asyncio.sleep(PAUSE)

    async def coming(self, listener):
        """Make one connection after another, and count those that are refused."""
        while True:
            start = time.perf_counter()
            try:
                await self.visit(listener)
                self.come.append(time.perf_counter() - start)
            except (EOFError, *GONE):
                self.refused += 1
            await asyncio.sleep(PAUSE)

    async def visit(self, listener):
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE):
            sock = await self.connect(listener)
        with sock:
            await loop.sock_sendall(sock, b"e")
            await self.exchange(sock, self.stream(), 0)
            sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(PATIENCE):
                if await loop.sock_recv(sock, 1):
                    raise ValueError("bytes after the end")

    async def at(self, work, listener):
        try:
            await work(listener)
        except (OSError, EOFError, ValueError) as error:  # TimeoutError is an OSError
            self.tally.fault(
                f"{work.__name__} at {listener['family']} {listener['address']}: {error!r}"
            )

    def mark(self, word):
        if word == "mark":
            tell("marked", stay=numbers(self.stay), come=numbers(self.come), refused=self.refused)
            self.stay, self.come, self.refused = [], [], 0


def numbers(values):
    if not values:
        return [0, 0, 0, 0]
    ordered = sorted(values)
    picks = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100], ordered[-1]
    return [len(ordered), *(round(value * 1e6) for value in picks)]


async def main():
    guests = Guests(read_settings())
    tasks = [
        asyncio.ensure_future(guests.at(work, listener))
        for listener in guests.listeners
        for work in (guests.staying, guests.coming)
    ]
    tell("ready")
    await orders(guests.mark)
    await cancelled(tasks)


if __name__ == "__main__":
    run(main)
