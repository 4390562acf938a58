"""A root and its pages, looked at as the next process would: nothing is taken out."""

import array
import contextlib
import fcntl
import os
import socket
import struct
import termios
from typing import NamedTuple

from kit.slate_view import Slate
from proxyd._relay import slate_create

SO_PEEK_OFF = 42
SO_COOKIE = 57
UNIT = 256 * 1024
"""The stream_unit of a relay, if it is not set."""


class Message(NamedTuple):
    """A connection in a page."""

    slot: int
    entry: int
    cookies: tuple[int, int]


class Pages:
    """The pages of the relay of a rig, which uses a new slate from now on."""

    def __init__(self, rig, slots=1024, workers=1):
        self.rig = rig
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.root, self.sender = map(rig.keep, pair)
        file = slate_create(b"", slots, workers, UNIT)
        rig.relay.use_slate(file, self.sender.fileno(), 7)
        self.slate = rig.keep(Slate(file))
        os.close(file)

    def enter(self):
        """Enter all connections now, whatever their age; how many are kept then."""
        self.rig.settle()
        self.rig.events += self.rig.relay.freeze()
        try:
            self.rig.relay.enter_all()  # some may have been old enough before
        finally:
            self.rig.relay.thaw()
        return len(self.slate.slots())

    def messages(self):
        """The messages of each page with connections."""
        return [
            [message for message in page if isinstance(message, Message)] for page in self._look()
        ]

    def pipes(self):
        """{number: bytes inside} of the pipes."""
        found = [message for page in self._look() for message in page]
        return dict(one for one in found if not isinstance(one, Message))

    def kept(self):
        """{id of a connection: its message} of those that are not void."""
        found = {}
        for page in self.messages():
            for message in page:
                slot = self.slate.slot(message.slot)
                if slot.entry == message.entry:
                    assert slot.cookies == message.cookies
                    assert found.get(slot.id, message) == message
                    found[slot.id] = message
        return found

    def until_kept(self, links):
        """Wait until exactly these connections are kept."""
        wanted = {link.id for link in links}
        self.rig.until(lambda: set(self.kept()) == wanted, "the connections to be kept")

    def _look(self):
        """What is in each page, in the order of root's queue."""
        pages = []
        for number, (data, fds) in enumerate(peek(self.root)):
            with closing(fds):
                assert data == f"P 7 {number}".encode()
                receiver, _ = fds
                with socket.socket(fileno=os.dup(receiver)) as page:
                    pages.append([describe(*message) for message in peek(page)])
        return pages


def describe(data, fds):
    """A Message, or (number, bytes inside) of a pipe."""
    with closing(fds):
        if data.startswith(b"p "):
            (fd,) = fds
            return int(data[2:]), int.from_bytes(
                fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), "little"
            )
        slot, entry = map(int, data.split())
        one, other = map(cookie, fds)
        return Message(slot, entry, (one, other))


def peek(queue):
    """Each message of a queue: (data, fds). The fds are the caller's."""
    queue.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                # socket.recv_fds() ignores flags
                data, parts, _, _ = queue.recvmsg(64, socket.CMSG_SPACE(4 * 4), flags)
                yield data, [fd for _, _, packed in parts for fd in array.array("i", packed)]
    finally:
        queue.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)


@contextlib.contextmanager
def closing(fds):
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


def cookie(fd):
    """The number by which the kernel knows a socket."""
    with socket.socket(fileno=os.dup(fd)) as duplicate:
        return struct.unpack("=Q", duplicate.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]
