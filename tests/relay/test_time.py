"""Promises that involve time. All scenarios run at once, each in a thread of its own."""

import errno
import time
from concurrent.futures import ThreadPoolExecutor

from kit.rig import MODES
from kit.socket_state import was_reset, write_error
from kit.sockets import is_unix, reset
from kit.stepped import Outgoing, close, half_close, open_client

STUCK_S = 5.0
"""A connection is given up once its queue has not moved for this long."""

LATE_S = 4.0
"""The delay that is still accepted, on a machine that is busy with other things."""

SMALL = {"receive_buffer": 4096}

SCENARIOS = {}
"""{name: (function, arguments)}. The first argument of each function is `rigs`."""


def scenario(*arguments):
    """Register a function as a scenario, once for each tuple of arguments."""

    def register(function):
        for each in arguments or [()]:
            SCENARIOS["-".join([function.__name__, *map(str, each)])] = (function, each)
        return function

    return register


class Clock:
    """Tells the seconds since it was created."""

    def __init__(self):
        self.start = time.monotonic()

    def __call__(self):
        return time.monotonic() - self.start


def patient(rigs, *args, **options):
    """A rig that checks less often, since many of them run at the same time."""
    rig = rigs(*args, **options)
    rig.pace_ms = 20
    return rig


def sides(link, which):
    return (link.client, link.target) if which == "client" else (link.target, link.client)


PAIRS = [("tcp4", "tcp4"), ("tcp4", "unix"), ("unix", "tcp4"), ("unix", "unix")]


@scenario(
    *[("tcp4", "tcp4", way, side) for way in ("splice", "copy") for side in ("client", "target")]
)
def stuck_reader_is_given_up_after_a_reset(rigs, client, target, way, breaker):
    """What the resetting side had sent is never read: in the end, the reader is reset."""
    rig = patient(rigs, client, target, **MODES[way], client_buffers=SMALL, target_buffers=SMALL)
    link = rig.link()
    broken, survivor = sides(link, breaker)
    rig.fill(broken)
    reset(broken)
    clock = Clock()
    rig.until(lambda: rig.ended(link.id), "the end", patience=STUCK_S + LATE_S)
    assert clock() > STUCK_S - 0.5
    assert rig.ended(link.id).ending == "reset"
    assert was_reset(survivor)


@scenario(*[(*pair, way) for pair in PAIRS for way in ("splice", "copy") if pair[1] != "unix"])
def slow_reader_is_not_given_up(rigs, client, target, way):
    """A reader that takes a few bytes now and then gets everything, long after the reset."""
    rig = patient(rigs, client, target, **MODES[way], target_buffers=SMALL)
    link = rig.link()
    rig.fill(link.client)
    reset(link.client)
    clock = Clock()
    taken = 0
    while clock() < STUCK_S + 2:
        rig.pass_time(1)
        assert not was_reset(link.target)
        taken += len(rig.read(link.target, 8192))
    rest, _ = rig.read_to_end(link.target)
    assert len(rest) > 0


@scenario(("tcp4", "unix"), ("unix", "unix"))
def paused_reader_is_not_given_up_after_a_clean_end(rigs, client, target):
    """A UNIX server answers and closes: the answer may be read much later."""
    rig = patient(rigs, client, target, client_buffers=SMALL)
    link = rig.link()
    sent = rig.fill(link.target)
    close(link.target)
    rig.pass_time(STUCK_S + 1.5)
    received, end = rig.read_to_end(link.client)
    assert (len(received), end) == (sent, "eof")


@scenario(*[(*pair, side) for pair in PAIRS for side in ("client", "target")])
def writer_notices_that_its_reader_is_gone(rigs, client, target, leaver):
    """Both sides write until they are stuck, and one closes with unread input. On a direct
    connection the other's next write would fail at once; through the relay, one must soon fail."""
    rig = patient(rigs, client, target)
    link = rig.link()
    gone, stayer = sides(link, leaver)
    rig.fill(gone)
    rig.fill(stayer)
    close(gone)
    rig.until(lambda: write_error(stayer), "a write that fails", patience=STUCK_S + LATE_S)


