"""A relay between a datagram listener and a server, both of them the test's, stepped by the test.

As in rig.py, one thread does everything, and nothing depends on scheduling.
"""

import contextlib
import os
import socket
import struct
import time

from kit.rig import MAKING, PATIENCE_S, Rigs, epoll_fds
from proxyd._datagram import DatagramListener, Datagrams, DatagramTarget
from proxyd._relay import Accepted, DatagramsChanged, Relay, socket_names

FAMILIES = {
    "udp4": socket.AF_INET,
    "udp6": socket.AF_INET6,
    "dual": socket.AF_INET6,
    "unix": socket.AF_UNIX,
    "abstract": socket.AF_UNIX,
}
HOSTS = {"udp4": "127.0.0.1", "udp6": "::1", "dual": "::"}

SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104

QUIET_TURNS = 3
"""Turns without an event after which nothing is left to do."""


def open_datagram_socket(kind, directory, host=None, port=0):
    """A non-blocking socket, at a new path, a free port on loopback, or a free abstract name."""
    made = socket.socket(FAMILIES[kind], socket.SOCK_DGRAM)
    made.setblocking(False)
    if kind in HOSTS:
        if kind != "udp4":
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(kind == "udp6"))
        made.bind((HOSTS[kind] if host is None else host, port))
    elif kind == "unix":
        made.bind(os.path.join(directory, f"socket-{os.urandom(4).hex()}"))
    else:
        made.bind("")
    return made


