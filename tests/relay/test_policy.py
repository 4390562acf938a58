"""What the policy relies on: events, counters, limits of time, and that nothing is left behind."""

import contextlib
import errno
import gc
import os
import re
import select
import socket
import time

import pytest
from kit.child import in_child
from kit.rig import Link, Rig, open_fds
from kit.sockets import FAMILIES, open_listener, reset
from kit.stepped import Incoming, Outgoing, close, half_close, open_client
from kit.traffic import payload

from proxyd._relay import (
    ENDINGS,
    Accepted,
    AcceptFailed,
    Ended,
    Relay,
    RelayListener,
    WorkersWanted,
    raise_fd_limit,
    socket_names,
)


def exchange(rig, link, up, down):
    """A whole connection: `up` bytes one way, `down` bytes the other way, and the end."""
    there, back = Incoming(link.target), Incoming(link.client)
    rig.run(
        Outgoing(link.client, payload(up), half_close),
        Outgoing(link.target, payload(down, 2), half_close),
        there,
        back,
    )
    assert (there.data, back.data) == (payload(up), payload(down, 2))


# ── events ───────────────────────────────────────────────────────────────────────────────────────


def test_ended_tells_what_there_was(rigs, pair, way):
    rig = rigs(*pair, **way)
    link = rig.link()
    exchange(rig, link, 300_000, 200_000)
    rig.until_ended(link.id)
    event = rig.ended(link.id)
    assert (event.ending, event.bytes_up, event.bytes_down) == ("ended", 300_000, 200_000)
    assert (event.client_error, event.target_error) == (0, 0)
    assert 0 <= event.duration_ms < 60_000


def test_ended_tells_the_errno_of_the_side_that_failed(rigs):
    rig = rigs()
    first, second = rig.link(), rig.link()
    rig.settle()
    reset(first.client)
    reset(second.target)
    rig.until(lambda: len(rig.of_kind(Ended)) == 2, "both ends")
    errors = [(end.client_error, end.target_error) for end in map(rig.ended, (first.id, second.id))]
    assert errors == [(errno.ECONNRESET, 0), (0, errno.ECONNRESET)]


def test_no_reports_unless_asked_for(rigs):
    rig = rigs()
    rig.relay.report_ends = False
    assert rig.relay.report_ends is False
    link = rig.link()
    exchange(rig, link, 10, 10)
    rig.until(lambda: not rig.relay.connections, "the end")
    assert not rig.of_kind(Ended)
    assert rig.totals().endings == {**dict.fromkeys(ENDINGS, 0), "ended": 1}


def test_ids_are_never_the_same(rigs):
    rig = rigs()
    assert len({rig.link().id for _ in range(10)}) == 10


def test_run_returns_when_connections_have_ended(rigs):
    """`wake_at_count`: run() comes back once so few are left, and not before."""
    rig = rigs()
    rig.relay.report_ends = False
    links = [rig.link() for _ in range(3)]
    rig.settle()
    rig.relay.wake_at_count = 1
    reset(links[0].client)
    start = time.monotonic()
    assert rig.relay.run(50) == []
    assert time.monotonic() - start > 0.045
    assert rig.relay.connections == 2
    reset(links[1].client)
    assert rig.relay.run(20_000) == []
    assert rig.relay.connections == 1


def test_run_returns_when_the_first_comes(rigs):
    """`wake_on_first`: run() comes back when the first client has been connected automatically."""
    rig = rigs()
    rig.gate.auto_connect(rig.address)
    rig.relay.wake_on_first = True
    from kit.stepped import open_client

    rig.keep(open_client(rig.door))
    assert rig.relay.run(20_000) == []
    assert rig.relay.connections == 1
    rig.keep(open_client(rig.door))
    start = time.monotonic()
    assert rig.relay.run(50) == []
    assert time.monotonic() - start > 0.045
    assert rig.relay.connections == 2


def test_run_returns_in_time(rigs):
    rig = rigs()
    for timeout in (0, 1, 30):
        start = time.monotonic()
        assert rig.relay.run(timeout) == []
        assert time.monotonic() - start >= timeout / 1000 - 0.001


