"""Connecting to the target: who owns the client's fd, and where the bytes already sent end up."""

import errno
import os
import select
import socket

import pytest
from kit.child import in_child
from kit.namespaces import in_own_network
from kit.rig import PATIENCE_S, values
from kit.socket_state import option, set_option, unread
from kit.sockets import FAMILIES, open_listener, reset
from kit.stepped import Incoming, Outgoing, close, half_close, open_client
from kit.traffic import payload

from proxyd._relay import ConnectFailed, connected, peek, socket_error, socket_names, tune_socket

EPOLLOUT = 4


@pytest.fixture(params=["tcp4", "tcp6", "unix"])
def family(request):
    return request.param


def dead_address(family, directory):
    """The address of a listener that has been closed."""
    listener = open_listener(family, directory)
    address = socket_names(listener.fileno())[1]
    listener.close()
    return address


def failure(rig):
    """Wait for a ConnectFailed event: (fd, errno, listener, pending)."""
    rig.until(rig.failures, "a failed connect")
    failed = rig.failures()[0]
    assert 0 < failed.opened_ms <= rig.relay.now_ms
    return failed.client, failed.error, failed.listener, failed.pending


# ── refused ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("client", ["tcp4", "unix"])
@pytest.mark.parametrize("target", ["tcp4", "tcp6"])
def test_refused_connect_gives_the_client_back(rigs, client, target):
    rig = rigs(client, target)
    rig.address = dead_address(target, rigs.directory)
    _, fd = rig.new_client()
    rig.connect(fd, listener=-5)
    assert failure(rig) == (fd, errno.ECONNREFUSED, -5, b"")
    assert rig.relay.connections == 0
    assert os.fstat(fd)


def test_refused_connect_gives_back_what_the_client_has_sent(rigs):
    """Bytes already taken are there for the next target, each of them once."""
    rig = rigs()
    good, rig.address = rig.address, dead_address("tcp4", rigs.directory)
    client, fd = rig.new_client()
    data = payload(50_000)
    outgoing = Outgoing(client, data, half_close)
    outgoing.step()
    rig.connect(fd)
    back, error, _, pending = failure(rig)
    assert (back, error) == (fd, errno.ECONNREFUSED)
    assert data.startswith(pending)
    rig.address = good
    rig.connect(fd, preamble=pending)
    incoming = Incoming(rig.accept_at_backend())
    rig.run(outgoing, incoming)
    assert (incoming.data, incoming.end) == (data, "eof")


def test_pending_bytes_are_not_lost_however_often_it_fails(rigs):
    """Ten refusals in a row, while the client keeps sending: all of it reaches the next target."""
    rig = rigs()
    good, bad = rig.address, dead_address("tcp4", rigs.directory)
    client, fd = rig.new_client()
    expected, pending = b"PROXY ", b"PROXY "
    for number in range(10):
        word = b"word %d, " % number
        client.send(word)
        expected += word
        rig.address = bad
        rig.connect(fd, preamble=pending, listener=number)
        rig.until(rig.failures, "a failed connect")
        (event,) = rig.failures()
        rig.events.remove(event)
        assert event.listener == number
        pending = event.pending
    rig.address = good
    rig.connect(fd, preamble=pending)
    target = rig.accept_at_backend()
    half_close(client)
    assert rig.read_to_end(target) == (expected, "eof")


def test_connect_that_fails_at_once_leaves_the_client_alone(rigs):
    """A UNIX target that does not exist: the client still belongs to the caller."""
    rig = rigs("tcp4", "unix")
    rig.address = dead_address("unix", rigs.directory)
    client, fd = rig.new_client()
    failed = rig.connect(fd, preamble=b"x" * 1000, listener=7)
    assert isinstance(failed, ConnectFailed)
    assert values(failed) == {
        "listener": 7,
        "client": fd,
        "error": errno.ECONNREFUSED,
        "pending": b"x" * 1000,
        "opened_ms": rig.relay.now_ms,
        "connection": 0,
        "peer": b"",
        "has_unsent": False,
    }
    assert (rig.relay.connections, rig.relay.held) == (0, 1)  # counted by the Accepted event
    client.send(b"hello")
    rig.until(lambda: unread(client) == 0, "nothing")
    rig.settle()
    assert os.read(fd, 100) == b"hello"
    os.close(fd)
    assert rig.relay.run(0) == []


