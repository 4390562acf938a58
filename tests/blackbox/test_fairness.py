"""Bulk streams starve no other connection: each gets its turn."""

import threading

import pytest
from kit.sockets import main_pairs, read_exactly
from kit.traffic import Payload
from kit.waiting import wait_until

ROUNDS = 50


class Bulk:
    """An endless stream through the program, in threads, until `stop()`."""

    def __init__(self, sender, receiver):
        self.moved = 0
        self._running = True
        self._sender = threading.Thread(target=self._send, args=(sender,), daemon=True)
        self._receiver = threading.Thread(target=self._receive, args=(receiver,), daemon=True)
        self._sender.start()
        self._receiver.start()

    def _send(self, connection):
        block = Payload(1 << 20).bytes()
        while self._running:
            connection.sendall(block)
        connection.close()

    def _receive(self, connection):
        while got := len(connection.recv(1 << 20)):
            self.moved += got

    def stop(self):
        """End the stream and wait for its end."""
        self._running = False
        self._sender.join(20)
        self._receiver.join(20)
        assert not self._receiver.is_alive(), "the bulk stream did not end"


@main_pairs
def test_small_messages_alongside_bulk(stage, listen, target):
    """Fifty round trips are completed while two bulk streams keep the program busy."""
    backend = stage.forward(listen, target)
    small, its_server = stage.connect(), backend.accept()
    streams = []
    for _ in range(2):
        client = stage.connect()
        streams.append(Bulk(client, backend.accept()))
    for stream in streams:
        wait_until(lambda stream=stream: stream.moved, "the stream to run")
    before = [stream.moved for stream in streams]
    rounds = 0

    def one_more_round():
        """Whether fifty are done and all streams have moved: fifty alone may take no time."""
        nonlocal rounds
        small.sendall(b"ping")
        assert read_exactly(its_server, 4) == b"ping"
        its_server.sendall(b"pong")
        assert read_exactly(small, 4) == b"pong"
        rounds += 1
        return rounds >= ROUNDS and all(
            stream.moved > earlier for stream, earlier in zip(streams, before, strict=True)
        )

    wait_until(one_more_round, "fifty rounds, and streams that move meanwhile")
    for stream in streams:
        stream.stop()


@main_pairs
def test_new_connections_alongside_bulk(stage, listen, target):
    """New clients are accepted and served while a bulk stream goes on in each direction."""
    backend = stage.forward(listen, target)
    client, server = stage.connect(), backend.accept()
    streams = [Bulk(client, server)]
    other, its_server = stage.connect(), backend.accept()
    streams.append(Bulk(its_server, other))
    for _ in range(20):
        newcomer = stage.connect()
        its_server = backend.accept()
        newcomer.sendall(b"hello")
        assert read_exactly(its_server, 5) == b"hello"
        newcomer.close()
        its_server.close()
    for stream in streams:
        stream.stop()


@pytest.mark.parametrize(("listen", "target"), [("tcp4", "tcp4"), ("unix", "unix")])
def test_bulk_streams_share(stage, listen, target):
    """None of four bulk streams stands still: each moves megabytes while the others do."""
    backend = stage.forward(listen, target)
    streams = []
    for _ in range(4):
        client = stage.connect()
        streams.append(Bulk(client, backend.accept()))
    slowest = Payload(4 << 20).size
    for stream in streams:
        while stream.moved < slowest:
            stream._receiver.join(0.01)
            assert stream._receiver.is_alive()
    for stream in streams:
        stream.stop()
