"""What the service manager hears, and when."""

import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import notify
from proxyd.manager import EXTEND_BY_USEC, EXTEND_EVERY_MS, STATUS_MS, Manager
from proxyd.notify import Notifier


class Relay:
    """Whose threads are alive, or not."""

    def __init__(self):
        self.now_ms = 0
        self.answered = True
        self.asked = 0

    def ask(self):
        self.asked += 1


class World:
    """A Manager, the clock and the status it shows."""

    def __init__(self, notifier, hear):
        self.now_ms = 0
        self.text = "0 connections"
        self.hear = hear
        self.relay = Relay()
        self.manager = Manager(notifier, lambda: self.text, self.relay)

    def run(self, until_ms, busy=False):
        """Let time go by; tick() is called when it is asked for. What was heard, and when."""
        self.manager.tick(self.now_ms, busy)  # something has happened
        heard = [(self.now_ms, text) for text in self.hear()]
        while True:
            next_ms = self.manager.next_ms()
            if next_ms is None or next_ms > until_ms:
                break
            assert next_ms >= self.now_ms
            self.now_ms = next_ms
            self.manager.tick(self.now_ms, busy)
            assert self.manager.next_ms() is None or self.manager.next_ms() > self.now_ms
            heard += [(self.now_ms, text) for text in self.hear()]
        self.now_ms = until_ms
        self.manager.tick(until_ms, busy)
        return heard + [(self.now_ms, text) for text in self.hear()]


@pytest.fixture
def world(tmp_path):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "notify"))
    sock.setblocking(False)

    def hear():
        heard = []
        while True:
            try:
                heard.append(sock.recv(4096).decode())
            except BlockingIOError:
                return heard

    def make(wanted=True, **environ):
        environ |= {"NOTIFY_SOCKET": sock.getsockname()} if wanted else {}
        notifiers.append(Notifier(environ))
        return World(notifiers[-1], hear)

    notifiers = []
    yield make
    for one in (sock, *notifiers):
        one.close()


def test_ready_with_a_status(world):
    one = world()
    one.manager.ready()
    assert one.hear() == ["READY=1\nSTATUS=0 connections"]


def test_nobody_listens(world):
    one = world(wanted=False, WATCHDOG_USEC="1000")
    one.manager.ready()
    one.manager.stopping(0, waits=True)
    assert not one.manager.wanted
    one.manager.tick(0, busy=True)
    assert one.manager.next_ms() is None
    assert one.hear() == []


# ── STATUS= ──────────────────────────────────────────────────────────────────────────────────────


def test_an_idle_manager_sleeps(world):
    one = world()
    one.manager.ready()
    one.hear()
    assert one.run(3_600_000) == []
    assert one.manager.next_ms() is None


def test_status_is_sent_once_in_two_seconds_at_most(world):
    one = world()
    one.manager.ready()
    one.hear()
    heard = []
    for now_ms in range(0, 10_000, 100):
        one.text = f"{now_ms} bytes"
        heard += one.run(now_ms, busy=True)
    assert [at for at, _ in heard] == [2000, 4000, 6000, 8000]
    assert STATUS_MS == 2000
    assert heard[0] == (2000, "STATUS=2000 bytes")


def test_status_that_says_nothing_new_is_not_sent(world):
    one = world()
    one.manager.ready()
    one.hear()
    one.text = "1 connection"
    assert one.run(60_000, busy=True) == [(2000, "STATUS=1 connection")]


def test_the_last_status_is_sent_after_the_last_connection(world):
    one = world()
    one.manager.ready()
    one.hear()
    one.text = "1 connection"
    one.run(4500, busy=True)
    one.text = "0 connections, 5.0M forwarded"
    assert one.run(60_000, busy=False) == [(6000, "STATUS=0 connections, 5.0M forwarded")]
    assert one.manager.next_ms() is None


def test_what_ready_has_said_is_not_said_again(world):
    one = world()
    one.manager.ready()
    one.hear()
    assert one.run(60_000, busy=True) == []


# ── WATCHDOG= ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("usec", "every_ms"), [(3_000_000, 1500), (20_000, 10), (1000, 1)])
def test_watchdog_at_half_the_interval(world, usec, every_ms):
    one = world(WATCHDOG_USEC=str(usec), WATCHDOG_PID=str(os.getpid()))
    heard = one.run(10 * every_ms)
    assert heard == [(number * every_ms, "WATCHDOG=1") for number in range(1, 11)]


def test_watchdog_is_not_sent_oftener_on_a_busy_proxy(world):
    one = world(WATCHDOG_USEC="2000000")
    heard = []
    for now_ms in range(0, 3001, 10):
        heard += one.run(now_ms, busy=True)
    assert [at for at, text in heard if text == "WATCHDOG=1"] == [1000, 2000, 3000]


def test_watchdog_goes_on_while_connections_finish(world):
    one = world(WATCHDOG_USEC="2000000")
    one.manager.stopping(0, waits=True)
    heard = one.run(3000, busy=True)
    assert [at for at, text in heard if text == "WATCHDOG=1"] == [1000, 2000, 3000]


def test_a_thread_that_does_not_answer_stops_the_watchdog(world):
    one = world(WATCHDOG_USEC="2000000")
    assert one.relay.asked == 1
    assert one.run(1000) == [(1000, "WATCHDOG=1")]
    assert one.relay.asked == 2
    one.relay.answered = False
    assert one.run(10_000) == []
    assert one.relay.asked == 2  # not again before there is an answer
    one.relay.answered = True
    ((at, text),) = one.run(10_200)
    assert (at, text) == (10_125, "WATCHDOG=1")  # looked again soon
    assert one.relay.asked == 3


def test_no_thread_is_asked_without_a_watchdog(world):
    one = world()
    one.run(60_000)
    assert one.relay.asked == 0


def test_a_watchdog_of_another_process(world):
    one = world(WATCHDOG_USEC="2000000", WATCHDOG_PID="1")
    assert one.run(60_000) == []


@given(st.integers(1, 10**8))
def test_the_watchdog_is_fed_in_time(usec):
    """However small the interval: at half of it, or as often as the clock can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notify.Notifier, "watchdog", lambda self: True)
        notifier = Notifier({"NOTIFY_SOCKET": "@nobody", "WATCHDOG_USEC": str(usec)})
        manager = Manager(notifier, str, Relay())
        first = manager.next_ms()
        assert first == 1 or first * 2000 <= usec
        manager.tick(first, False)
        assert manager.next_ms() == 2 * first
        notifier.close()


# ── STOPPING= ────────────────────────────────────────────────────────────────────────────────────


def test_stopping_at_once(world):
    one = world()
    one.manager.stopping(0, waits=False)
    assert one.hear() == ["STOPPING=1"]
    assert one.run(60_000) == []


def test_the_stop_timeout_is_put_off_while_connections_finish(world):
    one = world()
    one.manager.stopping(500, waits=True)
    assert one.hear() == ["STOPPING=1"]
    one.now_ms = 500
    one.text = ""
    heard = [(at, text) for at, text in one.run(35_000) if text.startswith("EXTEND")]
    assert [at for at, _ in heard] == [500, 10_500, 20_500, 30_500]
    assert {text for _, text in heard} == {"EXTEND_TIMEOUT_USEC=30000000"}
    # The next one comes well before the last one's time is over.
    assert EXTEND_EVERY_MS * 1000 * 2 < EXTEND_BY_USEC
