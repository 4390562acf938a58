"""Targets whose addresses are looked up: names, and link-local addresses with an interface."""

import _socket
import errno
import os

import pytest
from kit.fake_relay import LATER, UP
from kit.upstream_world import NAME, inet

from proxyd import address as sockaddr
from proxyd import resolver
from proxyd.happy_eyeballs import SILENT_MS, STAGGER_MS
from proxyd.lookup import LATE_MS

# ── names ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_client_waits_for_the_look_up(world):
    one = world(NAME, plan={inet(1): UP})
    fd = one.come(header=b"PROXY")
    one.tick()
    assert one.names.asked == [0]
    assert fd in one.held
    one.run(300)
    one.names.reply([inet(1, 0)])
    one.tick()
    assert one.relay.served == [(fd, b"PROXY")]
    assert one.relay.attempts == [(300, inet(1), None)]
    assert not one.held


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
    one.relay.attempts.clear()
    fd = one.come()
    assert one.served[-1] == fd
    assert one.relay.attempts == [(0, inet(1), STAGGER_MS)]
    assert one.names.asked == [0]
    one.names.asked.clear()
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
    one.fail(fd, errno.ETIMEDOUT, pending=b"GET", since_ms=0, has_unsent=True)
    one.tick()
    one.run(500)
    assert one.relay.served[-1] == (fd, b"GET")
    assert one.relay.attempts[-1] == (250, inet(2), None)  # the slow one would come last
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


def test_a_dead_first_address_and_a_second_that_answers_at_once(world):
    """As every address of this machine does: the attempt succeeds within step()."""
    plan = {inet(1): LATER, inet(2): UP}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None))
    fd = one.come()
    one.run(250)
    assert one.served == [fd]
    assert not one.held


def test_a_round_that_fails_within_step_is_an_outage_at_once(world, capfd):
    plan = {inet(1): LATER, inet(2): errno.ECONNREFUSED}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None))
    one.come()
    one.run(200)
    one.answer(inet(1), errno.EHOSTUNREACH)
    assert "holding clients" in capfd.readouterr().err


def test_an_address_that_answered_late_is_not_remembered(world):
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


def test_each_client_has_an_attempt_of_its_own_without_connect_timeout(world):
    plan = {inet(1): errno.EHOSTUNREACH, inet(2): errno.ECONNREFUSED}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None), timeout_ms=0)
    clients = [one.come() for _ in range(3)]
    one.run(1000)
    assert all(map(one.gone, clients))
    assert one.relay.times == [0] * 6


def test_a_connection_is_used_while_the_name_is_looked_up_again(world):
    plan = {inet(1): LATER, inet(2): errno.ECONNREFUSED}
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None))
    fd = one.come()
    one.run(255)
    one.names.answer = None  # from now on no look-up is answered
    one.run(900)
    one.answer(inet(1), 0)
    assert one.served == [fd]


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
def test_a_look_up_that_fails_for_good_is_not_repeated(world, capfd, code, timeout_ms):
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
    assert fd in one.held
    one.run(10_000)
    assert one.gone(fd)
    assert capfd.readouterr().err.splitlines() == [
        "Failed to resolve host: no answer yet (backend), holding clients until it answers.",
        "Failed to resolve host: no answer yet (backend).",
    ]
    one.names.reply([inet(1, 0)])  # too late: no client is left


def test_a_look_up_that_is_late_is_used_when_it_comes(world, capfd):
    one = world(NAME, plan={inet(1): UP})
    fd = one.come()
    one.run(LATE_MS - 1)
    assert capfd.readouterr().err == ""
    one.run(5000)
    one.names.reply([inet(1, 0)])
    one.tick()
    assert one.relay.served == [(fd, b"")]
    assert one.relay.attempts == [(5000, inet(1), None)]
    assert one.names.asked == [0, 5000]  # the second one was answered at once


def test_without_connect_timeout_a_late_look_up_is_waited_for(world, capfd):
    one = world(NAME, plan={inet(1): UP}, timeout_ms=0)
    fd = one.come()
    one.run(5000)
    assert fd in one.held
    one.names.reply([inet(1, 0)])
    one.tick()
    assert one.served == [fd]
    assert capfd.readouterr().err == ""


def test_the_last_good_answer_stands_in_for_a_late_one(world, capfd):
    assert LATE_MS == resolver.LATE_MS
    one = world(NAME, plan={inet(1): UP})
    clients = [one.come(), one.come()]
    one.run(LATE_MS - 1)
    assert one.served == []
    one.names.stands_in = [inet(1, 0)]  # current() says so from then on
    one.run(LATE_MS)
    assert one.served == clients
    clients.append(one.come())
    assert one.served == clients
    assert one.names.asked == [0]
    one.names.stands_in = []
    one.names.reply([inet(1, 0)])  # the answer comes after all
    one.come()
    assert len(one.served) == 4
    assert capfd.readouterr().err == ""


def test_a_client_whose_look_up_is_prompt_does_not_count_as_waiting(world):
    one = world(NAME, plan={inet(1): UP})
    one.come()
    one.run(STAGGER_MS - 1)
    assert (len(one.held), one.upstream.waiting) == (1, 0)
    one.run(STAGGER_MS)
    assert one.upstream.waiting == 1
    one.names.reply([], _socket.gaierror(_socket.EAI_NONAME, "no such thing"))
    one.tick()
    one.come()
    assert one.upstream.waiting == 2


