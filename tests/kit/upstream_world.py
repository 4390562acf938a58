"""An Upstream on a fake relay, with its clients, its resolver, and the main loop around it."""

import _socket
import errno
import fcntl
import itertools
import os
import socket

from kit.fake_relay import UP, FakeRelay
from proxyd import address as sockaddr
from proxyd._relay import ConnectFailed
from proxyd.event_loop import EventLoop
from proxyd.target import parse_target
from proxyd.upstream import Upstream

START_MS = 50_000
TCP = "192.0.2.9:80"
UNIX = "/run/backend"
NAME = "backend:80"

REFUSED = f"Failed to connect to remote host: Connection refused ({TCP})"

EPOLLHUP = 16

TEMPORARY = [
    errno.ECONNREFUSED,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ETIMEDOUT,
    errno.EADDRNOTAVAIL,
    errno.EAGAIN,
    errno.EMFILE,
    errno.ENOBUFS,
    errno.EPERM,
    errno.EACCES,
    errno.EINVAL,
    errno.ENETDOWN,
]


def inet(last, port=80):
    return sockaddr.pack_inet(f"192.0.2.{last}", port)


def up_at(ms, error=errno.ECONNREFUSED):
    """A plan for a target that is up from `ms` on."""
    return lambda now_ms: UP if now_ms >= ms else error


class Backlog:
    """A plan for a UNIX target whose backlog has room for `room` connections."""

    def __init__(self, room):
        self.room = room

    def __call__(self, now_ms):
        if self.room == 0:
            return errno.EAGAIN
        self.room -= 1
        return UP


class Names:
    """A resolver: `answer` is (addresses, error), or None during a look-up."""

    def __init__(self, relay, answer=None):
        self.relay = relay
        self.answer = answer
        self.asked = []
        self.waiting = []
        self.is_fresh = True
        self.stands_in = []

    def ask(self, host, now_ms, done):
        assert host == b"backend"
        assert now_ms == self.relay.now_ms
        self.asked.append(now_ms - START_MS)
        if self.answer is None:
            self.waiting.append(done)
        else:
            done(*self.answer)

    def current(self, host, now_ms):
        assert host == b"backend"
        assert now_ms == self.relay.now_ms
        if self.stands_in:
            return self.stands_in
        return self.answer[0] if self.is_fresh and self.answer and self.asked else []

    def say(self, choice):
        """Answer as a resolver may at any time; `choice` selects one of the possible answers."""
        self.is_fresh = bool(choice % 2)
        self.stands_in = [inet(1, 0)] if choice % 3 == 0 else []
        gone = _socket.gaierror(_socket.EAI_NONAME, "no such thing")
        both = [inet(1, 0), inet(2, 0)]
        answers = [None, ([], gone), (both, None), (both[::-1], None), (both[:1], None)]
        self.answer = answers[choice % 5]
        if self.answer is not None:
            self.reply(*self.answer)

    def reply(self, addresses, error=None):
        """End the look-up; its answer is used from now on."""
        self.answer = (addresses, error)
        waiting, self.waiting = self.waiting, []
        for done in waiting:
            done(addresses, error)


class World:
    """An Upstream, and the main loop around it."""

    def __init__(self, target=TCP, plan=UP, timeout_ms=10_000, answer=None, port=80, settle_ms=0):
        target = parse_target(target)
        self.address = target.address
        plan = plan if isinstance(plan, dict) else {self.address: plan}
        self.relay = FakeRelay(plan, START_MS)
        self.loop = EventLoop()
        self.loop.relay = self.relay
        self.names = Names(self.relay, answer) if target.host is not None else None
        self.upstream = Upstream(self.loop, self.names, target, port, timeout_ms)
        self.upstream.settle(settle_ms)
        self.come_total = 0
        self.peers = {}
        self.numbers = itertools.count()

    @property
    def now_ms(self):
        return self.relay.now_ms - START_MS

    @property
    def held(self):
        """The fds of the held clients, oldest first."""
        return [client.fd for client in self.upstream.held]

    @property
    def served(self):
        return [fd for fd, _ in self.relay.served]

    def come(self, header=None):
        """A client is accepted; its fd."""
        ours, peer = socket.socketpair()
        peer.setblocking(False)
        with ours:  # the number must not be reused for a later client
            fd = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, 200 + next(self.numbers))
        self.peers[fd] = peer
        self.come_total += 1
        self.upstream.take(fd, socket.AF_UNIX, 3, header, f"client{fd}")
        return fd

    def tick(self):
        """Do what the server does after each batch of events."""
        if self.held:
            self.upstream.step(self.relay.now_ms)

    def run(self, until_ms):
        """Let time pass: step() is called when it asks to be, as by the main loop."""
        self.tick()
        steps = 0
        while self.held:
            next_ms = self.upstream.next_ms()
            if next_ms is None or next_ms > START_MS + until_ms:
                break
            steps = steps + 1 if next_ms <= self.relay.now_ms else 0
            assert steps < 100, "it spins"
            self.relay.now_ms = max(next_ms, self.relay.now_ms)
            self.tick()
        self.relay.now_ms = START_MS + until_ms

    def ready(self, fd, events=4):
        """An event for a watched fd."""
        self.relay.ready(fd, events)
        assert self.loop.run(0) == []

    def happen(self, fd, events=4):
        """An event for a watched fd, and then a tick()."""
        self.ready(fd, events)
        self.tick()

    def answer(self, address, state):
        """A dialled connect ends."""
        fd = self.relay.pending(address)[-1]
        self.relay.dialled[fd] = state
        self.happen(fd)

    def say(self, address, what, which=-1):
        """A dialled target sends a byte (1), its end (0) or a reset (-errno.ECONNRESET)."""
        fd = self.relay.pending(address)[which]
        self.relay.received[fd] = what
        self.happen(fd, 1)

    def fail(self, fd, error, pending=b"", since_ms=None, *, has_unsent=False):
        """A connect of the relay has failed. `has_unsent`: `pending` is from the client."""
        self.relay.served.pop(self.served.index(fd))
        since_ms = START_MS + (self.now_ms if since_ms is None else since_ms)
        number = self.relay.ids[fd]
        failed = ConnectFailed(3, fd, error, pending, since_ms, number, has_unsent=has_unsent)
        self.upstream.take_back(failed, socket.AF_UNIX)

    def assert_counted(self):
        """Check that every client is in exactly one counter."""
        held = self.upstream.held
        ends = len(held) + held.failed + held.gone + held.cut
        assert self.come_total == self.upstream.served - self.upstream.returned + ends

    def gone(self, fd):
        """Whether the server's end of a client is closed."""
        try:
            return self.peers[fd].recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True  # with bytes unread

    def close(self):
        """End it; nothing may be left."""
        self.assert_counted()
        self.upstream.drop_all()
        self.assert_counted()
        assert self.relay.closes == [], "an empty probe that ended cleanly"
        assert self.relay.watched == {}
        assert self.relay.dialled == {}
        assert self.loop._handlers == {}
        for fd, peer in self.peers.items():
            if fd in self.served:
                os.close(fd)
            else:
                assert self.gone(fd)
            peer.close()
