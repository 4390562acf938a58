"""What a killed process has left goes on, or is reset: no byte is lost, doubled or invented.

The slates are written by hand, one for each decision.
"""

import os
import random
import socket
import struct

import pytest
from kit.parcel import HEAD_SIZE, RECORD_SIZE
from kit.slate import COPY, FLUSH, UNIT, Left, Slate, is_unix
from kit.sockets import open_listener, read_exactly, read_to_end
from kit.traffic import payload
from kit.waiting import wait_until

from proxyd._relay import Relay, recover, slate_text

PAIRS = [("tcp", "tcp"), ("tcp", "unix"), ("unix", "tcp"), ("unix", "unix")]
SIDES = [0, 1]
"""Up and down."""

DATA = payload(UNIT)


def make_pair(family):
    """(the program's socket, its peer's)."""
    if family == "unix":
        return socket.socketpair()
    with open_listener("tcp4", "") as listener:
        peer = socket.create_connection(listener.getsockname())
        own, _ = listener.accept()
    peer.settimeout(20)
    return own, peer


@pytest.fixture
def slate():
    slate = Slate()
    yield slate
    slate.close()


@pytest.fixture(params=PAIRS, ids="-".join)
def left(request, slate):
    """A connection in slot 2."""
    one = Left(slate, 2, 77, [make_pair(family) for family in request.param])
    for sock in one.sockets:
        sock.setblocking(False)
    for sock in one.ends:
        sock.settimeout(20)
    yield one
    one.close()


@pytest.fixture(params=SIDES, ids=["up", "down"])
def side(request):
    return request.param


class Way:
    """One direction of a connection."""

    def __init__(self, left, side):
        self.sender, self.receiver = left.ends[side], left.ends[1 - side]
        self.src, self.dst = left.sockets[side], left.sockets[1 - side]
        self.left, self.side = left, side

    def take(self, size):
        """The program has read so much, and nothing of it is noted yet."""
        self.sender.sendall(DATA[:size])
        got = b""
        while len(got) < size:
            self.src.setblocking(True)
            got += self.src.recv(size - len(got))
        self.src.setblocking(False)
        return got

    def give(self, data):
        """The program has written this."""
        self.dst.setblocking(True)
        self.dst.sendall(data)
        self.dst.setblocking(False)


@pytest.fixture
def way(left, side):
    return Way(left, side)


class Recovered:
    """What has become of it."""

    def __init__(self, left, pipes=None, more=()):
        self.messages = [left.message(), *more]
        self.file = os.memfd_create("parcel")
        pipes = pipes or {}
        self.fds, self.dropped = recover(left.slate.fd, self.messages, pipes, self.file)
        for fd in {fd for one in self.messages for fd in one[2:]} - {*self.fds}:
            os.close(fd)
        assert left.slate.is_settled()

    def go_on(self, left):
        """Have a relay go on with it; the relay."""
        relay = Relay()
        assert relay.import_connections(self.file, 0, self.fds, [0], [0]) == (1, 0)
        os.close(self.file)
        for one in left.sockets:
            one.close()
        relay.thaw()
        return relay

    def record(self):
        return os.pread(self.file, RECORD_SIZE, HEAD_SIZE)


def exchange(relay, left, expected=(b"", b"")):
    """Both directions go on with what is expected, then with more, up to the ends."""
    for side in SIDES:
        left.ends[side].sendall(b"more")
    for side in SIDES:
        wanted = expected[side] + b"more"
        receiver = left.ends[1 - side]
        receiver.setblocking(False)
        got = bytearray()

        def received(got=got, receiver=receiver, wanted=wanted):
            relay.run(0)
            try:
                got += receiver.recv(65536)
            except BlockingIOError:
                pass
            return len(got) >= len(wanted)

        wait_until(received, "what is under way")
        assert got == wanted
    relay.close_all()


def check_goes_on(left, side=0, expected=b"", pipes=None):
    found = Recovered(left, pipes)
    assert found.dropped == 0
    both = (expected, b"") if side == 0 else (b"", expected)
    exchange(found.go_on(left), left, both)


