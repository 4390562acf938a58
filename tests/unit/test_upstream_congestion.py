"""A UNIX target whose backlog is full: clients wait in order, which is not an outage yet."""

import errno
import os

import pytest
from kit.fake_relay import UP
from kit.upstream_world import EPOLLHUP, UNIX, Backlog


def test_a_full_backlog_is_tried_again_steadily(world, capfd):
    one = world(UNIX, plan=errno.EAGAIN)
    one.come()
    one.run(900)
    assert one.relay.times == [0, *range(5, 901, 5)]
    assert capfd.readouterr().err == ""  # not an outage
    one.run(1100)
    one.relay.plan[one.address] = UP
    one.run(1105)
    reason = f"Failed to connect to remote host: {os.strerror(errno.EAGAIN)} ({UNIX})"
    assert capfd.readouterr().err.splitlines() == [
        f"{reason}, holding clients until it answers.",
        f"{UNIX} answers after 1.105s, 1 client was held.",
    ]


def test_as_many_clients_as_fit_are_connected_in_order(world):
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
    assert one.upstream.auto_connect_address


def test_no_client_overtakes_those_that_wait_for_room(world):
    room = Backlog(0)
    one = world(UNIX, plan=room)
    first = one.come()
    assert one.upstream.auto_connect_address is None
    room.room = 2
    second = one.come()
    assert one.served == []
    one.run(5)
    assert one.served == [first, second]


def test_clients_that_find_it_full_in_one_batch_stay_in_order(world):
    room = Backlog(3)
    one = world(UNIX, plan=room)
    clients = [one.come() for _ in range(3)]
    for fd in clients:  # the relay had connected them
        one.fail(fd, errno.EAGAIN)
    clients += [one.come() for _ in range(3)]
    room.room = 6
    one.run(5)
    assert one.served == clients


def test_a_full_backlog_ends_an_outage(world):
    one = world(UNIX, plan=lambda now_ms: errno.ENOENT if now_ms < 1000 else errno.EAGAIN)
    clients = [one.come() for _ in range(2)]
    one.run(1200)
    one.relay.plan[one.address] = UP
    one.run(1205)
    assert one.served == clients


@pytest.mark.parametrize("end", ["cut", "gone", "given up"])
def test_a_backlog_that_stays_full_is_an_outage(world, capfd, end):
    room = Backlog(0)
    one = world(UNIX, plan=room, timeout_ms=3000)
    fd = one.come()
    one.run(2000)
    assert "Resource temporarily unavailable" in capfd.readouterr().err
    if end == "cut":
        one.upstream.drop_all()
    elif end == "gone":
        one.happen(fd, EPOLLHUP)
    one.run(10_000)
    assert not one.held
    assert "answers after" not in capfd.readouterr().err
    fd = one.come()  # the next outage is logged again
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
