"""Bytes that depend on their position, so that a lost, repeated or moved byte is detected.

A stream consists of blocks. Each block is a window of the same noise; where it begins follows from
the numbers of the stream and the block. Both ends compute it, and compare with memcmp(3).
"""

import random

BLOCK = 64 * 1024
_PERIOD = 1_048_573  # a prime: windows repeat after 64 GiB, and streams begin at different ones
_NOISE = random.Random(20240501).randbytes(_PERIOD + BLOCK)
_VIEW = memoryview(_NOISE)


class Corrupt(Exception):
    """The bytes received are not those that were sent."""


class Stream:
    """The bytes of one direction of one connection."""

    def __init__(self, connection, direction):
        self._first = (2 * connection + direction) * 7919

    def _place(self, offset):
        block, within = divmod(offset, BLOCK)
        return (self._first + block * 104_729) % _PERIOD + within, BLOCK - within

    def piece(self, offset, limit):
        """At most `limit` bytes from `offset` on, without a copy."""
        place, left = self._place(offset)
        return _VIEW[place : place + min(limit, left)]

    def check(self, offset, view):
        """Raise Corrupt unless `view` has the bytes that belong at `offset`."""
        at = 0
        while at < len(view):
            place, left = self._place(offset + at)
            part = view[at : at + left]
            if not _NOISE.startswith(part, place):
                raise Corrupt(self._difference(offset + at, place, part))
            at += len(part)

    def _difference(self, offset, place, part):
        wanted = _NOISE[place : place + len(part)]
        first = next(n for n, (a, b) in enumerate(zip(part, wanted, strict=True)) if a != b)
        got = bytes(part[first : first + 16])
        elsewhere = _NOISE.find(got)
        text = f"wrong from byte {offset + first} on: {got.hex()}"
        return (
            f"{text}, which is noise of {elsewhere - place - first:+}" if elsewhere >= 0 else text
        )