def check_dropped(left, pipes=None):
    found = Recovered(left, pipes)
    assert (found.fds, found.dropped) == ([], 1)
    os.close(found.file)
    again = Recovered(left, pipes)
    assert again.fds == []
    os.close(again.file)


# ── nothing is under way ─────────────────────────────────────────────────────────────────────────


def test_idle(left):
    check_goes_on(left)


def test_after_some_bytes(way, left):
    way.give(way.take(5000))
    left.slate.half(left.slot, way.side, taken=5000)
    assert read_exactly(way.receiver, 5000) == DATA[:5000]
    check_goes_on(left)


def test_the_same_again(way, left):
    """A process that is killed while it recovers changes nothing."""
    data = way.take(1000)
    left.slate.intent(
        1, left.half_number(way.side), COPY, 0, is_unix(way.src) and len(data), 0, data
    )
    for _ in range(3):
        found = Recovered(left)
        assert found.dropped == 0
        for fd in found.fds:
            os.close(fd)
        os.close(found.file)
    check_goes_on(left, way.side, data)


def test_an_entry_that_is_void(left):
    """The connection has ended, and its slot is another one's, or nobody's."""
    left.slate.enter(left.slot, 0, b"")
    found = Recovered(left)
    assert (found.fds, found.dropped) == ([], 0)
    os.close(found.file)


def test_the_same_entry_twice(left):
    found = Recovered(left, more=[left.message()])
    assert (len(found.fds), found.dropped) == (2, 0)
    exchange(found.go_on(left), left)


@pytest.mark.parametrize("slot", [4, 1 << 31])
def test_a_slot_that_is_none(left, slot):
    found = Recovered(left, more=[left.message(slot, 77)])
    assert (len(found.fds), found.dropped) == (2, 0)
    exchange(found.go_on(left), left)


def test_a_lost_descriptor(left):
    file = os.memfd_create("parcel")
    slot, entry, client, target = left.message()
    assert recover(left.slate.fd, [(slot, entry, client, -1)], {}, file) == ([], 1)
    for fd in (file, client, target):
        os.close(fd)


def test_other_sockets(left):
    one, other = make_pair("tcp")
    file = os.memfd_create("parcel")
    message = left.slot, left.entry, one.fileno(), other.fileno()
    assert recover(left.slate.fd, [message], {}, file) == ([], 1)
    os.close(file)
    one.close()
    other.close()


# ── a spill ──────────────────────────────────────────────────────────────────────────────────────


def test_a_spill(way, left):
    data = way.take(3000)
    way.give(data[:1200])
    left.slate.half(left.slot, way.side, taken=3000)
    left.slate.spill(left.slot, way.side, data[1200:], 3000)
    assert read_exactly(way.receiver, 1200) == DATA[:1200]
    check_goes_on(left, way.side, data[1200:])


def test_a_spill_of_which_some_was_given(way, left):
    """To TCP this is not noted: the kernel knows. To a UNIX socket it is."""
    data = way.take(3000)
    way.give(data[:1200])
    left.slate.half(left.slot, way.side, taken=3000)
    left.slate.spill(left.slot, way.side, data[1000:], 3000, 1800 if is_unix(way.dst) else None)
    assert read_exactly(way.receiver, 1200) == DATA[:1200]
    check_goes_on(left, way.side, data[1200:])


def test_a_spill_that_was_given(way, left):
    """Likewise, and more has gone directly since."""
    data = way.take(3000)
    way.give(data)
    left.slate.half(left.slot, way.side, taken=3000)
    left.slate.spill(left.slot, way.side, data[1000:2000], 2000, 0 if is_unix(way.dst) else None)
    assert read_exactly(way.receiver, 3000) == DATA[:3000]
    check_goes_on(left, way.side)


