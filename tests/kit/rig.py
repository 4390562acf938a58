"""A relay between a listener and a backend of the test's own, stepped by the test.

One thread does everything: a test acts for both peers and gives the relay its turns. So nothing
depends on scheduling, and a test waits for a state by giving turns until it is there.
"""

import contextlib
import gc
import os
import select
import socket
import threading
import time
from typing import NamedTuple

from kit.socket_state import set_option
from kit.sockets import FAMILIES, open_listener
from kit.stepped import Incoming, Outgoing, accept, open_client
from proxyd._relay import ACCEPTED, ENDED, FAILED, Gate, Relay, socket_names, tune

PATIENCE_S = float(os.environ.get("RELAY_PATIENCE", "20"))
"""How long a state may take that must come; less is convenient where much is known to fail."""

MODES = {
    "splice": {},
    "copy": {"may_splice": False},
    "small splice": {"stream_unit": 64 * 1024, "pipe_size": 64 * 1024},
    "small copy": {"stream_unit": 64 * 1024, "may_splice": False},
}
"""How a relay may move bytes; the small ones meet a full pipe or buffer much sooner."""

HOW = ("ended", "reset", "idle", "cut", "gone")
"""How a connection ended, by the number in its ENDED event."""

MAKING = threading.Lock()
"""Held while a relay is made, to find out which fd is its epoll instance."""

QUIET_TURNS = 3
"""Turns without a pending event until nothing is left to do; a pump that had spent its budget goes
on without an event."""


def open_fds():
    """The fds of this process; not that of the listing itself, which is closed by then."""
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


def epoll_fds():
    """The epoll instances of this process."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if "eventpoll" in os.readlink(f"/proc/self/fd/{fd}"):
                found.add(int(fd))
    return found


class Counters(NamedTuple):
    """What Relay.counters() returns, with names."""

    accepted: int
    refused: int
    to_targets: int
    to_clients: int
    spliced: int
    copied: int
    ends: tuple


class Link:
    """One connection through the relay, seen from its two ends, which are the test's."""

    def __init__(self, client, target, number, client_fd, target_fd=-1):
        self.client = client
        self.target = target
        self.id = number
        self.client_fd = client_fd
        """The relay's end of the client's connection, to look at."""
        self.target_fd = target_fd
        """The relay's end of the target's connection, where the test has dialled it."""


