"""The attempts to one target: staggered (RFC 8305), repeated where it is silent, bounded."""

import contextlib
import errno
import random
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.fake_relay import LATER, UP, Answers, FakeRelay
from kit.sockets import reset

from proxyd import address as sockaddr
from proxyd._relay import connected
from proxyd.connect_errors import CLOSED_EARLY
from proxyd.event_loop import EventLoop
from proxyd.happy_eyeballs import ATTEMPTS_MAX, SILENT_MS, SPARE, STAGGER_MS, HappyEyeballs
from proxyd.limits import SPARE_ATTEMPTS

A, B, C, D = (sockaddr.pack_inet(f"192.0.2.{last}", 80) for last in range(1, 5))
UNIX = sockaddr.pack_unix("/run/backend")
VSOCK = sockaddr.pack_vsock(3, 80)


class World:
    """Attempts at `addresses`, and the main loop around them."""

    def __init__(self, monkeypatch, plan, addresses=None, settle_ms=0, loop=None, clients=1):
        self.loop = loop or EventLoop()
        if loop is None:
            self.loop.relay = FakeRelay(plan)
        self.relay = self.loop.relay
        self.relay.replace_functions(monkeypatch)
        self.expects_end = False
        self.addresses = list(addresses or plan)
        self.attempts = HappyEyeballs(self.loop, lambda: self.expects_end, repeats=True)
        self.attempts.settle_ms = settle_ms
        self.attempts.must_settle = settle_ms > 0
        self.clients = clients
        self.wanted = 1
        self.winners = []

    def begin(self, wanted=1):
        self.wanted = wanted
        self.attempts.begin(self.addresses, self.relay.now_ms)
        return self.step()

    def step(self):
        """What the policy does after every batch; the addresses of the connections made."""
        self.attempts.step(self.relay.now_ms, self.wanted, self.clients)
        new = []
        while (winner := self.attempts.take_winner()) is not None:
            del self.relay.dialled[winner.fd]
            new.append(winner)
        self.winners += new
        return [winner.address for winner in new]

    def run(self, until_ms):
        """Let time pass, as the main loop would."""
        while self.attempts.next_ms is not None and self.attempts.next_ms <= until_ms:
            assert self.attempts.next_ms > self.relay.now_ms, "it spins"
            self.relay.now_ms = self.attempts.next_ms
            self.step()
        self.relay.now_ms = until_ms

    def ready(self, fd, events=4):
        """An event for a socket."""
        self.relay.ready(fd, events)
        self.loop.run(0)

    def answer(self, address, outcome, at_ms=None, which=-1):
        """A connect ends, and the loop reports it."""
        if at_ms is not None:
            self.run(at_ms)
        fd = self.relay.pending(address)[which]
        self.relay.dialled[fd] = outcome
        self.ready(fd)
        return self.step()

    def assert_nothing_left(self):
        assert self.loop._handlers == {}
        assert self.relay.dialled == {}
        assert self.attempts.pending == 0
        assert self.attempts.surplus() == 0


@pytest.fixture
def world(monkeypatch):
    def make(*arguments, **keywords):
        return World(monkeypatch, *arguments, **keywords)

    return make


# ── at once ───────────────────────────────────────────────────────────────────────────────────────


def test_a_target_that_answers_at_once(world):
    one = world({A: UP, B: UP})
    assert one.begin() == [A]
    assert one.relay.order == [A]
    assert one.winners[0].proven
    one.assert_nothing_left()


def test_attempts_that_fail_at_once_cost_no_time(world):
    one = world({A: errno.ENETUNREACH, B: errno.EACCES, C: UP})
    assert one.begin() == [C]
    assert one.relay.dials == [(0, A), (0, B), (0, C)]


def test_all_attempts_fail_at_once(world):
    one = world({A: errno.ENETUNREACH, B: errno.ENETUNREACH})
    assert one.begin() == []
    assert one.attempts.over
    assert one.attempts.error == errno.ENETUNREACH
    one.assert_nothing_left()


def test_a_connect_that_has_failed_when_dial_returns(world):
    one = world({A: Answers(errno.ECONNREFUSED), B: UP})
    assert one.begin() == [B]
    one.assert_nothing_left()


# ── later ─────────────────────────────────────────────────────────────────────────────────────────


def test_connected_later(world):
    one = world({A: LATER})
    assert one.begin() == []
    assert one.attempts.next_ms == SILENT_MS
    assert one.answer(A, UP, at_ms=70) == [A]
    assert one.winners[0].took_ms == 70
    one.assert_nothing_left()