@pytest.mark.parametrize("size", [1799, 1801, UNIT + 1, (1 << 32) - 1])
def test_a_spill_that_does_not_fit(way, left, size):
    """One byte too few or too many: the connection is not guessed at."""
    data = way.take(3000)
    way.give(data[:1200])
    left.slate.half(left.slot, way.side, taken=3000)
    left.slate.spill(left.slot, way.side, data[1200:], 3000 + (size == 1801), size)
    is_known = not is_unix(way.src) if size == 1801 else not is_unix(way.dst)
    if size > UNIT or is_known:
        check_dropped(left)


# ── an intent ────────────────────────────────────────────────────────────────────────────────────


def noted(way, count):
    """What the kernel has noted, where the slate is asked."""
    return count if is_unix(way.src) else 0


def noted_given(way, count):
    return count if is_unix(way.dst) else 0


@pytest.mark.parametrize("given", [0, 1, 2999, 3000])
@pytest.mark.parametrize("before", [0, 500])
def test_killed_while_copying(way, left, given, before):
    """After the recv, before, after, or in the middle of what follows."""
    way.give(way.take(before))
    data = way.take(3000)
    way.give(data[:given])
    half = left.half_number(way.side)
    left.slate.half(left.slot, way.side, taken=before)
    left.slate.spill(left.slot, way.side, b"of an earlier spill", 3 if before else 0)
    left.slate.intent(0, half, COPY, before, noted(way, 3000), noted_given(way, given), data)
    assert read_exactly(way.receiver, before + given) == DATA[:before] + data[:given]
    check_goes_on(left, way.side, data[given:])


def test_killed_before_the_recv(way, left):
    left.slate.intent(0, left.half_number(way.side), COPY, 0, data=b"of an earlier copy")
    check_goes_on(left)


@pytest.mark.parametrize("given", [0, 700, 2000])
@pytest.mark.parametrize("is_noted", [False, True])
def test_killed_while_flushing(way, left, given, is_noted):
    """The kernel has taken bytes of the spill; the slate may say so already."""
    data = way.take(3000)
    way.give(data[:1000])
    way.give(data[1000:][:given])
    left.slate.half(left.slot, way.side, taken=3000)
    size = 2000 - given if is_noted and is_unix(way.dst) else 2000
    left.slate.spill(left.slot, way.side, data[1000:], 3000, size)
    half = left.half_number(way.side)
    left.slate.intent(1, half, FLUSH, 1000, given=noted_given(way, given))
    assert read_exactly(way.receiver, 1000 + given) == DATA[: 1000 + given]
    check_goes_on(left, way.side, data[1000 + given :])


IMPOSSIBLE = {
    "other kind": {"what": 7},
    "more than fits": {"taken": UNIT + 1},
    "more given than taken": {"given": 3001},
    "much more given": {"given": (1 << 32) - 1},
}


