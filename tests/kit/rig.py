"""A relay between a listener and a backend, both of them the test's, stepped by the test.

One thread does everything: the test acts for both peers and runs the relay one turn at a time.
Nothing depends on scheduling, and a test waits for a state by running turns until it is reached.
"""

import contextlib
import gc
import os
import select
import socket
import threading
import time
import types

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
"""The longest wait for a state that must come. Reduce it when many tests are known to fail."""

MODES = {
    "splice": {},
    "copy": {"may_splice": False},
    "small splice": {"stream_unit": 64 * 1024, "pipe_size": 64 * 1024},
    "small copy": {"stream_unit": 64 * 1024, "may_splice": False},
}
"""How a relay may move bytes. With the small sizes, pipes and buffers fill up much sooner."""

MAKING = threading.Lock()
"""Held while a relay is created, to find out which fd is its epoll instance."""

QUIET_TURNS = 3
"""Turns without a pending event after which nothing is left to do. One is not enough: a pump that
spent its budget continues without an event."""


def open_fds():
    """The open fds of this process, except for that of the listing itself."""
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
    """One connection through the relay: both of its ends, which the test plays."""

    def __init__(self, client, target, number, client_fd, target_fd=-1):
        self.client = client
        self.target = target
        self.id = number
        self.client_fd = client_fd
        """The relay's end of the client's connection, for inspection only."""
        self.target_fd = target_fd
        """The relay's end of the target's connection, if the test dialled it; otherwise -1."""


