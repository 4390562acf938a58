"""Non-blocking connections on either side of the relay, which the test moves step by step."""

import socket

from kit.sockets import RESETS, send_at_once, set_buffers

TINY_BUFFER = 4096
"""A receive buffer that is full after little data."""


def open_client(listener, *, receive_buffer=None, send_buffer=None):
    """A socket connected to `listener`, which has not accepted it yet."""
    client = socket.socket(listener.family, socket.SOCK_STREAM)
    set_buffers(client, receive_buffer, send_buffer)
    client.connect(listener.getsockname())
    prepare(client)
    return client


def accept(listener, *, send_buffer=None):
    """Accept the next connection of a listener; BlockingIOError if there is none."""
    listener.setblocking(False)
    connection, _ = listener.accept()
    set_buffers(connection, None, send_buffer)
    prepare(connection)
    return connection


def prepare(connection):
    """Make it non-blocking, and let small segments leave as they are written."""
    connection.setblocking(False)
    send_at_once(connection)


def send_once(connection, data, flags=0):
    """The number of bytes that one send took, 0 if the socket is full."""
    try:
        return connection.send(data, flags)
    except BlockingIOError:
        return 0


class Outgoing:
    """Sends as many bytes as fit at each step(), and calls `then(connection)` after the last."""

    def __init__(self, connection, data, then=None):
        self.connection = connection
        self.rest = memoryview(data)
        self.then = then
        self.error = 0

    def step(self):
        while self.rest and not self.error:
            try:
                self.rest = self.rest[self.connection.send(self.rest, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                return
            except OSError as error:
                self.error = error.errno
        if self.then is not None and not self.error:
            end, self.then = self.then, None
            end(self.connection)

    @property
    def done(self):
        return self.error != 0 or (not self.rest and self.then is None)


class Incoming:
    """Collects what arrives, up to `limit` bytes, and how the stream ends: "eof" or "reset"."""

    def __init__(self, connection, limit=1 << 40, unit=1 << 18):
        self.connection = connection
        self.data = bytearray()
        self.limit = limit
        self.unit = unit
        self.end = None

    def step(self):
        while self.end is None and len(self.data) < self.limit:
            try:
                chunk = self.connection.recv(min(self.unit, self.limit - len(self.data)))
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in RESETS:
                    raise
                self.end = "reset"
                return
            if not chunk:
                self.end = "eof"
            self.data += chunk

    @property
    def done(self):
        return self.end is not None or len(self.data) >= self.limit


def half_close(connection):
    connection.shutdown(socket.SHUT_WR)


def close(connection):
    connection.close()
