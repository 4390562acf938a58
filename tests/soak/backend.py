"""The targets: accept on every given address, and follow the plan of each client.

Settings: `name`; `listen`: [{"family", "address", "header"}], where `header` is the version of the
PROXY header that precedes the data (0: none); `datagrams`: [{"family", "address"}], which are sent
back; `strict`: every plan must be completed, because this process is not killed. Reports "ready"
with the addresses, and "counts" when ordered.
"""

import asyncio
import socket
import struct

from kit.asynchronous import GONE, listen, read_exactly
from kit.load import Tally, cancelled_servers, orders, read_settings, run, tell
from kit.pattern import Corrupt, Stream
from soak import datagrams
from soak import plan as plans
from soak.sides import BUFFER, DOWN, Fault, Side

PATIENCE = 90
"""Seconds after which an exchange that has not ended counts as a hang. Long, because other programs
use the machine too."""

_V2_START = b"\r\n\r\n\0\r\nQUIT\n\x21"


class Backend:
    def __init__(self, settings):
        self.strict = settings["strict"]
        self.tally = Tally(settings["name"])
        self.tasks = set()

    async def accept(self, listener, header):
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(listener)
            task = asyncio.ensure_future(self.serve(sock, header))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def serve(self, sock, header):
        """Serve one client from its first byte to its end, and close it in any case."""
        plan = None
        try:
            async with asyncio.timeout(PATIENCE):
                port = await read_proxy_header(sock) if header else 0
                plan = plans.unpack(await read_exactly(sock, plans.HEAD_SIZE))
            # A client that was reset before the proxy accepted it no longer has an address.
            gone = port == 0 and plan.client.fate == plans.RESET
            if plan.port != port and not gone:
                raise Fault(f"the PROXY header says port {port}, the client is at {plan.port}")
            await self.follow(sock, plan)
            self.tally.add(f"{plans.KINDS[plan.kind]} served")
        except TimeoutError:
            self.tally.fault("no header came")
        except (EOFError, *GONE) as error:
            # The client has gone before it sent its plan: it was reset, or cut.
            self.tally.add("gone early")
            if plan is not None and self.strict and plan.kind != plans.SLEEP:
                self.tally.fault(f"{plan}: {error!r}")
        except (Fault, Corrupt, ValueError) as error:
            self.tally.fault(f"{plan}: {error}")
        finally:
            sock.close()

    async def follow(self, sock, plan):
        if plan.kind == plans.EXCHANGE:
            side = Side(sock, plan.number, plan.server, plan.client, DOWN)
            budget = (plan.client.stall_ms + plan.server.stall_ms) / 1000
            await side.play(budget + PATIENCE)
            # Only the clients can judge whether their connections were cut.
            side.judge(strict=False, resets=False)
            self.tally.add("bytes", side.received)
        else:
            work = {plans.ECHO: self.echo, plans.SINK: self.sink, plans.SLEEP: self.sleep}
            await work[plan.kind](sock, Stream(plan.number, 0))

    async def echo(self, sock, stream):
        """Send everything back, then the end."""
        loop, view, at = asyncio.get_running_loop(), memoryview(bytearray(BUFFER)), 0
        while size := await loop.sock_recv_into(sock, view):
            stream.check(at, view[:size])
            await loop.sock_sendall(sock, view[:size])
            at += size
        sock.shutdown(socket.SHUT_WR)

    async def sink(self, sock, stream):
        """Read to the end, then send the number of bytes."""
        loop, view, at = asyncio.get_running_loop(), memoryview(bytearray(BUFFER)), 0
        while size := await loop.sock_recv_into(sock, view):
            stream.check(at, view[:size])
            at += size
            self.tally.add("bytes", size)
        await loop.sock_sendall(sock, struct.pack("!Q", at))

    async def sleep(self, sock, _stream):
        """Wait until the proxy cuts the connection."""
        await asyncio.get_running_loop().sock_recv(sock, 1)


async def read_proxy_header(sock):
    """Return the client's port from a PROXY v2 header, 0 for a LOCAL one. Raises Fault."""
    start = await read_exactly(sock, 16)
    if start[:12] != _V2_START[:12] or start[12] not in (0x20, 0x21):
        raise Fault(f"no PROXY v2 header: {start.hex()}")
    rest = await read_exactly(sock, int.from_bytes(start[14:16], "big"))
    if start[12] == 0x20:
        return 0
    at = {0x11: 8, 0x21: 32}[start[13]]
    return int.from_bytes(rest[at : at + 2], "big")


async def main():
    settings = read_settings()
    backend = Backend(settings)
    listeners = [listen(one["family"], one["address"]) for one in settings["listen"]]
    echoes = [
        datagrams.Echo(datagrams.bind(one["family"], one["address"]), backend.tally)
        for one in settings["datagrams"]
    ]
    tell("ready", addresses=[one.getsockname() for one in listeners])
    accepting = [
        asyncio.ensure_future(backend.accept(listener, one["header"]))
        for listener, one in zip(listeners, settings["listen"], strict=True)
    ]

    def handle(word):
        if word == "counts":
            backend.tally.send(open=len(backend.tasks))

    await orders(handle)  # to the end of stdin
    await cancelled_servers(accepting, backend.tasks)
    for each in [*listeners, *echoes]:
        each.close()


if __name__ == "__main__":
    run(main)
