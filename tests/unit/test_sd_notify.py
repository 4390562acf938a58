"""What the service manager hears, and when."""

import os
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.fake_relay import FakeRelay

from proxyd.sd_notify import (
    EXTEND_BY_USEC,
    EXTEND_EVERY_MS,
    RETRY_GONE_MS_MAX,
    RETRY_MS,
    RETRY_MS_MAX,
    STATUS_MS,
    Notifier,
    NotifySocket,
)

FILLER = "STATUS=of another service"


class World:
    """A Notifier, its clock, and the status that it sends."""

    def __init__(self, sock, hear, fill):
        self.now_ms = 0
        self.text = "0 connections"
        self.hear = hear
        self.fill = fill
        """Fills the queue of the service manager, as other services do."""
        self.relay = FakeRelay()
        self.notifier = Notifier(sock, lambda: self.text, self.relay)

    def run(self, until_ms, busy=False):
        """Let time pass, with a tick() whenever it is due; return what was heard, and when."""
        self.notifier.tick(self.now_ms, busy)  # something has happened
        heard = [(self.now_ms, text) for text in self.hear()]
        while True:
            next_ms = self.notifier.next_ms()
            if next_ms is None or next_ms > until_ms:
                break
            assert next_ms >= self.now_ms
            self.now_ms = next_ms
            self.notifier.tick(self.now_ms, busy)
            assert self.notifier.next_ms() is None or self.notifier.next_ms() > self.now_ms
            heard += [(self.now_ms, text) for text in self.hear()]
        self.now_ms = until_ms
        self.notifier.tick(until_ms, busy)
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
                return [text for text in heard if text != FILLER]

    def fill():
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as others:
            others.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    others.sendto(FILLER.encode(), sock.getsockname())

    def make(wanted=True, **environ):
        environ |= {"NOTIFY_SOCKET": sock.getsockname()} if wanted else {}
        sockets.append(NotifySocket(environ))
        return World(sockets[-1], hear, fill)

    sockets = []
    yield make
    for one in (sock, *sockets):
        one.close()


def test_ready_contains_a_status(world):
    one = world()
    one.notifier.ready()
    assert one.hear() == ["READY=1\nSTATUS=0 connections"]


def test_without_a_service_manager(world):
    one = world(wanted=False, WATCHDOG_USEC="1000")
    one.notifier.ready()
    one.notifier.stopping(0, waits=True)
    assert not one.notifier.enabled
    one.notifier.tick(0, busy=True)
    assert one.notifier.next_ms() is None
    assert one.hear() == []


# ── STATUS= ───────────────────────────────────────────────────────────────────────────────────────


def test_without_connections_nothing_is_sent(world):
    one = world()
    one.notifier.ready()
    one.hear()
    assert one.run(3_600_000) == []
    assert one.notifier.next_ms() is None


def test_status_is_sent_once_in_two_seconds_at_most(world):
    one = world()
    one.notifier.ready()
    one.hear()
    heard = []
    for now_ms in range(0, 10_000, 100):
        one.text = f"{now_ms} bytes"
        heard += one.run(now_ms, busy=True)
    assert [at for at, _ in heard] == [2000, 4000, 6000, 8000]
    assert STATUS_MS == 2000
    assert heard[0] == (2000, "STATUS=2000 bytes")


def test_an_unchanged_status_is_not_sent_again(world):
    one = world()
    one.notifier.ready()
    one.hear()
    one.text = "1 connection"
    assert one.run(60_000, busy=True) == [(2000, "STATUS=1 connection")]


def test_a_last_status_is_sent_after_the_last_connection(world):
    one = world()
    one.notifier.ready()
    one.hear()
    one.text = "1 connection"
    one.run(4500, busy=True)
    one.text = "0 connections, 5.0M forwarded"
    assert one.run(60_000, busy=False) == [(6000, "STATUS=0 connections, 5.0M forwarded")]
    assert one.notifier.next_ms() is None


