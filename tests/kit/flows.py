"""As many bytes as possible, and what they make the program do with its threads."""

import re
import signal
import socket
import threading
from pathlib import Path

from kit.namespaces import mount_prefix
from kit.sockets import read_exactly
from kit.traffic import in_background
from kit.waiting import wait_until

MIB = 1 << 20


def summary(proxy):
    """The lines that the program logs on SIGUSR1, up to those of a second SIGUSR1."""
    first = len(proxy.log_lines())
    before = len(proxy.log_lines(" accepted, "))
    for count in (1, 2):
        proxy.send_signal(signal.SIGUSR1)
        wait_until(
            lambda count=count: len(proxy.log_lines(" accepted, ")) == before + count, "counters"
        )
    lines = proxy.log_lines()[first:]
    second = [number for number, line in enumerate(lines) if " accepted, " in line][1]
    return lines[:second]


def handed_over(proxy):
    """(the number of threads, the number of connections handed over), as the program logs them."""
    found = re.search(r"(\d+) threads, (\d+) connections handed over$", summary(proxy)[-1])
    return (int(found[1]), int(found[2])) if found else (1, 0)


def at_lowest_priority(stage, stat):
    """A prefix with which the program waits for a CPU, so that work piles up and it never sleeps,
    and with which it reads `stat` as /proc/stat."""
    file = Path(stage.path("stat"))
    file.write_text(stat)
    return ["nice", "-n", "19", *mount_prefix(f"--bind {file} /proc/stat")]


class Flow:
    """As many bytes through one connection as possible, until stop(). They are discarded without
    being read, so that the program has more work than its peers."""

    def __init__(self, client, server):
        self.client, self.server = client, server
        self.stopped = threading.Event()
        self.sent = in_background(self._send)
        self.received = in_background(self._receive)

    def _send(self):
        block, count = bytes(MIB), 0
        while not self.stopped.is_set():
            self.client.sendall(block)
            count += len(block)
        self.client.shutdown(socket.SHUT_WR)
        return count

    def _receive(self):
        count, nowhere = 0, bytearray(MIB)
        while size := self.server.recv_into(nowhere, MIB, socket.MSG_TRUNC):
            count += size
        return count

    def stop(self):
        """Stop; assert that everything has arrived and that an answer still comes back."""
        self.stopped.set()
        assert self.sent.result() == self.received.result()
        self.server.sendall(b"hello")
        assert read_exactly(self.client, 5) == b"hello"
