"""Listeners: which clients are accepted, which are refused, and which are the relay itself."""

import errno
import os
import socket

import pytest
from kit.child import in_child
from kit.socket_state import state_of
from kit.sockets import FAMILIES, open_listener, reset
from kit.stepped import close, half_close, open_client
from kit.traffic import payload

from proxyd._relay import (
    CHECK_PORT,
    CHECK_TCP,
    CHECK_UNIX,
    Accepted,
    AcceptFailed,
    Refused,
    RelayListener,
    socket_names,
)


@pytest.fixture
def start_listener():
    """Starts further listeners of a relay, and stops them before the relay goes."""
    started = []

    def start(rig, listen_socket, check=0, index=9):
        listen_socket.setblocking(False)  # as the policy does
        fd, family = listen_socket.fileno(), listen_socket.family
        listener = RelayListener(rig.relay, fd, family, check, index)
        listener.start()
        started.append(listener)
        return listener

    yield start
    while started:
        started.pop().stop()


def test_clients_are_accepted_in_order(rigs, pair):
    rig = rigs(*pair)
    clients = [rig.keep(open_client(rig.listen_socket)) for _ in range(40)]
    rig.until(lambda: len(rig.of_kind(Accepted)) == 40, "forty clients")
    for number, event in enumerate(rig.of_kind(Accepted)):
        assert event.listener == 0
        os.write(event.client, b"%d" % number)
    assert [client.recv(10) for client in clients] == [b"%d" % n for n in range(40)]
    assert rig.totals().accepted == 40


def test_auto_connect_needs_no_policy(rigs, pair, way):
    rig = rigs(*pair, **way)
    rig.listener.auto_connect(rig.address)
    data = payload(200_000)
    for _ in range(3):
        client = rig.keep(open_client(rig.listen_socket))
        target = rig.accept_at_backend()
        rig.send(client, data, half_close)
        assert rig.read_to_end(target) == (data, "eof")
        rig.send(target, b"thanks", close)
        assert rig.read_to_end(client) == (b"thanks", "eof")
        close(client)
    rig.until(lambda: not rig.relay.connections, "the end of all")
    assert rig.listener.connected_count == 3
    rig.listener.auto_connect(None)
    rig.keep(open_client(rig.listen_socket))
    rig.until(lambda: rig.of_kind(Accepted), "a client for the policy")


def test_a_client_of_another_port_goes_to_the_policy(rigs, start_listener):
    """TPROXY brings such clients; here, another socket takes the place of the listener's."""
    rig = rigs()
    first, second = (rig.keep(open_listener("tcp4", rigs.directory)) for _ in range(2))
    listener = start_listener(rig, first, CHECK_PORT)
    listener.auto_connect(rig.address)
    client = rig.keep(open_client(first))
    target = rig.accept_at_backend()
    rig.send(client, b"mine")
    assert rig.read(target, 4) == b"mine"
    listener.stop()
    os.dup2(second.fileno(), first.fileno())
    listener.start()
    other = rig.keep(open_client(second))
    rig.until(lambda: rig.of_kind(Accepted), "a client for the policy")
    event = rig.of_kind(Accepted)[0]
    assert event.listener == 9
    assert socket_names(event.client)[0] == socket_names(other.fileno())[1]
    assert listener.connected_count == 1


def test_auto_connect_that_fails_at_once(rigs, tmp_path):
    """A UNIX target that does not exist: the policy gets the client with a ConnectFailed."""
    rig = rigs("tcp4", "unix")
    rig.listener.auto_connect(b"\x01\x00/nowhere\x00")
    client = rig.keep(open_client(rig.listen_socket))
    rig.until(rig.failures, "the failure")
    failed = rig.failures()[0]
    assert (failed.error, failed.listener, failed.pending) == (errno.ENOENT, 0, b"")
    assert failed.peer == socket_names(client.fileno())[1]
    assert os.fstat(failed.client)
    assert rig.relay.connections == 0


def test_no_client_overtakes_one_whose_connect_fails_at_once(rigs):
    """It comes first, so the later clients go to the policy as well."""
    rig = rigs("tcp4", "unix")
    rig.listener.auto_connect(b"\x01\x00/nowhere\x00")
    for _ in range(3):
        rig.keep(open_client(rig.listen_socket))
    rig.until(lambda: len(rig.of_kind(Accepted)) == 2, "two clients for the policy")
    assert len(rig.failures()) == 1
    assert rig.listener.connected_count == 1


