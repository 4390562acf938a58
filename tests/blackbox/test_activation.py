"""Sockets from the service manager, and what the program tells it."""

import os
import re
import signal
import socket
import time

import pytest
from kit.differences import differs
from kit.sockets import FAMILIES, read_exactly, read_to_end
from kit.traffic import greet
from kit.waiting import never_within, patience, wait_until

not_notified = differs("original-252", reason="sends neither READY=1 nor STATUS=")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_listener(stage, family):
    """One inherited listener of each family is served."""
    stage.launch(stage.echo(), listeners=[stage.listener(family)])
    greet(stage.connect())


def test_client_that_came_before_the_program(stage):
    """The client whose connection started the program is the first to be served."""
    listener, target = stage.listener(), stage.echo()
    client = stage.connect(listener)
    client.sendall(b"hello")
    stage.launch(target, listeners=[listener], wait=False)
    assert read_exactly(client, 5) == b"hello"


def test_listeners_of_all_families_at_once(stage):
    """Several listeners of mixed families lead to one target."""
    listeners = [stage.listener(family) for family in FAMILIES for _ in range(2)]
    stage.launch(stage.echo(), listeners=listeners)
    for listener in listeners:
        greet(stage.connect(listener))


def test_many_listeners(stage):
    """Fifty listeners, all served."""
    listeners = [stage.listener("unix") for _ in range(50)]
    stage.launch(stage.echo(), listeners=listeners)
    for listener in listeners:
        greet(stage.connect(listener))


def test_names_do_not_matter_with_one_target(stage):
    """Whatever the names of the sockets, one plain target serves them all."""
    listeners = [stage.listener("unix") for _ in range(3)]
    stage.launch(stage.echo(), listeners=listeners, names="web.socket:proxy@x.socket:unknown")
    for listener in listeners:
        greet(stage.connect(listener))


def test_without_names(stage):
    """Without LISTEN_FDNAMES, as with older service managers, nothing changes."""
    stage.launch(stage.echo(), listeners=[stage.listener()], names=None)
    greet(stage.connect())


@differs("original", reason="takes listening sockets only")
@pytest.mark.parametrize("family", FAMILIES)
def test_connected_socket(stage, family):
    """With Accept=yes the inherited socket is a connection: served, then the program exits."""
    listener, target = stage.listener(family), stage.echo()
    client = stage.connect(listener)
    connection, _ = listener.accept()
    proxy = stage.launch(target, listeners=[connection], names="connection", wait=False)
    connection.close()
    greet(client)
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(client) == (b"", "eof")
    assert proxy.wait() == 0
    assert proxy.log() == ""


@differs("original", reason="takes listening sockets only")
def test_connected_socket_is_served_to_the_last_byte(stage):
    """The exit after the only connection waits until its last byte is delivered."""
    listener, backend = stage.listener(), stage.backend()
    client = stage.connect(listener)
    connection, _ = listener.accept()
    proxy = stage.launch(backend.target, listeners=[connection], names="connection", wait=False)
    connection.close()
    server = backend.accept()
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(server) == (b"", "eof")
    server.sendall(b"x" * 3_000_000)
    server.close()
    assert read_to_end(client) == (b"x" * 3_000_000, "eof")
    assert proxy.wait() == 0


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_connected_datagram_socket(stage, family):
    """A datagram socket with a peer is an error, with the original's message."""
    with (
        socket.socket(family, socket.SOCK_DGRAM) as datagram,
        socket.socket(family, socket.SOCK_DGRAM) as peer,
    ):
        for number, one in enumerate((datagram, peer)):
            one.bind(("127.0.0.1", 0) if family == socket.AF_INET else stage.path(f"dg{number}"))
        datagram.connect(peer.getsockname())
        outcome = stage.run("127.0.0.1:1", listeners=[datagram])
    assert outcome.status == 1
    assert outcome.stderr == "Passed in socket is not a stream socket.\n"


def test_packet_socket_among_others(stage):
    """One packet socket among others is an error before any client is accepted."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as packets:
        packets.bind(stage.path("packets"))
        packets.listen()
        outcome = stage.run("127.0.0.1:1", listeners=[stage.listener(), packets])
    assert outcome.status == 1
    assert outcome.stderr == "Passed in socket is not a stream socket.\n"


def test_not_a_socket(stage):
    """A file in place of a socket is one line and exit status 1."""
    with open("/dev/null") as file:
        outcome = stage.run("127.0.0.1:1", listeners=[file])
    assert outcome.status == 1
    assert len(outcome.stderr.splitlines()) == 1
    assert "Traceback" not in outcome.stderr


def test_sequential_packet_socket(stage):
    """A seqpacket socket is not a stream socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as packets:
        packets.bind(stage.path("packets"))
        packets.listen()
        outcome = stage.run("127.0.0.1:1", listeners=[packets])
    assert outcome.status == 1
    assert outcome.stderr == "Passed in socket is not a stream socket.\n"


