"""The clients of the inspection sockets: they list, watch, read the metrics, and terminate.

Settings: `name`; `seed`; `proxies`: [{"name", "path", "strict", "terminates"}]. `strict`: each call
must be answered in full. `terminates`: connections may be terminated. The orders are those of the
other clients.
"""

import asyncio
import contextlib
import json
import random

from kit.asynchronous import connect, open_socket
from kit.load import Tally, cancelled, orders, read_settings, run, tell

PAUSE = 0.05, 0.5
"""Seconds between two calls, the least and the most."""

WATCHED = 0.5
"""Seconds that a watcher stays."""

PATIENCE = 60
"""Seconds after which an answer counts as lost."""

PROXY = "net.socketproxyd.Proxy"
GONE = (OSError, EOFError)


class Inspector:
    def __init__(self, settings):
        self.tally = Tally(settings["name"])
        self.dice = random.Random(settings["seed"])
        self.going = asyncio.Event()
        self.going.set()
        self.calling = 0
        self.tasks = [asyncio.ensure_future(self.inspect(one)) for one in settings["proxies"]]

    async def inspect(self, proxy):
        """Call again and again."""
        works = [self.list, self.metrics, self.watch]
        if proxy["terminates"]:
            works.append(self.terminate)
        while True:
            await self.going.wait()
            self.calling += 1
            try:
                work = self.dice.choice(works)
                await work(proxy)
                self.tally.add(f"{proxy['name']}: {work.__name__}")
            except ValueError as error:
                self.tally.fault(f"{proxy['name']}: {error}")
            except GONE as error:
                if proxy["strict"]:
                    self.tally.fault(f"{proxy['name']}: {error!r}")
            finally:
                self.calling -= 1
                self.tell_quiet()
            await asyncio.sleep(self.dice.uniform(*PAUSE))

    async def list(self, proxy):
        """List the connections: each is told once."""
        replies = await self.call(proxy, f"{PROXY}.List", more=True)
        rows = [reply["parameters"]["connection"] for reply in replies if "error" not in reply]
        if len({row["id"] for row in rows}) != len(rows):
            raise ValueError("a connection was told twice")
        return rows

    async def metrics(self, proxy):
        """Read the metrics."""
        replies = await self.call(proxy, "io.systemd.Metrics.List", more=True)
        if "error" in replies[-1]:
            raise ValueError(f"no metrics: {replies[-1]}")

    async def watch(self, proxy):
        """Watch what begins and ends, for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WATCHED):
                await self.call(proxy, f"{PROXY}.Watch", more=True)

    async def terminate(self, proxy):
        """Terminate one of the connections."""
        rows = await self.list(proxy)
        if rows:
            row = self.dice.choice(rows)
            await self.call(proxy, f"{PROXY}.Terminate", parameters={"id": row["id"]})

    async def call(self, proxy, method, **more):
        """Return all replies. Raises ValueError, OSError or EOFError."""
        loop = asyncio.get_running_loop()
        data = bytearray()
        with open_socket("unix") as sock:
            async with asyncio.timeout(PATIENCE):
                await connect(sock, proxy["path"])
                await loop.sock_sendall(
                    sock, json.dumps({"method": method, **more}).encode() + b"\0"
                )
                while not data.endswith(b"\0") or data.endswith(b'"continues":true}\0'):
                    piece = await loop.sock_recv(sock, 1 << 16)
                    if not piece:
                        raise EOFError(f"{method}: {len(data)} bytes, and no end")
                    data += piece
        return [json.loads(message) for message in data.split(b"\0")[:-1]]

    # ── orders ───────────────────────────────────────────────────────────────────────────────

    def order(self, word):
        if word == "counts":
            self.tally.send()
        elif word == "pause":
            self.going.clear()
            self.tell_quiet()
        elif word == "resume":
            self.going.set()
        elif word == "finish":
            self.going.clear()
            self.tally.send("finished")

    def tell_quiet(self):
        if not self.going.is_set() and self.calling == 0:
            tell("quiet")


async def main():
    inspector = Inspector(read_settings())
    tell("ready")
    await orders(inspector.order)
    await cancelled(inspector.tasks)


if __name__ == "__main__":
    run(main)
