"""The policy for datagrams, on a fake relay: probing, holding, dropping, names, draining."""

import errno
import itertools
import socket
from types import SimpleNamespace

import pytest
from kit.fake_datagrams import flow_info, put_in_place, totals
from kit.fake_relay import FakeRelay

from proxyd import address as sockaddr
from proxyd import datagram_upstream, datagrams, log, stats
from proxyd._datagram import (
    FlowBegun,
    FlowEnded,
    FlowFailed,
    FlowsRefused,
    ListenerFailed,
    LoopFound,
    TargetDown,
    TargetHolds,
    TargetUp,
)
from proxyd.datagram_upstream import QUICK_PROBES, REFRESH_MS, SLOW_PROBE_MS, is_ours
from proxyd.datagrams import QUIET_MS, DatagramPolicy
from proxyd.event_loop import EventLoop
from proxyd.listen import Listener
from proxyd.refusals import Refusals
from proxyd.target import parse_target

START_MS = 50_000
LOCAL = "127.0.0.1:53"
REMOTE = "192.0.2.1:53"
NAME = "backend:53"
REFUSED = f"Failed to reach remote host: Connection refused ({LOCAL})"
UNKNOWN = "Failed to resolve host: Name or service not known (backend)"
CLIENT = sockaddr.pack_inet("192.0.2.7", 4321)


class Names:
    """A resolver: `answer` is (addresses, error), or None during a look-up."""

    def __init__(self):
        self.answer = None
        self.asked = 0
        self.waiting = []

    def ask(self, host, now_ms, done):
        self.asked += 1
        if self.answer is None:
            self.waiting.append(done)
        else:
            done(*self.answer)

    def current(self, host, now_ms):
        return []

    def give(self, addresses, error=None):
        self.answer = addresses, error
        waiting, self.waiting = self.waiting, []
        for done in waiting:
            done(*self.answer)


class World:
    """The policy on a fake relay, with one listener for each target."""

    def __init__(self, targets, timeout_ms, addresses, proxy):
        self.relay = FakeRelay(start_ms=START_MS)
        self.loop = EventLoop()
        self.loop.relay = self.relay
        self.names = Names()
        self.listeners = []
        for index, text in enumerate(targets):
            packed = addresses[index] if addresses else sockaddr.pack_inet("127.0.0.1", 1000)
            listener = Listener(-1, "x", packed, datagram=True)
            listener.target = parse_target(text).for_datagrams()
            listener.index = index
            self.listeners.append(listener)
        self.policy = DatagramPolicy(self.loop, self.listeners, self.names, timeout_ms, proxy=proxy)
        self.fake = self.policy.relay_part
        self.upstream = self.policy.upstreams[0]
        self.target = self.fake.targets[0]

    @property
    def ms(self):
        return self.relay.now_ms - START_MS

    def happen(self, *events):
        self.fake.events += events
        self.policy.step(self.relay.now_ms)

    def run(self, ms, respond=None):
        """Let time pass, step by step as the main loop does; `respond` is called at each probe."""
        end_ms = self.relay.now_ms + ms
        turns = 0
        while self.relay.now_ms < end_ms:
            before = len(self.target.probes)
            self.policy.step(self.relay.now_ms)
            for _ in self.target.probes[before:]:
                if respond is not None:
                    self.fake.events.append(respond())
            next_ms = self.relay.now_ms if self.fake.events else self.policy.next_ms()
            turns = turns + 1 if next_ms == self.relay.now_ms else 0
            assert turns < 50, "it spins"
            self.relay.now_ms = end_ms if next_ms is None else min(max(next_ms, 0), end_ms)

    def go_down(self, error=errno.ECONNREFUSED):
        self.target.hold()
        self.happen(TargetDown(0, error))

    @property
    def probes(self):
        return [at_ms - START_MS for at_ms, _ in self.target.probes]


