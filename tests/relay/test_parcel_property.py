"""A parcel is input: whatever is in it, the relay does not crash or wait, leaks no descriptor, and
gives no client the bytes of another.
"""

import contextlib
import os
import random
import struct
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.parcel import HEAD_SIZE, RECORD_SIZE, Parcel
from kit.rig import MODES, Rigs
from kit.sockets import reset
from kit.stepped import half_close

EXAMPLES = int(os.environ.get("PARCEL_EXAMPLES", "150"))

NUMBERS = [0, 1, 2, 3, 127, 255, (1 << 64) - 1]
NUMBERS += [(1 << bits) - less for bits in (31, 32, 48, 63) for less in (0, 1)]

COUNT = 4
"""Connections of a scene."""

FIELDS = [*range(0, HEAD_SIZE, 4), *range(HEAD_SIZE, HEAD_SIZE + COUNT * RECORD_SIZE, 4)]


class Scene:
    """Connections in several states that rest in a relay, and their parcel; and another relay."""

    def __init__(self, folder, way):
        self.rigs = Rigs(folder)
        small = {"receive_buffer": 4096}
        options = {"client_buffers": small, "target_buffers": small, **MODES[way]}
        rig = self.rig = self.rigs("tcp4", "tcp4", **options)
        self.links = [rig.link() for _ in range(COUNT)]
        rig.fill(self.links[0].client, limit=400_000)
        half_close(self.links[1].target)
        rig.fill(self.links[2].target, unit=b"x" * 100, limit=300_000)
        reset(self.links[2].target)
        rig.settle()
        rig.listener.stop()
        rig.events += rig.relay.freeze()
        self.parcel = Parcel(rig.relay)
        self.fds = self.parcel.take_fds()
        rig.relay.release()
        rig.make_relay()

    def take(self, fds):
        """Import them, and go on; (restored, failed), or None if all is refused."""
        rig = self.rig
        try:
            result = rig.relay.import_connections(self.parcel.file, 0, fds, [0], [0])
        except ValueError:
            assert rig.relay.resting == 0
            result = None
        rig.relay.thaw()
        for _ in range(3):
            rig.turn()
        rig.listen()
        return result

    def close(self):
        self.parcel.close()
        self.rigs.close()
        assert not self.rigs.leaked()


def play(act, way="copy"):
    """Run `act(scene)`, and look for descriptors that were left open."""
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(folder, way)
        try:
            act(scene)
        finally:
            scene.close()


numbers = st.sampled_from(NUMBERS).map(struct.Struct("=Q").pack)
some_bytes = st.binary(min_size=1, max_size=16)
ways = st.sampled_from(["splice", "copy"])


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    way=ways,
    changes=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(FIELDS), numbers),
            st.tuples(st.integers(0, HEAD_SIZE + COUNT * RECORD_SIZE - 1), some_bytes),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_bytes_that_are_changed(way, changes):
    def act(scene):
        for place, data in changes:
            os.pwrite(scene.parcel.file, data, place)
        scene.take(scene.fds)

    play(act, way)


@settings(max_examples=EXAMPLES // 5, deadline=None)
@given(way=ways, size=st.integers(0, HEAD_SIZE + (COUNT + 1) * RECORD_SIZE))
def test_a_file_that_is_too_short(way, size):
    def act(scene):
        is_complete = size >= os.fstat(scene.parcel.file).st_size
        os.ftruncate(scene.parcel.file, size)
        assert scene.take(scene.fds) == ((COUNT, 0) if is_complete else None)

    play(act, way)


@settings(max_examples=EXAMPLES // 5, deadline=None)
@given(
    way=ways,
    seed=st.integers(0, 1 << 20),
    lost=st.sets(st.integers(0, 2 * COUNT - 2), max_size=2),
)
def test_descriptors_in_another_order(way, seed, lost):
    """A connection is restored with both of its own sockets, or not at all."""

    def act(scene):
        fds = scene.fds
        for place in lost:
            os.close(fds[place])
            fds[place] = -1
        random.Random(seed).shuffle(fds)
        restored, failed = scene.take(fds)
        assert restored + failed == COUNT
        link = scene.links[3]
        with contextlib.suppress(OSError):
            link.client.send(b"to my own target")
            half_close(link.client)
        data, end = scene.rig.read_to_end(link.target)
        assert (data, end) in ((b"", "reset"), (b"to my own target", "eof"))

    play(act, way)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_descriptor_too_few_or_too_many(change):
    def act(scene):
        fds = scene.fds
        if change > 0:
            fds.append(os.dup(0))
        else:
            os.close(fds.pop())
        assert scene.take(fds) is None

    play(act)


@pytest.mark.parametrize("upstreams", [[], [-1], [1 << 30]])
def test_targets_that_are_wrong(upstreams):
    """Nothing is left open."""

    def act(scene):
        with pytest.raises(ValueError, match=r"parcel|target"):
            scene.rig.relay.import_connections(scene.parcel.file, 0, scene.fds, [0], upstreams)
        scene.rig.listen()

    play(act)


def test_longer_records_are_read_as_far_as_they_are_known():
    """As a later version may write them."""

    def act(scene):
        size = os.fstat(scene.parcel.file).st_size
        data = os.pread(scene.parcel.file, size, 0)
        records = [
            data[HEAD_SIZE + RECORD_SIZE * i :][:RECORD_SIZE] + b"later" * 8 for i in range(COUNT)
        ]
        head = data[:4] + struct.pack("=I", RECORD_SIZE + 40) + data[8:HEAD_SIZE]
        rest = data[HEAD_SIZE + COUNT * RECORD_SIZE :]
        os.pwrite(scene.parcel.file, head + b"".join(records) + rest, 0)
        assert scene.take(scene.fds) == (COUNT, 0)

    play(act)


def test_what_is_no_file():
    def act(scene):
        scene.parcel.close()
        scene.parcel.file, end = os.pipe()
        os.close(end)
        with pytest.raises(OSError, match="29"):
            scene.rig.relay.import_connections(scene.parcel.file, 0, scene.fds, [0], [0])
        scene.rig.listen()

    play(act)
