"""What one process writes for the next: blocks of text, and parcels."""

import fcntl
import os
import resource
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.child import in_child

from proxyd.continuity import blocks as text_blocks
from proxyd.continuity import fd_queue, parcel
from proxyd.continuity.blocks import Block
from proxyd.continuity.parcel import Parcel, ParcelError

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class FakeRelay:
    """A relay with connections whose descriptors are those of pipes."""

    def __init__(self, count=2):
        self.fds = [fd for _ in range(count) for fd in os.pipe()]
        self.resting = count

    def export(self, file, offset):
        os.pwrite(file, b"records", offset)
        return self.fds

    def close(self):
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def relay():
    relay = FakeRelay()
    yield relay
    relay.close()


@pytest.fixture
def queue():
    sender, receiver = fd_queue.pair()
    yield sender, receiver
    sender.close()
    receiver.close()


def sealed(content, seals=SEALS):
    """A file with this content; the fd."""
    file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(file, content)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def same(one, other):
    """Whether two fds are of the same file."""
    return os.path.sameopenfile(one, other)


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────


@given(
    st.lists(
        st.tuples(
            st.from_regex("[a-z]+", fullmatch=True),
            st.integers(-(2**63), 2**63),
            st.text(),
            st.binary(),
            st.integers(0, 3),
        )
    )
)
def test_what_is_written_is_read(rows):
    written = [
        Block(kind, {"n": number, "t": text, "b": raw}, [7] * count)
        for kind, number, text, raw, count in rows
    ]
    read = text_blocks.read(text_blocks.write(written))
    assert [
        (one.kind, one.number("n"), one.text("t"), one.raw("b"), len(one.fds)) for one in read
    ] == rows


def test_what_is_missing_has_a_default():
    (block,) = text_blocks.read(b"kind\nfds=0\n\n")
    assert (block.number("n"), block.number("n", -1), block.text("t"), block.raw("b")) == (
        0,
        -1,
        "",
        b"",
    )


def test_what_a_later_version_adds_is_skipped():
    first, second = text_blocks.read(b"later\nfds=0\nwhat=ever\nno pair\n\nlabel\nfds=0\nid=5\n\n")
    assert (first.kind, second.kind, second.number("id")) == ("later", "label", 5)


def test_undecodable_text():
    name = b"/run/\xff".decode("utf-8", "surrogateescape")
    (block,) = text_blocks.read(text_blocks.write([Block("target", {"text": name})]))
    assert block.text("text") == name


@given(st.binary())
def test_garbage_is_an_error(data):
    try:
        for block in text_blocks.read(data):
            for key in block.values:
                block.text(key)
                block.number(key)
    except ValueError:
        pass


@pytest.mark.parametrize("count", ["-1", "1e3", "x", str(1 << 40), "٣"])
def test_a_count_of_descriptors_that_is_none(count):
    with pytest.raises(ValueError, match="fds|descriptors|codec"):
        text_blocks.read(f"held\nfds={count}\n\n".encode())


# ── parcels ──────────────────────────────────────────────────────────────────────────────────────


def test_what_is_sent_is_received(queue, relay):
    sender, receiver = queue
    listener = os.open("/dev/null", os.O_RDONLY)
    blocks = [Block("listener", {"name": "web"}, [listener]), Block("label", {"id": 5})]
    parcel.send(sender, blocks, relay)
    sender.close()
    received = parcel.receive(receiver.detach())
    first, second = received.blocks
    assert (first.text("name"), second.number("id"), received.lost) == ("web", 5, 0)
    assert same(first.fds[0], listener)
    fds = received.take_connections()
    assert all(same(one, other) for one, other in zip(fds, relay.fds, strict=True))
    assert not any(os.get_inheritable(fd) for fd in fds)
    assert os.pread(received.file, 100, received.offset) == b"records"
    received.close()
    for fd in (listener, *fds):
        os.close(fd)


def test_more_descriptors_than_a_message_has(queue):
    sender, receiver = queue
    relay = FakeRelay(150)
    parcel.send(sender, [], relay)
    sender.close()
    received = parcel.receive(receiver.detach())
    assert len(received.connections) == 300
    assert all(same(*pair) for pair in zip(received.connections, relay.fds, strict=True))
    received.close()
    relay.close()


@pytest.mark.parametrize("count", [0, 150])
def test_a_sender_that_has_not_finished(queue, count):
    sender, receiver = queue
    relay = FakeRelay(count)
    if count:
        parcel.send(sender, [], relay)
    with pytest.raises(ParcelError, match="not finished"):
        parcel.receive(receiver.detach())
    relay.close()


def test_an_empty_queue(queue):
    sender, receiver = queue
    sender.close()
    assert parcel.receive(receiver.detach()) is None


def test_descriptors_that_do_not_fit():
    """The limit is too low for all: it is known which are missing."""

    def run():
        sender, receiver = fd_queue.pair()
        relay = FakeRelay(20)
        parcel.send(sender, [], relay)
        relay.close()
        sender.close()
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 10, used + 10))
        received = parcel.receive(receiver.detach())
        assert 0 < received.lost < 40
        assert received.connections.index(-1) == 40 - received.lost
        assert set(received.connections[-received.lost :]) == {-1}

    in_child(run)


def head(text=b"", version=1, offset=None):
    """The beginning of a file."""
    offset = 40 + len(text) if offset is None else offset
    return f"proxyd-parcel {version} {offset}".ljust(39).encode() + b"\n" + text


BAD = {
    "empty": (b"", "it is none"),
    "other": (b"something else\n", "it is none"),
    "later": (head(version=2), "version 2"),
    "before": (head(offset=3), "no end"),
    "huge": (head(offset=1 << 40), "no end"),
    "short": (head(offset=100), "cut short"),
    "binary": (head(b"\xff\xfe"), "ascii"),
    "missing": (head(b"held\nfds=9\n\n"), "descriptors are missing"),
}


@pytest.mark.parametrize(("content", "why"), BAD.values(), ids=BAD)
def test_a_file_that_is_bad(content, why):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ParcelError, match=why):
        Parcel(sealed(content), [os.dup(0), os.dup(0)])
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("seals", [0, SEALS & ~fcntl.F_SEAL_WRITE])
def test_a_file_that_could_change(seals):
    with pytest.raises(ParcelError, match="sealed"):
        Parcel(sealed(head(), seals), [])


@pytest.mark.parametrize("data", [b"", b"x", b"1", b"1 x", b"-1 1", b"2 1", b"999 999"])
def test_messages_that_are_bad(queue, data):
    sender, receiver = queue
    sender.send(data)
    sender.close()
    if not data:
        assert parcel.receive(receiver.detach()) is None
    else:
        with pytest.raises((ParcelError, OSError)):
            parcel.receive(receiver.detach())


def test_what_is_no_queue():
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    with pytest.raises(ParcelError, match="no queue"):
        parcel.receive(theirs.detach())
    ours.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("text", ["", "5", "5:", "x:1", ":1", "-1:1", "5:2"])
def test_a_parcel_of_another_process(text):
    assert parcel.inherited(text, 1) is None


def test_a_warning_instead_of_a_parcel(queue, capfd):
    sender, receiver = queue
    sender.send(b"garbage")
    assert parcel.inherited(f"{receiver.detach()}:1", 1) is None
    assert "its parcel is bad: it is none" in capfd.readouterr().err
