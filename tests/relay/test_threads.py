"""Stress of a relay with several threads: connections handed over by the hundred, new ones and
those in the middle of a stream, ended from both sides in every way, while the policy counts, asks,
trims, cuts and tears down.

What is asserted is what must hold in every interleaving; what else may go wrong between threads a
thread sanitizer sees (`ci/test thread`). RELAY_CONNECTIONS= makes it longer.
"""

import contextlib
import errno
import gc
import os
import random
import socket
import time

import pytest
from kit.rig import PATIENCE_S
from kit.sockets import FAMILIES, RESETS, open_listener, reset
from kit.stepped import close, half_close, open_client
from kit.traffic import payload

from proxyd._relay import CHECK_TCP, ConnectFailed, Relay, RelayListener, socket_names

CONNECTIONS = int(os.environ.get("RELAY_CONNECTIONS", "400"))
"""How many clients come in one test."""

AT_ONCE = 48
"""How many of them are there at the same time."""

THREADS = 3
"""Beside the boss: more than a small machine has CPUs, so that they interrupt each other."""

LARGE = 300_000
"""Bytes of the longest visit: enough to become a stream, and to be spliced."""

ECHO, CLOSE, RESET = b"E", b"C", b"R"
"""The first byte tells the server what to do: answer all and close, or to leave at once."""


class Peer:
    """A socket that is stepped; `end` tells how it ended."""

    def __init__(self, connection):
        self.socket = connection
        self.rest = memoryview(b"")
        self.end = None

    def step(self):
        """Go as far as it goes."""
        try:
            while self.end is None:
                self.act()
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in (*RESETS, errno.ENOTCONN):  # what shutdown(2) calls a reset
                raise
            self.leave("reset", close)

    def send(self):
        self.rest = self.rest[self.socket.send(self.rest, socket.MSG_NOSIGNAL) :]

    def leave(self, end, how):
        self.end = end
        how(self.socket)


class Visit(Peer):
    """A client. A polite one says all, ends, and hears all of it; others leave when they like, or
    the server does."""

    def __init__(self, door, dice):
        super().__init__(open_client(door))
        server = dice.choice((ECHO, ECHO, ECHO, CLOSE, RESET))
        self.polite = server == ECHO and dice.random() < 0.6
        self.said = server + payload(LARGE)[: dice.choice((0, 99, 5_000, 70_000, LARGE))]
        self.heard = bytearray()
        self.rest = memoryview(self.said)
        self.steps = dice.randrange(12)
        self.end_with = dice.choice((close, reset))

    def step(self):
        """One that is not polite leaves after some steps, whatever it has sent and heard."""
        if not self.polite and self.steps == 0:
            self.leave("left", self.end_with)
        self.steps -= 1
        super().step()

    def act(self):
        if self.rest:
            self.send()
            if self.polite and not self.rest:
                half_close(self.socket)
            return
        chunk = self.socket.recv(1 << 18)
        self.heard += chunk
        if not chunk:
            self.leave("eof", close)

    @property
    def is_well(self):
        return not self.polite or (self.end == "eof" and self.heard == self.said)


class Server(Peer):
    """The other end of a visit."""

    def __init__(self, connection):
        connection.setblocking(False)
        super().__init__(connection)
        self.first = True

    def act(self):
        if self.rest:
            self.send()
            return
        self.rest = memoryview(self.socket.recv(1 << 18))
        if not self.rest:
            self.leave("eof", close)
        elif self.first and self.rest[:1] != ECHO:
            self.leave("left", reset if self.rest[:1] == RESET else close)
        self.first = False


