"""Several addresses: the connects staggered, one winner, and nothing left open (RFC 8305)."""

import errno
import random
import socket
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import address as sockaddr
from proxyd import race as race_module
from proxyd._relay import connected
from proxyd.loop import Loop
from proxyd.race import RETRYABLE, STAGGER_MS, Race

A, B, C, D = (sockaddr.pack_inet(f"192.0.2.{last}", 80) for last in range(1, 5))

PENDING = errno.EINPROGRESS
OPEN = 0


class AtOnceError:
    """An outcome of dial(): it raises."""

    def __init__(self, error):
        self.error = error


class Net:
    """A relay whose sockets do what `plan` says, by address: AtOnceError, or what connected()
    answers. fds are never given twice."""

    def __init__(self, plan):
        self.plan = dict(plan)
        self.now_ms = 0
        self.dialled = []
        self.states = {}
        self.closed = []
        self.fds = {}

    def dial(self, address):
        self.dialled.append((self.now_ms, address))
        outcome = self.plan[address]
        if isinstance(outcome, AtOnceError):
            raise OSError(outcome.error, "")
        fd = 1000 + len(self.dialled)
        self.states[fd] = outcome
        self.fds[address] = fd
        return fd

    def hang_up(self, fd, reset=False):
        del self.states[fd]
        self.closed.append(fd)

    def connected(self, fd):
        return self.states[fd]

    @property
    def order(self):
        return [address for _, address in self.dialled]


class World:
    """A race over `addresses` and what surrounds it."""

    def __init__(self, monkeypatch, plan, addresses=None):
        self.net = Net(plan)
        if monkeypatch is not None:
            monkeypatch.setattr(race_module, "connected", self.net.connected)
        self.loop = SimpleNamespace(relay=self.net, handlers={})
        self.ended = 0
        self.race = Race(self.loop, list(addresses or plan), self._ended)

    def _ended(self):
        self.ended += 1

    def start(self):
        return self.race.start(self.net.now_ms)

    def step(self):
        """Let the time come that the race waits for."""
        assert self.race.next_ms is not None
        self.net.now_ms = self.race.next_ms
        self.race.step(self.net.now_ms)

    def answer(self, address, outcome, at_ms=None):
        """A connect ends, and the loop says so."""
        if at_ms is not None:
            self.net.now_ms = at_ms
        fd = self.net.fds[address]
        self.net.states[fd] = outcome
        self.loop.handlers[fd](4)

    def assert_over(self, winner=None):
        """Nothing but the winner's socket is left, and nothing will call us again."""
        race, net = self.race, self.net
        assert race.next_ms is None
        assert self.loop.handlers == {}
        if winner is None:
            assert race.fd == -1
            assert net.states == {}
        else:
            assert race.fd == net.fds[winner]
            assert race.address == winner
            assert list(net.states) == [race.fd]


@pytest.fixture
def world(monkeypatch):
    return lambda plan, addresses=None: World(monkeypatch, plan, addresses)


# ── at once ──────────────────────────────────────────────────────────────────────────────────────


def test_a_target_that_is_there_at_once(world):
    one = world({A: OPEN, B: OPEN})
    assert one.start()
    assert one.net.order == [A]
    one.assert_over(winner=A)
    assert one.ended == 0  # start() has said so


def test_what_fails_at_once_costs_no_time(world):
    one = world({A: AtOnceError(errno.ENETUNREACH), B: AtOnceError(errno.EACCES), C: OPEN})
    assert one.start()
    assert one.net.dialled == [(0, A), (0, B), (0, C)]
    one.assert_over(winner=C)


def test_all_fail_at_once(world):
    one = world({A: AtOnceError(errno.ENETUNREACH), B: AtOnceError(errno.ENETUNREACH)})
    assert one.start()
    one.assert_over()
    assert one.race.error == errno.ENETUNREACH
    assert one.ended == 0


def test_a_connect_that_has_failed_when_dial_returns(world):
    one = world({A: errno.ECONNREFUSED, B: OPEN})
    assert one.start()
    one.assert_over(winner=B)
    assert len(one.net.closed) == 1


# ── later ────────────────────────────────────────────────────────────────────────────────────────


def test_connected_later(world):
    one = world({A: PENDING})
    assert not one.start()
    assert one.race.next_ms is None
    one.answer(A, OPEN, at_ms=70)
    assert one.ended == 1
    one.assert_over(winner=A)


