"""The present state of a socket, given as a socket object or an fd."""

import fcntl
import os
import select
import socket
import struct
import termios

from kit.waiting import wait_until


def state_of(connection):
    """The events that poll(2) reports now, the end of the stream and errors included."""
    poller = select.poll()
    poller.register(connection, select.POLLIN | select.POLLOUT | select.POLLRDHUP)
    return dict(poller.poll(0)).get(
        connection if isinstance(connection, int) else connection.fileno(), 0
    )


def is_quiet(connection):
    """True if nothing has arrived: no byte, no end, no error."""
    return not state_of(connection) & ~select.POLLOUT


def is_writable(fd):
    """Whether epoll would report that it is writable."""
    return bool(state_of(fd) & select.POLLOUT)


def was_reset(connection):
    """TCP only: whether an RST has arrived, even if there are bytes left to read."""
    return bool(state_of(connection) & select.POLLERR)


def hung_up(connection):
    """True once the peer has gone for good: by a reset, or on UNIX by a full close."""
    return bool(state_of(connection) & (select.POLLHUP | select.POLLERR))


def write_error(connection):
    """The errno with which a write fails because the peer has gone, or 0."""
    try:
        connection.send(b"?", socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
    except (BlockingIOError, TimeoutError):
        return 0
    except OSError as error:
        return error.errno
    return 0


def unread(connection):
    """The number of bytes in the receive queue (SIOCINQ)."""
    return struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, b"\0" * 4))[0]


def wait_unread(connection, count):
    """Wait until the receive queue of `connection` has `count` bytes."""
    wait_until(lambda: unread(connection) >= count, f"{count} bytes in the receive queue")


def unacknowledged(fd):
    """The number of bytes in the send queue (SIOCOUTQ)."""
    return struct.unpack("i", fcntl.ioctl(fd, termios.TIOCOUTQ, b"\0" * 4))[0]


def option(fd, level, name):
    """An integer option of a socket of which the caller has only the fd."""
    borrowed = socket.socket(fileno=os.dup(fd))
    try:
        return borrowed.getsockopt(level, name)
    finally:
        borrowed.close()


def set_option(fd, level, name, value):
    """Set an integer option of a socket of which the caller has only the fd."""
    borrowed = socket.socket(fileno=os.dup(fd))
    try:
        borrowed.setsockopt(level, name, value)
    finally:
        borrowed.close()
