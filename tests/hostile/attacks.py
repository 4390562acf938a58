"""What hostile clients do. Each attack is a coroutine that returns a note for the report.

`place.addresses` are those of the proxy's listeners, by name. Sockets opened through `place` are
closed with a reset once the effect of the attack has been measured.
"""

import asyncio
import contextlib
import itertools
import os
import random
import socket
import struct
import time

from hostile.callers import callers
from hostile.sources import PER_SOURCE, SOURCE, headers, one_source
from kit.asynchronous import connect, open_socket

PAIRS = ("tcp-to-tcp", "tcp-to-unix", "unix-to-tcp", "unix-to-unix")
ATTACKED = tuple(f"{pair}-attacked" for pair in PAIRS)
"""Listeners for attackers; their targets run in another process than those of the guests."""
LINGER = struct.pack("ii", 1, 0)
TCP_REPAIR = 19
IP_BIND_ADDRESS_NO_PORT = 24
MANY = 200
GONE = (OSError, EOFError)
STUCK = 0.5
"""Seconds after which a client that can neither write nor read sends a reset."""


class Place:
    """Where an attack happens: addresses, its random numbers, and the sockets it has opened."""

    def __init__(self, addresses, seconds, dice, socket_count):
        """`socket_count` tells how many sockets the program has."""
        self.addresses = addresses
        self.socket_count = socket_count
        self.seconds = seconds
        self.dice = dice
        self.open = []
        self.faults = []
        """What the attack has found, in words."""
        self.callers_bytes = 0
        """What callers of the inspection socket may have the program keep."""
        self.until = time.monotonic() + seconds

    def going_on(self):
        return time.monotonic() < self.until

    def last(self, seconds):
        """Go on for this time at least."""
        self.until = time.monotonic() + max(self.seconds, seconds)

    def socket(self, listener):
        sock = open_socket(listener.split("-")[0])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        return sock

    async def connect(self, listener, keep=True, source=None):
        """Return a client's socket that resets when it is closed; None if it was refused.

        `source`: its address.
        """
        sock = self.socket(listener)
        try:
            if source:
                sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                sock.bind((source, 0))
            await connect(sock, self.addresses[listener])
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
    """Three times as many clients as the limit allows; each refused one tries again."""
    refused = 0

    async def one(listener):
        nonlocal refused
        while place.going_on():
            sock = await place.connect(listener, keep=False)
            if sock is None:
                continue
            with sock, contextlib.suppress(*GONE):
                async with asyncio.timeout(max(place.until - time.monotonic(), 0)):
                    if await asyncio.get_running_loop().sock_recv(sock, 1) == b"":
                        refused += 1
            await asyncio.sleep(0.01)

    listeners = itertools.cycle(ATTACKED)
    await asyncio.gather(*(one(next(listeners)) for _ in range(3 * 256)))
    return f"{refused} refused"


async def drip(place):
    """Clients that send a byte ten times a second, and read as slowly."""
    sent = 0

    async def one(listener):
        nonlocal sent
        sock = await place.connect(listener)
        await asyncio.get_running_loop().sock_sendall(sock, b"e")
        while place.going_on():
            await asyncio.sleep(0.1)
            await asyncio.get_running_loop().sock_sendall(sock, b"x")
            await asyncio.get_running_loop().sock_recv(sock, 1)
            sent += 1

    listeners = itertools.cycle(ATTACKED)
    await asyncio.gather(*(one(next(listeners)) for _ in range(MANY)))
    return f"{MANY} clients, {sent} bytes one at a time"


async def never_read(place):
    """Clients whose targets send without end, and that read nothing."""
    listeners = itertools.cycle(ATTACKED)
    for _ in range(MANY):
        sock = await place.connect(next(listeners))
        await asyncio.get_running_loop().sock_sendall(sock, b"f")
    await asyncio.sleep(max(place.until - time.monotonic(), 0))
    return f"{MANY} clients"


async def resets(place):
    """Resets at every point in the life of a connection, from many clients at once."""
    counts = dict.fromkeys(POINTS, 0)

    async def one(number):
        points = itertools.islice(itertools.cycle(POINTS.items()), number, None)
        for name, (listeners, act) in points:
            if not place.going_on():
                return
            sock = await place.connect(place.dice.choice(listeners), keep=False)
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
    """Send to a target that does not read; but not on UNIX sockets, which have no reset: what a
    client sent before it closed waits for its reader there, as it would without a proxy."""
    mode = b"e" if sock.family == socket.AF_UNIX else b"n"
    await asyncio.get_running_loop().sock_sendall(sock, mode + bytes(dice.randrange(1 << 20)))


async def after_end(sock, dice):
    await asyncio.get_running_loop().sock_sendall(sock, dice.choice((b"e", b"f", b"n")))
    sock.shutdown(socket.SHUT_WR)
    await asyncio.sleep(dice.choice((0, 0.001, 0.01)))


async def while_lingering(sock, dice):
    """The target has reset, and its data are still on their way to a client that does not read."""
    await asyncio.get_running_loop().sock_sendall(sock, b"r")
    await asyncio.sleep(dice.uniform(0.05, 0.3))


POINTS = {
    "before accept": (ATTACKED, before_accept),
    "while held": (("tcp-to-nobody",), a_while),
    "while connecting": (("tcp-to-full",), a_while),
    "after the first byte": (ATTACKED, after_first_byte),
    "mid stream": (ATTACKED, mid_stream),
    "mid upload": (ATTACKED, mid_upload),
    "after the end": (ATTACKED, after_end),
    "while lingering": (ATTACKED, while_lingering),
}


async def connect_and_reset(place):
    """60 000 connections that are reset before a byte is sent."""
    started = time.monotonic()
    for number in range(60_000):
        sock = place.socket("tcp")
        with sock, contextlib.suppress(BlockingIOError):
            sock.connect(place.addresses[ATTACKED[number % 2]])
        if number % 64 == 0:
            await asyncio.sleep(0)
    return f"60 000 in {time.monotonic() - started:.1f} s"


async def half_open(place):
    """Clients that vanish without FIN or RST, as if a cable were pulled."""
    for number in range(MANY):
        sock = await place.connect(ATTACKED[number % 2], keep=False)
        await asyncio.get_running_loop().sock_sendall(sock, b"e")
        # A socket in repair mode is closed without a packet: tcp(7), CAP_NET_ADMIN.
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
    "callers": (callers, ()),
    "one-source": (one_source, (f"--connections-max-per-source={PER_SOURCE}",)),
    "headers": (headers, (f"--accept-proxy-protocol={SOURCE}",)),
}
"""Name → the attack, and the options of the attacked proxy."""


def dice(seed):
    return random.Random(f"{seed}/{os.path.basename(__file__)}")
