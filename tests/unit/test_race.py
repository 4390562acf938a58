"""The connects to one target: staggered (RFC 8305), repeated where it is silent, bounded."""

import errno
import random
import socket
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import address as sockaddr
from proxyd import limits
from proxyd import race as race_module
from proxyd._relay import connected
from proxyd.loop import Loop
from proxyd.race import LET_GO, MOST, SILENT_MS, SPARE, SPARE_ALL, STAGGER_MS, Race

A, B, C, D = (sockaddr.pack_inet(f"192.0.2.{last}", 80) for last in range(1, 5))
UNIX = sockaddr.pack_unix("/run/backend")
VSOCK = sockaddr.pack_vsock(3, 80)

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
        self.said = {}
        self.closed = []
        self.reset = []
        self.fds = {}

    def dial(self, address):
        self.dialled.append((self.now_ms, address))
        outcome = self.plan[address]
        if isinstance(outcome, AtOnceError):
            raise OSError(outcome.error, "")
        fd = 1000 + len(self.dialled)
        self.states[fd] = outcome
        self.fds.setdefault(address, []).append(fd)
        return fd

    def hang_up(self, fd, reset=False):
        del self.states[fd]
        (self.reset if reset else self.closed).append(fd)

    def connected(self, fd):
        return self.states[fd]

    def peek(self, fd):
        return self.said.get(fd, -errno.EAGAIN)

    @property
    def order(self):
        return [address for _, address in self.dialled]

    def times(self, address):
        return [at_ms for at_ms, one in self.dialled if one == address]


class World:
    """A race over `addresses` and the main loop around it."""

    def __init__(self, monkeypatch, plan, addresses=None, settle_ms=0, loop=None, clients=1):
        self.net = Net(plan)
        monkeypatch.setattr(race_module, "connected", self.net.connected)
        monkeypatch.setattr(race_module, "peek", self.net.peek)
        self.loop = loop or SimpleNamespace(handlers={}, races=[])
        self.loop.relay = self.net
        self.expects_end = False
        self.addresses = list(addresses or plan)
        self.race = Race(self.loop, lambda: self.expects_end)
        self.race.settle_ms = settle_ms
        self.race.watches = settle_ms > 0
        self.race.clients = clients
        self.wanted = 1
        self.won = []

    def begin(self, wanted=1):
        self.wanted = wanted
        self.race.begin(self.addresses, self.net.now_ms)
        return self.step()

    def step(self):
        """What the policy does after every batch; the addresses of the connections made."""
        self.race.step(self.net.now_ms, self.wanted)
        won, self.race.won = self.race.won, []
        for one in won:
            self.net.states.pop(one.fd)
        self.won += won
        return [one.address for one in won]

    def run(self, until_ms):
        """Let time go by, as the main loop would."""
        while self.race.next_ms is not None and self.race.next_ms <= until_ms:
            assert self.race.next_ms > self.net.now_ms, "it spins"
            self.net.now_ms = self.race.next_ms
            self.step()
        self.net.now_ms = until_ms

    def answer(self, address, outcome, at_ms=None, which=-1):
        """A connect ends, and the loop says so."""
        if at_ms is not None:
            self.run(at_ms)
        fd = [fd for fd in self.net.fds[address] if fd in self.net.states][which]
        self.net.states[fd] = outcome
        self.loop.handlers[fd](4)
        return self.step()

    def assert_nothing_left(self):
        assert self.loop.handlers == {}
        assert self.net.states == {}
        assert self.race.under_way == 0
        assert self.race.surplus == 0


@pytest.fixture
def world(monkeypatch):
    def make(*arguments, **keywords):
        return World(monkeypatch, *arguments, **keywords)

    return make


# ── at once ──────────────────────────────────────────────────────────────────────────────────────


def test_a_target_that_is_there_at_once(world):
    one = world({A: OPEN, B: OPEN})
    assert one.begin() == [A]
    assert one.net.order == [A]
    assert one.won[0].proven
    one.assert_nothing_left()


def test_what_fails_at_once_costs_no_time(world):
    one = world({A: AtOnceError(errno.ENETUNREACH), B: AtOnceError(errno.EACCES), C: OPEN})
    assert one.begin() == [C]
    assert one.net.dialled == [(0, A), (0, B), (0, C)]


