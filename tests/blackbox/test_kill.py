"""Promise: if the program is killed, its peers see a reset where bytes or an end are owed to them;
and what is complete, up to its end, is never cut, however the connection or the program ends.

A killed program runs no code: the kernel closes its sockets, as they have been prepared for that.
"""

import os
import signal
import socket
import struct
from pathlib import Path

import pytest
from kit.differences import differs
from kit.manager import Manager
from kit.socket_state import is_quiet, unacknowledged, wait_unread, write_error
from kit.sockets import TCP, is_unix, main_pairs, read_exactly, read_to_end, reset
from kit.traffic import in_background, payload
from kit.waiting import wait_until

pytestmark = differs("original", reason="its end is a clean end for everybody", always=False)

ANSWER = payload(4 << 20)
FIN_SENT = {"04", "09"}
"""FIN_WAIT1, LAST_ACK: states of /proc/net/tcp in which the end is queued."""

in_threads = pytest.mark.parametrize(
    "threads", [["--threads=1"], ["--threads=3", "--hand-over=always"]], ids=["1", "3"]
)


def end_of_kill(connection):
    """How a stream ends whose end is owed: UNIX sockets have no reset."""
    return "eof" if is_unix(connection) else "reset"


def kernels_view(client):
    """(state, bytes in the send queue) of the program's socket towards a client on IPv4; None if
    there is none."""
    ends = f"{packed(client.getpeername())} {packed(client.getsockname())} "
    _, found, rest = Path("/proc/net/tcp").read_text().partition(ends)  # it may have many lines
    return (rest[:2], int(rest[3:11], 16)) if found else None


def packed(address):
    """An address as /proc/net/tcp writes it."""
    (number,) = struct.unpack("=I", socket.inet_aton(address[0]))
    return f"{number:08X}:{address[1]:04X}"


class SlowReader:
    """Reads what a client is sent, but no more than it must."""

    def __init__(self, client):
        self.client = client
        self.received = bytearray()

    def until_the_end_is_queued(self):
        """Read no more than it takes until the program has passed the end on."""

        def has_passed_it_on():
            if kernels_view(self.client)[0] in FIN_SENT:
                return True
            if not is_quiet(self.client):
                self.received += self.client.recv(1 << 15)
            return False

        wait_until(has_passed_it_on, "the end, passed on")
        assert kernels_view(self.client)[1] > 500_000, "nothing that could be cut"

    def finish(self):
        rest, end = read_to_end(self.client)
        return bytes(self.received) + rest, end