def test_watched_fds(rigs):
    """Level-triggered unless told otherwise; forgotten when unwatched, which may be done twice."""
    rig = rigs()
    rd, wr = os.pipe()
    rig.relay.watch(rd)
    with pytest.raises(FileExistsError):
        rig.relay.watch(rd)
    assert rig.relay.run(0) == []
    os.write(wr, b"x")
    assert [(event.fd, event.events) for event in rig.relay.run(0)] == [(rd, 1)]
    assert [(event.fd, event.events) for event in rig.relay.run(0)] == [(rd, 1)]
    rig.relay.unwatch(rd)
    rig.relay.unwatch(rd)
    assert rig.relay.run(0) == []
    rig.relay.unwatch(-1)
    rig.relay.unwatch(1 << 30)
    with pytest.raises(OSError):
        rig.relay.watch(-1)
    with pytest.raises(OSError):
        rig.relay.watch(999_999)
    os.close(rd)
    os.close(wr)


def test_many_watched_fds_at_once(rigs):
    """More than fit into one batch of events: each is told."""
    rig = rigs()
    pipes = [os.pipe() for _ in range(300)]
    for rd, wr in pipes:
        rig.relay.watch(rd)
        os.write(wr, b"x")
    seen = set()
    for _ in range(20):
        seen |= {event.fd for event in rig.relay.run(0)}
    assert seen == {rd for rd, _ in pipes}
    for rd, wr in pipes:
        rig.relay.unwatch(rd)
        os.close(rd)
        os.close(wr)


def test_quiet_since(rigs):
    """last_end_ms is when the last connection ended."""
    rig = rigs()
    assert rig.relay.last_end_ms <= rig.relay.now_ms
    link = rig.link()
    rig.pass_time(0.02)
    exchange(rig, link, 10, 10)
    rig.until(lambda: not rig.relay.connections, "the end")
    assert 0 <= rig.relay.now_ms - rig.relay.last_end_ms < 1000
    assert rig.relay.last_end_ms > rig.ended(link.id).duration_ms


# ── counters ─────────────────────────────────────────────────────────────────────────────────────


def test_counters_add_up(rigs, pair, way):
    rig = rigs(*pair, **way)
    for number in range(5):
        exchange(rig, rig.link(), 300_000 + number, 400_000 - number)
    rig.until(lambda: not rig.relay.connections, "the end of all")
    totals = rig.totals()
    assert totals.accepted == 5
    assert totals.refused == 0
    assert totals.bytes_to_targets == 1_500_010
    assert totals.bytes_to_clients == 1_999_990
    assert totals.spliced + totals.copied == totals.bytes_to_targets + totals.bytes_to_clients
    assert totals.endings == {**dict.fromkeys(ENDINGS, 0), "ended": 5}
    if way:
        assert totals.spliced == 0
    elif pair != ("unix", "tcp6"):
        assert totals.spliced > 0


def test_bytes_that_were_not_delivered_are_not_counted(rigs, way):
    """What the relay had taken when the reader went is in the Ended event, not in the totals."""
    rig = rigs("tcp4", "tcp4", **way, target_buffers={"receive_buffer": 4096})
    link = rig.link()
    sent = rig.stuff(link.client)
    reset(link.target)
    _, up, _ = rig.until_ended(link.id)
    assert rig.totals().bytes_to_targets <= up <= sent


# ── the end of all ───────────────────────────────────────────────────────────────────────────────


def test_close_all_cuts_every_connection(rigs, pair, way):
    """In whatever state: idle, stuck, half-closed, connecting."""
    rig = rigs(*pair, **way, target_buffers={"receive_buffer": 4096})
    idle, stuck, half = rig.link(), rig.link(), rig.link()
    rig.stuff(stuck.client)
    half_close(half.client)
    rig.settle()
    assert rig.relay.close_all() == 3
    assert rig.relay.connections == 0
    assert rig.relay.close_all() == 0
    rig.turn()
    assert [event.ending for event in rig.of_kind(Ended)] == ["cut"] * 3
    end = "eof" if pair[0] == "unix" else "reset"
    assert rig.read_to_end(idle.client) == (b"", end)


def test_close_all_before_any_turn(rigs, pair):
    rig = rigs(*pair)
    for _ in range(3):
        _, fd = rig.knock()
        rig.connect(fd)
    assert rig.relay.close_all() == 3
    assert rig.totals().endings["cut"] == 3


