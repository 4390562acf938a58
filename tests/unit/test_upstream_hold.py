"""Held clients: which attempts are made, for how long, and which errors are permanent."""

import errno
import os

import pytest
from kit.fake_relay import LATER, UP
from kit.upstream_world import EPOLLHUP, NAME, TCP, TEMPORARY, UNIX, inet, up_at

from proxyd.event_loop import EPOLLET

# The times of probes after the start of an outage: 10 ms apart for 150 ms, then pauses double.
SCHEDULE = [*range(10, 151, 10), 170, 210, 290, 450, 700, 950, 1200]


# ── hold and retry ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error", TEMPORARY)
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


def test_a_single_client_later_in_an_outage_has_short_pauses(world):
    one = world(plan=errno.ECONNREFUSED, timeout_ms=2000)
    one.come()
    one.run(60_000)
    assert not one.held
    one.relay.attempts.clear()
    one.come()
    assert one.relay.attempts == []  # it is held first
    one.run(60_000 + 150)
    assert one.relay.times == [60_000 + at for at in range(0, 151, 10)]


@pytest.mark.parametrize("first", [0, 1])
def test_clients_of_one_millisecond_are_served_in_order_of_arrival(world, first):
    """Connects may fail in any order, and after a younger client is held already."""
    one = world(plan=LATER)
    clients = [one.come(), one.come()]
    one.fail(clients[first], errno.ECONNREFUSED)
    clients += [one.come(), one.come()]
    one.fail(clients[1 - first], errno.ECONNREFUSED)
    assert one.held == clients


@pytest.mark.parametrize("count", [1, 2, 100])
def test_one_probe_whatever_the_number_held(world, count):
    one = world(plan=errno.ECONNREFUSED)
    for _ in range(count):
        one.come()
    one.run(SCHEDULE[-1])
    assert one.relay.times == [0, *SCHEDULE]
    assert len(one.held) == count


def test_the_probe_is_the_connection_of_the_oldest_and_the_others_follow_at_once(world):
    one = world(plan=up_at(100))
    clients = [one.come(header=b"%d" % number) for number in range(5)]
    one.run(99)
    assert one.served == []
    one.run(100)
    assert one.relay.served == [(fd, b"%d" % number) for number, fd in enumerate(clients)]
    assert one.relay.times[-6:] == [90, 100, 100, 100, 100, 100]
    assert not one.held
    assert one.upstream.served - one.upstream.returned == 5
    assert one.upstream.held.failed == 0


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
    assert one.held == [oldest, younger]
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


def test_the_others_wait_while_a_probe_is_pending(world):
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


def test_followers_that_fail_keep_waiting(world):
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


def test_a_client_is_held_while_others_are_held(world):
    one = world(plan=up_at(50))
    one.come()
    one.run(50 - 1)
    late = one.come()
    assert late in one.held
    one.run(50)
    assert len(one.served) == 2
    assert one.upstream.next_ms() is None or not one.held


def test_after_the_outage_clients_are_connected_at_once(world):
    one = world(plan=up_at(50))
    one.come()
    one.run(60)
    fd = one.come()
    assert one.served[-1] == fd
    assert not one.held


def test_a_held_client_is_watched_for_errors_and_hangups_only(world):
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
    one.fail(fd, errno.ECONNREFUSED, pending=b"GET /", has_unsent=True)
    assert one.upstream.served - one.upstream.returned == 0
    one.run(30)
    assert one.relay.served == [(fd, b"GET /")]
    assert one.upstream.served - one.upstream.returned == 1


def test_a_connection_that_cannot_be_adopted_for_lack_of_memory(world):
    one = world(plan=up_at(10))
    clients = [one.come(), one.come()]
    one.relay.adopt_error = errno.ENOMEM
    one.run(10)
    assert one.served == []
    assert one.held == clients
    one.relay.adopt_error = 0
    one.run(20)
    assert one.served == clients


# ── for how long ──────────────────────────────────────────────────────────────────────────────────