class Fair:
    """A relay with threads of its own, between a door and a backend, and many visits."""

    def __init__(self, directory, pair, *, shares=False, idle_ms=0, is_open=True, **options):
        client, target = pair
        self.relay = Relay(**options)
        self.relay.report_ends = True
        self.relay.idle_ms = idle_ms
        if shares:
            self.relay.offload_when_busy(-1, 0)  # whenever one does not sleep, and another does
        for _ in range(THREADS):
            self.relay.start_worker()
        self.door = open_listener(client, directory, backlog=512, blocking=False)
        self.backend = open_listener(target, directory, backlog=512, blocking=False)
        address = socket_names(self.backend.fileno())[1]
        if not is_open:
            self.backend.close()
        check = 0 if client == "unix" else CHECK_TCP  # asks the table that all threads share
        self.gate = RelayListener(self.relay, self.door.fileno(), FAMILIES[client], check, 0)
        self.gate.auto_connect(address)
        self.gate.start()
        self.dice = random.Random(1)
        self.visits, self.gone, self.servers = [], [], []
        self.failed = 0
        self.turns = 0

    def turn(self):
        """A little of everything, and what the policy may do at any time."""
        self.take_a_step()
        self.relay.ping_workers()
        self.relay.totals()
        self.turns += 1
        if self.turns % 7 == 0:
            self.relay.trim_pipes()

    def take_a_step(self):
        self.take_events()
        self.step_all()

    def take_events(self):
        for event in self.relay.run(0):
            if isinstance(event, ConnectFailed):
                os.close(event.client)
                self.failed += 1

    def step_all(self):
        with contextlib.suppress(OSError):  # nobody more, or nobody serves
            while True:
                self.servers.append(Server(self.backend.accept()[0]))
        for peer in [*self.visits, *self.servers]:
            peer.step()
        self.gone += [visit for visit in self.visits if visit.end]
        self.visits = [visit for visit in self.visits if not visit.end]
        self.servers = [server for server in self.servers if not server.end]

    def receive(self, count):
        """Give turns until `count` clients have come; the last ones are still there."""
        while len(self.gone) + len(self.visits) < count:
            while len(self.visits) < AT_ONCE:
                self.visits.append(Visit(self.door, self.dice))
            self.turn()

    def until(self, condition, what, turn=None):
        deadline = time.monotonic() + 3 * PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, what
            (turn or self.turn)()

    def until_over(self):
        """Everybody has gone, and the relay knows it."""
        self.until(lambda: not self.visits, "visits without an end")
        self.until(lambda: self.relay.connections == 0, "connections without an end")

    def assert_all_counted(self):
        totals = self.relay.totals()
        assert totals.accepted == sum(totals.endings.values()) + self.failed

    def close(self):
        """Whoever is still there sees the end, for nobody is there to keep it from them."""
        self.door.close()
        self.until(lambda: not self.visits, "visits without an end", self.step_all)
        self.backend.close()
        for server in self.servers:
            server.socket.close()


@pytest.fixture(params=["always", "busy"])
def fair(request, tmp_path, rigs):
    """Makes fairs, and closes them; `rigs` looks for fds that are left."""
    fairs = []

    def make(*args, **options):
        fairs.append(Fair(str(tmp_path), *args, shares=request.param == "busy", **options))
        return fairs[-1]

    yield make
    for one in fairs:
        if hasattr(one, "relay"):
            one.gate.stop()
            one.relay.close_all()
            one.take_events()
            del one.gate, one.relay
        one.close()
    fairs.clear()
    gc.collect()


def test_all_are_served_and_counted(fair, pair, way):
    here = fair(pair, **way)
    here.receive(CONNECTIONS)
    here.until_over()
    assert sum(visit.polite for visit in here.gone) > CONNECTIONS / 6
    assert all(visit.is_well for visit in here.gone)
    assert here.relay.totals().accepted == len(here.gone)
    assert here.relay.handed_over > 0
    here.assert_all_counted()


def test_every_thread_answers_while_it_forwards(fair, pair):
    here = fair(pair)
    for _ in range(8):
        here.receive(len(here.gone) + AT_ONCE)  # asks at every turn
        here.until(
            lambda: here.relay.workers_answered, "an answer of every thread", here.take_a_step
        )


@pytest.mark.parametrize("moment", range(5))
def test_all_are_cut_in_the_middle(fair, pair, moment):
    here = fair(pair)
    here.receive(AT_ONCE + 1 + 71 * moment)
    here.gate.stop()
    here.relay.close_all()
    here.take_events()
    assert here.relay.connections == 0
    here.assert_all_counted()


@pytest.mark.parametrize("moment", range(3))
def test_a_relay_is_dropped_in_the_middle(fair, pair, moment):
    here = fair(pair)
    here.receive(AT_ONCE + 1 + 97 * moment)
    here.gate.stop()
    del here.gate, here.relay


def test_a_drain_ends_with_nobody_there(fair, pair):
    """As at SIGTERM with --drain-timeout=: nobody is let in any more, those inside may finish."""
    here = fair(pair)
    here.receive(CONNECTIONS // 2)
    here.gate.stop()
    here.door.close()
    here.until_over()
    here.assert_all_counted()
    assert here.relay.close_all() == 0


@pytest.mark.parametrize("way_out", ["wait", "cut"])
def test_clients_of_a_target_that_refuses_come_back(fair, way_out):
    """Each connect fails in the thread that it was handed to."""
    here = fair(("tcp4", "tcp4"), is_open=False)
    here.receive(CONNECTIONS)
    if way_out == "wait":
        here.until_over()
        assert here.failed > CONNECTIONS / 3  # others had left before
    here.gate.stop()
    here.relay.close_all()
    here.take_events()
    assert here.relay.connections == 0
    here.assert_all_counted()


def test_idle_ones_are_closed_while_others_come(fair, pair):
    here = fair(pair, idle_ms=1)
    here.receive(CONNECTIONS)
    here.until_over()
    here.assert_all_counted()
