"""A slate as a killed process has left it, written by hand: see relay/slate_types.pxd."""

import os
import struct

from kit.slate_layout import PAGE, SLOT_SIZE
from proxyd._relay import Relay, slate_create, stream_positions

UNIT = 8192
ALIGN = 65536
SLOT_RECORD = 128
HEAD = "=IIIIQQq"
HALF_SIZE = 40
PARCEL_HEAD = 40
RECORD_SIZE = 408
COPY, FLUSH = 0, 1

INTENT_POSITION, INTENT_TAKEN, INTENT_GIVEN = 8, 72, 136
"""Offsets in an intent; the latter two are those of msg_len in each mmsghdr."""


class Slate:
    """The file, with room for `slots` connections and `workers` threads."""

    def __init__(self, slots=4, workers=2, text=b""):
        self.slots, self.workers = slots, workers
        self.fd = slate_create(text, slots, workers, UNIT)
        self._text_size = -(-len(text) // PAGE) * PAGE

    def close(self):
        os.close(self.fd)

    # ── where things are ─────────────────────────────────────────────────────────────────────────

    @property
    def _intents_at(self):
        return PAGE + self._text_size

    @property
    def _slots_at(self):
        return self._intents_at + self.workers * PAGE

    @property
    def _buffers_at(self):
        return -(-(self._slots_at + self.slots * SLOT_SIZE) // ALIGN) * ALIGN

    def _spill_at(self, slot, side):
        return self._buffers_at + (self.workers + 2 * slot + side) * UNIT

    # ── what is there ────────────────────────────────────────────────────────────────────────────

    def enter(self, slot, entry, record):
        """Fill a slot; nothing is under way."""
        at = self._slots_at + slot * SLOT_SIZE
        os.pwrite(self.fd, bytes(SLOT_SIZE), at)
        os.pwrite(self.fd, record, at + SLOT_RECORD)
        os.pwrite(self.fd, struct.pack("=Q", entry), at)

    def change_record(self, slot, offset, data):
        """Change what a slot has of the connection, as of when it was entered."""
        os.pwrite(self.fd, data, self._slots_at + slot * SLOT_SIZE + SLOT_RECORD + offset)

    def entry(self, slot):
        """The number in a slot."""
        return struct.unpack("=Q", os.pread(self.fd, 8, self._slots_at + slot * SLOT_SIZE))[0]

    def half(self, slot, side, **values):
        """Change what a slot says of a half."""
        at = self._slots_at + slot * SLOT_SIZE + 8 + side * HALF_SIZE
        names = ("taken_offset", "given_offset", "taken", "spill_end", "spill_size", "pipe")
        known = dict(zip(names, struct.unpack("=qqQQII", os.pread(self.fd, 40, at)), strict=True))
        os.pwrite(self.fd, struct.pack("=qqQQII", *(known | values).values()), at)

    def spill(self, slot, side, data, end, size=None):
        """Bytes at the end of a spill, up to this position."""
        os.pwrite(self.fd, data, self._spill_at(slot, side) + UNIT - len(data))
        self.half(slot, side, spill_end=end, spill_size=len(data) if size is None else size)

    def intent(self, worker, half, what, position, taken=0, given=0, data=b""):
        """What a worker is in the middle of, and what is in its buffer."""
        at = self._intents_at + worker * PAGE
        os.pwrite(self.fd, struct.pack("=IIQ", half, what, position), at)
        os.pwrite(self.fd, struct.pack("=I", taken), at + INTENT_TAKEN)
        os.pwrite(self.fd, struct.pack("=I", given), at + INTENT_GIVEN)
        os.pwrite(self.fd, data, self._buffers_at + worker * UNIT)

    def is_settled(self):
        """Whether no worker is in the middle of anything."""
        places = [self._intents_at + worker * PAGE for worker in range(self.workers)]
        return not any(any(os.pread(self.fd, 4, at)) for at in places)

    def used(self):
        """Offset and size of all that has a meaning."""
        return [(0, 40), *[(self._intents_at + n * PAGE, 160) for n in range(self.workers)]] + [
            (self._slots_at + n * SLOT_SIZE, SLOT_RECORD + RECORD_SIZE) for n in range(self.slots)
        ]


class Left:
    """A connection between two sockets, as a slate has it. Positions begin at 0.

    `client` and `target` are the program's sockets, `ends` those of the peers.
    """

    def __init__(self, slate, slot, entry, pairs):
        (self.client, far_client), (self.target, far_target) = pairs
        self.ends = far_client, far_target
        self.slate, self.slot, self.entry = slate, slot, entry
        self._record = record_of(self.client, self.target)
        self.enter()

    def enter(self):
        """Have the slot say that nothing is under way."""
        slate, slot = self.slate, self.slot
        slate.enter(slot, self.entry, self._record)
        for side, (src, dst) in enumerate(((self.client, self.target), (self.target, self.client))):
            slate.half(
                slot,
                side,
                taken_offset=0 if is_unix(src) else -stream_positions(src.fileno())[0],
                given_offset=0 if is_unix(dst) else -stream_positions(dst.fileno())[1],
            )

    @property
    def sockets(self):
        return self.client, self.target

    def message(self, slot=None, entry=None):
        """What recover() wants, with copies of the descriptors."""
        fds = os.dup(self.client.fileno()), os.dup(self.target.fileno())
        return slot or self.slot, entry or self.entry, *fds

    def half_number(self, side):
        """How an intent names it."""
        return 1 + 2 * self.slot + side

    def close(self):
        for one in (*self.sockets, *self.ends):
            one.close()


def is_unix(sock):
    return sock.family == 1


def record_of(client, target):
    """The record of a connection between these sockets, which stay the caller's."""
    relay = Relay()
    file = os.memfd_create("record")
    try:
        relay.adopt(os.dup(client.fileno()), client.family, os.dup(target.fileno()))
        relay.freeze()
        relay.export(file)
        relay.release()
        return os.pread(file, RECORD_SIZE, PARCEL_HEAD)
    finally:
        os.close(file)
        relay.close_all()
