"""A target that does not answer: attempts are repeated, and bounded."""

import _socket
import errno

import pytest
from kit.fake_relay import LATER, UP
from kit.upstream_world import NAME, inet, up_at


def test_a_silent_connect_of_the_relay_is_repeated_after_a_second(world, capfd):
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


def test_the_host_comes_up_and_every_client_is_served(world):
    """The connection of the youngest attempt is for the oldest client."""
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


def test_a_surplus_connection_is_reset_if_no_client_is_left(world):
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
    highest = 0
    for at_ms in range(0, 20_000, 100):
        one.run(at_ms)
        highest = max(highest, len(one.relay.dialled))
    assert highest <= 32
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
    """By the time it answers, the address may belong to another service."""
    one = world(NAME, plan={inet(1): LATER}, answer=([inet(1, 0)], None))
    fd = one.come()
    one.run(1500)
    one.names.answer = ([], _socket.gaierror(code, "no such thing"))
    one.run(3000)
    assert one.relay.dialled == {}
    assert fd in one.held


@pytest.mark.parametrize("timeout_ms", [None, 0])
def test_a_look_up_that_fails_for_good_while_an_address_is_silent(world, timeout_ms):
    plan = {inet(1): LATER, inet(2): errno.ECONNREFUSED}
    answer = ([inet(1, 0), inet(2, 0)], None)
    one = world(NAME, plan=plan, answer=answer, timeout_ms=timeout_ms)
    fd = one.come()
    one.run(300)
    one.names.answer = ([], _socket.gaierror(_socket.EAI_FAIL, "never"))
    one.run(3000)  # without a busy loop
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
