"""What the kernel counts is what was read and written, whatever the peer does meanwhile."""

import random
import socket

import pytest
from kit.sockets import open_listener
from kit.stepped import open_client
from kit.traffic import in_background, payload

from proxyd._relay import stream_positions


@pytest.fixture(params=["connected", "accepted"])
def ends(request):
    """A socket and its peer."""
    with open_listener("tcp4", "") as listener:
        client = open_client(listener)
        listener.settimeout(10)
        listener.setblocking(True)
        server, _ = listener.accept()
        server.setblocking(False)
    with client, server:
        yield (client, server) if request.param == "connected" else (server, client)


def test_positions_are_exact(ends):
    one, peer = ends
    chance = random.Random(1)
    taken, given = stream_positions(one.fileno())
    data = payload(100_000)
    for _ in range(500):
        for sender, receiver in ((one, peer), (peer, one)):
            try:
                count = sender.send(data[: chance.randint(1, 100_000)])
                given += count if sender is one else 0
            except BlockingIOError:
                pass
            assert stream_positions(one.fileno()) == (taken, given)
            try:
                count = len(receiver.recv(chance.randint(1, 150_000)))
                taken += count if receiver is one else 0
            except BlockingIOError:
                pass
            assert stream_positions(one.fileno()) == (taken, given)


def test_positions_while_the_peer_reads_and_writes(ends):
    one, peer = ends
    peer.setblocking(True)
    taken, given = stream_positions(one.fileno())
    size = 20_000_000
    jobs = [
        in_background(lambda: peer.sendall(bytes(size))),
        in_background(lambda: sum(iter(lambda: len(peer.recv(70_000)), 0))),
    ]
    left = size
    while left:
        try:
            given += one.send(bytes(10_000))
        except BlockingIOError:
            pass
        try:
            count = len(one.recv(min(left, 10_000)))
            left -= count
            taken += count
        except BlockingIOError:
            pass
        assert stream_positions(one.fileno()) == (taken, given)
    before = given
    one.shutdown(socket.SHUT_WR)
    jobs[0].result()
    assert jobs[1].result() > 0
    assert before == given


def test_no_position_of_other_sockets():
    one, other = socket.socketpair()
    with one, other, pytest.raises(OSError, match="95|22"):
        stream_positions(one.fileno())
