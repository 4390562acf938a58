"""Connections that go from one relay to another: no byte, no end and no clock is lost."""

import array
import contextlib
import os
import resource
import socket
import tempfile

import pytest
from kit.child import in_child
from kit.parcel import Parcel, carry_over
from kit.rig import PATIENCE_S, Rigs, values
from kit.rights import send_slow
from kit.sockets import reset
from kit.stepped import Incoming, Outgoing, close, half_close, open_client
from kit.traffic import payload
from kit.workers import Workers

from proxyd._relay import SnapshotRows

SMALL = {"receive_buffer": 4096}


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request):
    """How many threads a relay has."""
    return request.param


@pytest.fixture
def make(rigs, threads):
    """Makes a rig with that number of threads, and a function that carries its connections over."""

    def made(*pair, **options):
        rig = rigs(*pair, **options)
        Workers(rig, threads - 1)
        return rig, lambda: carry_over(rig, threads - 1)

    return made


def exchange(rig, link):
    """Some bytes each way."""
    link.client.send(b"ping")
    assert rig.read(link.target, 4) == b"ping"
    link.target.send(b"pong")
    assert rig.read(link.client, 4) == b"pong"


# ── states ───────────────────────────────────────────────────────────────────────────────────────


def test_idle_connections(make, pair):
    rig, move = make(*pair)
    links = [rig.link() for _ in range(7)]
    for link in links:
        exchange(rig, link)
    for _ in range(3):
        assert move() == (7, 0)
        for link in links:
            exchange(rig, link)
    for link in links:
        half_close(link.client)
        assert rig.read_to_end(link.target) == (b"", "eof")
        close(link.target)
        assert rig.until_ended(link.id) == ("ended", 16, 16)


def test_streams_both_ways(make, pair, mode):
    buffers = {"receive_buffer": 65536, "send_buffer": 65536}
    rig, move = make(*pair, **mode, client_buffers=buffers, target_buffers=buffers)
    link = rig.link()
    up, down = payload(6_000_000), payload(5_000_000, 2)
    there, back = Incoming(link.target), Incoming(link.client)
    flows = (
        Outgoing(link.client, up, half_close),
        there,
        Outgoing(link.target, down, half_close),
        back,
    )
    moves = 0

    def finished():
        nonlocal moves
        for flow in flows:
            flow.step()
        if rig.relay.connections and len(there.data) + len(back.data) > moves * 700_000:
            assert move() in ((1, 0), (0, 0))  # it may have ended just now, in another thread
            moves += 1
        return all(flow.done for flow in flows)

    rig.until(finished, "the streams")
    assert moves > 1  # as many as there were turns: other threads go on meanwhile
    assert (there.data, there.end) == (up, "eof")
    assert (back.data, back.end) == (down, "eof")
    assert rig.until_ended(link.id) == ("ended", len(up), len(down))


@pytest.mark.parametrize("side", ["client", "target"])
def test_half_closed(make, pair, side):
    rig, move = make(*pair)
    link = rig.link()
    one, other = link.client, link.target
    if side == "target":
        one, other = other, one
    one.send(b"question")
    half_close(one)
    assert rig.read_to_end(other) == (b"question", "eof")
    assert move() == (1, 0)
    other.send(b"answer")
    assert rig.read(one, 6) == b"answer"
    assert move() == (1, 0)
    half_close(other)
    assert rig.read_to_end(one) == (b"", "eof")
    assert rig.until_ended(link.id)[0] == "ended"


def test_a_stuck_reader(make, pair, mode):
    """Bytes are held in a pipe or in memory, and an end behind them is not yet known."""
    rig, move = make(*pair, **mode, target_buffers=SMALL, client_buffers={"send_buffer": 65536})
    link = rig.link()
    sent = rig.fill(link.client)
    assert move() == (1, 0)
    sent += rig.fill(link.client)
    half_close(link.client)
    assert move() == (1, 0)
    assert rig.read_to_end(link.target) == (b"\xa5" * sent, "eof")
    half_close(link.target)
    assert rig.until_ended(link.id) == ("ended", sent, 0)


def test_a_reset_behind_bytes_that_are_held(make, pair, mode):
    """The client has reset, and what it had sent is yet to be delivered."""
    rig, move = make(*pair, **mode, target_buffers=SMALL, client_buffers={"send_buffer": 65536})
    link = rig.link()
    sent = rig.fill(link.client)
    reset(link.client)
    rig.settle()
    assert move() == (1, 0)
    rig.settle()
    assert move() == (1, 0)
    data, end = rig.read_to_end(link.target)
    assert 0 < len(data) <= sent
    assert data == b"\xa5" * len(data)
    assert end == ("eof" if "unix" in pair else "reset")
    close(link.target)
    assert rig.until_ended(link.id)[0] == ("ended" if pair[0] == "unix" else "reset")


