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

from kit.socket_state import set_option
from kit.sockets import FAMILIES, open_listener
from kit.stepped import Incoming, Outgoing, accept, open_client
from proxyd._relay import (
    Accepted,
    ConnectFailed,
    Ended,
    Ready,
    Relay,
    RelayListener,
    socket_names,
    tune_socket,
)

PATIENCE_S = float(os.environ.get("RELAY_PATIENCE", "20"))
"""How long a state may take that must come; less is convenient where much is known to fail."""

MODES = {
    "splice": {},
    "copy": {"may_splice": False},
    "small splice": {"stream_unit": 64 * 1024, "pipe_size": 64 * 1024},
    "small copy": {"stream_unit": 64 * 1024, "may_splice": False},
}
"""How a relay may move bytes; the small ones meet a full pipe or buffer much sooner."""

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


def values(record):
    """The fields of an event or of the totals, to compare them: {name: value}."""
    names = [name for name in vars(type(record)) if not name.startswith("_")]
    return {name: getattr(record, name) for name in names}


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
        self.door = self.keep(open_listener(client, directory, blocking=False))
        tune_socket(self.door.fileno(), FAMILIES[client])
        self.gate = RelayListener(self.relay, self.door.fileno(), FAMILIES[client], 0, 0)
        self.gate.start()
        self.backend = self.keep(
            open_listener(
                target,
                directory,
                receive_buffer=self.target_buffers.get("receive_buffer"),
                blocking=False,
            )
        )
        self.address = socket_names(self.backend.fileno())[1]

    def keep(self, connection):
        """Have a socket closed with the rig."""
        self.sockets.append(connection)
        return connection

    def close(self):
        """Close everything, the relay's connections included."""
        self.gate.stop()
        self.relay.close_all()
        self.turn()
        for event in self.events:
            if isinstance(event, ConnectFailed | Accepted):
                with contextlib.suppress(OSError):
                    os.close(event.client)
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
        self.until(lambda: self.of_kind(Accepted), "a client")
        event = self.of_kind(Accepted)[0]
        self.events.remove(event)
        return event.client

    def connect(self, fd, **options):
        """Hand an accepted client over; the connection's id, or the ConnectFailed."""
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
        """The Ended event of a connection, or None."""
        return next((one for one in self.of_kind(Ended) if one.connection == number), None)

    def of_kind(self, kind):
        """The events of a kind, in order."""
        return [event for event in self.events if isinstance(event, kind)]

    def ready(self):
        """Every (fd, epoll events) that was announced, in order."""
        return [(event.fd, event.events) for event in self.of_kind(Ready)]

    def failures(self):
        return self.of_kind(ConnectFailed)

    def totals(self):
        return self.relay.totals()

    def until_ended(self, number):
        """(ending, bytes up, bytes down) of a connection that must end."""
        self.until(lambda: self.ended(number), "the end of the connection")
        event = self.ended(number)
        return event.ending, event.bytes_up, event.bytes_down


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
