"""Which system calls the relay makes. The source is filled before the relay has its turn, so that
scheduling cannot change them: a regression shows without measuring time.

Each scenario runs under strace as a program of its own; the calls of its `watched()` turns are
compared.
"""

import functools
import itertools
import re
import sys
import tempfile

import pytest
from kit.rig import Rigs
from kit.rights import kernel_refuses
from kit.stepped import accept, close, open_client
from kit.traced import names, tracer, watched
from kit.traffic import payload

from proxyd._relay import CHECK_TCP, RelayListener

STREAM = 16 << 20


# ── the scenarios, in the program that is traced ─────────────────────────────────────────────────


def message(rigs, *pair):
    """One message, which waits; and another turn, in which nothing is left to do."""
    link = warm(rigs(*pair))
    link.client.send(b"x" * 64)
    watched(link.rig)
    assert link.target.recv(100) == b"x" * 64
    watched(link.rig)


def many_messages(rigs, *pair):
    """One message on each of 20 connections; all of them wait."""
    rig = rigs(*pair)
    for link in [warm(rig) for _ in range(20)]:
        link.client.send(b"x" * 64)
    watched(rig)


def stream(rigs, *pair):
    """A stream whose source is filled before each turn and whose sink is emptied after it."""
    link = warm(rigs(*pair))
    left = STREAM
    while left:
        left -= feed(link, payload(STREAM)[:left])
        watched(link.rig)
        drain(link)


def stalled(rigs, *pair):
    """A stream whose reader stalls, and then continues."""
    link = warm(rigs(*pair))
    for _ in range(30):
        feed(link, payload(STREAM))
        watched(link.rig)
    for _ in range(30):
        drain(link)
        watched(link.rig)


def short_connection(rigs, *pair):
    """Connect, a word in each direction, close; the listener connects automatically."""
    rig = rigs(*pair)
    rig.relay.report_ends = False
    rig.listener.stop()
    fd, family = rig.listen_socket.fileno(), rig.listen_socket.family
    listener = RelayListener(rig.relay, fd, family, CHECK_TCP, 0)
    listener.start()
    listener.auto_connect(rig.address)
    client = open_client(rig.listen_socket)
    client.send(b"ping")
    watched(rig)
    target = accept(rig.backend)
    assert target.recv(10) == b"ping"
    target.send(b"pong")
    watched(rig)
    close(target)
    watched(rig)
    assert client.recv(10) == b"pong"
    close(client)
    watched(rig)
    listener.stop()
    assert rig.relay.connections == 0


class Warm:
    """A connection that has carried bytes in both directions."""

    def __init__(self, rig):
        self.rig = rig
        link = rig.link()
        self.client, self.target = link.client, link.target
        for one, other in ((self.client, self.target), (self.target, self.client)):
            one.send(b"hello")
            assert rig.read(other, 5) == b"hello"
        rig.settle()


def warm(rig):
    return Warm(rig)


def feed(link, data):
    try:
        return link.client.send(data)
    except BlockingIOError:
        return 0


def drain(link):
    try:
        while link.target.recv(1 << 20):
            pass
    except BlockingIOError:
        pass


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        message,
        many_messages,
        stream,
        stalled,
        short_connection,
    )
}


def play(name, client, target, *options):
    with tempfile.TemporaryDirectory() as folder:
        rigs = Rigs(folder)
        make = functools.partial(rigs, may_refuse=False) if "older" in options else rigs
        SCENARIOS[name](make, client, target)
        rigs.close()


# ── the trace ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def calls(tmp_path):
    """Runs a scenario; returns a list of calls for each of its watched turns."""
    return tracer("relay.test_calls", tmp_path)


needs_refusal = pytest.mark.skipif(not kernel_refuses(), reason="SO_PASSRIGHTS: Linux 6.16")

PAIRS = pytest.mark.parametrize(
    "pair", [("tcp4", "tcp4"), ("tcp4", "unix"), ("unix", "tcp4"), ("unix", "unix")], ids="-".join
)


def recv_of(pair):
    """A UNIX socket is read by recvmsg, which tells whether descriptors cut a read short."""
    return "recvmsg" if pair[0] == "unix" else "recvfrom"


@PAIRS
def test_three_calls_for_a_message_and_none_to_see_that_it_was_the_last(calls, pair):
    """A short read tells that the socket is empty."""
    first, second = calls("message", pair)
    assert names(first) == ["epoll_wait", recv_of(pair), "sendto"]
    assert names(second) == ["epoll_wait"]
    assert second[0].result == 0


@PAIRS
def test_one_more_read_from_a_unix_socket_that_cannot_refuse_descriptors(calls, pair):
    first, second = calls("message", pair, "older")
    assert names(first) == ["epoll_wait", *CAREFUL_READ[pair[0]], "sendto"]
    assert names(second) == ["epoll_wait"]


