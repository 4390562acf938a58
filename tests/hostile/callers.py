"""What hostile callers of the inspection socket do, while clients are served.

Most of them are another user's, who may see status and metrics only. All that they do happens at
once; root has to be answered in the meantime, again and again.
"""

import array
import asyncio
import contextlib
import json
import os
import select
import socket

from kit.asynchronous import connect, open_socket

INSPECT = "inspect"
"""The socket file, in the folder of the scene."""

STRANGER = 61198
"""A user id that owns nothing."""

CALLERS_MAX = 64
"""How many callers there may be, as limits.py in the program has it."""

CALL_MAX = 64 * 1024
"""The maximum size of a call, as caller.py in the program has it."""

UNREAD_MAX = 256 * 1024
"""What may wait for a watcher, as watch.py in the program has it."""

LEFT_AFTER = 16
"""Sockets in the program that belong to callers just closed, or to guests just coming."""

PATIENCE = 30

STATUS = {"method": "net.socketproxyd.Proxy.Status"}
LIST = {"method": "net.socketproxyd.Proxy.List", "more": True}
WATCH = {"method": "net.socketproxyd.Proxy.Watch", "more": True}
METRICS = {"method": "io.systemd.Metrics.List", "more": True}
INFO = {"method": "org.varlink.service.GetInfo"}

NO_CALLS = (
    b'{"method":"x","parameters":{"a":' + b"[" * 60_000 + b"\0",
    b'{"method":"x","parameters":{"a":' + b"9" * 60_000 + b"}}\0",
    b"x" * (CALL_MAX + 1),
    b"\xff\0",
    b"[]\0",
    bytes(1000),
)
LONG = b'{"method":"' + b"y" * (CALL_MAX - 13) + b'"}\0'
PIPELINE = b'{"method":"org.varlink.service.GetInfo"}\0' * 1000
GONE = (OSError, EOFError)


def encode(call):
    return json.dumps(call).encode() + b"\0"


class Faulty(Exception):
    """The program did not do what it must."""


async def caller(path, *, stranger):
    """Connect a socket, as another user or as root; None if the program or the kernel refuses.

    The kernel keeps the user who connects, so only that happens under another name.
    """
    sock = open_socket("unix")
    try:
        if stranger:
            os.seteuid(STRANGER)
        try:
            # A plain connect: while asyncio waits, other coroutines would be this user, too.
            sock.connect(path)
        finally:
            os.seteuid(0)
    except BlockingIOError:  # the backlog is full
        if stranger:
            sock.close()
            return None
        await connect(sock, path)
    return sock