def test_an_event_while_still_connecting_changes_nothing(world):
    one = world({A: LATER, B: LATER})
    one.begin()
    assert one.answer(A, LATER, at_ms=10) == []
    assert one.relay.order == [A]
    assert one.attempts.next_ms == STAGGER_MS


def test_addresses_are_tried_250_ms_apart(world):
    one = world(dict.fromkeys((A, B, C, D), LATER))
    one.begin()
    one.run(SILENT_MS - 1)
    assert one.relay.dials == [(0, A), (250, B), (500, C), (750, D)]


def test_a_dead_first_address_costs_250_ms(world):
    one = world({A: LATER, B: LATER})
    one.begin()
    assert one.answer(B, UP, at_ms=250) == [B]
    assert one.relay.dials == [(0, A), (250, B)]
    one.assert_nothing_left()  # A has lost


def test_a_dead_first_address_and_a_second_that_answers_at_once(world):
    one = world({A: LATER, B: UP})
    one.begin()
    one.run(250)
    assert [won.address for won in one.winners] == [B]
    one.assert_nothing_left()


def test_a_failure_starts_the_next_at_once(world):
    one = world(dict.fromkeys((A, B, C), LATER))
    one.begin()
    one.answer(A, errno.ECONNREFUSED, at_ms=30)
    assert one.relay.dials == [(0, A), (30, B)]
    assert one.attempts.next_ms == 30 + STAGGER_MS
    assert not one.attempts.over


def test_the_first_attempt_may_still_win(world):
    one = world(dict.fromkeys((A, B), LATER))
    one.begin()
    assert one.answer(A, UP, at_ms=251) == [A]
    one.assert_nothing_left()


def test_the_last_failure_ends_the_round(world):
    one = world(dict.fromkeys((A, B), LATER))
    one.begin()
    one.answer(A, errno.ECONNREFUSED, at_ms=5)
    assert not one.attempts.over
    one.answer(B, errno.EHOSTUNREACH, at_ms=10)
    assert one.attempts.over
    one.assert_nothing_left()


def test_an_address_that_fails_at_once_does_not_delay_the_next(world):
    """Only an attempt that is pending makes the next address wait."""
    one = world({A: LATER, B: errno.ENETUNREACH, C: UP})
    one.begin()
    one.run(250)
    assert one.relay.dials == [(0, A), (250, B), (250, C)]
    assert [won.address for won in one.winners] == [C]


def test_the_address_that_answered_is_tried_first(world):
    one = world({A: LATER, B: UP})
    one.begin()
    one.run(250)
    one.attempts.end_round()
    assert one.begin() == [B]
    one.attempts.stop()
    one.begin()
    assert one.relay.order[-1] == A


def test_two_that_answer_at_the_same_moment_are_both_used(world):
    """A connection that is made is never closed plainly: it would be an empty probe."""
    one = world({A: LATER, B: LATER})
    one.begin()
    one.run(250)
    (first,) = one.relay.fds[A]
    one.relay.dialled[first] = UP
    assert one.answer(B, UP, at_ms=260) == [B, A]
    assert one.relay.closes == []


# ── a silent host ─────────────────────────────────────────────────────────────────────────────────


def test_a_silent_host_gets_another_attempt_every_second(world):
    one = world({A: LATER})
    one.begin()
    one.run(20_000)
    assert one.relay.times_of(A) == list(range(0, 20_001, SILENT_MS))
    assert one.attempts.pending == 1 + SPARE  # the oldest makes way, as its SYNs are the rarest
    assert one.relay.closes == []


def test_the_first_attempt_that_succeeds_wins_and_another_is_used_too(world):
    one = world({A: LATER}, clients=2)
    one.begin()
    one.run(2500)
    first, second, youngest = one.relay.fds[A]
    one.relay.dialled[second] = UP
    assert one.answer(A, UP) == [A, A]
    assert {won.fd for won in one.winners} == {second, youngest}
    assert one.relay.resets == [first]  # its SYNs are repeated less and less often


def test_an_attempt_that_must_give_way_and_has_just_answered_is_used(world):
    one = world({A: LATER})
    one.begin()
    one.run(3999)
    oldest = one.relay.fds[A][0]
    one.relay.dialled[oldest] = UP
    one.run(4000)
    assert [won.fd for won in one.winners] == [oldest]