def test_full_unix_backlog(rigs):
    """EAGAIN, at once: no event announces room, so the policy retries by a timer."""
    rig = rigs("tcp4", "unix")
    rig.backend.listen(0)
    rig.keep(open_client(rig.backend))
    client, fd = rig.new_client()
    assert rig.connect(fd).error == errno.EAGAIN
    rig.accept_at_backend()
    rig.connect(fd)
    client.send(b"now")
    assert rig.read(rig.accept_at_backend(), 3) == b"now"


def test_bad_addresses_leave_nothing_behind(rigs):
    """Too long, of an unknown family, or none at all: the client stays the caller's."""
    rig = rigs()
    _, fd = rig.new_client()
    for address, kind in [
        (b"\x02\x00" * 200, ValueError),
        (None, TypeError),
    ]:
        rig.address = address
        with pytest.raises(kind):
            rig.connect(fd)
    for rig.address in (b"\xff\xff" + bytes(14), b""):
        assert rig.connect(fd).error == errno.EAFNOSUPPORT
    os.close(fd)
    assert rig.relay.connections == 0


# ── the preamble ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 107, 16384, 200_000])
def test_preamble_goes_first(rigs, pair, way, size):
    rig = rigs(*pair, **way)
    client, fd = rig.new_client()
    client.send(b"from the client")
    preamble = payload(size)
    number = rig.connect(fd, preamble=preamble)
    target = rig.accept_at_backend()
    half_close(client)
    assert rig.read_to_end(target) == (preamble + b"from the client", "eof")
    close(target)
    assert rig.until_ended(number) == ("ended", 15, 0)
    assert rig.totals().bytes_to_targets == size + 15


def test_preamble_in_pieces(rigs, pair, way):
    """The socket towards the target takes only a little at a time."""
    rig = rigs(*pair, **way, target_buffers={"receive_buffer": 2048})
    preamble = payload(300_000)
    link = rig.adopted_link(send_buffer=2048, preamble=preamble)
    data = payload(300_000, 2)
    incoming = Incoming(link.target, unit=1000)
    rig.run(Outgoing(link.client, data, half_close), incoming)
    assert (incoming.data, incoming.end) == (preamble + data, "eof")


def test_preamble_alone(rigs, pair):
    """A client that sends nothing: the preamble is sent all the same, and so is the end."""
    rig = rigs(*pair)
    client, fd = rig.new_client()
    rig.connect(fd, preamble=b"PROXY UNKNOWN\r\n")
    target = rig.accept_at_backend()
    assert rig.read(target, 15) == b"PROXY UNKNOWN\r\n"
    half_close(client)
    assert rig.read_to_end(target) == (b"", "eof")


# ── the client while the connect is under way ────────────────────────────────────────────────────


def unreachable(rig):
    """Fill the backend's backlog, so that connects to it hang; the connection that fills it."""
    rig.backend.listen(0)
    return rig.keep(open_client(rig.backend))


def test_client_that_resets_while_connecting(rigs):
    """Its connection is dropped, whether or not it had sent anything."""
    rig = rigs("tcp4", "tcp4")
    unreachable(rig)
    for word in (b"", b"something"):
        other, fd = rig.new_client()
        other.send(word)
        number = rig.connect(fd)
        rig.settle()
        assert rig.relay.connections == 1
        reset(other)
        rig.until(lambda: not rig.relay.connections, "the end of the connection")
        assert rig.ended(number).ending == "client gone"
    assert not rig.failures()


def test_client_that_has_reset_before_the_connect(rigs):
    rig = rigs()
    unreachable(rig)
    client, fd = rig.new_client()
    reset(client)
    number = rig.connect(fd)
    assert rig.until_ended(number) == ("client gone", 0, 0)


def test_target_is_reset_for_a_client_that_had_reset_before(rigs):
    """The target may have accepted; it must not take the client's end for a clean one."""
    rig = rigs()
    client, fd = rig.new_client()
    reset(client)
    number = rig.connect(fd)
    assert rig.read_to_end(rig.accept_at_backend()) == (b"", "reset")
    assert rig.until_ended(number) == ("client gone", 0, 0)


@pytest.mark.parametrize("word", [b"", b"something"])
def test_target_is_reset_for_a_client_that_resets_while_connecting(rigs, word):
    """The relay sees the reset first, but the target has accepted by then."""
    rig = rigs()
    crowd = unreachable(rig)
    client, fd = rig.new_client()
    client.send(word)
    number = rig.connect(fd)
    rig.settle()
    reset(client)
    rig.backend.listen(8)
    rig.backend.accept()[0].close()
    close(crowd)
    # The relay gets no turn until the kernel has repeated the SYN, after a second.
    assert select.select([rig.backend], [], [], PATIENCE_S)[0]
    assert rig.relay.connections == 1
    target = rig.accept_at_backend()
    assert rig.read_to_end(target) == (b"", "reset")
    assert rig.until_ended(number)[0] == "client gone"


