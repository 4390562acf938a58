"""Clients that wait for their target: who tries when, who follows, and who gives up."""

import _socket
import errno
import fcntl
import itertools
import os
import socket
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import address as sockaddr
from proxyd import log, race, reach
from proxyd._relay import FAILED
from proxyd.listen import Listener
from proxyd.loop import EPOLLET, Loop
from proxyd.race import STAGGER_MS
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
        self.last_id = 0
        self.adopt_error = 0

    def outcome(self, address):
        outcome = self.plan[address]
        outcome = outcome(self.now_ms - START_MS) if callable(outcome) else outcome
        if isinstance(outcome, int):
            raise OSError(outcome, "")
        return outcome

    def connect(self, client, family, address, preamble=None, cookie=0, timeout_ms=0):
        self.attempts.append((self.now_ms - START_MS, address, timeout_ms))
        self.outcome(address)
        self.last_id += 1
        self.served.append((client, preamble or b""))
        return self.last_id

    def dial(self, address):
        self.attempts.append((self.now_ms - START_MS, address, None))
        outcome = self.outcome(address)
        fd = 100_000 + len(self.attempts)
        self.dialled[fd] = 0 if outcome == UP else errno.EINPROGRESS
        return fd

    def connected(self, fd):
        return self.dialled[fd]

    def hang_up(self, fd, reset=False):
        if self.dialled.pop(fd, None) is None:
            os.close(fd)  # a client's

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

    def ask(self, host, now_ms, done):
        assert host == b"backend"
        assert now_ms == self.relay.now_ms
        self.asked.append(now_ms - START_MS)
        if self.answer is None:
            self.waiting.append(done)
        else:
            done(*self.answer)

    def fresh(self, host, now_ms):
        return self.is_fresh and self.answer is not None and bool(self.answer[0])

    def reply(self, addresses, error=None):
        """The name servers have thought, and their answer serves from now on."""
        self.answer = (addresses, error)
        waiting, self.waiting = self.waiting, []
        for done in waiting:
            done(addresses, error)


class World:
    """A Reach, and the main loop around it."""

    def __init__(self, target=TCP, plan=UP, timeout_ms=10_000, answer=None, port=80):
        target = parse_target(target)
        self.address = target.address
        self.relay = Relay(plan if isinstance(plan, dict) else {self.address: plan})
        self.loop = Loop()
        self.loop.relay = self.relay
        self.names = Names(self.relay, answer) if target.host is not None else None
        self.reach = Reach(self.loop, self.names, target, port, timeout_ms)
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
        since_ms = START_MS + (self.now_ms if since_ms is None else since_ms)
        self.reach.take_back(
            self.listener, (FAILED, fd, error, 3, pending, since_ms, self.relay.last_id)
        )

    def gone(self, fd):
        """Whether our end of a client is closed."""
        try:
            return self.peers[fd].recv(1) == b""
        except BlockingIOError:
            return False

    @property
    def served(self):
        return [fd for fd, _ in self.relay.served]

    def close(self):
        """The end: nothing may be left over."""
        self.reach.drop_all()
        assert self.relay.watched == {}
        assert self.relay.dialled == {}
        assert self.loop.handlers == {}
        assert self.reach._racing == {}
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
    assert one.relay.attempts == [(0, one.address, 10_000)] * 2
    assert not one.reach.held
    assert one.reach.next_ms() is None
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


@pytest.mark.parametrize(("timeout_ms", "kernel_ms"), [(10_000, 10_000), (None, 0), (0, 0)])
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
    errno.ENOENT,
    errno.EMFILE,
    errno.ENOBUFS,
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
    assert one.reach.served == 5
    assert one.reach.failed == 0


def test_the_oldest_probes_even_if_younger_ones_came_meanwhile(world):
    one = world(plan=errno.ECONNREFUSED)
    oldest = one.come()
    one.run(5)
    one.come()
    one.relay.plan[one.address] = LATER
    one.run(10)
    assert list(one.reach._racing) == [oldest]
    one.run(5000)
    assert list(one.reach._racing) == [oldest]
    assert one.relay.times == [0, 10]


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
    assert list(one.reach._racing) == [oldest]


def test_the_next_oldest_probes_when_the_oldest_hangs_up(world):
    one = world(plan=errno.ECONNREFUSED)
    oldest, second, third = one.come(), one.come(), one.come()
    one.relay.plan[one.address] = LATER
    one.run(10)
    one.happen(oldest, EPOLLHUP)
    assert one.gone(oldest)
    one.run(20)
    assert list(one.reach._racing) == [second]
    one.answer(one.address, 0)
    assert one.served == [second]
    assert set(one.reach._racing) == {third}
    one.answer(one.address, 0)
    assert one.served == [second, third]