def test_all_fail_at_once(world):
    one = world({A: AtOnceError(errno.ENETUNREACH), B: AtOnceError(errno.ENETUNREACH)})
    assert one.begin() == []
    assert one.race.over
    assert one.race.error == errno.ENETUNREACH
    one.assert_nothing_left()


def test_a_connect_that_has_failed_when_dial_returns(world):
    one = world({A: errno.ECONNREFUSED, B: OPEN})
    assert one.begin() == [B]
    one.assert_nothing_left()


# ── later ────────────────────────────────────────────────────────────────────────────────────────


def test_connected_later(world):
    one = world({A: PENDING})
    assert one.begin() == []
    assert one.race.next_ms == SILENT_MS
    assert one.answer(A, OPEN, at_ms=70) == [A]
    assert one.won[0].took_ms == 70
    one.assert_nothing_left()


def test_an_event_that_says_nothing_changes_nothing(world):
    one = world({A: PENDING, B: PENDING})
    one.begin()
    assert one.answer(A, PENDING, at_ms=10) == []
    assert one.net.order == [A]
    assert one.race.next_ms == STAGGER_MS


def test_addresses_are_tried_250_ms_apart(world):
    one = world(dict.fromkeys((A, B, C, D), PENDING))
    one.begin()
    one.run(SILENT_MS - 1)
    assert one.net.dialled == [(0, A), (250, B), (500, C), (750, D)]


def test_a_dead_first_address_costs_250_ms(world):
    one = world({A: PENDING, B: PENDING})
    one.begin()
    assert one.answer(B, OPEN, at_ms=250) == [B]
    assert one.net.dialled == [(0, A), (250, B)]
    one.assert_nothing_left()  # A has lost


def test_a_dead_first_address_and_a_second_that_is_there_at_once(world):
    one = world({A: PENDING, B: OPEN})
    one.begin()
    one.run(250)
    assert [won.address for won in one.won] == [B]
    one.assert_nothing_left()


def test_a_failure_starts_the_next_at_once(world):
    one = world(dict.fromkeys((A, B, C), PENDING))
    one.begin()
    one.answer(A, errno.ECONNREFUSED, at_ms=30)
    assert one.net.dialled == [(0, A), (30, B)]
    assert one.race.next_ms == 30 + STAGGER_MS
    assert not one.race.over


def test_the_first_may_still_win(world):
    one = world(dict.fromkeys((A, B), PENDING))
    one.begin()
    assert one.answer(A, OPEN, at_ms=251) == [A]
    one.assert_nothing_left()


def test_the_last_failure_ends_it(world):
    one = world(dict.fromkeys((A, B), PENDING))
    one.begin()
    one.answer(A, errno.ECONNREFUSED, at_ms=5)
    assert not one.race.over
    one.answer(B, errno.EHOSTUNREACH, at_ms=10)
    assert one.race.over
    one.assert_nothing_left()


def test_what_fails_at_once_does_not_use_up_a_turn(world):
    """A dead address before it is no reason to wait before the one after it."""
    one = world({A: PENDING, B: AtOnceError(errno.ENETUNREACH), C: OPEN})
    one.begin()
    one.run(250)
    assert one.net.dialled == [(0, A), (250, B), (250, C)]
    assert [won.address for won in one.won] == [C]


def test_the_address_that_answered_is_tried_first(world):
    one = world({A: PENDING, B: OPEN})
    one.begin()
    one.run(250)
    one.race.end_round()
    assert one.begin() == [B]
    one.race.stop()
    one.begin()
    assert one.net.order[-1] == A


def test_two_that_answer_at_the_same_moment_are_both_of_use(world):
    """A connection that is made is never closed plainly: it would be an empty probe."""
    one = world({A: PENDING, B: PENDING})
    one.begin()
    one.run(250)
    (first,) = one.net.fds[A]
    one.net.states[first] = OPEN
    assert one.answer(B, OPEN, at_ms=260) == [B, A]
    assert one.net.closed == []


# ── a silent host ────────────────────────────────────────────────────────────────────────────────


def test_a_silent_host_gets_another_attempt_every_second(world):
    one = world({A: PENDING})
    one.begin()
    one.run(20_000)
    assert one.net.times(A) == list(range(0, 20_001, SILENT_MS))
    assert one.race.under_way == 1 + SPARE  # the oldest makes way, its SYNs are the rarest
    assert one.net.closed == []


