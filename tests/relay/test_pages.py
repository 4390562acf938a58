"""Pages: who is entered, what the next process would find there, and how connections end although
a page has their sockets as well."""

import contextlib
import ctypes
import errno
import os
import resource
import socket
import sys
import tempfile

import pytest
from kit.child import in_child
from kit.entered import Pages, cookie
from kit.file_limit import files_allowed
from kit.privileges import UNUSED_UID, locks_memory, need_root
from kit.rig import PATIENCE_S, Rigs, open_fds
from kit.rights import send_slow, thread_ids, waits_in_close
from kit.sockets import reset
from kit.stepped import Incoming, Outgoing, close, half_close
from kit.traffic import payload
from kit.workers import Workers

from proxyd._relay import Ended, NotKept, Old, socket_names

PR_SET_DUMPABLE = 4
UNIX_MAX = 8000
"""UNIX_SOCKETS_MAX in relay/pages.pxd."""
PAGE_MAX = 128
"""As in relay/slate_types.pxd."""


def exchange(rig, link):
    """Some bytes each way."""
    link.client.send(b"ping")
    assert rig.read(link.target, 4) == b"ping"
    link.target.send(b"pong")
    assert rig.read(link.client, 4) == b"pong"


def entered(rigs, *pair, links=1, **options):
    """(rig, its pages, connections that are entered)."""
    rig = rigs(*pair, **options)
    pages = Pages(rig)
    made = [rig.link() for _ in range(links)]
    for link in made:
        exchange(rig, link)
    assert pages.enter() == links
    return rig, pages, made


def end(rig, links):
    """End connections cleanly, by their clients."""
    for link in links:
        close(link.client)
        rig.read_to_end(link.target)
        close(link.target)
    for link in links:
        assert rig.until_ended(link.id)[0] == "ended"


def registered(rig):
    """How many sockets the relay's epoll instance watches."""
    with open(f"/proc/self/fdinfo/{rig.epoll}") as info:
        return info.read().count("tfd:")


# ── who is entered ───────────────────────────────────────────────────────────────────────────────


def test_old_connections_are_entered(rigs, pair):
    rig = rigs(*pair)
    pages = Pages(rig)
    links = [rig.link() for _ in range(5)]
    for link in links:
        exchange(rig, link)
    pages.until_kept(links)
    for link in links:
        message = pages.kept()[link.id]
        assert message.cookies[0] == cookie(link.client_fd)
        exchange(rig, link)
    assert [len(page) for page in pages.messages()] == [5]


def test_those_that_were_there_before_the_slate(rigs):
    rig = rigs()
    links = [rig.link() for _ in range(3)]
    pages = Pages(rig)
    pages.until_kept(links)


def test_the_relay_sleeps_once_all_are_entered(rigs):
    rig = rigs()
    pages = Pages(rig)
    links = [rig.link() for _ in range(3)]
    pages.until_kept(links)
    rig.settle()
    turns = rig.relay.run(1500)  # it would return earlier with an event only
    assert turns == []
    assert rig.is_calm()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_policy_is_told_once_that_there_is_an_old_one(rigs, workers):
    rig = rigs()
    Workers(rig, workers)
    rig.link()
    rig.relay.report_old = True
    rig.until(lambda: rig.of_kind(Old), "an Old event")
    assert not rig.relay.report_old
    rig.link()
    rig.pass_time(1.3)
    assert len(rig.of_kind(Old)) == 1
    rig.relay.report_old = True
    rig.until(lambda: len(rig.of_kind(Old)) == 2, "another one")


def test_without_a_slate_nobody_is_told(rigs):
    rig = rigs()
    rig.link()
    rig.pass_time(1.2)
    assert rig.of_kind(Old) == []
    assert rig.relay.enter_all() == 0


def test_one_that_is_connecting_is_entered_later(rigs):
    """The backlog of the target is full for longer than a second."""
    rig = rigs()
    pages = Pages(rig)
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        first = stack.enter_context(socket.create_connection(full.getsockname()))
        client, fd = rig.new_client()
        rig.address = socket_names(full.fileno())[1]
        number = rig.connect(fd)
        rig.pass_time(1.2)
        assert pages.kept() == {}
        accepted = [stack.enter_context(full.accept()[0])]

        def connected():
            full.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                accepted.append(stack.enter_context(full.accept()[0]))
            return set(pages.kept()) == {number}

        rig.until(connected, "the connection to be kept")
        first.close()
        client.close()