def test_a_connection_that_lingers(make):
    """The target is gone; the client has not yet acknowledged its last words."""
    rig, move = make(client_buffers=SMALL)
    link = rig.link()
    sent = rig.fill(link.target)
    reset(link.target)
    data = b""
    while rows(rig)[link.id]["state"] != "lingering":
        data += rig.read(link.client, 4096)
    for _ in range(3):
        assert move() == (1, 0)
        assert rows(rig)[link.id]["state"] == "lingering"
    more, end = rig.read_to_end(link.client)
    assert more
    assert end == "reset"
    assert len(data + more) <= sent
    assert rig.until_ended(link.id)[0] == "reset"


def test_last_words_to_a_side_that_was_sent_an_end(make, pair):
    rig, move = make(*pair, client_buffers=SMALL)
    link = rig.link()
    half_close(link.client)
    assert rig.read_to_end(link.target) == (b"", "eof")
    sent = rig.fill(link.target)
    assert move() == (1, 0)
    close(link.target)
    rig.settle()
    assert move() == (1, 0)
    assert rig.read_to_end(link.client) == (b"\xa5" * sent, "eof")
    assert rig.until_ended(link.id) == ("ended", 0, sent)


@pytest.mark.parametrize("words", [b"", b"first words"])
def test_a_connect_that_goes_on(make, words):
    """Its preamble is not sent yet, and its target has not accepted."""
    rig, move = make("tcp4", "tcp4")
    rig.backend.listen(0)
    rig.keep(open_client(rig.backend))
    client, fd = rig.new_client()
    client.send(words)
    number = rig.connect(fd, preamble=b"header ", timeout_ms=60_000)
    rig.settle()
    assert move() == (1, 0)
    rig.settle()
    assert move() == (1, 0)
    targets = []

    def accepted():
        with contextlib.suppress(BlockingIOError):
            targets.append(rig.keep(rig.backend.accept()[0]))
            targets[-1].setblocking(False)
        return any(peek(one) for one in targets)

    rig.until(accepted, "the preamble")
    target = next(one for one in targets if peek(one))
    assert rig.read(target, 7 + len(words)) == b"header " + words
    half_close(client)
    assert rig.read_to_end(target) == (b"", "eof")
    half_close(target)
    assert rig.until_ended(number)[0] == "ended"


def peek(connection):
    with contextlib.suppress(BlockingIOError):
        return connection.recv(1, socket.MSG_PEEK)
    return b""


def test_a_connect_that_fails_later_gives_the_client_back(make):
    rig, move = make("tcp4", "tcp4")
    rig.backend.listen(0)
    rig.keep(open_client(rig.backend))
    client, fd = rig.new_client()
    client.send(b"words")
    number = rig.connect(fd, preamble=b"header ", timeout_ms=300)
    rig.settle()
    assert move() == (1, 0)
    rig.until(rig.failures, "the timeout")
    (failed,) = rig.failures()
    assert (failed.connection, failed.pending) == (number, b"header ")
    assert not failed.has_unsent  # the header is not the client's


def test_a_connect_that_fails_later_gives_the_words_of_its_client_back(make):
    rig, move = make("tcp4", "tcp4")
    rig.backend.listen(0)
    rig.keep(open_client(rig.backend))
    client, fd = rig.new_client()
    client.send(b"words")
    rig.connect(fd, timeout_ms=300)
    rig.settle()
    assert move() == (1, 0)
    rig.until(rig.failures, "the timeout")
    (failed,) = rig.failures()
    assert (failed.pending, failed.has_unsent) == (b"words", True)


def test_urgent_bytes_keep_their_place(make):
    rig, move = make("tcp4", "tcp4")
    link = rig.link()
    link.client.send(b"before")
    link.client.send(b"!", socket.MSG_OOB)
    link.client.send(b"after")
    assert move() == (1, 0)
    assert rig.read(link.target, 12) == b"before!after"


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────


def rows(rig):
    """{id: what a snapshot tells, as a dict}."""
    rig.events = [one for one in rig.events if not isinstance(one, SnapshotRows)]
    number = rig.relay.start_snapshot()

    def told():
        return [one for one in rig.of_kind(SnapshotRows) if one.number == number]

    rig.until(lambda: any(one.last for one in told()), "the snapshot")
    found = {}
    for row in [row for one in told() for row in one.rows]:
        found[row.connection] = values(row) | {"up": values(row.up), "down": values(row.down)}
    return found


def test_what_is_known_of_a_connection_is_kept(make, pair):
    rig, move = make(*pair)
    links = [rig.link() for _ in range(3)]
    for link in links:
        exchange(rig, link)
    before = rows(rig)
    assert move() == (3, 0)
    after = rows(rig)
    for each in (*before.values(), *after.values()):
        del each["thread"]
    assert after == before