async def ask(path, call):
    """Call as root; return all replies. Raises Faulty."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            sock = await caller(path, stranger=False)
            with sock:
                await loop.sock_sendall(sock, encode(call))
                while not data.endswith(b"\0") or data.endswith(b'"continues":true}\0'):
                    piece = await loop.sock_recv(sock, 1 << 16)
                    if not piece:
                        raise Faulty(f"root's {call['method']} was cut after {len(data)} bytes")
                    data += piece
    except OSError as error:  # TimeoutError is one, too
        raise Faulty(f"root's {call['method']} was not answered: {error!r}") from None
    return [json.loads(message) for message in data.split(b"\0")[:-1]]


class Attack:
    """All attackers together, and the counts for the report."""

    def __init__(self, place):
        self.place = place
        self.path = place.addresses[INSPECT]
        place.callers_bytes = CALLERS_MAX * (CALL_MAX + UNREAD_MAX)
        self.counts = {}
        self.most = 0
        """The most sockets that the program had."""

    def count(self, what, more=1):
        self.counts[what] = self.counts.get(what, 0) + more

    async def run(self):
        before = self.place.socket_count()
        await self.hold_all_places()
        works = (self.garbage, self.garbage, self.drips, self.floods, self.descriptors, self.leave)
        await asyncio.gather(self.root(), self.watch_sockets(), *(work() for work in works))
        await self.watchers_are_dropped()
        allowed = before + CALLERS_MAX + LEFT_AFTER
        if self.most > allowed:
            raise Faulty(f"{self.most} sockets, expected at most {allowed}")

    async def hold_all_places(self):
        """Strangers take whatever they get, each in the middle of a call: root is served still."""
        loop = asyncio.get_running_loop()
        held = []
        for _ in range(2 * CALLERS_MAX):
            sock = await caller(self.path, stranger=True)
            if sock is None:
                continue
            held.append(sock)
            with contextlib.suppress(*GONE):
                await loop.sock_sendall(sock, encode(STATUS)[:10])
        await ask(self.path, INFO)
        await ask(self.path, STATUS)
        self.most = max(self.most, self.place.socket_count())
        for sock in held:
            sock.close()
        self.count("places taken", len(held))

    async def root(self):
        """Call as root, of whom every call has to be answered in full."""
        while self.place.going_on():
            [status] = await ask(self.path, STATUS)
            metrics = await ask(self.path, METRICS)
            rows = await ask(self.path, LIST)
            if "error" in status or "error" in metrics[-1] or "error" in rows[-1]:
                raise Faulty(f"root got {status}, {metrics[-1]}, {rows[-1]}")
            ids = [row["parameters"]["connection"]["id"] for row in rows]
            if len(set(ids)) != len(ids):
                raise Faulty("a connection was told twice")
            self.count("answers to root", 3)

    async def watch_sockets(self):
        while self.place.going_on():
            self.most = max(self.most, self.place.socket_count())
            await asyncio.sleep(0.05)

    # ── strangers ────────────────────────────────────────────────────────────────────────────

    async def send(self, data, seconds):
        """Send as another user, and read until the end or for this long; False if no end came."""
        sock = await caller(self.path, stranger=True)
        if sock is None:
            await asyncio.sleep(0.01)
            return True
        loop = asyncio.get_running_loop()
        with sock, contextlib.suppress(ConnectionError):
            try:
                async with asyncio.timeout(seconds):
                    await loop.sock_sendall(sock, data)
                    while await loop.sock_recv(sock, 1 << 16):
                        pass
            except TimeoutError:
                return False
        return True

    async def garbage(self):
        """Calls that are none, too long, too deep, cut at any point, or changed a little."""
        dice = self.place.dice
        calls = [encode(call) for call in (STATUS, LIST, WATCH, METRICS, INFO)]
        while self.place.going_on():
            call = bytearray(dice.choice(calls))
            call[dice.randrange(len(call))] = dice.randrange(256)
            for data in NO_CALLS:
                if not await self.send(data, PATIENCE):
                    raise Faulty(f"who has sent {data[:40]!r}… is not dropped")
                self.count("bad calls")
            for data in (
                PIPELINE,
                LONG,
                bytes(call),
                bytes(call[: dice.randrange(len(call))]),
                dice.randbytes(dice.randrange(1, 3000)),
            ):
                await self.send(data, dice.choice((0, 0.001, 0.1)))
                self.count("doubtful calls")

    async def drips(self):
        """One byte after the other; and replies that are read as slowly."""

        async def drip(call, at_once):
            sock = await caller(self.path, stranger=True)
            if sock is None:
                return
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            with sock, contextlib.suppress(*GONE):
                for at in range(0, len(call), at_once):
                    await asyncio.get_running_loop().sock_sendall(sock, call[at : at + at_once])
                    await asyncio.sleep(0.05)
                while self.place.going_on():
                    sock.recv(1)
                    self.count("bytes dripped")
                    await asyncio.sleep(0.05)

        calls = [encode(METRICS) * 50] * 20 + [encode(STATUS)] * 20
        await asyncio.gather(*(drip(call, 1 + 9999 * (n < 20)) for n, call in enumerate(calls)))

    async def floods(self):
        """A thousand connects a second, closed at once or after a call."""
        while self.place.going_on():
            for _ in range(10):
                sock = await caller(self.path, stranger=True)
                if sock is not None:
                    with sock, contextlib.suppress(*GONE):
                        if self.place.dice.random() < 0.3:
                            sock.send(encode(METRICS))
                    self.count("connects")
            await asyncio.sleep(0.01)

    async def descriptors(self):
        """Descriptors by the hundred, and sockets in which there are further ones."""
        while self.place.going_on():
            one, other = socket.socketpair()
            with one, other, contextlib.suppress(*GONE):
                fds = array.array("i", [one.fileno()] * 250)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
                for _ in range(4):
                    other.sendmsg([b"x"], rights)  # in flight within themselves
            one, other = socket.socketpair()
            with one, other:
                sock = await caller(self.path, stranger=self.place.dice.random() < 0.5)
                if sock is not None:
                    with sock, contextlib.suppress(*GONE):
                        fds = array.array("i", [one.fileno()] * 250)
                        self.count("messages with descriptors")
                        sock.send(encode(INFO))
                        sock.sendmsg([encode(INFO)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            await asyncio.sleep(0.005)

    async def leave(self):
        """Root's calls, left at any moment."""
        dice, loop = self.place.dice, asyncio.get_running_loop()
        while self.place.going_on():
            sock = await caller(self.path, stranger=False)
            with sock, contextlib.suppress(*GONE):
                await loop.sock_sendall(sock, encode(dice.choice((LIST, WATCH, METRICS, STATUS))))
                await asyncio.sleep(dice.choice((0, 0, 0.001, 0.01)))
                if dice.random() < 0.5:
                    sock.shutdown(dice.choice((socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)))
            self.count("calls left")

    # ── root's own watchers ──────────────────────────────────────────────────────────────────

    async def watchers_are_dropped(self):
        """Watchers that read nothing take all places, until too much waits for them."""
        loop = asyncio.get_running_loop()
        watchers = []
        for _ in range(CALLERS_MAX):
            sock = await caller(self.path, stranger=False)
            watchers.append(sock)
            with contextlib.suppress(*GONE):
                await loop.sock_sendall(sock, encode(WATCH))
        try:
            async with asyncio.timeout(PATIENCE):
                while not all(ended(sock) for sock in watchers):
                    for _ in range(20):
                        sock = await self.place.connect("unix-to-unix-attacked", keep=False)
                        if sock is not None:
                            sock.close()
                    await asyncio.sleep(0.001)
        except TimeoutError:
            left = sum(not ended(sock) for sock in watchers)
            raise Faulty(f"{left} watchers that do not read are not dropped") from None
        finally:
            for sock in watchers:
                sock.close()
        self.count("watchers dropped", CALLERS_MAX)
        await ask(self.path, STATUS)


def ended(sock):
    """Whether the program has closed its end; what was sent before is not read."""
    poll = select.poll()
    poll.register(sock, select.POLLHUP)
    return bool(poll.poll(0))


async def callers(place):
    """Hostile callers of the inspection socket."""
    attack = Attack(place)
    try:
        await attack.run()
    except Faulty as fault:
        place.faults.append(str(fault))
    told = ", ".join(f"{n} {what}" for what, n in sorted(attack.counts.items()))
    return f"{told}; {attack.most} sockets at most"