def test_each_worker_enters_its_own(rigs):
    rig = rigs()
    workers = Workers(rig, 2)
    pages = Pages(rig, workers=3)
    links = [rig.link() for _ in range(60)]
    workers.until_assigned(links)
    assert set(workers.workers_of(links)) == {0, 1, 2}
    pages.until_kept(links)
    for link in links:
        exchange(rig, link)
    end(rig, links[:50])
    pages.until_kept(links[50:])


def test_a_worker_without_an_intent_enters_nothing(rigs):
    rig = rigs()
    workers = Workers(rig, 1)
    pages = Pages(rig, workers=1)
    links = [rig.link() for _ in range(10)]
    workers.until_assigned(links)
    own = [link for link in links if workers.worker_of(link.client_fd) == 0]
    pages.until_kept(own)


# ── pages are used again ─────────────────────────────────────────────────────────────────────────


def test_what_has_ended_is_void(rigs):
    rig, pages, links = entered(rigs, links=3)
    end(rig, links[:2])
    assert set(pages.kept()) == {links[2].id}
    again = [rig.link() for _ in range(2)]
    pages.enter()
    assert set(pages.kept()) == {links[2].id, again[0].id, again[1].id}
    slots = {message.slot for message in pages.kept().values()}
    assert slots == {0, 1, 2}  # those that were free again


def test_a_page_is_emptied_and_used_again(rigs):
    rig = rigs()
    pages = Pages(rig)
    for _ in range(3):
        links = [rig.link() for _ in range(PAGE_MAX + 4)]
        assert pages.enter() == len(links)
        assert [len(page) for page in pages.messages()] == [PAGE_MAX, 4]
        end(rig, links)
        rig.until(lambda: pages.messages() == [[], []], "the pages to be emptied")


def test_a_page_that_fills_slowly_is_emptied(rigs):
    """It is the one that is being filled."""
    rig, pages, links = entered(rigs, links=2)
    end(rig, links)
    rig.until(lambda: pages.messages() == [[]], "the page to be emptied")


def test_those_that_are_left_go_to_another_page(rigs, pair):
    rig, pages, links = entered(rigs, *pair, links=PAGE_MAX + 1)
    before = pages.kept()
    stay = [*links[:PAGE_MAX:5], links[-1]]
    end(rig, [link for link in links if link not in stay])
    rig.until(lambda: pages.messages()[0] == [], "the page to be cleared")
    after = pages.kept()
    assert after == {link.id: before[link.id] for link in stay}
    assert len(pages.messages()[1]) == len(stay)
    for link in stay:
        exchange(rig, link)
    end(rig, stay)
    rig.until(lambda: pages.messages() == [[], []], "the pages to be emptied")


@locks_memory
def test_no_descriptor_is_left(rigs):
    """Of thousands of connections."""
    rig = rigs("tcp4", "unix")
    pages = Pages(rig)
    others = []
    for _ in range(3):
        for _ in range(7):
            links = [rig.link() for _ in range(100)]
            assert pages.enter() == 100
            end(rig, links)
            for link in links:
                rig.sockets.remove(link.client)
                rig.sockets.remove(link.target)
            rig.events.clear()
        rig.until(lambda: not any(pages.messages()), "the pages to be emptied")
        count = len(pages.messages())
        assert count <= 7 * 100 // PAGE_MAX + 2  # used again, though perhaps not sooner
        others.append(len(open_fds()) - 2 * count)
    assert min(others) == max(others)
    assert rig.relay.connections == 0


# ── ends, with the sockets in a page ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("side", ["client", "target"])
def test_a_clean_end_is_passed_on_at_once(rigs, pair, side):
    rig, pages, (link,) = entered(rigs, *pair)
    one, other = (link.client, link.target) if side == "client" else (link.target, link.client)
    one.send(b"last")
    half_close(one)
    assert rig.read_to_end(other) == (b"last", "eof")
    assert set(pages.kept()) == {link.id}
    other.send(b"answer")
    half_close(other)
    assert rig.read_to_end(one) == (b"answer", "eof")
    assert rig.until_ended(link.id)[0] == "ended"
    assert pages.kept() == {}