@pytest.fixture
def world(monkeypatch):
    put_in_place(monkeypatch)
    monkeypatch.setattr(datagrams, "is_guarded", lambda listener: True)
    monkeypatch.setattr(log.time, "monotonic", lambda: clock())  # noqa: PLW0108 - defined below
    worlds = []

    def make(*targets, timeout_ms=10_000, addresses=None, proxy=False):
        worlds.append(World(targets or (LOCAL,), timeout_ms, addresses, proxy))
        return worlds[-1]

    def clock():
        return worlds[-1].relay.now_ms / 1000 if worlds else 0

    return make


def refuse():
    return TargetDown(0, errno.ECONNREFUSED)


# ── the parts ─────────────────────────────────────────────────────────────────────────────────────


def test_listeners_with_one_target_share_an_upstream(world):
    one = world(LOCAL, "127.0.0.1:53", REMOTE)
    first, second, third = one.listeners
    assert first.datagram_upstream is not second.datagram_upstream  # not the same Target
    second.target = first.target
    again = DatagramPolicy(one.loop, one.listeners, None, None, proxy=False)
    assert first.datagram_upstream is second.datagram_upstream
    assert [upstream.text for upstream in again.upstreams] == [LOCAL, REMOTE]
    assert third.datagram_relay.target is again.upstreams[1].relay_target


def test_listeners_of_streams_are_left_alone(world):
    one = world(LOCAL)
    stream = Listener(-1, "y", sockaddr.pack_inet("127.0.0.1", 1))
    stream.target, stream.index = parse_target(LOCAL), 1
    policy = DatagramPolicy(one.loop, [*one.listeners, stream], None, None, proxy=False)
    policy.start()
    policy.stop()
    assert [listener.index for listener in policy.relay_part.listeners] == [0]


def test_any_port_is_the_port_of_the_listener(world):
    addresses = [sockaddr.pack_inet("127.0.0.1", port) for port in (1000, 2000)]
    one = world("10.0.0.1:*", "10.0.0.1:*", addresses=addresses)
    assert [upstream.text for upstream in one.policy.upstreams] == [
        "10.0.0.1:1000",
        "10.0.0.1:2000",
    ]
    assert one.target.addresses == [sockaddr.pack_inet("10.0.0.1", 1000)]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (LOCAL, f"udp:{LOCAL}"),
        (f"udp:{LOCAL}", f"udp:{LOCAL}"),
        ("udp:53", "udp:udp:53"),
        ("unix:53", "udp:unix:53"),
        ("/run/x", "unix-dgram:/run/x"),
        ("unix:/run/x", "unix-dgram:/run/x"),
        ("unix-dgram:@x", "unix-dgram:@x"),
    ],
)
def test_labels_tell_the_kind(world, text, label):
    assert world(text).upstream.label == label


def test_a_header_is_asked_for(world):
    assert world(proxy=True).fake.listeners[0].proxy
    assert not world().fake.listeners[0].proxy


def test_listeners_are_started_and_stopped(world):
    one = world(LOCAL, REMOTE)
    one.policy.start()
    assert [listener.accepting for listener in one.listeners] == [True, True]
    one.policy.stop()
    assert [listener.state for listener in one.fake.listeners] == ["stopped"] * 2
    one.policy.finish()
    assert [listener.state for listener in one.fake.listeners] == ["finished"] * 2


# ── a target that is down ─────────────────────────────────────────────────────────────────────────


def test_a_target_that_is_up_needs_nothing(world):
    one = world()
    one.policy.step(one.relay.now_ms)
    assert one.policy.next_ms() is None
    assert one.target.addresses == [sockaddr.pack_inet("127.0.0.1", 53)]


def test_a_target_on_this_host_is_probed_as_for_streams(world):
    one = world()
    one.go_down()
    one.run(1000, refuse)
    assert one.probes[:3] == [10, 20, 30]
    assert one.probes[-1] - one.probes[-2] == 250


