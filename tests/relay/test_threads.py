"""Stress tests of a relay with several workers. Hundreds of connections are handed over, new ones
and those in the middle of a stream; both sides end them in every way, while the policy reads the
counters, pings the workers, trims pipes, cuts connections and drops the relay.

The assertions hold in every interleaving; the thread sanitizer (`ci/test thread`) sees what else
goes wrong between threads. RELAY_CONNECTIONS= makes the tests longer.
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
"""The number of clients in one test."""

AT_ONCE = 48
"""How many of them are connected at the same time."""

WORKERS = 3
"""Besides the main one: more than a small machine has CPUs, so that they preempt each other."""

LARGE = 300_000
"""The most bytes that a client sends: enough to become a stream, and to be spliced."""

ECHO, CLOSE, RESET = b"E", b"C", b"R"
"""A client's first byte tells the server to echo everything and then close, or to leave at once."""


class Peer:
    """One end of a connection, moved step by step; `end` tells how it ended."""

    def __init__(self, connection):
        self.socket = connection
        self.rest = memoryview(b"")
        self.end = None

    def step(self):
        """Go on until the socket would block."""
        try:
            while self.end is None:
                self.act()
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in (*RESETS, errno.ENOTCONN):  # shutdown(2) after a reset
                raise
            self.leave("reset", close)

    def send(self):
        self.rest = self.rest[self.socket.send(self.rest, socket.MSG_NOSIGNAL) :]

    def leave(self, end, how):
        self.end = end
        how(self.socket)


class StressClient(Peer):
    """A client. A polite one sends everything, half-closes, and reads the whole echo. Any other one
    leaves at a random step, unless the server leaves first."""

    def __init__(self, listen_socket, dice):
        super().__init__(open_client(listen_socket))
        server = dice.choice((ECHO, ECHO, ECHO, CLOSE, RESET))
        self.polite = server == ECHO and dice.random() < 0.6
        self.said = server + payload(LARGE)[: dice.choice((0, 99, 5_000, 70_000, LARGE))]
        self.heard = bytearray()
        self.rest = memoryview(self.said)
        self.steps = dice.randrange(12)
        self.end_with = dice.choice((close, reset))

    def step(self):
        """Move on; one that is not polite leaves after some steps, whatever it has sent or read."""
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
    """The server's end of a connection."""

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


class Stress:
    """A relay with several workers, its listener, a backend, and many clients."""

    def __init__(self, directory, pair, *, offloads=False, idle_ms=0, listens=True, **options):
        client, target = pair
        self.relay = Relay(**options)
        self.relay.report_ends = True
        self.relay.idle_ms = idle_ms
        if offloads:
            self.relay.offload_when_busy(-1, 0)  # whenever one worker is busy and another is not
        for _ in range(WORKERS):
            self.relay.start_worker()
        self.listen_socket = open_listener(client, directory, backlog=512)
        self.listen_socket.setblocking(False)  # as the policy does
        self.backend = open_listener(target, directory, backlog=512)
        self.backend.setblocking(False)
        address = socket_names(self.backend.fileno())[1]
        if not listens:
            self.backend.close()
        check = 0 if client == "unix" else CHECK_TCP  # reads the table that all workers share
        self.listener = RelayListener(
            self.relay, self.listen_socket.fileno(), FAMILIES[client], check, 0
        )
        self.listener.auto_connect(address)
        self.listener.start()
        self.dice = random.Random(1)
        self.clients, self.done, self.servers = [], [], []
        self.failed = 0
        self.turns = 0

    def turn(self):
        """One step of everything, and what the policy may do at any time."""
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
        with contextlib.suppress(OSError):  # the backlog is empty, or the backend does not listen
            while True:
                self.servers.append(Server(self.backend.accept()[0]))
        for peer in [*self.clients, *self.servers]:
            peer.step()
        self.done += [client for client in self.clients if client.end]
        self.clients = [client for client in self.clients if not client.end]
        self.servers = [server for server in self.servers if not server.end]

    def receive(self, count):
        """Run turns until `count` clients have come; the last ones are still connected."""
        while len(self.done) + len(self.clients) < count:
            while len(self.clients) < AT_ONCE:
                self.clients.append(StressClient(self.listen_socket, self.dice))
            self.turn()

    def until(self, condition, what, turn=None):
        deadline = time.monotonic() + 3 * PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, what
            (turn or self.turn)()

    def until_over(self):
        """Run turns until all clients have left, and the relay knows it."""
        self.until(lambda: not self.clients, "clients without an end")
        self.until(lambda: self.relay.connections == 0, "connections without an end")

    def assert_all_counted(self):
        totals = self.relay.totals()
        assert totals.accepted == sum(totals.endings.values()) + self.failed

    def close(self):
        """Close the sockets. The relay is gone, so every remaining client sees its end."""
        self.listen_socket.close()
        self.until(lambda: not self.clients, "clients without an end", self.step_all)
        self.backend.close()
        for server in self.servers:
            server.socket.close()


