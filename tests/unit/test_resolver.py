"""Look-ups: off the main thread, shared, remembered, and never waited for."""

import _socket
import itertools
import os
import posix
import select
import signal
import socket
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import address as sockaddr
from proxyd import resolver
from proxyd.resolver import (
    AHEAD_MS,
    FAILING_MS,
    FRESH_MS,
    LATE_MS,
    RETRYABLE,
    STALE_MS,
    Resolver,
    interleaved,
)

PATIENCE = 20
"""Seconds after which something that has not happened counts as failed."""

HOST = b"backend.example"
V4 = sockaddr.pack_inet("192.0.2.1", 0)
V4_TOO = sockaddr.pack_inet("192.0.2.2", 0)
V6 = sockaddr.pack_inet("2001:db8::1", 0)

NONAME = _socket.gaierror(_socket.EAI_NONAME, "Name or service not known")
AGAIN = _socket.gaierror(_socket.EAI_AGAIN, "Temporary failure in name resolution")
NODATA = _socket.gaierror(_socket.EAI_NODATA, "No address associated with hostname")
FAIL = _socket.gaierror(_socket.EAI_FAIL, "Non-recoverable failure in name resolution")


def found(*addresses):
    """What getaddrinfo() returns for packed addresses."""
    return [
        (sockaddr.family(one), _socket.SOCK_STREAM, 6, "", sockaddr.to_socket_name(one))
        for one in addresses
    ]


class FakeGetaddrinfo:
    """Stands in for getaddrinfo(3): `answers` by host; for a host in `hanging` it blocks."""

    def __init__(self):
        self.answers = {}
        self.asked = []
        self.threads = set()
        self.blocked = set()
        self.let_go = threading.Event()
        self.hanging = set()
        self._called = threading.Condition()

    def __call__(self, host, port, family=0, kind=0, protocol=0, flags=0):
        assert isinstance(host, bytes)  # a str loads the IDNA codec
        assert kind == _socket.SOCK_STREAM
        assert not flags & _socket.AI_ADDRCONFIG
        self.threads.add(threading.get_ident())
        self.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        with self._called:
            self.asked += [host] if family == 0 else []
            self._called.notify()
        if host in self.hanging:
            self.let_go.wait(PATIENCE)
        answer = self.answers[host]
        if isinstance(answer, dict):  # by family, where the families differ
            answer = answer[family]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def wait_asked(self, count):
        """Wait until that many look-ups have begun."""
        with self._called:
            assert self._called.wait_for(lambda: len(self.asked) >= count, PATIENCE)


@pytest.fixture
def server(monkeypatch):
    one = FakeGetaddrinfo()
    monkeypatch.setattr(resolver._socket, "getaddrinfo", one)
    yield one
    one.let_go.set()


@pytest.fixture
def names(server):
    """A started resolver. Its threads outlive the test, as they outlive the program's end."""
    one = Resolver()
    one.start([HOST])
    yield one
    server.let_go.set()
    while one._under_way:  # or they would ask the next test's name server
        collect(one, 0)


class Asker:
    """Collects what a resolver says."""

    def __init__(self):
        self.heard = []

    def __call__(self, addresses, error):
        self.heard.append((addresses, error))


def ask(names, host, now_ms):
    asker = Asker()
    names.ask(host, now_ms, asker)
    return asker


def collect(names, now_ms):
    """Wait for an answer, and do what the main loop then does."""
    assert select.select([names.fd], [], [], PATIENCE)[0]
    names.collect(now_ms)


def look_up(names, host, now_ms):
    """Ask, and wait for the answer, which must not come at once."""
    asker = ask(names, host, now_ms)
    assert asker.heard == []
    while not asker.heard:
        collect(names, now_ms)
    return asker.heard


# ── one look-up ───────────────────────────────────────────────────────────────────────────────────


def test_answer(names, server):
    server.answers[HOST] = found(V6, V4)
    assert look_up(names, HOST, 0) == [([V6, V4], None)]
    assert server.threads.isdisjoint({threading.get_ident()})