def test_another_host_rations_its_errors(world):
    """Five quick probes, then one in 1.05 s: more would be met with silence."""
    one = world(REMOTE, timeout_ms=None)
    one.go_down()
    one.run(10_000, refuse)
    assert one.probes[QUICK_PROBES - 1] < 150
    later = one.probes[QUICK_PROBES - 1 :]
    assert all(b - a == SLOW_PROBE_MS for a, b in itertools.pairwise(later))
    assert len(later) > 8


def test_the_first_datagram_for_a_target_that_is_down_is_a_probe_at_once(world):
    one = world(timeout_ms=300)
    one.go_down()
    one.run(1000, refuse)
    assert len(one.target.drops) == 1
    one.target.hold()
    at_ms = one.ms
    one.happen(TargetHolds(0))
    assert one.probes[-1] == at_ms


def test_it_answers(world, logged_lines):
    one = world()
    one.go_down()
    one.run(500, refuse)
    one.target.held = one.target.held_since_ms = 0
    one.happen(TargetUp(0))
    assert one.policy.next_ms() is None
    assert logged_lines() == [
        f"{REFUSED}, holding datagrams until it answers.",
        f"{LOCAL} answers after 500ms.",
    ]


def test_all_are_dropped_after_the_timeout(world, logged_lines):
    one = world(timeout_ms=400)
    one.go_down()
    one.target.hold(7)
    one.run(2000, refuse)
    assert [at_ms - START_MS for at_ms in one.target.drops] == [400]
    assert logged_lines()[-1] == (
        f"Failed to reach remote host: Connection refused ({LOCAL}), dropping 7 datagrams."
    )
    assert one.policy.failed_ms == [START_MS + 400]
    assert not one.policy.holds


def test_without_a_timeout_they_wait_for_ever(world):
    one = world(timeout_ms=None)
    one.go_down()
    one.run(100_000, refuse)
    assert one.target.drops == []
    assert one.policy.holds


def test_with_a_timeout_of_0_none_is_held(world, logged_lines):
    one = world(timeout_ms=0)
    assert not one.target.holds
    one.happen(TargetDown(0, errno.ECONNREFUSED))
    assert one.policy.next_ms() is None
    assert logged_lines() == [
        f"Failed to reach remote host: Connection refused ({LOCAL}), dropping datagrams."
    ]


@pytest.mark.parametrize("error", [errno.EPROTOTYPE, errno.ENOTSOCK])
def test_an_error_that_cannot_pass(world, error):
    one = world("/run/x")
    one.go_down(error)
    assert len(one.target.drops) == 1
    assert one.probes == []


def test_a_missing_permission_is_logged_at_once(world, logged_levels):
    one = world()
    one.go_down(errno.EACCES)
    assert logged_levels() == [log.WARNING]


def test_a_target_that_was_reached_before_is_worth_a_warning(world, logged_levels):
    one = world()
    one.target.counts = totals(datagrams_to_targets=1)
    one.go_down()
    assert logged_levels() == [log.WARNING]


def test_a_cold_start_is_none_unless_it_lasts(world, logged_levels):
    one = world(timeout_ms=None)
    one.go_down()
    assert logged_levels() == [log.INFO]
    one.run(11_000, refuse)
    assert logged_levels() == [log.INFO, log.WARNING]


@pytest.mark.parametrize(
    ("text", "ours"),
    [("127.0.0.1:1", True), ("127.9.9.9:1", True), ("192.0.2.1:1", False), ("@x", True)],
)
def test_which_hosts_are_ours(text, ours):
    assert is_ours(parse_target(text).address) == ours


def test_without_a_socket_a_host_is_another_one(monkeypatch):
    def no_socket(*_):
        raise OSError(errno.EMFILE, "")

    monkeypatch.setattr(datagram_upstream._socket, "socket", no_socket)
    assert not is_ours(sockaddr.pack_inet("127.0.0.1", 1))


# ── names ─────────────────────────────────────────────────────────────────────────────────────────


def inet(last):
    return sockaddr.pack_inet(f"192.0.2.{last}", 0)


def there(last):
    return sockaddr.pack_inet(f"192.0.2.{last}", 53)


