"""Attacks from one address: on its share of the limit, and on the reader of PROXY headers.

The guests have another address. Like all attacks, these are coroutines that return a note.
"""

import asyncio
import contextlib
import itertools
import time
import zlib

from kit.file_limit import files_allowed
from kit.proxy_header import SIGNATURE

SOURCE = "127.0.0.2"
"""Where the attackers come from."""

PER_SOURCE = 64
"""How many connections it may have."""

MANY = 2000
"""Clients at once."""

LISTENERS = ("tcp-to-tcp-attacked", "tcp-to-unix-attacked")
GONE = (OSError, EOFError)

PATIENCE_S = 60
"""When an attack is over at the latest, whatever it has come to."""

HEADER_S = 5
"""How long a header may take (HEADER_MS in header_reader.py)."""

MESSAGE = b"x" * 64


async def one_source(place):
    """Thousands of clients of one address want connections, and keep those that they get."""
    counts = dict.fromkeys(("refused", "served", "most"), 0)
    listeners = itertools.cycle(LISTENERS)
    place.last(PATIENCE_S)
    with files_allowed(2 * MANY):
        clients = [asyncio.create_task(one(place, next(listeners), counts)) for _ in range(MANY)]
        started = time.monotonic()
        while place.going_on() and not (
            counts["most"] >= PER_SOURCE
            and counts["refused"] >= 2 * MANY
            and time.monotonic() - started >= place.seconds
        ):
            await asyncio.sleep(0.05)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    if counts["most"] != PER_SOURCE:
        place.faults.append(f"{counts['most']} at once were served, expected {PER_SOURCE}")
    if counts["refused"] < 2 * MANY:
        place.faults.append(f"only {counts['refused']} were refused")
    return f"{counts['refused']} refused, {counts['most']} served at once"


async def one(place, listener, counts):
    """Connect again and again, and stay once that is served."""
    loop = asyncio.get_running_loop()
    while True:
        sock = await place.connect(listener, keep=False, source=SOURCE)
        if sock is None:
            continue
        with sock, contextlib.suppress(*GONE):
            await loop.sock_sendall(sock, b"ex")
            if await loop.sock_recv(sock, 1) == b"x":
                counts["served"] += 1
                counts["most"] = max(counts["most"], counts["served"])
                await loop.sock_recv(sock, 1)
                counts["served"] -= 1
        counts["refused"] += 1
        await asyncio.sleep(0.01)


# ── PROXY headers ────────────────────────────────────────────────────────────────────────────────

GOOD = b"PROXY TCP4 192.0.2.1 198.51.100.2 5000 443\r\n"
LONGEST = SIGNATURE + b"\x21\x11\x0f\xf0" + bytes(12) + b"\x04\x0f\xe1" + bytes(0xFE1)
"""4096 bytes."""

BAD = (
    b"GET / HTTP/1.1\r\n\r\n",
    b"PROXY TCP4 192.0.2.1 198.51.100.2 5000 99999\r\n",
    b"PROXY " + b"9" * 200,
    SIGNATURE + b"\x21\x11\xff\xff" + bytes(1000),
    SIGNATURE + b"\x2f\x11\0\0",
    SIGNATURE + b"\x21\x11\0\x13" + bytes(12) + b"\x03\0\x04wron",
    LONGEST[:28] + b"\x20\0\x01x" * 1000 + bytes(67) + b"\xff",
    zlib.compress(bytes(100_000)),
)


async def headers(place):
    """Thousands of clients that must begin with a PROXY header do not, or take their time."""
    counts = dict.fromkeys(SENDERS, 0)

    async def sender(name, listener):
        act, _ = SENDERS[name]
        while place.going_on():
            sock = await place.connect(listener, keep=False, source=SOURCE)
            if sock is None:
                continue
            with sock, contextlib.suppress(*GONE):
                counts[name] += 1
                async with asyncio.timeout(max(place.until - loop.time(), 0)):
                    await act(place, sock)

    loop = asyncio.get_running_loop()
    place.last(1.5 * HEADER_S)
    with files_allowed(2 * MANY):
        listeners = itertools.cycle(LISTENERS)
        await asyncio.gather(
            *(
                sender(name, next(listeners))
                for name, (_, count) in SENDERS.items()
                for _ in range(count)
            )
        )
    if counts["silent"] <= SENDERS["silent"][1]:
        place.faults.append("no client without a header was closed")
    return ", ".join(f"{count} {name}" for name, count in counts.items())


async def silent(place, sock):
    await refused(place, sock)


async def unfinished(place, sock):
    await asyncio.get_running_loop().sock_sendall(sock, LONGEST[:-1])
    await refused(place, sock)


async def drip(place, sock):
    for number in range(len(LONGEST)):
        await asyncio.get_running_loop().sock_sendall(sock, LONGEST[number : number + 1])
        await asyncio.sleep(0.02)


async def bad(place, sock):
    await asyncio.get_running_loop().sock_sendall(sock, place.dice.choice(BAD))
    await refused(place, sock)
    await asyncio.sleep(0.02)


async def refused(place, sock):
    """Wait for the end; no byte may come before it."""
    if await asyncio.get_running_loop().sock_recv(sock, 1):
        place.faults.append("a client without a header was served")


async def good(place, sock):
    """One of the same address that does as it must is served like the guests."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, place.dice.choice((GOOD, LONGEST)))
    await loop.sock_sendall(sock, b"e" + MESSAGE)
    answer = b""
    while len(answer) < len(MESSAGE):
        piece = await loop.sock_recv(sock, 100)
        if not piece:
            place.faults.append("a client with a header was closed")
            return
        answer += piece
    await asyncio.sleep(0.02)


SENDERS = {
    "silent": (silent, MANY // 2),
    "unfinished": (unfinished, MANY // 4),
    "byte by byte": (drip, 200),
    "bad": (bad, 50),
    "good": (good, 10),
}
"""Name → what such a client does, and how many there are at once."""
