"""What a slate says of connections, step by step."""

import contextlib
import fcntl
import os
import resource
import socket
import struct

import pytest
from kit.child import in_child
from kit.privileges import UNUSED_UID, locks_memory, may_lock_memory, need_root
from kit.rig import values
from kit.slate_view import DOWN, UP, Slate
from kit.socket_state import set_option
from kit.sockets import open_listener
from kit.stepped import accept, close, half_close, open_client
from kit.traffic import payload

from proxyd._relay import Relay, slate_create, stream_positions

STREAM_UNIT = 64 * 1024
OPTIONS = {"may_splice": False, "stream_unit": STREAM_UNIT}
SMALL = {"receive_buffer": 4096}


@pytest.fixture
def slates():
    """Makes slates, read through the file: (file, Slate)."""
    made = []

    def make(text=b"", slots=4, workers=2, unit=STREAM_UNIT):
        file = slate_create(text, slots, workers, unit)
        made.append((file, Slate(file)))
        return made[-1]

    yield make
    for file, slate in made:
        slate.close()
        os.close(file)


@pytest.fixture
def keep(rigs, slates):
    """Makes a rig whose relay keeps all connections that it has, and its slate."""

    def made(links, *pair, **options):
        rig = rigs(*pair, **(OPTIONS | options))
        every = [rig.adopted_link() for _ in range(links)]
        file, slate = slates()
        rig.relay.use_slate(file, -1, 1)
        enter(rig)
        assert len(slate.slots()) == links
        return rig, every, slate

    return made


def enter(rig):
    """Keep all connections of a rig, as after a recovery: otherwise they are after a second."""
    rig.settle()
    rig.events += rig.relay.freeze()
    rig.relay.enter_all()
    rig.relay.thaw()


def exchange(rig, links):
    """Four bytes each way."""
    for link in links:
        link.client.send(b"ping")
        assert rig.read(link.target, 4) == b"ping"
        link.target.send(b"pong")
        assert rig.read(link.client, 4) == b"pong"


def slot_of(slate, link):
    """The slot of a connection, or None."""
    return next((slot for slot in slate.slots() if slot.id == link.id), None)


# ── the file ─────────────────────────────────────────────────────────────────────────────────────


def test_layout(slates):
    file, slate = slates(b"some text", slots=7, workers=3, unit=8192)
    assert slate.text == b"some text"
    assert os.fstat(file).st_size == slate.size
    assert fcntl.fcntl(file, fcntl.F_GET_SEALS) == (
        fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    )
    assert (slate.slot_count, slate.workers, slate.unit, slate.last_id) == (7, 3, 8192, 0)
    assert not slate.slots()
    assert not slate.intents()
    assert not os.get_inheritable(file)


@pytest.mark.parametrize(
    "terms",
    [(0, 1, 4096), (1, 0, 4096), (1, 1, 0), (1, 1, 4097), (1 << 21, 1, 4096), (1, 5000, 4096)],
)
def test_no_such_slate(terms):
    with pytest.raises(ValueError, match="no such slate"):
        slate_create(b"", *terms)


def copy_of(file, size=None, **changes):
    """A copy of a slate, with other numbers in its head, and of another size."""
    data = bytearray(os.pread(file, os.fstat(file).st_size, 0))
    for name, value in changes.items():
        offset, kind = {
            "magic": (0, "I"),
            "record_size": (4, "I"),
            "slots": (8, "I"),
            "workers": (12, "I"),
            "unit": (16, "Q"),
            "text": (24, "Q"),
        }[name]
        struct.pack_into(kind, data, offset, value)
    copy = os.memfd_create("copy", os.MFD_ALLOW_SEALING)
    os.write(copy, data[:size])
    os.ftruncate(copy, size if size is not None else len(data))
    fcntl.fcntl(copy, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return copy


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 0},
        {"size": 20},
        {"size": 4096},
        {"size": 1 << 20},
        {"magic": 1},
        {"record_size": 400},
        {"slots": 0},
        {"slots": 5},
        {"slots": 0xFFFFFFFF},
        {"workers": 0},
        {"workers": 0xFFFFFFFF},
        {"unit": 0},
        {"unit": 4097},
        {"unit": 1 << 40},
        {"text": 1 << 63},
        {"text": 1 << 20},
    ],
    ids=str,
)
def test_a_wrong_file(slates, changes):
    file, _ = slates()
    copy = copy_of(file, **changes)
    relay = Relay(**OPTIONS)
    with pytest.raises(ValueError, match="not a slate"):
        relay.use_slate(copy, -1, 1)
    os.close(copy)
    relay.use_slate(file, -1, 1)