def test_auto_connect_that_is_refused_later(rigs):
    """The refusal comes after connect(2): bytes already taken come back with the client."""
    rig = rigs()
    dead = open_listener("tcp4", rigs.directory)
    address = socket_names(dead.fileno())[1]
    dead.close()
    rig.listener.auto_connect(address)
    client = rig.keep(open_client(rig.listen_socket))
    client.send(b"hello")
    rig.until(rig.failures, "the failure")
    failed = rig.failures()[0]
    assert failed.error == errno.ECONNREFUSED
    assert failed.peer == socket_names(client.fileno())[1]
    rest = b"" if failed.pending else os.read(failed.client, 100)
    assert failed.pending + rest == b"hello"


def test_limit_is_exact(rigs):
    """At the limit, further clients wait for room for a moment and are then refused."""
    rig = rigs()
    rig.listener.auto_connect(rig.address)
    rig.relay.connections_max = 3
    served = [rig.keep(open_client(rig.listen_socket)) for _ in range(3)]
    targets = [rig.accept_at_backend() for _ in served]
    extra = [rig.keep(open_client(rig.listen_socket)) for _ in range(2)]
    names = {socket_names(client.fileno())[1] for client in extra}
    rig.until(lambda: len(rig.of_kind(Refused)) == 2, "the refusals")
    assert {event.peer for event in rig.of_kind(Refused)} == names
    assert rig.relay.connections == 3
    for client in extra:
        assert rig.read_to_end(client)[0] == b""
    assert (rig.totals().accepted, rig.totals().refused) == (5, 2)
    rig.send(served[0], b"still served")
    assert rig.read(targets[0], 12) == b"still served"
    close(served[1])
    close(targets[1])
    rig.until(lambda: rig.relay.connections == 2, "room")
    late = rig.keep(open_client(rig.listen_socket))
    rig.send(late, b"in")
    assert rig.read(rig.accept_at_backend(), 2) == b"in"
    assert len(rig.of_kind(Refused)) == 2


def test_client_at_the_limit_waits_for_room(rigs):
    """A client that arrives just before another one leaves is served."""
    rig = rigs()
    rig.listener.auto_connect(rig.address)
    rig.relay.connections_max = 1
    for _ in range(20):
        client = rig.keep(open_client(rig.listen_socket))
        target = rig.accept_at_backend()
        successor = rig.keep(open_client(rig.listen_socket))
        rig.settle()
        close(client)
        close(target)
        rig.send(successor, b"next")
        target = rig.accept_at_backend()
        assert rig.read(target, 4) == b"next"
        close(successor)
        close(target)
        rig.until(lambda: not rig.relay.connections, "room")
    assert not rig.of_kind(Refused)


@pytest.mark.parametrize("limit", range(1, 13))
def test_the_wait_for_room_begins_with_the_client(rigs, limit):
    """It does not begin when the limit is reached, long before: no client was waiting then."""
    rig = rigs()
    rig.listener.auto_connect(rig.address)
    rig.relay.connections_max = limit
    clients = [rig.keep(open_client(rig.listen_socket)) for _ in range(limit)]
    targets = [rig.accept_at_backend() for _ in range(limit)]
    rig.pass_time(0.05)
    late = rig.keep(open_client(rig.listen_socket))
    rig.turn()
    assert not rig.of_kind(Refused)
    for connection in (clients[0], targets[0]):
        close(connection)
    late.send(b"late")
    assert rig.read(rig.accept_at_backend(), 4) == b"late"


def test_relay_at_the_limit_is_calm(rigs):
    """Clients in the backlog do not keep it awake."""
    rig = rigs()
    rig.listener.auto_connect(rig.address)
    rig.relay.connections_max = 1
    rig.keep(open_client(rig.listen_socket))
    rig.settle()
    for _ in range(3):
        rig.keep(open_client(rig.listen_socket))
        assert rig.is_calm()


def test_listener_that_is_stopped_while_it_waits_for_room(rigs):
    rig = rigs()
    rig.listener.auto_connect(rig.address)
    rig.relay.connections_max = 1
    first = rig.keep(open_client(rig.listen_socket))
    rig.settle()
    rig.keep(open_client(rig.listen_socket))
    rig.settle()
    rig.listener.stop()
    reset(first)
    rig.until(lambda: not rig.relay.connections, "room")
    assert rig.is_calm()
    rig.listener.start()
    rig.until(lambda: rig.relay.connections == 1, "the client that waited")