@pytest.mark.parametrize("side", ["client", "target"])
def test_a_reset_is_passed_on_at_once(rigs, side):
    rig, pages, (link,) = entered(rigs, "tcp4", "tcp4")
    one, other = (link.client, link.target) if side == "client" else (link.target, link.client)
    reset(one)
    assert rig.read_to_end(other) == (b"", "reset")
    assert rig.until_ended(link.id)[0] == "reset"
    assert pages.kept() == {}


@locks_memory
def test_a_reset_of_a_client_ends_a_unix_target(rigs):
    rig, pages, (link,) = entered(rigs, "tcp4", "unix")
    reset(link.client)
    assert rig.read_to_end(link.target) == (b"", "eof")
    assert rig.until_ended(link.id)[0] == "reset"
    assert pages.kept() == {}


def test_a_cut(rigs, pair):
    rig, pages, (link, other) = entered(rigs, *pair, links=2)
    rig.relay.terminate(link.id)
    rig.until_ended(link.id)
    for end_of, family in zip((link.client, link.target), pair, strict=True):
        assert rig.read_to_end(end_of) == (b"", "eof" if family == "unix" else "reset")
    assert set(pages.kept()) == {other.id}
    exchange(rig, other)


def test_a_silent_connection(rigs, pair):
    rig, pages, (link,) = entered(rigs, *pair)
    rig.relay.idle_ms = 50
    assert rig.until_ended(link.id)[0] == "idle"
    for end_of in (link.client, link.target):
        assert rig.read_to_end(end_of) == (b"", "eof")
    assert pages.kept() == {}


def test_the_end_of_all(rigs, pair):
    rig, pages, (link,) = entered(rigs, *pair)
    rig.relay.close_all()
    for end_of, family in zip((link.client, link.target), pair, strict=True):
        assert rig.read_to_end(end_of) == (b"", "eof" if family == "unix" else "reset")
    assert pages.kept() == {}


def test_the_rest_of_a_stream_survives_a_clean_end(rigs, pair):
    """The kernel goes on sending to a slow reader, and nothing cuts that short."""
    buffers = {"receive_buffer": 65536, "send_buffer": 65536}
    rig, pages, (link,) = entered(rigs, *pair, client_buffers=buffers, target_buffers=buffers)
    data = payload(4_000_000)
    flow = Outgoing(link.target, data, close)
    incoming = Incoming(link.client, unit=3000)
    half_close(link.client)

    def finished():
        flow.step()
        with contextlib.suppress(BlockingIOError):
            incoming.limit = len(incoming.data) + 60_000
            incoming.step()
        return incoming.end

    rig.until(finished, "the stream")
    assert (bytes(incoming.data), incoming.end) == (data, "eof")
    assert rig.until_ended(link.id)[0] == "ended"
    rig.until(lambda: not any(pages.messages()), "the page to be emptied")


def test_a_lingering_side(rigs):
    """The client resets; the target reads what was sent to it to the end, and is reset then."""
    rig, pages, (link,) = entered(rigs, "tcp4", "tcp4", target_buffers={"receive_buffer": 4096})
    data = payload(200_000)
    rig.send(link.client, data)
    rig.settle()
    reset(link.client)
    got, how = rig.read_to_end(link.target)
    assert how == "reset"
    assert data.startswith(got)
    assert rig.until_ended(link.id)[0] == "reset"
    assert pages.kept() == {}


def test_what_is_sent_after_the_end_is_answered_with_a_reset(rigs):
    """As by a socket that nobody has any more."""
    rig, _, (link,) = entered(rigs)
    rig.relay.idle_ms = 50
    assert rig.until_ended(link.id)[0] == "idle"
    assert rig.read_to_end(link.client) == (b"", "eof")
    rig.until(lambda: send_fails(link.client), "a reset")


def send_fails(connection):
    try:
        connection.send(b"more")
    except OSError as error:
        return error.errno in (errno.EPIPE, errno.ECONNRESET)
    return False


@pytest.mark.parametrize("how", ["clean", "reset", "cut"])
def test_nothing_stays_registered_with_epoll(rigs, pair, how):
    rig, _, (first, link) = entered(rigs, *pair, links=2)
    rig.settle()
    assert registered(rig) == 5  # the listener and four sockets
    if how == "clean":
        end(rig, [link])
    elif how == "reset":
        reset(link.client)
        rig.until_ended(link.id)
    else:
        rig.relay.terminate(link.id)
        rig.until_ended(link.id)
    assert registered(rig) == 3
    exchange(rig, first)
    assert rig.is_calm()