def test_the_status_in_ready_is_not_repeated(world):
    one = world()
    one.notifier.ready()
    one.hear()
    assert one.run(60_000, busy=True) == []


# ── WATCHDOG= ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("usec", "every_ms"), [(3_000_000, 1500), (20_000, 10), (1000, 1)])
def test_watchdog_at_half_the_interval(world, usec, every_ms):
    one = world(WATCHDOG_USEC=str(usec), WATCHDOG_PID=str(os.getpid()))
    heard = one.run(10 * every_ms)
    assert heard == [(number * every_ms, "WATCHDOG=1") for number in range(1, 11)]


def test_watchdog_is_not_sent_more_often_by_a_busy_proxy(world):
    one = world(WATCHDOG_USEC="2000000")
    heard = []
    for now_ms in range(0, 3001, 10):
        heard += one.run(now_ms, busy=True)
    assert [at for at, text in heard if text == "WATCHDOG=1"] == [1000, 2000, 3000]


def test_watchdog_goes_on_while_connections_finish(world):
    one = world(WATCHDOG_USEC="2000000")
    one.notifier.stopping(0, waits=True)
    heard = one.run(3000, busy=True)
    assert [at for at, text in heard if text == "WATCHDOG=1"] == [1000, 2000, 3000]


def test_a_thread_that_does_not_answer_stops_the_watchdog(world):
    one = world(WATCHDOG_USEC="2000000")
    assert one.relay.pings == 1
    assert one.run(1000) == [(1000, "WATCHDOG=1")]
    assert one.relay.pings == 2
    one.relay.workers_answered = False
    assert one.run(10_000) == []
    assert one.relay.pings == 2  # no second ping before there is an answer
    one.relay.workers_answered = True
    ((at, text),) = one.run(10_200)
    assert (at, text) == (10_125, "WATCHDOG=1")  # checked again soon
    assert one.relay.pings == 3


def test_no_thread_is_pinged_without_a_watchdog(world):
    one = world()
    one.run(60_000)
    assert one.relay.pings == 0


def test_a_watchdog_of_another_process(world):
    one = world(WATCHDOG_USEC="2000000", WATCHDOG_PID="1")
    assert one.run(60_000) == []


