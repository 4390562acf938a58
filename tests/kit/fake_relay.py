"""A relay that does what the test says, with a clock that only the test advances."""

import errno
import os
from types import SimpleNamespace

from proxyd import happy_eyeballs
from proxyd._relay import (
    CONNECT_BUCKETS_US,
    ENDINGS,
    AcceptFailed,
    ConnectFailed,
    ConnectionInfo,
    Ended,
    HalfInfo,
    Ready,
    SnapshotRows,
    Terminated,
)

UP = 0
LATER = errno.EINPROGRESS

STAY, GONE, NO_FDS = "stay", "gone", "no fds"
"""The fate of a client in the backlog: served; accepted but already gone; not accepted."""

FIRST_DIALLED = 100_000
"""The number of the first socket of dial(); numbers are never reused."""

RUNS_MAX = 100
"""The number of calls of run() after which time must have passed."""


ROWS_MAX = 64
"""How many rows of a snapshot come in one event."""


class SleepsForeverError(Exception):
    """The policy waits, but nothing will ever happen."""


class Answers:
    """In a plan: dial() succeeds, and connected() returns `error`."""

    def __init__(self, error):
        self.error = error


class FakeListener:
    """Stands in for a RelayListener, and records what it is told."""

    start_error = 0
    """The errno with which start() fails."""

    def __init__(self, relay, fd, family, check, index):
        self.check = check
        self.accepting = False
        self.auto_connects = None
        """(address, timeout in ms) of the last auto_connect()."""
        self.connected_count = 0
        if isinstance(relay, FakeRelay):
            relay.listeners.append(self)

    def start(self):
        if self.start_error:
            raise OSError(self.start_error, "")
        assert not self.accepting
        self.accepting = True

    def stop(self):
        assert self.accepting
        self.accepting = False

    def auto_connect(self, address, timeout_ms=0, upstream=0):
        self.auto_connects = (address, timeout_ms)