@locks_memory
def test_a_release_leaves_all_as_it_is(rigs):
    """Another process may go on with what pages and slate say."""
    rig, pages, links = entered(rigs, "tcp4", "unix", links=3)
    rig.fill(links[0].client)
    kept, pipes = pages.kept(), pages.pipes()
    assert max(pipes.values()) > 0
    rig.events += rig.relay.freeze()
    rig.relay.release()
    assert rig.relay.connections == 0
    other = rig.link()
    pages.enter()
    end(rig, [other])
    rig.pass_time(1.2)  # pages are tidied
    assert pages.kept() == kept
    assert pages.pipes() == pipes
    for link in links:
        with pytest.raises(BlockingIOError):
            link.client.recv(1)


# ── pipes ────────────────────────────────────────────────────────────────────────────────────────


@locks_memory
def test_a_pipe_with_bytes(rigs):
    rig, pages, (link,) = entered(rigs, "tcp4", "unix")
    rig.fill(link.client)
    slot = pages.slate.slot(pages.kept()[link.id].slot)
    assert pages.pipes()[slot.halves[0].pipe] > 0
    rig.relay.terminate(link.id)
    rig.until_ended(link.id)
    rig.until(lambda: pages.pipes() == {}, "the page to be emptied")


@locks_memory
def test_a_connection_that_is_entered_with_bytes_in_a_pipe(rigs):
    rig = rigs("tcp4", "unix")
    pages = Pages(rig)
    link = rig.link()
    sent = rig.fill(link.client)
    assert pages.enter() == 1
    slot = pages.slate.slot(pages.kept()[link.id].slot)
    assert list(pages.pipes()) == [slot.halves[0].pipe]
    half_close(link.client)
    assert len(rig.read_to_end(link.target)[0]) == sent


# ── descriptors in the queue of a UNIX socket ────────────────────────────────────────────────────


def play(act, *pair, **options):
    """Run `act(rig)` in a process of its own, which hangs if a thread of the relay does."""

    def run():
        sys.stdout = sys.stderr = os.fdopen(2, "w", closefd=False)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the tests are about how many are open
        rigs = Rigs(folder)
        act(rigs(*pair, **options))
        rigs.close()
        assert not rigs.leaked()

    with tempfile.TemporaryDirectory() as folder:
        in_child(run, patience=2 * PATIENCE_S)


@locks_memory
def test_one_that_goes_into_quarantine_is_struck():
    def act(rig):
        pages = Pages(rig)
        link, other = rig.link(), rig.link()
        exchange(rig, link)
        assert pages.enter() == 2
        slow = send_slow(link.client, b"slow")
        rig.until(lambda: set(pages.kept()) == {other.id}, "the connection to be struck")
        exchange(rig, other)
        slow.release()
        assert rig.read(link.target, 4) == b"slow"
        end(rig, [link, other])
        rig.until(lambda: pages.messages() == [[]], "the page to be emptied")

    play(act, "unix", "tcp4", may_refuse=False)


@locks_memory
def test_a_page_whose_emptying_blocks():
    """The quarantine's thread does it; nobody waits for that."""

    def act(rig):
        pages = Pages(rig)
        link, other = rig.link(), rig.link()
        exchange(rig, link)
        assert pages.enter() == 2
        rig.fill(link.client)
        link.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 212992)  # room for one more
        before = thread_ids()
        slow = send_slow(link.client, b"slow")
        rig.relay.terminate(link.id)  # unread: its socket has the descriptor
        rig.until_ended(link.id)
        end(rig, [other])
        rig.until(
            lambda: any(waits_in_close(thread) for thread in thread_ids() - before),
            "a thread that waits",
        )
        for _ in range(3):
            third = rig.link()
            exchange(rig, third)
            pages.enter()
            assert [slot.id for slot in pages.slate.slots()] == [third.id]
            end(rig, [third])
        slow.release()
        rig.until(lambda: not any(pages.messages()), "the pages to be emptied")

    play(act, "unix", "tcp4", may_refuse=False)


# ── what the system refuses ──────────────────────────────────────────────────────────────────────