def test_each_client_has_its_own_deadline(world):
    one = world(plan=errno.ECONNREFUSED, timeout_ms=1000)
    first = one.come()
    one.run(400)
    second = one.come()
    one.run(999)
    assert set(one.held) == {first, second}
    one.run(1000)
    assert one.gone(first)
    assert set(one.held) == {second}
    one.run(1399)
    assert set(one.held) == {second}
    one.run(1400)
    assert one.gone(second)
    assert not one.held
    assert one.upstream.held.failed == 2


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


def test_a_probe_pending_at_the_deadline_is_given_up(world):
    one = world(plan=errno.ECONNREFUSED, timeout_ms=1000)
    first = one.come()
    one.run(5)
    second = one.come()
    one.relay.plan[one.address] = LATER
    one.run(1000)
    assert one.gone(first)
    assert one.held == [second]
    assert one.relay.dialled
    one.run(1005)
    assert one.gone(second)
    assert one.relay.dialled == {}


def test_the_reason_at_the_deadline_is_the_error_of_an_address(world, capfd):
    """One address refuses, the other does not answer: the refusal is the better reason."""
    plan = {inet(1): errno.ECONNREFUSED, inet(2): LATER}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None), timeout_ms=1000)
    fd = one.come()
    one.run(1000)
    assert one.gone(fd)
    assert "Connection refused" in capfd.readouterr().err


def test_with_an_infinite_timeout_there_is_no_deadline(world):
    one = world(plan=up_at(600_000), timeout_ms=None)
    fd = one.come()
    one.run(599_000)
    assert fd in one.held
    one.run(601_000)
    assert one.served == [fd]


@pytest.mark.parametrize("error", TEMPORARY)
def test_without_connect_timeout_there_is_one_attempt(world, capfd, error):
    one = world(plan=error, timeout_ms=0)
    fd = one.come()
    assert one.gone(fd)
    one.run(60_000)
    assert one.relay.times == [0]
    assert one.upstream.held.failed == 1
    (line,) = capfd.readouterr().err.splitlines()
    words = {errno.EADDRNOTAVAIL: "no local port is free, or there is no local address"}
    why = words.get(error, os.strerror(error))
    assert line == f"Failed to connect to remote host: {why} ({TCP})."
    # The next client has an attempt of its own.
    one.relay.plan[one.address] = UP
    assert one.come() in one.served


def test_without_connect_timeout_a_late_failure_is_the_end_too(world, capfd):
    one = world(timeout_ms=0)
    fd = one.come()
    one.run(60_000)
    one.fail(fd, errno.ETIMEDOUT, since_ms=0)
    assert one.gone(fd)
    assert capfd.readouterr().err.startswith("Failed to connect to remote host: Connection timed")


# ── permanent errors ──────────────────────────────────────────────────────────────────────────────


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
def test_a_missing_permission_is_waited_for_and_logged_at_once(world, capfd, target, error):
    one = world(target, plan=up_at(8000, error))
    fd = one.come()
    one.tick()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(f"{os.strerror(error)} ({target}), holding clients until it answers.")
    one.run(7999)
    assert fd in one.held
    one.run(8500)
    assert one.served == [fd]


def test_a_permission_lost_during_an_outage_is_logged(world, capfd):
    one = world(UNIX, plan=lambda now_ms: errno.ENOENT if now_ms < 6000 else errno.EACCES)
    one.come()
    one.run(7000)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(": ")[1].split(" (")[0] for line in lines] == [
        "No such file or directory",
        "Permission denied",
    ]


def test_einval_of_a_link_local_address_without_a_scope_is_permanent(world):
    one = world("[fe80::1]:80", plan=errno.EINVAL)
    assert one.gone(one.come())
    assert one.relay.times == [0]


def test_an_outage_that_turns_into_a_lasting_error(world):
    one = world(UNIX, plan=lambda now_ms: errno.ENOENT if now_ms < 100 else errno.ENOTSOCK)
    clients = [one.come() for _ in range(3)]
    one.run(1000)
    assert all(map(one.gone, clients))
    assert one.upstream.held.failed == 3
    assert not one.held