def test_the_idle_clock_goes_on(make, threads):
    rig, move = make()
    link = rig.link()
    exchange(rig, link)
    active_ms = rows(rig)[link.id]["active_ms"]
    rig.pass_time(0.3)
    move()
    assert rows(rig)[link.id]["active_ms"] == active_ms

    def limit(relay):
        relay.idle_ms = 1

    carry_over(rig, threads - 1, limit)
    assert rig.until_ended(link.id) == ("idle", 4, 4)


def test_new_ids_go_on(make):
    rig, move = make()
    first = rig.link().id
    second = rig.link().id
    move()
    assert rig.link().id > max(first, second)


def test_places_of_sources_are_kept(rigs, threads):
    """Even beyond the share, which may be smaller now; and given back."""
    rig = rigs()
    Workers(rig, threads - 1)
    rig.relay.connections_max = 64
    rig.relay.limit_sources(3)
    links = [rig.link() for _ in range(3)]

    def limit(relay):
        relay.connections_max = 64
        relay.limit_sources(2)

    for _ in range(2):
        assert carry_over(rig, threads - 1, limit) == (3, 0)
        assert rig.read_to_end(rig.keep(open_client(rig.listen_socket)))[0] == b""
    for link in links[:2]:
        half_close(link.client)
        close(link.target)
        rig.until_ended(link.id)
    exchange(rig, links[2])
    exchange(rig, rig.link())
    assert rig.relay.refused_by_source == 1


# ── or not after all ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("exported", [False, True])
def test_thaw(make, pair, exported):
    """Frozen, perhaps exported as well, and then they go on in the same relay."""
    rig, _ = make(*pair, target_buffers=SMALL)
    links = [rig.link() for _ in range(4)]
    sent = rig.fill(links[0].client, limit=300_000)
    rig.events += rig.relay.freeze()
    assert rig.relay.resting == 4
    if exported:
        Parcel(rig.relay).close()
    rig.relay.thaw()
    assert rig.relay.resting == 0
    assert rig.read(links[0].target, sent) == b"\xa5" * sent
    for link in links:
        exchange(rig, link)
        answer = payload(100_000)
        link.target.send(answer[:50_000])
        close(link.target)
        data, end = rig.read_to_end(link.client)
        assert (data, end) == (answer[: len(data)], "eof")


def test_a_parcel_that_is_dropped_resets_its_connections(make, pair):
    rig, _ = make(*pair)
    links = [rig.link() for _ in range(3)]
    rig.events += rig.relay.freeze()
    parcel = Parcel(rig.relay)
    rig.relay.release()
    parcel.close()
    for link in links:
        for end, family in ((link.client, pair[0]), (link.target, pair[1])):
            assert rig.read_to_end(end) == (b"", "eof" if family == "unix" else "reset")


@pytest.mark.parametrize("side", ["client", "target"])
def test_a_parcel_that_is_dropped_cuts_no_complete_answer(rigs, side):
    """A side that was sent an end is not reset: that would throw away what it has yet to read."""
    rig = rigs(client_buffers=SMALL, target_buffers=SMALL)
    link = rig.link()
    reader, writer = link.client, link.target
    if side == "target":
        reader, writer = writer, reader
    answer = payload(200_000)
    rig.send(writer, answer, half_close)
    rig.settle()
    assert rows(rig)[link.id]["down" if side == "client" else "up"]["state"] == "shut"
    rig.events += rig.relay.freeze()
    parcel = Parcel(rig.relay)
    rig.relay.release()
    parcel.close()
    assert rig.read_to_end(reader) == (answer, "eof")
    assert rig.read_to_end(writer) == (b"", "reset")


def test_what_rests_is_cut_at_the_end(make, pair):
    rig, _ = make(*pair)
    links = [rig.link() for _ in range(3)]
    rig.events += rig.relay.freeze()
    assert rig.relay.close_all() == 3
    for link in links:
        for end, family in ((link.client, pair[0]), (link.target, pair[1])):
            assert rig.read_to_end(end) == (b"", "eof" if family == "unix" else "reset")


def test_many_connections_from_many_threads(rigs):
    rig = rigs("unix", "unix")
    workers = Workers(rig, 3)
    links = [rig.link() for _ in range(60)]
    workers.until_assigned(links)
    assert len(set(workers.workers_of(links))) == 4
    assert carry_over(rig, 2) == (60, 0)
    for link in links:
        exchange(rig, link)


def test_freeze_while_bytes_arrive(rigs):
    """A worker may have fetched events of a connection together with the order to give it away."""
    rig = rigs()
    workers = Workers(rig, 2)
    links = [rig.link() for _ in range(9)]
    workers.until_assigned(links)
    rounds = 200
    for _ in range(rounds):
        for link in links:
            link.client.send(b"word")
        rig.events += rig.relay.freeze()
        assert rig.relay.resting == len(links)
        rig.relay.thaw()
    for link in links:
        assert rig.read(link.target, 4 * rounds) == b"word" * rounds


