"""Clients that wait for their target: who tries when, who follows, and who gives up."""

import _socket
import errno
import fcntl
import itertools
import os
import socket
import struct
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import address as sockaddr
from proxyd import log, outage, race, resolver
from proxyd._relay import ConnectFailed
from proxyd.listen import Listener
from proxyd.lookup import LATE_MS
from proxyd.loop import EPOLLET, Loop
from proxyd.race import SILENT_MS, STAGGER_MS
from proxyd.reach import Reach
from proxyd.target import parse_target

PATIENCE = 20
"""Seconds until what does not come counts as lost."""

START_MS = 50_000
UP = "up"
LATER = "later"
TCP = "192.0.2.9:80"
UNIX = "/run/backend"
NAME = "backend:80"

REFUSED = f"Failed to connect to remote host: Connection refused ({TCP})"

# Times of probes after an outage has begun: 10 ms apart for 150 ms, then pauses that double.
SCHEDULE = [*range(10, 151, 10), 170, 210, 290, 450, 700, 950, 1200]

EPOLLHUP = 16


def inet(last, port=80):
    return sockaddr.pack_inet(f"192.0.2.{last}", port)


class Relay:
    """Connects as `plan` says, by address: UP, LATER, or an errno with which it fails at once;
    or a function of the time that says so."""

    def __init__(self, plan):
        self.plan = plan
        self.now_ms = START_MS
        self.attempts = []
        self.served = []
        self.watched = {}
        self.dialled = {}
        self.said = {}
        self.last_id = 0
        self.adopt_error = 0
        self.failed = 0
        self.resets, self.closes = [], []  # sockets to the target
        self.cut, self.let_go = [], []  # clients

    def outcome(self, address):
        outcome = self.plan[address]
        return outcome(self.now_ms - START_MS) if callable(outcome) else outcome

    def connect(self, client, family, address, preamble=None, listener=0, timeout_ms=0):
        self.attempts.append((self.now_ms - START_MS, address, timeout_ms))
        outcome = self.outcome(address)
        if isinstance(outcome, int):
            return ConnectFailed(listener, client, outcome, preamble or b"", self.now_ms, 0)
        self.last_id += 1
        self.served.append((client, preamble or b""))
        return self.last_id

    def dial(self, address):
        self.attempts.append((self.now_ms - START_MS, address, None))
        outcome = self.outcome(address)
        if isinstance(outcome, int):
            raise OSError(outcome, "")
        fd = 100_000 + len(self.attempts)
        self.dialled[fd] = 0 if outcome == UP else errno.EINPROGRESS
        return fd

    def connected(self, fd):
        return self.dialled[fd]

    def peek(self, fd):
        return self.said.get(fd, -errno.EAGAIN)

    def hang_up(self, fd, reset=False):
        if fd in self.dialled:
            del self.dialled[fd]
            self.resets.append(fd) if reset else self.closes.append(fd)
        else:
            self.unwatch(fd)
            (self.cut if reset else self.let_go).append(fd)
            os.close(fd)

    def adopt(self, client, family, fd, preamble=None, *_):
        if self.adopt_error:
            raise OSError(self.adopt_error, "")
        del self.dialled[fd]
        self.last_id += 1
        self.served.append((client, preamble or b""))
        return self.last_id

    def watch(self, fd, events=1):
        assert fd not in self.watched
        self.watched[fd] = events

    def unwatch(self, fd):
        self.watched.pop(fd, None)

    @property
    def times(self):
        return [at_ms for at_ms, _, _ in self.attempts]


class Names:
    """A resolver: `answer` is (addresses, error), or None while the name servers think."""

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
        """Any of all that a resolver may say, at any time."""
        self.is_fresh = bool(choice % 2)
        self.stands_in = [inet(1, 0)] if choice % 3 == 0 else []
        gone = _socket.gaierror(_socket.EAI_NONAME, "no such thing")
        both = [inet(1, 0), inet(2, 0)]
        answers = [None, ([], gone), (both, None), (both[::-1], None), (both[:1], None)]
        self.answer = answers[choice % 5]
        if self.answer is not None:
            self.reply(*self.answer)

    def reply(self, addresses, error=None):
        """The name servers have thought, and their answer serves from now on."""
        self.answer = (addresses, error)
        waiting, self.waiting = self.waiting, []
        for done in waiting:
            done(addresses, error)


class World:
    """A Reach, and the main loop around it."""

    def __init__(self, target=TCP, plan=UP, timeout_ms=10_000, answer=None, port=80, settle_ms=0):
        target = parse_target(target)
        self.address = target.address
        self.relay = Relay(plan if isinstance(plan, dict) else {self.address: plan})
        self.loop = Loop()
        self.loop.relay = self.relay
        self.names = Names(self.relay, answer) if target.host is not None else None
        self.reach = Reach(self.loop, self.names, target, port, timeout_ms)
        self.reach.settle(settle_ms)
        self.come_total = 0
        self.peers = {}
        self.numbers = itertools.count()
        self.listener = Listener(-1, "x", sockaddr.pack_unix("/listener"))

    @property
    def now_ms(self):
        return self.relay.now_ms - START_MS

    def come(self, header=None):
        """A client is accepted; its fd."""
        ours, peer = socket.socketpair()
        peer.setblocking(False)
        with ours:  # a number that no later client is going to have
            fd = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, 200 + next(self.numbers))
        self.peers[fd] = peer
        self.come_total += 1
        self.reach.take(fd, self.listener, 3, header, f"client{fd}")
        return fd

    def tick(self):
        """What the server does after every batch of events."""
        if self.reach.held:
            self.reach.step(self.relay.now_ms)

    def run(self, until_ms):
        """Let time go by, as the main loop would: step() when it is asked for, and not oftener."""
        self.tick()
        steps = 0
        while self.reach.held:
            next_ms = self.reach.next_ms()
            if next_ms is None or next_ms > START_MS + until_ms:
                break
            steps = steps + 1 if next_ms <= self.relay.now_ms else 0
            assert steps < 100, "it spins"
            self.relay.now_ms = max(next_ms, self.relay.now_ms)
            self.tick()
        self.relay.now_ms = START_MS + until_ms

    def happen(self, fd, events=4):
        """An event for a watched fd."""
        self.loop.handlers[fd](events)
        self.tick()

    def answer(self, address, state):
        """A dialled connect ends."""
        places = [n for n, (_, a, timeout) in enumerate(self.relay.attempts) if a == address]
        fd = next(100_001 + n for n in reversed(places) if 100_001 + n in self.relay.dialled)
        self.relay.dialled[fd] = state
        self.happen(fd)

    def fail(self, fd, error, pending=b"", since_ms=None):
        """A connect of the relay has failed."""
        self.relay.served.pop([client for client, _ in self.relay.served].index(fd))
        self.relay.failed += 1
        since_ms = START_MS + (self.now_ms if since_ms is None else since_ms)
        self.reach.take_back(
            self.listener, ConnectFailed(3, fd, error, pending, since_ms, self.relay.last_id)
        )

    def say(self, address, what, which=-1):
        """A dialled target sends a byte (1), its end (0) or a reset (-errno.ECONNRESET)."""
        places = [n for n, (_, a, timeout) in enumerate(self.relay.attempts) if a == address]
        fd = [100_001 + n for n in places if 100_001 + n in self.relay.dialled][which]
        self.relay.said[fd] = what
        self.happen(fd, 1)

    def assert_counted(self):
        """Every client is in one counter, and in one only."""
        reach = self.reach
        ends = len(reach.held) + reach.failed + reach.gone + reach.cut
        assert self.come_total == reach.served - reach.returned + ends

    def gone(self, fd):
        """Whether our end of a client is closed."""
        try:
            return self.peers[fd].recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True  # with bytes unread

    @property
    def served(self):
        return [fd for fd, _ in self.relay.served]

    def close(self):
        """The end: nothing may be left over."""
        self.assert_counted()
        self.reach.drop_all()
        self.assert_counted()
        assert self.relay.closes == [], "an empty probe that ended cleanly"
        assert self.relay.watched == {}
        assert self.relay.dialled == {}
        assert self.loop.handlers == {}
        for fd, peer in self.peers.items():
            if fd in self.served:
                os.close(fd)
            else:
                assert self.gone(fd)
            peer.close()


@pytest.fixture
def world(monkeypatch):
    worlds = []

    def make(*arguments, **keywords):
        one = World(*arguments, **keywords)
        monkeypatch.setattr(race, "connected", one.relay.connected)
        monkeypatch.setattr(race, "peek", one.relay.peek)
        monkeypatch.setattr(log.time, "monotonic", lambda: one.relay.now_ms / 1000)
        worlds.append(one)
        return one

    log.setup({})
    yield make
    log.setup({})
    for one in worlds:
        one.close()


def up_at(ms, error=errno.ECONNREFUSED):
    return lambda now_ms: UP if now_ms >= ms else error


# ── all is well ──────────────────────────────────────────────────────────────────────────────────


def test_while_all_is_well_the_relay_does_it_all(world):
    one = world()
    clients = [one.come(), one.come()]
    assert one.served == clients
    assert one.relay.attempts == [(0, one.address, SILENT_MS)] * 2
    assert not one.reach.held
    assert one.reach.served == 2
    assert one.relay.watched == {}


