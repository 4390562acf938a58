"""HTTP clients that put a proxy under load. Prints one JSON object; errors are counted in it.

    load.py mix PORT SHORT BULK ABUSIVE    that many of each kind, all at the same time
    load.py steady PORT CLIENTS SECONDS    clients that make one short request after the other

The server on PORT of 127.0.0.1 answers /small with "small\\n" and /big with the bytes of the file
/srv/e2e-big, and closes each connection after one answer.
"""

import asyncio
import collections
import hashlib
import json
import pathlib
import socket
import struct
import sys
import time

SMALL = b"small\n"
SHORT_AT_A_TIME = 10
TIMEOUT = 60  # seconds for any one request


class Wrong(Exception):
    """The answer ended, but is wrong."""


class Together:
    """Lets `count` clients go on only when each has reached this point, or has failed."""

    def __init__(self, count: int):
        self.missing = count
        self.all_here = asyncio.Event()

    def arrive(self) -> None:
        self.missing -= 1
        if self.missing <= 0:
            self.all_here.set()


async def get(port: int, path: str, together: Together) -> bytes:
    """One HTTP/1.0 request on a new connection; the answer's body."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = await reader.read(1000)
    finally:
        together.arrive()
    try:
        await together.all_here.wait()
        answer += await reader.read(-1)
    finally:
        writer.close()
        await writer.wait_closed()  # else the next connect may come before the close
    _, separator, body = answer.partition(b"\r\n\r\n")
    if not separator:
        raise Wrong("no head" if answer else "nothing")
    return body


async def small(port: int) -> None:
    if await get(port, "/small", Together(1)) != SMALL:
        raise Wrong("small")


async def big(port: int, digest: bytes, together: Together) -> None:
    if hashlib.sha256(await get(port, "/big", together)).digest() != digest:
        raise Wrong("big")


async def abuse(port: int) -> None:
    """Ask for the big file, read a little of it, and reset the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /big HTTP/1.0\r\n\r\n")
    await reader.read(1000)
    reset_on_close = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_on_close)
    writer.transport.abort()


async def tally(counter: collections.Counter, request) -> None:
    """Await one request and count how it ended."""
    try:
        await asyncio.wait_for(request, TIMEOUT)
        counter["ok"] += 1
    except (OSError, Wrong) as error:
        counter[f"{type(error).__name__}: {error}"] += 1


async def mix(port: int, shorts: int, bulks: int, abusive: int) -> dict[str, collections.Counter]:
    digest = hashlib.sha256(pathlib.Path("/srv/e2e-big").read_bytes()).digest()
    together = Together(bulks)
    counts = {kind: collections.Counter() for kind in ("short", "bulk", "abusive")}

    async def some_short(count: int) -> None:
        for _ in range(count):
            await tally(counts["short"], small(port))

    await asyncio.gather(
        *(some_short(shorts // SHORT_AT_A_TIME) for _ in range(SHORT_AT_A_TIME)),
        *(tally(counts["bulk"], big(port, digest, together)) for _ in range(bulks)),
        *(tally(counts["abusive"], abuse(port)) for _ in range(abusive)),
    )
    return counts


async def steady(port: int, clients: int, seconds: int) -> dict[str, collections.Counter]:
    counter = collections.Counter()
    end = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < end:
            await tally(counter, small(port))

    await asyncio.gather(*(client() for _ in range(clients)))
    return {"steady": counter}


def main() -> None:
    kind, *numbers = sys.argv[1:]
    print(json.dumps(asyncio.run({"mix": mix, "steady": steady}[kind](*map(int, numbers)))))


main()
