"""Listening sockets and connections of the four kinds under test, and how connections end."""

import contextlib
import errno
import os
import random
import select
import socket
import struct
import time
from pathlib import Path

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
"""The errors by which a reset shows, depending on whether a read or a write finds it first."""

every_pair = pytest.mark.parametrize(
    ("listen", "target"), [(a, b) for a in FAMILIES for b in FAMILIES]
)
"""Runs a test for all sixteen pairs of listener family and target family."""

main_pairs = pytest.mark.parametrize(
    ("listen", "target"),
    [("tcp4", "tcp4"), ("tcp4", "unix"), ("unix", "tcp4"), ("unix", "unix"), ("tcp6", "abstract")],
)
"""Runs a test for pairs that together use every family and every mix of TCP and UNIX."""


def open_listener(family, directory, *, backlog=512, receive_buffer=None, host=None, port=0):
    """A listening socket of `family`, at a new path or, by default, a free port on loopback.

    Accepted connections inherit its receive buffer. With `backlog=None` it is only bound.
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
    return listener


def quiet_port():
    """A port that is free now, for streams and datagrams, and that no program gets by chance: the
    kernel gives away those in net.ipv4.ip_local_port_range alone, see ip(7)."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    quiet = [*range(1024, low), *range(high + 1, 1 << 16)] or range(1024, 1 << 16)
    while True:
        address = "127.0.0.1", random.choice(quiet)
        with (
            contextlib.suppress(OSError),
            socket.socket() as stream,
            socket.socket(type=socket.SOCK_DGRAM) as datagram,
        ):
            stream.bind(address)
            datagram.bind(address)
            return address[1]


def target_text(address, family):
    """The program's TARGET argument for an `address` from getsockname()."""
    if family == socket.AF_UNIX:
        if isinstance(address, bytes):
            return "@" + address[1:].decode()
        return address
    return f"{address[0]}:{address[1]}"


def open_connection(
    address, family, *, receive_buffer=None, send_buffer=None, timeout=None, source=None
):
    """A connected socket for a client, whose buffers, and IP address `source`, were set before."""
    client = socket.socket(family, socket.SOCK_STREAM)
    set_buffers(client, receive_buffer, send_buffer)
    client.settimeout(timeout or patience())
    if source is not None:
        client.bind((source, 0))
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
    """Send small segments as they are written (TCP_NODELAY), like an interactive program."""
    if not is_unix(connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def is_unix(connection):
    return connection.family == socket.AF_UNIX


def reset(connection):
    """Close with an RST on TCP; on a UNIX socket, which has no reset, this is a full close."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_to_end(connection, timeout=None):
    """Read to the end: (bytes, "eof" or "reset")."""
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
    """Read `count` bytes; AssertionError if fewer come before the end or the deadline."""
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


def send_until_stuck(connection, segment, *, limit=1 << 30, still=0.3, timeout=6.0):
    """Send `segment` repeatedly until no byte has been accepted for `still` seconds.

    Stops after `limit` bytes or `timeout` seconds too. Returns the number of bytes accepted.
    """
    connection.setblocking(False)
    sent = 0
    deadline = time.monotonic() + timeout
    view = memoryview(segment)
    offset = 0
    while sent < limit and time.monotonic() < deadline:
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
    """The `count` bytes that send_until_stuck() has sent."""
    return (segment * (count // len(segment) + 1))[:count]


def fill_backlog(address, family, limit=10):
    """Fill the backlog of a listener that accepts no connection; returns the connections in it."""
    waiting = []
    for _ in range(limit):
        client = socket.socket(family, socket.SOCK_STREAM)
        client.settimeout(0.3)
        try:
            client.connect(address)
        except (BlockingIOError, TimeoutError):
            client.close()
            return waiting
        waiting.append(client)
    raise AssertionError(f"a backlog took {limit} connections")