def receive_all(sock, size=1 << 18):
    """What is in the queue of a socket: [(datagram, sender)]."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(sock.recvfrom(size))
    return found


def send_segmented(sock, data, segment, address=None):
    """Send several datagrams of `segment` bytes at once (GSO), as QUIC servers do."""
    ancillary = [(SOL_UDP, UDP_SEGMENT, struct.pack("@H", segment))]
    if address is None:
        sock.sendmsg([data], ancillary)
    else:
        sock.sendmsg([data], ancillary, 0, address)


class DatagramRig:
    """A relay with one datagram listener, and a server as its target."""

    def __init__(
        self,
        directory,
        listen="udp4",
        target="udp4",
        *,
        host=None,
        guarded=True,
        proxy=False,
        started=True,
        known=True,
        **options,
    ):
        self.directory = directory
        self.listen_kind, self.target_kind = listen, target
        self.sockets = []
        self.events = []
        with MAKING:
            before = epoll_fds()
            self.relay = Relay()
            (self.epoll,) = epoll_fds() - before
        self.datagrams = Datagrams(self.relay, **options)
        self.target = DatagramTarget(self.datagrams, 7)
        self.server = self.keep(open_datagram_socket(target, directory))
        self.address = socket_names(self.server.fileno())[1]
        if known:
            self.target.set_address(self.address)
        self.listen_socket = self.keep(open_datagram_socket(listen, directory, host))
        self.listeners = []
        self.listener = self.add_listener(self.listen_socket, guarded, proxy, started=started)

    def add_listener(self, sock, guarded=True, proxy=False, *, started=True):
        """Forward what comes to this socket, too."""
        fd, index = sock.fileno(), len(self.listeners)
        listener = DatagramListener(self.datagrams, fd, self.target, index, guarded, proxy)
        self.listeners.append(listener)
        if started:
            listener.start()
        return listener

    def keep(self, sock):
        """Close this socket together with the rig; returns it."""
        self.sockets.append(sock)
        return sock

    def close(self):
        for listener in self.listeners:
            listener.finish()
        for event in self.of_kind(Accepted):
            os.close(event.client)
        self.datagrams.close_all()
        assert self.datagrams.flows == 0
        assert self.relay.connections == 0
        self.listeners.clear()
        del self.listener, self.target, self.datagrams, self.relay
        for sock in self.sockets:
            sock.close()

    # ── clients and the server ───────────────────────────────────────────────────────────────

    def client(self, host=None, *, source=None, named=True):
        """A client's socket, connected to the listener; to its address `host` if it has several."""
        kind = self.listen_kind
        if kind == "dual":
            kind = "udp6" if host is None or ":" in host else "udp4"
        made = self.keep(socket.socket(FAMILIES[kind], socket.SOCK_DGRAM))
        made.setblocking(False)
        address = self.listen_socket.getsockname()
        if kind in HOSTS:
            if source is not None:
                made.bind((source, 0))
            made.connect((host or HOSTS[kind], address[1]))
        else:
            if named:
                made.bind("")
            made.connect(address)
        return made

    def send(self, sock, data, *address):
        """Send a datagram, as soon as there is room: the queue of a UNIX socket is short."""

        def sent():
            try:
                sock.sendto(data, *address) if address else sock.send(data)
            except BlockingIOError:
                return False
            return True

        self.until(sent, "room in the queue")

    def received(self, count=1):
        """Wait until the server has that many datagrams: [(datagram, sender)]."""
        found = []

        def enough():
            found.extend(receive_all(self.server))
            return len(found) >= count

        self.until(enough, f"{count} datagrams at the server")
        return found

    def replies(self, client, count=1):
        """Wait until a client has that many datagrams: [datagram]."""
        found = []

        def enough():
            found.extend(data for data, _ in receive_all(client))
            return len(found) >= count

        self.until(enough, f"{count} replies")
        return found

    def ask(self, client, question=b"question", answer=b"answer"):
        """One question and its answer; the address of the flow's own socket."""
        client.send(question)
        ((data, sender),) = self.received()
        assert data == question
        self.server.sendto(answer, sender)
        assert self.replies(client) == [answer]
        return sender

    def server_ends(self):
        """Close the server's socket, and its path."""
        self.server.close()
        self.sockets.remove(self.server)
        name = self.address[2:].rstrip(b"\0")
        if self.target_kind == "unix":
            os.unlink(name)

    def server_begins(self):
        """A server at the same address."""
        self.server = self.keep(socket.socket(FAMILIES[self.target_kind], socket.SOCK_DGRAM))
        self.server.setblocking(False)
        if self.target_kind in HOSTS:
            port = int.from_bytes(self.address[2:4], "big")
            self.server.bind((HOSTS[self.target_kind], port))
        else:
            name = self.address[2:]
            self.server.bind(name if name[:1] == b"\0" else name.rstrip(b"\0"))

    # ── turns ────────────────────────────────────────────────────────────────────────────────

    def turn(self, timeout_ms=0):
        """Let the relay work for one batch of events."""
        for event in self.relay.run(timeout_ms):
            if isinstance(event, DatagramsChanged):
                self.events += self.datagrams.take_events()
            else:
                self.events.append(event)

    def until(self, condition, what, patience=PATIENCE_S):
        """Run turns until `condition()` holds."""
        deadline = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < deadline, f"not after {patience:g} s: {what}"
            self.turn(1)

    def settle(self):
        """Run turns until nothing is left to do for now."""
        for _ in range(QUIET_TURNS):
            self.turn()

    def pass_time(self, ms):
        """Run turns for that long, whatever happens."""
        end = time.monotonic() + ms / 1000
        while time.monotonic() < end:
            self.turn(1)

    def is_calm(self, ms=50):
        """Whether the relay sleeps while nothing happens, measured by CPU time."""
        self.settle()
        before = time.thread_time()
        self.turn(ms)
        return time.thread_time() - before < ms / 1000 / 3

    # ── what is told ─────────────────────────────────────────────────────────────────────────

    def of_kind(self, kind):
        """The events of this class, in order."""
        return [event for event in self.events if isinstance(event, kind)]

    def wait_for(self, kind, count=1):
        """Wait until there are that many events of this class; the last one."""
        self.until(lambda: len(self.of_kind(kind)) >= count, f"{count} {kind.__name__}")
        return self.of_kind(kind)[-1]

    def dropped(self):
        """What was dropped: {cause: count}."""
        return {cause: count for cause, count in self.datagrams.totals().dropped.items() if count}


class DatagramRigs(Rigs):
    """Makes rigs of datagrams."""

    kind = DatagramRig
