"""Listeners: who is accepted, who is refused, who is ourselves."""

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
def gates():
    """Opens gates, and shuts them before their relay goes."""
    opened = []

    def open_gate(rig, listener, check=0, index=9):
        gate = RelayListener(rig.relay, listener.fileno(), listener.family, check, index)
        gate.start()
        opened.append(gate)
        return gate

    yield open_gate
    while opened:
        opened.pop().stop()


def test_clients_come_in_order(rigs, pair):
    rig = rigs(*pair)
    clients = [rig.keep(open_client(rig.door)) for _ in range(40)]
    rig.until(lambda: len(rig.of_kind(Accepted)) == 40, "forty clients")
    for number, event in enumerate(rig.of_kind(Accepted)):
        assert event.listener == 0
        os.write(event.client, b"%d" % number)
    assert [client.recv(10) for client in clients] == [b"%d" % n for n in range(40)]
    assert rig.totals().accepted == 40


def test_express_connects_without_the_policy(rigs, pair, way):
    rig = rigs(*pair, **way)
    rig.gate.auto_connect(rig.address)
    data = payload(200_000)
    for _ in range(3):
        client = rig.keep(open_client(rig.door))
        target = rig.meet()
        rig.send(client, data, half_close)
        assert rig.read_to_end(target) == (data, "eof")
        rig.send(target, b"thanks", close)
        assert rig.read_to_end(client) == (b"thanks", "eof")
        close(client)
    rig.until(lambda: not rig.relay.connections, "the end of all")
    assert rig.gate.connected_count == 3
    rig.gate.auto_connect(None)
    rig.keep(open_client(rig.door))
    rig.until(lambda: rig.of_kind(Accepted), "a client for the policy")


def test_a_client_of_another_port_comes_to_the_policy(rigs, gates):
    """As TPROXY brings them; here another listener takes the place of the gate's."""
    rig = rigs()
    first, second = (
        rig.keep(open_listener("tcp4", rigs.directory, blocking=False)) for _ in range(2)
    )
    gate = gates(rig, first, CHECK_PORT)
    gate.auto_connect(rig.address)
    client = rig.keep(open_client(first))
    target = rig.meet()
    rig.send(client, b"mine")
    assert rig.read(target, 4) == b"mine"
    gate.stop()
    os.dup2(second.fileno(), first.fileno())
    gate.start()
    other = rig.keep(open_client(second))
    rig.until(lambda: rig.of_kind(Accepted), "a client for the policy")
    event = rig.of_kind(Accepted)[0]
    assert event.listener == 9
    assert socket_names(event.client)[0] == socket_names(other.fileno())[1]
    assert gate.connected_count == 1


def test_express_that_fails_at_once(rigs, tmp_path):
    """A UNIX target that is not there: the client comes to the policy as a failed one."""
    rig = rigs("tcp4", "unix")
    rig.gate.auto_connect(b"\x01\x00/nowhere\x00")
    rig.keep(open_client(rig.door))
    rig.until(rig.failures, "the failure")
    failed = rig.failures()[0]
    assert (failed.error, failed.listener, failed.pending) == (errno.ENOENT, 0, b"")
    assert os.fstat(failed.client)
    assert rig.relay.connections == 0


def test_nobody_overtakes_one_that_fails_at_once(rigs):
    """Its place is before those who come after it, so they are for the policy too."""
    rig = rigs("tcp4", "unix")
    rig.gate.auto_connect(b"\x01\x00/nowhere\x00")
    for _ in range(3):
        rig.keep(open_client(rig.door))
    rig.until(lambda: len(rig.of_kind(Accepted)) == 2, "two for the policy")
    assert len(rig.failures()) == 1
    assert rig.gate.connected_count == 1


def test_express_that_is_refused_later(rigs):
    """The kernel's answer comes after connect(): bytes already taken come back with the client."""
    rig = rigs()
    dead = open_listener("tcp4", rigs.directory, blocking=False)
    address = socket_names(dead.fileno())[1]
    dead.close()
    rig.gate.auto_connect(address)
    client = rig.keep(open_client(rig.door))
    client.send(b"hello")
    rig.until(rig.failures, "the failure")
    failed = rig.failures()[0]
    assert failed.error == errno.ECONNREFUSED
    rest = b"" if failed.pending else os.read(failed.client, 100)
    assert failed.pending + rest == b"hello"