def test_an_event_that_says_nothing_changes_nothing(world):
    one = world({A: PENDING, B: PENDING})
    one.start()
    one.answer(A, PENDING, at_ms=10)
    assert one.net.order == [A]
    assert one.ended == 0
    assert one.race.next_ms == STAGGER_MS


def test_a_dead_first_address_costs_250_ms(world):
    one = world({A: PENDING, B: PENDING})
    assert not one.start()
    assert one.race.next_ms == 250
    one.step()
    assert one.net.dialled == [(0, A), (250, B)]
    assert one.race.next_ms is None  # there is nobody else to try
    one.answer(B, OPEN, at_ms=260)
    assert one.ended == 1
    one.assert_over(winner=B)
    assert one.net.closed == [one.net.fds[A]]


def test_a_dead_first_address_and_a_second_that_is_there_at_once(world):
    one = world({A: PENDING, B: OPEN})
    one.start()
    one.step()
    assert one.ended == 1
    one.assert_over(winner=B)


def test_addresses_are_tried_250_ms_apart(world):
    one = world(dict.fromkeys((A, B, C, D), PENDING))
    one.start()
    while one.race.next_ms is not None:
        one.step()
    assert one.net.dialled == [(0, A), (250, B), (500, C), (750, D)]
    assert one.ended == 0


def test_a_failure_starts_the_next_at_once(world):
    one = world(dict.fromkeys((A, B, C), PENDING))
    one.start()
    one.answer(A, errno.ECONNREFUSED, at_ms=30)
    assert one.net.dialled == [(0, A), (30, B)]
    assert one.race.next_ms == 30 + STAGGER_MS
    assert one.ended == 0


def test_the_first_may_still_win(world):
    one = world(dict.fromkeys((A, B), PENDING))
    one.start()
    one.step()
    one.answer(A, OPEN, at_ms=251)
    assert one.ended == 1
    one.assert_over(winner=A)
    assert one.net.closed == [one.net.fds[B]]


def test_the_last_failure_ends_it(world):
    one = world(dict.fromkeys((A, B), PENDING))
    one.start()
    one.answer(A, errno.ECONNREFUSED, at_ms=5)
    assert one.ended == 0
    one.answer(B, errno.EHOSTUNREACH, at_ms=10)
    assert one.ended == 1
    one.assert_over()


def test_a_failure_while_another_is_under_way_is_not_the_end(world):
    one = world(dict.fromkeys((A, B), PENDING))
    one.start()
    one.step()
    one.answer(A, errno.ETIMEDOUT, at_ms=300)
    assert one.ended == 0
    one.answer(B, OPEN, at_ms=310)
    one.assert_over(winner=B)


def test_the_rest_fails_at_once_after_a_failure(world):
    one = world({A: PENDING, B: AtOnceError(errno.ENETUNREACH), C: errno.ECONNREFUSED})
    one.start()
    one.answer(A, errno.ECONNREFUSED, at_ms=20)
    assert one.ended == 1
    one.assert_over()


def test_what_fails_at_once_does_not_use_up_a_turn(world):
    """A dead address before it is no reason to wait before the one after it."""
    one = world({A: PENDING, B: AtOnceError(errno.ENETUNREACH), C: OPEN})
    one.start()
    one.step()
    assert one.net.dialled == [(0, A), (250, B), (250, C)]
    one.assert_over(winner=C)


def test_nobody_is_waited_for_when_the_rest_has_failed_at_once(world):
    one = world({A: PENDING, B: AtOnceError(errno.ENETUNREACH)})
    one.start()
    one.step()
    assert one.race.next_ms is None
    assert one.ended == 0
    one.answer(A, OPEN, at_ms=400)
    one.assert_over(winner=A)


# ── what a failure is called ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
def test_the_error_after_which_a_retry_may_help_is_kept(world, order):
    errors = [errno.EPERM, errno.ECONNREFUSED, errno.EAFNOSUPPORT]
    plan = {address: AtOnceError(errors[at]) for address, at in zip((A, B, C), order, strict=True)}
    one = world(plan)
    assert one.start()
    assert one.race.error == errno.ECONNREFUSED


@pytest.mark.parametrize("error", [errno.ECONNRESET, errno.EPIPE])
def test_a_target_that_has_reset_was_reached(world, error):
    one = world({A: PENDING, B: PENDING})
    one.start()
    one.answer(A, error)
    one.assert_over(winner=A)
    assert one.net.order == [A]


@pytest.mark.parametrize(
    "error",
    [
        errno.ECONNREFUSED,
        errno.ENOENT,
        errno.EAGAIN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
        errno.EADDRNOTAVAIL,
        errno.ELOOP,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
    ],
)
def test_errors_that_pass(error):
    assert error in RETRYABLE