class Rig:
    """A relay, a listener whose clients it serves, and a backend for its targets."""

    def __init__(
        self,
        directory,
        client="tcp4",
        target="tcp4",
        *,
        client_buffers=None,
        target_buffers=None,
        **options,
    ):
        self.client_family = client
        self.target_family = target
        self.client_buffers = client_buffers or {}
        self.target_buffers = target_buffers or {}
        with MAKING:
            before = epoll_fds()
            self.relay = Relay(**options)
            (self.epoll,) = epoll_fds() - before
        self.relay.report_ends = True
        self.pace_ms = 1
        """How long until() sleeps between two looks, at most."""
        self.events = []
        self.sockets = []
        self.door = self.keep(open_listener(client, directory))
        self.door.setblocking(False)  # the policy has made it so
        tune(self.door.fileno(), FAMILIES[client])
        self.gate = Gate(self.relay, self.door.fileno(), FAMILIES[client], 0, 0)
        self.gate.open()
        self.backend = self.keep(
            open_listener(
                target, directory, receive_buffer=self.target_buffers.get("receive_buffer")
            )
        )
        self.address = socket_names(self.backend.fileno())[1]

    def keep(self, connection):
        """Have a socket closed with the rig."""
        self.sockets.append(connection)
        return connection

    def close(self):
        """Close everything, the relay's connections included."""
        self.gate.shut()
        self.relay.close_all()
        self.turn()
        for event in self.events:
            if event[0] in (FAILED, ACCEPTED):
                with contextlib.suppress(OSError):
                    os.close(event[1])
        del self.relay, self.gate
        for connection in self.sockets:
            connection.close()

    # ── connections ──────────────────────────────────────────────────────────────────────────

    def knock(self):
        """A client's socket, and the fd with which it was accepted: the caller owns the fd."""
        client = self.keep(open_client(self.door, **self.client_buffers))
        return client, self.take_client()

    def take_client(self):
        """Accept whoever waits at the door; the caller owns the fd."""
        self.until(lambda: self.of_kind(ACCEPTED), "a client")
        event = self.of_kind(ACCEPTED)[0]
        self.events.remove(event)
        return event[1]

    def connect(self, fd, **options):
        """Hand an accepted client over; the connection's id."""
        return self.relay.connect(fd, FAMILIES[self.client_family], self.address, **options)

    def meet(self):
        """The backend's end of the oldest connection that it has not accepted yet."""
        found = []

        def accepted():
            with contextlib.suppress(BlockingIOError):
                found.append(
                    accept(self.backend, send_buffer=self.target_buffers.get("send_buffer"))
                )
            return bool(found)

        self.until(accepted, "a connection to the backend")
        return self.keep(found[0])

    def link(self, **options):
        """A connection through the relay, both ends there."""
        client, fd = self.knock()
        number = self.connect(fd, **options)
        return Link(client, self.meet(), number, fd)

    def adopted(self, *, send_buffer=None, preamble=None):
        """As link(), by dial() and adopt(); the relay's socket has that send buffer."""
        client, fd = self.knock()
        target = self.relay.dial(self.address)
        if send_buffer:
            set_option(target, socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        far = self.meet()
        number = self.relay.adopt(fd, FAMILIES[self.client_family], target, preamble)
        return Link(client, far, number, fd, target)

    # ── the relay's turns ────────────────────────────────────────────────────────────────────

    def turn(self, timeout_ms=0):
        """Let the relay work for one batch of events."""
        self.events += self.relay.run(timeout_ms)

    def until(self, condition, what, patience=PATIENCE_S):
        """Give turns until `condition()` holds."""
        deadline = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < deadline, f"not after {patience:g} s: {what}"
            self.turn(self.pace_ms)

    def pass_time(self, seconds):
        """Give turns for so long, whatever happens."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, "the time to pass", patience=seconds + 1)

    def settle(self):
        """Give turns until nothing is left to do now."""
        quiet = 0
        while quiet < QUIET_TURNS:
            pending = select.select([self.epoll], [], [], 0)[0]
            quiet = 0 if pending else quiet + 1
            self.turn()

    def is_calm(self, ms=30):
        """Whether the relay sleeps while nothing happens: CPU time, not how long it takes."""
        self.settle()
        before = time.thread_time()
        self.turn(ms)
        return time.thread_time() - before < ms / 1000 / 3

    # ── traffic ──────────────────────────────────────────────────────────────────────────────

    def run(self, *flows, what="the transfer"):
        """Step flows (Outgoing, Incoming) and the relay until all flows are done."""

        def finished():
            for flow in flows:
                flow.step()
            return all(flow.done for flow in flows)

        self.until(finished, what)

    def send(self, connection, data, then=None):
        """Send all of it, whether or not anybody reads at the other end."""
        self.run(Outgoing(connection, data, then), what=f"{len(data)} bytes sent")

    def read(self, connection, size):
        """Exactly `size` bytes."""
        incoming = Incoming(connection, most=size)
        self.run(incoming, what=f"{size} bytes")
        assert len(incoming.data) == size, f"{incoming.end} after {len(incoming.data)} bytes"
        return bytes(incoming.data)

    def read_to_end(self, connection):
        """(all that still comes, "eof" or "reset")."""
        incoming = Incoming(connection)
        self.run(incoming, what="the end of the stream")
        return bytes(incoming.data), incoming.end

    def stuff(self, connection, unit=b"\xa5" * 65536, most=1 << 30):
        """Send `unit` again and again until nobody takes any more; the bytes taken, in all."""
        taken = 0
        while taken < most:
            self.settle()
            outgoing = Outgoing(connection, unit)
            outgoing.step()
            sent = len(unit) - len(outgoing.rest)
            taken += sent
            assert not outgoing.error, os.strerror(outgoing.error)
            if sent == 0:
                return taken
        return taken

    # ── what is left ─────────────────────────────────────────────────────────────────────────

    def ended(self, number):
        """The ENDED event of a connection, or None."""
        return next((e for e in self.events if e[0] == ENDED and e[1] == number), None)

    def of_kind(self, kind):
        """The events of a kind, in order."""
        return [event for event in self.events if event[0] == kind]

    def failures(self):
        return self.of_kind(FAILED)

    def counters(self):
        return Counters(*self.relay.counters())

    def until_ended(self, number):
        """(how, bytes up, bytes down) of a connection that must end."""
        self.until(lambda: self.ended(number), "the end of the connection")
        _, _, how, up, down, _, _ = self.ended(number)
        return HOW[how], up, down


class Rigs:
    """Makes rigs, and afterwards proves that nothing of them is left."""

    def __init__(self, directory):
        self.directory = directory
        self.before = open_fds()
        self.made = []

    def __call__(self, *args, **options):
        self.made.append(Rig(self.directory, *args, **options))
        return self.made[-1]

    def close(self):
        for rig in self.made:
            rig.close()
        self.made.clear()
        gc.collect()

    def forget(self, rig):
        """A rig whose relay and gate are gone already: only its sockets are left."""
        self.made.remove(rig)
        for each in rig.sockets:
            each.close()

    def leaked(self):
        return open_fds() - self.before
