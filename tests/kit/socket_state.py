"""What a socket, or an fd that is one, is like now."""

import fcntl
import os
import select
import socket
import struct
import termios

from kit.waiting import wait_until


def state_of(connection):
    """What poll(2) says now, the end and errors included."""
    poller = select.poll()
    poller.register(connection, select.POLLIN | select.POLLOUT | select.POLLRDHUP)
    return dict(poller.poll(0)).get(
        connection if isinstance(connection, int) else connection.fileno(), 0
    )


def is_quiet(connection):
    """Nothing has come: no byte, no end, no error."""
    return not state_of(connection) & ~select.POLLOUT


def is_writable(fd):
    """Whether epoll would announce free space."""
    return bool(state_of(fd) & select.POLLOUT)


def was_reset(connection):
    """TCP only: an RST has arrived, whether or not there are bytes left to read."""
    return bool(state_of(connection) & select.POLLERR)


def hung_up(connection):
    """True once the peer's end is wholly gone (a reset, or on UNIX a full close)."""
    return bool(state_of(connection) & (select.POLLHUP | select.POLLERR))


def write_error(connection):
    """The errno with which a write fails, because nobody is there any more, or 0."""
    try:
        connection.send(b"?", socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
    except (BlockingIOError, TimeoutError):
        return 0
    except OSError as error:
        return error.errno
    return 0


def unread(connection):
    """Bytes in the receive queue (SIOCINQ)."""
    return struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, b"\0" * 4))[0]


def wait_unread(connection, count):
    """Wait until `count` bytes lie in the receive queue of `connection`."""
    wait_until(lambda: unread(connection) >= count, f"{count} bytes in the receive queue")


def unacknowledged(fd):
    """Bytes in the send queue (SIOCOUTQ)."""
    return struct.unpack("i", fcntl.ioctl(fd, termios.TIOCOUTQ, b"\0" * 4))[0]


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