def gone():
    return socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_name_is_looked_up_for_the_first_datagram(world):
    one = world(NAME)
    one.policy.step(one.relay.now_ms)
    assert (one.names.asked, one.target.addresses) == (0, [])
    one.target.hold()
    one.happen(TargetHolds(0))
    assert (one.names.asked, one.probes) == (1, [])
    one.names.give([inet(1)])
    one.run(5)
    assert one.target.probes == [(one.target.probes[0][0], there(1))]


def test_each_address_of_a_name_gets_its_turn(world):
    one = world(NAME)
    one.names.answer = [inet(1), inet(2), inet(3)], None
    one.target.hold()
    one.happen(TargetHolds(0))
    one.fake.events.append(refuse())
    one.run(60, refuse)
    assert {address for _, address in one.target.probes} == {there(1), there(2), there(3)}


def test_a_name_that_does_not_exist_yet_is_looked_up_once_per_second(world, logged_lines):
    one = world(NAME, timeout_ms=None)
    one.names.answer = [], gone()
    one.target.hold()
    one.happen(TargetHolds(0))
    one.run(5000)
    assert 5 <= one.names.asked <= 7
    assert logged_lines() == [
        f"{UNKNOWN}, holding datagrams until it answers.",
    ]
    one.names.answer = [inet(1)], None
    one.run(1100)
    assert one.target.probes[0][1] == there(1)


def test_a_look_up_that_cannot_succeed_drops(world):
    one = world(NAME)
    one.names.answer = [], socket.gaierror(socket.EAI_FAMILY, "no")
    one.target.hold()
    one.happen(TargetHolds(0))
    assert len(one.target.drops) == 1


def test_with_a_timeout_of_0_the_look_up_is_the_attempt(world):
    one = world(NAME, timeout_ms=0)
    assert one.target.holds
    one.target.hold()
    one.happen(TargetHolds(0))
    one.names.give([inet(1)])
    one.run(5)
    assert one.target.probes
    assert not one.target.holds


def test_a_look_up_that_hangs_ends_with_the_timeout(world, logged_lines):
    one = world(NAME, timeout_ms=3000)
    one.target.hold()
    one.happen(TargetHolds(0))
    one.run(4000)
    assert len(one.target.drops) == 1
    assert "no answer yet" in logged_lines()[0]


def reached(one, last=1):
    """A target that is a name, and up, with a flow."""
    one.names.answer = [inet(last)], None
    one.target.hold()
    one.happen(TargetHolds(0))
    one.target.held = 0
    one.fake.flows = 1
    one.happen(TargetUp(0))


def test_while_datagrams_pass_the_name_is_looked_up(world):
    one = world(NAME)
    reached(one)
    asked = one.names.asked
    for _ in range(5):
        one.fake.last_ms = one.relay.now_ms
        one.run(REFRESH_MS)
    assert 4 <= one.names.asked - asked <= 6
    assert one.target.addresses == [there(1)]


def test_without_datagrams_it_is_not(world):
    one = world(NAME)
    reached(one)
    one.run(REFRESH_MS)
    asked = one.names.asked
    one.run(10 * REFRESH_MS)
    assert one.names.asked == asked
    one.fake.flows = 0
    one.run(REFRESH_MS)
    assert one.policy.next_ms() is None


def test_a_new_address_is_followed(world):
    one = world(NAME)
    reached(one)
    one.names.answer = [inet(2), inet(1)], None
    one.fake.last_ms = one.relay.now_ms
    one.run(2 * REFRESH_MS)
    assert one.target.addresses == [there(1)]  # it is still one of the name's
    one.names.answer = [inet(2), inet(3)], None
    one.fake.last_ms = one.relay.now_ms
    one.run(2 * REFRESH_MS)
    assert one.target.addresses == [there(1), there(2)]


def test_a_name_that_is_gone_has_no_address(world):
    """Its address may be another service's by now."""
    one = world(NAME)
    reached(one)
    one.names.answer = [], gone()
    one.fake.last_ms = one.relay.now_ms
    one.run(2 * REFRESH_MS)
    assert one.target.addresses == [there(1), None]