def test_unix_client_that_closes_without_a_word_is_a_clean_end(rigs):
    """Like close(2) on a direct connection: a UNIX socket has no reset."""
    rig = rigs("unix", "tcp4")
    client, fd = rig.new_client()
    close(client)
    rig.connect(fd)
    assert rig.read_to_end(rig.accept_at_backend()) == (b"", "eof")


def test_client_that_half_closes_while_connecting(rigs):
    """close(2) and a half-close look the same on TCP: the client is still served."""
    rig = rigs()
    crowd = unreachable(rig)
    client, fd = rig.new_client()
    client.send(b"request")
    rig.connect(fd)
    half_close(client)
    assert rig.is_calm()
    assert rig.relay.connections == 1
    close(crowd)
    rig.backend.listen(8)
    rig.accept_at_backend()
    target = rig.accept_at_backend()  # once the kernel has repeated its SYN, after a second
    assert rig.read_to_end(target) == (b"request", "eof")
    rig.send(target, b"reply", close)
    assert rig.read_to_end(client) == (b"reply", "eof")


@pytest.mark.parametrize("early", [True, False])
def test_unix_client_that_sends_and_closes_while_connecting(rigs, early):
    """Its bytes are delivered although it is gone before the target answers, and then the end.
    `early`: they were there before the connect began."""
    rig = rigs("unix", "tcp4")
    crowd = unreachable(rig)
    client, fd = rig.new_client()
    if early:
        client.send(b"notify")
    number = rig.connect(fd)
    if not early:
        client.send(b"notify")
    close(client)
    assert rig.is_calm()
    assert rig.relay.connections == 1
    close(crowd)
    rig.backend.listen(8)
    rig.accept_at_backend()
    target = rig.accept_at_backend()  # once the kernel has repeated its SYN, after a second
    assert rig.read_to_end(target) == (b"notify", "eof")
    close(target)
    how, up, _ = rig.until_ended(number)
    assert (how, up) == ("ended", 6)


def test_unix_client_that_closes_without_a_word_while_connecting(rigs):
    """There is nothing to deliver, a preamble aside: its slot is free at once."""
    for preamble in (None, b"PROXY UNKNOWN\r\n"):
        rig = rigs("unix", "tcp4")
        unreachable(rig)
        client, fd = rig.new_client()
        number = rig.connect(fd, preamble=preamble)
        close(client)
        assert rig.until_ended(number)[0] == "client gone"


def test_bytes_that_arrive_while_connecting_wait(rigs):
    """They stay in the client's socket and cost no CPU time."""
    rig = rigs()
    unreachable(rig)
    client, fd = rig.new_client()
    rig.connect(fd)
    for _ in range(5):
        client.send(b"x" * 1000)
        assert rig.is_calm(20)
    assert rig.relay.close_all() == 1


def test_target_that_accepts_and_resets(rigs, way):
    """The target was reached: the client sees the reset, and no other target is tried."""
    rig = rigs(**way)
    client, fd = rig.new_client()
    client.send(b"request")
    number = rig.connect(fd)
    reset(rig.accept_at_backend())
    assert rig.read_to_end(client) == (b"", "reset")
    assert rig.until_ended(number)[0] == "reset"
    assert not rig.failures()


def test_target_that_resets_before_the_relay_looks(rigs, way):
    """Connected and reset between two system calls of the relay."""
    rig = rigs(**way)
    client, fd = rig.new_client()
    rig.connect(fd)
    target, _ = rig.backend.accept()
    reset(target)
    assert rig.read_to_end(client) == (b"", "reset")
    assert not rig.failures()


# ── errors and self-connects ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["tcp4", "tcp6"])
@pytest.mark.parametrize("word", [b"", b"hello"])
def test_connect_to_itself_is_refused(rigs, family, word):
    """A connect to a dead port of the ephemeral range may get that very port as its own."""

    def scenario():
        rig = rigs("unix", family)
        rig.address = dead_address(family, rigs.directory)
        client, fd = rig.new_client()
        client.send(word) if word else None
        choose_local_port(rig.address)
        rig.connect(fd, listener=3, preamble=b"PROXY UNKNOWN\r\n")
        assert failure(rig) == (fd, errno.ELOOP, 3, b"PROXY UNKNOWN\r\n")
        # Neither the preamble for the next target is lost nor what the client has sent.
        assert not word or os.read(fd, 99) == word

    in_child(in_own_network(scenario))