@PAIRS
def test_one_wait_for_many_messages(calls, pair):
    (turn,) = calls("many_messages", pair)
    assert names(turn) == ["epoll_wait", *[recv_of(pair), "sendto"] * 20]


@PAIRS
def test_a_running_stream_is_only_moved(calls, pair):
    """No epoll_ctl, no pipe made or closed: only calls that wait or move bytes."""
    turns = calls("stream", pair)
    runs = "splice" if pair != ("unix", "tcp4") else "recvmsg"
    begins = next(number for number, turn in enumerate(turns) if runs in names(turn))
    # One more turn, in which the destination may be full for the first time.
    found = list(itertools.chain(*turns[begins + 2 :]))
    assert set(names(found)) <= {"epoll_wait", "splice", "recvmsg", "recvfrom", "sendto"}
    moved = sum(max(call.result, 0) for call in found if call.name != "epoll_wait")
    assert moved > STREAM // 16


@PAIRS
@pytest.mark.parametrize("scenario", ["stream", "stalled"])
def test_only_an_empty_pipe_is_filled(calls, pair, scenario):
    """And it is emptied by asking for exactly what is inside; never with SPLICE_F_MORE."""
    filled = {}
    for call in itertools.chain(*calls(scenario, pair)):
        if call.name == "pipe2":
            reader, writer = re.findall(r"\d+", " ".join(call.arguments[:2]))
            filled[reader] = 0
            pipes = {writer: reader}
        if call.name != "splice":
            continue
        source, _, to, _, size, flags = call.arguments
        assert "SPLICE_F_MORE" not in flags
        assert "SPLICE_F_NONBLOCK" in flags
        if source in filled:
            assert int(size) == filled[source]
            filled[source] -= max(call.result, 0)
        else:
            assert filled[pipes[to]] == 0, "a pipe was filled that was not empty"
            filled[pipes[to]] = max(call.result, 0)
    assert filled or pair == ("unix", "tcp4")  # which is copied


@PAIRS
def test_a_stalled_reader_costs_nothing_but_waits(calls, pair):
    """At most one epoll_ctl, when the socket is full for the first time, and one pipe."""
    turns = calls("stalled", pair)
    found = names(itertools.chain(*turns))
    assert found.count("epoll_ctl") <= 1
    assert found.count("pipe2") <= 1
    assert [names(turn) for turn in turns[20:30]] == [["epoll_wait"]] * 10


# fcntl: is the listener still non-blocking? setsockopt: SO_LINGER, so that a kill is a reset.
ACCEPT = {"tcp4": ["fcntl", "accept4", "setsockopt"], "unix": ["fcntl", "accept4"]}
TO = {
    # SO_OOBINLINE, SO_KEEPALIVE, TCP_NODELAY, SO_LINGER; and the local address, to recognise loops.
    "tcp4": ["socket", *["setsockopt"] * 4, "connect", "getsockname"],
    # SO_OOBINLINE, SO_PASSRIGHTS.
    "unix": ["socket", *["setsockopt"] * 2, "connect"],
}
FROM = {"tcp4": [], "unix": ["setsockopt"] * 2}  # TCP inherits these options from its listener
READ = {"tcp4": ["recvfrom"], "unix": ["recvmsg"]}
CAREFUL_READ = {"tcp4": ["recvfrom"], "unix": ["recvmsg", "recvfrom"]}
"""A client may have sent descriptors before it was accepted: its queue is inspected first."""


@needs_refusal
@PAIRS
def test_the_calls_of_a_short_connection(calls, pair):
    """All of them, in order."""
    client, target = pair
    clean = {"tcp4": ["setsockopt"], "unix": []}  # SO_LINGER off: the end is not to cut anything
    opened, answered, ended, closed = calls("short_connection", pair)
    begun = [*ACCEPT[client], *TO[target], *FROM[client], *CAREFUL_READ[client], "sendto"]
    begun += ["epoll_ctl"] * 2
    assert names(opened) == ["epoll_wait", *begun]
    assert names(answered) == ["epoll_wait", *READ[target], "sendto"]
    gone = ["epoll_ctl", "close"]
    if target == "tcp4":  # perhaps it has only half-closed
        assert names(ended) == ["epoll_wait", *READ[target], *clean[client], "shutdown"]
        assert names(closed) == ["epoll_wait", *READ[client], *clean[target], *gone, *gone]
    elif client == "tcp4":  # its send queue is checked; it closes before that is empty
        ending = [*clean[client], "shutdown", *gone, "ioctl"]
        assert names(ended) == ["epoll_wait", *READ[target], *ending]
        assert names(closed) == ["epoll_wait", *READ[client], *gone]
    else:  # what is unread is read before the socket is closed
        assert names(ended) == ["epoll_wait", *READ[target], *gone, *READ[client], *gone]
        assert names(closed) == ["epoll_wait"]


if __name__ == "__main__":
    play(*sys.argv[1:])
