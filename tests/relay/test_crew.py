"""Relays in threads of their own: hand-over, what comes back, what all count together, and the end.

The boss is stepped by the test as ever; its crew runs by itself.
"""

import errno
import os
import resource
import time

import pytest
from kit.child import in_child
from kit.crew import Crewed
from kit.rig import PATIENCE_S, open_fds, values
from kit.sockets import reset
from kit.stepped import Incoming, Outgoing, close, half_close, open_client
from kit.traffic import payload

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

FDS_OF_A_THREAD = 2
"""Its epoll instance and its bell; the boss has a bell as well then."""


@pytest.fixture
def crews(rigs):
    def make(*pair, threads=1, **options):
        return Crewed(rigs(*pair, **options), threads)

    return make


def wait_for(condition):
    """Until the crew has done something, while the boss does nothing."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def take_all_fds():
    """Open files until there may be no more; their fds."""
    taken = []
    with pytest.raises(OSError) as refusal:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    assert refusal.value.errno == errno.EMFILE
    return taken


def threads_now():
    """Their ids; for a moment /proc may still show one that was joined."""
    return set(os.listdir("/proc/self/task"))


# ── hand-over ────────────────────────────────────────────────────────────────────────────────────


def test_connections_go_where_the_fewest_are(crews):
    crew = crews(threads=2)
    links = []
    for number in range(1, 10):
        links.append(crew.rig.link())
        crew.rig.until(lambda: crew.place_of(links[-1].client_fd) is not None, "a place")
        places = [crew.place_of(link.client_fd) for link in links]
        counts = [places.count(place) for place in range(3)]
        assert max(counts) - min(counts) <= 1, (number, counts)
    gone = [link for link, place in zip(links, places, strict=True) if place == 2]
    for link in gone:
        reset(link.client)
    crew.rig.until(lambda: crew.rig.relay.connections == len(links) - len(gone), "their ends")
    assert crew.place_of(crew.link(2).client_fd) == 2


def test_bytes_and_ends_arrive(crews, pair, mode):
    crew = crews(*pair, **mode)
    link = crew.link(1)
    up, down = payload(3_000_000), payload(2_000_000, 2)
    there, back = Incoming(link.target), Incoming(link.client)
    crew.rig.run(
        Outgoing(link.client, up, half_close), there, Outgoing(link.target, down, half_close), back
    )
    assert (there.data, there.end) == (up, "eof")
    assert (back.data, back.end) == (down, "eof")
    assert crew.rig.until_ended(link.id) == ("ended", len(up), len(down))
    assert crew.rig.ended(link.id).client_error == crew.rig.ended(link.id).target_error == 0


def test_a_preamble_goes_first(crews, pair):
    crew = crews(*pair)
    crew.rig.link()
    link = crew.rig.link(preamble=b"header ")
    link.client.send(b"word")
    assert crew.rig.read(link.target, 11) == b"header word"
    assert crew.place_of(link.client_fd) == 1


def test_an_adopted_connection_is_handed_over(crews, pair):
    crew = crews(*pair)
    crew.rig.link()
    link = crew.rig.adopted(preamble=b"header ")
    link.client.send(b"word")
    assert crew.rig.read(link.target, 11) == b"header word"
    crew.rig.until(lambda: crew.place_of(link.target_fd) == 1, "the hand-over")


def test_a_reset_is_passed_on(crews, pair):
    crew = crews(*pair)
    link = crew.link(1)
    reset(link.client)
    data, end = crew.rig.read_to_end(link.target)
    assert (data, end) == (b"", "eof" if "unix" in pair else "reset")
    crew.rig.until(lambda: crew.rig.ended(link.id), "the end")


def test_idle_connections_are_closed(rigs):
    rig = rigs()
    rig.relay.idle_ms = 50
    crew = Crewed(rig)
    rig.link()
    rig.link()
    rig.until(lambda: len(rig.of_kind(Ended)) == 2, "both ends")
    assert [event.ending for event in rig.of_kind(Ended)] == ["idle", "idle"]
    assert len(crew.epolls) == 1


# ── what comes back ──────────────────────────────────────────────────────────────────────────────


def test_a_failed_connect_gives_the_client_back(crews):
    """With what it has said, and counted until the policy has it."""
    crew = crews("tcp4", "tcp4")
    rig = crew.rig
    rig.link()
    rig.backend.close()
    client, fd = rig.knock()
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
    assert crew.place_of(fd) is None
    assert rig.relay.connections == 1
    assert (rig.relay.connections_max, rig.relay.held) == (2, 1)  # until the policy has counted it


def test_the_limit_is_exact(crews, pair):
    """Clients of all threads count, and the end of one lets the next one in."""
    crew = crews(*pair, threads=2)
    rig = crew.rig
    rig.gate.auto_connect(rig.address)
    rig.relay.connections_max = 6
    clients = [rig.keep(open_client(rig.door)) for _ in range(6)]
    targets = [rig.meet() for _ in range(6)]
    assert rig.relay.connections == 6
    for client, target in zip(clients, targets, strict=True):
        client.send(b"x")
        assert rig.read(target, 1) == b"x"
    late = rig.keep(open_client(rig.door))
    late.send(b"late")
    rig.turn(0)  # it has been seen, and waits for room
    assert rig.gate.connected_count == 6
    for connection in (clients[4], targets[4]):
        close(connection)
    wait_for(lambda: rig.relay.connections == 5)  # without a turn of the boss
    assert rig.read(rig.meet(), 4) == b"late"
    assert rig.relay.connections == 6
    over = rig.keep(open_client(rig.door))
    rig.until(lambda: rig.of_kind(Refused), "the refusal")
    assert rig.read_to_end(over)[0] == b""
    assert rig.totals().refused == 1


def test_the_boss_wakes_when_so_few_are_left(crews):
    crew = crews()
    rig = crew.rig
    rig.relay.report_ends = False
    stays, goes = rig.link(), crew.link(1)
    rig.settle()
    rig.relay.wake_at_count = rig.relay.connections - 1
    assert stays.client_fd != goes.client_fd
    reset(goes.client)
    until = time.monotonic() + 20
    rig.turn(20_000)
    while rig.relay.connections > rig.relay.wake_at_count:  # something else may have come first
        assert time.monotonic() < until
        rig.turn(20_000)
    assert rig.relay.run(20_000) == []  # and at once where they are so few already


@pytest.mark.parametrize("family", ["tcp4", "unix"])
def test_our_own_connection_is_recognised(rigs, family, tmp_path):
    """Whichever thread has its other end."""
    rig = rigs(family, family)
    crew = Crewed(rig)
    crew.link(1)
    check = CHECK_UNIX if family == "unix" else CHECK_TCP
    own = RelayListener(rig.relay, rig.backend.fileno(), rig.backend.family, check, 9)
    tune_socket(rig.backend.fileno(), rig.backend.family)
    own.start()
    for _ in range(2):  # one in each thread
        client, fd = rig.knock()
        rig.connect(fd)
        rig.keep(client)
    rig.until(lambda: len(rig.of_kind(AcceptFailed)) == 2, "both loops")
    own.stop()
    assert [(e.error, e.listener) for e in rig.of_kind(AcceptFailed)] == [(errno.ELOOP, 9)] * 2


# ── counting ─────────────────────────────────────────────────────────────────────────────────────


def test_counters_add_up(crews, pair, way):
    """Those of all threads, while they run and after they have ended."""
    crew = crews(*pair, threads=2, **way)
    rig = crew.rig
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


def test_every_thread_answers(crews):
    crew = crews(threads=3)
    relay = crew.rig.relay
    assert relay.workers_answered
    for _ in range(100):
        relay.ping_workers()
        crew.rig.until(lambda: relay.workers_answered, "the answers")


def test_without_a_crew_everybody_has_answered(rigs):
    relay = rigs().relay
    relay.ping_workers()
    assert relay.workers_answered


def test_pipes_kept_for_later_are_closed_everywhere(crews):
    crew = crews("tcp4", "tcp4", threads=1)
    rig = crew.rig
    stays, link = rig.link(), crew.link(1)
    before = open_fds()
    for each in (stays, link):
        rig.run(Outgoing(each.client, payload(4_000_000)), Incoming(each.target, most=4_000_000))
    assert len(open_fds() - before) >= 4
    rig.relay.trim_pipes()
    rig.until(lambda: open_fds() == before, "the pipes' end")


# ── the end ──────────────────────────────────────────────────────────────────────────────────────


def test_close_all_cuts_every_connection(crews, pair):
    threads = threads_now()
    crew = crews(*pair, threads=2)
    rig = crew.rig
    links = [rig.link() for _ in range(7)]
    crew_threads = threads_now() - threads
    assert len(crew_threads) == 2
    assert rig.relay.close_all() == 7
    wait_for(lambda: not crew_threads & threads_now())
    assert rig.relay.connections == 0
    rig.turn()
    assert {event.ending for event in rig.of_kind(Ended)} == {"cut"}
    assert {event.connection for event in rig.of_kind(Ended)} == {link.id for link in links}
    for link in links:
        for side in (link.client, link.target):
            data, end = rig.read_to_end(side)
            assert data == b""
            assert end == ("eof" if side.family == 1 else "reset")


def test_close_all_with_hand_overs_under_way(crews):
    """What is in an inbox at that moment is cut too."""
    for _ in range(50):
        crew = crews(threads=2)
        rig = crew.rig
        rig.gate.auto_connect(rig.address)
        clients = [rig.keep(open_client(rig.door)) for _ in range(8)]
        rig.until(lambda rig=rig: rig.gate.connected_count == 8, "eight hand-overs")
        assert rig.relay.close_all() == 8
        assert rig.relay.connections == 0
        assert len(clients) == 8


def test_a_relay_that_goes_with_its_crew_at_work(rigs, tmp_path):
    """Nothing was closed before: all fds and threads go with the object."""
    threads, before = threads_now(), open_fds()
    rig = rigs()
    Crewed(rig, 2)
    links = [rig.link() for _ in range(5)]
    rig.gate.stop()
    del rig.relay, rig.gate
    rigs.forget(rig)
    wait_for(lambda: threads_now() <= threads)
    assert open_fds() == before
    assert len(links) == 5


def test_a_failed_connect_that_nobody_has_fetched_goes_with_the_relay(rigs):
    before = open_fds()
    rig = rigs("tcp4", "tcp4")
    Crewed(rig)
    rig.link()
    rig.backend.close()
    client, fd = rig.knock()
    known = open_fds()
    rig.connect(fd)
    wait_for(lambda: open_fds() == known)  # the socket to the target has been and gone
    rig.gate.stop()
    del rig.relay, rig.gate
    with pytest.raises(ConnectionResetError):  # it was cut: this is no clean end
        client.recv(1)
    rigs.forget(rig)
    assert open_fds() == before


def test_a_new_crew_after_the_last_one_has_ended(crews):
    crew = crews()
    crew.rig.link()
    crew.rig.relay.close_all()
    again = Crewed(crew.rig)
    link = again.link(1)
    link.client.send(b"x")
    assert crew.rig.read(link.target, 1) == b"x"


def test_a_refused_thread_leaves_nothing_behind(rigs):
    def scenario():
        rig = rigs()
        rig.relay.start_worker()
        link = rig.link()
        before = open_fds()
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + 50, 1024))
        for spare in range(FDS_OF_A_THREAD):
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


def test_its_threads_hear_no_signal(crews):
    before = set(os.listdir("/proc/self/task"))
    crews(threads=2)
    for task in set(os.listdir("/proc/self/task")) - before:
        with open(f"/proc/self/task/{task}/status") as status:
            (blocked,) = (line.split()[1] for line in status if line.startswith("SigBlk"))
        # All but SIGKILL, SIGSTOP and the two that libc keeps for itself.
        assert int(blocked, 16) | 1 << 8 | 1 << 18 | 3 << 31 == (1 << 64) - 1
