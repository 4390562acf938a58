"""Datagrams around one run of the program: clients that ask, and a server, stepped by the walk.

A failed call may cost datagrams, which is what datagrams may suffer. None may be cut, invented,
delivered twice, or delivered to another client.
"""

import contextlib
import os
import socket
from collections import Counter

from kit.sockets import target_text
from kit.traffic import payload

FAMILIES = {"udp4": socket.AF_INET, "unix": socket.AF_UNIX}

ANSWER = b"answer to "

GIVEN_UP_MS = 8000
"""An answer that has not come by then, on the extension's clock, is lost."""

IDLE_OPTION = "--idle-timeout=10s"
"""Flows end sooner than by themselves, so that the walk can wait for the last, but not too soon."""

ONE_MAX = 1 << 18


def open_socket(family, directory, *, bound=True):
    """A non-blocking datagram socket."""
    made = socket.socket(FAMILIES[family], socket.SOCK_DGRAM)
    made.setblocking(False)
    if bound and family == "unix":
        made.bind(os.path.join(directory, f"datagrams-{os.urandom(4).hex()}"))
    elif bound:
        made.bind(("127.0.0.1", 0))
    return made


def receive_all(sock):
    """[(datagram, sender)] of what is in the queue of a socket."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            with contextlib.suppress(ConnectionRefusedError):  # the program has ended
                found.append(sock.recvfrom(ONE_MAX))
    return found


class Asker:
    """A client that sends questions, each of them once, and hears answers."""

    def __init__(self, side, number):
        self._side = side
        self.number = number
        self.socket = open_socket(side.listen_family, side.directory)
        self.socket.connect(side.listen_socket.getsockname())
        self.asked = []
        """What it has sent."""
        self._waiting = []
        self._asked_ms = 0
        self.heard = Counter()
        self.may_lose = False
        """It may be that it asks when the server has just ended, which costs what is sent then."""

    def __str__(self):
        return f"asker {self.number}"

    def ask(self, count=1, size=100):
        """Send that many questions of `size` bytes, as soon as there is room for them."""
        for _ in range(count):
            number = len(self.asked) + len(self._waiting)
            head = b"asker%04d question%04d " % (self.number, number)
            self._waiting.append(head + payload(size - len(head), self.number * 100 + number))
        self._asked_ms = self._side.now_ms()
        self.step()

    def step(self):
        with contextlib.suppress(BlockingIOError):
            while self._waiting:
                with contextlib.suppress(ConnectionRefusedError):  # the program has ended
                    self.socket.send(self._waiting[0])
                self.asked.append(self._waiting.pop(0))
        self.heard.update(data for data, _ in receive_all(self.socket))

    @property
    def answered(self):
        return not self._waiting and len(self.heard) == len(self.asked)

    @property
    def over(self):
        return self.answered or self._side.now_ms() - self._asked_ms >= GIVEN_UP_MS

    def has(self, _ports):
        """As Conn.has: unlike a stream, a datagram is not known by the ports of a socket."""
        return False

    def state(self):
        return f"{len(self.heard)} of {len(self.asked)} answers"


class DatagramSide:
    """The listener of datagrams, its clients, and the server behind the program."""

    def __init__(self, directory, listen="udp4", target="udp4", *, serves=True):
        self.directory = directory
        self.listen_family = listen
        self.askers = []
        self.reads = True
        """Whether the server reads."""
        self.answers = True
        """Whether the server answers."""
        self.header_size = 0
        """Of the PROXY header before each datagram."""
        self.now_ms = lambda: 0
        """How far the extension's clock is put forward."""
        self.arrived = Counter()
        """What has reached the server, without headers."""
        self.faults = []
        self._owed = []
        self.listen_socket = open_socket(listen, directory)
        self._server_family = target
        self.server = open_socket(target, directory)
        self._address = self.server.getsockname()
        self.target = target_text(self._address, self.server.family)
        if not serves:
            self.end_server()

    def fds(self):
        """The fds of all its sockets."""
        mine = [self.listen_socket, self.server, *(asker.socket for asker in self.askers)]
        return {str(one.fileno()) for one in mine}

    def leave(self):
        """Close all clients."""
        for asker in self.askers:
            asker.socket.close()

    def close(self):
        self.leave()
        self.listen_socket.close()
        self.server.close()

    # ── for scenarios ────────────────────────────────────────────────────────────────────────

    def asker(self):
        """One more client."""
        self.askers.append(Asker(self, len(self.askers)))
        return self.askers[-1]

    def asked(self, *askers, count=1, size=100):
        """Have these clients ask, and the program take turns until they have their answers."""
        for asker in askers:
            asker.ask(count, size)
        while not all(asker.over for asker in askers):
            yield

    def end_server(self):
        """The server ends: datagrams for it are refused."""
        self.server.close()
        if self._server_family == "unix":
            os.unlink(self._address)

    def begin_server(self):
        """A server at the same address."""
        self.server = open_socket(self._server_family, self.directory, bound=False)
        self.server.bind(self._address)

    # ── the world's turns ────────────────────────────────────────────────────────────────────

    def step(self):
        for asker in self.askers:
            if asker.socket.fileno() >= 0:
                asker.step()
        if self.server.fileno() >= 0 and self.reads:
            for data, sender in receive_all(self.server):
                self._serve(data[self.header_size :], sender)
            self._answer()

    def _serve(self, data, sender):
        self.arrived[data] += 1
        if sender:
            self._owed.append((ANSWER + data, sender))

    def _answer(self):
        with contextlib.suppress(BlockingIOError):
            while self._owed and self.answers:
                with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):  # flow's end
                    self.server.sendto(*self._owed[0])
                del self._owed[0]

    def signature(self):
        """A value that changes whenever anything moves."""
        return (
            self.arrived.total(),
            sum(asker.heard.total() + len(asker.asked) for asker in self.askers),
            len(self._owed),
        )

    # ── the verdict ──────────────────────────────────────────────────────────────────────────

    def judge(self):
        """Check every datagram; returns the clients that lack an answer."""
        asked = {data for asker in self.askers for data in asker.asked}
        self._judge("the server", self.arrived, asked)
        for asker in self.askers:
            self._judge(f"{asker}", asker.heard, {ANSWER + data for data in asker.asked})
        return [asker for asker in self.askers if not asker.answered and not asker.may_lose]

    def _judge(self, who, received, sent):
        for data, count in received.items():
            if data not in sent:
                self.faults.append(f"{who} received what was never sent to it: {data[:60]!r}")
            elif count > 1:
                self.faults.append(f"{who} received {count} times: {data[:60]!r}")
