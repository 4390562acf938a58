"""Datagram sockets around the program: its listeners, its targets, and their clients."""

import contextlib
import os
import select
import socket
import threading

import pytest

from kit.sockets import quiet_port, target_text
from kit.waiting import patience, wait_until

FAMILIES = {
    "udp4": socket.AF_INET,
    "udp6": socket.AF_INET6,
    "unix": socket.AF_UNIX,
    "abstract": socket.AF_UNIX,
}

DATAGRAM_MAX = 65507
"""The most bytes in a datagram over IPv4: 65535 less the headers."""

every_pair = pytest.mark.parametrize(
    ("listen", "target"), [(a, b) for a in FAMILIES for b in FAMILIES]
)
"""Runs a test for all sixteen pairs of listener family and target family."""

UDP_SEGMENT, UDP_GRO = 103, 104  # udp(7)


def open_socket(family, directory, *, host=None, port=0, receive_buffer=1 << 20):
    """A bound datagram socket of `family`, at a new path or, by default, a free loopback port."""
    sock = socket.socket(FAMILIES[family], socket.SOCK_DGRAM)
    try:
        _bind(sock, family, directory, host, port, receive_buffer)
    except OSError:
        sock.close()
        raise
    return sock


def _bind(sock, family, directory, host, port, receive_buffer):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    if family in ("udp4", "udp6"):
        if host == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((host or ("127.0.0.1" if family == "udp4" else "::1"), port))
    elif family == "unix":
        sock.bind(os.path.join(directory, f"dgram-{os.urandom(4).hex()}"))
    else:
        sock.bind("")  # the kernel chooses a free abstract name, see unix(7)
    sock.settimeout(patience())


class Target:
    """A target of the program, for which the test plays the server."""

    def __init__(self, sock):
        self.sock = sock
        self.text = target_text(sock.getsockname(), sock.family)

    def receive(self):
        """The next datagram, and the address to answer to."""
        try:
            return self.sock.recvfrom(1 << 18)
        except TimeoutError:
            raise AssertionError("no datagram at the target") from None

    def expect(self, *datagrams):
        """Receive these datagrams, in this order; the address of the last one."""
        address = None
        for datagram in datagrams:
            data, address = self.receive()
            assert data == datagram
        return address

    def answer(self, datagram, address):
        """Send a datagram to a flow of the program."""
        self.sock.sendto(datagram, address)

    def has_nothing(self, seconds=0.2):
        """Whether no datagram arrives within `seconds`."""
        return not select.select([self.sock], [], [], seconds)[0]

    def port(self):
        """The port number of a UDP target."""
        return self.sock.getsockname()[1]

    def restart(self):
        """Close the socket and bind another one to the same address."""
        self.stop()
        self.start()

    def stop(self):
        """Close the socket: datagrams for it are refused. A socket file stays."""
        self._address, self._family = self.sock.getsockname(), self.sock.family
        self.sock.close()

    def start(self):
        """Bind again after stop()."""
        if isinstance(self._address, str):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._address)
        self.sock = socket.socket(self._family, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.sock.bind(self._address)
        self.sock.settimeout(patience())

    def close(self):
        self.sock.close()


class Echo(Target):
    """A target that sends every datagram back."""

    def __init__(self, sock):
        super().__init__(sock)
        sock.settimeout(None)
        self.count = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._ended.is_set():
            readable, _, _ = select.select([self.sock], [], [], 0.1)
            if readable:
                data, address = self.sock.recvfrom(1 << 18)
                self.count += 1
                with contextlib.suppress(OSError):  # the flow is gone
                    self.sock.sendto(data, address)

    def close(self):
        self._ended.set()
        self._thread.join()
        super().close()


class Datagrams:
    """What a test of datagrams needs in addition to its stage."""

    def __init__(self, stage):
        self.stage = stage
        self.listeners = []
        self._targets = []
        self._clients = []

    def listener(self, family="udp4", **options):
        """A bound datagram socket, as the service manager would pass it."""
        self.listeners.append(open_socket(family, self.stage.directory, **options))
        return self.listeners[-1]

    def target(self, family="udp4", **options):
        """A target for which the test plays the server."""
        self._targets.append(Target(open_socket(family, self.stage.directory, **options)))
        return self._targets[-1]

    def echo(self, family="udp4", **options):
        """A target that sends every datagram back."""
        self._targets.append(Echo(open_socket(family, self.stage.directory, **options)))
        return self._targets[-1]

    def absent(self, family="udp4"):
        """A target that refuses datagrams until start(), or until another program is there."""
        target = self.target(family, port=quiet_port())
        target.stop()
        if isinstance(target._address, str):
            os.unlink(target._address)
        return target

    def launch(self, *arguments, listeners=(), **options):
        """Launch the program. Flows may outlive the test, so its sockets are not counted then."""
        proxy = self.stage.launch(*arguments, listeners=listeners, **options)
        proxy.sockets_at_start = None
        return proxy

    def forward(self, listen="udp4", target="udp4", *arguments, **options):
        """Launch the program between a listener and a target of these families; both of them."""
        server, listener = self.target(target), self.listener(listen)
        self.launch(*arguments, server.text, listeners=[listener], **options)
        return listener, server

    def client(self, listener, *, host=None):
        """A client of a listener. It is connected, so it takes only what comes from there."""
        address, family = listener.getsockname(), listener.family
        if host:
            address, family = (host, address[1]), FAMILIES["udp6" if ":" in host else "udp4"]
        client = socket.socket(family, socket.SOCK_DGRAM)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        if family == socket.AF_UNIX:
            client.bind("")  # without a name it cannot be answered
        client.connect(address)
        client.settimeout(patience())
        self._clients.append(client)
        return client

    def close(self):
        for one in [*self.listeners, *self._targets, *self._clients]:
            one.close()


def greet(client, text=b"hello"):
    """Send a datagram through the program to a target that echoes, and receive it."""
    client.send(text)
    assert client.recv(1 << 18) == text


def is_served(client, seconds=1.0):
    """Whether a target that echoes answers a client."""
    client.send(b"?")
    if not select.select([client], [], [], seconds)[0]:
        return False
    return client.recv(1 << 18) == b"?"


def status(proxy, *parts):
    """Wait for a STATUS= that has all these parts; return it."""

    def found():
        values = proxy.notify.values("STATUS")
        return values and all(part in values[-1] for part in parts) and values[-1]

    return wait_until(found, f"STATUS= with {parts}; there: {proxy.notify.values('STATUS')[-3:]}")
