"""What the relay tells of its connections: snapshots, begins and ends, totals by target; and what
it does to one of them: terminate().
"""

import os
import socket
import time

import pytest
from kit.file_limit import files_allowed
from kit.rig import PATIENCE_S
from kit.sockets import FAMILIES, open_listener, reset
from kit.stepped import Incoming, Outgoing, close, half_close, open_client
from kit.traffic import payload
from kit.workers import Workers

from proxyd._relay import (
    CONNECT_BUCKETS_US,
    ENDINGS,
    HALF_STATES,
    STATES,
    Begun,
    ConnectFailed,
    ConnectionInfo,
    Ended,
    HalfInfo,
    SnapshotRows,
    Terminated,
    socket_names,
)

ROWS_MAX = 64
"""Rows of an event."""


FILES = 8192
"""Four for each connection: two of the relay, and their peers."""


@pytest.fixture(autouse=True)
def many_files():
    """Allow the files of many connections."""
    with files_allowed(FILES):
        yield


def snapshot(rig, **options):
    """Take a snapshot: (its rows, its last event)."""
    number = rig.relay.start_snapshot(**options)
    return rows_of(rig, number)


def rows_of(rig, number):
    """Wait for the snapshot of that number: (its rows, its last event)."""
    rows = []

    def complete():
        events = [one for one in rig.of_kind(SnapshotRows) if one.number == number]
        assert not any(one.last for one in events[:-1])
        if not events or not events[-1].last:
            return False
        assert all(1 <= len(one.rows) <= ROWS_MAX for one in events[:-1])
        rows.extend(row for one in events for row in one.rows)
        return True

    rig.until(complete, "the snapshot")
    return rows, rig.of_kind(SnapshotRows)[-1]


def row_of(rig, number):
    """The row of one connection in a new snapshot."""
    (row,) = [one for one in snapshot(rig)[0] if one.connection == number]
    return row


def terminate(rig, number):
    """Terminate a connection; whether it was found."""
    rig.relay.terminate(number)
    before = len(rig.of_kind(Terminated))
    rig.until(lambda: len(rig.of_kind(Terminated)) > before, "the answer")
    answer = rig.of_kind(Terminated)[-1]
    assert answer.connection == number
    return answer.found


@pytest.fixture(params=[0, 2], ids=["one thread", "three threads"])
def threads(request):
    """How many workers there are in addition to the main one."""
    return request.param


@pytest.fixture
def make(rigs, threads):
    """Makes a rig with that number of workers."""

    def made(*pair, **options):
        rig = rigs(*pair, **options)
        rig.workers = Workers(rig, threads)
        return rig

    return made


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────


def test_without_connections_there_is_one_event(make):
    rig = make()
    rows, last = snapshot(rig)
    assert (rows, last.last, last.missing) == ([], True, 0)


def test_a_row_tells_all_of_a_connection(make, pair):
    rig = make(*pair)
    client, fd = rig.new_client()
    number = rig.connect(fd, listener=3, upstream=5, peer=socket_names(fd)[0], held_ms=70)
    target = rig.accept_at_backend()
    rig.send(client, b"up!")
    rig.read(target, 3)
    rig.send(target, b"down")
    rig.read(client, 4)
    row = row_of(rig, number)
    assert (row.state, row.listener, row.upstream, row.held_ms) == ("open", 3, 5, 70)
    assert row.client == socket_names(fd)[0]
    assert row.client_pid == (os.getpid() if pair[0] == "unix" else 0)
    assert row.target == rig.address
    assert row.local == socket_names(target.fileno())[0]
    assert 0 <= row.connect_us < PATIENCE_S * 1_000_000
    assert row.opened_ms <= row.active_ms <= rig.relay.now_ms
    assert (row.up.bytes, row.up.in_flight, row.up.state) == (3, 0, "flowing")
    assert (row.down.bytes, row.down.in_flight, row.down.state) == (4, 0, "flowing")
    assert 0 <= row.thread <= rig.relay.thread_count - 1


def test_clients_that_are_connected_automatically_are_told_with_their_address(make):
    rig = make()
    rig.listener.auto_connect(rig.address, upstream=2)
    client = rig.keep(open_client(rig.listen_socket))
    rig.accept_at_backend()
    (row,), _ = snapshot(rig)
    assert row.client == socket_names(client.fileno())[1]
    assert (row.target, row.upstream) == (rig.address, 2)


