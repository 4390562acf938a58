"""What the log says about outages, and the pauses between probes."""

import errno
import os
import socket
import sys
from types import SimpleNamespace

import pytest
from kit.fake_relay import LATER, UP
from kit.upstream_world import EPOLLHUP, NAME, REFUSED, TCP, UNIX, inet, up_at

from proxyd import address as sockaddr
from proxyd import log, outage


def test_no_warning_while_a_target_is_starting(world, levels):
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


def test_clients_that_came_back_are_no_sign_that_it_was_reached(world, levels):
    one = world()
    clients = [one.come(), one.come()]
    one.relay.plan[one.address] = errno.ECONNREFUSED
    for fd in clients:
        one.fail(fd, errno.ECONNREFUSED)
    one.run(50)
    assert [level for level, _ in levels] == [log.INFO]


def test_a_connection_of_the_relay_counts_as_reached(world, levels):
    one = world()
    one.upstream.add_listener(SimpleNamespace(connected_count=1))
    one.relay.plan[one.address] = errno.ECONNREFUSED
    one.come()
    one.tick()
    assert [level for level, _ in levels] == [log.WARNING]


@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM])
def test_a_missing_permission_is_a_warning_at_once(world, levels, error):
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


def test_the_end_of_an_outage_when_no_module_can_be_loaded(world, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "proxyd.timespan", None)  # as if no fd were left
    one = world(plan=up_at(20))
    one.come()
    one.run(20)
    assert len(one.served) == 1
    assert (
        capfd.readouterr().err.splitlines()[1] == f"{TCP} answers after 20 ms, 1 client was held."
    )


def test_a_single_client_is_in_the_singular(world, capfd):
    one = world(plan=up_at(20))
    one.come()
    one.run(20)
    assert capfd.readouterr().err.splitlines()[1] == f"{TCP} answers after 20ms, 1 client was held."


def test_every_outage_is_logged(world, capfd):
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
    assert not one.held
    one.relay.plan[one.address] = UP
    one.run(30_000)
    one.come()
    assert "answers after" in capfd.readouterr().err
    one.run(60_000)
    one.relay.plan[one.address] = errno.ECONNREFUSED
    one.come()
    one.tick()
    assert "holding clients" in capfd.readouterr().err, "the second outage is not logged"


def test_clients_that_are_given_up_are_logged_with_the_last_error(world, capfd):
    one = world(UNIX, plan=lambda now_ms: errno.ENOENT if now_ms < 300 else errno.ECONNREFUSED)
    one.come()
    one.run(10_000)
    first, last = capfd.readouterr().err.splitlines()
    assert "No such file or directory" in first
    assert last == f"Failed to connect to remote host: Connection refused ({UNIX})."


def test_a_client_that_is_given_up_is_an_error_with_its_address(world, levels):
    one = world(UNIX, plan=errno.ENOTDIR)
    name = sockaddr.from_socket_name(socket.AF_UNIX, "/run/client")
    ours, theirs = socket.socketpair()
    with ours:
        one.upstream.take(theirs.detach(), socket.AF_UNIX, 3, None, "", name)
        assert ours.recv(1) == b""
    why = os.strerror(errno.ENOTDIR)
    text = f"Failed to connect to remote host: {why} ({UNIX}). Client: /run/client."
    assert levels == [(log.ERROR, text)]
    one.come_total += 1


def test_the_end_of_an_outage_is_information(world, levels):
    one = world(plan=up_at(50))
    one.come()
    one.run(1000)
    assert [level for level, _ in levels] == [log.INFO, log.INFO]
    assert "answers after" in levels[1][1]


def test_many_clients_that_are_given_up_are_one_line(world, capfd):
    one = world(plan=errno.ECONNREFUSED)
    for _ in range(50):
        one.come()
    one.run(10_000)
    assert one.upstream.held.failed == 50
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_the_reason_is_not_that_of_an_earlier_outage(world, capfd):
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
    assert "it was connected to itself, because nothing listens there" in capfd.readouterr().err


def test_the_pauses_of_the_probes():
    assert (outage.PROBE_MS, outage.EAGER_MS, outage.PROBE_MS_MAX) == (10, 150, 250)
