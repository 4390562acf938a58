"""--settle-time=: a port that accepts before its application is up."""

import errno
import socket

import pytest
from kit.fake_relay import LATER, UP
from kit.upstream_world import EPOLLHUP, NAME, TCP, UNIX, Backlog, inet


def test_nothing_is_sent_before_a_target_is_proven(world):
    one = world(settle_ms=50)
    assert one.upstream.auto_connect_address is None
    fd = one.come(header=b"PROXY")
    one.run(49)
    assert one.served == []
    assert one.upstream.auto_connect_address is None
    one.run(50)
    assert one.relay.served == [(fd, b"PROXY")]
    assert one.upstream.auto_connect_address == one.address
    late = one.come()
    assert one.served == [fd, late]


def test_the_first_byte_proves_it(world):
    one = world(settle_ms=5000)
    fd = one.come()
    one.tick()
    one.say(one.address, 1)
    assert one.served == [fd]
    assert one.upstream.auto_connect_address


@pytest.mark.parametrize("end", [0, -errno.ECONNRESET])
def test_a_target_that_closes_early_is_tried_again_as_after_a_refusal(world, capfd, end):
    one = world(settle_ms=50)
    clients = [one.come() for _ in range(3)]
    one.tick()
    assert len(one.relay.dialled) == 1  # the others wait behind the probe
    one.say(one.address, end)
    assert set(one.held) == set(clients)
    assert capfd.readouterr().err == (
        "Failed to connect to remote host: it accepts and closes at once "
        f"({TCP}), holding clients until it answers.\n"
    )
    one.run(10)
    assert one.relay.times == [0, 10]
    one.say(one.address, end)
    one.run(70)
    assert one.served == clients
    assert len(one.relay.resets) == 2


def test_a_target_that_always_closes_early_is_given_up(world, capfd):
    one = world(settle_ms=50, timeout_ms=300)
    fd = one.come()
    for _ in range(50):
        one.run(one.now_ms + 10)
        if one.relay.dialled:
            one.say(one.address, 0)
    assert one.gone(fd)
    assert one.upstream.held.failed == 1
    assert "it accepts and closes at once" in capfd.readouterr().err.splitlines()[-1]


def test_a_target_is_watched_to_the_end_even_if_connect_timeout_is_shorter(world):
    """It has been reached: otherwise no client would ever be served."""
    one = world(settle_ms=500, timeout_ms=300)
    clients = [one.come() for _ in range(3)]
    one.run(499)
    assert one.served == []
    one.run(500)
    assert one.served == clients


def test_a_target_that_closes_early_after_connect_timeout(world):
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
    assert fd in one.held
    one.say(one.address, 0)
    assert fd in one.held


def test_a_connection_closed_early_is_not_for_a_client_that_has_sent_something(world):
    one = world(settle_ms=50)
    first = one.come()
    second = one.come()
    one.peers[first].shutdown(socket.SHUT_WR)
    one.peers[second].send(b"message")
    one.tick()
    (target,) = one.relay.dialled
    one.relay.received[target] = 0
    one.ready(target, 1)  # and, in the same batch, the first client leaves
    one.ready(first, EPOLLHUP)
    one.tick()
    assert one.served == []
    assert second in one.held
    one.run(100)
    assert one.served == [second]


def test_without_connect_timeout_a_target_that_closes_early_is_given_up(world):
    one = world(settle_ms=50, timeout_ms=0)
    fd = one.come()
    one.tick()
    one.say(one.address, 0)
    assert one.gone(fd)
    assert one.relay.times == [0]


def test_a_client_that_has_ended_without_sending_is_not_held(world):
    one = world(settle_ms=50)
    fd = one.come()
    one.peers[fd].shutdown(socket.SHUT_WR)
    one.tick()
    one.say(one.address, 0)
    assert one.served == [fd]
    assert one.upstream.auto_connect_address is None  # that does not prove the target


def test_a_client_that_has_sent_something_and_ended_is_held(world):
    one = world(settle_ms=50)
    fd = one.come()
    one.peers[fd].send(b"message")
    one.peers[fd].shutdown(socket.SHUT_WR)
    one.tick()
    one.say(one.address, 0)
    assert fd in one.held
    one.run(200)
    assert one.served == [fd]


def test_a_client_that_leaves_while_the_target_is_watched(world):
    one = world(settle_ms=50)
    fd = one.come()
    one.tick()
    one.happen(fd, EPOLLHUP)
    assert one.upstream.held.gone == 1
    assert len(one.relay.resets) == 1


def test_after_an_outage_a_target_has_to_settle_again(world):
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


def test_congestion_leaves_a_target_proven(world):
    room = Backlog(1)
    one = world(UNIX, plan=room, settle_ms=50)
    one.come()
    one.run(50)
    fd = one.come()
    room.room = 1
    one.run(55)
    assert one.served[-1] == fd


def test_a_name_with_an_address_that_closes_early(world):
    plan = {inet(1): UP, inet(2): UP}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None), settle_ms=50)
    fd = one.come()
    one.tick()
    one.say(inet(1), 0)
    one.run(60)
    assert one.served == [fd]
    assert [address for _, address, _ in one.relay.attempts] == [inet(1), inet(2)]