def test_what_a_target_must_get_first(world):
    one = world()
    fd = one.come(header=b"PROXY UNKNOWN\r\n")
    assert one.relay.served == [(fd, b"PROXY UNKNOWN\r\n")]


def test_any_port_is_the_listener_s(world):
    one = world("192.0.2.9:*", plan={inet(9, 443): UP}, port=443)
    one.come()
    assert [address for _, address, _ in one.relay.attempts] == [inet(9, 443)]
    assert one.reach.text == "192.0.2.9:443"


@pytest.mark.parametrize(
    ("timeout_ms", "kernel_ms"), [(10_000, 1000), (None, 1000), (300, 300), (0, 0)]
)
def test_how_long_a_connect_may_take(world, timeout_ms, kernel_ms):
    one = world(timeout_ms=timeout_ms)
    one.come()
    assert one.relay.attempts == [(0, one.address, kernel_ms)]


# ── hold and retry ───────────────────────────────────────────────────────────────────────────────

PASSING = [
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


@pytest.mark.parametrize("error", PASSING)
def test_the_times_of_the_probes(world, error):
    one = world(plan=error)
    one.come()
    one.run(SCHEDULE[-1])
    assert one.relay.times == [0, *SCHEDULE]


def test_the_times_after_a_connect_that_failed_late(world):
    one = world(plan={inet(9): UP})
    fd = one.come()
    one.relay.plan[inet(9)] = errno.ECONNREFUSED
    one.run(1000)
    one.fail(fd, errno.ECONNREFUSED, since_ms=0)
    one.run(1000 + SCHEDULE[-1])
    assert one.relay.times == [0, *(1000 + at for at in SCHEDULE)]


def test_a_new_outage_begins_with_short_pauses_again(world):
    one = world(plan=up_at(2000))
    one.come()
    one.run(5000)
    assert len(one.served) == 1
    one.relay.plan[one.address] = errno.ECONNREFUSED
    one.relay.attempts.clear()
    one.come()
    one.run(5000 + SCHEDULE[-1])
    assert one.relay.times == [5000, *(5000 + at for at in SCHEDULE)]


def test_who_comes_alone_later_in_an_outage_has_short_pauses(world):
    one = world(plan=errno.ECONNREFUSED, timeout_ms=2000)
    one.come()
    one.run(60_000)
    assert not one.reach.held
    one.relay.attempts.clear()
    one.come()
    assert one.relay.attempts == []  # it is held first
    one.run(60_000 + 150)
    assert one.relay.times == [60_000 + at for at in range(0, 151, 10)]


@pytest.mark.parametrize("count", [1, 2, 100])
def test_one_probe_whatever_the_number_held(world, count):
    one = world(plan=errno.ECONNREFUSED)
    for _ in range(count):
        one.come()
    one.run(SCHEDULE[-1])
    assert one.relay.times == [0, *SCHEDULE]
    assert len(one.reach.held) == count


def test_the_probe_is_the_connection_of_the_oldest_and_the_others_follow_at_once(world):
    one = world(plan=up_at(100))
    clients = [one.come(header=b"%d" % number) for number in range(5)]
    one.run(99)
    assert one.served == []
    one.run(100)
    assert one.relay.served == [(fd, b"%d" % number) for number, fd in enumerate(clients)]
    assert one.relay.times[-6:] == [90, 100, 100, 100, 100, 100]
    assert not one.reach.held
    assert one.reach.served - one.reach.returned == 5
    assert one.reach.failed == 0


def test_the_oldest_probes_even_if_younger_ones_came_meanwhile(world):
    one = world(plan=errno.ECONNREFUSED)
    oldest = one.come()
    one.run(5)
    one.come()
    one.relay.plan[one.address] = LATER
    one.run(500)
    assert one.relay.times == [0, 10]
    one.answer(one.address, 0)
    assert one.served == [oldest]


def test_the_oldest_probes_even_if_its_connect_failed_later(world):
    one = world(plan=LATER)
    oldest = one.come()
    one.run(5)
    one.relay.plan[one.address] = errno.ECONNREFUSED
    younger = one.come()
    one.run(8)
    one.fail(oldest, errno.EHOSTUNREACH, since_ms=0)
    assert list(one.reach.held) == [oldest, younger]
    one.relay.plan[one.address] = LATER
    one.run(30)
    one.answer(one.address, 0)
    assert one.served == [oldest]


def test_the_next_oldest_probes_when_the_oldest_hangs_up(world):
    one = world(plan=errno.ECONNREFUSED)
    oldest, second, third = one.come(), one.come(), one.come()
    one.relay.plan[one.address] = LATER
    one.run(10)
    one.happen(oldest, EPOLLHUP)
    assert one.gone(oldest)
    one.run(20)
    one.answer(one.address, 0)
    assert one.served == [second]
    one.answer(one.address, 0)
    assert one.served == [second, third]


def test_the_others_wait_while_a_probe_is_under_way(world):
    one = world(plan=errno.ECONNREFUSED)
    clients = [one.come(), one.come()]
    one.relay.plan[one.address] = LATER
    one.run(900)
    assert one.relay.times == [0, 10]
    one.answer(one.address, errno.ECONNREFUSED)
    assert one.relay.times == [0, 10]
    one.relay.plan[one.address] = UP
    one.run(1150)
    assert one.served == clients


def test_followers_that_fail_wait_on(world):
    """A server with a short backlog takes one, and refuses the next."""
    one = world(plan=errno.EAGAIN, target=UNIX)
    clients = [one.come() for _ in range(3)]
    taken = []

    def one_at_a_time(now_ms):
        if len(taken) == now_ms // 10:
            return errno.EAGAIN
        taken.append(now_ms)
        return UP

    one.relay.plan[one.address] = one_at_a_time
    one.run(10)
    assert one.served == clients[:1]
    one.run(20)
    assert one.served == clients[:2]
    one.run(30)
    assert one.served == clients


def test_who_comes_while_others_are_held_is_held_too(world):
    one = world(plan=up_at(50))
    one.come()
    one.run(50 - 1)
    late = one.come()
    assert late in one.reach.held
    one.run(50)
    assert len(one.served) == 2
    assert one.reach.next_ms() is None or not one.reach.held


def test_after_the_outage_clients_are_connected_at_once(world):
    one = world(plan=up_at(50))
    one.come()
    one.run(60)
    fd = one.come()
    assert one.served[-1] == fd
    assert not one.reach.held


def test_a_held_client_is_watched_for_what_is_always_reported(world):
    """Not for EPOLLRDHUP: a client that has sent FIN is still served."""
    one = world(plan=errno.ECONNREFUSED)
    fd = one.come()
    assert one.relay.watched == {fd: EPOLLET}


def test_a_client_that_cannot_be_watched_is_held_all_the_same(world):
    one = world(plan=up_at(10))

    def watch(fd, events=1):
        raise OSError(errno.ENOMEM, "")

    one.relay.watch = watch
    fd = one.come()
    one.run(10)
    assert one.served == [fd]


def test_bytes_taken_from_a_client_are_given_to_the_next_attempt(world):
    one = world()
    fd = one.come()
    one.relay.plan[one.address] = up_at(30)
    one.fail(fd, errno.ECONNREFUSED, pending=b"GET /")
    assert one.reach.served - one.reach.returned == 0
    one.run(30)
    assert one.relay.served == [(fd, b"GET /")]
    assert one.reach.served - one.reach.returned == 1


def test_no_memory_for_a_connection_that_was_made(world):
    one = world(plan=up_at(10))
    fd = one.come()
    one.relay.adopt_error = errno.ENOMEM
    one.run(10)
    assert one.served == []
    assert fd in one.reach.held
    one.relay.adopt_error = 0
    one.run(20)
    assert one.served == [fd]


# ── how long ─────────────────────────────────────────────────────────────────────────────────────


def test_each_client_has_its_own_deadline(world):
    one = world(plan=errno.ECONNREFUSED, timeout_ms=1000)
    first = one.come()
    one.run(400)
    second = one.come()
    one.run(999)
    assert set(one.reach.held) == {first, second}
    one.run(1000)
    assert one.gone(first)
    assert set(one.reach.held) == {second}
    one.run(1399)
    assert set(one.reach.held) == {second}
    one.run(1400)
    assert one.gone(second)
    assert not one.reach.held
    assert one.reach.failed == 2


def test_the_deadline_counts_from_when_the_client_came(world):
    one = world(timeout_ms=1000)
    fd = one.come()
    one.run(600)
    one.relay.plan[one.address] = LATER
    one.fail(fd, errno.EHOSTUNREACH, since_ms=0)
    one.run(999)
    assert not one.gone(fd)
    one.run(1000)
    assert one.gone(fd)


def test_a_probe_under_way_at_the_deadline_is_given_up(world):
    one = world(plan=errno.ECONNREFUSED, timeout_ms=1000)
    first = one.come()
    one.run(5)
    second = one.come()
    one.relay.plan[one.address] = LATER
    one.run(1000)
    assert one.gone(first)
    assert list(one.reach.held) == [second]
    assert one.relay.dialled
    one.run(1005)
    assert one.gone(second)
    assert one.relay.dialled == {}


def test_the_reason_at_the_deadline_is_what_an_address_has_said(world, capfd):
    """One refuses, the other does not answer: that it was refused is the better word."""
    plan = {inet(1): errno.ECONNREFUSED, inet(2): LATER}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None), timeout_ms=1000)
    fd = one.come()
    one.run(1000)
    assert one.gone(fd)
    assert "Connection refused" in capfd.readouterr().err