def test_its_threads_take_no_signal(names, server):
    """They are for the main thread, which blocks them for a moment at a reload."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    server.answers[HOST] = found(V4)
    look_up(names, HOST, 0)
    assert {signal.SIGTERM, signal.SIGHUP} <= server.blocked
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def test_nothing_to_collect(names):
    names.collect(0)


def test_an_interrupted_collect_is_no_error(names, monkeypatch):
    def interrupted(fd):
        raise InterruptedError

    monkeypatch.setattr(posix, "eventfd_read", interrupted)
    names.collect(0)


def test_error(names, server):
    server.answers[HOST] = NONAME
    assert look_up(names, HOST, 0) == [([], NONAME)]


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()])
def test_errors_of_other_kinds_are_answers_too(names, server, error):
    server.answers[HOST] = error
    ((addresses, answer),) = look_up(names, HOST, 0)
    assert addresses == []
    assert isinstance(answer, _socket.gaierror)
    assert answer.errno in RETRYABLE  # fds and memory become free again
    # The thread has survived it.
    server.answers[HOST] = found(V4)
    assert look_up(names, HOST, FRESH_MS) == [([V4], None)]


def test_duplicate_addresses_are_dropped(names, server):
    server.answers[HOST] = found(V4, V4, V6, V4)
    assert look_up(names, HOST, 0) == [([V4, V6], None)]


def test_the_scope_is_kept(names, server):
    address = sockaddr.pack_inet6("fe80::1", 0, 7)
    server.answers[HOST] = found(address)
    assert look_up(names, HOST, 0) == [([address], None)]


# ── reuse ─────────────────────────────────────────────────────────────────────────────────────────


def test_concurrent_look_ups_of_a_name_are_shared(names, server):
    server.answers[HOST] = found(V4)
    server.hanging.add(HOST)
    askers = [ask(names, HOST, now_ms) for now_ms in (0, 1, 5000)]
    server.wait_asked(1)
    assert [asker.heard for asker in askers] == [[], [], []]
    server.let_go.set()
    collect(names, 6000)
    assert [asker.heard for asker in askers] == [[([V4], None)]] * 3
    assert server.asked == [HOST]


def test_two_names_are_two_look_ups(names, server):
    server.answers = {HOST: found(V4), b"other": found(V6)}
    assert look_up(names, HOST, 0) == [([V4], None)]
    assert look_up(names, b"other", 0) == [([V6], None)]


def test_an_answer_is_reused_for_a_second(names, server):
    assert FRESH_MS == 1000
    server.answers[HOST] = found(V4)
    assert names.current(HOST, 100) == []
    look_up(names, HOST, 100)
    server.answers[HOST] = found(V6)
    server.hanging.add(HOST)  # so that the look-up ahead of time does not end
    assert names.current(HOST, 100 + FRESH_MS - 1) == [V4]
    assert ask(names, HOST, 100 + FRESH_MS - 1).heard == [([V4], None)]
    assert names.current(HOST, 100 + FRESH_MS) == []
    asker = ask(names, HOST, 100 + FRESH_MS)
    server.let_go.set()
    collect(names, 100 + FRESH_MS)
    assert asker.heard == [([V6], None)]
    assert server.asked == [HOST, HOST]


def test_the_second_counts_from_the_answer(names, server):
    server.answers[HOST] = found(V4)
    asker = ask(names, HOST, 0)
    collect(names, 30_000)  # a slow name server
    assert asker.heard == [([V4], None)]
    assert ask(names, HOST, 30_000 + FRESH_MS - 1).heard == [([V4], None)]


@pytest.mark.parametrize("took_ms", [0, 100, FRESH_MS - AHEAD_MS])
def test_clients_keep_an_answer_fresh_without_waiting(names, server, took_ms):
    server.answers[HOST] = found(V4)
    look_up(names, HOST, 0)
    now_ms = 0
    for last in range(1, 4):
        due_ms = now_ms + FRESH_MS - AHEAD_MS - (took_ms if last > 1 else 0)
        assert names.current(HOST, due_ms - 1) == [sockaddr.pack_inet(f"192.0.2.{last}", 0)]
        assert len(server.asked) == last
        server.answers[HOST] = found(sockaddr.pack_inet(f"192.0.2.{last + 1}", 0))
        for ms in (0, took_ms // 2, took_ms):  # one look-up for all clients that come meanwhile
            if due_ms + ms < now_ms + FRESH_MS:
                assert names.current(HOST, due_ms + ms) == [
                    sockaddr.pack_inet(f"192.0.2.{last}", 0)
                ]
        now_ms = due_ms + took_ms
        collect(names, now_ms)
        assert len(server.asked) == last + 1
        assert names.current(HOST, now_ms) == [sockaddr.pack_inet(f"192.0.2.{last + 1}", 0)]


def test_nothing_is_looked_up_while_no_client_comes(names, server):
    server.answers[HOST] = found(V4)
    look_up(names, HOST, 0)
    assert names.current(HOST, STALE_MS) == []
    assert not select.select([names.fd], [], [], 0)[0]
    assert server.asked == [HOST]


def test_the_list_of_addresses_is_the_same_until_there_is_another_answer(names, server):
    server.answers[HOST] = found(V4)
    look_up(names, HOST, 0)
    known = names.current(HOST, 0)
    assert names.current(HOST, FRESH_MS - AHEAD_MS) is known
    collect(names, FRESH_MS - AHEAD_MS)
    assert names.current(HOST, FRESH_MS) == known
    assert names.current(HOST, FRESH_MS) is not known


def test_a_failure_is_reused_for_a_second_too(names, server):
    server.answers[HOST] = NONAME
    look_up(names, HOST, 0)
    assert names.current(HOST, 0) == []
    server.answers[HOST] = found(V4)
    assert ask(names, HOST, FRESH_MS - 1).heard == [([], NONAME)]
    assert server.asked == [HOST]
    assert look_up(names, HOST, FRESH_MS) == [([V4], None)]


# ── the last good answer ──────────────────────────────────────────────────────────────────────────


FAILURES = [AGAIN, FAIL, OSError(5, "Input/output error"), OSError(24, "no fd"), MemoryError()]


@pytest.mark.parametrize("error", FAILURES)
def test_the_last_good_answer_serves_when_a_look_up_fails(names, server, capfd, error):
    server.answers[HOST] = found(V4, V6)
    look_up(names, HOST, 0)
    server.answers[HOST] = error
    assert look_up(names, HOST, STALE_MS - 1) == [([V4, V6], None)]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("Failed to resolve host: ")
    assert "(backend.example); using its last addresses." in line


@pytest.mark.parametrize("error", FAILURES)
def test_no_client_waits_for_look_ups_that_fail(names, server, error):
    server.answers[HOST] = found(V4)
    look_up(names, HOST, 0)
    server.answers[HOST] = error
    look_up(names, HOST, 5000)
    for number in range(1, 4):  # look-ups continue, one per second
        now_ms = 5000 + number * FRESH_MS
        assert names.current(HOST, now_ms - 1) == [V4]
        assert len(server.asked) == number + 1
        assert names.current(HOST, now_ms) == [V4]
        collect(names, now_ms)
    # A failure long ago says nothing about the next look-up.
    assert names.current(HOST, now_ms + FAILING_MS - 1) == [V4]
    collect(names, now_ms)
    server.answers[HOST] = found(V6)
    assert look_up(names, HOST, now_ms + FAILING_MS) == [([V6], None)]


@pytest.mark.parametrize("answer", [NONAME, NODATA])
def test_a_name_that_is_gone_has_no_address(names, server, capfd, answer):
    server.answers[HOST] = found(V4)
    look_up(names, HOST, 0)
    server.answers[HOST] = answer
    assert look_up(names, HOST, FRESH_MS) == [([], answer)]
    assert names.current(HOST, FRESH_MS) == []
    # A later failure does not bring its address back.
    server.answers[HOST] = AGAIN
    assert look_up(names, HOST, 2 * FRESH_MS) == [([], AGAIN)]
    assert names.current(HOST, 2 * FRESH_MS) == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("answer", [NONAME, NODATA])
def test_a_look_up_without_a_waiting_client_sees_that_a_name_is_gone(names, server, answer):
    server.answers[HOST] = found(V4)
    look_up(names, HOST, 0)
    server.answers[HOST] = answer
    assert names.current(HOST, FRESH_MS - AHEAD_MS) == [V4]
    collect(names, FRESH_MS - AHEAD_MS)
    assert names.current(HOST, FRESH_MS - AHEAD_MS) == []
    assert ask(names, HOST, FRESH_MS - AHEAD_MS).heard == [([], answer)]


@pytest.mark.parametrize("failure", [AGAIN, OSError(16, "Device or resource busy")])
@pytest.mark.parametrize("failing", [socket.AF_INET, socket.AF_INET6])
def test_no_data_of_one_family_and_no_answer_for_the_other_is_a_failure(
    names, server, failure, failing
):
    """glibc then says NODATA, as measured with servers that answer SERVFAIL for one family."""
    server.answers[HOST] = found(V4)
    look_up(names, HOST, 0)
    both = {0: NODATA, socket.AF_INET: NODATA, socket.AF_INET6: NODATA}
    server.answers[HOST] = {**both, failing: failure}
    assert look_up(names, HOST, FRESH_MS) == [([V4], None)]
    server.answers[HOST] = both
    assert names.current(HOST, 2 * FRESH_MS) == [V4]
    collect(names, 2 * FRESH_MS)
    assert names.current(HOST, 2 * FRESH_MS) == []


def test_an_address_that_one_family_has_after_all(names, server):
    server.answers[HOST] = {0: NODATA, socket.AF_INET6: NODATA, socket.AF_INET: found(V4)}
    assert look_up(names, HOST, 0) == [([V4], None)]


def test_the_last_good_answer_serves_while_the_next_is_late(names, server, capfd):
    """RFC 8767 section 5: a client waits for 1.8 s at most, and the next one not at all."""
    assert LATE_MS == 1800
    server.answers[HOST] = found(V4)
    look_up(names, HOST, 0)
    server.hanging.add(HOST)
    first = ask(names, HOST, 5000)
    server.wait_asked(2)
    assert names.current(HOST, 5000 + LATE_MS - 1) == []
    assert names.current(HOST, 5000 + LATE_MS) == [V4]
    assert ask(names, HOST, 5000 + LATE_MS).heard == [([V4], None)]
    assert first.heard == []  # a client that waits asks current() once the look-up is late
    assert server.asked == [HOST, HOST]
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        "Failed to resolve host: no answer yet (backend.example); using its last addresses."
    )
    server.answers[HOST] = NONAME
    server.let_go.set()
    collect(names, 9000)
    assert first.heard == [([], NONAME)]
    assert names.current(HOST, 9000) == []


def test_nothing_stands_in_for_a_late_answer_if_no_other_was_good(names, server):
    server.hanging.add(HOST)
    server.answers[HOST] = found(V4)
    asker = ask(names, HOST, 0)
    assert names.current(HOST, LATE_MS) == []
    assert asker.heard == []


def test_the_last_good_answer_serves_for_five_minutes(names, server, capfd):
    server.answers[HOST] = found(V4)
    look_up(names, HOST, 7)
    server.answers[HOST] = AGAIN
    assert look_up(names, HOST, 7 + STALE_MS) == [([], AGAIN)]
    assert STALE_MS == 5 * 60 * 1000
    assert capfd.readouterr().err == ""


def test_failures_do_not_prolong_the_last_good_answer(names, server):
    server.answers[HOST] = found(V4)
    look_up(names, HOST, 0)
    server.answers[HOST] = AGAIN
    for now_ms in range(60_000, STALE_MS, 60_000):
        assert look_up(names, HOST, now_ms) == [([V4], None)]
    assert look_up(names, HOST, STALE_MS) == [([], AGAIN)]


def test_the_warning_about_old_addresses_is_limited(names, server, capfd):
    server.answers[HOST] = found(V4)
    look_up(names, HOST, 0)
    server.answers[HOST] = AGAIN
    look_up(names, HOST, FRESH_MS)
    for _ in range(50):
        assert ask(names, HOST, FRESH_MS + 1).heard == [([V4], None)]
    assert len(capfd.readouterr().err.splitlines()) == 1


# ── threads ───────────────────────────────────────────────────────────────────────────────────────


def test_hanging_look_ups_block_no_others(names, server):
    hosts = [f"slow{number}".encode() for number in range(50)]
    server.hanging.update(hosts)
    server.answers = dict.fromkeys([*hosts, HOST], found(V4))
    askers = [ask(names, host, 0) for host in hosts]
    server.wait_asked(len(hosts))
    assert look_up(names, HOST, 0) == [([V4], None)]
    assert [asker.heard for asker in askers] == [[]] * 50


@pytest.fixture
def started(monkeypatch):
    """A list that grows with every thread that a resolver starts."""
    threads = []

    def start(function, arguments):
        threads.append(function)
        return really(function, arguments)

    really = resolver.threads._thread.start_new_thread
    monkeypatch.setattr(resolver.threads._thread, "start_new_thread", start)
    return threads


def test_a_thread_for_each_name_and_no_more(started, names, server):
    """However often a name is asked for while its look-up hangs."""
    hosts = [f"slow{number}".encode() for number in range(8)]
    server.hanging.update(hosts)
    server.answers = dict.fromkeys(hosts, found(V4))
    askers = [ask(names, host, now_ms) for now_ms in range(0, 90_000, 900) for host in hosts]
    server.wait_asked(len(hosts))
    server.let_go.set()
    while not all(asker.heard for asker in askers):
        collect(names, 90_000)
    assert sorted(server.asked) == sorted(hosts)
    assert len(started) == 8


def test_successive_look_ups_need_one_thread(started, names, server):
    server.answers[HOST] = found(V4)
    for number in range(20):
        look_up(names, HOST, number * FRESH_MS)
    assert len(started) == 1


def test_a_thread_that_has_just_taken_a_job_is_not_idle(server, monkeypatch):
    """Between taking a job and beginning it, a thread must not count as free for another."""
    import _queue

    idle, taken, go_on = threading.Event(), threading.Event(), threading.Event()

    class Slow(_queue.SimpleQueue):
        """Delivers the job for the host `slow` late."""

        def get(self):
            idle.set()
            job = super().get()
            if getattr(job, "host", None) == b"slow":
                taken.set()
                go_on.wait(2 * PATIENCE)
            return job

    monkeypatch.setattr(_queue, "SimpleQueue", Slow)
    server.answers = {b"slow": found(V4), HOST: found(V6)}
    names = Resolver()
    names.start([HOST])
    assert idle.wait(PATIENCE)
    slow = ask(names, b"slow", 0)
    assert taken.wait(PATIENCE)
    asker = ask(names, HOST, 0)
    answered = select.select([names.fd], [], [], PATIENCE)[0]
    go_on.set()
    collect(names, 0)
    quick = list(asker.heard)
    while not (slow.heard and asker.heard):
        collect(names, 0)
    assert answered, "a look-up waits for another one, which may hang"
    assert quick == [([V6], None)]


def refuse_threads(monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(resolver.threads._thread, "start_new_thread", refuse)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_without_threads_names_are_resolved_once(server, monkeypatch, capfd, error):
    refuse_threads(monkeypatch, error)
    server.answers = {HOST: found(V6, V4), b"other": found(V4_TOO)}
    names = Resolver()
    names.start([HOST, b"other"])
    (line,) = capfd.readouterr().err.splitlines()
    assert "No thread can be started" in line
    server.answers = {}
    for now_ms in (0, FRESH_MS, STALE_MS * 10):
        assert names.current(HOST, now_ms) == [V6, V4]  # no client is held for it
        assert ask(names, HOST, now_ms).heard == [([V6, V4], None)]
        assert ask(names, b"other", now_ms).heard == [([V4_TOO], None)]
    assert server.asked == [HOST, b"other"]


def test_without_threads_a_failure_is_logged_and_final(server, monkeypatch, capfd):
    refuse_threads(monkeypatch, RuntimeError())
    server.answers[HOST] = NONAME
    names = Resolver()
    names.start([HOST])
    _, line = capfd.readouterr().err.splitlines()
    assert line == "Failed to resolve host: Name or service not known (backend.example)"
    assert ask(names, HOST, FRESH_MS).heard == [([], NONAME)]


def test_one_thread_is_enough_if_no_more_can_be_started(names, server, monkeypatch, capfd):
    hosts = [f"other{number}".encode() for number in range(5)]
    server.answers = {HOST: found(V4), **dict.fromkeys(hosts, found(V6))}
    server.hanging.add(HOST)
    first = ask(names, HOST, 0)
    server.wait_asked(1)
    refuse_threads(monkeypatch, RuntimeError())
    others = [ask(names, host, 0) for host in hosts]
    server.let_go.set()
    while not all(asker.heard for asker in [first, *others]):
        collect(names, 0)
    assert first.heard == [([V4], None)]
    assert [asker.heard for asker in others] == [[([V6], None)]] * 5
    assert capfd.readouterr().err == (
        "No further thread can be started for name look-ups: "
        "all names share 1, and wait for each other.\n"
    )


@pytest.mark.parametrize(
    ("answer", "addresses", "code"),
    [
        (found(V6, V4), [V6, V4], None),
        (NONAME, [], _socket.EAI_NONAME),
        (NODATA, [], _socket.EAI_NODATA),
        ({0: NODATA, socket.AF_INET6: NODATA, socket.AF_INET: AGAIN}, [], _socket.EAI_AGAIN),
        ({0: NODATA, socket.AF_INET6: found(V6)}, [V6], None),
        (OSError(24, "Too many open files"), [], _socket.EAI_SYSTEM),
        (ValueError("address family 99 is not supported"), [], _socket.EAI_FAIL),
    ],
)
def test_the_result_of_a_look_up(server, answer, addresses, code):
    server.answers[HOST] = answer
    found_addresses, error = resolver._look_up(HOST)
    assert (found_addresses, error and error.errno) == (addresses, code)


def test_the_exit_does_not_wait_for_a_look_up():
    program = """