def test_relay_that_goes_with_live_connections(rigs, pair, way, tmp_path):
    """Its fds are closed; the peers see that they were cut. Also the pipes of a stuck stream,
    clients of failed connects that nobody fetched, and watched fds that stay the caller's."""
    rig = Rig(rigs.directory, *pair, **way, target_buffers={"receive_buffer": 4096})
    rigs.made.append(rig)
    links = [rig.link() for _ in range(5)]
    rig.stuff(links[0].client)
    half_close(links[1].client)
    rig.settle()
    rd, wr = os.pipe()
    rig.relay.watch(rd)
    dead = rig.keep(rig.backend.__class__(FAMILIES["tcp4"]))
    dead.bind(("127.0.0.1", 0))
    _, fd = rig.knock()
    rig.relay.connect(fd, FAMILIES[pair[0]], socket_names(dead.fileno())[1])
    rig.gate.stop()
    before = open_fds()
    del rig.gate, rig.relay
    gc.collect()
    closed = {int(each) for each in before - open_fds()}
    assert {link.client_fd for link in links} | {fd, rig.epoll} <= closed
    assert len(closed) >= 5 * 2 + 2
    assert not closed & {rd, wr}
    for link in links[2:]:
        link.target.setblocking(True)
        if pair[1] == "unix":
            assert link.target.recv(10) == b""
        else:
            with pytest.raises(ConnectionResetError):
                link.target.recv(10)
    os.close(rd)
    os.close(wr)
    rigs.forget(rig)


def test_many_short_connections_leave_nothing(rigs, pair):
    rig = rigs(*pair)
    link = rig.link()
    before = open_fds()
    for number in range(100):
        client, fd = rig.knock()
        rig.connect(fd)
        target = rig.meet()
        client.send(b"x")
        if number % 3 == 0:
            reset(client)
        else:
            close(client)
        if number % 3 == 1:
            reset(target)
        else:
            close(target)
        rig.sockets.remove(client)
        rig.sockets.remove(target)
    rig.until(lambda: rig.relay.connections == 1, "the end of all but one")
    rig.relay.trim_pipes()
    assert open_fds() == before
    assert sum(rig.totals().endings.values()) == 100
    assert rig.ended(link.id) is None


def registered(rig, copies):
    """Those of `copies` whose socket the relay's epoll instance still knows, by whatever fd."""
    inodes = {os.fstat(copy).st_ino for copy in copies}
    with open(f"/proc/self/fdinfo/{rig.epoll}") as info:
        known = re.findall(r"^tfd:.* ino:([0-9a-f]+)", info.read(), re.MULTILINE)
    return inodes & {int(inode, 16) for inode in known}


def closed_by_both(rig, link):
    close(link.target)
    close(link.client)
    rig.until_ended(link.id)


def reset_by_one(rig, link):
    reset(link.client)
    rig.until_ended(link.id)


def cut(rig, link):
    rig.relay.close_all()


def idle(rig, link):
    rig.relay.idle_ms = 1
    rig.until_ended(link.id)


@pytest.mark.parametrize("end", [closed_by_both, reset_by_one, cut, idle])
def test_sockets_that_another_process_has_too(rigs, pair, end):
    """Then close(2) does not take them out of epoll, which would go on pointing to what was freed
    long ago. Others get them by pidfd_getfd(2), a fork, or Accept=yes."""
    rig = rigs(*pair)
    client, fd = rig.knock()
    before = open_fds()
    link = Link(client, None, rig.connect(fd), fd)
    (target_fd,) = map(int, open_fds() - before)
    copies = [os.dup(fd), os.dup(target_fd)]
    try:
        link.target = rig.meet()
        rig.settle()
        assert len(registered(rig, copies)) == 2
        end(rig, link)
        assert not registered(rig, copies)
        for copy in copies:  # what the others do with it is heard of no more
            with socket.socket(fileno=os.dup(copy)) as other, contextlib.suppress(OSError):
                other.shutdown(socket.SHUT_RDWR)
        rig.settle()
    finally:
        for copy in copies:
            os.close(copy)


@pytest.mark.parametrize("word", [b"", b"something"])
def test_failed_connect_of_sockets_that_another_process_has_too(rigs, word):
    rig = rigs()
    client, fd = rig.knock()
    client.send(word)
    rig.backend.close()
    before = open_fds()
    rig.connect(fd)
    copies = [os.dup(int(one)) for one in {str(fd), *(open_fds() - before)}]
    try:
        rig.until(rig.failures, "the failure")
        assert not registered(rig, copies)
    finally:
        for copy in copies:
            os.close(copy)


def test_watched_fds_that_another_process_has_too(rigs):
    """A held client, a socket that was dialled, and a listener whose gate is gone."""
    rig = rigs()
    _, fd = rig.knock()
    rig.relay.watch(fd, 0)
    target = rig.relay.dial(rig.address)
    door = open_listener("tcp4", rigs.directory, blocking=False)
    gate = RelayListener(rig.relay, door.fileno(), FAMILIES["tcp4"], 0, 1)
    gate.start()
    copies = [os.dup(fd), os.dup(target), os.dup(door.fileno())]
    try:
        assert len(registered(rig, copies)) == 3
        rig.relay.hang_up(fd)
        rig.relay.hang_up(target)
        del gate
        gc.collect()
        assert not registered(rig, copies)
    finally:
        for copy in [*copies, door.detach()]:
            os.close(copy)


