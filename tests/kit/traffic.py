"""Payloads that reveal every lost, repeated or moved byte, and threads that transfer them."""

import functools
import hashlib
import itertools
import random
import select
import selectors
import socket
import threading
import time

from kit.sockets import read_exactly, read_to_end, send_at_once
from kit.waiting import patience

BLOCK = 1 << 18
_NOISE = random.Random(20240501).randbytes(BLOCK)


class Payload:
    """`size` bytes that any shift, swap or repetition changes; generated as they are sent."""

    def __init__(self, size, seed=0):
        self.size = size
        self.seed = seed

    def blocks(self):
        """The bytes in blocks; every block begins with its number, the rest is noise."""
        for number, start in enumerate(range(0, self.size, BLOCK)):
            head = number.to_bytes(6, "big") + self.seed.to_bytes(2, "big")
            yield (head + _NOISE[8:])[: self.size - start]

    def digest(self):
        """SHA-256 of all of it, in hexadecimal."""
        state = hashlib.sha256()
        for block in self.blocks():
            state.update(block)
        return state.hexdigest()

    def bytes(self):
        """All of it at once, for the small ones."""
        return b"".join(self.blocks())


@functools.lru_cache(maxsize=64)
def payload(size, seed=1):
    """Bytes of which no two places look alike."""
    return random.Random(seed).randbytes(size)


class _Carrier:
    """A thread; `result()` returns its result or raises its exception."""

    def __init__(self, work):
        self._value = None
        self._error = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work):
        try:
            self._value = work()
        except BaseException as error:
            self._error = error

    def result(self, timeout=60.0):
        """The result of the work, or its exception; AssertionError if it takes longer."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise AssertionError(f"a transfer did not end within {timeout:g} s")
        if self._error:
            raise self._error
        return self._value


def in_background(work):
    """Run `work` in a thread; `.result()` waits for it."""
    return _Carrier(work)


def send_payload(connection, payload, *, half_close=True):
    """Send it from a thread, then half-close; `.result()` waits until that is done."""

    def work():
        connection.settimeout(patience())
        for block in payload.blocks():
            connection.sendall(block)
        if half_close:
            connection.shutdown(socket.SHUT_WR)

    return _Carrier(work)


def receive_digest(connection, limit=None):
    """Read in a thread, to the end or to `limit` bytes; `.result()` is (bytes read, SHA-256)."""

    def work():
        connection.settimeout(patience())
        state = hashlib.sha256()
        count = 0
        buffer = memoryview(bytearray(BLOCK))
        while limit is None or count < limit:
            got = connection.recv_into(buffer if limit is None else buffer[: limit - count])
            if not got:
                break
            state.update(buffer[:got])
            count += got
        return count, state.hexdigest()

    return _Carrier(work)


def receive_all(connection):
    """Read to the end in a thread; `.result()` is (bytes, "eof" or "reset")."""
    return _Carrier(lambda: read_to_end(connection))


def exchange(client, server, upward, downward, *, half_close):
    """Send both payloads at the same time, and check that they arrive.

    With `half_close` each side half-closes after its payload, and the end must arrive too.
    """
    transfers = [
        send_payload(client, upward, half_close=half_close),
        send_payload(server, downward, half_close=half_close),
    ]
    at_server = receive_digest(server, None if half_close else upward.size)
    at_client = receive_digest(client, None if half_close else downward.size)
    for transfer in transfers:
        transfer.result()
    assert at_server.result() == expected(upward)
    assert at_client.result() == expected(downward)


def expected(payload):
    """The result of receive_digest() for `payload`."""
    return payload.size, payload.digest()


def send_in_segments(connection, segment, seconds=1.2):
    """Send segments of `segment` bytes until everything up to the reader is full.

    A short pause after each segment lets the program take it separately, as from a network;
    otherwise the kernel joins them in its queue. Stops after `seconds` too. Returns what was sent.
    """
    pattern = Payload(1 << 16).bytes()
    pieces = [pattern[i : i + segment] for i in range(0, len(pattern), segment)]
    sent = bytearray()
    deadline = time.monotonic() + seconds
    connection.setblocking(False)
    for piece in itertools.cycle(pieces):
        try:
            count = connection.send(piece)
            sent += piece[:count]
            if count < len(piece):
                break  # the rest of it would be a smaller segment
            time.sleep(0.00005)
        except BlockingIOError:
            if not select.select([], [connection], [], 0.15)[1]:
                break
        if time.monotonic() > deadline:
            break
    connection.settimeout(patience())
    return bytes(sent)


class EchoServer:
    """Echoes every byte, and answers a half-close with a close; all in one thread."""

    def __init__(self, listener):
        self.listener = listener
        self.accepted = 0
        self._selector = selectors.DefaultSelector()
        self._stop, stopped = socket.socketpair()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, "listener")
        self._selector.register(stopped, selectors.EVENT_READ, "stop")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        while True:
            for key, _ in self._selector.select():
                if key.data == "stop":
                    return self._shut()
                if key.data == "listener":
                    self._accept()
                else:
                    self._echo(key.fileobj)

    def _accept(self):
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return
        self.accepted += 1
        connection.settimeout(patience())
        send_at_once(connection)
        self._selector.register(connection, selectors.EVENT_READ, "connection")

    def _echo(self, connection):
        try:
            data = connection.recv(1 << 16)
            if data:
                connection.sendall(data)
                return
        except OSError:
            pass
        self._selector.unregister(connection)
        connection.close()

    def _shut(self):
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def close(self):
        """End the thread and close all its sockets, the listener included."""
        if self._thread.is_alive():
            self._stop.send(b"x")
            self._thread.join(patience())
        self._stop.close()


def talk(client, server):
    """Send a word in each direction."""
    client.sendall(b"question")
    assert read_exactly(server, 8) == b"question"
    server.sendall(b"answer")
    assert read_exactly(client, 6) == b"answer"


def greet(client, word=b"hello"):
    """Send a word to an echo server, and read the answer."""
    client.sendall(word)
    assert read_exactly(client, len(word)) == word


def is_served(client):
    """Whether an echo server answers; False if the client is disconnected instead."""
    try:
        greet(client)
        return True
    except (AssertionError, BrokenPipeError, ConnectionResetError):
        return False