def test_no_deadline(world):
    one = world(plan=up_at(600_000), timeout_ms=None)
    fd = one.come()
    one.run(599_000)
    assert fd in one.reach.held
    one.run(601_000)
    assert one.served == [fd]


@pytest.mark.parametrize("error", PASSING)
def test_without_connect_timeout_there_is_one_attempt(world, capfd, error):
    one = world(plan=error, timeout_ms=0)
    fd = one.come()
    assert one.gone(fd)
    one.run(60_000)
    assert one.relay.times == [0]
    assert one.reach.failed == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"Failed to connect to remote host: {os.strerror(error)} ({TCP})."
    # And the next one has an attempt of its own.
    one.relay.plan[one.address] = UP
    assert one.come() in one.served


def test_without_connect_timeout_a_late_failure_is_the_end_too(world, capfd):
    one = world(timeout_ms=0)
    fd = one.come()
    one.run(60_000)
    one.fail(fd, errno.ETIMEDOUT, since_ms=0)
    assert one.gone(fd)
    assert capfd.readouterr().err.startswith("Failed to connect to remote host: Connection timed")


# ── errors that do not pass ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", [TCP, UNIX])
@pytest.mark.parametrize("error", [errno.ENOTSOCK, errno.EPROTOTYPE, errno.EAFNOSUPPORT])
def test_other_errors_fail_at_once(world, capfd, target, error):
    one = world(target, plan=error)
    fd = one.come()
    assert one.gone(fd)
    assert one.relay.times == [0]
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"Failed to connect to remote host: {os.strerror(error)} ({target})."
    one.relay.plan[one.address] = UP
    assert one.come() in one.served


@pytest.mark.parametrize("target", [TCP, UNIX])
@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM])
def test_a_permission_that_is_missing_is_waited_for_and_told_at_once(world, capfd, target, error):
    one = world(target, plan=up_at(8000, error))
    fd = one.come()
    one.tick()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(f"{os.strerror(error)} ({target}), holding clients until it answers.")
    one.run(7999)
    assert fd in one.reach.held
    one.run(8500)
    assert one.served == [fd]


def test_a_permission_that_gets_lost_in_an_outage_is_told(world, capfd):
    one = world(UNIX, plan=lambda now_ms: errno.ENOENT if now_ms < 6000 else errno.EACCES)
    one.come()
    one.run(7000)
    levels = capfd.readouterr().err.splitlines()
    assert [line.split(": ")[1].split(" (")[0] for line in levels] == [
        "No such file or directory",
        "Permission denied",
    ]


def test_link_local_without_a_scope_is_no_route_that_may_come(world):
    one = world("[fe80::1]:80", plan=errno.EINVAL)
    assert one.gone(one.come())
    assert one.relay.times == [0]


def test_an_outage_that_turns_into_a_lasting_error(world):
    one = world(UNIX, plan=lambda now_ms: errno.ENOENT if now_ms < 100 else errno.ENOTSOCK)
    clients = [one.come() for _ in range(3)]
    one.run(1000)
    assert all(map(one.gone, clients))
    assert one.reach.failed == 3
    assert not one.reach.held


# ── clients that go ──────────────────────────────────────────────────────────────────────────────


def test_a_held_client_that_hangs_up_is_dropped(world):
    one = world(plan=errno.ECONNREFUSED)
    first, second = one.come(), one.come()
    one.happen(second, EPOLLHUP)
    assert one.gone(second)
    assert list(one.reach.held) == [first]
    one.happen(first, EPOLLHUP)
    assert one.gone(first)
    assert not one.reach.held
    assert one.reach.failed == 0  # it was not the target's fault


@pytest.mark.parametrize("others", [0, 1])
def test_a_client_that_goes_when_its_race_was_won_in_the_same_batch(world, others):
    """With others held, the end of its race is still looked at."""
    one = world(plan=errno.ECONNREFUSED)
    fd = one.come()
    held = [one.come() for _ in range(others)]
    one.relay.plan[one.address] = LATER
    one.run(10)
    (dialled,) = one.relay.dialled
    one.relay.dialled[dialled] = 0
    one.loop.handlers[dialled](4)
    one.loop.handlers[fd](EPOLLHUP)
    one.tick()
    assert one.gone(fd)
    assert one.served == held  # its connection is for the next
    assert one.relay.resets == ([] if others else [dialled])  # or is reset, with nobody left
    assert one.relay.closes == []


def test_drop_all(world):
    one = world(plan=errno.ECONNREFUSED)
    clients = [one.come() for _ in range(3)]
    one.relay.plan[one.address] = LATER
    one.run(10)
    assert one.reach.drop_all() == 3
    assert all(map(one.gone, clients))
    assert one.reach.drop_all() == 0


@pytest.mark.parametrize("taken", [False, True])
def test_a_unix_client_that_has_spoken_and_hung_up_is_served(world, taken):
    """It has sent its message and closed: the message is delivered."""
    one = world(plan=LATER if taken else errno.ECONNREFUSED)
    fd = one.come()
    if taken:  # the relay had read it already
        one.relay.plan[one.address] = errno.ECONNREFUSED
        one.relay.served[:] = [(fd, b"")]
        one.fail(fd, errno.ECONNREFUSED, pending=b"message")
        one.reach.served = 1
    else:
        one.peers[fd].send(b"message")
    one.peers[fd].shutdown(socket.SHUT_RDWR)
    one.happen(fd, EPOLLHUP)
    assert fd in one.reach.held
    one.relay.plan[one.address] = UP
    one.run(500)
    assert one.relay.served == [(fd, b"message" if taken else b"")]
    assert one.reach.gone == 0


def test_a_unix_client_that_has_hung_up_silently_is_dropped_and_counted(world):
    one = world(plan=errno.ECONNREFUSED)
    fd = one.come(header=b"PROXY UNKNOWN\r\n")  # this is not of its own
    one.peers[fd].shutdown(socket.SHUT_RDWR)
    one.happen(fd, EPOLLHUP)
    assert one.gone(fd)
    assert (one.reach.gone, one.reach.failed, one.reach.cut) == (1, 0, 0)


def test_a_header_that_comes_back_is_no_word_of_the_client(world):
    one = world()
    fd = one.come(header=b"PROXY")
    one.relay.plan[one.address] = errno.ECONNREFUSED
    one.fail(fd, errno.ECONNREFUSED, pending=b"PROXY")
    one.happen(fd, EPOLLHUP)
    assert one.gone(fd)
    assert one.reach.gone == 1


def test_a_client_that_leaves_is_told_at_debug_level(world, capfd):
    log.setup({"SYSTEMD_LOG_LEVEL": "debug"})
    one = world(plan=errno.ECONNREFUSED)
    fd = one.come()
    one.happen(fd, EPOLLHUP)
    assert f"client{fd} → {TCP}: client gone while it was held." in capfd.readouterr().err


def test_who_is_cut_sees_a_reset_and_who_is_given_up_a_plain_end(world):
    one = world(plan=errno.ECONNREFUSED, timeout_ms=1000)
    given_up = one.come()
    one.run(500)
    cut = one.come()
    one.run(1000)
    one.reach.drop_all()
    assert (one.relay.let_go, one.relay.cut) == ([given_up], [cut])
    assert (one.reach.failed, one.reach.cut) == (1, 1)


# ── a full backlog ───────────────────────────────────────────────────────────────────────────────


class Backlog:
    """A plan for a UNIX target with so much room."""

    def __init__(self, room):
        self.room = room

    def __call__(self, now_ms):
        if self.room == 0:
            return errno.EAGAIN
        self.room -= 1
        return UP


def test_a_full_backlog_is_tried_again_steadily(world, capfd):
    one = world(UNIX, plan=errno.EAGAIN)
    one.come()
    one.run(900)
    assert one.relay.times == [0, *range(5, 901, 5)]
    assert capfd.readouterr().err == ""  # it is no outage
    one.run(1100)
    one.relay.plan[one.address] = UP
    one.run(1105)
    reason = f"Failed to connect to remote host: {os.strerror(errno.EAGAIN)} ({UNIX})"
    assert capfd.readouterr().err.splitlines() == [
        f"{reason}, holding clients until it answers.",
        f"{UNIX} answers after 1.105s, 1 client was held.",
    ]


def test_as_many_as_fit_are_let_in_in_their_order(world):
    room = Backlog(0)
    one = world(UNIX, plan=room)
    clients = [one.come() for _ in range(20)]
    one.run(7)
    room.room = 6
    younger = one.come()
    one.run(10)
    assert one.served == clients[:6]
    room.room = 100
    one.run(15)
    assert one.served == [*clients, younger]
    assert one.reach.express


def test_nobody_overtakes_while_others_wait_for_room(world):
    room = Backlog(0)
    one = world(UNIX, plan=room)
    first = one.come()
    assert one.reach.express is None
    room.room = 2
    second = one.come()
    assert one.served == []
    one.run(5)
    assert one.served == [first, second]


