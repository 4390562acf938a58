"""Listeners, connections and their ends, for the four kinds of stream socket under test."""

import errno
import os
import select
import socket
import struct
import time

import pytest

from kit.waiting import patience

FAMILIES = {
    "tcp4": socket.AF_INET,
    "tcp6": socket.AF_INET6,
    "unix": socket.AF_UNIX,
    "abstract": socket.AF_UNIX,
}
TCP = ("tcp4", "tcp6")
UNIX = ("unix", "abstract")

RESETS = (errno.ECONNRESET, errno.EPIPE)
"""How a reset looks to a reader or a writer, whichever call meets it first."""

every_pair = pytest.mark.parametrize(
    ("listen", "target"), [(a, b) for a in FAMILIES for b in FAMILIES]
)
"""Runs a test for all sixteen pairs of listener family and target family."""

main_pairs = pytest.mark.parametrize(
    ("listen", "target"),
    [("tcp4", "tcp4"), ("tcp4", "unix"), ("unix", "tcp4"), ("unix", "unix"), ("tcp6", "abstract")],
)
"""Runs a test for pairs that together use every family and every mix of TCP and UNIX."""


def open_listener(
    family, directory, *, backlog=512, receive_buffer=None, host=None, port=0, blocking=True
):
    """A listening socket of `family`; a path or a free port on loopback is chosen for it.

    What it accepts inherits its receive buffer. With `backlog=None` it is only bound.
    """
    listener = socket.socket(FAMILIES[family], socket.SOCK_STREAM)
    set_buffers(listener, receive_buffer, None)
    if family in TCP:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host or ("127.0.0.1" if family == "tcp4" else "::1"), port))
    elif family == "unix":
        listener.bind(os.path.join(directory, f"socket-{os.urandom(4).hex()}"))
    else:
        listener.bind("")  # the kernel chooses a free abstract name, see unix(7)
    if backlog is not None:
        listener.listen(backlog)
    listener.setblocking(blocking)
    return listener


def target_text(address, family):
    """How `address` (from getsockname) is written as the program's TARGET argument."""
    if family == socket.AF_UNIX:
        if isinstance(address, bytes):
            return "@" + address[1:].decode()
        return address
    return f"{address[0]}:{address[1]}"


def open_connection(address, family, *, receive_buffer=None, send_buffer=None, timeout=None):
    """A client's socket, connected, with its buffers set before the connection is made."""
    client = socket.socket(family, socket.SOCK_STREAM)
    set_buffers(client, receive_buffer, send_buffer)
    client.settimeout(timeout or patience())
    try:
        client.connect(address)
    except BaseException:
        client.close()
        raise
    send_at_once(client)
    return client


def set_buffers(connection, receive_buffer, send_buffer):
    """Set the sizes that are not None."""
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    if send_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)


def send_at_once(connection):
    """Let the kernel send small segments as they are written, as an interactive program would."""
    if not is_unix(connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def is_unix(connection):
    return connection.family == socket.AF_UNIX


def reset(connection):
    """Close so that the peer sees a reset: RST on TCP; a UNIX socket only knows the full close."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_to_end(connection, timeout=None):
    """(all bytes that still come, how they end): the end is "eof" or "reset"."""
    timeout = timeout or patience()
    connection.settimeout(timeout)
    received = bytearray()
    try:
        while True:
            chunk = connection.recv(1 << 18)
            if not chunk:
                return bytes(received), "eof"
            received += chunk
    except TimeoutError:
        raise AssertionError(f"no end after {len(received)} bytes and {timeout:g} s") from None
    except OSError as error:
        if error.errno not in RESETS:
            raise
        return bytes(received), "reset"


def read_exactly(connection, count, timeout=None):
    """`count` bytes, or AssertionError saying how many came before the end or the deadline."""
    timeout = timeout or patience()
    connection.settimeout(timeout)
    received = bytearray()
    while len(received) < count:
        try:
            chunk = connection.recv(min(count - len(received), 1 << 18))
        except TimeoutError:
            raise AssertionError(f"{len(received)} of {count} bytes after {timeout:g} s") from None
        if not chunk:
            raise AssertionError(f"end of stream after {len(received)} of {count} bytes")
        received += chunk
    return bytes(received)


def send_until_stuck(connection, segment, *, most=1 << 30, still=0.3, timeout=6.0):
    """Send `segment` again and again until none has been accepted for `still` seconds.

    Returns the number of bytes accepted. Ends too after `most` bytes or `timeout` seconds.
    """
    connection.setblocking(False)
    sent = 0
    deadline = time.monotonic() + timeout
    view = memoryview(segment)
    offset = 0
    while sent < most and time.monotonic() < deadline:
        try:
            count = connection.send(view[offset:])
            sent += count
            offset = (offset + count) % len(segment)
        except BlockingIOError:
            if not select.select([], [connection], [], still)[1]:
                break
    connection.settimeout(patience())
    return sent


def stuck_bytes(segment, count):
    """The first `count` bytes of `segment` sent again and again, as `send_until_stuck` does."""
    return (segment * (count // len(segment) + 1))[:count]


def fill_backlog(address, family, most=10):
    """Connect to a listener that accepts nobody until it has no room; returns the connections."""
    waiting = []
    for _ in range(most):
        visitor = socket.socket(family, socket.SOCK_STREAM)
        visitor.settimeout(0.3)
        try:
            visitor.connect(address)
        except (BlockingIOError, TimeoutError):
            visitor.close()
            return waiting
        waiting.append(visitor)
    raise AssertionError(f"a backlog took {most} connections")