@scenario(*[(*pair, side) for pair in PAIRS for side in ("client", "target")])
def writer_notices_that_a_polite_reader_is_gone(rigs, client, target, leaver):
    """The same, but the leaver has read everything that had reached it: no error tells, on UNIX."""
    rig = patient(rigs, client, target)
    link = rig.link()
    gone, stayer = sides(link, leaver)
    rig.fill(gone)
    rig.fill(stayer)
    while True:
        try:
            gone.recv(1 << 20)
        except BlockingIOError:
            break
    close(gone)
    upload = Outgoing(stayer, bytes(8 * 1024 * 1024))
    rig.until(
        lambda: (upload.step(), upload.done)[1],
        "an upload that fails or is discarded",
        patience=STUCK_S + LATE_S,
    )


@scenario(("tcp4", "tcp4"), ("unix", "unix"))
def idle_connection_is_closed(rigs, client, target):
    """idle_ms counts from the last byte in either direction; an idle connection ends cleanly."""
    rig = patient(rigs, client, target)
    rig.relay.idle_ms = 2000
    assert rig.relay.idle_ms == 2000
    talking, silent = rig.link(), rig.link()
    clock = Clock()
    while clock() < STUCK_S:
        rig.send(talking.client, b"tick")
        assert rig.read(talking.target, 4) == b"tick"
        rig.pass_time(0.1)
    assert rig.ended(silent.id).ending == "idle"
    assert not rig.ended(talking.id)
    assert rig.read_to_end(silent.client) == (b"", "eof")
    assert rig.read_to_end(silent.target) == (b"", "eof")
    rig.until(lambda: rig.ended(talking.id), "the end of the other one")


@scenario(("tcp4", "tcp4"), ("tcp4", "unix"))
def stalled_connection_counts_as_idle(rigs, client, target):
    """Bytes wait and none moves: closed as well, but by a reset, since bytes are lost."""
    rig = patient(rigs, client, target, target_buffers=SMALL)
    link = rig.link()
    rig.fill(link.client)
    rig.relay.idle_ms = 400
    rig.until(lambda: rig.ended(link.id), "the end")
    assert rig.ended(link.id).ending == "idle"
    assert rig.read_to_end(link.client)[1] == "reset"
    end = rig.read_to_end(link.target)[1]
    assert is_unix(link.target) or end == "reset"


@scenario()
def half_closed_connection_may_be_idle_for_long(rigs):
    """Without idle_ms nothing ends by itself."""
    rig = patient(rigs)
    link = rig.link()
    half_close(link.client)
    rig.pass_time(STUCK_S + 1)
    rig.send(link.target, b"at last")
    assert rig.read(link.client, 7) == b"at last"


@scenario()
def connect_that_takes_too_long_gives_the_client_back(rigs):
    """A TCP target does not answer: its backlog is full, so the kernel drops the SYN."""
    rig = patient(rigs)
    rig.backend.listen(0)
    crowd = [rig.keep(open_client(rig.backend))]
    client, fd = rig.new_client()
    client.send(b"hello")
    clock = Clock()
    rig.connect(fd, timeout_ms=300, listener=7, preamble=b"PROXY ")
    rig.until(rig.failures, "a failed connect", patience=LATE_S)
    failed = rig.failures()[0]
    assert clock() > 0.25
    assert (failed.client, failed.error) == (fd, errno.ETIMEDOUT)
    assert (failed.listener, failed.pending) == (7, b"PROXY ")
    assert crowd


def test_scenarios(rigs):
    """All of them at once; the group of errors names each that fails."""
    failures = []
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        running = {
            name: pool.submit(function, rigs, *arguments)
            for name, (function, arguments) in SCENARIOS.items()
        }
        for name, future in running.items():
            error = future.exception()
            if error is not None:
                error.add_note(f"scenario: {name}")
                failures.append(error)
    if failures:
        raise BaseExceptionGroup("scenarios", failures)