def test_the_first_that_answers_wins_and_another_is_of_use_too(world):
    one = world({A: PENDING}, clients=2)
    one.begin()
    one.run(2500)
    first, second, youngest = one.net.fds[A]
    one.net.states[second] = OPEN
    assert one.answer(A, OPEN) == [A, A]
    assert {won.fd for won in one.won} == {second, youngest}
    assert one.net.reset == [first]  # its SYNs are repeated more and more seldom


def test_an_attempt_that_must_make_way_and_has_just_answered_is_of_use(world):
    one = world({A: PENDING})
    one.begin()
    one.run(3999)
    oldest = one.net.fds[A][0]
    one.net.states[oldest] = OPEN
    one.run(4000)
    assert [won.fd for won in one.won] == [oldest]


def test_what_is_left_over_is_reset(world):
    """An empty probe that ends cleanly would upset a one-shot server."""
    one = world({A: PENDING})
    one.begin()
    one.run(2500)
    one.answer(A, OPEN)
    one.race.stop()
    one.assert_nothing_left()
    assert one.net.closed == []
    assert len(one.net.reset) == 2


def test_a_connection_that_nobody_takes_is_reset(world):
    one = world({A: OPEN})
    one.race.begin([A], 0)
    one.race.step(0, 1)
    assert len(one.race.won) == 1
    one.race.stop()
    assert one.race.won == []
    one.assert_nothing_left()
    assert one.net.closed == []


def test_silent_addresses_are_bounded(world):
    many = [sockaddr.pack_inet(f"192.0.2.{last}", 80) for last in range(1, 31)]
    one = world(dict.fromkeys(many, PENDING), clients=150)
    one.begin()
    most = 0
    for at_ms in range(0, 7501, 50):
        one.run(at_ms)
        most = max(most, len(one.net.states))
    assert most == 1 + SPARE
    assert one.net.order[:30] == many  # and yet each has its turn
    assert one.net.closed == []


def test_those_refused_are_tried_again_while_others_are_silent(world):
    one = world({A: PENDING, B: errno.ECONNREFUSED})
    one.begin()
    one.run(250)
    assert one.race.partial
    assert not one.race.over
    assert one.race.silent_since_ms == 0
    one.net.now_ms = 260
    one.begin()
    assert one.net.times(B) == [250, 260]
    assert one.net.times(A) == [0]
    one.net.plan[B] = OPEN
    one.net.now_ms = 270
    assert one.begin() == [B]


def test_addresses_that_are_no_longer_the_name_s_are_given_up(world):
    one = world({A: PENDING, B: PENDING}, addresses=[A])
    one.begin()
    one.addresses = [B]
    one.begin()
    assert list(one.net.states) == one.net.fds[B]


# ── many at a time ───────────────────────────────────────────────────────────────────────────────


def test_as_many_as_are_wanted(world):
    one = world({A: OPEN}, clients=10)
    assert one.begin(wanted=10) == [A] * 10
    one.assert_nothing_left()


def test_no_more_than_there_may_be(world):
    one = world({A: PENDING}, clients=1000)
    one.begin(wanted=1000)
    assert one.race.under_way == MOST


def test_a_full_backlog_takes_as_many_as_fit(world):
    one = world({UNIX: OPEN}, clients=10)
    room = 3

    def dial(address):
        if len(one.net.dialled) == room:
            raise OSError(errno.EAGAIN, "")
        return Net.dial(one.net, address)

    one.net.dial = dial
    assert one.begin(wanted=10) == [UNIX] * 3
    assert one.race.over
    assert one.race.error == errno.EAGAIN
    assert one.race.congested
    assert one.race.hopeful
    assert one.race.failures == 1


def test_eagain_is_congestion_of_a_unix_target_only(world):
    one = world({A: AtOnceError(errno.EAGAIN)})
    one.begin()
    assert not one.race.congested
    assert one.race.hopeful


def test_attempts_that_nobody_wants_any_more_are_given_up(world):
    one = world({A: PENDING}, clients=20)
    one.begin(wanted=20)
    one.wanted = 1
    one.step()
    assert one.race.under_way == 1 + SPARE


