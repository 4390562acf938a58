"""Which clients are accepted, how many, and when none are."""

import errno
import os
import re
import resource
import socket

import pytest
from kit.sockets import reset

from proxyd import address as sockaddr
from proxyd import log, peers
from proxyd._relay import Accepted, AcceptFailed, ConnectFailed, Refused
from proxyd.acceptor import PAUSE_MS, Acceptor
from proxyd.event_loop import EventLoop
from proxyd.listen import Listener
from proxyd.target import parse_target
from proxyd.upstream import Upstream

PATIENCE = 20
"""Seconds after which something that has not happened counts as failed."""


class World:
    """Listeners, an Acceptor, and the main loop around them."""

    def __init__(self, tmp_path):
        self.tmp_path = tmp_path
        self.loop = EventLoop()
        self.relay = self.loop.relay
        self.listeners = []
        self.sockets = []
        self.backend = None

    def listen(self, kind=socket.AF_INET):
        """Listen on TCP by default: on UNIX, clients in this process would be taken for a loop."""
        sock = self.keep(socket.socket(kind))
        number = len(self.sockets)
        sock.bind(str(self.tmp_path / f"s{number}") if kind == socket.AF_UNIX else ("127.0.0.1", 0))
        sock.listen(64)
        sock.setblocking(False)
        return sock

    def keep(self, sock):
        self.sockets.append(sock)
        return sock

    def target(self, state):
        """A target that is up, absent (connect(2) fails) or refuses (the connect fails later)."""
        if state == "absent":
            return str(self.tmp_path / "absent")
        if state == "refuses":
            sock = self.keep(socket.socket())
            sock.bind(("127.0.0.1", 0))
            return f"127.0.0.1:{sock.getsockname()[1]}"
        self.backend = self.listen(socket.AF_UNIX)
        return self.backend.getsockname()

    def listener(self, sock, target, timeout_ms=10_000, upstream=None, connected=False):
        name = sockaddr.from_socket_name(sock.family, sock.getsockname())
        listener = Listener(sock.fileno(), "x", name, connected)
        listener.target = parse_target(target)
        if upstream is None:
            port = listener.target.service or 0
            resolver = object() if listener.target.host else None
            upstream = Upstream(self.loop, resolver, listener.target, port, timeout_ms)
        listener.upstream = upstream
        listener.ports = None
        self.listeners.append(listener)
        return listener

    def start(self, connections_max=256, proxy_protocol=0):
        self.acceptor = Acceptor(self.loop, self.listeners, connections_max, proxy_protocol)
        self.acceptor.start()
        return self.acceptor

    @property
    def upstreams(self):
        return list({id(one.upstream): one.upstream for one in self.listeners}.values())

    @property
    def held(self):
        return sum(len(upstream.held) for upstream in self.upstreams)

    def turn(self, timeout_ms=0):
        """Run one turn of the main loop; return its events."""
        events = self.loop.run(timeout_ms)
        for event in events:
            if isinstance(event, ConnectFailed):
                listener = self.listeners[event.listener]
                listener.upstream.take_back(event, listener.family)
            else:
                self.acceptor.handle(event)
            self.assert_within_limit()
        for upstream in self.upstreams:
            if upstream.held:
                upstream.step(self.relay.now_ms)
        self.acceptor.tick(self.relay.now_ms)
        self.acceptor.update_relay()
        self.assert_within_limit()
        return events

    def assert_within_limit(self):
        assert self.relay.connections + self.held <= self.relay.connections_max

    def until(self, condition):
        """Run turns until a condition is true."""
        for _ in range(PATIENCE * 100):
            if condition():
                return
            self.turn(10)
        raise TimeoutError

    def settle(self, count):
        """Run turns until `count` clients have been accepted, and all their events handled."""
        self.until(lambda: self.relay.totals().accepted >= count)
        self.turn()
        self.turn()

    def client(self, sock):
        one = self.keep(socket.socket(sock.family))
        one.connect(sock.getsockname())
        one.setblocking(False)
        return one

    def close(self):
        for upstream in self.upstreams:
            upstream.drop_all()
        if hasattr(self, "acceptor"):
            self.acceptor.stop()
        self.relay.close_all()
        for listener in self.listeners:
            if listener.connected and listener.fd >= 0:
                os.close(listener.fd)
        for sock in self.sockets:
            sock.close()