def test_many_that_find_it_full_in_one_batch_stay_in_order(world):
    room = Backlog(3)
    one = world(UNIX, plan=room)
    clients = [one.come() for _ in range(3)]
    for fd in clients:  # the gate had connected them
        one.fail(fd, errno.EAGAIN)
    clients += [one.come() for _ in range(3)]
    room.room = 6
    one.run(5)
    assert one.served == clients


def test_a_backlog_that_is_full_ends_an_outage(world):
    one = world(UNIX, plan=lambda now_ms: errno.ENOENT if now_ms < 1000 else errno.EAGAIN)
    clients = [one.come() for _ in range(2)]
    one.run(1200)
    one.relay.plan[one.address] = UP
    one.run(1205)
    assert one.served == clients


@pytest.mark.parametrize("end", ["cut", "gone", "given up"])
def test_a_backlog_that_stays_full_does_not_answer(world, capfd, end):
    room = Backlog(0)
    one = world(UNIX, plan=room, timeout_ms=3000)
    fd = one.come()
    one.run(2000)
    assert "Resource temporarily unavailable" in capfd.readouterr().err
    if end == "cut":
        one.reach.drop_all()
    elif end == "gone":
        one.happen(fd, EPOLLHUP)
    one.run(10_000)
    assert not one.reach.held
    assert "answers after" not in capfd.readouterr().err
    fd = one.come()  # and the next time is told anew
    one.run(12_000)
    assert "holding clients" in capfd.readouterr().err
    room.room = 1
    one.run(12_900)
    assert one.served == [fd]
    assert "answers after" in capfd.readouterr().err


def test_a_full_backlog_with_no_connect_timeout_is_one_attempt(world):
    one = world(UNIX, plan=errno.EAGAIN, timeout_ms=0)
    assert one.gone(one.come())
    assert one.relay.times == [0]


# ── a silent host ────────────────────────────────────────────────────────────────────────────────


def test_a_connect_without_an_answer_is_ours_after_a_second(world, capfd):
    """No outage yet: one lost packet looks the same."""
    one = world()
    fd = one.come()
    one.relay.plan[one.address] = LATER
    one.run(1000)
    one.fail(fd, errno.ETIMEDOUT, since_ms=0)
    one.tick()
    assert one.relay.times == [0, 1000]
    assert capfd.readouterr().err == ""
    one.run(1050)
    one.answer(one.address, 0)
    assert one.served == [fd]
    assert capfd.readouterr().err == ""


def test_a_silent_host_is_tried_every_second_and_is_an_outage_after_one(world, capfd):
    one = world(plan=errno.ECONNREFUSED, timeout_ms=None)
    one.come()
    one.relay.plan[one.address] = LATER
    one.relay.attempts.clear()
    one.run(6500)
    assert one.relay.times == [10, 1010, 2010, 3010, 4010, 5010, 6010]
    assert len(one.relay.dialled) == 4


def test_a_silent_name_is_an_outage_after_a_second(world, capfd):
    one = world(NAME, plan={inet(1): LATER}, answer=([inet(1, 0)], None))
    one.come()
    one.run(999)
    assert capfd.readouterr().err == ""
    one.run(1000)
    assert "Connection timed out (backend:80), holding clients" in capfd.readouterr().err


def test_the_host_comes_and_everybody_is_served(world):
    """By the youngest attempt; the others' connections are for the next clients."""
    one = world(plan=errno.ECONNREFUSED, timeout_ms=None)
    clients = [one.come() for _ in range(6)]
    one.relay.plan[one.address] = LATER
    one.run(3500)
    late = one.come()
    one.relay.plan[one.address] = UP
    one.answer(one.address, 0)
    assert one.served == [*clients, late]  # the older attempts, still silent, have lost
    assert one.relay.dialled == {}


def test_new_clients_do_not_wait_behind_a_silent_attempt(world):
    one = world(plan=errno.ECONNREFUSED, timeout_ms=None)
    one.come()
    one.relay.plan[one.address] = LATER
    one.run(18_500)
    one.relay.plan[one.address] = UP
    fd = one.come()
    one.run(19_100)
    assert fd in one.served


def test_a_surplus_connection_is_reset_where_nobody_is_left(world):
    one = world(plan=errno.ECONNREFUSED, timeout_ms=None)
    one.come()
    one.relay.plan[one.address] = LATER
    one.run(2500)
    assert len(one.relay.dialled) == 3
    one.answer(one.address, 0)
    assert len(one.relay.resets) == 2
    assert one.relay.closes == []


def test_thirty_silent_addresses_and_many_clients(world):
    many = [inet(last) for last in range(1, 31)]
    one = world(NAME, plan=dict.fromkeys(many, LATER), answer=(many, None), timeout_ms=None)
    for _ in range(150):
        one.come()
    most = 0
    for at_ms in range(0, 20_000, 100):
        one.run(at_ms)
        most = max(most, len(one.relay.dialled))
    assert most <= 32
    assert len(one.relay.dialled) <= 4
    assert {address for _, address, _ in one.relay.attempts} == set(many)


def test_an_address_that_refuses_is_tried_again_while_another_is_silent(world):
    plan = {inet(1): LATER, inet(2): up_at(600)}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None))
    fd = one.come()
    one.run(900)
    assert one.served == [fd]


def test_a_name_that_gets_another_address_while_the_old_one_is_silent(world):
    one = world(NAME, plan={inet(1): LATER, inet(2): UP}, answer=([inet(1, 0)], None))
    fd = one.come()
    one.run(1500)
    one.names.answer = ([inet(2, 0)], None)
    one.run(3000)
    assert one.served == [fd]
    assert one.relay.dialled == {}


@pytest.mark.parametrize("code", [_socket.EAI_NONAME, _socket.EAI_AGAIN])
def test_a_name_that_is_gone_while_its_address_is_silent(world, code):
    """Whoever has the address by the time it answers may be another service."""
    one = world(NAME, plan={inet(1): LATER}, answer=([inet(1, 0)], None))
    fd = one.come()
    one.run(1500)
    one.names.answer = ([], _socket.gaierror(code, "no such thing"))
    one.run(3000)
    assert one.relay.dialled == {}
    assert fd in one.reach.held


@pytest.mark.parametrize("timeout_ms", [None, 0])
def test_a_look_up_that_fails_for_ever_while_an_address_is_silent(world, timeout_ms):
    plan = {inet(1): LATER, inet(2): errno.ECONNREFUSED}
    answer = ([inet(1, 0), inet(2, 0)], None)
    one = world(NAME, plan=plan, answer=answer, timeout_ms=timeout_ms)
    fd = one.come()
    one.run(300)
    one.names.answer = ([], _socket.gaierror(_socket.EAI_FAIL, "never"))
    one.run(3000)  # which does not spin
    if timeout_ms is None:
        assert one.gone(fd)
    else:
        assert one.relay.times == [0, 250]  # one attempt at each, which goes on
        one.answer(inet(1), errno.ETIMEDOUT)
        assert one.gone(fd)


@pytest.mark.parametrize("settle_ms", [0, 50])
def test_without_connect_timeout_a_silent_host_is_tried_once(world, settle_ms):
    """For as long as the kernel tries, and no longer."""
    plan = {inet(1): LATER, inet(2): LATER}
    one = world(
        NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None), timeout_ms=0, settle_ms=settle_ms
    )
    fd = one.come()
    one.run(60_000)
    assert one.relay.times == [0, 250]
    one.answer(inet(1), errno.ETIMEDOUT)
    one.answer(inet(2), errno.ETIMEDOUT)
    assert one.gone(fd)


# ── a port that accepts before anybody is there ──────────────────────────────────────────────────


def test_nothing_is_sent_before_a_target_is_proven(world):
    one = world(settle_ms=50)
    assert one.reach.express is None
    fd = one.come(header=b"PROXY")
    one.run(49)
    assert one.served == []
    assert one.reach.express is None
    one.run(50)
    assert one.relay.served == [(fd, b"PROXY")]
    assert one.reach.express == one.address
    late = one.come()
    assert one.served == [fd, late]


def test_the_first_byte_proves_it(world):
    one = world(settle_ms=5000)
    fd = one.come()
    one.tick()
    one.say(one.address, 1)
    assert one.served == [fd]
    assert one.reach.express


@pytest.mark.parametrize("how", [0, -errno.ECONNRESET])
def test_a_target_that_lets_go_is_tried_again_as_after_a_refusal(world, capfd, how):
    one = world(settle_ms=50)
    clients = [one.come() for _ in range(3)]
    one.tick()
    assert len(one.relay.dialled) == 1  # the others wait behind the probe
    one.say(one.address, how)
    assert set(one.reach.held) == set(clients)
    assert capfd.readouterr().err == (
        "Failed to connect to remote host: it accepts and closes at once "
        f"({TCP}), holding clients until it answers.\n"
    )
    one.run(10)
    assert one.relay.times == [0, 10]
    one.say(one.address, how)
    one.run(70)
    assert one.served == clients
    assert len(one.relay.resets) == 2