def test_all_targets_share_the_attempts_beyond_their_clients(world):
    """fds are kept for so many (limits.py); each target has its first attempt in any case."""
    loop = SimpleNamespace(handlers={}, races=[])
    many = [world({A: PENDING}, loop=loop) for _ in range(5)]
    net = many[0].net
    for one in many:
        one.net = loop.relay = net
    net.states, net.fds = {}, {}
    race_module.connected = net.connected
    for one in many:
        one.begin()
    for at_ms in range(0, 10_000, 100):
        net.now_ms = at_ms
        for one in many:
            one.step()
        assert len(net.states) <= len(many) + SPARE_ALL
        assert all(one.race.under_way >= 1 for one in many)
    assert len(net.states) == len(many) + SPARE_ALL
    assert limits._ATTEMPTS == SPARE_ALL
    # One without a spare attempt begins anew every second all the same.
    assert len(net.dialled) >= 5 * 9


# ── what a failure is called ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
def test_the_error_after_which_a_retry_may_help_is_kept(world, order):
    errors = [errno.EPROTOTYPE, errno.ECONNREFUSED, errno.EAFNOSUPPORT]
    plan = {address: AtOnceError(errors[at]) for address, at in zip((A, B, C), order, strict=True)}
    one = world(plan)
    one.begin()
    assert one.race.error == errno.ECONNREFUSED
    assert one.race.hopeful


def test_an_error_for_ever(world):
    one = world({A: AtOnceError(errno.EPROTOTYPE)})
    one.begin()
    assert one.race.over
    assert not one.race.hopeful


def test_an_error_before_a_connection_is_forgotten(world):
    one = world({A: errno.ECONNREFUSED, B: OPEN})
    one.begin()
    assert (one.race.error, one.race.failures) == (0, 0)


@pytest.mark.parametrize("address", [A, UNIX])
@pytest.mark.parametrize("error", [errno.ECONNRESET, errno.EPIPE])
def test_a_target_that_has_reset_was_reached(world, address, error):
    one = world({address: PENDING, B: PENDING})
    one.begin()
    assert one.answer(address, error) == [address]
    assert one.won[0].error == error
    assert one.net.order == [address]


@pytest.mark.parametrize("error", [errno.ECONNRESET, errno.EPIPE])
def test_a_reset_refuses_on_vsock(world, error):
    """virtio's word for a port on which nobody listens."""
    one = world({VSOCK: PENDING})
    one.begin()
    assert one.answer(VSOCK, error) == []
    assert one.race.over
    assert one.race.hopeful
    assert one.race.error == error


# ── a connection is watched before anybody gets it ───────────────────────────────────────────────


def test_a_target_that_stays_is_proven(world):
    one = world({A: OPEN}, settle_ms=50)
    assert one.begin() == []
    assert one.race.settling
    assert one.race.next_ms == 50
    one.run(49)
    assert one.won == []
    one.run(50)
    assert [won.address for won in one.won] == [A]
    assert one.won[0].proven
    assert not one.race.watches


def test_a_target_that_speaks_is_proven_at_once(world):
    one = world({A: PENDING}, settle_ms=5000)
    one.begin()
    one.answer(A, OPEN, at_ms=10)
    (fd,) = one.net.fds[A]
    one.net.said[fd] = 1
    one.loop.handlers[fd](1)
    assert one.step() == [A]


@pytest.mark.parametrize("error", [0, errno.ECONNRESET])
def test_a_target_that_lets_go_is_not_there(world, error):
    one = world({A: OPEN, B: AtOnceError(errno.EPROTOTYPE)}, settle_ms=50)
    one.begin()
    (fd,) = one.net.fds[A]
    one.net.said[fd] = -error
    one.loop.handlers[fd](1)
    assert one.step() == []
    assert one.race.over
    assert one.race.hopeful
    assert one.race.error == LET_GO
    one.assert_nothing_left()


def test_a_target_that_has_reset_before_it_was_noticed_is_not_there(world):
    one = world({A: PENDING}, settle_ms=50)
    one.begin()
    assert one.answer(A, errno.ECONNRESET) == []
    assert one.race.error == LET_GO


@pytest.mark.parametrize("error", [0, errno.ECONNRESET])
def test_a_client_that_has_ended_sees_the_target_let_go(world, error):
    one = world({A: OPEN}, settle_ms=50)
    one.begin()
    one.expects_end = True
    (fd,) = one.net.fds[A]
    one.net.said[fd] = -error
    one.loop.handlers[fd](1)
    assert one.step() == [A]
    assert one.won[0].error == error
    assert not one.won[0].proven  # that says nothing about the target
    assert one.race.watches


