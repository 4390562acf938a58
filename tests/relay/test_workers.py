"""Several workers: connections handed over, clients given back, common counters, and the end.

The test steps the main worker, as ever; the other workers run in threads of their own.
"""

import errno
import os
import resource
import time

import pytest
from kit.child import in_child
from kit.rig import PATIENCE_S, open_fds, values
from kit.rights import thread_ids
from kit.sockets import reset
from kit.stepped import Incoming, Outgoing, close, half_close, open_client
from kit.traffic import payload
from kit.workers import Workers

from proxyd._relay import (
    CHECK_TCP,
    CHECK_UNIX,
    ENDINGS,
    AcceptFailed,
    Ended,
    Refused,
    RelayListener,
    tune_socket,
)

FDS_OF_A_WORKER = 2
"""Its epoll instance and its eventfd; with the first one, the main worker opens an eventfd too."""


@pytest.fixture
def start_workers(rigs):
    """Makes a rig with `count` workers in addition to the main one."""

    def make(*pair, count=1, **options):
        return Workers(rigs(*pair, **options), count)

    return make


def wait_for(condition):
    """Wait for something that the workers do, while the main worker does nothing."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def take_all_fds():
    """Open files until the limit is reached; their fds."""
    taken = []
    with pytest.raises(OSError) as refusal:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    assert refusal.value.errno == errno.EMFILE
    return taken


# ── hand-over ────────────────────────────────────────────────────────────────────────────────────


def test_a_new_connection_goes_to_the_worker_with_the_fewest(start_workers):
    workers = start_workers(count=2)
    links = []
    for number in range(1, 10):
        links.append(workers.rig.link())
        workers.until_assigned(links[-1:])
        numbers = workers.workers_of(links)
        counts = [numbers.count(worker) for worker in range(3)]
        assert max(counts) - min(counts) <= 1, (number, counts)
    gone = [link for link, worker in zip(links, numbers, strict=True) if worker == 2]
    for link in gone:
        reset(link.client)
    workers.rig.until(lambda: workers.rig.relay.connections == len(links) - len(gone), "their ends")
    assert workers.worker_of(workers.link(2).client_fd) == 2


def test_bytes_and_ends_arrive(start_workers, pair, mode):
    workers = start_workers(*pair, **mode)
    link = workers.link(1)
    up, down = payload(3_000_000), payload(2_000_000, 2)
    there, back = Incoming(link.target), Incoming(link.client)
    workers.rig.run(
        Outgoing(link.client, up, half_close), there, Outgoing(link.target, down, half_close), back
    )
    assert (there.data, there.end) == (up, "eof")
    assert (back.data, back.end) == (down, "eof")
    assert workers.rig.until_ended(link.id) == ("ended", len(up), len(down))
    assert workers.rig.ended(link.id).client_error == workers.rig.ended(link.id).target_error == 0


def test_a_preamble_goes_first(start_workers, pair):
    workers = start_workers(*pair)
    workers.rig.link()
    link = workers.rig.link(preamble=b"header ")
    link.client.send(b"word")
    assert workers.rig.read(link.target, 11) == b"header word"
    assert workers.worker_of(link.client_fd) == 1


def test_an_adopted_connection_is_handed_over(start_workers, pair):
    workers = start_workers(*pair)
    workers.rig.link()
    link = workers.rig.adopted_link(preamble=b"header ")
    link.client.send(b"word")
    assert workers.rig.read(link.target, 11) == b"header word"
    workers.rig.until(lambda: workers.worker_of(link.target_fd) == 1, "the hand-over")


def test_a_reset_is_passed_on(start_workers, pair):
    workers = start_workers(*pair)
    link = workers.link(1)
    reset(link.client)
    data, end = workers.rig.read_to_end(link.target)
    assert (data, end) == (b"", "eof" if "unix" in pair else "reset")
    workers.rig.until(lambda: workers.rig.ended(link.id), "the end")


def test_idle_connections_are_closed(rigs):
    rig = rigs()
    rig.relay.idle_ms = 50
    workers = Workers(rig)
    rig.link()
    rig.link()
    rig.until(lambda: len(rig.of_kind(Ended)) == 2, "both ends")
    assert [event.ending for event in rig.of_kind(Ended)] == ["idle", "idle"]
    assert len(workers.epolls) == 1


# ── failed connects ──────────────────────────────────────────────────────────────────────────────


def test_a_failed_connect_gives_the_client_back(start_workers):
    """The client comes back with the bytes that it has sent, and counts as held."""
    workers = start_workers("tcp4", "tcp4")
    rig = workers.rig
    rig.link()
    rig.backend.close()
    client, fd = rig.new_client()
    client.send(b"word")
    number = rig.connect(fd, preamble=b"header ", listener=7)
    rig.relay.connections_max, rig.relay.held = 2, 0
    rig.until(rig.failures, "the refusal")
    (failed,) = rig.failures()
    assert (failed.client, failed.error) == (fd, errno.ECONNREFUSED)
    assert (failed.listener, failed.connection) == (7, number)
    said = failed.pending.removeprefix(b"header ")
    assert failed.pending.startswith(b"header ")
    assert said in (b"", b"word")
    os.set_blocking(fd, True)
    if not said:
        assert os.read(fd, 10) == b"word"
    assert workers.worker_of(fd) is None
    assert rig.relay.connections == 1
    assert (rig.relay.connections_max, rig.relay.held) == (2, 1)  # until the policy assigns `held`


def test_the_limit_is_exact(start_workers, pair):
    """Connections of all workers count towards it, and the end of one admits the next client."""
    workers = start_workers(*pair, count=2)
    rig = workers.rig
    rig.listener.auto_connect(rig.address)
    rig.relay.connections_max = 6
    clients = [rig.keep(open_client(rig.listen_socket)) for _ in range(6)]
    targets = [rig.accept_at_backend() for _ in range(6)]
    assert rig.relay.connections == 6
    for client, target in zip(clients, targets, strict=True):
        client.send(b"x")
        assert rig.read(target, 1) == b"x"
    late = rig.keep(open_client(rig.listen_socket))
    late.send(b"late")
    rig.turn(0)  # the relay has seen it; it waits for room
    assert rig.listener.connected_count == 6
    for connection in (clients[4], targets[4]):
        close(connection)
    wait_for(lambda: rig.relay.connections == 5)  # without a turn of the main worker
    assert rig.read(rig.accept_at_backend(), 4) == b"late"
    assert rig.relay.connections == 6
    over = rig.keep(open_client(rig.listen_socket))
    rig.until(lambda: rig.of_kind(Refused), "the refusal")
    assert rig.read_to_end(over)[0] == b""
    assert rig.totals().refused == 1


def test_the_main_worker_wakes_when_few_enough_connections_are_left(start_workers):
    workers = start_workers()
    rig = workers.rig
    rig.relay.report_ends = False
    stays, goes = rig.link(), workers.link(1)
    rig.settle()
    rig.relay.wake_at_count = rig.relay.connections - 1
    assert stays.client_fd != goes.client_fd
    reset(goes.client)
    until = time.monotonic() + 20
    rig.turn(20_000)
    while rig.relay.connections > rig.relay.wake_at_count:  # another event may have come first
        assert time.monotonic() < until
        rig.turn(20_000)
    assert rig.relay.run(20_000) == []  # at once if there are few enough already


@pytest.mark.parametrize("family", ["tcp4", "unix"])
def test_our_own_connection_is_recognised(rigs, family, tmp_path):
    """Whichever worker has the other end of the connection."""
    rig = rigs(family, family)
    workers = Workers(rig)
    workers.link(1)
    check = CHECK_UNIX if family == "unix" else CHECK_TCP
    own = RelayListener(rig.relay, rig.backend.fileno(), rig.backend.family, check, 9)
    tune_socket(rig.backend.fileno(), rig.backend.family)
    own.start()
    for _ in range(2):  # one for each worker
        client, fd = rig.new_client()
        rig.connect(fd)
        rig.keep(client)
    rig.until(lambda: len(rig.of_kind(AcceptFailed)) == 2, "both loops")
    own.stop()
    assert [(e.error, e.listener) for e in rig.of_kind(AcceptFailed)] == [(errno.ELOOP, 9)] * 2


# ── counting ─────────────────────────────────────────────────────────────────────────────────────


def test_counters_add_up(start_workers, pair, way):
    """The counters of all workers, while these run and after they have ended."""
    workers = start_workers(*pair, count=2, **way)
    rig = workers.rig
    sizes = [(1000 * number, 77_000 * number) for number in range(1, 7)]
    links = [rig.link() for _ in sizes]
    flows = []
    for link, (up, down) in zip(links, sizes, strict=True):
        flows += [Outgoing(link.client, payload(up), half_close), Incoming(link.target)]
        flows += [Outgoing(link.target, payload(down), half_close), Incoming(link.client)]
    rig.run(*flows)
    rig.until(lambda: len(rig.of_kind(Ended)) == len(links), "all ends")
    before = rig.totals()
    up, down = (sum(each) for each in zip(*sizes, strict=True))
    assert (before.bytes_to_targets, before.bytes_to_clients) == (up, down)
    assert before.spliced + before.copied == up + down
    assert before.endings == {**dict.fromkeys(ENDINGS, 0), "ended": len(links)}
    assert rig.relay.connections == 0
    assert rig.relay.close_all() == 0
    assert values(rig.totals()) == values(before)


def test_every_worker_answers(start_workers):
    workers = start_workers(count=3)
    relay = workers.rig.relay
    assert relay.workers_answered
    for _ in range(100):
        relay.ping_workers()
        workers.rig.until(lambda: relay.workers_answered, "the answers")


def test_without_further_workers_all_have_answered(rigs):
    relay = rigs().relay
    relay.ping_workers()
    assert relay.workers_answered


def test_idle_pipes_are_closed_in_every_worker(start_workers):
    workers = start_workers("tcp4", "tcp4", count=1)
    rig = workers.rig
    stays, link = rig.link(), workers.link(1)
    before = open_fds()
    for each in (stays, link):
        rig.run(Outgoing(each.client, payload(4_000_000)), Incoming(each.target, limit=4_000_000))
    assert len(open_fds() - before) >= 4
    rig.relay.trim_pipes()
    rig.until(lambda: open_fds() == before, "the end of the pipes")


# ── the end ──────────────────────────────────────────────────────────────────────────────────────


def test_close_all_cuts_every_connection(start_workers, pair):
    threads = thread_ids()
    workers = start_workers(*pair, count=2)
    rig = workers.rig
    links = [rig.link() for _ in range(7)]
    worker_threads = thread_ids() - threads
    assert len(worker_threads) == 2
    assert rig.relay.close_all() == 7
    wait_for(lambda: not worker_threads & thread_ids())
    assert rig.relay.connections == 0
    rig.turn()
    assert {event.ending for event in rig.of_kind(Ended)} == {"cut"}
    assert {event.connection for event in rig.of_kind(Ended)} == {link.id for link in links}
    for link in links:
        for side in (link.client, link.target):
            data, end = rig.read_to_end(side)
            assert data == b""
            assert end == ("eof" if side.family == 1 else "reset")


def test_close_all_during_hand_overs(start_workers):
    """Connections that are in a mailbox at that moment are cut too."""
    for _ in range(50):
        workers = start_workers(count=2)
        rig = workers.rig
        rig.listener.auto_connect(rig.address)
        clients = [rig.keep(open_client(rig.listen_socket)) for _ in range(8)]
        rig.until(lambda rig=rig: rig.listener.connected_count == 8, "eight hand-overs")
        assert rig.relay.close_all() == 8
        assert rig.relay.connections == 0
        assert len(clients) == 8


def test_a_relay_that_is_dropped_while_its_workers_run(rigs, tmp_path):
    """Nothing was closed beforehand: all fds and threads go with the object."""
    threads, before = thread_ids(), open_fds()
    rig = rigs()
    Workers(rig, 2)
    links = [rig.link() for _ in range(5)]
    rig.listener.stop()
    del rig.relay, rig.listener
    rigs.forget(rig)
    wait_for(lambda: thread_ids() <= threads)
    assert open_fds() == before
    assert len(links) == 5


def test_a_failed_connect_that_was_not_reported_goes_with_the_relay(rigs):
    before = open_fds()
    rig = rigs("tcp4", "tcp4")
    Workers(rig)
    rig.link()
    rig.backend.close()
    client, fd = rig.new_client()
    known = open_fds()
    rig.connect(fd)
    wait_for(lambda: open_fds() == known)  # the socket to the target was opened and closed
    rig.listener.stop()
    del rig.relay, rig.listener
    with pytest.raises(ConnectionResetError):  # it was cut: not a clean end
        client.recv(1)
    rigs.forget(rig)
    assert open_fds() == before


def test_new_workers_after_the_last_ones_have_ended(start_workers):
    workers = start_workers()
    workers.rig.link()
    workers.rig.relay.close_all()
    again = Workers(workers.rig)
    link = again.link(1)
    link.client.send(b"x")
    assert workers.rig.read(link.target, 1) == b"x"


def test_a_worker_that_cannot_be_started_leaves_nothing_behind(rigs):
    def scenario():
        rig = rigs()
        rig.relay.start_worker()
        link = rig.link()
        before = open_fds()
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + 50, 1024))
        for spare in range(FDS_OF_A_WORKER):
            taken = take_all_fds()
            for _ in range(spare):
                os.close(taken.pop())
            with pytest.raises(OSError) as refusal:
                rig.relay.start_worker()
            assert refusal.value.errno == errno.EMFILE
            for fd in taken:
                os.close(fd)
            assert open_fds() == before
        rig.relay.start_worker()
        link.client.send(b"x")
        assert rig.read(link.target, 1) == b"x"

    in_child(scenario)


def test_workers_block_every_signal(start_workers):
    before = set(os.listdir("/proc/self/task"))
    start_workers(count=2)
    for task in set(os.listdir("/proc/self/task")) - before:
        with open(f"/proc/self/task/{task}/status") as status:
            (blocked,) = (line.split()[1] for line in status if line.startswith("SigBlk"))
        # All but SIGKILL, SIGSTOP and the two that libc keeps for itself.
        assert int(blocked, 16) | 1 << 8 | 1 << 18 | 3 << 31 == (1 << 64) - 1