def test_a_target_that_always_lets_go_is_given_up(world, capfd):
    one = world(settle_ms=50, timeout_ms=300)
    fd = one.come()
    for _ in range(50):
        one.run(one.now_ms + 10)
        if one.relay.dialled:
            one.say(one.address, 0)
    assert one.gone(fd)
    assert one.reach.failed == 1
    assert "it accepts and closes at once" in capfd.readouterr().err.splitlines()[-1]


def test_a_target_is_watched_to_the_end_though_connect_timeout_is_shorter(world):
    """It has been reached: otherwise nobody would ever be served."""
    one = world(settle_ms=500, timeout_ms=300)
    clients = [one.come() for _ in range(3)]
    one.run(499)
    assert one.served == []
    one.run(500)
    assert one.served == clients


def test_a_target_that_lets_go_after_connect_timeout(world):
    one = world(settle_ms=500, timeout_ms=300)
    fd = one.come()
    one.run(400)
    one.say(one.address, 0)
    one.run(400)
    assert one.gone(fd)
    assert one.relay.times == [0]


def test_a_silent_target_is_watched_as_soon_as_it_answers(world):
    """Its silence was an outage, so it is no longer proven."""
    one = world(settle_ms=50)
    one.come()
    one.run(50)
    assert len(one.served) == 1
    fd = one.come()
    one.relay.plan[one.address] = LATER
    one.run(1050)
    one.fail(fd, errno.ETIMEDOUT, since_ms=50)
    one.run(2100)
    one.answer(one.address, 0)
    assert fd in one.reach.held
    one.say(one.address, 0)
    assert fd in one.reach.held


def test_a_target_that_has_let_go_is_for_no_client_that_has_spoken(world):
    one = world(settle_ms=50)
    first = one.come()
    second = one.come()
    one.peers[first].shutdown(socket.SHUT_WR)
    one.peers[second].send(b"message")
    one.tick()
    (target,) = one.relay.dialled
    one.relay.said[target] = 0
    one.loop.handlers[target](1)  # and, in the same batch, the first client leaves
    one.loop.handlers[first](EPOLLHUP)
    one.tick()
    assert one.served == []
    assert second in one.reach.held
    one.run(100)
    assert one.served == [second]


def test_with_no_connect_timeout_letting_go_is_the_end(world):
    one = world(settle_ms=50, timeout_ms=0)
    fd = one.come()
    one.tick()
    one.say(one.address, 0)
    assert one.gone(fd)
    assert one.relay.times == [0]


def test_a_client_that_has_ended_without_a_word_is_not_held(world):
    one = world(settle_ms=50)
    fd = one.come()
    one.peers[fd].shutdown(socket.SHUT_WR)
    one.tick()
    one.say(one.address, 0)
    assert one.served == [fd]
    assert one.reach.express is None  # it is not proven by that


def test_a_client_that_has_spoken_and_ended_is_held(world):
    one = world(settle_ms=50)
    fd = one.come()
    one.peers[fd].send(b"message")
    one.peers[fd].shutdown(socket.SHUT_WR)
    one.tick()
    one.say(one.address, 0)
    assert fd in one.reach.held
    one.run(200)
    assert one.served == [fd]


def test_a_client_that_leaves_while_the_target_is_watched(world):
    one = world(settle_ms=50)
    fd = one.come()
    one.tick()
    one.happen(fd, EPOLLHUP)
    assert one.reach.gone == 1
    assert len(one.relay.resets) == 1


def test_an_outage_has_a_target_proven_anew(world):
    one = world(settle_ms=50)
    fd = one.come()
    one.run(50)
    one.relay.plan[one.address] = errno.ECONNREFUSED
    second = one.come()
    one.relay.plan[one.address] = UP
    one.run(60)
    assert one.served == [fd]
    one.run(110)
    assert one.served == [fd, second]


def test_congestion_does_not(world):
    room = Backlog(1)
    one = world(UNIX, plan=room, settle_ms=50)
    one.come()
    one.run(50)
    fd = one.come()
    room.room = 1
    one.run(55)
    assert one.served[-1] == fd


def test_a_name_with_an_address_that_lets_go(world):
    plan = {inet(1): UP, inet(2): UP}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None), settle_ms=50)
    fd = one.come()
    one.tick()
    one.say(inet(1), 0)
    one.run(60)
    assert one.served == [fd]
    assert [address for _, address, _ in one.relay.attempts] == [inet(1), inet(2)]


# ── what the log says ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def levels(monkeypatch):
    """(level, text) of every line."""
    lines = []
    monkeypatch.setattr(log, "_log", lambda level, text: lines.append((level, text)))
    return lines


def test_a_target_that_is_still_starting_is_no_warning(world, levels):
    one = world(plan=up_at(3000))
    one.come()
    one.run(5000)
    assert [level for level, _ in levels] == [log.INFO, log.INFO]


def test_a_start_that_takes_long_is_a_warning(world, levels):
    one = world(plan=errno.ECONNREFUSED, timeout_ms=None)
    one.come()
    one.run(9999)
    assert [level for level, _ in levels] == [log.INFO]
    one.run(60_000)
    (last,) = levels[1:]
    assert last == (log.WARNING, f"{REFUSED}, clients have been held for 10s.")


def test_a_target_that_has_been_reached_before_is_a_warning(world, levels):
    one = world(plan=up_at(0))
    one.come()
    one.run(1000)
    one.relay.plan[one.address] = errno.ECONNREFUSED
    one.come()
    one.tick()
    assert [level for level, _ in levels] == [log.WARNING]


def test_clients_that_came_back_do_not_mean_that_it_was_reached(world, levels):
    one = world()
    clients = [one.come(), one.come()]
    one.relay.plan[one.address] = errno.ECONNREFUSED
    for fd in clients:
        one.fail(fd, errno.ECONNREFUSED)
    one.run(50)
    assert [level for level, _ in levels] == [log.INFO]


def test_a_connection_of_a_gate_counts_as_reached(world, levels):
    one = world()
    one.reach.gates.append(SimpleNamespace(connected_count=1))
    one.relay.plan[one.address] = errno.ECONNREFUSED
    one.come()
    one.tick()
    assert [level for level, _ in levels] == [log.WARNING]


@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM])
def test_a_permission_that_is_missing_is_a_warning_at_once(world, levels, error):
    one = world(UNIX, plan=error)
    one.come()
    one.run(20_000)
    assert levels[0][0] == log.WARNING


def test_one_line_when_an_outage_begins_and_one_when_it_ends(world, capfd):
    one = world(plan=up_at(2000))
    for _ in range(3):
        one.come()
    one.run(1000)
    one.come()
    one.run(3000)
    assert len(one.served) == 4
    assert capfd.readouterr().err.splitlines() == [
        f"{REFUSED}, holding clients until it answers.",
        f"{TCP} answers after 2.200s, 4 clients were held.",
    ]
    one.run(60_000)
    one.come()
    assert capfd.readouterr().err == ""


def test_the_end_of_an_outage_when_nothing_can_be_loaded(world, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "proxyd.timespan", None)  # as if no fd were left
    one = world(plan=up_at(20))
    one.come()
    one.run(20)
    assert len(one.served) == 1
    assert (
        capfd.readouterr().err.splitlines()[1] == f"{TCP} answers after 20 ms, 1 client was held."
    )


def test_a_single_client(world, capfd):
    one = world(plan=up_at(20))
    one.come()
    one.run(20)
    assert capfd.readouterr().err.splitlines()[1] == f"{TCP} answers after 20ms, 1 client was held."


def test_every_outage_is_told(world, capfd):
    one = world(plan=lambda now_ms: UP if now_ms % 20_000 >= 5000 else errno.ECONNREFUSED)
    for at_ms in (0, 20_000, 40_000):
        one.run(at_ms)
        one.come()
    one.run(60_000)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 6
    assert [line.startswith("Failed to connect") for line in lines] == [True, False] * 3
    assert all(line.endswith("1 client was held.") for line in lines[1::2])


def test_an_outage_ends_even_if_the_last_follower_hangs_up(world, capfd):
    one = world(plan=errno.ECONNREFUSED)
    first, second = one.come(), one.come()
    one.relay.plan[one.address] = LATER
    one.run(10)
    one.answer(one.address, 0)
    assert one.served == [first]
    one.happen(second, EPOLLHUP)  # its own connect is still under way
    assert not one.reach.held
    one.relay.plan[one.address] = UP
    one.run(30_000)
    one.come()
    assert "answers after" in capfd.readouterr().err
    one.run(60_000)
    one.relay.plan[one.address] = errno.ECONNREFUSED
    one.come()
    one.tick()
    assert "holding clients" in capfd.readouterr().err, "the second outage is not told"


def test_clients_that_are_given_up_are_told_with_the_last_error(world, capfd):
    one = world(UNIX, plan=lambda now_ms: errno.ENOENT if now_ms < 300 else errno.ECONNREFUSED)
    one.come()
    one.run(10_000)
    first, last = capfd.readouterr().err.splitlines()
    assert "No such file or directory" in first
    assert last == f"Failed to connect to remote host: Connection refused ({UNIX})."