def test_fds_that_were_lost_on_the_way(rigs):
    """Only their connections are reset."""
    rig = rigs()
    links = [rig.link() for _ in range(3)]
    rig.listener.stop()
    rig.events += rig.relay.freeze()
    parcel = Parcel(rig.relay)
    rig.relay.release()
    rig.make_relay()
    fds = parcel.take_fds()
    os.close(fds[2])
    fds[2] = -1
    assert rig.relay.import_connections(parcel.file, 0, fds, [0], [0]) == (2, 1)
    parcel.close()
    rig.relay.thaw()
    rig.listen()
    exchange(rig, links[0])
    exchange(rig, links[2])
    assert rig.read_to_end(links[1].client) == (b"", "reset")
    assert rig.read_to_end(links[1].target) == (b"", "reset")


# ── the quarantine ───────────────────────────────────────────────────────────────────────────────


def send_fd(connection, data):
    """Send bytes with a file descriptor that is harmless."""
    connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])


@pytest.mark.parametrize("target", ["tcp4", "unix"])
def test_a_connection_in_quarantine(make, target):
    """It goes to the quarantine of the next relay; what was seen there is not forwarded again."""
    rig, move = make("unix", target, may_refuse=False)
    link = rig.link()
    other = rig.link()
    for word in (b"one", b"two", b"three"):
        send_fd(link.client, word)
        assert rig.read(link.target, len(word)) == word
        assert move() == (2, 0)
        assert rows(rig)[link.id]["thread"] == -1
        exchange(rig, link)
        exchange(rig, other)
    half_close(link.client)
    assert rig.read_to_end(link.target) == (b"", "eof")
    close(link.target)
    assert rig.until_ended(link.id) == ("ended", 3 + 3 + 5 + 12, 12)


def test_descriptors_that_are_not_read_yet(make):
    """They come to the next relay in the queue of their socket."""
    rig, move = make("unix", "tcp4", may_refuse=False)
    link = rig.link()
    exchange(rig, link)
    send_fd(link.client, b"unread")
    link.client.send(b" more")
    assert move() == (1, 0)
    assert rig.read(link.target, 11) == b"unread more"


def test_thaw_returns_connections_to_the_quarantine(make):
    rig, _ = make("unix", "tcp4", may_refuse=False)
    link = rig.link()
    send_fd(link.client, b"word")
    assert rig.read(link.target, 4) == b"word"
    for _ in range(3):
        rig.events += rig.relay.freeze()
        assert rig.relay.resting == 1
        assert not rig.relay.quarantine_blocks
        rig.relay.thaw()
        exchange(rig, link)
        assert rows(rig)[link.id]["thread"] == -1


def test_a_quarantine_that_cannot_start_in_the_next_relay(rigs):
    """TasksMax=: its connections wait, and go on to the one after that."""

    def run():
        with tempfile.TemporaryDirectory() as folder:
            rig = Rigs(folder)("unix", "tcp4", may_refuse=False)
            link, other = rig.link(), rig.link()
            send_fd(link.client, b"word")
            assert rig.read(link.target, 4) == b"word"
            user = os.geteuid()
            soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
            resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
            if user == 0:  # the limit does not apply to root
                os.setresuid(65534, 65534, 0)
            assert carry_over(rig) == (2, 0)
            link.client.send(b"next")
            exchange(rig, other)
            assert rig.is_calm(50)
            assert carry_over(rig) == (2, 0)
            exchange(rig, other)
            os.setresuid(user, user, user)
            resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
            assert rig.read(link.target, 4) == b"next"

    in_child(run, patience=2 * PATIENCE_S)


def test_a_quarantine_that_blocks(rigs, threads):
    """Its connections stay behind; all others go on."""

    def run():
        with tempfile.TemporaryDirectory() as folder:
            rig = Rigs(folder)("unix", "tcp4", may_refuse=False)
            Workers(rig, threads - 1)
            link, other = rig.link(), rig.link()
            slow = send_slow(link.client, b"word")
            assert rig.read(link.target, 4) == b"word"
            link.client.send(b"next")
            for _ in range(50):  # its thread now takes the descriptor
                rig.turn(1)
            rig.events += rig.relay.freeze()
            assert rig.relay.resting == 1
            assert rig.relay.quarantine_blocks
            parcel = Parcel(rig.relay)
            rig.relay.release()
            before = rig.relay
            rig.make_relay()
            restored = rig.relay.import_connections(parcel.file, 0, parcel.take_fds(), [0], [0])
            assert restored == (1, 0)
            rig.relay.thaw()
            exchange(rig, other)
            slow.release()
            del before

    in_child(run, patience=2 * PATIENCE_S)