@pytest.mark.parametrize("family", ["tcp4", "unix"])
def test_peek_takes_nothing_and_does_not_wait(rigs, family):
    with open_listener(family, rigs.directory) as listener:
        client = open_client(listener)
        server, _ = listener.accept()
        with client, server:
            assert peek(server.fileno()) == -errno.EAGAIN  # though it is a blocking socket
            client.sendall(b"ab")
            assert peek(server.fileno()) == 1
            assert peek(server.fileno()) == 1
            assert server.recv(10) == b"ab"
            client.shutdown(socket.SHUT_WR)
            assert peek(server.fileno()) == 0
            assert socket_error(server.fileno()) == 0


def test_socket_error_is_told_once():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        with server:
            client.sendall(b"unread")
            reset(client)
            assert socket_error(server.fileno()) == errno.ECONNRESET
            assert socket_error(server.fileno()) == 0


@pytest.mark.parametrize("family", ["tcp4", "tcp6"])
def test_dialled_socket_that_connected_to_itself(rigs, family):
    def scenario():
        rig = rigs("unix", family)
        rig.address = dead_address(family, rigs.directory)
        choose_local_port(rig.address)
        fd = rig.relay.dial(rig.address)
        assert connected(fd) == errno.ELOOP
        rig.relay.hang_up(fd)

    in_child(in_own_network(scenario))


def choose_local_port(address):
    """Make the port of `address` the only local port of this network namespace."""
    port = int.from_bytes(address[2:4], "big")
    with open("/proc/sys/net/ipv4/ip_local_port_range", "w") as file:
        file.write(f"{port} {port}")


# ── dial, adopt, hang up ─────────────────────────────────────────────────────────────────────────


def test_dial_and_adopt(rigs, pair, way):
    rig = rigs(*pair, **way)
    client, fd = rig.new_client()
    target = rig.relay.dial(rig.address)
    far = rig.accept_at_backend()
    rig.until(lambda: any(fd == target for fd, _ in rig.ready()), "writable")
    assert connected(target) == 0
    number = rig.relay.adopt(fd, FAMILIES[pair[0]], target, b"first, ")
    client.send(b"then this")
    assert rig.read(far, 16) == b"first, then this"
    rig.send(far, b"reply", close)
    assert rig.read_to_end(client) == (b"reply", "eof")
    half_close(client)
    assert rig.until_ended(number)[0] == "ended"
    assert rig.is_calm()


def test_dial_tells_why_it_failed(rigs):
    rig = rigs()
    target = rig.relay.dial(dead_address("tcp4", rigs.directory))
    rig.until(lambda: any(fd == target for fd, _ in rig.ready()), "an event")
    assert connected(target) == errno.ECONNREFUSED
    rig.relay.hang_up(target)
    with pytest.raises(OSError):
        os.fstat(target)


def test_dial_that_fails_at_once(rigs):
    rig = rigs("tcp4", "unix")
    with pytest.raises(ConnectionRefusedError):
        rig.relay.dial(dead_address("unix", rigs.directory))


def test_sockets_have_their_options(rigs, family):
    """On both sides: no delay, keepalive, urgent bytes in line, non-blocking, close-on-exec."""
    rig = rigs(family, family)
    target = rig.relay.dial(rig.address)
    _, fd = rig.new_client()
    for each in (fd, target):
        assert not os.get_blocking(each)
        assert not os.get_inheritable(each)
        if family != "unix":
            assert option(each, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert option(each, socket.SOL_SOCKET, socket.SO_OOBINLINE)
            assert option(each, socket.IPPROTO_TCP, socket.TCP_NODELAY)
    os.close(fd)
    rig.relay.hang_up(target)


def test_keepalive_settings_of_a_listener_are_kept(rigs):
    """tune_socket() of a listener turns keepalive on and leaves its intervals alone."""
    rig = rigs()
    set_option(rig.listen_socket.fileno(), socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)
    tune_socket(rig.listen_socket.fileno(), FAMILIES["tcp4"])
    _, fd = rig.new_client()
    assert option(fd, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77
    os.close(fd)
