"""One end of a connection: it plays its script, and judges what it saw of the other end."""

import asyncio
import socket
import struct

from kit.asynchronous import GONE
from kit.pattern import Stream
from soak.plan import END, FATES, RESET

BUFFER = 256 * 1024
UP, DOWN = 0, 1


class Fault(Exception):
    """A promise was broken."""


class Side:
    """Plays the script `mine` on a connected non-blocking socket, after the plan, and closes it."""

    def __init__(self, sock, number, mine, peer, direction):
        self.sock = sock
        self.mine = mine
        self.peer = peer
        self._out = Stream(number, direction)
        self._in = Stream(number, 1 - direction)
        self.sent = 0
        self.received = 0
        self.end = "open"
        """How the peer's data ended: open, eof or reset."""
        self.write_failed = False
        self._peer_ended = asyncio.Event()

    async def play(self, seconds):
        """Play the script. Raises Corrupt, or Fault if it does not end within `seconds`."""
        reader = asyncio.ensure_future(self._read())
        writer = asyncio.ensure_future(self._write())
        try:
            async with asyncio.timeout(seconds):
                await self._both(reader, writer)
        except TimeoutError:
            raise Fault(f"hangs: {self}") from None
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            close(self.sock, self.mine.fate == RESET)

    async def _both(self, reader, writer):
        """Wait until this side has played its script, or a task fails."""
        waiting = {reader, writer}
        while writer in waiting or (waiting and self.mine.fate == END):
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    def judge(self, *, strict, resets, cuts=True):
        """Raise Fault if the peer's end arrived as another kind of end.

        Not `strict`: the target may be killed, or the proxy may cut the connection. `resets`: both
        legs distinguish a reset from a close. Not `cuts`: what is cut is reset, never just ended.
        """
        if not cuts and self.is_cut:
            raise Fault(f"ended before its end: {self}")
        if self.received > self.peer.length:
            raise Fault(f"too many bytes: {self}")
        if self.mine.fate != END or not strict:
            return
        if self.peer.fate == END:
            complete = self.received == self.peer.length and self.sent == self.mine.length
            if not complete or self.end != "eof" or self.write_failed:
                raise Fault(f"incomplete: {self}")
        # A failed write has consumed the error of the reset; a later read sees only the end.
        if self.peer.fate == RESET and resets and self.end == "eof" and not self.write_failed:
            raise Fault(f"a reset came as a clean end: {self}")

    @property
    def is_cut(self):
        """Whether the peer's data has ended as if it were complete, and is not.

        A failed write has consumed the error of a reset.
        """
        missing = self.peer.fate == END and self.received < self.peer.length
        return missing and self.end == "eof" and not self.write_failed

    def __str__(self):
        return (
            f"{self.sent} of {self.mine.length} bytes sent"
            f"{', then a write failed' if self.write_failed else ''}; "
            f"{self.received} of {self.peer.length} received, then {self.end}; "
            f"the peer was to {FATES[self.peer.fate]}"
        )

    async def _write(self):
        if self.mine.late:
            await self._peer_ended.wait()
        try:
            while self.sent < self.mine.length:
                await self._write_some()
            if self.mine.fate == END:
                self.sock.shutdown(socket.SHUT_WR)
        except GONE:
            self.write_failed = True
        except OSError:  # ENOTCONN from shutdown(2): the connection has been reset
            self.write_failed = True

    async def _write_some(self):
        most = min(self.mine.chunk, self.mine.length - self.sent)
        if self.sent < self.mine.urgent_at:
            most = min(most, self.mine.urgent_at - self.sent)
        elif self.sent == self.mine.urgent_at:
            if self._urge():
                return
            most = 1
        piece = self._out.piece(self.sent, most)
        await asyncio.get_running_loop().sock_sendall(self.sock, piece)
        self.sent += len(piece)

    def _urge(self):
        """Send one urgent byte; return False if there is no room for it now."""
        try:
            self.sent += self.sock.send(self._out.piece(self.sent, 1), socket.MSG_OOB)
        except BlockingIOError:
            return False
        return True

    async def _read(self):
        loop = asyncio.get_running_loop()
        view = memoryview(bytearray(BUFFER))
        stall_at = self.mine.stall_at
        try:
            while True:
                if self.received >= stall_at:
                    stall_at = float("inf")
                    await asyncio.sleep(self.mine.stall_ms / 1000)
                size = await loop.sock_recv_into(self.sock, view)
                if size == 0:
                    self.end = "eof"
                    break
                self._in.check(self.received, view[:size])
                self.received += size
        except GONE:
            self.end = "reset"
        self._peer_ended.set()


def close(sock, with_reset):
    """Close the socket; on TCP with a reset if asked."""
    if with_reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