def test_client_that_is_still_watched_is_taken_over(rigs):
    """connect() and adopt() leave nothing behind of a watch of the client."""
    rig = rigs()
    for way in ("connect", "adopt"):
        client, fd = rig.knock()
        rig.relay.watch(fd, 0)
        if way == "connect":
            number = rig.connect(fd)
        else:
            target = rig.relay.dial(rig.address)
            number = rig.relay.adopt(fd, FAMILIES["tcp4"], target)
        link = Link(client, rig.meet(), number, fd)
        link.client.send(b"hello")
        assert rig.read(link.target, 5) == b"hello"


def test_more_notes_than_there_is_room_for(rigs):
    """Hundreds of listeners that break while they are full, and a thread that could help: each of
    them is told, in as many turns as it takes."""
    rig = rigs()
    rig.relay.offload_when_busy(-1, 0)
    rig.relay.connections_max = 0
    rig.gate.stop()
    copies = [os.dup(rig.door.fileno()) for _ in range(600)]
    gates = [
        RelayListener(rig.relay, copy, FAMILIES["tcp4"], 0, index)
        for index, copy in enumerate(copies)
    ]
    for gate in gates:
        gate.start()
    while True:  # until all have heard of a client, and wait for room: then none is watched
        if not select.select([rig.door], [], [], 0)[0]:
            rig.keep(open_client(rig.door))
        for _ in range(4):
            rig.turn()
        if select.select([rig.door], [], [], 0)[0] and not select.select([rig.epoll], [], [], 0)[0]:
            break
    for copy in copies:
        os.close(copy)
    rig.until(lambda: len(rig.of_kind(AcceptFailed)) == 600, "all of them")
    assert {event.listener for event in rig.of_kind(AcceptFailed)} == set(range(600))
    assert len(rig.of_kind(WorkersWanted)) == 1
    for gate in gates:
        gate.stop()


def test_as_many_ready_fds_as_a_batch_holds(rigs):
    rig = rigs()
    pipes = [os.pipe() for _ in range(300)]
    try:
        for reading, writing in pipes:
            rig.relay.watch(reading, 1 | 1 << 31)  # EPOLLIN | EPOLLET: told once
            os.write(writing, b"x")
        clients = [rig.keep(open_client(rig.door)) for _ in range(40)]
        rig.until(lambda: len(rig.of_kind(Accepted)) == len(clients), "all clients")
        assert {fd for fd, _ in rig.ready()} == {reading for reading, _ in pipes}
    finally:
        for reading, writing in pipes:
            rig.relay.unwatch(reading)
            os.close(reading)
            os.close(writing)


# ── arguments ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arguments", [("many",), (-1,), (0,), (1, 2, 3, 4, 5)])
def test_bad_arguments_are_errors(arguments):
    """A relay that could not be made is taken apart without harm; fd 0 is not its own."""

    def scenario():
        with pytest.raises((TypeError, ValueError, OverflowError)):
            Relay(*arguments)
        os.fstat(0)

    in_child(scenario)


def test_more_memory_than_there_is():
    def scenario():
        with pytest.raises(MemoryError):
            Relay(stream_unit=1 << 60)
        os.fstat(0)

    in_child(scenario)


@pytest.mark.parametrize("stream_unit", [1, 100, 4096, 65535, 65537, 1 << 24])
def test_any_stream_unit(rigs, way, stream_unit):
    """Small ones as well: every read fits into the buffer that was made for it."""

    def scenario():
        rig = rigs("unix", "tcp4", stream_unit=stream_unit, **way)
        link = rig.link()
        data = payload(min(1_000_000, 20_000 * stream_unit))
        for speaker, listener in ((link.client, link.target), (link.target, link.client)):
            incoming = Incoming(listener)
            rig.run(Outgoing(speaker, data, half_close), incoming)
            assert incoming.data == data
        blocks = [bytes(100_000) for _ in range(100)]  # a spoilt heap shows here at the latest
        assert len(blocks) == 100

    in_child(scenario)


def test_fd_limit_is_raised_and_never_lowered():
    def scenario():
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
        assert raise_fd_limit(50) == 100
        assert raise_fd_limit(150) == 150
        assert raise_fd_limit(1000) == 200
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (200, 200)
        assert hard >= 200

    in_child(scenario)