def slow_reader(stage, *arguments, **options):
    """(a client that has yet to read most of a complete answer, the server's end)."""
    client, server = stage.pair("tcp4", "tcp4", *arguments, **options)
    client.sendall(b"request")
    assert read_exactly(server, 7) == b"request"
    server.sendall(ANSWER[: len(ANSWER) // 2])
    sending = in_background(lambda: (server.sendall(ANSWER[len(ANSWER) // 2 :]), server.close()))
    reader = SlowReader(client)
    reader.until_the_end_is_queued()
    sending.result()
    return reader


# ── what is owed ─────────────────────────────────────────────────────────────────────────────────


@in_threads
@main_pairs
def test_killed_while_idle(stage, listen, target, threads):
    """Both are owed an end: before the first byte, and after many."""
    backend = stage.forward(listen, target, *threads)
    silent = stage.connect(), backend.accept()
    spoken = stage.connect(), backend.accept()
    for one, other in (spoken, spoken[::-1]):
        one.sendall(b"hello")
        assert read_exactly(other, 5) == b"hello"
    stage.proxy.kill()
    for connection in (*silent, *spoken):
        assert read_to_end(connection) == (b"", end_of_kill(connection))


@in_threads
@main_pairs
def test_killed_in_mid_stream(stage, listen, target, threads):
    """What has arrived stays readable, and is followed by a reset in both directions."""
    client, server = stage.pair(listen, target, *threads)
    data = payload(300_000)
    for one, other in ((client, server), (server, client)):
        one.sendall(data)
        wait_unread(other, 1)
    if not is_unix(client):
        wait_until(lambda: unacknowledged(client) == unacknowledged(server) == 0, "all taken")
    stage.proxy.kill()
    for connection in (client, server):
        received, end = read_to_end(connection)
        assert data.startswith(received)
        assert end == "reset" or is_unix(connection)


@pytest.mark.parametrize("listen", ["tcp4", "tcp6"])
def test_killed_while_the_reader_is_slow(stage, listen):
    """Without a reset, the part that the kernel still delivers would look complete."""
    client, server = stage.pair(listen, "tcp4")
    data = payload(400_000)
    server.sendall(data)
    wait_unread(client, 1)
    wait_until(lambda: unacknowledged(server) == 0, "all taken")
    wait_until(stage.proxy.waits_for_events, "all passed on")
    stage.proxy.kill()
    received, end = read_to_end(client)
    assert data.startswith(received)
    assert end == "reset"


@pytest.mark.parametrize("target", ["tcp4", "unix"])
def test_killed_while_lingering(stage, target):
    """The server has failed; the client has not read what came before, and is owed a reset."""
    client, server = stage.pair("tcp4", target)
    server.sendall(payload(400_000))
    wait_unread(client, 1)
    client.sendall(b"never read")
    wait_unread(server, 1)
    reset(server)
    wait_until(stage.proxy.waits_for_events, "the reset, seen")
    stage.proxy.kill()
    assert read_to_end(client)[1] == "reset"


@in_threads
@main_pairs
def test_killed_after_the_clients_end(stage, listen, target, threads):
    """The end that was passed on stays clean; the other one is owed."""
    client, server = stage.pair(listen, target, *threads)
    client.sendall(b"request")
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(server) == (b"request", "eof")
    stage.proxy.kill()
    assert read_to_end(client) == (b"", end_of_kill(client))
    assert read_to_end(server) == (b"", "eof")
    wait_until(lambda: write_error(server), "writes of the server fail")


@in_threads
@main_pairs
def test_killed_after_the_servers_end(stage, listen, target, threads):
    client, server = stage.pair(listen, target, *threads)
    server.sendall(b"banner")
    server.shutdown(socket.SHUT_WR)
    assert read_to_end(client) == (b"banner", "eof")
    stage.proxy.kill()
    assert read_to_end(server) == (b"", end_of_kill(server))
    assert read_to_end(client) == (b"", "eof")


# ── clients without a connection ─────────────────────────────────────────────────────────────────

cut = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
families = pytest.mark.parametrize("listen", ["tcp4", "tcp6", "unix"])


@cut
@families
def test_held_client(stage, listen, number):
    stage.launch(stage.absent().target, listeners=[stage.listener(listen)])
    client = stage.connect()
    stage.proxy.wait_for_log("Failed to connect to remote host: ")
    end_by(stage, number)
    assert read_to_end(client) == (b"", end_of_kill(client))


@cut
@families
def test_client_whose_proxy_header_is_awaited(stage, listen, number):
    networks = "unix" if listen == "unix" else "127.0.0.0/8,::1"
    arguments = f"--accept-proxy-protocol={networks}", stage.echo()
    stage.launch(*arguments, listeners=[stage.listener(listen)])
    before = stage.proxy.socket_count()
    client = stage.connect()
    wait_until(lambda: stage.proxy.socket_count() > before, "the client, accepted")
    wait_until(stage.proxy.waits_for_events, "the wait for its header")
    end_by(stage, number)
    assert read_to_end(client) == (b"", end_of_kill(client))


@cut
@families
def test_client_whose_connect_takes_long(stage, listen, number):
    """Its target's backlog is full: the SYN is not answered."""
    backend = stage.backend(backlog=0)
    stage.fill_backlog(backend)
    stage.launch(backend.target, listeners=[stage.listener(listen)])
    before = stage.proxy.socket_count()
    client = stage.connect()
    wait_until(lambda: stage.proxy.socket_count() > before + 1, "the connect, begun")
    wait_until(stage.proxy.waits_for_events, "a wait")
    end_by(stage, number)
    assert read_to_end(client) == (b"", end_of_kill(client))


def end_by(stage, number):
    stage.proxy.send_signal(number)
    stage.proxy.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_only_connection_of_accept_yes(stage, number):
    """The service manager holds it too, and closes its copy when the service has ended."""
    backend, listener = stage.backend(), stage.listener()
    client = stage.connect(listener)
    connection, _ = listener.accept()
    stage.launch(backend.target, listeners=[connection], names="connection", wait=False)
    server = backend.accept()
    client.sendall(b"hello")
    assert read_exactly(server, 5) == b"hello"
    end_by(stage, number)
    connection.close()
    assert read_to_end(server) == (b"", "reset")
    assert read_to_end(client) == (b"", "reset")


def test_listener_does_not_inherit_it(stage):
    """It outlives the program: what it accepts then is another program's."""
    listener = stage.listener()
    stage.launch(stage.echo(), listeners=[listener])
    stage.connect().sendall(b"x")
    stage.proxy.kill()
    size = struct.calcsize("ii")
    assert not any(listener.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, size))


@pytest.mark.parametrize("unread", [False, True])
def test_unix_sockets_show_a_kill_by_what_is_unread(stage, unread):
    """ECONNRESET if the program had yet to read something, otherwise a clean end: see the man
    page."""
    client, server = stage.pair("unix", "unix")
    os.kill(stage.proxy.pid, signal.SIGSTOP)
    if unread:
        client.sendall(b"never read")
    stage.proxy.kill()
    assert read_to_end(client) == (b"", "reset" if unread else "eof")
    assert read_to_end(server) == (b"", "eof")


# ── what is complete ─────────────────────────────────────────────────────────────────────────────


@in_threads
def test_complete_answer_survives_a_kill(stage, threads):
    reader = slow_reader(stage, *threads)
    stage.proxy.kill()
    assert reader.finish() == (ANSWER, "eof")


@in_threads
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_complete_answer_survives_a_stop(stage, threads, number):
    """By the handler that cuts connections; or by a reload, and a kill after it."""
    reader = slow_reader(stage, *threads)
    stage.proxy.send_signal(number)
    if number == signal.SIGHUP:
        stage.proxy.wait_for_log("Going on with 1 open")
        stage.proxy.kill()
    else:
        assert stage.proxy.wait() == 0
    assert reader.finish() == (ANSWER, "eof")


def test_complete_answer_survives_a_parcel_that_nobody_takes(stage):
    manager = Manager()
    reader = slow_reader(stage, names="web", notify=manager)
    stage.proxy.send_signal(signal.SIGTERM)
    assert stage.proxy.wait() == 0
    assert len(manager.stored) == 1
    manager.close()
    assert reader.finish() == (ANSWER, "eof")


def test_incomplete_answer_in_a_parcel_that_nobody_takes(stage):
    manager = Manager()
    client, server = stage.pair("tcp4", "tcp4", names="web", notify=manager)
    server.sendall(b"an answer")
    assert read_exactly(client, 9) == b"an answer"
    stage.proxy.send_signal(signal.SIGTERM)
    assert stage.proxy.wait() == 0
    manager.close()
    assert read_to_end(client) == read_to_end(server) == (b"", "reset")


def test_complete_answer_survives_the_idle_timeout(stage):
    """The client is silent, and is closed while most of the answer is queued."""
    reader = slow_reader(stage, "--idle-timeout=5s")
    wait_until(lambda: kernels_view(reader.client)[0] == "04", "its end")
    wait_until(lambda: stage.proxy.socket_count() == stage.proxy.sockets_at_start, "its close")
    assert reader.finish() == (ANSWER, "eof")


@pytest.mark.parametrize("then", ["kill", "stay", "idle exit"])
def test_complete_answer_survives_the_close(stage, then):
    """Both ends were passed on, and the program has closed the connection."""
    arguments = ["--exit-idle-time=2s"] if then == "idle exit" else []
    client, server = stage.pair("tcp4", "tcp4", *arguments)
    client.sendall(b"request")
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(server) == (b"request", "eof")
    sending = in_background(lambda: (server.sendall(ANSWER), server.close()))
    reader = SlowReader(client)
    reader.until_the_end_is_queued()
    sending.result()
    if then == "idle exit":
        assert stage.proxy.wait() == 0
    else:
        closed = stage.proxy.sockets_at_start
        wait_until(lambda: stage.proxy.socket_count() == closed, "the close")
    if then == "kill":
        stage.proxy.kill()
    assert reader.finish() == (ANSWER, "eof")


@pytest.mark.parametrize("family", TCP)
def test_request_up_to_its_end_survives_a_kill(stage, family):
    """The same towards a server that is slow to read."""
    request = payload(200_000)
    client, server = stage.pair("tcp4", family)
    client.sendall(request)
    client.shutdown(socket.SHUT_WR)
    wait_until(lambda: kernels_view(client)[0] == "08", "its end, at the program")  # CLOSE_WAIT
    wait_until(stage.proxy.waits_for_events, "all passed on")
    stage.proxy.kill()
    assert read_to_end(server) == (request, "eof")
    assert read_to_end(client) == (b"", "reset")


@main_pairs
def test_ends_stay_clean(stage, listen, target):
    """Nobody sees a reset for the mere reason that one was prepared."""
    backend = stage.forward(listen, target)
    for _ in range(20):
        client, server = stage.connect(), backend.accept()
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(server) == (b"", "eof")
        server.sendall(b"answer")
        server.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == (b"answer", "eof")


def test_client_over_the_limit_sees_a_clean_end(stage):
    stage.launch("--connections-max=1", stage.echo(), listeners=[stage.listener()])
    first = stage.connect()
    first.sendall(b"x")
    assert read_exactly(first, 1) == b"x"
    assert read_to_end(stage.connect()) == (b"", "eof")
    stage.proxy.wait_for_log("refusing connection")
