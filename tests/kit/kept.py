"""What a program has left in the store in case that it is killed, as the next one finds it.

It is read without the program's own code: what the messages mean stands in continuity/root.py.
"""

import array
import contextlib
import os
import socket
import struct

from kit.manager import start
from kit.slate_layout import PAGE, SLOT_SIZE
from kit.waiting import wait_until

SO_PEEK_OFF = 42

MESSAGE_MAX = 64
FDS_ROOM = socket.CMSG_SPACE(253 * 4)


class Generation:
    """What one has, and how many processes in a row have gone on with it, and not lasted."""

    def __init__(self, number=None, slate=-1):
        self.number = number
        self.slate = slate
        self.pages = []
        self.attempts = 0

    def kept(self):
        """How many connections are in it."""
        entries = set().union(*[_entries(page) for page in self.pages])
        return sum(self._is_valid(*entry) for entry in entries)

    def _is_valid(self, slot, entry):
        _, _, _, workers, _, text_size = struct.unpack("=IIIIQQ", os.pread(self.slate, 32, 0))
        slots_at = PAGE + -(-text_size // PAGE) * PAGE + workers * PAGE
        return struct.unpack("=Q", os.pread(self.slate, 8, slots_at + slot * SLOT_SIZE))[0] == entry


def _entries(page):
    """(slot, entry) of each connection in a page."""
    with _looked_at(page) as messages:
        return {tuple(map(int, words)) for words, _ in messages if words[0][:1] != b"p"}


def kept(manager):
    """How many connections the next process would go on with, at most."""
    with _root(manager) as messages:
        return _that_counts(messages).kept()


def attempts(manager):
    """How many processes in a row have gone on with it, and not lasted."""
    with _root(manager) as messages:
        return _that_counts(messages).attempts


def add_attempts(manager, count):
    """Have as many more have tried in vain."""
    with _root(manager) as messages:
        sender = next(fds[1] for words, fds in messages if words[0] == b"S")
        for _ in range(count):
            assert os.write(sender, b"A") == 1


def _that_counts(messages):
    """The generation that counts; one without pages if there is none."""
    begun = counts = Generation()
    for words, fds in messages:
        match words:
            case [b"S", number]:
                begun = Generation(number, fds[0])
            case [b"P", begun.number, _]:
                begun.pages.append(fds[0])
            case [b"C", begun.number, tried]:
                counts = begun
                counts.attempts = int(tried)
            case [b"A"]:
                counts.attempts += 1
            case [b"L"]:
                counts.attempts = 0
    return counts


@contextlib.contextmanager
def _root(manager):
    """The messages in root's queue, which is in the queue that is stored; none: nothing is."""
    with contextlib.ExitStack() as opened:
        messages = []
        stored = [fd for name, fd in manager.stored if name == "proxyd-pages"]
        if stored:
            ((_, (receiver,)),) = opened.enter_context(_looked_at(stored[0]))
            messages = opened.enter_context(_looked_at(receiver))
        yield messages


@contextlib.contextmanager
def _looked_at(queue):
    """(words, descriptors) of each message, which stays there. The descriptors are copies."""
    messages = []
    with socket.socket(fileno=os.dup(queue)) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
        try:
            while message := _look(receiver):
                messages.append(message)
            yield messages
        finally:
            receiver.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)  # the program looks at it, too
            for _, fds in messages:
                for fd in fds:
                    os.close(fd)


def _look(receiver):
    """The next message; None: there is no more. (socket.recv_fds() ignores its flags.)"""
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    fds = array.array("i")
    try:
        data, ancillary, _, _ = receiver.recvmsg(MESSAGE_MAX, FDS_ROOM, flags)
    except BlockingIOError:
        return None
    for _level, _kind, packed in ancillary:
        fds.frombytes(packed)
    return (data.split(), fds.tolist()) if data else None


def wait_kept(manager, count):
    """Wait until so many connections are kept."""
    wait_until(lambda: kept(manager) == count, f"{count} connections that are kept")


def kill_and_start(stage, manager, *arguments, **options):
    """Kill the program, and start it with what is stored."""
    stage.proxy.kill()
    manager.settle()
    manager.drop_hung_up()
    assert [name for name, _ in manager.stored] == ["proxyd-pages"]
    start(stage, manager, *arguments, **options)