class FakeRelay:
    """Stands in for a Relay.

    `plan` maps an address to the outcome of a connect: UP, LATER, the errno with which it fails at
    once, or Answers; or to a function that is given the milliseconds since `start_ms` and returns
    one of these. Without a plan, everything is UP.
    """

    def __init__(self, plan=None, start_ms=0):
        self.plan = plan
        self.start_ms = self.now_ms = self.last_end_ms = start_ms
        # connects
        self.attempts = []
        """(ms since the start, address, timeout) of connect(); for dial() the timeout is None."""
        self.served = []
        """(client, preamble) of each connection."""
        self.ids = {}
        """client → the id of its connection."""
        self.watched = {}
        self.clients = []
        """The clients that dial() was told of, one each time."""
        self.dialled = {}
        """fd → what connected() returns."""
        self.fds = {}
        """address → fds of its dial() calls."""
        self.received = {}
        """fd of dial() → what peek() returns."""
        self.last_id = 0
        self.adopt_error = 0
        self.resets, self.closes = [], []  # sockets to the target
        self.cut, self.let_go = [], []  # clients
        self.discards = []
        self.may_discard = True
        """Whether discard() closes a socket."""
        # the loop
        self.script = []
        """(ms, what to call then, which returns events or None)."""
        self.backlog = []
        self.listeners = []
        self.runs = 0
        self.connections = self.in_quarantine = self.held = self.connections_max = 0
        self.idle_ms = 0
        self.wake_at_count = -1
        self.wake_on_first = False
        self.report_ends = False
        self.report_begins = False
        self.ended = []
        # inspection
        self.infos = []
        """What a snapshot tells; see connection_info()."""
        self.snapshots = 0
        self.missing = 0
        """How many connections a snapshot could not tell of."""
        self.last_new_id = 1000
        self.connects = (0,) * (len(CONNECT_BUCKETS_US) + 1)
        self.connect_us = 0
        self.terminated = []
        self.answers = []
        """Events for the next run()."""
        # totals
        self.accepted = self.refused = self.refused_by_source = 0
        self.source_limits = []
        """The arguments of limit_sources()."""
        self.bytes_to_targets = self.bytes_to_clients = 0
        self.spliced = self.copied = 0
        self.endings = {}
        # threads
        self.thread_count = 1
        self.threads_max = 100
        self.handed_over = 0
        self.stats = []
        """The fds of offload_when_busy()."""
        self.workers_answered = True
        self.pings = 0

    # ── for tests ────────────────────────────────────────────────────────────────────────────

    def replace_functions(self, patch):
        """Put this relay's functions in place of those of the extension."""
        patch.setattr(happy_eyeballs, "connected", self.connected)
        patch.setattr(happy_eyeballs, "peek", self.peek)

    def at(self, ms, *actions):
        """Call each action `ms` after the start, within run()."""
        self.script += [(self.start_ms + ms, action) for action in actions]
        self.script.sort(key=lambda entry: entry[0])

    def ready(self, fd, events):
        """Have the next run() return that `fd` is ready."""
        self.script.insert(0, (self.now_ms, lambda: [Ready(fd, events)]))

    def come(self):
        self.backlog.append(STAY)

    def leave(self):
        self.connections -= 1
        self.last_end_ms = self.now_ms

    @property
    def times(self):
        return [at_ms for at_ms, _, _ in self.attempts]

    @property
    def dials(self):
        return [(at_ms, address) for at_ms, address, _ in self.attempts]

    @property
    def order(self):
        return [address for _, address, _ in self.attempts]

    def times_of(self, address):
        return [at_ms for at_ms, one, _ in self.attempts if one == address]

    def pending(self, address):
        """The sockets for an address that dial() has made and that are still open."""
        return [fd for fd in self.fds.get(address, []) if fd in self.dialled]

    # ── connects ─────────────────────────────────────────────────────────────────────────────

    def connect(
        self,
        client,
        family,
        address,
        preamble=None,
        listener=0,
        timeout_ms=0,
        upstream=0,
        peer=b"",
        connection=0,
    ):
        self.attempts.append((self.now_ms - self.start_ms, address, timeout_ms))
        outcome = self._outcome(address)
        if outcome not in (UP, LATER):
            return ConnectFailed(listener, client, outcome, preamble or b"", self.now_ms, 0, peer)
        return self._connected(client, preamble)

    def dial(self, address, client=b""):
        self.clients.append(client)
        self.attempts.append((self.now_ms - self.start_ms, address, None))
        outcome = self._outcome(address)
        if isinstance(outcome, Answers):
            outcome = outcome.error
        elif outcome not in (UP, LATER):
            raise OSError(outcome, "")
        fd = FIRST_DIALLED + len(self.attempts)
        self.dialled[fd] = outcome
        self.fds.setdefault(address, []).append(fd)
        return fd

    def adopt(self, client, family, fd, preamble=None, error=0, **origin):
        if self.adopt_error:
            raise OSError(self.adopt_error, "")
        del self.dialled[fd]
        return self._connected(client, preamble)

    def hang_up(self, fd, reset=False):
        if fd in self.dialled:
            del self.dialled[fd]
            (self.resets if reset else self.closes).append(fd)
        else:
            self.unwatch(fd)
            (self.cut if reset else self.let_go).append(fd)
            os.close(fd)

    def discard(self, fd):
        self.unwatch(fd)
        self.discards.append(fd)
        if self.may_discard:
            os.close(fd)
        return self.may_discard

    def watch(self, fd, events=1):
        assert fd not in self.watched
        self.watched[fd] = events

    def unwatch(self, fd):
        self.watched.pop(fd, None)

    def connected(self, fd):
        """Stands in for the function of proxyd._relay."""
        return self.dialled[fd]

    def peek(self, fd):
        """Stands in for the function of proxyd._relay."""
        return self.received.get(fd, -errno.EAGAIN)

    def _outcome(self, address):
        outcome = UP if self.plan is None else self.plan[address]
        return outcome(self.now_ms - self.start_ms) if callable(outcome) else outcome

    def _connected(self, client, preamble):
        self.last_id += 1
        self.connections += 1
        self.served.append((client, preamble or b""))
        self.ids[client] = self.last_id
        return self.last_id

    # ── the loop ─────────────────────────────────────────────────────────────────────────────

    def run(self, timeout_ms=-1):
        until_ms = self.now_ms + timeout_ms if timeout_ms >= 0 else None
        began_ms = self.now_ms
        while True:
            before = self.connections
            events = self._turn(until_ms)
            if events or before > self.wake_at_count >= self.connections:
                break
            if self.wake_on_first and before == 0 and self.connections > 0:
                break
            if until_ms is not None and self.now_ms >= until_ms:
                break
        self.runs = self.runs + 1 if self.now_ms == began_ms else 0
        assert self.runs < RUNS_MAX, "it spins"
        return events

    def _turn(self, until_ms):
        if self.answers:
            answers, self.answers = self.answers, []
            return answers
        while self.script and self.script[0][0] <= self.now_ms:
            before = self.connections
            events = self.script.pop(0)[1]()
            if events or self.connections != before:
                return events or []
        if self.backlog and any(listener.accepting for listener in self.listeners):
            return self._accept()
        if self.script and (until_ms is None or self.script[0][0] <= until_ms):
            self.now_ms = self.script[0][0]
            return []
        if until_ms is None:
            raise SleepsForeverError
        self.now_ms = until_ms
        ended, self.ended = self.ended, []
        return ended

    def _accept(self):
        if self.backlog[0] == NO_FDS:
            return [AcceptFailed(0, errno.EMFILE)]
        self.accepted += 1
        if self.backlog.pop(0) == STAY:
            self.connections += 1
        else:
            self.last_end_ms = self.now_ms
        return []

    def close_all(self):
        cut, self.connections = self.connections, 0
        if self.report_ends:
            self.ended += [Ended(1, "cut", 5, 6, 70, 0, 0)] * cut
        return cut

    def totals(self):
        return SimpleNamespace(
            accepted=self.accepted,
            refused=self.refused,
            bytes_to_targets=self.bytes_to_targets,
            bytes_to_clients=self.bytes_to_clients,
            spliced=self.spliced,
            copied=self.copied,
            endings=dict.fromkeys(ENDINGS, 0) | self.endings,
        )

    def take_over(self, fd, family):
        pass

    def trim_pipes(self):
        pass

    def expects_header(self, peer):
        return False

    def count_again(self, client, peer):
        pass

    def limit_sources(self, places_max, nobody=-1):
        self.source_limits.append((places_max, nobody))

    # ── inspection ───────────────────────────────────────────────────────────────────────────

    def new_id(self):
        self.last_new_id += 1
        return self.last_new_id

    def start_snapshot(self, rows=True):
        self.snapshots += 1
        infos = list(self.infos) if rows else []
        while len(infos) > ROWS_MAX:
            self._tell_rows(infos[:ROWS_MAX], last=False)
            del infos[:ROWS_MAX]
        self._tell_rows(infos, last=True)
        return self.snapshots

    def _tell_rows(self, rows, last):
        missing = self.missing if last else 0
        self.answers.append(SnapshotRows(self.snapshots, rows, last, missing))

    def terminate(self, connection):
        found = any(info.connection == connection for info in self.infos)
        self.terminated.append(connection)
        self.answers.append(Terminated(connection, found))

    def add_upstream(self, upstream):
        pass

    def target_totals(self, upstream):
        return SimpleNamespace(
            bytes_to_target=self.bytes_to_targets,
            bytes_to_clients=self.bytes_to_clients,
            endings=dict.fromkeys(ENDINGS, 0) | self.endings,
            connects=self.connects,
            connect_us=self.connect_us,
        )

    # ── threads ──────────────────────────────────────────────────────────────────────────────

    def offload_when_busy(self, stat, **rules):
        self.stats.append(stat)
        self.rules = rules

    def start_worker(self):
        if self.thread_count == self.threads_max:
            raise OSError(errno.EAGAIN, "")
        self.thread_count += 1

    def ping_workers(self):
        self.pings += 1


def connection_info(connection, **fields):
    """What the relay tells about a connection."""
    usual = {
        "state": "open",
        "listener": 0,
        "upstream": 0,
        "client": b"",
        "client_pid": 0,
        "target": b"",
        "local": b"",
        "opened_ms": 0,
        "active_ms": 0,
        "held_ms": 0,
        "connect_us": -1,
        "up": HalfInfo(0, 0, "flowing"),
        "down": HalfInfo(0, 0, "flowing"),
        "thread": 0,
    }
    assert fields.keys() <= usual.keys()
    return ConnectionInfo(connection, **usual | fields)
