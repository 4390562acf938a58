"""Which system calls the relay makes, where no scheduling can change them: the source is filled
before the relay has its turn. So a step backwards is caught without a clock.

Each scenario runs as a program of its own under strace; what it does in `watched()` turns is looked
at.
"""

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from kit.rig import Rigs
from kit.rights import kernel_refuses
from kit.stepped import accept, close, open_client
from kit.traffic import payload

from proxyd._relay import CHECK_TCP, RelayListener

TESTS = Path(__file__).parent.parent
BEGIN, END = "/begin", "/end"
STREAM = 16 << 20


# ── the scenarios, in the program that is traced ─────────────────────────────────────────────────


def watched(rig):
    """Give the relay a turn, between two marks in the trace."""
    os.access(BEGIN, os.F_OK)
    rig.turn()
    os.access(END, os.F_OK)


def message(rigs, *pair):
    """One message, waiting; and a turn more, in which nothing is left to do."""
    link = warm(rigs(*pair))
    link.client.send(b"x" * 64)
    watched(link.rig)
    assert link.target.recv(100) == b"x" * 64
    watched(link.rig)


def many_messages(rigs, *pair):
    """One message on each of 20 connections, waiting."""
    rig = rigs(*pair)
    for link in [warm(rig) for _ in range(20)]:
        link.client.send(b"x" * 64)
    watched(rig)


def stream(rigs, *pair):
    """A stream, its buffers filled before each turn and emptied after it."""
    link = warm(rigs(*pair))
    left = STREAM
    while left:
        left -= feed(link, payload(STREAM)[:left])
        watched(link.rig)
        drain(link)


def stalled(rigs, *pair):
    """A stream whose reader stalls, and then reads on."""
    link = warm(rigs(*pair))
    for _ in range(30):
        feed(link, payload(STREAM))
        watched(link.rig)
    for _ in range(30):
        drain(link)
        watched(link.rig)


def short_connection(rigs, *pair):
    """Connect, a word each way, close: as a gate on express terms does it all."""
    rig = rigs(*pair)
    rig.relay.report_ends = False
    rig.gate.stop()
    gate = RelayListener(rig.relay, rig.door.fileno(), rig.door.family, CHECK_TCP, 0)
    gate.start()
    gate.auto_connect(rig.address)
    client = open_client(rig.door)
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
    gate.stop()
    assert rig.relay.connections == 0


class Warm:
    """A connection over which something has gone both ways."""

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

CALL = re.compile(r"^(\w+)\((.*)\)\s+= (-?\d+)", re.MULTILINE)


class Call:
    def __init__(self, name, arguments, result):
        self.name = {"epoll_pwait": "epoll_wait"}.get(name, name)
        self.arguments = arguments.split(", ")
        self.result = int(result)

    def __repr__(self):
        return f"{self.name}({', '.join(self.arguments)}) = {self.result}"


