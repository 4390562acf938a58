"""Held clients that leave, are cut or are given up."""

import errno
import socket

import pytest
from kit.fake_relay import LATER, UP
from kit.upstream_world import EPOLLHUP, TCP

from proxyd import log


def test_a_held_client_that_hangs_up_is_dropped(world):
    one = world(plan=errno.ECONNREFUSED)
    first, second = one.come(), one.come()
    one.happen(second, EPOLLHUP)
    assert one.gone(second)
    assert one.held == [first]
    one.happen(first, EPOLLHUP)
    assert one.gone(first)
    assert not one.held
    assert one.upstream.held.failed == 0  # it was not the target's fault


@pytest.mark.parametrize("others", [0, 1])
def test_a_client_that_leaves_in_the_batch_in_which_its_attempt_succeeds(world, others):
    """With others held, its attempt is still checked."""
    one = world(plan=errno.ECONNREFUSED)
    fd = one.come()
    held = [one.come() for _ in range(others)]
    one.relay.plan[one.address] = LATER
    one.run(10)
    (dialled,) = one.relay.dialled
    one.relay.dialled[dialled] = 0
    one.ready(dialled, 4)
    one.ready(fd, EPOLLHUP)
    one.tick()
    assert one.gone(fd)
    assert one.served == held  # its connection is for the next
    assert one.relay.resets == ([] if others else [dialled])  # or is reset, with no client left
    assert one.relay.closes == []


def test_drop_all_closes_every_client(world):
    one = world(plan=errno.ECONNREFUSED)
    clients = [one.come() for _ in range(3)]
    one.relay.plan[one.address] = LATER
    one.run(10)
    assert one.upstream.drop_all() == 3
    assert all(map(one.gone, clients))
    assert one.upstream.drop_all() == 0


@pytest.mark.parametrize("taken", [False, True])
def test_a_unix_client_that_has_sent_something_and_hung_up_is_served(world, taken):
    """It has sent its message and closed: the message is delivered."""
    one = world(plan=LATER if taken else errno.ECONNREFUSED)
    fd = one.come()
    if taken:  # the relay had read it already
        one.relay.plan[one.address] = errno.ECONNREFUSED
        one.relay.served[:] = [(fd, b"")]
        one.fail(fd, errno.ECONNREFUSED, pending=b"message", has_unsent=True)
        one.upstream.served = 1
    else:
        one.peers[fd].send(b"message")
    one.peers[fd].shutdown(socket.SHUT_RDWR)
    one.happen(fd, EPOLLHUP)
    assert fd in one.held
    one.relay.plan[one.address] = UP
    one.run(500)
    assert one.relay.served == [(fd, b"message" if taken else b"")]
    assert one.upstream.held.gone == 0


def test_a_unix_client_that_has_hung_up_without_sending_is_dropped_and_counted(world):
    one = world(plan=errno.ECONNREFUSED)
    fd = one.come(header=b"PROXY UNKNOWN\r\n")  # which is ours, not the client's
    one.peers[fd].shutdown(socket.SHUT_RDWR)
    one.happen(fd, EPOLLHUP)
    assert one.gone(fd)
    assert (one.upstream.held.gone, one.upstream.held.failed, one.upstream.held.cut) == (1, 0, 0)


def test_a_header_that_comes_back_does_not_count_as_sent_by_the_client(world):
    one = world()
    fd = one.come(header=b"PROXY")
    one.relay.plan[one.address] = errno.ECONNREFUSED
    one.fail(fd, errno.ECONNREFUSED, pending=b"PROXY")
    one.happen(fd, EPOLLHUP)
    assert one.gone(fd)
    assert one.upstream.held.gone == 1


def test_a_client_that_leaves_is_logged_at_debug_level(world, capfd):
    log.setup({"SYSTEMD_LOG_LEVEL": "debug"})
    one = world(plan=errno.ECONNREFUSED)
    fd = one.come()
    one.happen(fd, EPOLLHUP)
    assert f"client{fd} → {TCP}: client gone while it was held." in capfd.readouterr().err


def test_a_client_that_is_cut_sees_a_reset_and_one_given_up_a_plain_end(world):
    one = world(plan=errno.ECONNREFUSED, timeout_ms=1000)
    given_up = one.come()
    one.run(500)
    cut = one.come()
    one.run(1000)
    one.upstream.drop_all()
    assert (one.relay.let_go, one.relay.cut) == ([given_up], [cut])
    assert (one.upstream.held.failed, one.upstream.held.cut) == (1, 1)
