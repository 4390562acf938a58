"""Promise: a slow or stuck reader costs bounded memory and no CPU time; pipes are optional."""

import contextlib
import os
import resource

import pytest
from kit.sockets import reset
from kit.stepped import Incoming, Outgoing, close, half_close
from kit.traffic import payload

SMALL = {"receive_buffer": 4096}
BUFFERED_MAX = 32 * 1024 * 1024
"""What one direction may take before it is stuck: the kernel's socket buffers and one pipe."""


@pytest.fixture
def pipes():
    """A function that counts the pipes that the relay has open."""

    def ends():
        count = 0
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                count += os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:")
        return count

    before = ends()
    return lambda: (ends() - before) / 2


@contextlib.contextmanager
def no_more_fds():
    """Within, nothing can be opened unless something is closed first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    fillers = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)


@pytest.mark.parametrize("segment", [1, 100, 1000, 1448, 65536])
def test_stuck_reader(rigs, pair, way, segment):
    """Segments of any size are taken until there is no room, and then the relay sleeps. Small ones
    use up the slots of a pipe long before its bytes."""
    rig = rigs(*pair, **way, target_buffers=SMALL, client_buffers={"send_buffer": 65536})
    link = rig.link()
    warm_up = payload(300_000)  # so that the relay takes it for a stream
    rig.run(Outgoing(link.client, warm_up), Incoming(link.target, limit=len(warm_up)))
    unit = payload(segment)
    sent = 0
    for _ in range(3000):
        outgoing = Outgoing(link.client, unit)
        outgoing.step()
        sent += segment - len(outgoing.rest)
        if outgoing.rest:
            break
        rig.turn()
    assert sent < BUFFERED_MAX
    assert rig.is_calm()
    half_close(link.client)
    assert rig.is_calm()
    received, end = rig.read_to_end(link.target)
    assert received == (unit * (sent // segment + 1))[:sent]
    assert end == "eof"


def test_stuck_reader_while_segments_keep_coming(rigs, pair, way):
    """Each segment wakes the relay, which has nothing to do and must go back to sleep."""
    rig = rigs(*pair, **way, target_buffers=SMALL)
    link = rig.link()
    rig.fill(link.client)
    for _ in range(3):
        with contextlib.suppress(BlockingIOError):
            link.client.send(b"x")
        assert rig.is_calm(15)


def test_slow_reader_gets_everything(rigs, pair, mode):
    """The reader takes a few bytes at a time, while the writer is always ahead."""
    rig = rigs(*pair, **mode, target_buffers=SMALL)
    link = rig.link()
    data = payload(400_000)
    incoming = Incoming(link.target, unit=3001)
    rig.run(Outgoing(link.client, data, close), incoming)
    assert (incoming.data, incoming.end) == (data, "eof")


def test_both_readers_stuck(rigs, pair, way):
    """Both directions are full; each continues as soon as its own reader does."""
    rig = rigs(*pair, **way, client_buffers=SMALL, target_buffers=SMALL)
    link = rig.link()
    up, down = rig.fill(link.client), rig.fill(link.target)
    assert rig.is_calm()
    assert len(rig.read(link.target, up)) == up
    assert rig.is_calm()
    assert len(rig.read(link.client, down)) == down


def test_stuck_reader_does_not_stop_the_other_direction(rigs, pair, way):
    rig = rigs(*pair, **way, target_buffers=SMALL)
    link = rig.link()
    rig.fill(link.client)
    data = payload(500_000)
    incoming = Incoming(link.client)
    rig.run(Outgoing(link.target, data, half_close), incoming)
    assert (incoming.data, incoming.end) == (data, "eof")


def test_stuck_reader_that_resets(rigs, pair, way, pipes):
    """The bytes buffered for it are dropped, the writer sees the end, and no pipe is left open."""
    rig = rigs(*pair, **way, target_buffers=SMALL)
    link = rig.link()
    rig.fill(link.client)
    reset(link.target)
    _, end = rig.read_to_end(link.client)
    assert end in ("eof", "reset")
    close(link.client)
    rig.until_ended(link.id)
    assert pipes() == 0


# ── pipes ────────────────────────────────────────────────────────────────────────────────────────


def test_pipes_are_held_only_while_bytes_are_inside(rigs, pipes):
    """Twenty idle streams share one pipe, which is closed with the last connection."""
    rig = rigs("tcp4", "tcp4")
    links = [rig.link() for _ in range(20)]
    for link in links:
        rig.run(Outgoing(link.client, payload(400_000)), Incoming(link.target, limit=400_000))
    assert pipes() == 1
    assert rig.totals().spliced > 0
    rig.relay.trim_pipes()
    assert pipes() == 0
    rig.run(Outgoing(links[0].client, payload(400_000)), Incoming(links[0].target, limit=400_000))
    assert pipes() > 0
    rig.relay.close_all()
    assert pipes() == 0


def test_pipe2_failing_in_mid_stream(rigs, pair):
    """The stream continues by copying, and by splice again later."""
    rig = rigs(*pair)
    link = rig.link()
    data = payload(2_000_000)
    incoming = Incoming(link.target)
    with no_more_fds():
        rig.run(Outgoing(link.client, data), first := Incoming(link.target, limit=len(data)))
    assert first.data == data
    assert rig.totals().spliced == 0
    rig.run(Outgoing(link.client, data, half_close), incoming)
    assert incoming.data == data


def test_pipe_of_a_stuck_stream_is_its_own(rigs):
    """Ten streams are stuck with bytes in their pipes: none gets the bytes of another."""
    rig = rigs("tcp4", "tcp4", target_buffers=SMALL)
    links = [rig.link() for _ in range(10)]
    sent = []
    for number, link in enumerate(links):
        sent.append(rig.fill(link.client, bytes([number]) * 65536, limit=3_000_000))
    for number, link in enumerate(links):
        received = rig.read(link.target, sent[number])
        assert received == bytes([number]) * sent[number]


def test_pipe_of_a_connection_that_dies_is_not_used_again(rigs):
    """Its bytes must not turn up in another stream."""
    rig = rigs("tcp4", "tcp4", target_buffers=SMALL)
    for _ in range(10):
        link = rig.link()
        rig.run(Outgoing(link.client, b"old" * 100_000), Incoming(link.target, limit=300_000))
        rig.fill(link.client, b"old" * 20_000, limit=1_000_000)
        reset(link.target)
        reset(link.client)
        rig.until_ended(link.id)
        other = rig.link()
        data = payload(1_000_000)
        incoming = Incoming(other.target)
        rig.run(Outgoing(other.client, data, close), incoming)
        assert incoming.data == data


@pytest.mark.parametrize("pipe_size", [0, 1, 4096, 65536, 1 << 31, 1 << 40])
def test_any_pipe_size(rigs, pipe_size):
    """A pipe that is too small is not used; if too large a size is asked for, less is granted."""
    rig = rigs("tcp4", "tcp4", pipe_size=pipe_size)
    link = rig.link()
    data = payload(2_000_000)
    incoming = Incoming(link.target)
    rig.run(Outgoing(link.client, data, close), incoming)
    assert incoming.data == data
    assert (rig.totals().spliced > 0) == (pipe_size >= 65536)
