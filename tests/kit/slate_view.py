"""What a slate says, read as the next process would: relay/slate_types.pxd has the layout."""

import mmap
import struct
from typing import NamedTuple

UNIT = 4096
ALIGN = 65536
SLOT_SIZE = 1024
SLOT_RECORD = 128
HEAD = struct.Struct("=4IQQq")
KEPT_HALF = struct.Struct("=qqQQII")
INTENT = struct.Struct("=IIQ")
COOKIES = struct.Struct("=qQQ")
MESSAGE = struct.calcsize("PIPNPNi0P")
"""Bytes of a struct msghdr; msg_len is behind it."""

UP, DOWN = 0, 1
COPY, FLUSH, SPLICE = 0, 1, 2


class Half(NamedTuple):
    """A KeptHalf."""

    taken_offset: int
    given_offset: int
    taken: int
    spill_end: int
    spill_size: int
    pipe: int


class Slot(NamedTuple):
    """A slot that has a connection."""

    index: int
    entry: int
    id: int
    cookies: tuple[int, int]
    halves: tuple[Half, Half]


class Intent(NamedTuple):
    """What a worker is in the middle of."""

    slot: int
    direction: int
    what: int
    position: int
    taken: int
    given: int


def round_up(size, unit=UNIT):
    return -(-size // unit) * unit


class Slate:
    """The slate in a file."""

    def __init__(self, file):
        self.map = mmap.mmap(file, 0, mmap.MAP_SHARED)
        magic, self.record_size, self.slot_count, self.workers, self.unit, size, _ = (
            HEAD.unpack_from(self.map)
        )
        assert magic == 0x31746C73
        self.text = self.map[UNIT : UNIT + size]
        self.intents_at = UNIT + round_up(size)
        self.slots_at = self.intents_at + self.workers * UNIT
        self.buffers_at = round_up(self.slots_at + self.slot_count * SLOT_SIZE, ALIGN)
        self.spills_at = self.buffers_at + self.workers * self.unit
        self.size = self.spills_at + 2 * self.slot_count * self.unit

    @property
    def last_id(self):
        return HEAD.unpack_from(self.map)[-1]

    def close(self):
        self.map.close()

    def slots(self):
        """Those that have a connection."""
        every = [self.slot(index) for index in range(self.slot_count)]
        return [slot for slot in every if slot.entry]

    def slot(self, index):
        place = self.slots_at + index * SLOT_SIZE
        (entry,) = struct.unpack_from("=Q", self.map, place)
        halves = [
            Half(*KEPT_HALF.unpack_from(self.map, place + 8 + i * KEPT_HALF.size)) for i in (0, 1)
        ]
        number, *cookies = COOKIES.unpack_from(self.map, place + SLOT_RECORD)
        return Slot(index, entry, number, tuple(cookies), tuple(halves))

    def spilled(self, index, direction):
        """The bytes that are in a spill."""
        size = self.slot(index).halves[direction].spill_size
        end = self.spills_at + (2 * index + direction + 1) * self.unit
        return self.map[end - size : end]

    def intents(self):
        """Those that are open."""
        found = []
        for worker in range(self.workers):
            place = self.intents_at + worker * UNIT
            half, what, position = INTENT.unpack_from(self.map, place)
            taken_at = place + INTENT.size + MESSAGE
            given_at = taken_at + struct.calcsize("N") + MESSAGE
            (taken,) = struct.unpack_from("I", self.map, taken_at)
            (given,) = struct.unpack_from("I", self.map, given_at)
            if half:
                found.append(Intent(*divmod(half - 1, 2), what, position, taken, given))
        return found