def closed(sock):
    """Whether a client has been closed without receiving anything."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True
    except BlockingIOError:
        return False


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.close()


# ── the limit ─────────────────────────────────────────────────────────────────────────────────────

LIMIT_LINE = "Hit connection limit, refusing connection."


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("proxy_protocol", [0, 1])
def test_the_limit_is_exact(world, capfd, clock, limit, proxy_protocol):
    sock = world.listen()
    world.listener(sock, world.target("up"))
    acceptor = world.start(limit, proxy_protocol)
    clients = [world.client(sock) for _ in range(limit + 3)]
    world.settle(limit + 3)
    assert world.relay.connections == limit
    assert [closed(client) for client in clients] == [False] * limit + [True] * 3
    assert world.relay.totals().accepted == limit + 3
    assert world.relay.totals().refused + acceptor.refusals.count == 3
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(LIMIT_LINE)
    if proxy_protocol:  # otherwise the relay has refused it
        assert re.fullmatch(re.escape(LIMIT_LINE) + r" Client: 127\.0\.0\.1:\d+\.", line)


@pytest.mark.parametrize("proxy_protocol", [0, 1])
def test_a_source_has_its_share(world, capfd, clock, proxy_protocol):
    """Whether the relay connects clients, or the policy does, or they are held."""
    sock = world.listen()
    world.listener(sock, world.target("up"))
    acceptor = world.start(9, proxy_protocol)
    acceptor.limit_sources(2, -1)
    clients = [world.client(sock) for _ in range(4)]
    world.settle(4)
    assert world.relay.connections == 2
    assert [closed(client) for client in clients] == [False, False, True, True]
    assert (world.relay.totals().refused, world.relay.refused_by_source) == (2, 2)
    assert (acceptor.refusals.count, acceptor.refusals.limit_ms) == (0, None)
    assert acceptor.refusals.source_limit_ms is not None
    (line,) = capfd.readouterr().err.splitlines()
    name = "{}:{}".format(*clients[2].getsockname())
    assert line == f"Hit connection limit of a source, refusing connection. Client: {name}."


@pytest.mark.parametrize("state", ["absent", "refuses"])
def test_held_clients_count_towards_their_share(world, state):
    sock = world.listen()
    world.listener(sock, world.target(state))
    world.start(9).limit_sources(2, -1)
    clients = [world.client(sock) for _ in range(5)]
    world.settle(5)
    world.until(lambda: world.held == 2)
    assert world.relay.refused_by_source == 3
    clients[0].close()
    for upstream in world.upstreams:
        upstream.drop_all()
    clients.append(world.client(sock))
    world.settle(6)
    assert world.relay.refused_by_source == 3


def test_a_place_that_has_become_free_is_used(world, capfd):
    sock = world.listen()
    world.listener(sock, world.target("up"))
    world.start(1)
    for _ in range(5):
        client = world.client(sock)
        world.until(lambda: world.relay.connections)
        assert not closed(client)
        client.close()
        served, _ = world.backend.accept()
        served.close()
        world.until(lambda: not world.relay.connections)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("state", ["absent", "refuses"])
def test_held_clients_count_towards_the_limit(world, state):
    sock = world.listen()
    world.listener(sock, world.target(state))
    world.start(2)
    clients = [world.client(sock) for _ in range(5)]
    world.settle(5)
    assert world.held + world.relay.connections == 2
    assert sum(map(closed, clients)) == 3


def test_two_connects_that_fail_in_one_batch_count_towards_the_limit(world):
    """The relay connects both, and both connects fail before the policy hears of the first."""
    target = world.target("absent")
    first, second = world.listen(), world.listen()
    upstream = world.listener(first, target).upstream
    world.listener(second, target, upstream=upstream)
    world.start(1)
    clients = [world.client(first), world.client(second)]
    world.settle(2)
    assert world.held == 1
    assert sum(map(closed, clients)) == 1


def test_a_connect_that_fails_does_not_make_room_for_another_client(world):
    """Its own client will be held. One batch has both: the failure, and the next client."""
    sock = world.listen()
    world.listener(sock, world.target("refuses"))
    world.start(1)
    clients = [world.client(sock) for _ in range(3)]
    world.settle(3)
    assert world.held + world.relay.connections == 1
    assert sum(map(closed, clients)) == 2


def test_many_connects_that_fail_count_towards_the_limit(world):
    """If clients come turn after turn, several are accepted at a time."""
    sock = world.listen()
    up = world.target("up")
    listener = world.listener(sock, up)
    world.start(60)
    for _ in range(40):
        world.client(sock)
    world.until(lambda: world.relay.connections > 30)  # turn after turn
    os.unlink(up)
    for _ in range(40):
        world.client(sock)
    world.settle(80)
    assert len(listener.upstream.held) + world.relay.connections == 60


def test_the_relay_leaves_room_for_held_clients(world):
    sock = world.listen()
    world.listener(sock, world.target("absent"))
    world.start(10)
    assert (world.relay.connections_max, world.relay.held) == (10, 0)
    world.client(sock)
    world.settle(1)
    assert (world.relay.connections_max, world.relay.held) == (10, 1)


# ── where the relay connects by itself ────────────────────────────────────────────────────────────


def test_the_relay_connects_to_a_literal_target_that_is_up(world, fake_listeners):
    listener = world.listener(world.listen(), "/run/x", timeout_ms=7000)
    world.start()
    assert listener.relay_listener.accepting
    assert listener.relay_listener.auto_connects == (sockaddr.pack_unix("/run/x"), 1000)


@pytest.mark.parametrize(("timeout_ms", "kernel_ms"), [(None, 1000), (0, 0), (1, 1)])
def test_how_long_a_connect_of_the_relay_may_take(world, fake_listeners, timeout_ms, kernel_ms):
    listener = world.listener(world.listen(), "/run/x")
    listener.upstream.timeout_ms = timeout_ms
    world.start()
    assert listener.relay_listener.auto_connects[1] == kernel_ms


def test_the_relay_does_not_connect_to_a_name(world, fake_listeners):
    listener = world.listener(world.listen(), "backend:80")
    world.start()
    assert listener.relay_listener.auto_connects[0] is None


def test_the_relay_does_not_connect_if_there_is_a_header_to_send(world, fake_listeners):
    listener = world.listener(world.listen(), "/run/x")
    world.start(proxy_protocol=1)
    assert listener.relay_listener.auto_connects[0] is None


def test_the_relay_does_not_connect_at_debug_level(world, fake_listeners):
    world.loop._labels = {}
    listener = world.listener(world.listen(), "/run/x")
    world.start()
    assert listener.relay_listener.auto_connects[0] is None


def test_the_relay_does_not_connect_while_a_client_is_held(world):
    sock = world.listen()
    listener = world.listener(sock, world.target("absent"))
    world.start()
    assert listener.upstream.auto_connect_address is not None
    world.client(sock)
    world.settle(1)
    assert listener.upstream.held
    assert listener.upstream.auto_connect_address is None


# ── clients that the policy connects ──────────────────────────────────────────────────────────────


def test_a_client_gets_its_header(world):
    sock = world.listen()
    world.listener(sock, world.target("up"))
    world.start(proxy_protocol=1)
    client = world.client(sock)
    client.send(b"hello")
    world.settle(1)
    served, _ = world.backend.accept()
    with served:
        served.setblocking(False)
        received = b""
        while b"hello" not in received:
            received += served.recv(100)
        ports = client.getsockname()[1], client.getpeername()[1]
        assert received == b"PROXY TCP4 127.0.0.1 127.0.0.1 %d %d\r\nhello" % ports


@pytest.mark.parametrize("target", ["up", "absent"])
def test_a_client_that_reset_before_it_was_accepted_keeps_its_address(world, target):
    """In the header, in the log at debug level, and while it is held."""
    world.loop._labels = {}
    sock = world.listen()
    upstream = world.listener(sock, world.target(target)).upstream
    client = world.client(sock)
    ports = client.getsockname()[1], client.getpeername()[1]
    client.send(b"hello")
    reset(client)
    world.start(proxy_protocol=1)
    expected = b"PROXY TCP4 127.0.0.1 127.0.0.1 %d %d\r\n" % ports
    seen = []
    take = upstream.take
    upstream.take = lambda fd, family, index, header, name, peer, connection: (
        seen.append((header, name, sockaddr.port(peer))),
        take(fd, family, index, header, name, peer, connection),
    )
    world.settle(1)
    assert seen == [(expected, f"127.0.0.1:{ports[0]}", ports[0])]
    if target == "up":
        served, _ = world.backend.accept()
        with served:
            assert served.recv(100).startswith(expected)


@pytest.mark.parametrize("version", [1, 2])
def test_a_client_without_an_address_is_refused(world, capfd, version):
    """With Accept=yes another process has called accept(2): after a reset its address is lost."""
    sock = world.listen()
    client = world.keep(socket.create_connection(sock.getsockname()))
    served, _ = sock.accept()
    served.setblocking(False)
    reset(client)
    world.listener(served, world.target("up"), connected=True)
    served.detach()
    acceptor = world.start(proxy_protocol=version)
    assert world.relay.connections == 0
    assert world.held == 0
    assert (acceptor.passed_in, acceptor.refusals.count) == (1, 1)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("Refusing connection to 127.0.0.1:")
    with pytest.raises(BlockingIOError):
        world.backend.accept()


def test_a_connection_has_a_label_at_debug_level(world):
    world.loop._labels = {}
    sock = world.listen(socket.AF_INET)
    target = world.target("up")
    world.listener(sock, target)
    world.start()
    client = world.client(sock)
    world.settle(1)
    port = client.getsockname()[1]
    assert list(world.loop._labels.values()) == [f"127.0.0.1:{port} → {target}"]


def test_a_connection_that_was_passed_in_is_served(world):
    """Accept=yes: it is served at once, and no other client is accepted."""
    ours, theirs = socket.socketpair()
    world.keep(ours)
    theirs.setblocking(False)
    target = world.target("up")
    listener = world.listener(theirs, target, connected=True)
    theirs.detach()
    acceptor = world.start()
    assert world.relay.connections == 1
    assert listener.fd == -1
    assert acceptor.passed_in == 1
    assert not listener.accepting
    assert not acceptor.broken
    ours.send(b"hello")
    world.turn()
    world.turn()
    served, _ = world.backend.accept()
    with served:
        assert served.recv(10) == b"hello"
    acceptor.stop()


# ── descriptors or memory have run out ────────────────────────────────────────────────────────────


class NoFds:
    """A context in which this process cannot open anything."""

    def __enter__(self):
        self.limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, self.limits[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_NOFILE, self.limits)


def test_emfile_pauses_the_listeners(world, capfd):
    sock = world.listen()
    listener = world.listener(sock, world.target("up"))
    acceptor = world.start()
    client = world.client(sock)
    with NoFds():
        assert [event.error for event in world.turn()] == [errno.EMFILE]
        assert not listener.accepting
        assert acceptor.resume_ms == world.relay.now_ms + PAUSE_MS
        # The client still waits, but nothing is reported: no busy loop.
        assert world.loop.run(0) == []
    assert not closed(client)
    assert capfd.readouterr().err == (
        "Failed to accept: Too many open files. Waiting until a connection ends.\n"
    )
    acceptor.tick(acceptor.resume_ms - 1)
    assert not listener.accepting
    acceptor.tick(acceptor.resume_ms)
    assert listener.accepting
    assert acceptor.resume_ms is None
    world.until(lambda: world.relay.connections)
    assert world.relay.connections == 1


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_repeated_pauses_are_one_warning(world, fake_listeners, capfd, clock, error):
    listener = world.listener(world.listen(), "/run/x")
    acceptor = world.start()
    for _ in range(20):
        acceptor.handle(AcceptFailed(0, error))
        assert not listener.relay_listener.accepting
        acceptor.tick(acceptor.resume_ms)
        assert listener.relay_listener.accepting
        clock.now += PAUSE_MS / 1000
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_pause_stops_all_listeners(world, fake_listeners):
    listeners = [world.listener(world.listen(), "/run/x") for _ in range(3)]
    acceptor = world.start()
    acceptor.handle(AcceptFailed(1, errno.EMFILE))
    acceptor.handle(AcceptFailed(2, errno.EMFILE))
    assert not any(listener.relay_listener.accepting for listener in listeners)
    assert not acceptor.broken
    acceptor.tick(acceptor.resume_ms)
    assert all(listener.relay_listener.accepting for listener in listeners)


def test_a_pause_ends_when_a_connection_ends(world):
    sock = world.listen()
    listener = world.listener(sock, world.target("up"))
    acceptor = world.start()
    first = world.client(sock)
    world.settle(1)
    assert acceptor.wake_at_count() == -1
    second = world.client(sock)
    with NoFds():
        world.turn()
    assert not listener.accepting
    assert acceptor.wake_at_count() == 0  # so run() returns when the first connection has ended
    world.relay.wake_at_count = acceptor.wake_at_count()
    first.close()
    served, _ = world.backend.accept()
    served.close()
    acceptor.resume_ms += 10**9
    assert world.loop.run(PATIENCE * 1000) == []
    world.turn()
    assert listener.accepting
    world.until(lambda: world.relay.connections)
    assert not closed(second)


def test_no_client_is_accepted_when_a_pause_ends_after_stop(world, fake_listeners):
    """After SIGTERM, clients in the backlog are left to the next start."""
    listener = world.listener(world.listen(), "/run/x")
    acceptor = world.start()
    acceptor.handle(AcceptFailed(0, errno.EMFILE))
    resume_ms = acceptor.resume_ms
    acceptor.stop()
    acceptor.tick(resume_ms)
    assert not listener.relay_listener.accepting


def test_a_listener_that_cannot_start_yet_is_started_later(world, fake_listeners):
    """epoll_ctl(2) needs memory too, which may have run out."""
    listener = world.listener(world.listen(), "/run/x")
    acceptor = world.start()
    acceptor.handle(AcceptFailed(0, errno.ENOMEM))
    listener.relay_listener.start_error = errno.ENOMEM
    acceptor.tick(acceptor.resume_ms)
    assert not listener.relay_listener.accepting
    listener.relay_listener.start_error = 0
    assert acceptor.resume_ms is not None
    acceptor.tick(acceptor.resume_ms)
    assert listener.relay_listener.accepting


# ── other errors of accept ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error", [errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN])
def test_an_error_of_one_client_does_not_stop_the_listener(world, fake_listeners, capfd, error):
    listener = world.listener(world.listen(), "/run/x")
    acceptor = world.start()
    acceptor.handle(AcceptFailed(0, error))
    acceptor.handle(AcceptFailed(0, error))
    assert listener.relay_listener.accepting
    assert acceptor.resume_ms is None
    assert not acceptor.broken
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"Failed to accept from {listener.text}: {os.strerror(error)}."


@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM, errno.ENOSYS])
def test_an_error_that_may_last_causes_no_busy_loop(world, fake_listeners, error):
    """If a security module or a seccomp filter forbids accept(2), the client stays in the backlog
    and the listener stays readable."""
    listener = world.listener(world.listen(), "/run/x")
    acceptor = world.start()
    acceptor.handle(AcceptFailed(0, error))
    assert not listener.relay_listener.accepting
    assert acceptor.resume_ms is not None


def test_a_broken_listener_is_stopped(world, capfd):
    sock = world.listen()
    listener = world.listener(sock, world.target("up"))
    acceptor = world.start()
    sock.shutdown(socket.SHUT_RDWR)
    assert [event.error for event in world.turn()] == [errno.EINVAL]
    assert not listener.accepting
    assert acceptor.broken
    assert world.loop.run(0) == []
    assert capfd.readouterr().err == (f"Failed to accept from {listener.text}: Invalid argument.\n")


def test_other_listeners_are_not_stopped_with_it(world):
    bad, good = world.listen(), world.listen()
    target = world.target("up")
    world.listener(bad, target)
    world.listener(good, target)
    acceptor = world.start()
    bad.shutdown(socket.SHUT_RDWR)
    world.client(good)
    world.settle(1)
    assert not acceptor.broken
    assert world.relay.connections == 1


def test_a_broken_listener_stays_stopped_after_a_pause(world, fake_listeners):
    bad, good = (world.listener(world.listen(), "/run/x") for _ in range(2))
    acceptor = world.start()
    acceptor.handle(AcceptFailed(bad.index, errno.EBADF))
    acceptor.handle(AcceptFailed(good.index, errno.EMFILE))
    acceptor.tick(acceptor.resume_ms)
    assert good.relay_listener.accepting
    assert not bad.relay_listener.accepting


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_listener_that_breaks_during_a_pause_is_not_the_end(world, fake_listeners, order):
    listeners = [world.listener(world.listen(), "/run/x") for _ in range(2)]
    acceptor = world.start()
    events = [AcceptFailed(0, errno.EBADF), AcceptFailed(1, errno.EMFILE)]
    for at in order:
        acceptor.handle(events[at])
    assert not acceptor.broken
    acceptor.tick(acceptor.resume_ms)
    assert listeners[1].relay_listener.accepting


# ── loops ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [socket.AF_UNIX, socket.AF_INET])
@pytest.mark.parametrize("proxy_protocol", [0, 1])
def test_a_loop_is_refused_with_one_line(world, capfd, clock, kind, proxy_protocol):
    sock = world.listen(kind)
    name = sockaddr.text(sockaddr.from_socket_name(kind, sock.getsockname()))
    listener = world.listener(sock, name)
    world.start(proxy_protocol=proxy_protocol)
    assert listener.text == name
    # A UNIX client must be another process: its PID is what is compared.
    clients = [connect_elsewhere(sock) for _ in range(3)]
    world.settle(6)
    world.until(lambda: not world.relay.connections)
    totals = world.relay.totals()
    assert (totals.accepted, totals.refused) == (6, 3)
    assert capfd.readouterr().err.splitlines() == [
        f"Refusing connection: target {name} leads back to our own listener {name}."
    ]
    for pid in clients:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def connect_elsewhere(sock):
    """Connect from a process of its own, which waits until it is closed; return its PID."""
    connected, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            one = socket.socket(sock.family)
            one.settimeout(PATIENCE)
            one.connect(sock.getsockname())
            os.write(tell, b"x")
            try:
                os._exit(len(one.recv(1)))
            except ConnectionResetError:
                os._exit(0)
        finally:
            os._exit(9)
    os.close(tell)
    assert os.read(connected, 1) == b"x"
    os.close(connected)
    return pid


def test_a_client_that_is_refused_is_a_warning(world, fake_listeners, levels):
    world.listener(world.listen(), "/run/x")
    acceptor = world.start(1)
    peer = sockaddr.pack_inet("192.0.2.7", 5000)
    acceptor.handle(Refused(0, peer))
    peers.log_addresses(wanted=False)
    try:
        acceptor.handle(Refused(0, peer))
        log._repeats.clear()
        acceptor.handle(Refused(0, peer))
    finally:
        peers.log_addresses(wanted=True)
    assert levels == [
        (log.WARNING, f"{LIMIT_LINE} Client: 192.0.2.7:5000."),
        (log.WARNING, LIMIT_LINE),
    ]


def test_events_go_to_their_listener(world, fake_listeners, capfd):
    listeners = [world.listener(world.listen(), f"/run/x{number}") for number in range(2)]
    acceptor = world.start(1)
    acceptor.handle(AcceptFailed(1, errno.ELOOP))
    assert f"target /run/x1 leads back to our own listener {listeners[1].text}." in (
        capfd.readouterr().err
    )
    acceptor.handle(Refused(0, sockaddr.pack_inet("192.0.2.7", 5000)))
    assert capfd.readouterr().err == f"{LIMIT_LINE} Client: 192.0.2.7:5000.\n"
    ours, theirs = socket.socketpair()
    with ours:
        acceptor.handle(Accepted(1, theirs.detach(), b""))
        assert len(listeners[1].upstream.held) == 1
        assert not listeners[0].upstream.held
        again, last = socket.socketpair()
        with again:
            acceptor.handle(Accepted(0, last.detach(), b""))
            assert again.recv(1) == b""
    assert acceptor.refusals.count == 1