@given(st.integers(1, 10**8))
def test_the_watchdog_is_fed_in_time(usec):
    """However small the interval: at half of it, or as often as the clock can."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NotifySocket, "watchdog", lambda self: True)
        sock = NotifySocket({"NOTIFY_SOCKET": "@nobody", "WATCHDOG_USEC": str(usec)})
        notifier = Notifier(sock, str, FakeRelay())
        first = notifier.next_ms()
        assert first == 1 or first * 2000 <= usec
        notifier.tick(first, False)
        assert notifier.next_ms() == 2 * first
        sock.close()


# ── STOPPING= ─────────────────────────────────────────────────────────────────────────────────────


def test_stopping_is_sent_at_once(world):
    one = world()
    one.notifier.stopping(0, waits=False)
    assert one.hear() == ["STOPPING=1"]
    assert one.run(60_000) == []


def test_the_stop_timeout_is_put_off_while_connections_finish(world):
    one = world()
    one.notifier.stopping(500, waits=True)
    assert one.hear() == ["STOPPING=1"]
    one.now_ms = 500
    one.text = ""
    heard = [(at, text) for at, text in one.run(35_000) if text.startswith("EXTEND")]
    assert [at for at, _ in heard] == [500, 10_500, 20_500, 30_500]
    assert {text for _, text in heard} == {"EXTEND_TIMEOUT_USEC=30000000"}
    # The next one comes well before the last one's time is over.
    assert EXTEND_EVERY_MS * 1000 * 2 < EXTEND_BY_USEC


# ── a service manager that is busy ────────────────────────────────────────────────────────────────


def wait(one, until_ms, busy=False):
    """Let time pass while nothing is read; return when tick() was due."""
    asked = []
    while (next_ms := one.notifier.next_ms()) is not None and next_ms <= until_ms:
        one.now_ms = next_ms
        asked.append(next_ms)
        one.notifier.tick(next_ms, busy)
        assert one.notifier.next_ms() is None or one.notifier.next_ms() > next_ms
    one.now_ms = until_ms
    return asked


def test_ready_is_repeated_until_it_is_sent(world):
    one = world()
    one.fill()
    one.notifier.ready()
    asked = wait(one, 10_000)
    pauses = [after - before for before, after in zip([0, *asked], asked, strict=False)]
    assert pauses[:4] == [RETRY_MS, 2 * RETRY_MS, 4 * RETRY_MS, 8 * RETRY_MS]
    assert max(pauses) == RETRY_MS_MAX
    assert one.hear() == []
    ((_, text),) = one.run(one.notifier.next_ms())
    assert text == "READY=1\nSTATUS=0 connections"
    assert one.run(one.now_ms + 60_000) == []
    assert one.notifier.next_ms() is None


def test_each_message_is_kept_once_and_sent_in_order(world):
    one = world(WATCHDOG_USEC="60000000")
    one.fill()
    one.notifier.ready()
    for number in range(3):
        one.text = f"{number} connections"
        wait(one, 40_000 + number, busy=True)
    one.notifier.stopping(one.now_ms, waits=True)
    wait(one, 60_000, busy=True)
    one.text = "the last status"
    wait(one, 70_000, busy=True)
    one.hear()
    said = [text for _, text in one.run(one.notifier.next_ms(), busy=True)]
    assert said == [
        "READY=1\nSTATUS=0 connections",
        "STOPPING=1",
        "WATCHDOG=1",
        f"EXTEND_TIMEOUT_USEC={EXTEND_BY_USEC}",
        "STATUS=the last status",
    ]


def test_a_pause_begins_short_again(world):
    one = world()
    one.fill()
    one.notifier.ready()
    wait(one, 10_000)
    one.hear()
    one.run(20_000)
    one.fill()
    one.notifier.stopping(20_000, waits=True)
    assert one.notifier.next_ms() in (20_000, 20_000 + RETRY_MS)


@pytest.mark.parametrize("interval_ms", [1, 20, 1000, 30_000])
def test_watchdog_is_sent_as_soon_as_there_is_room(world, interval_ms):
    """Within an eighth of the time that is left for it, and in time if there is room in time."""
    one = world(WATCHDOG_USEC=str(interval_ms * 1000))
    half = max(interval_ms // 2, 1)
    one.fill()
    wait(one, half)
    one.hear()
    heard = one.run(2 * half)
    assert heard[0][1] == "WATCHDOG=1"
    assert heard[0][0] <= half + -(-half // 8)


def test_watchdog_that_could_not_be_sent_in_time_is_logged(world, capfd):
    one = world(WATCHDOG_USEC="2000000")
    one.fill()
    wait(one, 1999)
    assert capfd.readouterr().err == ""
    wait(one, 9000)
    (line,) = capfd.readouterr().err.splitlines()  # at most one in 5 s of real time
    assert line.startswith("WATCHDOG=1 is ")
    assert line.endswith(" ms late: the queue of NOTIFY_SOCKET is full.")
    one.hear()
    wait(one, 10_000)
    assert "WATCHDOG=1" in one.hear()


def test_a_thread_that_does_not_answer_in_time_is_logged(world, capfd):
    one = world(WATCHDOG_USEC="2000000")
    one.relay.workers_answered = False
    wait(one, 2500)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("late: a thread does not answer.")


def test_an_old_sign_of_life_is_not_sent_for_a_thread_that_has_stopped(world):
    one = world(WATCHDOG_USEC="2000000")
    one.fill()
    wait(one, 1500)
    one.relay.workers_answered = False
    wait(one, 2500)
    one.hear()
    assert one.run(10_000) == []


def test_stopping_does_not_wait_for_a_full_queue(world):
    one = world()
    one.fill()
    one.notifier.stopping(0, waits=False)  # returns


def test_a_socket_without_a_reader_is_tried_seldom(tmp_path, capfd):
    path = tmp_path / "notify"
    one = World(NotifySocket({"NOTIFY_SOCKET": str(path)}), list, None)
    one.notifier.ready()
    asked = wait(one, 100_000)
    assert asked[-1] - asked[-2] == RETRY_GONE_MS_MAX
    assert len(capfd.readouterr().err.splitlines()) == 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.setblocking(False)
        wait(one, one.notifier.next_ms())
        assert sock.recv(4096).startswith(b"READY=1")
    one.notifier._sock.close()


# ── restart and reload ───────────────────────────────────────────────────────────────────────────


def test_a_reload_says_when_it_began(world):
    one = world()
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    one.notifier.reloading()
    ((first, second),) = [text.splitlines() for text in one.hear()]
    assert first == "RELOADING=1"
    name, _, usec = second.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(usec) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_a_reload_that_has_failed_is_over(world):
    """A manager that was busy hears of both: it has asked for the reload, and waits for it."""
    one = world()
    one.fill()
    one.notifier.reloading()
    one.notifier.ready()
    one.hear()
    heard = [text.splitlines()[0] for _, text in one.run(5 * RETRY_MS_MAX)]
    assert heard == ["RELOADING=1", "READY=1"]


def test_what_was_received_is_removed_from_the_store_first(world):
    one = world()
    one.fill()
    one.notifier.ready()
    for name in ("proxyd-parcel", "proxyd-pages", "proxyd-parcel"):
        one.notifier.remove_stored(name)
    one.hear()
    heard = [text for _, text in one.run(5 * RETRY_MS_MAX)]
    removed = ["FDSTOREREMOVE=1\nFDNAME=proxyd-pages", "FDSTOREREMOVE=1\nFDNAME=proxyd-parcel"]
    assert sorted(heard[:2]) == removed
    assert [text.splitlines()[0] for text in heard[2:]] == ["READY=1"]


def storing(one, *texts):
    """Sends messages with a descriptor, one after the other."""
    texts = list(texts)

    def send():
        while texts and one.notifier.send_fd(texts[0], 0):
            texts.pop(0)
        return not texts

    return send


def test_what_is_stored_waits_for_room_in_the_store(world):
    """A manager that was busy hears of what is removed first: there may be room for one."""
    one = world()
    one.fill()
    one.notifier.store(storing(one, "FDSTORE=1", "BARRIER=1"))
    one.notifier.remove_stored("proxyd-pages")
    assert one.notifier.removes
    one.hear()
    heard = [text for _, text in one.run(5 * RETRY_MS_MAX)]
    assert heard == ["FDSTOREREMOVE=1\nFDNAME=proxyd-pages", "FDSTORE=1", "BARRIER=1"]
    assert not one.notifier.removes


def test_what_is_not_to_be_stored_any_more(world):
    one = world()
    one.fill()
    one.notifier.store(storing(one, "FDSTORE=1"))
    one.notifier.forget_store()
    one.hear()
    assert one.run(5 * RETRY_MS_MAX) == []


def test_a_descriptor_for_a_manager_that_is_gone(world, tmp_path, capfd):
    one = world()
    (tmp_path / "notify").unlink()
    with pytest.raises(OSError, match="."):
        one.notifier.send_fd("FDSTORE=1", 0)
    assert "NOTIFY_SOCKET" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "environ", "may", "certain"),
    [
        (True, {}, True, False),
        (True, {"FDSTORE": "1"}, True, True),
        (True, {"FDSTORE": "0"}, False, False),
        (False, {"FDSTORE": "1"}, False, False),
    ],
)
def test_whether_there_is_a_store(world, wanted, environ, may, certain):
    """systemd 254 and newer say so; before that, it has to be tried."""
    notifier = world(wanted, **environ).notifier
    assert (notifier.has_store, notifier.has_certain_store) == (may, certain)
