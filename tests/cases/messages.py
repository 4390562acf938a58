"""Many small messages in few system calls: sendmmsg(2), which Python does not have.

To the kernel, each message is a send of its own.
"""

import ctypes
import errno
import os
import select

from kit.waiting import patience

BATCH = 1000

_libc = ctypes.CDLL(None, use_errno=True)


class _Piece(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Head(ctypes.Structure):
    """struct msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("pieces", ctypes.POINTER(_Piece)),
        ("pieces_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = (("head", _Head), ("sent", ctypes.c_uint))


def send_byte_by_byte(connection, data):
    """Send each byte as a message of its own; waits while the socket is full."""
    buffer = ctypes.create_string_buffer(BATCH)
    start = ctypes.addressof(buffer)
    pieces = (_Piece * BATCH)(*[_Piece(start + i, 1) for i in range(BATCH)])
    messages = (_Message * BATCH)(
        *[_Message(_Head(pieces=ctypes.pointer(piece), pieces_length=1)) for piece in pieces]
    )
    connection.setblocking(False)
    done = 0
    while done < len(data):
        batch = data[done : done + BATCH]
        buffer[: len(batch)] = batch
        count = _libc.sendmmsg(connection.fileno(), messages, len(batch), 0)
        if count > 0:
            done += count
        elif not select.select([], [connection], [], patience())[1]:
            raise AssertionError(f"only {done} of {len(data)} messages were taken")
        elif count < 0 and ctypes.get_errno() != errno.EAGAIN:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    connection.settimeout(patience())