import _socket, _thread, sys
stuck, begun = _thread.allocate_lock(), _thread.allocate_lock()
stuck.acquire(), begun.acquire()
def hang(*_):
    begun.release()
    stuck.acquire()
_socket.getaddrinfo = hang
from proxyd.resolver import Resolver
one = Resolver()
one.start([b"x"])
one.ask(b"x", 0, print)
begun.acquire()
sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=PATIENCE, check=False)
    assert done.returncode == 7


def test_the_eventfd_is_not_inherited(names):
    assert not os.get_inheritable(names.fd)


# ── the real getaddrinfo(3) ───────────────────────────────────────────────────────────────────────


def test_localhost():
    names = Resolver()
    names.start([b"localhost"])
    ((addresses, error),) = look_up(names, b"localhost", 0)
    assert error is None
    assert {sockaddr.text(one) for one in addresses} <= {"127.0.0.1:0", "[::1]:0"}
    assert addresses


# ── the order of addresses ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given_order", "tried"),
    [
        ([], []),
        ([V4], [V4]),
        ([V4, V4_TOO], [V4, V4_TOO]),
        ([V6, V4, V4_TOO], [V6, V4, V4_TOO]),
        ([V4, V4_TOO, V6], [V4, V6, V4_TOO]),
    ],
)
def test_interleaved(given_order, tried):
    assert interleaved(given_order) == tried


ADDRESSES = st.one_of(
    st.integers(0, 255).map(lambda last: sockaddr.pack_inet(f"192.0.2.{last}", 0)),
    st.integers(0, 255).map(lambda last: sockaddr.pack_inet(f"2001:db8::{last:x}", 0)),
)


@given(st.lists(ADDRESSES))
def test_interleaving_follows_rfc_8305(addresses):
    mixed = interleaved(addresses)
    assert set(mixed) == set(addresses)
    assert len(set(mixed)) == len(mixed)
    assert mixed[:1] == addresses[:1]  # the first is what the system prefers (RFC 6724)
    for kind in (sockaddr.AF_INET, sockaddr.AF_INET6):
        # Within a family the order is the system's.
        ours = [one for one in mixed if sockaddr.family(one) == kind]
        theirs = [one for one in dict.fromkeys(addresses) if sockaddr.family(one) == kind]
        assert ours == theirs
    # They alternate until one family has run out.
    families = [sockaddr.family(one) for one in mixed]
    both = 2 * min(families.count(sockaddr.AF_INET), families.count(sockaddr.AF_INET6))
    assert all(one != other for one, other in itertools.pairwise(families[:both]))
