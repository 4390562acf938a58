"""What hostile clients do. Each attack is a coroutine that goes on until it is over.

`place.doors` are the doors of the proxy, {name: address}; what is opened through `place` is closed,
by reset, when the attack has been looked at.
"""

import asyncio
import contextlib
import itertools
import os
import random
import socket
import struct
import time

from kit.asynchronous import connect, open_socket

PAIRS = ("tcp-to-tcp", "tcp-to-unix", "unix-to-tcp", "unix-to-unix")
FOES = tuple(f"{pair}-foes" for pair in PAIRS)
"""Doors of the attackers, whose targets are another process than those of the guests."""
LINGER = struct.pack("ii", 1, 0)
TCP_REPAIR = 19
MANY = 200
GONE = (OSError, EOFError)
STUCK = 0.5
"""Seconds after which a client that can neither write nor read sends a reset."""


class Place:
    """Where the attack happens: addresses, its dice, and what it has opened."""

    def __init__(self, doors, seconds, dice):
        self.doors = doors
        self.seconds = seconds
        self.dice = dice
        self.open = []
        self.until = time.monotonic() + seconds

    def going_on(self):
        return time.monotonic() < self.until

    def socket(self, door):
        sock = open_socket(door.split("-")[0])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        return sock

    async def connect(self, door, keep=True):
        """A client's socket that resets when it is closed; None where it was refused."""
        sock = self.socket(door)
        try:
            await connect(sock, self.doors[door])
        except OSError:
            return None
        if keep:
            self.open.append(sock)
        return sock

    def close(self):
        for sock in self.open:
            sock.close()
        self.open = []


async def flood(place):
    """Three times the limit of connections, each that is refused at once come again."""
    refused = 0

    async def one(door):
        nonlocal refused
        while place.going_on():
            sock = await place.connect(door, keep=False)
            if sock is None:
                continue
            with sock, contextlib.suppress(*GONE):
                async with asyncio.timeout(max(place.until - time.monotonic(), 0)):
                    if await asyncio.get_running_loop().sock_recv(sock, 1) == b"":
                        refused += 1
            await asyncio.sleep(0.01)

    doors = itertools.cycle(FOES)
    await asyncio.gather(*(one(next(doors)) for _ in range(3 * 256)))
    return f"{refused} refused"


async def drip(place):
    """Clients that send a byte ten times a second, and read as slowly."""
    sent = 0

    async def one(door):
        nonlocal sent
        sock = await place.connect(door)
        await asyncio.get_running_loop().sock_sendall(sock, b"e")
        while place.going_on():
            await asyncio.sleep(0.1)
            await asyncio.get_running_loop().sock_sendall(sock, b"x")
            await asyncio.get_running_loop().sock_recv(sock, 1)
            sent += 1

    doors = itertools.cycle(FOES)
    await asyncio.gather(*(one(next(doors)) for _ in range(MANY)))
    return f"{MANY} clients, {sent} bytes one at a time"


async def never_read(place):
    """Clients that are sent much, and read nothing."""
    doors = itertools.cycle(FOES)
    for _ in range(MANY):
        sock = await place.connect(next(doors))
        await asyncio.get_running_loop().sock_sendall(sock, b"f")
    await asyncio.sleep(max(place.until - time.monotonic(), 0))
    return f"{MANY} clients"


async def resets(place):
    """Resets at every point of the life of a connection, from many at once."""
    counts = dict.fromkeys(POINTS, 0)

    async def one(number):
        points = itertools.islice(itertools.cycle(POINTS.items()), number, None)
        for name, (doors, act) in points:
            if not place.going_on():
                return
            sock = await place.connect(place.dice.choice(doors), keep=False)
            if sock is not None:
                with sock, contextlib.suppress(*GONE):
                    counts[name] += 1
                    async with asyncio.timeout(STUCK):  # a TimeoutError is an OSError
                        await act(sock, place.dice)

    await asyncio.gather(*(one(number) for number in range(40)))
    missing = [name for name, count in counts.items() if not count]
    if missing:
        raise AssertionError(f"no reset {missing}")
    return f"{sum(counts.values())} resets: " + ", ".join(
        f"{n} {name}" for name, n in counts.items()
    )


async def before_accept(_sock, _dice):
    pass


async def a_while(_sock, dice):
    await asyncio.sleep(dice.uniform(0.001, 0.3))


async def after_first_byte(sock, dice):
    await asyncio.get_running_loop().sock_sendall(sock, b"e")
    await asyncio.sleep(dice.choice((0, 0.001, 0.01)))


async def mid_stream(sock, dice):
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, b"f")
    for _ in range(dice.randrange(1, 20)):
        await loop.sock_recv(sock, 1 << 18)


async def mid_upload(sock, dice):
    """To a target that does not read; but UNIX knows no reset, and what a client who has closed
    there has sent waits for its reader, as it would in the kernel."""
    mode = b"e" if sock.family == socket.AF_UNIX else b"n"
    await asyncio.get_running_loop().sock_sendall(sock, mode + bytes(dice.randrange(1 << 20)))


async def after_end(sock, dice):
    await asyncio.get_running_loop().sock_sendall(sock, dice.choice((b"e", b"f", b"n")))
    sock.shutdown(socket.SHUT_WR)
    await asyncio.sleep(dice.choice((0, 0.001, 0.01)))


async def while_lingering(sock, dice):
    """The target has reset, and what it had sent is still on its way to a client that waits."""
    await asyncio.get_running_loop().sock_sendall(sock, b"r")
    await asyncio.sleep(dice.uniform(0.05, 0.3))


POINTS = {
    "before accept": (FOES, before_accept),
    "while held": (("tcp-to-nobody",), a_while),
    "while connecting": (("tcp-to-full",), a_while),
    "after the first byte": (FOES, after_first_byte),
    "mid stream": (FOES, mid_stream),
    "mid upload": (FOES, mid_upload),
    "after the end": (FOES, after_end),
    "while lingering": (FOES, while_lingering),
}


async def connect_and_reset(place):
    """60 000 connections that are reset before anything is said."""
    started = time.monotonic()
    for number in range(60_000):
        sock = place.socket("tcp")
        with sock, contextlib.suppress(BlockingIOError):
            sock.connect(place.doors[FOES[number % 2]])
        if number % 64 == 0:
            await asyncio.sleep(0)
    return f"60 000 in {time.monotonic() - started:.1f} s"


async def half_open(place):
    """Clients that vanish without a word: no FIN, no RST, as when a cable is pulled."""
    for number in range(MANY):
        sock = await place.connect(FOES[number % 2], keep=False)
        await asyncio.get_running_loop().sock_sendall(sock, b"e")
        # A socket under repair is closed without telling its peer: tcp(7), CAP_NET_ADMIN.
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        sock.close()
    await asyncio.sleep(max(place.until - time.monotonic(), 0))
    return f"{MANY} clients"


ATTACKS = {
    "flood": (flood, ("--connections-max=256",)),
    "drip": (drip, ()),
    "never-read": (never_read, ()),
    "resets": (resets, ()),
    "60000": (connect_and_reset, ()),
    "half-open": (half_open, ("--idle-timeout=2s",)),
}
"""Name → what is done, and the options of the proxy that it is done to."""


def dice(seed):
    return random.Random(f"{seed}/{os.path.basename(__file__)}")