def test_listener_that_breaks_while_it_waits_for_room(rigs):
    """A process that shares the socket calls shutdown(2): epoll reports EPOLLHUP, whatever it is
    asked for. Connections continue. (In a child: a relay that hangs cannot be interrupted.)"""

    def scenario():
        rig = rigs()
        rig.listener.auto_connect(rig.address)
        rig.relay.connections_max = 1
        first = rig.keep(open_client(rig.listen_socket))
        target = rig.accept_at_backend()
        rig.keep(open_client(rig.listen_socket))
        rig.settle()
        rig.listen_socket.shutdown(socket.SHUT_RDWR)
        for _ in range(10):
            rig.turn()
        rig.send(first, b"still served")
        assert rig.read(target, 12) == b"still served"
        rig.relay.connections_max = 2
        rig.until(lambda: rig.of_kind(AcceptFailed), "the listener's error")

    in_child(scenario)


def test_accept_error_is_reported(rigs, start_listener):
    """A socket that does not listen: EINVAL, which the policy handles."""
    rig = rigs()
    broken = rig.keep(socket.socket())
    start_listener(rig, broken)
    rig.until(lambda: rig.of_kind(AcceptFailed), "the error")
    failed = rig.of_kind(AcceptFailed)[0]
    assert (failed.error, failed.listener) == (errno.EINVAL, 9)


def test_listener_without_a_socket(rigs):
    rig = rigs()
    listener = RelayListener(rig.relay, 999_999, socket.AF_INET, 0, 0)
    with pytest.raises(OSError):
        listener.start()
    listener.stop()


def test_watched_fds_go_before_clients(rigs):
    """If a watched fd is ready too, the policy is told before any client is accepted."""
    rig = rigs()
    rd, wr = os.pipe()
    rig.relay.watch(rd)
    rig.keep(open_client(rig.listen_socket))
    os.write(wr, b"stop")
    assert [event.fd for event in rig.relay.run(100)] == [rd]
    rig.listener.stop()
    os.read(rd, 4)
    assert rig.relay.run(0) == []
    rig.relay.unwatch(rd)
    os.close(rd)
    os.close(wr)


def test_clients_that_have_already_gone(rigs, pair):
    """Clients that leave before they are accepted do not disturb the others."""
    rig = rigs(*pair)
    rig.listener.auto_connect(rig.address)
    for number in range(10):
        client = open_client(rig.listen_socket)
        reset(client) if number % 2 else close(client)
    survivor = rig.keep(open_client(rig.listen_socket))
    survivor.send(b"I am here")

    def heard():
        rig.turn()
        try:
            connection, _ = rig.backend.accept()
        except BlockingIOError:
            return False
        rig.keep(connection).setblocking(False)
        rig.settle()
        try:
            return connection.recv(100) == b"I am here"
        except OSError:
            return False

    rig.until(heard, "the survivor's words")


# ── connections to itself ────────────────────────────────────────────────────────────────────────


def looping(rig, listen, host):
    """(a listening socket, its packed address as seen from `host`)."""
    listener = rig.keep(socket.socket(FAMILIES["tcp6" if ":" in listen else "tcp4"]))
    if listen == "::":
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind((listen, 0))
    listener.listen()
    listener.setblocking(False)
    near = socket.socket(FAMILIES["tcp6" if ":" in host else "tcp4"])
    near.bind((host, 0))
    packed = socket_names(near.fileno())[1]
    near.close()
    port = listener.getsockname()[1]
    return listener, packed[:2] + port.to_bytes(2, "big") + packed[4:]


