"""Reading PROXY headers from sockets: in pieces, exactly to their end, and in time."""

import array
import os
import socket

import pytest
from kit.rights import kernel_refuses
from kit.sockets import reset

from proxyd import address
from proxyd.event_loop import EventLoop
from proxyd.header_reader import HEADER_MS, HeaderReader
from proxyd.listen import Listener
from proxyd.target import parse_target

PATIENCE = 20
"""Seconds after which something that has not happened counts as failed."""

V1 = b"PROXY TCP4 192.0.2.1 198.51.100.2 5000 443\r\n"
PEER = address.pack_inet("192.0.2.1", 5000)


class World:
    """A reader in a real loop, and clients in front of it."""

    def __init__(self, kind):
        self.kind = kind
        self.loop = EventLoop()
        self.reader = HeaderReader(self.loop, self.admit, self.refuse)
        self.admitted, self.refused = [], []
        self.sockets = []
        self.listener = Listener(-1, "x", bytes([kind]) + bytes(20))
        self.listener.target = parse_target("/run/backend")
        self.lets_in = True
        self.told = []
        """(state, target, how) of what a watcher is told."""

    def watch(self):
        self.loop.on_held = lambda target, client, how: self.told.append(
            (client.state, target, how)
        )

    def admit(self, sender, header):
        self.admitted.append((sender, header))
        return self.lets_in

    def refuse(self, sender, why):
        self.refused.append(why)

    def client(self, first=b""):
        """A client's socket, and the fd that the reader has."""
        if self.kind == socket.AF_UNIX:
            ours, theirs = socket.socketpair()
        else:
            with socket.create_server(("127.0.0.1", 0)) as server:
                theirs = socket.create_connection(server.getsockname())
                ours, _ = server.accept()
        self.sockets.append(theirs)
        theirs.sendall(first)
        ours.setblocking(False)
        self.reader.take(self.listener, ours.detach(), b"peer")
        return theirs

    def until(self, condition):
        for _ in range(PATIENCE * 100):
            if condition():
                return
            assert self.loop.run(10) == []
        raise TimeoutError

    def rest(self):
        """What the target would get of the client admitted last."""
        (sender, _), *_ = self.admitted[-1:]
        return os.read(sender.fd, 1000)

    def close(self):
        self.reader.drop_all()
        for sender, _ in self.admitted:
            os.close(sender.fd)
        for sock in self.sockets:
            sock.close()


@pytest.fixture(params=["tcp", "unix"])
def world(request):
    made = World(socket.AF_UNIX if request.param == "unix" else socket.AF_INET)
    yield made
    made.close()


@pytest.fixture
def unix_world():
    made = World(socket.AF_UNIX)
    yield made
    made.close()


def test_a_header_that_is_there_already(world):
    world.client(V1 + b"rest")
    (sender, header), *more = world.admitted
    assert not more
    assert not len(world.reader)
    assert (header.peer, sender.peer) == (PEER, b"peer")
    assert world.rest() == b"rest"


def test_a_header_in_pieces(world):
    client = world.client()
    for byte in V1[:-1]:
        client.sendall(bytes([byte]))
        for _ in range(3):
            world.loop.run(0)
        assert not world.admitted
    client.sendall(V1[-1:] + b"rest")
    world.until(lambda: world.admitted)
    assert world.rest() == b"rest"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GET / HTTP/1.1\r\n", "no PROXY header"),
        (V1.replace(b"443", b"99999"), "a PROXY header of version 1 with a bad port"),
    ],
)
def test_what_is_no_header(world, data, why):
    client = world.client(data)
    assert world.refused == [why]
    assert not len(world.reader)
    assert is_closed(client)


def is_closed(client):
    """Whether nothing comes any more."""
    client.settimeout(PATIENCE)
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_client_that_ends_first(world):
    world.client().shutdown(socket.SHUT_WR)
    world.until(lambda: world.refused)
    assert world.refused == ["the end of the connection before a PROXY header"]


def test_a_client_that_ends_in_its_header(world):
    client = world.client(V1[:20])
    assert len(world.reader) == 1
    client.shutdown(socket.SHUT_WR)
    world.until(lambda: world.refused)
    assert world.refused == ["the end of the connection in the PROXY header"]


def test_a_client_that_ends_after_its_header(world):
    client = world.client(V1[:20])
    client.sendall(V1[20:])
    client.shutdown(socket.SHUT_WR)
    world.until(lambda: world.admitted)
    assert not world.refused


def test_a_client_that_resets(world):
    reset(world.client(V1[:20]))
    world.until(lambda: world.refused)
    assert not len(world.reader)


def test_a_client_that_takes_too_long(world):
    start_ms = world.loop.relay.now_ms
    assert world.reader.next_ms() is None
    client = world.client(V1[:20])
    assert world.reader.next_ms() == start_ms + HEADER_MS
    world.reader.step(start_ms + HEADER_MS - 1)
    assert not world.refused
    world.reader.step(start_ms + HEADER_MS)
    assert world.refused == ["no PROXY header within 5 s"]
    assert world.reader.next_ms() is None
    assert is_closed(client)


def test_the_end_of_the_program(world):
    clients = [world.client() for _ in range(3)]
    assert world.reader.drop_all() == 3
    assert (world.reader.cut, len(world.reader)) == (3, 0)
    assert world.refused == []
    assert all(is_closed(client) for client in clients)


def test_clients_that_wait_are_told_of(world):
    """Those whose header comes at once are not; those that are served are connections then."""
    world.watch()
    world.client(V1)
    assert world.told == []
    client = world.client(V1[:9])
    (sender,) = world.reader
    assert sender.id > 0
    client.sendall(V1[9:])
    world.until(lambda: len(world.admitted) == 2)
    assert world.told == [("header", "/run/backend", "")]
    world.client()
    (sender,) = world.reader
    assert not world.reader.terminate(sender.id + 1)
    assert world.reader.terminate(sender.id)
    assert world.told[2:] == [("header", "/run/backend", "cut")]
    world.client(V1[:9]).close()
    world.until(lambda: world.refused)
    assert world.told[4:] == [("header", "/run/backend", "refused")]
    world.lets_in = False
    world.client(V1[:9]).sendall(V1[9:])
    world.until(lambda: len(world.admitted) == 3)
    assert world.told[6:] == [("header", "/run/backend", "refused")]


def test_a_client_that_cannot_be_watched(world, monkeypatch):
    def fail(*_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(EventLoop, "watch", fail)
    world.client(V1)  # need not be
    assert not world.refused
    world.client()
    assert world.refused == ["it could not be watched: Cannot allocate memory"]


def test_descriptors_are_not_taken(unix_world):
    world = unix_world
    if kernel_refuses():
        pytest.skip("this kernel refuses descriptors")
    client = world.client()
    fds = array.array("i", [client.fileno()])
    client.sendmsg([V1], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    world.until(lambda: world.refused)
    assert world.refused == ["descriptors with a PROXY header"]


def test_credentials_are_no_descriptors(unix_world):
    """PassCredentials=yes in the socket unit adds them to what is received."""
    world = unix_world
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    ours.setblocking(False)
    world.sockets.append(theirs)
    theirs.sendall(V1[:10])
    theirs.sendall(V1[10:])
    world.reader.take(world.listener, ours.detach(), b"peer")
    assert len(world.admitted) == 1
