"""Non-blocking stream sockets for load processes, in which asyncio does the waiting.

Families are `tcp`, `tcp6` and `unix`; an address has the form of getsockname(), or that from JSON.
"""

import asyncio
import os
import socket

FAMILIES = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6, "unix": socket.AF_UNIX}

GONE = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)

BACKLOG = 1024

FULL_BACKLOG_S = 0.005
"""Seconds until a client tries again whose connect(2) found the backlog of a UNIX listener full."""


def open_socket(family):
    """A non-blocking socket."""
    return socket.socket(FAMILIES[family], socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


def listen(family, address):
    """A listening socket. An existing socket file is replaced; a TCP port may be in TIME_WAIT."""
    listener = open_socket(family)
    if family == "unix":
        if os.path.exists(address):
            os.unlink(address)
        listener.bind(address)
    else:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(tuple(address))
    listener.listen(BACKLOG)
    return listener


async def connect(connection, address):
    """Connect a socket. If that fails, close it and raise OSError."""
    address = address if connection.family == socket.AF_UNIX else tuple(address)
    try:
        while True:
            try:
                return await asyncio.get_running_loop().sock_connect(connection, address)
            except BlockingIOError:  # a UNIX backlog is full
                await asyncio.sleep(FULL_BACKLOG_S)
    except BaseException:
        connection.close()
        raise


async def read_exactly(connection, count):
    """Read `count` bytes. Raises EOFError if the stream ends before that, or OSError."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < count:
        piece = await loop.sock_recv(connection, count - len(data))
        if not piece:
            raise EOFError(f"{len(data)} of {count} bytes")
        data += piece
    return bytes(data)
