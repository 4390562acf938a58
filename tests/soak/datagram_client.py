"""The clients of datagrams: flows that come and go, and ask in bursts.

Settings: `name`; `seed`; `first_number`; `listeners`: [{"name", "family", "address", "rate" (flows
a second), "open_max"}]. A UDP listener has all addresses of loopback: a client takes any of them,
and answers from another do not reach it. The orders are those of the other clients.
"""

import asyncio
import contextlib
import random
import socket

from kit.load import Tally, cancelled, orders, read_settings, run, tell
from kit.pattern import Corrupt
from soak import datagrams

GONE = (ConnectionRefusedError, ConnectionResetError)
"""The proxy or the flow's socket has an error for us, of a datagram before."""

LOST_AFTER = 2.0
"""Seconds without an answer after which the rest of a burst counts as lost: longer than any process
is stopped."""

BURSTS = 1, 12
SIZES = (8, 100, 1200, 1200, 1200, 9000, datagrams.SIZE_MAX)
"""Of datagrams; all of a burst have the same."""

BURST_BYTES = 64_000
"""At most in a burst: receive queues are short."""


class Clients:
    def __init__(self, settings):
        self.tally = Tally(settings["name"])
        self.dice = random.Random(settings["seed"])
        self.number = settings["first_number"]
        self.listeners = settings["listeners"]
        self.going = asyncio.Event()
        self.going.set()
        self.finished = False
        self.flows = set()
        self.tasks = [asyncio.ensure_future(self.generate(one)) for one in self.listeners]

    async def generate(self, listener):
        """Begin flows at the listener's rate; over `open_max`, they are left out."""
        mine = set()
        while True:
            await self.going.wait()
            await asyncio.sleep(self.dice.expovariate(listener["rate"]))
            if self.going.is_set() and len(mine) < listener["open_max"]:
                flow = asyncio.ensure_future(self.flow(listener))
                for them in (mine, self.flows):
                    them.add(flow)
                    flow.add_done_callback(them.discard)
                flow.add_done_callback(lambda _: self.tell_quiet())

    async def flow(self, listener):
        """All bursts of one client."""
        self.number += 1
        flow = Flow(self.number, listener, self.dice, self.tally)
        try:
            for _ in range(self.dice.randint(*BURSTS)):
                if not self.going.is_set():
                    break
                await flow.burst()
                await asyncio.sleep(self.dice.uniform(0, 0.2))
        except Corrupt as error:
            self.tally.fault(f"{listener['name']}: {error}")
        finally:
            flow.sock.close()

    def tell_quiet(self):
        """Tell, after "pause", that no client is open any more."""
        if self.going.is_set() or self.flows:
            return
        if self.finished:
            self.tally.send("finished")
        else:
            tell("quiet")

    def handle(self, word):
        if word == "counts":
            self.tally.send()
        elif word == "resume":
            self.going.set()
        elif word in ("pause", "finish"):
            self.going.clear()
            self.finished = word == "finish"
            self.tell_quiet()


class Flow:
    """One client."""

    def __init__(self, number, listener, dice, tally):
        self.number = number
        self.name = listener["name"]
        self.dice = dice
        self.tally = tally
        self.sent = 0
        self.last = -1
        """The number of the last answer."""
        family = listener["family"]
        self.sock = socket.socket(datagrams.FAMILIES[family], socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        address = listener["address"]
        if family == "unixgram":
            self.sock.bind("")  # without a name it would not be answered
        else:
            address = (f"127.0.0.{dice.randint(1, 9)}", address[1])
        self.sock.connect(address)

    async def burst(self):
        """Ask several times at once, and hear the answers."""
        loop = asyncio.get_running_loop()
        size = self.dice.choice(SIZES)
        count = self.dice.randint(1, min(32, BURST_BYTES // size))
        first = self.sent
        self.sent += count
        for number in range(first, self.sent):
            with contextlib.suppress(*GONE):
                await loop.sock_sendall(self.sock, datagrams.make(self.number, number, size))
        heard = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOST_AFTER):
                while self.last < self.sent - 1:
                    heard += await self.hear(loop, first)
        self.tally.add(f"{self.name}: {'answered' if heard == count else 'with losses'}")
        self.tally.add("datagrams answered", heard)
        self.tally.add("datagrams lost", count - heard)

    async def hear(self, loop, first):
        """One answer; 1 if it is one to this burst."""
        try:
            data = await loop.sock_recv(self.sock, datagrams.ONE_MAX)
        except GONE:
            return 0
        if not data.startswith(datagrams.ANSWER):
            raise Corrupt(f"no answer: {data[:40]!r}")
        client, number = datagrams.read(data.removeprefix(datagrams.ANSWER))
        if client != self.number or not self.last < number < self.sent:
            raise Corrupt(f"{number} of {client}, after {self.last} of {self.number}")
        self.last = number
        return int(number >= first)


async def main():
    settings = read_settings()
    clients = Clients(settings)
    tell("ready")
    await orders(clients.handle)  # to the end of stdin
    await cancelled([*clients.tasks, *clients.flows])


if __name__ == "__main__":
    run(main)