@pytest.mark.parametrize("wrong", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_intent_that_cannot_be(left, slate, wrong):
    way = Way(left, 0)
    if not (is_unix(way.src) and is_unix(way.dst)):
        pytest.skip("the kernel says it")
    values = {"what": COPY, "position": 0, "taken": 3000, "given": 0} | wrong
    slate.intent(0, left.half_number(0), **values)
    check_dropped(left)
    assert slate.entry(left.slot) == 0


def test_an_intent_of_no_half(left):
    left.slate.intent(0, 9, COPY, 0)
    left.slate.intent(1, (1 << 32) - 1, COPY, 0)
    check_goes_on(left)


def test_an_intent_of_an_entry_that_is_not_there(left):
    left.slate.intent(0, 1, COPY, 0)
    check_goes_on(left)


def test_two_workers_at_one_half(left, side):
    for worker in (0, 1):
        left.slate.intent(worker, left.half_number(side), COPY, 0)
    check_dropped(left)


# ── a pipe ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            pass  # it has gone on


def test_a_pipe(way, left, pipe):
    if is_unix(way.src) and not is_unix(way.dst):
        pytest.skip("such a half copies only")
    data = way.take(3000)
    way.give(data[:1000])
    os.write(pipe[1], data[1000:])
    left.slate.half(left.slot, way.side, pipe=5)
    assert read_exactly(way.receiver, 1000) == DATA[:1000]
    check_goes_on(left, way.side, data[1000:], {5: os.dup(pipe[0])})


def test_a_spill_and_a_pipe(way, left, pipe):
    if is_unix(way.src) and not is_unix(way.dst):
        pytest.skip("such a half copies only")
    data = way.take(3000)
    os.write(pipe[1], data[1000:])
    left.slate.half(left.slot, way.side, pipe=5)
    left.slate.spill(left.slot, way.side, data[:1000], 1000)
    check_goes_on(left, way.side, data, {5: os.dup(pipe[0])})


def test_a_pipe_that_is_empty(way, left, pipe):
    left.slate.half(left.slot, way.side, pipe=5)
    check_goes_on(left, pipes={5: pipe[0]})


def test_a_pipe_that_is_missing(left, side):
    left.slate.half(left.slot, side, pipe=5)
    check_dropped(left, {4: 0, 6: 0})


def test_a_pipe_that_is_none(left, side):
    left.slate.half(left.slot, side, pipe=5)
    check_dropped(left, {5: left.slate.fd})


def test_a_pipe_of_two_halves(left, pipe):
    os.write(pipe[1], b"whose is it?")
    for side in SIDES:
        left.slate.half(left.slot, side, pipe=5)
    check_dropped(left, {5: pipe[0]})


def test_a_pipe_with_too_much(way, left, pipe):
    if is_unix(way.src):
        pytest.skip("nobody knows")
    os.write(pipe[1], way.take(10) + b"x")
    left.slate.half(left.slot, way.side, pipe=5)
    if is_unix(way.dst):
        return  # likewise
    check_dropped(left, {5: pipe[0]})


# ── ends ─────────────────────────────────────────────────────────────────────────────────────────

SHUT = 2
HALVES_AT = 400
"""Where in a record the states of its halves are."""


def test_an_end_that_was_passed_on(way, left):
    """By TCP the kernel knows it; a UNIX socket is told once more."""
    way.sender.shutdown(socket.SHUT_WR)
    wait_until(lambda: way.src.recv(1) == b"", "the end")
    way.dst.shutdown(socket.SHUT_WR)
    assert read_to_end(way.receiver) == (b"", "eof")
    found = Recovered(left)
    assert found.dropped == 0
    relay = found.go_on(left)
    way.receiver.sendall(b"answer")
    way.sender.setblocking(False)

    def answered():
        relay.run(0)
        try:
            return way.sender.recv(100) == b"answer"
        except BlockingIOError:
            return False

    wait_until(answered, "the answer")
    way.receiver.close()
    wait_until(lambda: relay.run(0) is not None and relay.connections == 0, "the end")


def test_killed_before_an_end_was_passed_on(way, left):
    """The slate says that it was, since it is noted before."""
    way.sender.shutdown(socket.SHUT_WR)
    wait_until(lambda: way.src.recv(1) == b"", "the end")
    left.slate.change_record(left.slot, HALVES_AT + way.side, bytes([SHUT]))
    found = Recovered(left)
    assert (len(found.fds), found.dropped) == (2, 0)
    assert read_to_end(way.receiver) == (b"", "eof")
    for fd in found.fds:
        os.close(fd)
    os.close(found.file)


def test_both_ends_were_passed_on(left):
    """TCP is in the state CLOSE then, as after a reset; but the slate tells."""
    one, other = left.ends
    one.shutdown(socket.SHUT_WR)
    wait_until(lambda: left.client.recv(1) == b"", "the end")
    left.slate.change_record(left.slot, HALVES_AT, bytes([SHUT]))
    left.target.shutdown(socket.SHUT_WR)
    other.sendall(DATA[:100])
    other.close()
    wait_until(lambda: left.target.recv(100, socket.MSG_PEEK) == DATA[:100], "the answer")
    found = Recovered(left)
    relay = found.go_on(left)
    one.setblocking(False)
    got = []

    def ended():
        relay.run(0)
        try:
            got.append(one.recv(1000))
        except BlockingIOError:
            return False
        return got[-1] == b""

    wait_until(ended, "the answer, and its end")
    assert b"".join(got) == DATA[:100]
    relay.close_all()


def test_an_end_that_was_not_passed_on(way, left):
    data = way.take(100)
    left.slate.half(left.slot, way.side, taken=100)
    left.slate.spill(left.slot, way.side, data, 100)
    way.sender.shutdown(socket.SHUT_WR)
    wait_until(lambda: way.src.recv(1) == b"", "the end")
    found = Recovered(left)
    assert found.dropped == 0
    relay = found.go_on(left)
    way.receiver.setblocking(False)
    got = []

    def ended():
        relay.run(0)
        try:
            got.append(way.receiver.recv(1000))
        except BlockingIOError:
            return False
        return got[-1] == b""

    wait_until(ended, "the end")
    assert b"".join(got) == data
    relay.close_all()


def test_a_reset_that_was_read(left, side):
    """Its error was taken, and nobody knows of it any more."""
    way = Way(left, side)
    if is_unix(way.src):
        way.src.send(b"never read")
        way.sender.close()
        with pytest.raises(ConnectionResetError):
            way.src.recv(1)
        left.slate.intent(0, left.half_number(side), COPY, 0)
    else:
        way.sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        way.sender.close()

        def was_reset():
            try:
                return way.src.recv(1) is None
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True

        wait_until(was_reset, "the reset")
    check_dropped(left)


# ── garbage ──────────────────────────────────────────────────────────────────────────────────────


def test_the_text():
    slate = Slate(text=b"listener\nfds=0\n\n")
    offset, size = slate_text(slate.fd)
    assert os.pread(slate.fd, size, offset) == b"listener\nfds=0\n\n"
    slate.close()


def test_a_file_that_is_no_slate(tmp_path):
    file = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.write(file, bytes(100_000))
    with pytest.raises(ValueError, match="not a slate"):
        recover(file, [], {}, file)
    with pytest.raises(ValueError, match="not a slate"):
        slate_text(file)
    os.close(file)


@pytest.mark.parametrize("seed", range(40))
def test_garbage_in_a_slate(seed):
    """Nothing breaks, and what goes on is a parcel that can be read."""
    chance = random.Random(seed)
    slate = Slate()
    families = [chance.choice(PAIRS) for _ in range(3)]
    lefts = [
        Left(slate, slot, slot + 1, [make_pair(family) for family in pair])
        for slot, pair in enumerate(families)
    ]
    pipe = os.pipe()
    os.write(pipe[1], b"some bytes")
    for _ in range(30):
        for one in lefts:
            one.enter()
        places = slate.used()
        for _ in range(chance.randint(1, 6)):
            at, size = chance.choice(places[1:])
            place = at + chance.randrange(size)
            os.pwrite(slate.fd, chance.randbytes(chance.choice([1, 2, 4, 8])), place)
        for worker in range(slate.workers):
            numbers = [chance.choice([0, 1, 5, UNIT, chance.getrandbits(31)]) for _ in range(3)]
            slate.intent(worker, chance.randrange(8), chance.randrange(3), *numbers)
        check_garbage(slate, lefts, pipe)
    for one in lefts:
        one.close()
    for fd in pipe:
        os.close(fd)
    slate.close()


def check_garbage(slate, lefts, pipe):
    messages = [one.message() for one in lefts]
    file = os.memfd_create("parcel")
    try:
        fds, dropped = recover(slate.fd, messages, {1: pipe[0]}, file)
        assert 0 <= dropped <= len(lefts)
        relay = Relay()
        copies = [os.dup(fd) for fd in fds]
        restored, failed = relay.import_connections(file, 0, copies, [0], [0])
        assert (restored, failed) == (len(fds) // 2, 0) or pipe[0] in fds
        relay.release()
    except ValueError:
        pass
    finally:
        os.close(file)
        for fd in {fd for one in messages for fd in one[2:]}:
            os.close(fd)