def test_many_that_are_given_up_are_one_line(world, capfd):
    one = world(plan=errno.ECONNREFUSED)
    for _ in range(50):
        one.come()
    one.run(10_000)
    assert one.reach.failed == 50
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_the_reason_is_not_an_earlier_outage_s(world, capfd):
    one = world(NAME, plan={inet(1): up_at(500)}, answer=([inet(1)], None))
    one.come()
    one.run(30_000)
    assert len(one.served) == 1
    capfd.readouterr()
    one.names.is_fresh = False
    one.relay.plan[inet(1)] = LATER
    fd = one.come()
    one.run(40_000)
    assert one.gone(fd)
    for line in capfd.readouterr().err.splitlines():
        assert line.startswith(f"Failed to connect to remote host: Connection timed out ({NAME})")


def test_a_target_that_is_our_own_port(world, capfd):
    one = world(plan=errno.ELOOP)
    one.come()
    one.tick()
    assert "it met itself, since nobody listens there" in capfd.readouterr().err


# ── names ────────────────────────────────────────────────────────────────────────────────────────


def test_a_client_waits_for_the_look_up(world):
    one = world(NAME, plan={inet(1): UP})
    fd = one.come(header=b"PROXY")
    one.tick()
    assert one.names.asked == [0]
    assert fd in one.reach.held
    one.run(300)
    one.names.reply([inet(1, 0)])
    one.tick()
    assert one.relay.served == [(fd, b"PROXY")]
    assert one.relay.attempts == [(300, inet(1), None)]
    assert not one.reach.held


def test_clients_of_one_target_share_a_look_up(world):
    one = world(NAME, plan={inet(1): UP})
    clients = [one.come() for _ in range(5)]
    one.run(300)
    assert one.names.asked == [0]
    one.names.reply([inet(1, 0)])
    one.tick()
    assert one.served == clients


def test_the_address_that_answered_is_remembered_while_the_look_up_is_fresh(world):
    one = world(NAME, plan={inet(1): UP, inet(2): UP}, answer=([inet(1, 0), inet(2, 0)], None))
    one.come()
    one.tick()
    one.relay.attempts.clear()
    fd = one.come()
    assert one.served[-1] == fd
    assert one.relay.attempts == [(0, inet(1), STAGGER_MS)]
    assert one.names.asked == [0]
    one.names.asked.clear()
    one.names.is_fresh = False
    one.come()
    one.tick()
    assert one.names.asked == [0]


def test_a_remembered_address_that_fails_late_is_not_the_only_one(world, capfd):
    one = world(NAME, plan={inet(1): UP, inet(2): UP}, answer=([inet(1, 0), inet(2, 0)], None))
    one.come()
    one.tick()
    fd = one.come()
    one.relay.plan[inet(1)] = LATER
    one.run(250)
    one.fail(fd, errno.ETIMEDOUT, pending=b"GET", since_ms=0)
    one.tick()
    one.run(500)
    assert one.relay.served[-1] == (fd, b"GET")
    assert one.relay.attempts[-1] == (250, inet(2), None)  # the slow one would be the last
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [errno.ENETUNREACH, errno.EPERM])
@pytest.mark.parametrize("timeout_ms", [0, 10_000])
def test_a_remembered_address_that_fails_at_once_is_not_the_only_one(
    world, capfd, error, timeout_ms
):
    one = world(
        NAME,
        plan={inet(1): UP, inet(2): UP},
        answer=([inet(1, 0), inet(2, 0)], None),
        timeout_ms=timeout_ms,
    )
    one.come()
    one.tick()
    one.relay.plan[inet(1)] = error
    fd = one.come()
    one.tick()
    assert one.served[-1] == fd
    assert one.relay.attempts[-1] == (0, inet(2), None)
    assert capfd.readouterr().err == ""


def test_a_dead_first_address_costs_250_ms_once(world):
    plan = {inet(1): LATER, inet(2): LATER}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None))
    fd = one.come()
    one.run(260)
    assert one.relay.attempts == [(0, inet(1), None), (250, inet(2), None)]
    one.answer(inet(2), 0)
    assert one.served == [fd]


def test_a_dead_first_address_and_a_second_that_is_there_at_once(world):
    """As every address of this machine is: the race is won within step()."""
    plan = {inet(1): LATER, inet(2): UP}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None))
    fd = one.come()
    one.run(250)
    assert one.served == [fd]
    assert not one.reach.held


def test_a_race_that_is_lost_within_step_is_an_outage_at_once(world, capfd):
    plan = {inet(1): LATER, inet(2): errno.ECONNREFUSED}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None))
    one.come()
    one.run(200)
    one.answer(inet(1), errno.EHOSTUNREACH)
    assert "holding clients" in capfd.readouterr().err


def test_an_address_that_took_long_is_not_remembered(world):
    plan = {inet(1): LATER, inet(2): UP}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None))
    one.come()
    one.run(240)
    one.answer(inet(1), 0)
    one.come()
    one.tick()
    # All the addresses are tried again, in their order.
    assert one.relay.attempts[-1] == (240, inet(1), None)


def test_all_addresses_are_tried_before_it_is_an_outage(world, capfd):
    plan = {inet(1): errno.EHOSTUNREACH, inet(2): errno.ECONNREFUSED}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None))
    one.come()
    one.run(10)
    assert one.relay.times == [0, 0, 10, 10]
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_without_connect_timeout_each_address_is_tried_once(world, capfd):
    plan = {inet(1): errno.EHOSTUNREACH, inet(2): errno.ECONNREFUSED}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None), timeout_ms=0)
    fd = one.come()
    one.run(60_000)
    assert one.gone(fd)
    assert one.relay.times == [0, 0]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("Failed to connect to remote host: ")


def test_each_client_has_an_attempt_of_its_own_without_connect_timeout(world):
    plan = {inet(1): errno.EHOSTUNREACH, inet(2): errno.ECONNREFUSED}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None), timeout_ms=0)
    clients = [one.come() for _ in range(3)]
    one.run(1000)
    assert all(map(one.gone, clients))
    assert one.relay.times == [0] * 6


def test_a_connection_is_used_though_the_name_is_just_looked_up_again(world):
    plan = {inet(1): LATER, inet(2): errno.ECONNREFUSED}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None))
    fd = one.come()
    one.run(255)
    one.names.answer = None  # from now on the name servers think
    one.run(900)
    one.answer(inet(1), 0)
    assert one.served == [fd]


NOT_YET = [
    _socket.EAI_AGAIN,
    _socket.EAI_NONAME,
    _socket.EAI_NODATA,
    _socket.EAI_MEMORY,
    _socket.EAI_SYSTEM,
]


@pytest.mark.parametrize("code", NOT_YET)
def test_a_name_that_appears_later(world, capfd, code):
    error = _socket.gaierror(code, "no such thing")
    one = world(NAME, plan={inet(1): UP}, answer=([], error))
    clients = [one.come(), one.come()]
    one.run(2500)
    # One look-up per second.
    assert one.names.asked == [0, 1000, 2000]
    assert one.relay.attempts == []
    one.names.answer = ([inet(1, 0)], None)
    one.run(3000)
    assert one.served == clients
    assert capfd.readouterr().err.splitlines() == [
        "Failed to resolve host: no such thing (backend), holding clients until it answers.",
        f"{NAME} answers after 3s, 2 clients were held.",
    ]


def test_a_name_that_does_not_appear(world, capfd):
    error = _socket.gaierror(_socket.EAI_NONAME, "no such thing")
    one = world(NAME, plan={}, answer=([], error), timeout_ms=1500)
    fd = one.come()
    one.run(1499)
    assert not one.gone(fd)
    one.run(1500)
    assert one.gone(fd)
    assert one.names.asked == [0, 1000]
    assert capfd.readouterr().err.splitlines()[1] == (
        "Failed to resolve host: no such thing (backend)."
    )


@pytest.mark.parametrize(
    ("code", "timeout_ms"),
    [(_socket.EAI_FAIL, 10_000), (_socket.EAI_FAMILY, None), *((code, 0) for code in NOT_YET)],
)
def test_a_name_that_cannot_be(world, capfd, code, timeout_ms):
    error = _socket.gaierror(code, "no such thing")
    one = world(NAME, plan={}, answer=([], error), timeout_ms=timeout_ms)
    clients = [one.come(), one.come()]
    one.tick()
    assert all(map(one.gone, clients))
    assert one.names.asked == [0]
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "Failed to resolve host: no such thing (backend)."


def test_a_look_up_that_hangs(world, capfd):
    one = world(NAME, plan={})
    fd = one.come()
    one.run(9999)
    assert one.names.asked == [0]
    assert fd in one.reach.held
    one.run(10_000)
    assert one.gone(fd)
    assert capfd.readouterr().err.splitlines() == [
        "Failed to resolve host: no answer yet (backend), holding clients until it answers.",
        "Failed to resolve host: no answer yet (backend).",
    ]
    one.names.reply([inet(1, 0)])  # at last: nobody is there any more


def test_a_look_up_that_is_late_is_used_when_it_comes(world, capfd):
    one = world(NAME, plan={inet(1): UP})
    fd = one.come()
    one.run(LATE_MS - 1)
    assert capfd.readouterr().err == ""
    one.run(5000)
    one.names.reply([inet(1, 0)])
    one.tick()
    assert one.relay.served == [(fd, b"")]
    assert one.relay.attempts == [(5000, inet(1), None)]
    assert one.names.asked == [0, 5000]  # the second was answered at once