def test_an_adopted_connection_is_told_like_others(make, pair):
    rig = make(*pair)
    client, fd = rig.new_client()
    held = rig.relay.new_id()
    target = rig.relay.dial(rig.address)
    rig.accept_at_backend()
    rig.until(lambda: (target, 4) in rig.ready() or rig.ready(), "the connect")
    number = rig.relay.adopt(
        fd, FAMILIES[pair[0]], target, listener=1, upstream=4, held_ms=9, connection=held
    )
    assert number == held
    row = row_of(rig, number)
    assert (row.listener, row.upstream, row.held_ms) == (1, 4, 9)
    assert row.target == rig.address
    assert row.connect_us >= 0
    assert sum(rig.relay.target_totals(4).connects) == 1
    assert client.fileno() >= 0


def test_a_held_client_keeps_its_id(make):
    rig = make()
    _, fd = rig.new_client()
    held = rig.relay.new_id()
    assert rig.connect(fd, connection=held) == held
    _, fd = rig.new_client()
    assert rig.connect(fd) > held


def test_the_threads_of_rows(rigs):
    rig = rigs()
    workers = Workers(rig, 2)
    links = [rig.link() for _ in range(9)]
    workers.until_assigned(links)
    rows, _ = snapshot(rig)
    assert {row.connection: row.thread for row in rows} == {
        link.id: workers.worker_of(link.client_fd) for link in links
    }


def test_bytes_in_flight(make):
    rig = make(target_buffers={"receive_buffer": 4096}, may_splice=False)
    link = rig.link()
    taken = rig.fill(link.client)
    row = row_of(rig, link.id)
    assert row.up.in_flight > 0
    assert row.up.bytes + row.up.in_flight <= taken
    incoming = Incoming(link.target, limit=taken)
    rig.run(incoming)
    row = row_of(rig, link.id)
    assert (row.up.bytes, row.up.in_flight) == (taken, 0)


def test_a_preamble_counts_as_bytes_for_the_target(make):
    rig = make()
    link = rig.link(preamble=b"header ")
    link.client.send(b"word")
    rig.read(link.target, 11)
    assert row_of(rig, link.id).up.bytes == 11
    assert rig.relay.target_totals(0).bytes_to_target == rig.totals().bytes_to_targets == 11


def test_states_of_halves_and_of_connections(make):
    rig = make()
    link = rig.link()
    half_close(link.client)
    assert rig.read_to_end(link.target) == (b"", "eof")
    row = row_of(rig, link.id)
    assert (row.state, row.up.state, row.down.state) == ("open", "shut", "flowing")
    assert set(STATES) == {"connecting", "open", "lingering"}
    assert set(HALF_STATES) == {"flowing", "draining", "shut", "dead"}


def silent_address(rig):
    """Where a connect neither succeeds nor fails for now: the backlog of the listener is full."""
    full = rig.keep(open_listener("tcp4", "", backlog=0))
    for _ in range(3):
        client = rig.keep(socket.socket())
        client.setblocking(False)
        client.connect_ex(full.getsockname())
    return socket_names(full.fileno())[1]


def test_a_connection_that_is_connecting(make):
    rig = make()
    rig.address = silent_address(rig)
    _, fd = rig.new_client()
    number = rig.connect(fd)
    row = row_of(rig, number)
    assert (row.state, row.target, row.connect_us) == ("connecting", rig.address, -1)
    assert row.local
    assert terminate(rig, number)
    assert rig.until_ended(number) == ("cut", 0, 0)


def test_a_connection_that_lingers(make):
    rig = make("tcp4", "tcp4", client_buffers={"receive_buffer": 4096})
    link = rig.link()
    rig.fill(link.target)
    reset(link.target)
    rows = []

    def lingers():
        rows[:] = [row for row in snapshot(rig)[0] if row.connection == link.id]
        if not rows:
            return True
        assert rig.read(link.client, 4096)
        return rows[0].state == "lingering"

    rig.until(lingers, "the last words to fit")
    assert [row.state for row in rows] == ["lingering"]
    assert rows[0].target == rig.address


# ── none missed, none told twice ─────────────────────────────────────────────────────────────────


def test_every_connection_is_told_once(make):
    rig = make()
    links = [rig.link() for _ in range(300)]
    rows, last = snapshot(rig)
    assert sorted(row.connection for row in rows) == [link.id for link in links]
    assert last.missing == 0