def test_attempts_left_over_are_reset(world):
    """An empty probe that ends cleanly would upset a one-shot server."""
    one = world({A: LATER})
    one.begin()
    one.run(2500)
    one.answer(A, UP)
    one.attempts.stop()
    one.assert_nothing_left()
    assert one.relay.closes == []
    assert len(one.relay.resets) == 2


def test_a_connection_that_is_not_taken_is_reset(world):
    one = world({A: UP})
    one.attempts.begin([A], 0)
    one.attempts.step(0, 1, 1)
    assert len(one.attempts._winners) == 1
    one.attempts.stop()
    assert one.attempts._winners == []
    one.assert_nothing_left()
    assert one.relay.closes == []


def test_attempts_at_silent_addresses_are_bounded(world):
    many = [sockaddr.pack_inet(f"192.0.2.{last}", 80) for last in range(1, 31)]
    one = world(dict.fromkeys(many, LATER), clients=150)
    one.begin()
    highest = 0
    for at_ms in range(0, 7501, 50):
        one.run(at_ms)
        highest = max(highest, len(one.relay.dialled))
    assert highest == 1 + SPARE
    assert one.relay.order[:30] == many  # each has its turn all the same
    assert one.relay.closes == []


def test_addresses_that_refuse_are_tried_again_while_others_are_silent(world):
    one = world({A: LATER, B: Answers(errno.ECONNREFUSED)})
    one.begin()
    one.run(250)
    assert one.attempts.partly_failed
    assert not one.attempts.over
    assert one.attempts.silent_since_ms == 0
    one.relay.now_ms = 260
    one.begin()
    assert one.relay.times_of(B) == [250, 260]
    assert one.relay.times_of(A) == [0]
    one.relay.plan[B] = UP
    one.relay.now_ms = 270
    assert one.begin() == [B]


def test_addresses_that_the_name_no_longer_has_are_given_up(world):
    one = world({A: LATER, B: LATER}, addresses=[A])
    one.begin()
    one.addresses = [B]
    one.begin()
    assert list(one.relay.dialled) == one.relay.fds[B]


# ── many at a time ────────────────────────────────────────────────────────────────────────────────


def test_as_many_connections_as_are_wanted(world):
    one = world({A: UP}, clients=10)
    assert one.begin(wanted=10) == [A] * 10
    one.assert_nothing_left()


def test_no_more_attempts_than_the_maximum(world):
    one = world({A: LATER}, clients=1000)
    one.begin(wanted=1000)
    assert one.attempts.pending == ATTEMPTS_MAX


def test_a_full_backlog_takes_as_many_as_fit(world):
    one = world({UNIX: UP}, clients=10)
    room = 3

    def dial(address, client):
        if len(one.relay.dials) == room:
            raise OSError(errno.EAGAIN, "")
        return FakeRelay.dial(one.relay, address, client)

    one.relay.dial = dial
    assert one.begin(wanted=10) == [UNIX] * 3
    assert one.attempts.over
    assert one.attempts.error == errno.EAGAIN
    assert one.attempts.congested
    assert one.attempts.temporary
    assert one.attempts.failures == 1


def test_eagain_is_congestion_of_a_unix_target_only(world):
    one = world({A: errno.EAGAIN})
    one.begin()
    assert not one.attempts.congested
    assert one.attempts.temporary


def test_attempts_that_are_not_wanted_any_more_are_given_up(world):
    one = world({A: LATER}, clients=20)
    one.begin(wanted=20)
    one.wanted = 1
    one.step()
    assert one.attempts.pending == 1 + SPARE


def test_all_targets_share_the_attempts_beyond_their_clients(world):
    """The first attempt of each target does not count."""
    one = world({A: LATER})
    many = [one] + [world({A: LATER}, loop=one.loop) for _ in range(4)]
    for one in many:
        one.begin()
    for at_ms in range(0, 10_000, 100):
        one.relay.now_ms = at_ms
        for one in many:
            one.step()
        assert len(one.relay.dialled) <= len(many) + SPARE_ATTEMPTS
        assert all(one.attempts.pending >= 1 for one in many)
    assert len(one.relay.dialled) == len(many) + SPARE_ATTEMPTS
    # A target without a spare attempt begins anew every second all the same.
    assert len(one.relay.dials) >= 5 * 9
    for one in many:
        one.attempts.retire()
    assert not one.loop.budget._surpluses


# ── which error is reported ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
def test_a_temporary_error_is_kept_rather_than_a_permanent_one(world, order):
    errors = [errno.EPROTOTYPE, errno.ECONNREFUSED, errno.EAFNOSUPPORT]
    plan = {address: errors[at] for address, at in zip((A, B, C), order, strict=True)}
    one = world(plan)
    one.begin()
    assert one.attempts.error == errno.ECONNREFUSED
    assert one.attempts.temporary


