"""Promise: wherever the program is killed, the next one goes on with every connection.

It is killed before and after its system calls, one after the other: those by which it goes on with
what the last process has left, and those by which it forwards. KILLS= says how often in each test.
"""

import os
import random
import socket
import threading

import pytest
from kit import manager as managers
from kit.at_call import HELD_BACK, RECVMSG, kill_at_call
from kit.differences import differs
from kit.kept import attempts, wait_kept
from kit.privileges import locks_memory
from kit.sockets import read_exactly, read_to_end
from kit.traffic import greet, in_background, payload
from kit.waiting import wait_until

pytestmark = [
    differs("original", reason="its connections end with it", run=False),
    pytest.mark.skipif(RECVMSG is None, reason="SKIPPED LOUDLY: unknown system calls"),
]

KILLS = int(os.environ.get("KILLS", "40"))

MB = 1 << 20

some_pairs = pytest.mark.parametrize(
    ("listen", "target"),
    [
        ("tcp4", "tcp4"),
        pytest.param("unix", "unix", marks=locks_memory),
        pytest.param("tcp4", "unix", marks=locks_memory),
    ],
)


class Kept:
    """Connections that are kept, with bytes under way, and the program between their ends."""

    def __init__(self, stage, manager, listen, target, *, count):
        self.stage, self.manager = stage, manager
        self.backend = stage.backend(target)
        self.arguments = ["--crash-recovery=all", self.backend.target]
        stage.launch(
            *self.arguments, listeners=[stage.listener(listen)], names="web", notify=manager
        )
        self.pairs = []
        for _ in range(count):
            client = stage.connect()
            self.pairs.append((client, self.backend.accept()))
            for sock in self.pairs[-1]:
                sock.settimeout(120)
        wait_kept(manager, count)
        stage.proxy.kill()

    def start(self, **options):
        """Start the next process."""
        while len(self.stage.proxies) > 1:
            self.stage.proxies.pop(0).release()
        self.manager.settle()
        managers.start(self.stage, self.manager, *self.arguments, **options)

    def kill_at(self, number, **limits):
        """Start it, and kill it at that stop; see kill_at_call()."""
        if attempts(self.manager) > 40:  # after more in a row the next process gives up
            self.start()
            wait_until(lambda: attempts(self.manager) == 0, "it to last")
            self.stage.proxy.kill()
        self.start(prefix=HELD_BACK, wait=False)
        return kill_at_call(self.stage.proxy, number, **limits)

    def is_ready(self):
        return "READY=1" in self.manager.lines()


@some_pairs
def test_killed_while_it_goes_on(stage, manager, listen, target):
    kept = Kept(stage, manager, listen, target, count=4)
    idle, stalled, half, busy = kept.pairs
    answer, question = payload(3 * MB), payload(70_000, 2)
    kept.start()
    sending = in_background(lambda: stalled[1].sendall(answer))
    half[0].sendall(question)
    half[0].shutdown(socket.SHUT_WR)
    busy[0].sendall(b"early")
    wait_until(stage.proxy.waits_for_events, "all that can be forwarded")
    limits = {"begins": lambda call: call == RECVMSG, "ends": kept.is_ready}
    stage.proxy.kill()
    stops = kept.kill_at(1 << 30, **limits)
    stage.proxy.kill()
    for number in range(KILLS):
        kept.kill_at(number * stops // KILLS, **limits)
        stage.proxy.kill()  # if it has made fewer calls this time
    kept.start()
    assert "Going on with 4 open" in stage.proxy.log()
    assert read_exactly(stalled[0], len(answer)) == answer
    sending.result()
    assert read_to_end(half[1]) == (question, "eof")
    half[1].sendall(b"last words")
    half[1].close()
    assert read_to_end(half[0]) == (b"last words", "eof")
    assert read_exactly(busy[1], 5) == b"early"
    for client, server in (idle, stalled, busy):
        client.sendall(b"question")
        assert read_exactly(server, 8) == b"question"
        server.sendall(b"answer")
        assert read_exactly(client, 6) == b"answer"


@some_pairs
def test_killed_while_it_forwards(stage, manager, listen, target):
    kept = Kept(stage, manager, listen, target, count=3)
    over = threading.Event()
    jobs = [
        in_background(lambda: converse(kept.pairs[0][0], over)),
        in_background(lambda: echo(kept.pairs[0][1])),
        *stream(*kept.pairs[1], over),
        *stream(*reversed(kept.pairs[2]), over),
    ]
    for number in range(KILLS):
        assert kept.kill_at(number, begins=lambda _call: kept.is_ready()) is None
    kept.start()
    over.set()
    for job in jobs:
        job.result()


def converse(client, over):
    """Ask questions of all sizes, and compare the answers."""
    chance = random.Random(1)
    while not over.is_set():
        greet(client, chance.randbytes(chance.choice([1, 100, 5000, 70_000])))
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(client) == (b"", "eof")


def echo(server):
    while data := server.recv(1 << 16):
        server.sendall(data)
    server.shutdown(socket.SHUT_WR)


def stream(source, sink, over):
    """Send without a pause in one direction, and compare what comes."""
    block = payload(MB)
    twice = 2 * block

    def send():
        while not over.is_set():
            source.sendall(block)
        source.shutdown(socket.SHUT_WR)

    def compare():
        place = 0
        while data := sink.recv(1 << 16):
            assert data == twice[place : place + len(data)]
            place = (place + len(data)) % len(block)
        assert place == 0

    return in_background(send), in_background(compare)