def test_snapshots_while_connections_move_bytes_begin_and_end(make):
    """Those that are there before and after it are told once, and no others twice."""
    rig = make()
    lasting = [rig.link() for _ in range(150)]
    passing = [rig.link() for _ in range(60)]
    rig.listener.auto_connect(rig.address)
    for _ in range(10):
        number = rig.relay.start_snapshot()
        for link in lasting:
            link.client.send(b"x")
        for link in passing[:6]:
            close(link.client)
        del passing[:6]
        for _ in range(5):
            rig.keep(open_client(rig.listen_socket))
        rows, _ = rows_of(rig, number)
        told = [row.connection for row in rows]
        assert len(told) == len(set(told))
        assert {link.id for link in lasting} | {link.id for link in passing} <= set(told)


def test_snapshots_while_connections_change_threads(rigs):
    """Each worker gives its connections away again and again."""
    rig = rigs()
    workers = Workers(rig, 0)
    rig.relay.offload_when_busy(-1, window_ms=1)
    workers.start(2)
    links = [rig.link() for _ in range(80)]
    moved = rig.relay.handed_over
    deadline = time.monotonic() + PATIENCE_S
    snapshots = 0
    while snapshots < 40 or rig.relay.handed_over < moved + 40:
        assert time.monotonic() < deadline, rig.relay.handed_over
        number = rig.relay.start_snapshot()
        for link in links:
            link.client.send(b"x" * 1000)
        rows, _ = rows_of(rig, number)
        assert sorted(row.connection for row in rows) == [link.id for link in links]
        for link in links:
            rig.read(link.target, 1000)
        snapshots += 1


def test_a_worker_that_starts_during_a_snapshot(rigs):
    rig = rigs()
    workers = Workers(rig, 1)
    links = [rig.link() for _ in range(200)]
    number = rig.relay.start_snapshot()
    rig.turn()
    workers.start(1)
    rows, _ = rows_of(rig, number)
    assert sorted(row.connection for row in rows) == [link.id for link in links]
    assert len(snapshot(rig)[0]) == 200


def test_a_client_whose_connect_fails_during_a_snapshot_is_told(make):
    """It was connecting when the snapshot began, and is the policy's before it is complete."""
    rig = make()
    links = [rig.link() for _ in range(100)]
    rig.backend.close()
    _, fd = rig.new_client()
    number = rig.connect(fd)
    if isinstance(number, ConnectFailed):
        pytest.skip("the connect fails at once")
    sweep = rig.relay.start_snapshot()
    rows, _ = rows_of(rig, sweep)
    assert sorted(row.connection for row in rows) == [*(link.id for link in links), number]
    rig.until(rig.failures, "the failure")
    assert rig.failures()[0].connection == number


def test_a_snapshot_goes_on_while_every_turn_has_other_events(make):
    rig = make()
    links = [rig.link() for _ in range(100)]
    fd = os.eventfd(1)
    rig.relay.watch(fd)
    rows, _ = snapshot(rig)
    assert len(rows) == len(links)
    rig.relay.unwatch(fd)
    os.close(fd)


def test_snapshots_follow_one_another(make):
    rig = make()
    links = [rig.link() for _ in range(70)]
    numbers = [rig.relay.start_snapshot() for _ in range(3)]
    assert numbers == sorted(set(numbers))
    for number in numbers:
        rows, _ = rows_of(rig, number)
        assert len(rows) == len(links)
    assert [one.number for one in rig.of_kind(SnapshotRows) if one.last] == numbers


def test_bytes_are_forwarded_between_the_batches(make, threads):
    """A batch of rows a turn: others are served in between. By other threads, once they run."""
    rig = make()
    for _ in range(5 * ROWS_MAX):
        rig.link()
    link = rig.link()
    link.client.send(b"ping")
    rig.relay.start_snapshot()
    batches = 0
    got = b""
    while not got:
        rig.turn()
        batches = len(rig.of_kind(SnapshotRows))
        incoming = Incoming(link.target, limit=4)
        incoming.step()
        got = bytes(incoming.data)
    assert batches < 5 or threads


