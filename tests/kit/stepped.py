"""The sockets on either side of the relay, all non-blocking: the test steps everything itself."""

import errno
import fcntl
import os
import select
import socket
import struct
import termios

FAMILIES = {"tcp4": socket.AF_INET, "tcp6": socket.AF_INET6, "unix": socket.AF_UNIX}

RESETS = (errno.ECONNRESET, errno.EPIPE)
"""How a reset looks to a reader or a writer, whichever call meets it first."""

RELUCTANT = 4096
"""A receive buffer so small that its owner soon takes nothing more."""


def open_listener(family, directory, *, receive_buffer=None, backlog=64):
    """A listening socket; what it accepts inherits its receive buffer."""
    listener = socket.socket(FAMILIES[family], socket.SOCK_STREAM)
    if receive_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    if family == "unix":
        listener.bind(os.path.join(directory, f"{os.urandom(4).hex()}.sock"))
    else:
        listener.bind(("127.0.0.1" if family == "tcp4" else "::1", 0))
    listener.listen(backlog)
    listener.setblocking(False)
    return listener


def open_client(listener, *, receive_buffer=None, send_buffer=None):
    """A socket connected to `listener`, not yet accepted there."""
    client = socket.socket(listener.family, socket.SOCK_STREAM)
    set_buffers(client, receive_buffer, send_buffer)
    client.connect(listener.getsockname())
    prepare(client)
    return client


def accept(listener, *, send_buffer=None):
    """The next connection of a listener, or BlockingIOError."""
    connection, _ = listener.accept()
    set_buffers(connection, None, send_buffer)
    prepare(connection)
    return connection


def set_buffers(connection, receive_buffer, send_buffer):
    """Set the sizes that are not None."""
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    if send_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)


def prepare(connection):
    """Non-blocking, and small segments leave as they are written."""
    connection.setblocking(False)
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def is_unix(connection):
    return connection.family == socket.AF_UNIX


def reset(connection):
    """End as a program that crashes would: RST on TCP; a UNIX socket only knows the full close."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def send_once(connection, data, flags=0):
    """Bytes that one send took, 0 where the socket is full."""
    try:
        return connection.send(data, flags)
    except BlockingIOError:
        return 0


def unread(connection):
    """Bytes in the receive queue (SIOCINQ)."""
    return struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, b"\0" * 4))[0]


def unacknowledged(fd):
    """Bytes in the send queue (SIOCOUTQ)."""
    return struct.unpack("i", fcntl.ioctl(fd, termios.TIOCOUTQ, b"\0" * 4))[0]


def state_of(connection):
    """What poll(2) says now, the end and errors included."""
    poller = select.poll()
    poller.register(connection, select.POLLIN | select.POLLOUT | select.POLLRDHUP)
    return dict(poller.poll(0)).get(
        connection if isinstance(connection, int) else connection.fileno(), 0
    )


def is_writable(fd):
    """Whether epoll would announce free space."""
    return bool(state_of(fd) & select.POLLOUT)


def is_quiet(connection):
    """Nothing has come: no byte, no end, no error."""
    return not state_of(connection) & ~select.POLLOUT


def was_reset(connection):
    """TCP only: an RST has arrived, whether or not there are bytes left to read."""
    return bool(state_of(connection) & select.POLLERR)


def write_error(connection):
    """The errno with which a write fails, or 0."""
    try:
        connection.send(b"?", socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return 0
    except OSError as error:
        return error.errno
    return 0


def option(fd, level, name):
    """An integer option of a socket that belongs to somebody else."""
    borrowed = socket.socket(fileno=os.dup(fd))
    try:
        return borrowed.getsockopt(level, name)
    finally:
        borrowed.close()


def set_option(fd, level, name, value):
    """Set an integer option of a socket that belongs to somebody else."""
    borrowed = socket.socket(fileno=os.dup(fd))
    try:
        borrowed.setsockopt(level, name, value)
    finally:
        borrowed.close()


class Outgoing:
    """Sends bytes as far as they go at each step(), then ends the stream if it is to."""

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
    """Collects what comes, and how it ends: "eof" or "reset"."""

    def __init__(self, connection, most=1 << 40, unit=1 << 18):
        self.connection = connection
        self.data = bytearray()
        self.most = most
        self.unit = unit
        self.end = None

    def step(self):
        while self.end is None and len(self.data) < self.most:
            try:
                chunk = self.connection.recv(min(self.unit, self.most - len(self.data)))
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
        return self.end is not None or len(self.data) >= self.most


def half_close(connection):
    connection.shutdown(socket.SHUT_WR)


def close(connection):
    connection.close()