def test_a_new_address_is_followed_without_holding_a_client(world):
    one = world(NAME, plan={inet(1): UP, inet(2): UP}, answer=([inet(1, 0)], None))
    one.come()
    one.tick()
    one.names.answer = ([inet(2, 0)], None)
    fd = one.come()
    assert one.served[-1] == fd
    assert not one.held
    assert [address for _, address, _ in one.relay.attempts] == [inet(1), inet(2)]
    assert one.names.asked == [0]


def test_a_prompt_address_stays_while_it_is_among_the_answers(world):
    plan = dict.fromkeys([inet(1), inet(2), inet(3)], UP)
    one = world(NAME, plan=plan, answer=([inet(1, 0), inet(2, 0)], None))
    one.come()
    one.tick()
    for answer in ([2, 1], [3, 1, 2], [1]):  # as name servers rotate them
        one.names.answer = ([inet(last, 0) for last in answer], None)
        one.come()
        assert one.relay.attempts[-1][1] == inet(1)
    assert not one.held


def test_the_only_address_of_a_name_has_as_much_time_as_a_literal_one(world):
    one = world(NAME, plan={inet(1): UP}, answer=([inet(1, 0)], None), timeout_ms=7000)
    one.come()
    one.tick()
    one.come()
    assert one.relay.attempts[-1] == (0, inet(1), SILENT_MS)


def test_dead_addresses_cost_their_time_once(world):
    plan = {inet(1): LATER, inet(2): LATER, inet(3): UP}
    answer = ([inet(1, 0), inet(2, 0), inet(3, 0)], None)
    one = world(NAME, plan=plan, answer=answer)
    one.come()
    one.run(500)
    assert len(one.served) == 1
    one.relay.attempts.clear()
    for number in range(2, 6):
        one.names.answer = (list(answer[0]), None)  # looked up again, and the same
        fd = one.come()
        one.tick()
        assert one.served[-1] == fd
        assert len(one.served) == number
    assert {address for _, address, _ in one.relay.attempts} == {inet(3)}


def test_a_name_that_is_gone_is_an_outage_as_at_a_cold_start(world, capfd):
    one = world(NAME, plan={inet(1): UP, inet(2): UP}, answer=([inet(1, 0)], None))
    one.come()
    one.tick()
    one.names.answer = ([], _socket.gaierror(_socket.EAI_NONAME, "no such thing"))
    clients = [one.come() for _ in range(3)]
    one.run(2500)
    assert len(one.served) == 1
    assert one.held == clients
    assert one.names.asked == [0, 0, 1000, 2000]
    assert len(capfd.readouterr().err.splitlines()) == 1
    one.names.answer = ([inet(2, 0)], None)
    one.run(3000)
    assert one.served[1:] == clients
    assert {address for _, address, _ in one.relay.attempts[1:]} == {inet(2)}


# ── an interface ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def interfaces(monkeypatch):
    """Indexes of interfaces, by name."""
    known = {}

    def index(name):
        if isinstance(known.get(name, errno.ENODEV), int):
            raise OSError(known.get(name, errno.ENODEV), "")
        return known[name][0]

    monkeypatch.setattr(sockaddr, "interface_index", index)
    return known


def scoped(index):
    return sockaddr.pack_inet6("fe80::1", 80, index)


def test_the_interface_of_a_target_is_looked_up_for_each_client(world, interfaces):
    interfaces["eth0"] = (3,)
    one = world("[fe80::1%eth0]:80", plan={scoped(3): UP, scoped(9): UP})
    # Otherwise the relay would connect without asking for the index.
    assert one.upstream.auto_connect_address is None
    for index in (3, 9, 3):
        interfaces["eth0"] = (index,)
        one.come()
        assert not one.held
        assert one.relay.attempts[-1] == (0, scoped(index), SILENT_MS)


def test_an_interface_that_is_not_there_yet_is_waited_for(world, interfaces, capfd):
    one = world("[fe80::1%eth0]:80", plan={scoped(3): UP})
    clients = [one.come(), one.come()]
    one.run(1000)
    assert one.held == clients
    interfaces["eth0"] = (3,)
    one.run(1300)
    assert one.served == clients
    assert capfd.readouterr().err.splitlines()[0] == (
        "Failed to connect to remote host: No such device ([fe80::1%eth0]:80), "
        "holding clients until it answers."
    )


@pytest.mark.parametrize("error", [errno.ENETUNREACH, errno.ENODEV, errno.EADDRNOTAVAIL])
def test_an_interface_that_is_recreated_is_followed_within_an_outage(world, interfaces, error):
    interfaces["eth0"] = (3,)
    one = world("[fe80::1%eth0]:80", plan={scoped(3): error, scoped(9): UP})
    fd = one.come()
    one.tick()
    interfaces["eth0"] = (9,)
    one.run(10)
    assert one.served == [fd]


@pytest.mark.parametrize(
    ("error", "timeout_ms"), [(errno.ENODEV, 0), (errno.EMFILE, 0), (errno.EAFNOSUPPORT, 10_000)]
)
def test_an_interface_that_cannot_be_waited_for(world, interfaces, capfd, error, timeout_ms):
    interfaces["eth0"] = error
    one = world("[fe80::1%eth0]:80", plan={}, timeout_ms=timeout_ms)
    fd = one.come()
    one.tick()
    assert one.gone(fd)
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"Failed to connect to remote host: {os.strerror(error)} ([fe80::1%eth0]:80)."


def test_the_port_of_the_listener_with_an_interface(world, interfaces):
    interfaces["eth0"] = (3,)
    one = world("[fe80::1%eth0]:*", plan={sockaddr.with_port(scoped(3), 8443): UP}, port=8443)
    one.come()
    assert len(one.served) == 1


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
    assert one.upstream.text == "backend:8443"
