"""What a program has left in the store in case that it is killed, seen from outside."""

import contextlib
import os
import socket
import struct

from kit.manager import start
from kit.slate import PAGE, SLOT_SIZE
from kit.waiting import wait_until
from proxyd.continuity import fd_queue, root

SO_PEEK_OFF = 42


def kept(manager):
    """How many connections the next process would go on with, at most."""
    with _root(manager) as (_, generation):
        if generation is None:
            return 0
        entries = set().union(*[_entries(page) for page in generation.pages])
        return sum(_is_valid(generation.slate, *entry) for entry in entries)


def attempts(manager):
    """How many processes in a row have gone on with it, and not lasted."""
    with _root(manager) as (one, _):
        return one.attempts if one is not None else 0


def add_attempts(manager, count):
    """Have as many more have tried in vain."""
    with _root(manager) as (one, _):
        for _ in range(count):
            one.attempt()


@contextlib.contextmanager
def _root(manager):
    """(root, the generation that counts) as the next process would have it; (None, None): none."""
    found = [fd for name, fd in manager.stored if name == "proxyd-pages"]
    if not found:
        yield None, None
        return
    one = root.stored(os.dup(found[0]))
    generation = one.read()
    try:
        yield one, generation
    finally:
        if generation is not None:
            generation.close()
        one.close()


def _entries(page):
    """(slot, entry) of each connection in a page."""
    receiver = socket.socket(fileno=os.dup(page))
    entries = set()
    with receiver:
        fd_queue.look_from_start(receiver)
        while True:
            data, fds = fd_queue.look(receiver, 64)
            for fd in fds:
                os.close(fd)
            if not data:
                break
            if not data.startswith(b"p"):
                entries.add(tuple(int(word) for word in data.split()))
        receiver.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)  # the program looks at it, too
    return entries


def _is_valid(slate, slot, entry):
    _, _, _, workers, _, text_size = struct.unpack("=IIIIQQ", os.pread(slate, 32, 0))
    slots_at = PAGE + -(-text_size // PAGE) * PAGE + workers * PAGE
    return struct.unpack("=Q", os.pread(slate, 8, slots_at + slot * SLOT_SIZE))[0] == entry


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