def test_fds_are_closed_on_exec(stage):
    """Every fd from 3 up is close-on-exec: no child process inherits a client."""
    stage.launch(stage.echo(), listeners=[stage.listener(), stage.listener("unix")])
    greet(stage.connect())
    for fd, what in stage.proxy.fds().items():
        inherited = fd > 2 and not stage.proxy.fd_flags(fd) & os.O_CLOEXEC
        assert not inherited, f"fd {fd} ({what}) is inherited by children"


def test_blocking_listener_is_made_non_blocking(stage):
    """A client that leaves before it is accepted does not block the program in accept(2)."""
    listener = stage.listener()
    listener.setblocking(True)
    stage.launch(stage.echo(), listeners=[listener])
    greet(stage.connect())
    assert stage.proxy.fd_flags(3) & os.O_NONBLOCK


@not_notified
@pytest.mark.parametrize("where", ["abstract", "path"])
def test_ready(stage, where):
    """READY=1 is sent once, when clients are already served."""
    notify = stage.notify_socket(stage.path("notify") if where == "path" else None)
    stage.launch(stage.echo(), listeners=[stage.listener()], notify=notify, wait=False)
    notify.wait_for("READY=1")
    greet(stage.connect())
    assert notify.lines().count("READY=1") == 1


@not_notified
def test_ready_without_clients(stage):
    """READY=1 does not wait for the first client."""
    notify = stage.notify_socket()
    stage.launch(stage.echo(), listeners=[stage.listener()], notify=notify, wait=False)
    notify.wait_for("READY=1")


@differs("original", reason="never sends READY=1")
def test_no_ready_if_the_start_fails(stage):
    """A program that cannot start never sends READY=1; one that starts sends it."""
    notify = stage.notify_socket()
    outcome = stage.run("-c0", "a:1", listeners=[stage.listener()], notify=notify)
    assert outcome.status == 1
    assert "READY=1" not in notify.lines()
    stage.launch(stage.echo(), listeners=[stage.listener()], notify=notify)
    notify.wait_for("READY=1")


@not_notified
def test_status_counts_connections(stage):
    """STATUS= shows how many connections are open, as they come and go."""
    notify = stage.notify_socket()
    stage.launch(stage.echo(), listeners=[stage.listener()], notify=notify)

    def last_status():
        return (notify.values("STATUS") or [""])[-1]

    def shows(count):
        return re.search(rf"\b{count} connections?\b", last_status())

    first = stage.connect()
    greet(first)
    wait_until(lambda: shows(1), "status with 1 connection")
    second = stage.connect()
    greet(second)
    wait_until(lambda: shows(2), "status with 2 connections")
    first.close()
    second.close()
    wait_until(lambda: re.search(r"\b(0|no) connections?\b", last_status().lower()), "none open")


@not_notified
def test_status_is_sent_on_change_only(stage):
    """A thousand short connections are a handful of STATUS= lines, and no connections are none."""
    notify = stage.notify_socket()
    stage.launch(stage.echo("unix"), listeners=[stage.listener("unix")], notify=notify)
    start = time.monotonic()
    for _ in range(1000):
        client = stage.connect()
        greet(client)
        client.close()
    elapsed = time.monotonic() - start
    count = len(notify.values("STATUS"))
    assert 1 <= count <= 20 + 20 * elapsed
    wait_until(lambda: "0 conn" in notify.values("STATUS")[-1].replace("no ", "0 "), "all closed")
    count = len(notify.values("STATUS"))
    never_within(1.2, lambda: len(notify.values("STATUS")) > count + 1, "status without change")


def test_watchdog(stage):
    """WATCHDOG=1 is sent again and again, well within the interval."""
    notify = stage.notify_socket()
    environment = {"WATCHDOG_USEC": "400000", "WATCHDOG_PID": "own"}
    stage.launch(stage.echo(), listeners=[stage.listener()], notify=notify, environment=environment)
    wait_until(lambda: notify.lines().count("WATCHDOG=1") >= 4, "four times WATCHDOG=1")
    assert stage.proxy.cpu_share(0.5) < 0.3