@pytest.fixture(params=["always", "busy"])
def stress(request, tmp_path, rigs):
    """Makes Stress objects, and closes them; `rigs` checks that no fd is left open."""
    made = []

    def make(*args, **options):
        made.append(Stress(str(tmp_path), *args, offloads=request.param == "busy", **options))
        return made[-1]

    yield make
    for one in made:
        if hasattr(one, "relay"):
            one.listener.stop()
            one.relay.close_all()
            one.take_events()
            del one.listener, one.relay
        one.close()
    made.clear()
    gc.collect()


def test_all_are_served_and_counted(stress, pair, way):
    run = stress(pair, **way)
    run.receive(CONNECTIONS)
    run.until_over()
    assert sum(client.polite for client in run.done) > CONNECTIONS / 6
    assert all(client.is_well for client in run.done)
    assert run.relay.totals().accepted == len(run.done)
    assert run.relay.handed_over > 0
    run.assert_all_counted()


def test_every_worker_answers_while_it_forwards(stress, pair):
    run = stress(pair)
    for _ in range(8):
        run.receive(len(run.done) + AT_ONCE)  # pings at every turn
        run.until(lambda: run.relay.workers_answered, "an answer of every worker", run.take_a_step)


@pytest.mark.parametrize("moment", range(5))
def test_all_are_cut_in_the_middle(stress, pair, moment):
    run = stress(pair)
    run.receive(AT_ONCE + 1 + 71 * moment)
    run.listener.stop()
    run.relay.close_all()
    run.take_events()
    assert run.relay.connections == 0
    run.assert_all_counted()


@pytest.mark.parametrize("moment", range(3))
def test_a_relay_is_dropped_in_the_middle(stress, pair, moment):
    run = stress(pair)
    run.receive(AT_ONCE + 1 + 97 * moment)
    run.listener.stop()
    del run.listener, run.relay


def test_a_drain_ends_when_the_last_client_has_left(stress, pair):
    """SIGTERM with --drain-timeout=: no new client is accepted, the others may finish."""
    run = stress(pair)
    run.receive(CONNECTIONS // 2)
    run.listener.stop()
    run.listen_socket.close()
    run.until_over()
    run.assert_all_counted()
    assert run.relay.close_all() == 0


@pytest.mark.parametrize("way_out", ["wait", "cut"])
def test_clients_of_a_target_that_refuses_come_back(stress, way_out):
    """Each connect fails in the worker that it was handed to."""
    run = stress(("tcp4", "tcp4"), listens=False)
    run.receive(CONNECTIONS)
    if way_out == "wait":
        run.until_over()
        assert run.failed > CONNECTIONS / 3  # the others had left before
    run.listener.stop()
    run.relay.close_all()
    run.take_events()
    assert run.relay.connections == 0
    run.assert_all_counted()


def test_idle_connections_are_closed_while_clients_come(stress, pair):
    run = stress(pair, idle_ms=1)
    run.receive(CONNECTIONS)
    run.until_over()
    run.assert_all_counted()