def test_a_file_that_may_shrink(slates):
    file, slate = slates()
    copy = os.memfd_create("copy", os.MFD_ALLOW_SEALING)
    os.write(copy, os.pread(file, slate.size, 0))
    relay = Relay(**OPTIONS)
    with pytest.raises(ValueError, match="not a slate"):
        relay.use_slate(copy, -1, 1)
    fcntl.fcntl(copy, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    relay.use_slate(copy, -1, 1)
    os.close(copy)


def test_units_that_are_too_small(slates):
    file, _ = slates(unit=4096)
    with pytest.raises(ValueError, match="not a slate"):
        Relay(**OPTIONS).use_slate(file, -1, 1)


def test_one_slate_only(slates):
    relay = Relay(**OPTIONS)
    relay.use_slate(slates()[0], -1, 1)
    with pytest.raises(ValueError, match="already"):
        relay.use_slate(slates()[0], -1, 1)


def test_no_file():
    with pytest.raises(OSError, match="9"):
        Relay(**OPTIONS).use_slate(-1, -1, 1)


# ── slots ────────────────────────────────────────────────────────────────────────────────────────


def test_entries(keep, pair):
    _, links, slate = keep(3, *pair)
    assert [slot.entry for slot in slate.slots()] == [1, 2, 3]
    assert slate.last_id == max(link.id for link in links)
    for link in links:
        cookies = slot_of(slate, link).cookies
        for fd, cookie in zip((link.client_fd, link.target_fd), cookies, strict=True):
            with socket.socket(fileno=os.dup(fd)) as theirs:
                raw = theirs.getsockopt(socket.SOL_SOCKET, 57, 8)  # SO_COOKIE
            assert struct.unpack("Q", raw) == (cookie,)


def test_slots_are_used_again(keep, pair):
    rig, (first, second), slate = keep(2, *pair)
    index = slot_of(slate, first).index
    close(first.client)
    close(first.target)
    rig.until_ended(first.id)
    assert slot_of(slate, first) is None
    third = rig.adopted_link()
    enter(rig)
    assert slot_of(slate, third).index == index
    assert slot_of(slate, third).entry == 3
    assert slot_of(slate, second).entry == 2


def test_no_slot_is_free(rigs, slates):
    rig = rigs(**OPTIONS)
    links = [rig.adopted_link() for _ in range(6)]
    file, slate = slates()
    rig.relay.use_slate(file, -1, 1)
    with pytest.raises(OSError, match="28"):
        enter(rig)
    rig.relay.thaw()
    assert len(slate.slots()) == 4
    kept = {slot.id for slot in slate.slots()}
    left = next(link for link in links if link.id not in kept)
    left.client.send(b"hello")
    assert rig.read(left.target, 5) == b"hello"


def test_positions(keep, pair):
    """What the kernel counts, plus what the slot says, is what was forwarded; then and later."""
    rig, (link,), slate = keep(1, *pair)
    forwarded = {UP: 0, DOWN: 0}
    for size in (1, 5000, 100_000):
        for direction, source, sink in (
            (UP, link.client, link.target),
            (DOWN, link.target, link.client),
        ):
            rig.send(source, payload(size)[: size // 2])
            data = rig.read(sink, size // 2)
            forwarded[direction] += len(data)
            rig.settle()
            halves = slot_of(slate, link).halves
            check_positions(halves[direction], link, direction, pair, forwarded[direction])
    assert not slate.intents()


def check_positions(half, link, direction, pair, forwarded):
    fds = (link.client_fd, link.target_fd)
    source, sink = (0, 1) if direction == UP else (1, 0)
    if pair[source] == "unix":
        assert half.taken == forwarded
    else:
        assert stream_positions(fds[source])[0] + half.taken_offset == forwarded
    if pair[sink] != "unix":
        assert stream_positions(fds[sink])[1] + half.given_offset == forwarded
    assert half.spill_size == half.pipe == 0


def test_positions_of_what_went_before(rigs, slates, pair):
    rig = rigs(*pair, **OPTIONS)
    link = rig.adopted_link(preamble=b"before")
    assert rig.read(link.target, 6) == b"before"
    rig.send(link.client, b"hello")
    assert rig.read(link.target, 5) == b"hello"
    file, slate = slates()
    rig.relay.use_slate(file, -1, 1)
    enter(rig)
    check_positions(slot_of(slate, link).halves[UP], link, UP, pair, 11)


# ── spills ───────────────────────────────────────────────────────────────────────────────────────


def fill(rig, link):
    """Send until nothing more is taken; all of it."""
    sent = b""
    while True:
        rig.settle()
        try:
            count = link.client.send(payload(1_000_000)[len(sent) % 1000 :][:50_000])
        except BlockingIOError:
            return sent
        sent += payload(1_000_000)[len(sent) % 1000 :][:count]


@pytest.fixture(params=["before", "after"])
def stuck(rigs, slates, pair, request):
    """A connection whose target does not read, kept before or after that: (rig, link, slate, all
    that was sent)."""
    buffers = {"target_buffers": SMALL, "client_buffers": {"send_buffer": 65536}}
    rig = rigs(*pair, **OPTIONS, **buffers)
    link = rig.adopted_link(send_buffer=16384)
    set_option(link.client_fd, socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    file, slate = slates()
    rig.relay.use_slate(file, -1, 1)
    if request.param == "before":
        enter(rig)
        sent = fill(rig, link)
    else:
        sent = fill(rig, link)
        enter(rig)
        sent += fill(rig, link)
    return rig, link, slate, sent


def test_what_is_unsent_is_in_the_spill(stuck, pair):
    rig, link, slate, sent = stuck
    slot = slot_of(slate, link)
    half = slot.halves[UP]
    assert half.spill_size > 0
    assert slate.spilled(slot.index, UP) == sent[half.spill_end - half.spill_size : half.spill_end]
    received = b""
    while len(received) < len(sent):
        received += rig.read(link.target, min(3000, len(sent) - len(received)))
        rig.settle()
        half = slot_of(slate, link).halves[UP]
        spilled = slate.spilled(slot.index, UP)
        assert sent[: half.spill_end].endswith(spilled)
        if pair[0] == "unix":
            assert spilled == b"" or half.taken == half.spill_end
    assert received == sent
    assert slot_of(slate, link).halves[UP].spill_size == 0


def test_a_spill_goes_to_another_relay(stuck):
    """A parcel takes what is unsent from the slate."""
    rig, link, _slate, sent = stuck
    rig.relay.freeze()
    rig.relay.thaw()
    half_close(link.client)
    assert rig.read_to_end(link.target) == (sent, "eof")


def test_the_memory_of_a_spill_is_returned(stuck):
    rig, link, slate, _sent = stuck
    index = slot_of(slate, link).index
    place = slate.spills_at + 2 * index * slate.unit
    assert slate.map[place : place + slate.unit].strip(b"\0")
    rig.relay.terminate(link.id)
    rig.until_ended(link.id)
    assert slot_of(slate, link) is None


# ── what cannot be kept ──────────────────────────────────────────────────────────────────────────


def pairs_of_sockets():
    """(family, fd, fd) of the sockets of a TCP connection and of a UNIX one, all the caller's."""
    with open_listener("tcp4", "") as listener:
        tcp = open_client(listener).detach(), accept(listener).detach()
    unix = [one.detach() for one in socket.socketpair()]
    return (socket.AF_INET, *tcp), (socket.AF_UNIX, *unix)


def test_memory_that_cannot_be_locked(slates):
    """The kernel could not be relied on to note what UNIX sockets do."""
    need_root("to become a user who may lock no memory")
    file, slate = slates()

    def work():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        os.setresuid(UNUSED_UID, UNUSED_UID, UNUSED_UID)
        if may_lock_memory():
            pytest.skip("mlock(2) does not reach the kernel, as with the address sanitizer")
        relay = Relay(**OPTIONS)
        tcp, unix = pairs_of_sockets()
        kept = relay.adopt(tcp[1], tcp[0], tcp[2])
        relay.adopt(unix[1], unix[0], unix[2])
        relay.run(0)
        relay.freeze()
        relay.use_slate(file, -1, 1)
        with contextlib.suppress(OSError):
            relay.enter_all()
        assert [slot.id for slot in slate.slots()] == [kept]
        relay.thaw()
        relay.run(0)
        relay.close_all()

    in_child(work)


# ── struck ───────────────────────────────────────────────────────────────────────────────────────


def test_struck_by_a_reset(keep):
    rig, (link,), slate = keep(1)
    linger = struct.pack("ii", 1, 0)
    link.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    link.client.close()
    rig.until(lambda: not slate.slots(), "it is struck")
    rig.until_ended(link.id)


@locks_memory
def test_struck_by_the_reset_of_a_unix_socket(keep):
    """It has not read what was sent to it; what it has sent before is delivered all the same."""
    rig, (link,), slate = keep(1, "unix", "unix")
    rig.send(link.target, b"never read")
    rig.settle()
    link.client.send(b"last words")
    link.client.close()
    data, _end = rig.read_to_end(link.target)
    assert data == b"last words"
    assert not slate.slots()
    rig.until_ended(link.id)


def test_ends_that_are_clean(keep, pair):
    rig, (link,), slate = keep(1, *pair)
    link.client.send(b"question")
    half_close(link.client)
    assert rig.read_to_end(link.target) == (b"question", "eof")
    assert slot_of(slate, link) is not None
    link.target.send(b"answer")
    half_close(link.target)
    assert rig.read_to_end(link.client) == (b"answer", "eof")
    assert rig.until_ended(link.id) == ("ended", 8, 6)
    assert not slate.slots()
    assert not slate.intents()


def test_threads(rigs, slates, pair):
    """Each worker has its own intent; one that the slate has no room for keeps nothing."""
    rig = rigs(*pair, **OPTIONS)
    file, slate = slates(workers=2, slots=12)
    rig.relay.start_worker()
    rig.relay.use_slate(file, -1, 1)
    rig.relay.start_worker()
    links = [rig.link() for _ in range(12)]
    exchange(rig, links)  # they are connected
    enter(rig)
    exchange(rig, links)
    exchange(rig, links)
    kept = {slot.id for slot in slate.slots()}
    assert 0 < len(kept) < 12
    for link in links:
        half_close(link.client)
        close(link.target)
        assert rig.until_ended(link.id) == ("ended", 12, 12)
    assert not slate.slots()
    assert not slate.intents()
    assert values(rig.relay.totals())["copied"] == 12 * 24
