"""Datagrams of the soak: numbered, so that a lost, doubled, cut or moved one is told apart.

A datagram has the number of its client, its own number, the count of bytes that follow, and these
bytes, which depend on both numbers. The target sends it back behind ANSWER.
"""

import asyncio
import contextlib
import os
import socket
import struct

from kit.pattern import BLOCK, Corrupt, Stream

HEAD = struct.Struct("!QIH")
ANSWER = b"answer"
SIZE_MAX = 60_000
ONE_MAX = 1 << 17

FAMILIES = {"udp": socket.AF_INET, "unixgram": socket.AF_UNIX}

CLIENTS_KNOWN = 10_000
"""Of these, a target knows the last number."""


def bind(family, address):
    """A non-blocking datagram socket at `address`, which replaces a socket file."""
    sock = socket.socket(FAMILIES[family], socket.SOCK_DGRAM)
    sock.setblocking(False)
    if family == "unixgram":
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)
    sock.bind(address if family == "unixgram" else tuple(address))
    return sock


def make(client, number, size):
    """Datagram `number` of a client, with `size` bytes behind its head."""
    return HEAD.pack(client, number, size) + Stream(client, 0).piece(number * BLOCK, size)


def read(data):
    """(client, number) of a datagram. Raises Corrupt unless it is whole."""
    if len(data) < HEAD.size:
        raise Corrupt(f"a datagram of {len(data)} bytes")
    client, number, size = HEAD.unpack_from(data)
    if len(data) != HEAD.size + size:
        raise Corrupt(f"{len(data)} bytes of {HEAD.size + size} in datagram {number} of {client}")
    Stream(client, 0).check(number * BLOCK, memoryview(data)[HEAD.size :])
    return client, number


class Echo:
    """A target that sends every datagram back, if it is whole and the next of its client."""

    def __init__(self, sock, tally):
        self._sock = sock
        self._tally = tally
        self._last = {}
        asyncio.get_running_loop().add_reader(sock, self._serve)

    def close(self):
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()

    def _serve(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                data, sender = self._sock.recvfrom(ONE_MAX)
                self._check(data)
                with contextlib.suppress(OSError):  # the flow has ended, or its queue is full
                    self._sock.sendto(ANSWER + data, sender)

    def _check(self, data):
        try:
            client, number = read(data)
        except Corrupt as error:
            self._tally.fault(f"datagrams: {error}")
            return
        last = self._last.pop(client, -1)
        if number <= last:
            self._tally.fault(f"datagrams: {number} of {client} has come after {last}")
        self._last[client] = max(number, last)
        if len(self._last) > CLIENTS_KNOWN:
            del self._last[next(iter(self._last))]
        self._tally.add("datagrams at targets")
