"""Upstream on the real relay, with real sockets."""

import errno
import os
import socket

import pytest
from kit.sockets import reset

from proxyd import address as sockaddr
from proxyd import happy_eyeballs
from proxyd._relay import ConnectFailed
from proxyd.event_loop import EventLoop
from proxyd.target import parse_target
from proxyd.upstream import Upstream

PATIENCE = 20
"""Seconds after which something that has not happened counts as failed."""


class Real:
    """An Upstream to a real target, and the main loop around it."""

    def __init__(self, target, timeout_ms=10_000, names=None):
        self.loop = EventLoop()
        target = parse_target(target)
        self.upstream = Upstream(self.loop, names, target, target.service or 0, timeout_ms)

    def come(self, kind=socket.AF_INET):
        """Hand over a client, connected over loopback or UNIX; return its own end."""
        with socket.socket(kind) as listening:
            listening.bind(("127.0.0.1", 0) if kind == socket.AF_INET else "")
            listening.listen()
            peer = socket.socket(kind)
            peer.settimeout(PATIENCE)
            peer.connect(listening.getsockname())
            ours, _ = listening.accept()
        ours.setblocking(False)
        self.upstream.take(ours.detach(), kind, 0, None, "")
        return peer

    @property
    def held(self):
        return list(self.upstream.held)

    def turn(self, limit_ms=PATIENCE * 1000):
        """Run one turn of the main loop."""
        next_ms = self.upstream.next_ms() if self.upstream.held else None
        wait = limit_ms if next_ms is None else max(next_ms - self.loop.relay.now_ms, 0)
        for event in self.loop.run(min(wait, limit_ms)):
            assert isinstance(event, ConnectFailed)
            self.upstream.take_back(event, socket.AF_INET)
        if self.upstream.held:
            self.upstream.step(self.loop.relay.now_ms)

    def receive(self, sock):
        """Run the relay until something arrives at a socket; return it."""
        sock.setblocking(False)
        for _ in range(PATIENCE * 100):
            try:
                return sock.recv(100)
            except BlockingIOError:
                self.turn(10)
        raise TimeoutError

    def close(self):
        self.upstream.drop_all()
        self.loop.relay.close_all()


@pytest.fixture
def real():
    made = []

    def make(*arguments, **keywords):
        made.append(Real(*arguments, **keywords))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("state", ["refused", "stale", "absent"])
def test_real_clients_wait_until_the_target_listens(real, tmp_path, state):
    if state == "refused":
        backend = socket.socket()
        backend.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{backend.getsockname()[1]}"
    else:
        target = str(tmp_path / "socket")
        if state == "stale":
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(target)
        backend = socket.socket(socket.AF_UNIX)
    with backend:
        one = real(target)
        peers = [one.come() for _ in range(5)]
        for number, peer in enumerate(peers):
            peer.sendall(b"%d" % number)
        peers[1].shutdown(socket.SHUT_WR)  # is served all the same
        for _ in range(5):
            one.turn()
        assert len(one.held) == 5
        if state == "stale":
            os.unlink(target)
        if state != "refused":
            backend.bind(target)
        backend.listen()
        while one.held:
            one.turn()
        for number, peer in enumerate(peers):
            served, _ = backend.accept()
            with served:
                assert one.receive(served) == b"%d" % number
            peer.close()


@pytest.mark.parametrize("kind", [socket.AF_INET, socket.AF_UNIX])
def test_a_real_client_that_resets_is_dropped(real, tmp_path, kind):
    one = real(str(tmp_path / "absent"))
    gone, stays = one.come(kind), one.come(kind)
    if kind == socket.AF_INET:
        reset(gone)
    else:
        gone.close()
    while len(one.held) > 1:
        one.turn()
    (client,) = one.upstream.held
    with socket.socket(fileno=os.dup(client.fd)) as ours:
        assert ours.getpeername() == stays.getsockname()
    stays.close()


@pytest.mark.parametrize("kind", [socket.AF_INET, socket.AF_UNIX])
def test_a_real_client_that_has_sent_its_request_and_half_closed_waits(real, tmp_path, kind):
    target = str(tmp_path / "socket")
    one = real(target)
    with one.come(kind) as peer, socket.socket(socket.AF_UNIX) as backend:
        peer.sendall(b"request")
        peer.shutdown(socket.SHUT_WR)
        for _ in range(5):
            one.turn()
        assert len(one.held) == 1
        backend.bind(target)
        backend.listen()
        while one.held:
            one.turn()
        served, _ = backend.accept()
        with served:
            assert one.receive(served) == b"request"
            assert one.receive(served) == b""
            served.sendall(b"reply")
            served.shutdown(socket.SHUT_WR)
            assert one.receive(peer) == b"reply"
            assert one.receive(peer) == b""


class RealNames:
    """Knows the addresses of a name at once."""

    def __init__(self, *addresses):
        self.addresses = list(addresses)
        self.asked = False

    def ask(self, host, now_ms, done):
        self.asked = True
        done(self.addresses, None)

    def current(self, host, now_ms):
        return self.addresses if self.asked else []


def bound_to_one_port(*hosts):
    """A socket on each of `hosts`, all with one port, which is free on all of them."""
    while True:
        sockets = [socket.socket() for _ in hosts]
        try:
            sockets[0].bind((hosts[0], 0))
            port = sockets[0].getsockname()[1]
            for other, host in zip(sockets[1:], hosts[1:], strict=True):
                other.bind((host, port))
        except OSError as error:
            for one in sockets:
                one.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return *sockets, port


def test_a_real_name_whose_first_address_refuses(real):
    refuses, backend, port = bound_to_one_port("127.0.0.2", "127.0.0.1")
    with refuses, backend:
        backend.listen()
        addresses = [sockaddr.pack_inet(host, 0) for host in ("127.0.0.2", "127.0.0.1")]
        one = real(f"backend:{port}", names=RealNames(*addresses))
        with one.come() as peer:
            one.upstream.step(one.loop.relay.now_ms)
            while one.held:
                one.turn()
            peer.sendall(b"hello")
            served, _ = backend.accept()
            with served:
                assert one.receive(served) == b"hello"


def test_a_real_target_that_has_reset_before_it_was_noticed(real, monkeypatch):
    """It has been reached, so the client sees the reset."""
    with socket.socket() as backend:
        backend.bind(("127.0.0.1", 0))
        backend.listen()
        port = backend.getsockname()[1]

        def reset_then_look(fd):
            accepted, _ = backend.accept()
            reset(accepted)
            return look(fd)

        look = happy_eyeballs.connected
        monkeypatch.setattr(happy_eyeballs, "connected", reset_then_look)
        one = real(f"backend:{port}", names=RealNames(sockaddr.pack_inet("127.0.0.1", 0)))
        with one.come() as peer:
            one.upstream.step(one.loop.relay.now_ms)
            assert not one.held
            with pytest.raises(ConnectionResetError):
                one.receive(peer)