@pytest.mark.parametrize(
    ("listen", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "0.0.0.0"),
        ("0.0.0.0", "127.0.0.2"),
        ("::1", "::1"),
        ("::", "::"),
        ("::", "127.0.0.1"),
        ("::", "::ffff:127.0.0.1"),
    ],
)
@pytest.mark.parametrize("how", ["connect", "dial", "adopt"])
def test_own_tcp_connection_is_recognised(rigs, start_listener, listen, host, how):
    """By the addresses of both ends: IPv4, IPv6, IPv4-mapped IPv6, and wildcard addresses."""
    rig = rigs()
    loop, address = looping(rig, listen, host)
    start_listener(rig, loop, CHECK_TCP)
    _, fd = rig.new_client()
    if how == "connect":
        rig.relay.connect(fd, FAMILIES["tcp4"], address)
    else:
        target = rig.relay.dial(address)
        if how == "adopt":
            rig.relay.adopt(fd, FAMILIES["tcp4"], target)
    rig.until(lambda: rig.of_kind(AcceptFailed), "the proof")
    assert [(e.error, e.listener) for e in rig.of_kind(AcceptFailed)] == [(errno.ELOOP, 9)]
    assert rig.totals().refused == 1
    if how == "dial":
        rig.relay.hang_up(target)
        os.close(fd)


def bound_to_port_of(rig, name):
    """A new socket with the port of a packed address; None if another process has taken it."""
    stranger = rig.keep(socket.socket())
    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        stranger.bind(("127.0.0.1", int.from_bytes(name[2:4], "big")))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return stranger


def stranger_with_port_of_a_target(rig):
    """(a socket, one of the relay's with the same local port but another destination)."""
    while True:
        target = rig.relay.dial(rig.address)
        with socket.socket(fileno=os.dup(target)) as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger = bound_to_port_of(rig, socket_names(target)[1])
        if stranger is not None:
            return stranger, target
        rig.relay.hang_up(target)


def test_strangers_are_not_taken_for_the_relay(rigs, start_listener):
    """Not even if the relay has a socket with the same local port and another destination."""
    rig = rigs()
    loop, _ = looping(rig, "127.0.0.1", "127.0.0.1")
    start_listener(rig, loop, CHECK_TCP)
    stranger, target = stranger_with_port_of_a_target(rig)
    stranger.connect(loop.getsockname())
    rig.until(lambda: rig.of_kind(Accepted), "the stranger")
    assert not rig.of_kind(AcceptFailed)
    rig.relay.hang_up(target)


def stranger_after_a_target(rig, loop, address):
    """A socket with the local port of a former socket of the relay."""
    while True:
        target = rig.relay.dial(address)
        name = socket_names(target)[1]
        accepted, _ = loop.accept()
        reset(accepted)
        rig.until(lambda target=target: state_of(target) & 16, "the hang-up")
        rig.relay.hang_up(target)
        stranger = bound_to_port_of(rig, name)
        if stranger is not None:
            return stranger


def test_addresses_are_forgotten_with_their_sockets(rigs, start_listener):
    """A stranger may be given the port of a former socket of the relay."""
    rig = rigs()
    loop, address = looping(rig, "127.0.0.1", "127.0.0.1")
    stranger = stranger_after_a_target(rig, loop, address)
    start_listener(rig, loop, CHECK_TCP)
    stranger.connect(loop.getsockname())
    rig.until(lambda: rig.of_kind(Accepted), "the stranger")


def test_own_unix_connection_is_recognised(rigs, start_listener):
    """By the process at the other end."""
    rig = rigs("unix", "unix")
    loop = rig.keep(open_listener("unix", rigs.directory))
    start_listener(rig, loop, CHECK_UNIX)
    rig.keep(open_client(loop))
    rig.until(lambda: rig.of_kind(AcceptFailed), "the proof")
    assert [(e.error, e.listener) for e in rig.of_kind(AcceptFailed)] == [(errno.ELOOP, 9)]
    child = os.fork()
    if child == 0:
        stranger = open_client(loop)
        stranger.setblocking(True)
        stranger.recv(1)
        os._exit(0)
    rig.until(lambda: rig.of_kind(Accepted), "the stranger")
    os.close(rig.of_kind(Accepted)[0].client)
    rig.events.clear()
    os.waitpid(child, 0)


def test_one_listener_does_not_starve_another(rigs, start_listener):
    """Two listeners with many clients: both are served in every turn."""
    rig = rigs()
    other = rig.keep(open_listener("tcp4", rigs.directory))
    start_listener(rig, other)
    for _ in range(30):
        rig.keep(open_client(rig.listen_socket))
        rig.keep(open_client(other))
    rig.turn(100)
    assert {event.listener for event in rig.of_kind(Accepted)} == {0, 9}
    rig.until(lambda: len(rig.of_kind(Accepted)) == 60, "all clients")
    assert not rig.failures()