def test_a_literal_address_is_never_refreshed(world):
    one = world()
    one.fake.flows = 5
    one.policy.step(one.relay.now_ms)
    assert one.policy.next_ms() is None
    assert not one.policy.needs_first_flow()
    assert world(NAME).policy.needs_first_flow()


# ── events ────────────────────────────────────────────────────────────────────────────────────────


def test_a_refusal_is_logged(world, logged_lines):
    one = world()
    one.happen(FlowsRefused(0, 3, CLIENT), FlowsRefused(0, 4, b""))
    assert (one.policy.refused, one.policy.refused_ms) == (7, START_MS)
    assert logged_lines() == ["Hit connection limit, refusing datagram. Client: 192.0.2.7:4321."]


def test_a_refusal_at_the_limit_of_a_source_is_logged(world, logged_lines):
    one = world()
    one.happen(FlowsRefused(0, 3, CLIENT, True))
    assert (one.policy.refused, one.policy.refused_ms) == (3, START_MS)
    assert logged_lines() == [
        "Hit connection limit of a source, refusing datagram. Client: 192.0.2.7:4321."
    ]


def test_a_loop_is_logged(world, logged_lines):
    one = world()
    one.happen(LoopFound(0, 1, CLIENT))
    assert logged_lines() == [
        f"Refusing datagram: target {LOCAL} leads back to our own listener udp:127.0.0.1:1000."
    ]


def test_a_lack_of_sockets_is_logged(world, logged_lines):
    one = world()
    one.happen(FlowFailed(0, errno.EMFILE, 5))
    assert logged_lines() == [
        "Failed to open a socket for datagrams: Too many open files. Dropping them."
    ]


def test_a_broken_listener(world, logged_lines):
    one = world()
    one.policy.start()
    one.happen(ListenerFailed(0, errno.EBADF))
    assert (one.listeners[0].broken, one.listeners[0].accepting) == (True, False)
    assert logged_lines() == ["Failed to receive from udp:127.0.0.1:1000: Bad file descriptor."]


def test_flows_are_told_to_those_who_want_to_know(world):
    one = world()
    told = []
    one.policy.on_flow = lambda info, how: told.append((info.flow, how))
    one.policy.report(wanted=True)
    assert one.fake.report_flows
    one.happen(FlowBegun(flow_info(5)), FlowEnded(flow_info(5), "expired"))
    assert told == [(5, None), (5, "expired")]
    one.policy.report(wanted=False)
    assert not one.fake.report_flows


# ── the end ───────────────────────────────────────────────────────────────────────────────────────


def test_while_it_drains_flows_count_until_they_are_quiet(world):
    one = world()
    one.policy.start()
    one.fake.flows = 2
    one.fake.last_ms = one.relay.now_ms - 100
    assert (one.policy.quiet_flows, one.policy.next_ms()) == (0, None)
    one.policy.stop()
    assert one.policy.quiet_flows == 0
    assert one.policy.next_ms() == START_MS + QUIET_MS
    one.relay.now_ms += 900
    one.fake.last_ms = one.relay.now_ms
    one.relay.now_ms += 999
    assert one.policy.quiet_flows == 0
    one.relay.now_ms += 1
    assert one.policy.quiet_flows == 2


def test_what_is_held_is_not_waited_for_after_the_stop(world):
    one = world()
    one.policy.start()
    one.go_down()
    assert one.policy.holds
    one.policy.stop()
    assert not one.policy.holds
    before = len(one.target.probes)
    one.relay.now_ms += 1000
    one.policy.step(one.relay.now_ms)
    assert len(one.target.probes) == before


@pytest.mark.parametrize(
    ("flows", "held", "line"),
    [
        (2, 0, ["Stopped; 2 flows were cut, 0 held datagrams were lost."]),
        (1, 1, ["Stopped; 1 flow was cut, 1 held datagram was lost."]),
        (0, 0, []),
    ],
)
def test_the_end_is_logged(world, logged_lines, flows, held, line):
    one = world()
    one.fake.flows = one.relay.connections = flows
    one.target.held = held
    one.policy.end()
    assert one.fake.flows == 0
    assert logged_lines() == line