def test_limit_is_exact(rigs):
    """At the limit, further ones wait a moment for room and are then refused."""
    rig = rigs()
    rig.gate.auto_connect(rig.address)
    rig.relay.connections_max = 3
    served = [rig.keep(open_client(rig.door)) for _ in range(3)]
    targets = [rig.meet() for _ in served]
    extra = [rig.keep(open_client(rig.door)) for _ in range(2)]
    rig.until(lambda: len(rig.of_kind(Refused)) == 2, "the refusals")
    assert rig.relay.connections == 3
    for client in extra:
        assert rig.read_to_end(client)[0] == b""
    assert (rig.totals().accepted, rig.totals().refused) == (5, 2)
    rig.send(served[0], b"still served")
    assert rig.read(targets[0], 12) == b"still served"
    close(served[1])
    close(targets[1])
    rig.until(lambda: rig.relay.connections == 2, "room")
    late = rig.keep(open_client(rig.door))
    rig.send(late, b"in")
    assert rig.read(rig.meet(), 2) == b"in"
    assert len(rig.of_kind(Refused)) == 2


def test_client_at_the_limit_waits_for_room(rigs):
    """Who comes just before somebody leaves is served."""
    rig = rigs()
    rig.gate.auto_connect(rig.address)
    rig.relay.connections_max = 1
    for _ in range(20):
        client = rig.keep(open_client(rig.door))
        target = rig.meet()
        successor = rig.keep(open_client(rig.door))
        rig.settle()
        close(client)
        close(target)
        rig.send(successor, b"next")
        target = rig.meet()
        assert rig.read(target, 4) == b"next"
        close(successor)
        close(target)
        rig.until(lambda: not rig.relay.connections, "room")
    assert not rig.of_kind(Refused)


@pytest.mark.parametrize("limit", range(1, 13))
def test_the_wait_for_room_begins_with_the_client(rigs, limit):
    """Not when the limit was reached, long before: nobody was waiting then."""
    rig = rigs()
    rig.gate.auto_connect(rig.address)
    rig.relay.connections_max = limit
    clients = [rig.keep(open_client(rig.door)) for _ in range(limit)]
    targets = [rig.meet() for _ in range(limit)]
    rig.pass_time(0.05)
    late = rig.keep(open_client(rig.door))
    rig.turn()
    assert not rig.of_kind(Refused)
    for connection in (clients[0], targets[0]):
        close(connection)
    late.send(b"late")
    assert rig.read(rig.meet(), 4) == b"late"


def test_full_gate_is_calm(rigs):
    """Clients in the backlog of a full gate keep nobody awake."""
    rig = rigs()
    rig.gate.auto_connect(rig.address)
    rig.relay.connections_max = 1
    rig.keep(open_client(rig.door))
    rig.settle()
    for _ in range(3):
        rig.keep(open_client(rig.door))
        assert rig.is_calm()


def test_gate_that_is_shut_while_it_waits_for_room(rigs):
    rig = rigs()
    rig.gate.auto_connect(rig.address)
    rig.relay.connections_max = 1
    first = rig.keep(open_client(rig.door))
    rig.settle()
    rig.keep(open_client(rig.door))
    rig.settle()
    rig.gate.stop()
    reset(first)
    rig.until(lambda: not rig.relay.connections, "room")
    assert rig.is_calm()
    rig.gate.start()
    rig.until(lambda: rig.relay.connections == 1, "the one who waited")


def test_listener_that_breaks_while_its_gate_is_full(rigs):
    """shutdown() of a listener, by whoever shares it: a HUP that cannot be silenced. The other
    gates and connections go on. (In a child, for a relay that hangs cannot be interrupted.)"""

    def scenario():
        rig = rigs()
        rig.gate.auto_connect(rig.address)
        rig.relay.connections_max = 1
        first = rig.keep(open_client(rig.door))
        target = rig.meet()
        rig.keep(open_client(rig.door))
        rig.settle()
        rig.door.shutdown(socket.SHUT_RDWR)
        for _ in range(10):
            rig.turn()
        rig.send(first, b"still served")
        assert rig.read(target, 12) == b"still served"
        rig.relay.connections_max = 2
        rig.until(lambda: rig.of_kind(AcceptFailed), "the listener's error")

    in_child(scenario)


def test_accept_error_is_told(rigs, gates):
    """A socket that does not listen: EINVAL, for the policy to decide."""
    rig = rigs()
    broken = rig.keep(socket.socket())
    gates(rig, broken)
    rig.until(lambda: rig.of_kind(AcceptFailed), "the error")
    failed = rig.of_kind(AcceptFailed)[0]
    assert (failed.error, failed.listener) == (errno.EINVAL, 9)


def test_gate_over_no_socket(rigs):
    rig = rigs()
    gate = RelayListener(rig.relay, 999_999, socket.AF_INET, 0, 0)
    with pytest.raises(OSError):
        gate.start()
    gate.stop()