def test_a_permanent_error(world):
    one = world({A: errno.EPROTOTYPE})
    one.begin()
    assert one.attempts.over
    assert not one.attempts.temporary


def test_an_error_before_a_connection_is_forgotten(world):
    one = world({A: Answers(errno.ECONNREFUSED), B: UP})
    one.begin()
    assert (one.attempts.error, one.attempts.failures) == (0, 0)


@pytest.mark.parametrize("address", [A, UNIX])
@pytest.mark.parametrize("error", [errno.ECONNRESET, errno.EPIPE])
def test_a_target_that_has_reset_was_reached(world, address, error):
    one = world({address: LATER, B: LATER})
    one.begin()
    assert one.answer(address, error) == [address]
    assert one.winners[0].error == error
    assert one.relay.order == [address]


@pytest.mark.parametrize("error", [errno.ECONNRESET, errno.EPIPE])
def test_a_reset_refuses_on_vsock(world, error):
    """That is how virtio reports a port without a listener."""
    one = world({VSOCK: LATER})
    one.begin()
    assert one.answer(VSOCK, error) == []
    assert one.attempts.over
    assert one.attempts.temporary
    assert one.attempts.error == error


# ── a connection is watched before a client gets it ───────────────────────────────────────────────


def test_a_target_that_stays_is_proven(world):
    one = world({A: UP}, settle_ms=50)
    assert one.begin() == []
    assert one.attempts.settling
    assert one.attempts.next_ms == 50
    one.run(49)
    assert one.winners == []
    one.run(50)
    assert [won.address for won in one.winners] == [A]
    assert one.winners[0].proven
    assert not one.attempts.must_settle


def test_a_target_that_sends_something_is_proven_at_once(world):
    one = world({A: LATER}, settle_ms=5000)
    one.begin()
    one.answer(A, UP, at_ms=10)
    (fd,) = one.relay.fds[A]
    one.relay.received[fd] = 1
    one.ready(fd, 1)
    assert one.step() == [A]


@pytest.mark.parametrize("error", [0, errno.ECONNRESET])
def test_a_target_that_closes_early_has_failed(world, error):
    one = world({A: UP, B: errno.EPROTOTYPE}, settle_ms=50)
    one.begin()
    (fd,) = one.relay.fds[A]
    one.relay.received[fd] = -error
    one.ready(fd, 1)
    assert one.step() == []
    assert one.attempts.over
    assert one.attempts.temporary
    assert one.attempts.error == CLOSED_EARLY
    one.assert_nothing_left()


def test_a_target_that_has_reset_before_it_was_noticed_has_failed(world):
    one = world({A: LATER}, settle_ms=50)
    one.begin()
    assert one.answer(A, errno.ECONNRESET) == []
    assert one.attempts.error == CLOSED_EARLY


@pytest.mark.parametrize("error", [0, errno.ECONNRESET])
def test_a_client_that_has_ended_sees_the_target_close(world, error):
    one = world({A: UP}, settle_ms=50)
    one.begin()
    one.expects_end = True
    (fd,) = one.relay.fds[A]
    one.relay.received[fd] = -error
    one.ready(fd, 1)
    assert one.step() == [A]
    assert one.winners[0].error == error
    assert not one.winners[0].proven  # that says nothing about the target
    assert one.attempts.must_settle


def test_no_further_attempt_while_one_is_watched(world):
    one = world({A: UP, B: UP}, settle_ms=5000)
    one.begin()
    one.run(4999)
    assert one.relay.order == [A]
    one.run(5000)
    assert len(one.winners) == 1


def test_one_that_settles_is_reset_if_no_client_is_left(world):
    one = world({A: UP}, settle_ms=50)
    one.begin()
    one.attempts.stop()
    one.assert_nothing_left()
    assert one.relay.closes == []


# ── whatever happens ──────────────────────────────────────────────────────────────────────────────

OUTCOMES = st.one_of(
    st.just(LATER),
    st.just(UP),
    st.sampled_from([errno.ECONNREFUSED, errno.EPERM, errno.ECONNRESET]).map(Answers),
    st.sampled_from([errno.ENETUNREACH, errno.EACCES]),
)