def test_watchdog_of_another_process(stage):
    """With the WATCHDOG_PID of another process, no WATCHDOG=1 is sent."""
    notify = stage.notify_socket()
    environment = {"WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}
    stage.launch(stage.echo(), listeners=[stage.listener()], notify=notify, environment=environment)
    greet(stage.connect())
    never_within(0.4, lambda: "WATCHDOG=1" in notify.lines(), "WATCHDOG=1")


def test_notify_socket_without_a_reader(stage):
    """A NOTIFY_SOCKET that does not exist does not disturb the service."""
    environment = {"NOTIFY_SOCKET": stage.path("nobody")}
    stage.launch(stage.echo(), listeners=[stage.listener()], environment=environment, wait=False)
    for _ in range(20):
        greet(stage.connect())


@pytest.fixture
def full_queue(stage):
    """Start a program whose NOTIFY_SOCKET has no room; return the service manager's end of it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as queue:
        queue.bind(stage.path("full"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
            filler.setblocking(False)
            with pytest.raises(BlockingIOError):
                while filler.sendto(b"x", stage.path("full")):
                    pass
        environment = {"NOTIFY_SOCKET": stage.path("full")}
        stage.launch(
            stage.echo(), listeners=[stage.listener()], environment=environment, wait=False
        )
        yield queue


def test_notify_socket_that_is_full(stage, full_queue):
    """A service manager that does not read its notifications does not block the service."""
    for _ in range(20):
        greet(stage.connect())


@differs("original", reason="252 does not send it, 262 serves no client before", run=False)
def test_ready_is_sent_once_there_is_room_for_it(stage, full_queue):
    """If the service manager's queue is full, READY=1 is sent once it has been read."""
    greet(stage.connect())  # it is up, and has tried to send
    full_queue.settimeout(patience())
    while not full_queue.recv(4096).startswith(b"READY=1"):
        pass


@differs("original", reason="writes to the journal's socket, or without a prefix")
def test_journal_prefix(stage):
    """When stderr is the journal, each line begins with its priority, as in sd-daemon(3)."""
    stage.launch("-c1", stage.echo(), listeners=[stage.listener()], journal=True)
    greet(stage.connect())
    stage.proxy.send_signal(signal.SIGUSR1)
    stage.proxy.wait_for_log("<6>1 accepted, 1 open")
    assert all(re.match(r"<[0-7]>", line) for line in stage.proxy.log_lines())


def test_no_journal_prefix_for_another_stderr(stage):
    """With the JOURNAL_STREAM of another file, lines have no prefix."""
    outcome = stage.run("-c0", "a:1", environment={"JOURNAL_STREAM": "1:2"})
    assert outcome.stderr == "Connection limit is too low.\n"


@pytest.mark.parametrize("level", ["debug", "7"])
def test_log_level_debug(stage, level):
    """SYSTEMD_LOG_LEVEL by name or by number: at debug level each connection is logged."""
    environment = {"SYSTEMD_LOG_LEVEL": level}
    stage.launch(stage.echo(), listeners=[stage.listener()], environment=environment)
    client = stage.connect()
    greet(client)
    address = ":".join(map(str, client.getsockname()))
    wait_until(lambda: stage.proxy.log_lines(f"New connection from {address}"), "its beginning")
    if stage.is_ours:
        assert not stage.proxy.log_lines("bytes up")
        client.close()
        wait_until(lambda: stage.proxy.log_lines("5 bytes up, 5 bytes down"), "its end")


@differs("original", reason="does not log the target")
def test_a_held_connection_is_logged_when_it_comes(stage):
    """At debug level, with its address and target, even if the target cannot be reached."""
    environment = {"SYSTEMD_LOG_LEVEL": "debug"}
    backend = stage.absent()
    stage.launch(backend.target, listeners=[stage.listener("unix")], environment=environment)
    stage.connect()
    line = f"New connection from unix client to {backend.target}."
    wait_until(lambda: stage.proxy.log_lines(line), "its beginning")


def test_log_level_error(stage):
    """At level err no warning is written."""
    environment = {"SYSTEMD_LOG_LEVEL": "err"}
    stage.launch("-c1", stage.echo(), listeners=[stage.listener()], environment=environment)
    clients = [stage.connect() for _ in range(5)]
    greet(clients[0])
    assert read_to_end(clients[-1])[0] == b""
    assert stage.proxy.log() == ""


def test_quiet_by_default(stage):
    """Connections that work leave no line in the log."""
    stage.launch(stage.echo(), listeners=[stage.listener()])
    for _ in range(10):
        client = stage.connect()
        greet(client)
        client.close()
    assert stage.proxy.log() == ""


def test_stderr_closed(stage):
    """A program started without stdin, stdout and stderr serves its clients."""
    listener = stage.listener()
    stage.launch(
        stage.echo(),
        listeners=[listener],
        prefix=["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"],
        wait=False,
    )
    greet(stage.connect())