def test_a_signal_goes_before_clients(rigs):
    """When a watched fd is ready as well, the policy hears of it before anybody is accepted."""
    rig = rigs()
    rd, wr = os.pipe()
    rig.relay.watch(rd)
    rig.keep(open_client(rig.door))
    os.write(wr, b"stop")
    assert [event.fd for event in rig.relay.run(100)] == [rd]
    rig.gate.stop()
    os.read(rd, 4)
    assert rig.relay.run(0) == []
    rig.relay.unwatch(rd)
    os.close(rd)
    os.close(wr)


def test_clients_that_have_already_gone(rigs, pair):
    """Connected and gone again before they are accepted: each costs nothing but itself."""
    rig = rigs(*pair)
    rig.gate.auto_connect(rig.address)
    for number in range(10):
        client = open_client(rig.door)
        reset(client) if number % 2 else close(client)
    survivor = rig.keep(open_client(rig.door))
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


# ── ourselves ────────────────────────────────────────────────────────────────────────────────────


def looping(rig, listen, host):
    """(listener, packed address of it as seen from `host`)."""
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
def test_own_tcp_connection_is_recognised(rigs, gates, listen, host, how):
    """Loops are proven by both ends: IPv4, IPv6, IPv4 mapped into IPv6, and any address."""
    rig = rigs()
    loop, address = looping(rig, listen, host)
    gates(rig, loop, CHECK_TCP)
    _, fd = rig.knock()
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
    """A new socket with the port of a packed address; None where another process has that too."""
    stranger = rig.keep(socket.socket())
    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        stranger.bind(("127.0.0.1", int.from_bytes(name[2:4], "big")))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return stranger


def stranger_beside_a_target(rig):
    """(a socket, one of our own with the same port towards another place)."""
    while True:
        target = rig.relay.dial(rig.address)
        with socket.socket(fileno=os.dup(target)) as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger = bound_to_port_of(rig, socket_names(target)[1])
        if stranger is not None:
            return stranger, target
        rig.relay.hang_up(target)


def test_strangers_are_not_taken_for_ourselves(rigs, gates):
    """Neither one from elsewhere, nor one whose port one of ours has towards another place."""
    rig = rigs()
    loop, _ = looping(rig, "127.0.0.1", "127.0.0.1")
    gates(rig, loop, CHECK_TCP)
    stranger, target = stranger_beside_a_target(rig)
    stranger.connect(loop.getsockname())
    rig.until(lambda: rig.of_kind(Accepted), "the stranger")
    assert not rig.of_kind(AcceptFailed)
    rig.relay.hang_up(target)


def stranger_after_a_target(rig, loop, address):
    """A socket with the port that one of our own has had."""
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


def test_addresses_are_forgotten_with_their_sockets(rigs, gates):
    """A stranger that is given the port of one of our sockets of the past."""
    rig = rigs()
    loop, address = looping(rig, "127.0.0.1", "127.0.0.1")
    stranger = stranger_after_a_target(rig, loop, address)
    gates(rig, loop, CHECK_TCP)
    stranger.connect(loop.getsockname())
    rig.until(lambda: rig.of_kind(Accepted), "the stranger")


def test_own_unix_connection_is_recognised(rigs, gates):
    """By the process at the other end."""
    rig = rigs("unix", "unix")
    door = rig.keep(open_listener("unix", rigs.directory, blocking=False))
    gates(rig, door, CHECK_UNIX)
    rig.keep(open_client(door))
    rig.until(lambda: rig.of_kind(AcceptFailed), "the proof")
    assert [(e.error, e.listener) for e in rig.of_kind(AcceptFailed)] == [(errno.ELOOP, 9)]
    child = os.fork()
    if child == 0:
        stranger = open_client(door)
        stranger.setblocking(True)
        stranger.recv(1)
        os._exit(0)
    rig.until(lambda: rig.of_kind(Accepted), "the stranger")
    os.close(rig.of_kind(Accepted)[0].client)
    rig.events.clear()
    os.waitpid(child, 0)


def test_one_gate_does_not_starve_another(rigs, gates):
    """Two crowded listeners: both are served in every turn."""
    rig = rigs()
    other = rig.keep(open_listener("tcp4", rigs.directory, blocking=False))
    gates(rig, other)
    for _ in range(30):
        rig.keep(open_client(rig.door))
        rig.keep(open_client(other))
    rig.turn(100)
    assert {event.listener for event in rig.of_kind(Accepted)} == {0, 9}
    rig.until(lambda: len(rig.of_kind(Accepted)) == 60, "all clients")
    assert not rig.failures()
