"""A port that accepts before its application is up, as that of docker-proxy (--settle-time=)."""

import socket
import threading

import pytest
from kit.differences import differs
from kit.socket_state import is_quiet
from kit.sockets import read_exactly, read_to_end, reset
from kit.waiting import never_within, wait_until

pytestmark = differs("original", reason="has no such option", run=False)


class Forwarder:
    """A port that accepts at once, and closes early until the application behind it is up."""

    def __init__(self, listener, resets):
        self.listener = listener
        self.resets = resets
        self.closed_early = 0
        self.heard = b""
        self.is_up = threading.Event()
        self.served = []
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            if self.is_up.is_set():
                connection.settimeout(15)
                self.served.append(connection)
                continue
            connection.setblocking(False)
            try:
                self.heard += connection.recv(100)
            except BlockingIOError:
                pass
            self.closed_early += 1
            if self.resets:
                reset(connection)
            else:
                connection.close()

    def next(self):
        """The next connection that the application gets."""
        wait_until(lambda: self.served, "a connection that is served")
        return self.served.pop(0)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        for one in self.served:
            one.close()


@pytest.fixture
def forwarder(stage):
    made = []

    def make(family="tcp4", resets=False):
        backend = stage.backend(family)
        backend.listener.settimeout(None)
        made.append(Forwarder(backend.listener, resets))
        return backend, made[-1]

    yield make
    for one in made:
        one.close()


def serve(stage, backend, *options, family="tcp4"):
    """Start the program with these options, and the port as its target."""
    stage.launch(*options, backend.target, listeners=[stage.listener(family)])


def be_served(stage, port):
    """Start the application: (a client, the application's end of its connection)."""
    port.is_up.set()
    client = stage.connect()
    return client, port.next()


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("family", ["tcp4", "unix"])
@pytest.mark.parametrize("header", [[], ["--proxy-protocol=v1"]])
def test_clients_wait_until_the_application_is_there(stage, forwarder, family, resets, header):
    """Nothing is sent before, not even a PROXY header, and nothing is sent twice."""
    backend, port = forwarder(family, resets)
    serve(stage, backend, "--settle-time=1s", *header)
    clients = [stage.connect() for _ in range(3)]
    for number, client in enumerate(clients):
        client.sendall(b"question %d" % number)
    never_within(0.5, lambda: not all(map(is_quiet, clients)), "an end")
    assert port.closed_early >= 2
    port.is_up.set()
    heard = []
    for _ in clients:
        server = port.next()
        line = b""
        while header and not line.endswith(b"\r\n"):
            line += read_exactly(server, 1)
        assert line.startswith(b"PROXY") == bool(header)
        heard.append(read_exactly(server, 10))
        server.sendall(b"answer")
        server.close()
    assert sorted(heard) == [b"question %d" % number for number in range(3)]
    for client in clients:
        assert read_to_end(client) == (b"answer", "eof")
    assert port.heard == b""


def test_without_it_the_client_sees_the_target_close(stage, forwarder):
    """By default a target that has accepted counts as reached."""
    backend, port = forwarder(resets=True)
    serve(stage, backend)
    assert read_to_end(stage.connect())[0] == b""
    wait_until(lambda: port.closed_early == 1, "one connection")


def test_a_proven_target_is_not_watched(stage, forwarder):
    """When it closes, the client sees it at once."""
    backend, port = forwarder()
    serve(stage, backend, "--settle-time=50ms")
    first, server = be_served(stage, port)
    first.sendall(b"x")
    assert read_exactly(server, 1) == b"x"
    port.is_up.clear()
    assert read_to_end(stage.connect()) == (b"", "eof")
    assert port.closed_early == 1
    server.close()


def test_a_server_that_speaks_first_is_proven_at_once(stage, forwarder):
    """Its first byte proves it, long before the time has passed."""
    backend, port = forwarder()
    serve(stage, backend, "--settle-time=1h")
    client, server = be_served(stage, port)
    server.sendall(b"220 ready")
    assert read_exactly(client, 9) == b"220 ready"
    later = stage.connect()
    with port.next() as other:
        later.sendall(b"x")
        assert read_exactly(other, 1) == b"x"
    server.close()


def test_a_client_is_given_up_after_connect_timeout(stage, forwarder):
    backend, _ = forwarder()
    # 5 s are longer than a busy machine takes to close.
    serve(stage, backend, "--settle-time=5s", "--connect-timeout=500ms")
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.wait_for_log(
        f"Failed to connect to remote host: it accepts and closes at once ({backend.target})."
    )


def test_a_client_that_sends_its_request_and_closes(stage, forwarder):
    backend, port = forwarder()
    serve(stage, backend, "--settle-time=1s", family="unix")
    client = stage.connect()
    client.sendall(b"message")
    client.close()
    wait_until(lambda: port.closed_early >= 2, "a second attempt")
    port.is_up.set()
    with port.next() as server:
        assert read_to_end(server) == (b"message", "eof")


def test_a_client_that_only_tests_the_port(stage, forwarder):
    """It has ended without sending anything, so there is no reason to hold it, and to try again."""
    backend, port = forwarder()
    serve(stage, backend, "--settle-time=5s", "--connect-timeout=1h")
    client = stage.connect()
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(client) == (b"", "eof")
    attempts = port.closed_early  # more than one, if its end came later than the next attempt
    assert attempts > 0
    never_within(0.5, lambda: port.closed_early > attempts, "another attempt")


def test_stop_while_a_target_is_watched(stage, forwarder):
    backend, port = forwarder()
    serve(stage, backend, "--settle-time=1h")
    client, server = be_served(stage, port)
    assert stage.proxy.end()
    assert read_to_end(client) == (b"", "reset")
    assert read_to_end(server) == (b"", "reset")
    server.close()
