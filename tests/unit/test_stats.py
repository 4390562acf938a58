"""The numbers in STATUS=, SIGUSR1's lines and the debug log."""

import errno
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.fake_relay import FakeRelay

from proxyd import stats
from proxyd._relay import Ended, Relay
from proxyd.refusals import Refusals
from proxyd.sizes import bytes_text
from proxyd.stats import draining, ending, status, summary

M = 1024 * 1024
NOW_MS = 7_000_000


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0B"),
        (1, "1B"),
        (999, "999B"),
        (1000, "1.0K"),
        (1024, "1.0K"),
        (1536, "1.5K"),
        (10 * 1024, "10.0K"),
        (100 * 1024, "100K"),
        (M, "1.0M"),
        (1288490189, "1.2G"),
        (5 * M * M, "5.0T"),
        (2**60, "1.0E"),
        (2**64 - 1, "16.0E"),
    ],
)
def test_bytes_text(count, text):
    assert bytes_text(count) == text


@given(st.integers(0, 2**64 - 1))
def test_bytes_text_is_short(count):
    assert len(bytes_text(count)) <= 6


def relay(connections=0, **counters):
    """A relay with these counters."""
    made = FakeRelay(start_ms=NOW_MS)
    made.connections = connections
    made.connections_max = 256
    for name, count in counters.items():
        assert hasattr(made, name)
        setattr(made, name, count)
    return made


class Held(list):
    """Held clients, and how others of them have ended."""

    def __init__(self, count, failed, gone, cut):
        super().__init__(range(count))
        self.failed, self.gone, self.cut = failed, gone, cut
        self.failed_ms, self.failed_why = None, ""


def upstream(group, held=0, waiting=None, connected=0, failed=0, gone=0, cut=0):
    return SimpleNamespace(
        group=group,
        text=group,
        outage=SimpleNamespace(up=True, since_ms=None, why=""),
        held=Held(held, failed, gone, cut),
        waiting=held if waiting is None else waiting,
        connected=connected,
    )


def acceptor(refused=0, **fields):
    refusals = Refusals(relay())
    refusals.count = refused
    usual = {"passed_in": 0, "taken_over": 0, "kept": 0, "awaiting_header": 0, "cut": 0}
    for name in fields.keys() - usual.keys():
        setattr(refusals, name, fields.pop(name))
    return SimpleNamespace(refusals=refusals, **usual | fields)


def test_status():
    upstreams = [upstream("127.0.0.1:8080", held=1), upstream("/run/x")]
    busy = relay(3, bytes_to_targets=700 * M, bytes_to_clients=512 * M)
    assert status(acceptor(), busy, upstreams) == (
        "3 connections, 1 waiting for 127.0.0.1:8080, 1.2G forwarded"
    )


def test_status_of_one_and_of_none():
    assert status(acceptor(), relay(1), []) == "1 connection, 0B forwarded"
    assert status(acceptor(), relay(0), []) == "0 connections, 0B forwarded"


def test_a_client_that_waits_for_a_prompt_look_up_is_a_connection_already():
    upstreams = [upstream("a:1", held=2, waiting=0), upstream("b:2", held=3)]
    assert (
        status(acceptor(), relay(1), upstreams) == "3 connections, 3 waiting for b:2, 0B forwarded"
    )


def test_status_of_several_targets():
    upstreams = [upstream("a:1", held=1), upstream("b:2"), upstream("c:3", held=12)]
    assert status(acceptor(), relay(), upstreams) == (
        "0 connections, 1 waiting for a:1, 12 waiting for c:3, 0B forwarded"
    )


def test_status_at_the_limit():
    assert status(acceptor(), relay(256), []) == "256 connections (limit 256), 0B forwarded"
    held = [upstream("a:1", held=6)]
    assert status(acceptor(), relay(250), held) == (
        "250 connections (limit 256), 6 waiting for a:1, 0B forwarded"
    )


def test_status_while_clients_are_refused():
    line = status(acceptor(1, limit_ms=NOW_MS - 12_900), relay(3, refused=40), [])
    assert line == "3 connections, 0B forwarded, 41 refused at the limit, last 12 s ago"


def test_status_of_clients_refused_long_ago():
    """Nothing would keep it true how long ago that was."""
    line = status(acceptor(limit_ms=NOW_MS - 60_000), relay(refused=40), [])
    assert line == "0 connections, 0B forwarded, 40 refused at the limit"


def test_status_while_clients_are_refused_by_source():
    busy = relay(3, refused=40, refused_by_source=30)
    line = status(acceptor(1, source_limit_ms=NOW_MS - 5000), busy, [])
    assert line == (
        "3 connections, 0B forwarded, 11 refused at the limit, "
        "30 refused at the limit of their source, last 5 s ago"
    )


def test_status_of_clients_without_an_address():
    line = status(acceptor(2, unknown=2), relay(), [])
    assert line == "0 connections, 0B forwarded, 2 refused without an address to announce"


def test_status_of_clients_without_a_header():
    """Those that may still send one are connections."""
    waiting = acceptor(2, headerless=2, headerless_ms=NOW_MS - 3000, awaiting_header=3)
    assert status(waiting, relay(1), []) == (
        "4 connections, 0B forwarded, 2 refused without a PROXY header, last 3 s ago"
    )


