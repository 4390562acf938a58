"""A WebSocket server that echoes, and clients that check every answer.

websocket.py serve PORT PATH     on a port of 127.0.0.1 and on a UNIX socket
websocket.py check ADDRESS       a port of 127.0.0.1 or a path; prints what was done, or fails
"""

import asyncio
import os
import random
import sys

import websockets

CLIENTS = 20
MESSAGES = 20  # per client, in flight at the same time
LARGEST = 100_000  # bytes of one of those
LARGE = 4 << 20  # bytes of one more message
TIMEOUT = 60  # seconds


async def echo(connection) -> None:
    async for message in connection:
        await connection.send(message)


async def serve(port: str, path: str) -> None:
    async with (
        websockets.serve(echo, "127.0.0.1", int(port), max_size=None),
        websockets.unix_serve(echo, path, max_size=None),
    ):
        await asyncio.Future()


def connect(address: str):
    limits = {"max_size": None, "open_timeout": TIMEOUT}
    if address.startswith("/"):
        return websockets.unix_connect(address, "ws://localhost/", **limits)
    return websockets.connect(f"ws://127.0.0.1:{address}/", **limits)


async def client(address: str, seed: int) -> int:
    """Exchange messages and close cleanly; return the number of bytes that came back."""
    rng = random.Random(seed)
    # Text and binary messages must come back as such.
    messages = [rng.randbytes(rng.randrange(LARGEST)) for _ in range(MESSAGES)]
    messages += ["", "text \N{SNOWMAN}", os.urandom(LARGE) if seed == 0 else b""]
    async with connect(address) as connection:
        await (await connection.ping())
        sending = asyncio.ensure_future(send_all(connection, messages))
        for number, message in enumerate(messages):
            if await connection.recv() != message:
                raise SystemExit(f"client {seed}: message {number} came back changed")
        await sending
        await connection.close(1000, "done")
    if connection.close_code != 1000:
        raise SystemExit(f"client {seed}: closed with {connection.close_code}")
    return sum(map(len, messages))


async def send_all(connection, messages) -> None:
    for message in messages:
        await connection.send(message)


async def check(address: str) -> None:
    clients = asyncio.gather(*(client(address, seed) for seed in range(CLIENTS)))
    moved = sum(await asyncio.wait_for(clients, TIMEOUT))
    print(f"{CLIENTS} clients, {CLIENTS * (MESSAGES + 3)} messages, {moved >> 20} MiB")


asyncio.run({"serve": serve, "check": check}[sys.argv[1]](*sys.argv[2:]))