def test_without_connect_timeout_a_late_look_up_is_waited_for(world, capfd):
    one = world(NAME, plan={inet(1): UP}, timeout_ms=0)
    fd = one.come()
    one.run(5000)
    assert fd in one.reach.held
    one.names.reply([inet(1, 0)])
    one.tick()
    assert one.served == [fd]
    assert capfd.readouterr().err == ""


def test_the_last_good_answer_stands_in_for_a_late_one(world, capfd):
    assert LATE_MS == resolver.LATE_MS
    one = world(NAME, plan={inet(1): UP})
    clients = [one.come(), one.come()]
    one.run(LATE_MS - 1)
    assert one.served == []
    one.names.stands_in = [inet(1, 0)]  # current() says so from then on
    one.run(LATE_MS)
    assert one.served == clients
    clients.append(one.come())
    assert one.served == clients
    assert one.names.asked == [0]
    one.names.stands_in = []
    one.names.reply([inet(1, 0)])  # it comes after all
    one.come()
    assert len(one.served) == 4
    assert capfd.readouterr().err == ""


def test_a_client_whose_look_up_is_prompt_does_not_wait_in_the_status(world):
    one = world(NAME, plan={inet(1): UP})
    one.come()
    one.run(STAGGER_MS - 1)
    assert (len(one.reach.held), one.reach.waiting) == (1, 0)
    one.run(STAGGER_MS)
    assert one.reach.waiting == 1
    one.names.reply([], _socket.gaierror(_socket.EAI_NONAME, "no such thing"))
    one.tick()
    one.come()
    assert one.reach.waiting == 2


def test_a_new_address_is_followed_without_holding_a_client(world):
    one = world(NAME, plan={inet(1): UP, inet(2): UP}, answer=([inet(1, 0)], None))
    one.come()
    one.tick()
    one.names.answer = ([inet(2, 0)], None)
    fd = one.come()
    assert one.served[-1] == fd
    assert not one.reach.held
    assert [address for _, address, _ in one.relay.attempts] == [inet(1), inet(2)]
    assert one.names.asked == [0]


def test_a_prompt_address_stays_while_it_is_among_the_answers(world):
    plan = dict.fromkeys([inet(1), inet(2), inet(3)], UP)
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None))
    one.come()
    one.tick()
    for answer in ([2, 1], [3, 1, 2], [1]):  # as name servers rotate them
        one.names.answer = ([inet(last, 0) for last in answer], None)
        one.come()
        assert one.relay.attempts[-1][1] == inet(1)
    assert not one.reach.held


def test_the_only_address_of_a_name_has_all_the_time_that_a_literal_one_has(world):
    one = world(NAME, plan={inet(1): UP}, answer=([inet(1, 0)], None), timeout_ms=7000)
    one.come()
    one.tick()
    one.come()
    assert one.relay.attempts[-1] == (0, inet(1), SILENT_MS)


def test_dead_addresses_cost_their_time_once(world):
    plan = {inet(1): LATER, inet(2): LATER, inet(3): UP}
    answer = ([inet(1, 0), inet(2, 0), inet(3, 0)], None)
    one = world(NAME, plan=plan, answer=answer)
    one.come()
    one.run(500)
    assert len(one.served) == 1
    one.relay.attempts.clear()
    for number in range(2, 6):
        one.names.answer = (list(answer[0]), None)  # looked up again, and the same
        fd = one.come()
        one.tick()
        assert one.served[-1] == fd
        assert len(one.served) == number
    assert {address for _, address, _ in one.relay.attempts} == {inet(3)}


def test_a_name_that_is_gone_is_an_outage_as_at_a_cold_start(world, capfd):
    one = world(NAME, plan={inet(1): UP, inet(2): UP}, answer=([inet(1, 0)], None))
    one.come()
    one.tick()
    one.names.answer = ([], _socket.gaierror(_socket.EAI_NONAME, "no such thing"))
    clients = [one.come() for _ in range(3)]
    one.run(2500)
    assert len(one.served) == 1
    assert list(one.reach.held) == clients
    assert one.names.asked == [0, 0, 1000, 2000]
    assert len(capfd.readouterr().err.splitlines()) == 1
    one.names.answer = ([inet(2, 0)], None)
    one.run(3000)
    assert one.served[1:] == clients
    assert {address for _, address, _ in one.relay.attempts[1:]} == {inet(2)}


# ── an interface ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def interfaces(monkeypatch):
    """Indexes of interfaces, by name."""
    known = {}

    def index(name):
        if isinstance(known.get(name, errno.ENODEV), int):
            raise OSError(known.get(name, errno.ENODEV), "")
        return known[name][0]

    monkeypatch.setattr(sockaddr, "interface_index", index)
    return known


def scoped(index):
    return sockaddr.pack_inet6("fe80::1", 80, index)


def test_the_interface_of_a_target_is_looked_up_for_each_client(world, interfaces):
    interfaces["eth0"] = (3,)
    one = world("[fe80::1%eth0]:80", plan={scoped(3): UP, scoped(9): UP})
    assert one.reach.express is None  # or the relay would connect there without asking
    for index in (3, 9, 3):
        interfaces["eth0"] = (index,)
        one.come()
        assert not one.reach.held
        assert one.relay.attempts[-1] == (0, scoped(index), SILENT_MS)


def test_an_interface_that_is_not_there_yet_is_waited_for(world, interfaces, capfd):
    one = world("[fe80::1%eth0]:80", plan={scoped(3): UP})
    clients = [one.come(), one.come()]
    one.run(1000)
    assert list(one.reach.held) == clients
    interfaces["eth0"] = (3,)
    one.run(1300)
    assert one.served == clients
    assert capfd.readouterr().err.splitlines()[0] == (
        "Failed to connect to remote host: No such device ([fe80::1%eth0]:80), "
        "holding clients until it answers."
    )


@pytest.mark.parametrize("error", [errno.ENETUNREACH, errno.ENODEV, errno.EADDRNOTAVAIL])
def test_an_interface_that_is_made_anew_is_followed_within_an_outage(world, interfaces, error):
    interfaces["eth0"] = (3,)
    one = world("[fe80::1%eth0]:80", plan={scoped(3): error, scoped(9): UP})
    fd = one.come()
    one.tick()
    interfaces["eth0"] = (9,)
    one.run(10)
    assert one.served == [fd]


@pytest.mark.parametrize(
    ("error", "timeout_ms"), [(errno.ENODEV, 0), (errno.EMFILE, 0), (errno.EAFNOSUPPORT, 10_000)]
)
def test_an_interface_that_cannot_be_waited_for(world, interfaces, capfd, error, timeout_ms):
    interfaces["eth0"] = error
    one = world("[fe80::1%eth0]:80", plan={}, timeout_ms=timeout_ms)
    fd = one.come()
    one.tick()
    assert one.gone(fd)
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"Failed to connect to remote host: {os.strerror(error)} ([fe80::1%eth0]:80)."


def test_the_port_of_the_listener_with_an_interface(world, interfaces):
    interfaces["eth0"] = (3,)
    one = world("[fe80::1%eth0]:*", plan={sockaddr.with_port(scoped(3), 8443): UP}, port=8443)
    one.come()
    assert len(one.served) == 1


def test_an_outage_of_a_name_probes_all_addresses(world):
    plan = {inet(1): errno.ECONNREFUSED, inet(2): errno.ECONNREFUSED}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None))
    one.come()
    one.run(95)
    assert one.relay.times == sorted([*range(0, 91, 10)] * 2)


def test_the_port_is_given_to_each_address(world):
    one = world("backend:*", plan={inet(1, 8443): UP}, answer=([inet(1, 0)], None), port=8443)
    one.come()
    one.tick()
    assert [address for _, address, _ in one.relay.attempts] == [inet(1, 8443)]
    assert one.reach.text == "backend:8443"


# ── the log at debug level ───────────────────────────────────────────────────────────────────────


def test_connections_have_names_at_debug_level(world):
    one = world()
    one.loop.notes = {}
    fd = one.come()
    assert one.loop.notes == {1: f"client{fd} → {TCP}"}
    one.relay.plan[one.address] = up_at(10)
    one.fail(fd, errno.ECONNREFUSED)
    assert one.loop.notes == {}
    one.run(10)
    assert one.loop.notes == {2: f"client{fd} → {TCP}"}


# ── whatever happens ─────────────────────────────────────────────────────────────────────────────

STATES = st.sampled_from(
    [UP, LATER, errno.ECONNREFUSED, errno.ENETUNREACH, errno.EPERM, errno.ENOENT]
)
MOMENTS = st.lists(
    st.tuples(
        st.integers(0, 3000),
        st.sampled_from(["come", "come", "go", "change", "answer", "fail", "say", "look"]),
        STATES,
        st.integers(0, 100),
    ),
    max_size=25,
)