@given(
    st.lists(OUTCOMES, min_size=1, max_size=6),
    st.lists(st.sampled_from([UP, errno.ECONNREFUSED, errno.EPERM, LATER]), max_size=12),
    st.integers(1, 5),
    st.sampled_from([0, 0, 700]),
    st.randoms(use_true_random=False),
)
def test_attempts_stay_in_their_bounds_and_leave_nothing(
    outcomes, answers, wanted, settle_ms, chance: random.Random
):
    addresses = [sockaddr.pack_inet(f"192.0.2.{at}", 80) for at in range(len(outcomes))]
    with pytest.MonkeyPatch.context() as patch:
        one = World(patch, dict(zip(addresses, outcomes, strict=True)), settle_ms=settle_ms)
        one.clients = wanted
        one.begin(wanted)
        for answer in answers:
            assert len(one.relay.dialled) <= wanted + SPARE
            assert set(one.loop._handlers) == set(one.relay.dialled)
            if not one.relay.dialled:
                assert one.attempts.over or not one.attempts.tried or one.winners
                one.attempts.end_round()
                one.begin(wanted)
            elif chance.random() < 0.5 and one.attempts.next_ms is not None:
                one.run(one.attempts.next_ms)
            else:
                fd = chance.choice(list(one.relay.dialled))
                if one.attempts._attempts[fd].settled_ms is None:
                    one.relay.dialled[fd] = answer
                one.ready(fd, 4)
                one.step()
        assert one.relay.order[0] == addresses[0]
        one.attempts.stop()
        one.assert_nothing_left()
        assert one.relay.closes == []


# ── real sockets ──────────────────────────────────────────────────────────────────────────────────


def test_the_first_real_target_that_listens_is_connected():
    loop = EventLoop()
    with real_target(listens=False) as (_, bad), real_target() as (listener, good):
        attempts = real_attempts(loop, bad, good)
        while not attempts._winners:
            assert loop.run(20_000) == []
            attempts.step(loop.relay.now_ms, 1, 1)
        (won,) = attempts._winners
        assert won.address == good
        assert connected(won.fd) == 0
        target, _ = listener.accept()
        with target:
            target.settimeout(20)
            attempts.stop()
            with pytest.raises(ConnectionResetError):
                target.recv(1)
        assert loop._handlers == {}


def test_real_targets_that_all_refuse():
    loop = EventLoop()
    with real_target(listens=False) as (_, first), real_target(listens=False) as (_, second):
        attempts = real_attempts(loop, first, second)
        while not attempts.over:
            loop.run(20_000)
            attempts.step(loop.relay.now_ms, 1, 1)
        assert attempts._winners == []
        assert attempts.error == errno.ECONNREFUSED
        assert loop._handlers == {}


def test_a_real_target_that_sends_something_while_it_is_watched():
    loop = EventLoop()
    with watching_real_target(loop) as (attempts, target):
        target.sendall(b"hello")
        while not attempts._winners:
            loop.run(20_000)
        assert attempts._winners[0].proven
        attempts.stop()


@pytest.mark.parametrize("close", [reset, socket.socket.close])
def test_a_real_target_that_closes_early_while_it_is_watched(close):
    loop = EventLoop()
    with watching_real_target(loop) as (attempts, target):
        close(target)
        while not attempts.over:
            loop.run(20_000)
        assert attempts.error == CLOSED_EARLY
        assert loop._handlers == {}


def test_a_real_socket_that_was_connected_to_itself():
    """A connect to a free ephemeral port may do that: Linux may give the socket that very port."""
    with real_target(listens=False) as (sock, _):
        sock.connect(sock.getsockname())
        assert connected(sock.fileno()) == errno.ELOOP


@contextlib.contextmanager
def watching_real_target(loop):
    """(attempts that watch a connection to a real target, the target's end of it)."""
    with real_target() as (listener, address):
        attempts = real_attempts(loop, address, settle_ms=20_000)
        target, _ = listener.accept()
        with target:
            yield attempts, target


@contextlib.contextmanager
def real_target(listens=True):
    """(a TCP socket on loopback, its packed address); unless it `listens`, it refuses."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        if listens:
            sock.listen()
        yield sock, sockaddr.pack_inet(*sock.getsockname())


def real_attempts(loop, *addresses, settle_ms=0):
    """Attempts at real addresses, of which the first has begun."""
    attempts = HappyEyeballs(loop, lambda: False, repeats=True)
    attempts.settle_ms, attempts.must_settle = settle_ms, settle_ms > 0
    attempts.begin(list(addresses), loop.relay.now_ms)
    attempts.step(loop.relay.now_ms, 1, 1)
    return attempts
