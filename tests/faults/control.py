"""What the walk tells the interposer (interpose.c), and what the interposer has counted."""

import ctypes
import mmap
import os
import socket
import sys
from typing import NamedTuple

SCOPES = ("relay", "python")
"""The callers that are told apart: the extension, and everything else."""

NOTHING, FAIL, SHORTEN, ZERO = range(4)

FOR_EVER = 1 << 40


class Strike(NamedTuple):
    """Calls number `start` (from 1) to `start + count - 1` of a kind of call are to fail."""

    scope: str
    point: str | None
    action: int
    error: int
    start: int
    count: int


NO_STRIKE = Strike("relay", None, NOTHING, 0, 1, 0)


class _Struct(ctypes.Structure):
    """The fields of `struct control` before `calls`."""

    _fields_ = [
        ("begun", ctypes.c_int32),
        ("point", ctypes.c_int32),
        ("scope", ctypes.c_int32),
        ("action", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("hit_fd", ctypes.c_int32),
        ("pid", ctypes.c_int32),
        ("nap_ms", ctypes.c_int32),
        ("start", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("hits", ctypes.c_int64),
        ("clock_ms", ctypes.c_int64),
        ("live", ctypes.c_int64),
    ]


class Control:
    """The interposer's file. One process may write to it while another runs under it."""

    def __init__(self, library, path):
        self._library = ctypes.CDLL(library)
        self._library.faults_name.restype = ctypes.c_char_p
        self._library.faults_size.restype = ctypes.c_size_t
        size = self._library.faults_size()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            self._memory = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self.points = [
            self._library.faults_name(n).decode() for n in range(self._library.faults_points())
        ]
        """The kinds of calls, in the order of their numbers."""
        self.struct = _Struct.from_buffer(self._memory)
        self._calls = (ctypes.c_int64 * (len(SCOPES) * len(self.points))).from_buffer(
            self._memory, ctypes.sizeof(_Struct)
        )
        self._names_at = ctypes.sizeof(_Struct) + ctypes.sizeof(self._calls)
        self.pause = self._library.faults_pause

    def reset(self, strike=NO_STRIKE):
        """Count from 0 again, and make the calls of `strike` fail, once the program begins."""
        self.struct.clock_ms = 0
        self.arm(strike, begun=False)

    def arm(self, strike, *, begun=True):
        """Likewise, at once. The time goes on."""
        self.lift()
        self.struct.begun = begun
        self.struct.hits = 0
        self.struct.hit_fd = -1
        ctypes.memset(self._calls, 0, ctypes.sizeof(self._calls))
        if strike.point is not None:
            self.struct.scope = SCOPES.index(strike.scope)
            self.struct.action = strike.action
            self.struct.error = strike.error
            self.struct.start = strike.start
            self.struct.count = strike.count
            self.struct.point = self.points.index(strike.point)

    def lift(self):
        """Let no further call fail."""
        self.struct.point = -1

    def calls(self):
        """{(scope, point): the number of calls so far}, for kinds that have been called."""
        return {
            (scope, point): self._calls[i * len(self.points) + j]
            for i, scope in enumerate(SCOPES)
            for j, point in enumerate(self.points)
            if self._calls[i * len(self.points) + j]
        }

    def hit_ports(self):
        """(own, peer's) TCP port of the socket of the last call that failed; 0 if it has none."""
        return tuple(self._port(self._names_at + i * 128) for i in range(2))

    def hit_family(self):
        """The family of the socket of the last call that failed; 0 if it was not a socket."""
        return int.from_bytes(self._memory[self._names_at : self._names_at + 2], sys.byteorder)

    def _port(self, at):
        family = int.from_bytes(self._memory[at : at + 2], sys.byteorder)
        if family not in (socket.AF_INET, socket.AF_INET6):
            return 0
        return int.from_bytes(self._memory[at + 2 : at + 4], "big")