def test_no_further_attempt_while_one_is_watched(world):
    one = world({A: OPEN, B: OPEN}, settle_ms=5000)
    one.begin()
    one.run(4999)
    assert one.net.order == [A]
    one.run(5000)
    assert len(one.won) == 1


def test_one_that_is_watched_is_reset_where_nobody_is_left(world):
    one = world({A: OPEN}, settle_ms=50)
    one.begin()
    one.race.stop()
    one.assert_nothing_left()
    assert one.net.closed == []


# ── whatever happens ─────────────────────────────────────────────────────────────────────────────

OUTCOMES = st.one_of(
    st.just(PENDING),
    st.just(OPEN),
    st.sampled_from([errno.ECONNREFUSED, errno.EPERM, errno.ECONNRESET]),
    st.sampled_from([errno.ENETUNREACH, errno.EACCES]).map(AtOnceError),
)


@given(
    st.lists(OUTCOMES, min_size=1, max_size=6),
    st.lists(st.sampled_from([OPEN, errno.ECONNREFUSED, errno.EPERM, PENDING]), max_size=12),
    st.integers(1, 5),
    st.sampled_from([0, 0, 700]),
    st.randoms(use_true_random=False),
)
def test_any_race_stays_in_its_bounds_and_leaves_nothing(
    outcomes, answers, wanted, settle_ms, chance: random.Random
):
    addresses = [sockaddr.pack_inet(f"192.0.2.{at}", 80) for at in range(len(outcomes))]
    with pytest.MonkeyPatch.context() as patch:
        one = World(patch, dict(zip(addresses, outcomes, strict=True)), settle_ms=settle_ms)
        one.race.clients = wanted
        one.begin(wanted)
        for answer in answers:
            assert len(one.net.states) <= wanted + SPARE
            assert set(one.loop.handlers) == set(one.net.states)
            if not one.net.states:
                assert one.race.over or not one.race.tried or one.won
                one.race.end_round()
                one.begin(wanted)
            elif chance.random() < 0.5 and one.race.next_ms is not None:
                one.run(one.race.next_ms)
            else:
                fd = chance.choice(list(one.net.states))
                if one.race._attempts[fd].settled_ms is None:
                    one.net.states[fd] = answer
                one.loop.handlers[fd](4)
                one.step()
        assert one.net.order[0] == addresses[0]
        one.race.stop()
        one.assert_nothing_left()
        assert one.net.closed == []


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
        one = Race(loop, lambda: False)
        one.clients = 1
        one.begin([bad, good], loop.relay.now_ms)
        one.step(loop.relay.now_ms, 1)
        while not one.won:
            assert loop.run(20_000) == []
            one.step(loop.relay.now_ms, 1)
        (won,) = one.won
        assert won.address == good
        assert connected(won.fd) == 0
        client, _ = listens.accept()
        client.settimeout(20)
        one.stop()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        client.close()
        assert loop.handlers == {}


def test_real_sockets_that_all_refuse():
    loop = Loop()
    (one, first), (other, second) = bound(False), bound(False)
    with one, other:
        race = Race(loop, lambda: False)
        race.begin([first, second], loop.relay.now_ms)
        race.step(loop.relay.now_ms, 1)
        while not race.over:
            loop.run(20_000)
            race.step(loop.relay.now_ms, 1)
        assert race.won == []
        assert race.error == errno.ECONNREFUSED
        assert loop.handlers == {}


def watching_race(loop, address):
    """A race that has begun, and watches whether a target that has accepted stays."""
    race = Race(loop, lambda: False)
    race.settle_ms, race.watches = 20_000, True
    race.begin([address], loop.relay.now_ms)
    race.step(loop.relay.now_ms, 1)
    return race


def test_a_real_target_that_speaks_while_it_is_watched():
    loop = Loop()
    listens, good = bound(True)
    with listens:
        one = watching_race(loop, good)
        client, _ = listens.accept()
        with client:
            client.sendall(b"hello")
            while not one.won:
                loop.run(20_000)
            assert one.won[0].proven
            one.stop()


@pytest.mark.parametrize("linger", [False, True])
def test_a_real_target_that_lets_go_while_it_is_watched(linger):
    loop = Loop()
    listens, good = bound(True)
    with listens:
        one = watching_race(loop, good)
        client, _ = listens.accept()
        if linger:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        while not one.over:
            loop.run(20_000)
        assert one.error == LET_GO
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