def test_a_snapshot_that_is_not_fetched_holds_little_memory(rigs):
    """A worker waits after a few batches, and goes on when the policy has fetched some."""
    rig = rigs()
    Workers(rig, 1)
    links = [rig.link() for _ in range(30 * ROWS_MAX // 2)]
    number = rig.relay.start_snapshot()
    time.sleep(0)  # the worker may run
    rows, _ = rows_of(rig, number)
    assert len(rows) == len(links)


def test_the_end_during_a_snapshot(make):
    rig = make()
    for _ in range(200):
        rig.link()
    number = rig.relay.start_snapshot()
    rig.turn()
    rig.relay.close_all()
    rows_of(rig, number)


def test_a_relay_that_is_dropped_during_a_snapshot(rigs, threads):
    rig = rigs()
    Workers(rig, threads)
    rig.relay.report_begins = True
    links = [rig.link() for _ in range(100)]
    rig.relay.start_snapshot()
    rig.turn()
    rig.listener.stop()
    del rig.relay, rig.listener
    rigs.forget(rig)
    assert len(links) == 100


# ── terminate ────────────────────────────────────────────────────────────────────────────────────


def test_terminate_resets_both_sides(make):
    rig = make()
    links = [rig.link() for _ in range(20)]
    link = links.pop(7)
    assert terminate(rig, link.id)
    assert rig.read_to_end(link.client)[1] == "reset"
    assert rig.read_to_end(link.target)[1] == "reset"
    assert rig.until_ended(link.id) == ("cut", 0, 0)
    assert rig.totals().endings["cut"] == rig.relay.target_totals(0).endings["cut"] == 1
    rows, _ = snapshot(rig)
    assert sorted(row.connection for row in rows) == [one.id for one in links]
    assert not terminate(rig, link.id)


def test_terminate_of_what_is_no_connection(make):
    rig = make()
    link = rig.link()
    for number in (0, -1, link.id + 1000, 1 << 62):
        assert not terminate(rig, number)
    assert rig.relay.connections == 1


def test_several_are_terminated_during_a_snapshot(make):
    rig = make()
    links = [rig.link() for _ in range(100)]
    number = rig.relay.start_snapshot()
    for link in links[::10]:
        rig.relay.terminate(link.id)
    rows, _ = rows_of(rig, number)
    assert len(rows) == len(links)
    rig.until(lambda: len(rig.of_kind(Terminated)) == 10, "the answers")
    assert all(one.found for one in rig.of_kind(Terminated))
    rig.until(lambda: rig.relay.connections == 90, "the ends")


# ── begins and ends ──────────────────────────────────────────────────────────────────────────────


def test_begins_are_reported_while_they_are_wanted(make):
    rig = make()
    rig.link()
    rig.relay.report_begins = True
    assert rig.relay.report_begins is True
    link = rig.link()
    rig.relay.report_begins = False
    rig.link()
    rig.settle()
    (begun,) = rig.of_kind(Begun)
    assert (begun.info.connection, begun.info.target) == (link.id, rig.address)
    assert begun.info.state in ("connecting", "open")


def test_a_client_that_was_held_does_not_begin_when_it_is_connected(make):
    """The policy has told of it when it was accepted."""
    rig = make()
    rig.relay.report_begins = True
    _, fd = rig.new_client()
    connected = rig.relay.new_id()
    assert rig.connect(fd, connection=connected) == connected
    rig.accept_at_backend()
    _, fd = rig.new_client()
    adopted = rig.relay.new_id()
    target = rig.relay.dial(rig.address)
    rig.accept_at_backend()
    rig.until(lambda: (target, 4) in rig.ready() or rig.ready(), "the connect")
    assert rig.relay.adopt(fd, FAMILIES["tcp4"], target, connection=adopted) == adopted
    link = rig.link()
    rig.settle()
    (begun,) = rig.of_kind(Begun)
    assert begun.info.connection == link.id


def test_an_end_has_the_connection_while_begins_are_wanted(make):
    rig = make()
    links = [rig.link() for _ in range(4)]
    close(links[0].client)
    close(links[0].target)
    rig.until_ended(links[0].id)
    assert rig.ended(links[0].id).info is None
    rig.relay.report_begins = True
    for link in links[1:]:
        link.client.send(b"abc")
        rig.read(link.target, 3)
        close(link.client)
        close(link.target)
        rig.until_ended(link.id)
        info = rig.ended(link.id).info
        assert (info.connection, info.up.bytes, info.down.bytes) == (link.id, 3, 0)
        assert info.target == rig.address


def test_ends_can_be_switched_off_and_on_while_threads_run(make):
    rig = make()
    for wanted in (False, True, False, True):
        rig.relay.report_ends = wanted
        assert rig.relay.report_ends is wanted
        link = rig.link()
        close(link.client)
        close(link.target)
        rig.until(lambda: rig.relay.connections == 0, "the end")
        rig.settle()
        assert (rig.ended(link.id) is not None) is wanted


# ── totals by target ─────────────────────────────────────────────────────────────────────────────


def test_totals_by_target_are_exact(make, mode):
    rig = make(**mode)
    sizes = {0: (300_000, 20), 1: (5, 1_000_000), 7: (0, 0)}
    for upstream, (up, down) in sizes.items():
        for _ in range(3):
            link = rig.link(upstream=upstream)
            flows = [
                Outgoing(link.client, payload(up), half_close),
                Incoming(link.target),
                Outgoing(link.target, payload(down), half_close),
                Incoming(link.client),
            ]
            rig.run(*flows)
            rig.until_ended(link.id)
    for upstream, (up, down) in sizes.items():
        totals = rig.relay.target_totals(upstream)
        assert (totals.bytes_to_target, totals.bytes_to_clients) == (3 * up, 3 * down)
        assert totals.endings == dict.fromkeys(ENDINGS, 0) | {"ended": 3}
        assert sum(totals.connects) == 3
        assert totals.connect_us < PATIENCE_S * 1_000_000
    assert rig.totals().bytes_to_targets == sum(3 * up for up, _ in sizes.values())


def test_bytes_of_live_connections_are_counted_by_a_snapshot(make):
    rig = make()
    link = rig.link(upstream=1)
    sent = 0
    for rows in (True, False, True):
        rig.send(link.client, b"12345")
        rig.read(link.target, 5)
        before = rig.relay.target_totals(1).bytes_to_target
        told, _ = snapshot(rig, rows=rows)
        assert len(told) == rows
        sent += 5
        assert before == sent - 5
        assert rig.relay.target_totals(1).bytes_to_target == sent
    close(link.client)
    close(link.target)
    rig.until_ended(link.id)
    assert rig.relay.target_totals(1).bytes_to_target == sent


def test_bytes_that_are_lost_are_not_counted(make):
    """By target and over all, the same bytes count: those that were delivered."""
    rig = make("tcp4", "tcp4", target_buffers={"receive_buffer": 4096})
    link = rig.link()
    rig.fill(link.client)
    reset(link.target)
    rig.until_ended(link.id)
    totals = rig.totals()
    by_target = rig.relay.target_totals(0)
    assert by_target.bytes_to_target == totals.bytes_to_targets > 0
    assert by_target.bytes_to_clients == totals.bytes_to_clients == 0
    assert rig.ended(link.id).bytes_up > by_target.bytes_to_target


def test_connects_that_fail_are_not_counted(make):
    rig = make()
    rig.backend.close()
    _, fd = rig.new_client()
    rig.connect(fd, upstream=3)
    rig.until(lambda: rig.failures() or True, "the failure")
    rig.settle()
    assert sum(rig.relay.target_totals(3).connects) == 0
    assert sum(rig.relay.target_totals(3).endings.values()) == 0


def test_the_buckets_of_connect_times():
    assert CONNECT_BUCKETS_US[:4] == (100, 250, 500, 1000)
    assert list(CONNECT_BUCKETS_US) == sorted(set(CONNECT_BUCKETS_US))
    assert CONNECT_BUCKETS_US[-1] >= 10_000_000


def test_indexes_of_targets(rigs):
    rig = rigs()
    for index in (-1, 1 << 20, 1 << 30):
        with pytest.raises(ValueError, match="no such index"):
            rig.relay.target_totals(index)
    _, fd = rig.new_client()
    with pytest.raises(ValueError, match="no such index"):
        rig.connect(fd, upstream=-1)
    assert sum(rig.relay.target_totals((1 << 20) - 1).connects) == 0
    os.close(fd)


# ── records ──────────────────────────────────────────────────────────────────────────────────────


def test_records_can_be_made_by_others():
    """The policy's tests make them."""
    half = HalfInfo(1, 2, "flowing")
    info = ConnectionInfo(1, "open", 0, 0, b"c", 0, b"t", b"l", 1, 2, 0, 3, half, half, 0)
    assert Begun(info).info is info
    assert SnapshotRows(1, [info], True).missing == 0
    assert Terminated(1, True).found is True
    assert Ended(1, "cut", 0, 0, 0, 0, 0).info is None
    assert Ended(1, "cut", 0, 0, 0, 0, 0, info).info is info