@pytest.mark.parametrize(
    "error",
    [errno.ENOTSOCK, errno.EPROTOTYPE, errno.EACCES, errno.EPERM, errno.ECONNRESET, errno.EINVAL],
)
def test_errors_that_do_not_pass(error):
    assert error not in RETRYABLE


# ── cancelled ────────────────────────────────────────────────────────────────────────────────────


def test_cancel_closes_what_is_under_way(world):
    one = world(dict.fromkeys((A, B, C), PENDING))
    one.start()
    one.step()
    one.race.cancel()
    one.assert_over()
    assert one.ended == 0
    assert one.net.order == [A, B]


def test_cancel_closes_a_winner(world):
    one = world({A: OPEN})
    one.start()
    one.race.cancel()
    one.assert_over()


def test_cancel_twice(world):
    one = world({A: OPEN})
    one.start()
    one.race.cancel()
    one.race.cancel()
    assert len(one.net.closed) == 1


# ── whatever happens ─────────────────────────────────────────────────────────────────────────────

OUTCOMES = st.one_of(
    st.just(PENDING),
    st.just(OPEN),
    st.sampled_from([errno.ECONNREFUSED, errno.EPERM]),
    st.sampled_from([errno.ENETUNREACH, errno.EACCES]).map(AtOnceError),
)


@given(
    st.lists(OUTCOMES, min_size=1, max_size=6),
    st.lists(st.sampled_from([OPEN, errno.ECONNREFUSED, errno.EPERM, PENDING]), max_size=12),
    st.randoms(use_true_random=False),
)
def test_any_race_ends_once_and_leaves_nothing(outcomes, answers, chance: random.Random):
    addresses = [sockaddr.pack_inet(f"192.0.2.{at}", 80) for at in range(len(outcomes))]
    with pytest.MonkeyPatch.context() as patch:
        one = World(patch, dict(zip(addresses, outcomes, strict=True)))
        over = one.start()
        while not over and one.ended == 0:
            assert one.net.states  # otherwise nobody would ever call us again
            pending = [a for a, fd in one.net.fds.items() if fd in one.net.states]
            if one.race.next_ms is not None and (not answers or chance.random() < 0.5):
                one.step()
            elif answers:
                one.answer(chance.choice(pending), answers.pop())
            else:
                one.answer(chance.choice(pending), errno.ETIMEDOUT)
        assert one.ended == (0 if over else 1)
        winner = one.race.address if one.race.fd >= 0 else None
        one.assert_over(winner)
        # Addresses are tried in their order, each once; without a winner, all of them.
        assert one.net.order == addresses[: len(one.net.order)]
        if winner is None:
            assert one.net.order == addresses
            assert one.race.error != 0


# ── real sockets ─────────────────────────────────────────────────────────────────────────────────


def bound(listens):
    """A TCP socket on loopback and its packed address; without `listens` it refuses."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    if listens:
        sock.listen()
    return sock, sockaddr.pack_inet(*sock.getsockname())


def test_real_sockets():
    loop = Loop()
    (refuses, bad), (listens, good) = bound(False), bound(True)
    with refuses, listens:
        ended = []
        one = Race(loop, [bad, good], lambda: ended.append(1))
        over = one.start(loop.relay.now_ms)
        while not (over or ended):
            assert loop.run(20_000) == []
            assert one.next_ms is None or one.fd >= 0 or loop.handlers
        assert one.address == good
        assert connected(one.fd) == 0
        client, _ = listens.accept()
        client.settimeout(20)
        one.cancel()
        assert client.recv(1) == b""
        client.close()
        assert loop.handlers == {}


def test_real_sockets_that_all_refuse():
    loop = Loop()
    (one, first), (other, second) = bound(False), bound(False)
    with one, other:
        ended = []
        race = Race(loop, [first, second], lambda: ended.append(1))
        over = race.start(loop.relay.now_ms)
        while not (over or ended):
            loop.run(20_000)
        assert race.fd == -1
        assert race.error == errno.ECONNREFUSED
        assert loop.handlers == {}


def test_a_real_socket_that_was_connected_to_itself():
    """Of a connect to a free ephemeral port: Linux may give the socket that very port."""
    loop = Loop()
    sock, address = bound(False)
    with sock:
        sock.connect(sock.getsockname())
        assert connected(sock.fileno()) == errno.ELOOP
    assert loop.handlers == {}
    assert address