@pytest.fixture
def calls(tmp_path):
    """Plays a scenario; a list of calls for each of its watched turns."""
    if not shutil.which("strace"):
        pytest.skip("SKIPPED LOUDLY: no strace here")
    probe = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"SKIPPED LOUDLY: strace may not trace here: {probe.stderr.decode()[-200:]}")

    def trace(scenario, pair, *options):
        out = tmp_path / "trace"
        command = [sys.executable, str(TESTS), "relay.test_calls", scenario, *pair, *options]
        strace = ["strace", "-o", str(out), "-s", "8", "-e", "signal=none"]
        done = subprocess.run(
            [*strace, *command], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        turns = re.findall(rf'{BEGIN}".*\n((?s:.*?)).*"{END}"', out.read_text())
        return [[Call(*call) for call in CALL.findall(turn)] for turn in turns]

    return trace


def names(found):
    return [call.name for call in found]


needs_refusal = pytest.mark.skipif(not kernel_refuses(), reason="SO_PASSRIGHTS: Linux 6.16")

PAIRS = pytest.mark.parametrize(
    "pair", [("tcp4", "tcp4"), ("tcp4", "unix"), ("unix", "tcp4"), ("unix", "unix")], ids="-".join
)


def recv_of(pair):
    """A UNIX socket is read by recvmsg, which tells whether fds have cut a read short."""
    return "recvmsg" if pair[0] == "unix" else "recvfrom"


@PAIRS
def test_three_calls_for_a_message_and_none_to_see_that_it_was_the_last(calls, pair):
    """A short read says that nothing more is there."""
    first, second = calls("message", pair)
    assert names(first) == ["epoll_wait", recv_of(pair), "sendto"]
    assert names(second) == ["epoll_wait"]
    assert second[0].result == 0


@PAIRS
def test_a_look_more_for_a_message_from_a_unix_socket_that_cannot_refuse_descriptors(calls, pair):
    first, second = calls("message", pair, "older")
    assert names(first) == ["epoll_wait", *CARE[pair[0]], "sendto"]
    assert names(second) == ["epoll_wait"]


@PAIRS
def test_one_wait_for_many_messages(calls, pair):
    (turn,) = calls("many_messages", pair)
    assert names(turn) == ["epoll_wait", *[recv_of(pair), "sendto"] * 20]


@PAIRS
def test_a_stream_needs_nothing_but_to_be_moved(calls, pair):
    """Once it runs: no epoll_ctl, no pipe made or closed. Waits, and bytes."""
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
    """And emptied asking for exactly what is inside; never with SPLICE_F_MORE."""
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
def test_a_stalled_reader_costs_waits_alone(calls, pair):
    """One epoll_ctl at most, when the socket is full for the first time, and one pipe."""
    turns = calls("stalled", pair)
    found = names(itertools.chain(*turns))
    assert found.count("epoll_ctl") <= 1
    assert found.count("pipe2") <= 1
    assert [names(turn) for turn in turns[20:30]] == [["epoll_wait"]] * 10


# Is the listener still non-blocking? A TCP client must not have its SO_LINGER.
ACCEPT = {"tcp4": ["fcntl", "accept4", "setsockopt"], "unix": ["fcntl", "accept4"]}
TO = {
    # Urgent bytes inline, keepalive, no delay; and our own address, to recognise loops.
    "tcp4": ["socket", *["setsockopt"] * 3, "connect", "getsockname"],
    # Urgent bytes inline, no descriptors.
    "unix": ["socket", *["setsockopt"] * 2, "connect"],
}
FROM = {"tcp4": [], "unix": ["setsockopt"] * 2}  # what TCP inherits from its listener
READ = {"tcp4": ["recvfrom"], "unix": ["recvmsg"]}
CARE = {"tcp4": ["recvfrom"], "unix": ["recvmsg", "recvfrom"]}
"""Of a client that may have sent descriptors before it was accepted: a look first."""


@needs_refusal
@PAIRS
def test_the_calls_of_a_short_connection(calls, pair):
    """All of them, in order."""
    client, target = pair
    opened, answered, ended, closed = calls("short_connection", pair)
    begun = [*ACCEPT[client], *TO[target], *FROM[client], *CARE[client], "sendto"]
    begun += ["epoll_ctl"] * 2
    assert names(opened) == ["epoll_wait", *begun]
    assert names(answered) == ["epoll_wait", *READ[target], "sendto"]
    gone = ["epoll_ctl", "close"]
    if target == "tcp4":  # it may only have half-closed
        assert names(ended) == ["epoll_wait", *READ[target], "shutdown"]
        assert names(closed) == ["epoll_wait", *READ[client], *gone, *gone]
    elif client == "tcp4":  # its queue is looked at; it closes before that is empty
        assert names(ended) == ["epoll_wait", *READ[target], "shutdown", *gone, "ioctl"]
        assert names(closed) == ["epoll_wait", *READ[client], *gone]
    else:  # what is unread in it is read before it is closed
        assert names(ended) == ["epoll_wait", *READ[target], *gone, *READ[client], *gone]
        assert names(closed) == ["epoll_wait"]


if __name__ == "__main__":
    play(*sys.argv[1:])