def test_a_full_table_of_descriptors():
    def act(rig):
        pages = Pages(rig)
        links = [rig.link() for _ in range(3)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, open_fds())) + 1, hard))
        filler = []
        with contextlib.suppress(OSError):
            while True:
                filler.append(os.dup(0))
        rig.until(lambda: rig.of_kind(NotKept), "the failure")
        rig.pass_time(2.2)
        assert [event.error for event in rig.of_kind(NotKept)] == [errno.EMFILE]
        for fd in filler:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for link in links:
            exchange(rig, link)
        pages.until_kept(links)

    play(act)


def test_a_full_queue_of_root(rigs):
    rig = rigs()
    pages = Pages(rig)
    with contextlib.suppress(BlockingIOError):
        while True:
            pages.sender.send(b"x", socket.MSG_DONTWAIT)
    links = [rig.link() for _ in range(3)]
    with pytest.raises(BlockingIOError):
        pages.enter()
    rig.until(lambda: rig.of_kind(NotKept), "the failure")
    assert rig.of_kind(NotKept)[0].error == errno.EAGAIN
    for link in links:
        exchange(rig, link)
    with contextlib.suppress(BlockingIOError):
        while True:
            pages.root.recv(1, socket.MSG_DONTWAIT)
    pages.until_kept(links)
    assert len(rig.of_kind(NotKept)) == 1


def test_no_slot_is_free(rigs):
    rig = rigs()
    pages = Pages(rig, slots=2)
    links = [rig.link() for _ in range(3)]
    rig.until(lambda: rig.of_kind(NotKept), "the failure")
    assert rig.of_kind(NotKept)[0].error == errno.ENOSPC
    assert set(pages.kept()) == {links[0].id, links[1].id}
    end(rig, links[:1])
    pages.until_kept(links[1:])


@locks_memory
def test_too_many_unix_sockets(rigs):
    """Kernels take longer and longer with more of them in flight."""
    with files_allowed(4 * (UNIX_MAX // 2 + 2) + 500):
        if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * UNIX_MAX + 500:
            pytest.skip("so many files cannot be open here")
        rig = rigs("unix", "unix")
        pages = Pages(rig, slots=2 * UNIX_MAX)
        links = [rig.link() for _ in range(UNIX_MAX // 2)]
        assert pages.enter() == len(links)
        last = rig.link()
        rig.until(lambda: rig.of_kind(NotKept), "the failure")
        assert rig.of_kind(NotKept)[0].error == errno.EUSERS
        assert len(pages.slate.slots()) == len(links)
        gone = links[:PAGE_MAX]  # those of a page
        for link in gone:
            close(link.client)
            close(link.target)
        rig.until(
            lambda: last.id in {slot.id for slot in pages.slate.slots()}, "the last to be kept"
        )


def test_descriptors_in_flight():
    """The soft limit counts for them, and is raised for the moment of a message; the hard limit
    cannot be."""

    def act(rig):
        become_another_user()
        pages = Pages(rig)
        first = rig.link()
        assert pages.enter() == 1  # there is a page
        links = [first, *(rig.link() for _ in range(29))]
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 50))
        rig.until(lambda: rig.of_kind(NotKept), "the failure")
        assert rig.of_kind(NotKept)[0].error == errno.ETOOMANYREFS
        kept = {slot.id for slot in pages.slate.slots()}
        assert 20 < 2 * len(kept) <= 52
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (20, 50)
        end(rig, [link for link in links if link.id in kept])
        left = {link.id for link in links} - kept
        rig.until(
            lambda: {slot.id for slot in pages.slate.slots()} == left, "the others to be kept"
        )

    play(act)


def become_another_user():
    """Without privileges, and with no descriptors in flight of anybody else."""
    need_root("to become a user whose descriptors in flight are only those of the test")
    os.setresgid(UNUSED_UID, UNUSED_UID, UNUSED_UID)
    os.setresuid(UNUSED_UID, UNUSED_UID, UNUSED_UID)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)  # so that /proc/self/fd can be read


def test_ended_events_are_as_before(rigs):
    """Entering changes nothing of what is counted."""
    rig, _, (link,) = entered(rigs)
    end(rig, [link])
    (event,) = rig.of_kind(Ended)
    assert (event.bytes_up, event.bytes_down) == (4, 4)