@given(STATES, MOMENTS, st.sampled_from([0, 700, None]), st.booleans(), st.sampled_from([0, 50]))
def test_whatever_happens_each_client_is_in_one_place(first, moments, timeout_ms, named, settle_ms):
    """Served, held or closed; those held are probed for; and nothing spins (see run())."""
    addresses = [inet(1), inet(2)]
    if named:
        one = World(
            NAME,
            dict.fromkeys(addresses, first),
            timeout_ms,
            answer=([inet(1, 0), inet(2, 0)], None),
            settle_ms=settle_ms,
        )
    else:
        one = World(TCP, first, timeout_ms, settle_ms=settle_ms)
        addresses = [one.address]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race, "connected", one.relay.connected)
        patch.setattr(race, "peek", one.relay.peek)
        patch.setattr(log, "_log", lambda level, text: None)
        for after_ms, what, state, choice in moments:
            one.run(one.now_ms + after_ms)
            address = addresses[choice % len(addresses)]
            held = list(one.reach.held)
            racing = list(one.relay.dialled)
            if what == "come":
                one.come()
            elif what == "go" and held:
                fd = held[choice % len(held)]
                if choice % 3:  # it has spoken, and is served all the same
                    one.peers[fd].send(b"x")
                one.loop.handlers[fd](EPOLLHUP)
            elif what == "say" and racing:
                fd = racing[choice % len(racing)]
                one.relay.said[fd] = (1, 0, -errno.ECONNRESET)[choice % 3]
                one.loop.handlers[fd](1)
            elif what == "look" and named:
                one.names.say(choice)
            elif what == "change":
                one.relay.plan[address] = state
            elif what == "answer" and racing:
                fd = racing[choice % len(racing)]
                if one.reach._race._attempts[fd].settled_ms is not None:
                    continue  # it is connected already
                one.relay.dialled[fd] = {UP: 0, LATER: errno.EINPROGRESS}.get(state, state)
                one.loop.handlers[fd](4)
            one.tick()
            one.assert_counted()
            assert len(one.relay.dialled) <= max(len(one.reach.held), 1) + race.SPARE
            served, held = set(one.served), set(one.reach.held)
            assert served.isdisjoint(held)
            assert all(one.gone(fd) == (fd not in served | held) for fd in one.peers)
            assert set(one.relay.watched) == held
            if held:  # somebody will call us again, or the target or a name server must answer
                waits = one.relay.dialled or (named and one.names.waiting)
                assert one.reach.next_ms() is not None or waits
            if held and timeout_ms:
                assert one.reach.next_ms() <= one.relay.now_ms + timeout_ms
            if not held:
                assert not one.relay.dialled
        one.close()


# ── the real relay ───────────────────────────────────────────────────────────────────────────────


class Real:
    """A Reach to a real target, and the main loop around it."""

    def __init__(self, target, timeout_ms=10_000, names=None):
        self.loop = Loop()
        target = parse_target(target)
        self.reach = Reach(self.loop, names, target, target.service or 0, timeout_ms)

    def come(self, kind=socket.AF_INET):
        """A client over loopback or UNIX, which the relay now has; its own end."""
        with socket.socket(kind) as listening:
            listening.bind(("127.0.0.1", 0) if kind == socket.AF_INET else "")
            listening.listen()
            peer = socket.socket(kind)
            peer.settimeout(PATIENCE)
            peer.connect(listening.getsockname())
            ours, _ = listening.accept()
        ours.setblocking(False)
        listener = Listener(-1, "x", sockaddr.from_socket_name(kind, ours.getsockname()))
        self.reach.take(ours.detach(), listener, 0, None, "")
        return peer

    def turn(self, limit_ms=PATIENCE * 1000):
        """One turn of the main loop."""
        next_ms = self.reach.next_ms() if self.reach.held else None
        wait = limit_ms if next_ms is None else max(next_ms - self.loop.relay.now_ms, 0)
        for event in self.loop.run(min(wait, limit_ms)):
            assert isinstance(event, ConnectFailed)
            listener = Listener(-1, "x", sockaddr.pack_inet("127.0.0.1", 1))
            self.reach.take_back(listener, event)
        if self.reach.held:
            self.reach.step(self.loop.relay.now_ms)

    def receive(self, sock):
        """What comes next on a socket, while the relay runs."""
        sock.setblocking(False)
        for _ in range(PATIENCE * 100):
            try:
                return sock.recv(100)
            except BlockingIOError:
                self.turn(10)
        raise TimeoutError

    def close(self):
        self.reach.drop_all()
        self.loop.relay.close_all()


@pytest.fixture
def real():
    made = []

    def make(*arguments, **keywords):
        made.append(Real(*arguments, **keywords))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def quiet(capfd):
    log.setup({})
    yield
    log.setup({})


@pytest.mark.parametrize("state", ["refused", "stale", "absent"])
def test_real_clients_wait_until_the_target_listens(real, quiet, tmp_path, state):
    if state == "refused":
        backend = socket.socket()
        backend.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{backend.getsockname()[1]}"
    else:
        target = str(tmp_path / "socket")
        if state == "stale":
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(target)
        backend = socket.socket(socket.AF_UNIX)
    with backend:
        one = real(target)
        peers = [one.come() for _ in range(5)]
        for number, peer in enumerate(peers):
            peer.sendall(b"%d" % number)
        peers[1].shutdown(socket.SHUT_WR)  # is served all the same
        for _ in range(5):
            one.turn()
        assert len(one.reach.held) == 5
        if state == "stale":
            os.unlink(target)
        if state != "refused":
            backend.bind(target)
        backend.listen()
        while one.reach.held:
            one.turn()
        for number, peer in enumerate(peers):
            served, _ = backend.accept()
            with served:
                assert one.receive(served) == b"%d" % number
            peer.close()


@pytest.mark.parametrize("kind", [socket.AF_INET, socket.AF_UNIX])
def test_a_real_client_that_resets_is_dropped(real, quiet, tmp_path, kind):
    one = real(str(tmp_path / "absent"))
    gone, stays = one.come(kind), one.come(kind)
    if kind == socket.AF_INET:
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gone.close()
    while len(one.reach.held) > 1:
        one.turn()
    (client,) = one.reach.held.values()
    with socket.socket(fileno=os.dup(client.fd)) as ours:
        assert ours.getpeername() == stays.getsockname()
    stays.close()


@pytest.mark.parametrize("kind", [socket.AF_INET, socket.AF_UNIX])
def test_a_real_client_that_has_sent_its_request_and_half_closed_waits(real, quiet, tmp_path, kind):
    target = str(tmp_path / "socket")
    one = real(target)
    with one.come(kind) as peer, socket.socket(socket.AF_UNIX) as backend:
        peer.sendall(b"request")
        peer.shutdown(socket.SHUT_WR)
        for _ in range(5):
            one.turn()
        assert len(one.reach.held) == 1
        backend.bind(target)
        backend.listen()
        while one.reach.held:
            one.turn()
        served, _ = backend.accept()
        with served:
            assert one.receive(served) == b"request"
            assert one.receive(served) == b""
            served.sendall(b"reply")
            served.shutdown(socket.SHUT_WR)
            assert one.receive(peer) == b"reply"
            assert one.receive(peer) == b""


class RealNames:
    """Knows the addresses of a name at once."""

    def __init__(self, *addresses):
        self.addresses = list(addresses)
        self.asked = False

    def ask(self, host, now_ms, done):
        self.asked = True
        done(self.addresses, None)

    def current(self, host, now_ms):
        return self.addresses if self.asked else []


def bound_to_one_port(*hosts):
    """A socket on each of `hosts`, all with one port, which is free on all of them."""
    while True:
        sockets = [socket.socket() for _ in hosts]
        try:
            sockets[0].bind((hosts[0], 0))
            port = sockets[0].getsockname()[1]
            for other, host in zip(sockets[1:], hosts[1:], strict=True):
                other.bind((host, port))
        except OSError as error:
            for one in sockets:
                one.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return *sockets, port


def test_a_real_name_with_a_first_address_that_refuses(real, quiet):
    refuses, backend, port = bound_to_one_port("127.0.0.2", "127.0.0.1")
    with refuses, backend:
        backend.listen()
        addresses = [sockaddr.pack_inet(host, 0) for host in ("127.0.0.2", "127.0.0.1")]
        one = real(f"backend:{port}", names=RealNames(*addresses))
        with one.come() as peer:
            one.reach.step(one.loop.relay.now_ms)
            while one.reach.held:
                one.turn()
            peer.sendall(b"hello")
            served, _ = backend.accept()
            with served:
                assert one.receive(served) == b"hello"


def test_a_real_target_that_has_reset_before_it_was_noticed(real, quiet, monkeypatch):
    """It has been reached, and its reset is the client's to see: as a reset."""
    with socket.socket() as backend:
        backend.bind(("127.0.0.1", 0))
        backend.listen()
        port = backend.getsockname()[1]

        def reset_then_look(fd):
            accepted, _ = backend.accept()
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            accepted.close()
            return look(fd)

        look = race.connected
        monkeypatch.setattr(race, "connected", reset_then_look)
        one = real(f"backend:{port}", names=RealNames(sockaddr.pack_inet("127.0.0.1", 0)))
        with one.come() as peer:
            one.reach.step(one.loop.relay.now_ms)
            assert not one.reach.held
            with pytest.raises(ConnectionResetError):
                one.receive(peer)


def test_the_pauses_of_the_probes():
    assert (outage.PROBE_MS, outage.EAGER_MS, outage.PROBE_SLOWEST_MS) == (10, 150, 250)