# ── numbers ───────────────────────────────────────────────────────────────────────────────────────


def status(one):
    acceptor = SimpleNamespace(refusals=Refusals(one.relay), awaiting_header=0)
    return stats.status(acceptor, one.relay, [], one.policy)


def test_status(world):
    one = world()
    one.relay.connections_max = 256
    one.relay.connections, one.fake.flows = 15, 12
    one.fake.counts = totals(bytes_to_targets=1000, bytes_to_clients=24)
    assert status(one) == "3 connections, 12 flows, 1.0K forwarded"
    one.relay.connections_max = 15
    assert status(one).startswith("3 connections, 12 flows (limit 15), ")
    one.fake.counts = totals(dropped={"too large": 2}, kernel_dropped=3)
    assert status(one).endswith(", 5 datagrams dropped")
    one.happen(FlowsRefused(0, 1, b""))
    one.relay.now_ms += 4000
    assert status(one).endswith("5 datagrams dropped, refused at the limit, last 4 s ago")


def test_status_of_a_target_that_is_down(world, monkeypatch):
    one = world()
    one.relay.connections_max = 256
    monkeypatch.setattr(stats, "clock_text", lambda when_ms, now_ms: "03:04:11")
    one.go_down()
    waits = f"datagrams waiting for {LOCAL}, down since 03:04:11 (Connection refused)"
    assert status(one) == f"0 connections, 0 flows, {waits}, 0B forwarded"
    one.fake.counts = totals(dropped={"target down": 1})
    one.run(10_100, refuse)
    assert status(one).endswith("1 datagrams dropped, last 0 s ago (Connection refused)")


def test_status_while_it_drains(world):
    one = world()
    one.relay.connections, one.fake.flows = 3, 1
    acceptor = SimpleNamespace(awaiting_header=0)
    assert stats.draining(acceptor, one.relay, [], None, one.policy) == (
        "Draining: 2 connections, 1 flow left"
    )


def test_the_summary_has_a_line_for_all_and_one_for_each_target(world):
    one = world(LOCAL, "/run/x")
    refusals = Refusals(one.relay)
    acceptor = SimpleNamespace(
        refusals=refusals, passed_in=0, kept=0, taken_over=0, awaiting_header=0, cut=0
    )
    one.relay.connections = one.fake.flows = 1
    one.fake.counts = totals(
        flows=3, endings={"expired": 2}, datagrams_to_targets=9, bytes_to_targets=90
    )
    one.fake.targets[1].counts = totals(flows=1, dropped={"at the limit": 4}, kernel_dropped=1)
    first, *lines = stats.summary(acceptor, one.relay, [], one.policy)
    assert first.startswith("0 accepted, 0 open, ")
    some = "9 datagrams (90 bytes) to targets, 0 (0 bytes) to clients"
    none = "0 datagrams (0 bytes) to targets, 0 (0 bytes) to clients"
    assert lines == [
        f"3 flows begun, 1 open, 2 expired; {some}; dropped: none",
        f"udp:{LOCAL}: 0 flows begun; {none}; dropped: none",
        f"unix-dgram:/run/x: 1 flows begun; {none}; dropped: 4 at the limit, 1 by the kernel",
    ]
    (line,) = stats.totals(acceptor, one.relay, [], one.policy)
    assert line == f"Totals: {lines[0]}."


# ── fixtures ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def logged(monkeypatch):
    """[(level, text)] of all lines."""
    lines = []
    log._repeats.clear()
    monkeypatch.setattr(log, "_log", lambda level, text, fields=None: lines.append((level, text)))
    return lines


@pytest.fixture
def logged_lines(logged):
    return lambda: [text for level, text in logged if level < log.DEBUG]


@pytest.fixture
def logged_levels(logged):
    return lambda: [level for level, _ in logged]