class Rig:
    """A relay, a listener whose clients it serves, and a backend as its target."""

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
        self.options = options
        self.make_relay()
        self.earlier = []
        """The totals of relays that have passed on their connections (kit/parcel.py)."""
        self.pace_ms = 1
        """How long until() sleeps between two checks, at most."""
        self.events = []
        self.sockets = []
        self.listen_socket = self.keep(open_listener(client, directory))
        self.listen_socket.setblocking(False)  # as the policy does
        tune_socket(self.listen_socket.fileno(), FAMILIES[client])
        self.listen()
        self.backend = self.keep(
            open_listener(
                target, directory, receive_buffer=self.target_buffers.get("receive_buffer")
            )
        )
        self.backend.setblocking(False)
        self.address = socket_names(self.backend.fileno())[1]

    def make_relay(self):
        with MAKING:
            before = epoll_fds()
            self.relay = Relay(**self.options)
            (self.epoll,) = epoll_fds() - before
        self.relay.report_ends = True

    def listen(self):
        terms = self.listen_socket.fileno(), FAMILIES[self.client_family], 0, 0
        self.listener = RelayListener(self.relay, *terms)
        self.listener.start()

    def keep(self, connection):
        """Close this socket together with the rig; returns it."""
        self.sockets.append(connection)
        return connection

    def close(self):
        """Close everything, the relay's connections included."""
        self.listener.stop()
        self.relay.close_all()
        self.turn()
        for event in self.events:
            if isinstance(event, ConnectFailed | Accepted):
                with contextlib.suppress(OSError):
                    os.close(event.client)
        del self.relay, self.listener
        for connection in self.sockets:
            connection.close()

    # ── connections ──────────────────────────────────────────────────────────────────────────

    def new_client(self):
        """(a client's socket, the fd of its accepted connection): the caller owns the fd."""
        client = self.keep(open_client(self.listen_socket, **self.client_buffers))
        return client, self.take_client()

    def take_client(self):
        """Wait for the next accepted client; the caller owns the fd."""
        self.until(lambda: self.of_kind(Accepted), "a client")
        event = self.of_kind(Accepted)[0]
        self.events.remove(event)
        return event.client

    def connect(self, fd, **options):
        """Connect an accepted client to the target; the connection's id, or a ConnectFailed."""
        return self.relay.connect(fd, FAMILIES[self.client_family], self.address, **options)

    def accept_at_backend(self):
        """Accept the oldest connection in the backend's backlog; waits for one."""
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
        """A connection through the relay, with both ends established."""
        client, fd = self.new_client()
        number = self.connect(fd, **options)
        return Link(client, self.accept_at_backend(), number, fd)

    def adopted_link(self, *, send_buffer=None, preamble=None):
        """Like link(), made by dial() and adopt(). The relay's target socket gets `send_buffer`."""
        client, fd = self.new_client()
        target = self.relay.dial(self.address)
        if send_buffer:
            set_option(target, socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        far = self.accept_at_backend()
        number = self.relay.adopt(fd, FAMILIES[self.client_family], target, preamble)
        return Link(client, far, number, fd, target)

    # ── the relay's turns ────────────────────────────────────────────────────────────────────

    def turn(self, timeout_ms=0):
        """Let the relay work for one batch of events."""
        self.events += self.relay.run(timeout_ms)

    def until(self, condition, what, patience=PATIENCE_S):
        """Run turns until `condition()` holds."""
        deadline = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < deadline, f"not after {patience:g} s: {what}"
            self.turn(self.pace_ms)

    def pass_time(self, seconds):
        """Run turns for that many seconds, whatever happens."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, "the time to pass", patience=seconds + 1)

    def settle(self):
        """Run turns until nothing is left to do for now."""
        quiet = 0
        while quiet < QUIET_TURNS:
            pending = select.select([self.epoll], [], [], 0)[0]
            quiet = 0 if pending else quiet + 1
            self.turn()

    def is_calm(self, ms=30):
        """Whether the relay sleeps while nothing happens, measured by CPU time."""
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
        """Send all of `data`, whether or not the other end reads it."""
        self.run(Outgoing(connection, data, then), what=f"{len(data)} bytes sent")

    def read(self, connection, size):
        """Read exactly `size` bytes."""
        incoming = Incoming(connection, limit=size)
        self.run(incoming, what=f"{size} bytes")
        assert len(incoming.data) == size, f"{incoming.end} after {len(incoming.data)} bytes"
        return bytes(incoming.data)

    def read_to_end(self, connection):
        """Read to the end: (bytes, "eof" or "reset")."""
        incoming = Incoming(connection)
        self.run(incoming, what="the end of the stream")
        return bytes(incoming.data), incoming.end

    def fill(self, connection, unit=b"\xa5" * 65536, limit=1 << 30):
        """Send `unit` repeatedly until nothing more is taken; the number of bytes taken."""
        taken = 0
        while taken < limit:
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
        """The events of this class, in order."""
        return [event for event in self.events if isinstance(event, kind)]

    def ready(self):
        """(fd, epoll events) of each Ready event, in order."""
        return [(event.fd, event.events) for event in self.of_kind(Ready)]

    def failures(self):
        return self.of_kind(ConnectFailed)

    def totals(self):
        """The totals of this relay, and of those before it."""
        every = [values(totals) for totals in (*self.earlier, self.relay.totals())]
        sums = {name: sum(one[name] for one in every) for name in every[0] if name != "endings"}
        endings = {how: sum(one["endings"][how] for one in every) for how in every[0]["endings"]}
        return types.SimpleNamespace(**sums, endings=endings)

    def until_ended(self, number):
        """Wait for the end of a connection: (ending, bytes up, bytes down)."""
        self.until(lambda: self.ended(number), "the end of the connection")
        event = self.ended(number)
        return event.ending, event.bytes_up, event.bytes_down


class Rigs:
    """Makes rigs, and checks afterwards that none of them leaves an fd open."""

    kind = Rig

    def __init__(self, directory):
        self.directory = directory
        self.before = open_fds()
        self.made = []

    def __call__(self, *args, **options):
        self.made.append(self.kind(self.directory, *args, **options))
        return self.made[-1]

    def close(self):
        for rig in self.made:
            rig.close()
        self.made.clear()
        gc.collect()

    def forget(self, rig):
        """Close the sockets of a rig whose relay and listener are gone already."""
        self.made.remove(rig)
        for each in rig.sockets:
            each.close()

    def leaked(self):
        return open_fds() - self.before