def test_the_others_wait_while_a_probe_is_under_way(world):
    one = world(plan=errno.ECONNREFUSED)
    clients = [one.come(), one.come()]
    one.relay.plan[one.address] = LATER
    one.run(9000)
    assert one.relay.times == [0, 10]
    one.answer(one.address, errno.ECONNREFUSED)
    assert one.relay.times == [0, 10]
    one.relay.plan[one.address] = UP
    one.run(9250)
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
    assert list(one.reach._racing) == [second]
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
@pytest.mark.parametrize("error", [errno.ENOTSOCK, errno.EPROTOTYPE, errno.EPERM, errno.EINVAL])
def test_other_errors_fail_at_once(world, capfd, target, error):
    one = world(target, plan=error)
    fd = one.come()
    assert one.gone(fd)
    assert one.relay.times == [0]
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"Failed to connect to remote host: {os.strerror(error)} ({target})."
    one.relay.plan[one.address] = UP
    assert one.come() in one.served


def test_eacces_of_a_unix_target_is_retried_for_a_second(world):
    one = world(UNIX, plan=errno.EACCES)
    fd = one.come()
    one.run(999)
    assert fd in one.reach.held
    assert one.relay.times == [0, *SCHEDULE[: SCHEDULE.index(950) + 1]]
    one.run(1200)
    assert one.gone(fd)
    assert one.relay.times[-1] == 1200


def test_eacces_that_passes_in_time(world):
    one = world(UNIX, plan=up_at(400, errno.EACCES))
    fd = one.come()
    one.run(450)
    assert one.served == [fd]


def test_eacces_fails_each_client_after_its_own_second(world):
    one = world(UNIX, plan=errno.EACCES)
    first = one.come()
    one.run(600)
    second = one.come()
    one.run(1590)
    assert one.gone(first)
    assert second in one.reach.held
    one.run(2000)
    assert one.gone(second)
    assert one.reach.failed == 2


def test_eacces_of_a_tcp_target_fails_at_once(world):
    one = world(TCP, plan=errno.EACCES)
    assert one.gone(one.come())


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
    assert one.served == []
    assert list(one.reach.held) == held


def test_drop_all(world):
    one = world(plan=errno.ECONNREFUSED)
    clients = [one.come() for _ in range(3)]
    one.relay.plan[one.address] = LATER
    one.run(10)
    assert one.reach.drop_all() == 3
    assert all(map(one.gone, clients))
    assert one.reach.drop_all() == 0


# ── what the log says ────────────────────────────────────────────────────────────────────────────


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
    assert capfd.readouterr().err == (
        f"Failed to connect to remote host: Connection timed out ({NAME}).\n"
    )


def test_a_target_that_is_our_own_port(world, capfd):
    one = world(plan=errno.ELOOP)
    one.come()
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
    one.names.asked.clear()
    one.relay.attempts.clear()
    fd = one.come()
    assert one.served[-1] == fd
    assert one.relay.attempts == [(0, inet(1), STAGGER_MS)]
    assert one.names.asked == []
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
    assert one.relay.attempts[-1] == (500, inet(2), None)
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
    assert len(capfd.readouterr().err.splitlines()) == 1
    one.names.reply([inet(1, 0)])  # at last: nobody is there any more


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
        st.sampled_from(["come", "come", "go", "change", "answer", "fail"]),
        STATES,
        st.integers(0, 100),
    ),
    max_size=25,
)


@given(STATES, MOMENTS, st.sampled_from([0, 700, None]), st.booleans())
def test_whatever_happens_each_client_is_in_one_place(first, moments, timeout_ms, named):
    """Served, held or closed; those held are probed for; and nothing spins (see run())."""
    addresses = [inet(1), inet(2)]
    if named:
        one = World(
            NAME,
            dict.fromkeys(addresses, first),
            timeout_ms,
            answer=([inet(1, 0), inet(2, 0)], None),
        )
    else:
        one = World(TCP, first, timeout_ms)
        addresses = [one.address]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race, "connected", one.relay.connected)
        patch.setattr(log, "_log", lambda level, text: None)
        for after_ms, what, state, choice in moments:
            one.run(one.now_ms + after_ms)
            address = addresses[choice % len(addresses)]
            held = list(one.reach.held)
            racing = list(one.relay.dialled)
            if what == "come":
                one.come()
            elif what == "go" and held:
                one.loop.handlers[held[choice % len(held)]](EPOLLHUP)
            elif what == "change":
                one.relay.plan[address] = state
            elif what == "answer" and racing:
                fd = racing[choice % len(racing)]
                one.relay.dialled[fd] = {UP: 0, LATER: errno.EINPROGRESS}.get(state, state)
                one.loop.handlers[fd](4)
            one.tick()
            served, held = set(one.served), set(one.reach.held)
            assert served.isdisjoint(held)
            assert all(one.gone(fd) == (fd not in served | held) for fd in one.peers)
            assert set(one.relay.watched) == held
            if held:  # somebody will call us again, or the target must answer
                assert one.reach.next_ms() is not None or one.relay.dialled
            if held and timeout_ms:
                assert one.reach.next_ms() <= one.relay.now_ms + timeout_ms
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
            assert event[0] == FAILED
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

    def ask(self, host, now_ms, done):
        done(self.addresses, None)

    def fresh(self, host, now_ms):
        return True


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


def test_eacces_is_a_unix_matter():
    assert reach.ACCESS_MS == 1000
    assert (reach.PROBE_MS, reach.EAGER_MS, reach.PROBE_SLOWEST_MS) == (10, 150, 250)