def test_status_of_a_target_that_is_down(monkeypatch):
    monkeypatch.setattr(stats.time, "time", lambda: 1_800_000_000.0)
    since = time.strftime("%H:%M:%S", time.localtime(1_800_000_000 - 90))
    down = upstream("a:1", held=2)
    why = "Failed to connect to remote host: Connection refused (a:1)"
    down.outage = SimpleNamespace(up=False, since_ms=NOW_MS - 90_000, why=why)
    assert status(acceptor(), relay(), [upstream("b:2"), down]) == (
        f"0 connections, 2 waiting for a:1, down since {since} (Connection refused), 0B forwarded"
    )


def test_status_of_clients_given_up():
    one, other = upstream("a:1", failed=4), upstream("b:2", failed=8)
    one.held.failed_ms, one.held.failed_why = NOW_MS - 9000, "not this"
    other.held.failed_ms = NOW_MS - 3000
    other.held.failed_why = "Failed to connect to remote host: Connection refused (b:2)"
    assert status(acceptor(), relay(), [one, other]) == (
        "0 connections, 0B forwarded, 12 failed, last 3 s ago (Connection refused)"
    )


def test_status_while_connections_drain(monkeypatch):
    monkeypatch.setattr(stats.time, "time", lambda: 1_800_000_000.0)
    until = time.strftime("%H:%M:%S", time.localtime(1_800_000_005))
    assert draining(acceptor(), relay(1), [upstream("a:1", held=1)], NOW_MS + 5000) == (
        f"Draining: 2 connections left, until {until}"
    )
    assert draining(acceptor(), relay(1), [], None) == "Draining: 1 connection left"
    waiting = acceptor(awaiting_header=2)
    assert draining(waiting, relay(1), [], None) == "Draining: 3 connections left"


def test_status_is_short_and_printable_whatever_the_targets_are_called():
    """sd_notify(3) drops a message of more than 4096 bytes, or that is not UTF-8."""
    upstreams = [upstream(f"/run/{n}\udcff\n" + "é" * 500, held=1) for n in range(20)]
    line = status(acceptor(), relay(), upstreams)
    assert "12 waiting for 12 other targets" in status(
        acceptor(), relay(), [upstream(f"/{n}", held=1) for n in range(20)]
    )
    assert len(f"STATUS={line}".encode()) <= 4096
    assert line.isprintable()
    assert "\\xff" in line


def test_summary():
    one = upstream("a:1", held=2, connected=13, failed=1)
    other = upstream("b:2", connected=6, failed=4)
    numbers = relay(
        3,
        bytes_to_targets=10,
        bytes_to_clients=20,
        accepted=30,
        refused=2,
        spliced=25,
        copied=5,
        endings={"ended": 7, "reset": 1, "client gone": 2},
    )
    lines = summary(acceptor(1), numbers, [one, other])
    assert lines[0] == (
        "30 accepted, 3 open, 2 waiting, 3 refused, 5 failed; "
        "10 bytes to targets, 20 bytes to clients, 25 spliced, 5 copied; "
        "7 ended, 1 reset, 2 client gone"
    )
    assert lines[1:] == [
        "a:1: 13 served, 2 waiting, 1 failed",
        "b:2: 6 served, 0 waiting, 4 failed",
    ]


def test_held_clients_that_have_ended_count_with_the_others():
    one, other = upstream("a:1", gone=2, cut=5), upstream("b:2", gone=1)
    (line, *_) = summary(acceptor(), relay(endings={"cut": 1, "client gone": 4}), [one, other])
    assert line.endswith("; 6 cut, 7 client gone")


def test_clients_without_a_header_wait_and_are_cut():
    (line, *_) = summary(acceptor(awaiting_header=2, cut=3), relay(), [])
    assert "0 open, 2 waiting, " in line
    assert line.endswith("; 3 cut")


def test_summary_with_threads():
    lines = summary(acceptor(), relay(thread_count=3, handed_over=70), [upstream("a:1")])
    assert lines[1:] == [
        "a:1: 0 served, 0 waiting, 0 failed",
        "3 threads, 70 connections handed over",
    ]


def test_summary_before_anything_has_happened():
    (line,) = summary(acceptor(), relay(), [])
    assert line == (
        "0 accepted, 0 open, 0 waiting, 0 refused, 0 failed; "
        "0 bytes to targets, 0 bytes to clients, 0 spliced, 0 copied; none ended"
    )


def test_the_real_relay_has_these_counters():
    real = Relay()
    real.connections_max = 256
    assert status(acceptor(), real, []) == "0 connections, 0B forwarded"
    assert summary(acceptor(), real, [])[0].endswith("none ended")


@pytest.mark.parametrize(
    ("name", "errors", "words"),
    [
        ("ended", (0, 0), "ended."),
        ("reset", (errno.ECONNRESET, 0), "reset (client: Connection reset by peer)."),
        ("reset", (0, errno.EPIPE), "reset (target: Broken pipe)."),
        (
            "reset",
            (errno.ECONNRESET, errno.EPIPE),
            "reset (client: Connection reset by peer, target: Broken pipe).",
        ),
        ("idle", (0, 0), "idle."),
        ("cut", (0, 0), "cut."),
        ("client gone", (0, 0), "client gone."),
    ],
)
def test_ending(name, errors, words):
    line = ending("1.2.3.4:5 → /run/x", Ended(9, name, 10, 2000, 31, *errors))
    assert line == f"1.2.3.4:5 → /run/x: 10 bytes up, 2000 bytes down in 31 ms, {words}"
