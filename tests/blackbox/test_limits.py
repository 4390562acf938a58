"""Limits: of connections, of files, of threads and of memory."""

import re
import resource
import signal

import pytest
from kit.differences import differs
from kit.privileges import as_unprivileged_user
from kit.socket_state import is_quiet
from kit.sockets import every_pair, main_pairs, read_exactly, read_to_end, reset
from kit.traffic import Payload, expected, greet, is_served, receive_digest, send_payload
from kit.waiting import wait_until

MIB = 1 << 20
RESERVE = 13
"""The maximum of fds that an idle program keeps in reserve: for attempts (4), the thread of the
quarantine (3), a client to refuse, and so on (proxyd/limits.py)."""
REFUSED = "Hit connection limit, refusing connection."


def limit_that_leaves(proxy, room):
    """The limit of open files that leaves the program exactly `room` fds."""
    used, limit = proxy.fds(), 0
    while room or limit in used:
        room -= limit not in used
        limit += 1
    return limit


def served_client(stage):
    """A new client if it is served, None if it is refused."""
    client = stage.connect()
    return client if is_served(client) else None


@differs("original", reason="admits one connection more than --connections-max=")
@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("listen", ["tcp4", "unix"])
def test_exact_connection_limit(stage, listen, limit):
    """N connections are served; the next one is accepted and closed at once, with a line."""
    stage.launch(f"-c{limit}", stage.echo(), listeners=[stage.listener(listen)])
    served = [stage.connect() for _ in range(limit)]
    for client in served:
        greet(client)
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.wait_for_log(REFUSED)
    for client in served:
        greet(client)


@differs("original", reason="admits one connection more than --connections-max=")
def test_a_place_becomes_free(stage):
    """After a connection has ended the next client is served, and the one after it refused."""
    stage.launch("-c2", stage.echo(), listeners=[stage.listener()])
    clients = [stage.connect() for _ in range(2)]
    for client in clients:
        greet(client)
    clients[0].close()
    new = wait_until(lambda: served_client(stage), "a free place")
    greet(new)
    assert not is_served(stage.connect())


@differs("original", reason="writes a line for each refused client")
def test_log_lines_about_refusals_are_limited(stage):
    """A hundred refused clients are a few lines, which say how many were left out."""
    stage.launch("-c1", stage.echo("unix"), listeners=[stage.listener("unix")])
    greet(stage.connect())
    for _ in range(100):
        assert read_to_end(stage.connect())[0] == b""
    assert stage.proxy.end()
    lines = stage.proxy.log_lines()
    left_out = sum(
        int(number) for line in lines for number in re.findall(r"(\d+)[^()]* left out", line)
    )
    assert len(lines) <= 4
    assert len(stage.proxy.log_lines(REFUSED)) + left_out >= 100


def test_default_limit_is_256(stage):
    """Without an option 256 connections are served at the same time."""
    stage.launch(stage.echo("unix"), listeners=[stage.listener("unix")], prefix=nofile(4096, 4096))
    clients = [stage.connect() for _ in range(256)]
    for client in clients:
        greet(client)
    extra = [stage.connect() for _ in range(3)]
    assert read_to_end(extra[-1])[0] == b""
    stage.proxy.wait_for_log(REFUSED)


def nofile(soft, hard):
    """A prefix that sets the limit of open files, as LimitNOFILE= does."""
    return ["prlimit", f"--nofile={soft}:{hard}"]


@differs("original-252", reason="leaves the soft limit alone and hits it", run=False)
def test_soft_file_limit_is_raised(stage):
    """Under a soft limit of 64 and a hard one of 1024 all 256 connections are served."""
    stage.launch(stage.echo("unix"), listeners=[stage.listener("unix")], prefix=nofile(64, 1024))
    clients = [stage.connect() for _ in range(256)]
    for client in clients:
        greet(client)
    soft, hard = stage.proxy.fd_limit()
    assert 64 < soft <= hard == 1024
    assert stage.proxy.log() == ""


def test_soft_file_limit_is_never_lowered(stage):
    """A soft limit that is higher than needed stays."""
    stage.launch(stage.echo(), listeners=[stage.listener()], prefix=nofile(3000, 4000))
    greet(stage.connect())
    assert stage.proxy.fd_limit()[0] >= 3000


@differs(
    "original-252", reason="the soft limit stays, connections fail and the log overflows", run=False
)
def test_tiny_file_limit(stage):
    """With LimitNOFILE=32 the limit is lowered, with a warning: some are served, others refused.

    No client hangs, there is no busy loop, and places that become free are used again.
    """
    stage.launch(stage.echo("unix"), listeners=[stage.listener("unix")], prefix=nofile(32, 32))
    assert len(stage.proxy.log_lines()) == 1
    room = 32 - len(stage.proxy.fds())  # threads have fds of their own
    clients = [stage.connect() for _ in range(40)]
    served = [client for client in clients if is_served(client)]
    assert max((room - RESERVE) // 2, 1) <= len(served) <= room // 2
    assert stage.proxy.cpu_share(0.3) < 0.2
    for client in clients:
        client.close()
    wait_until(lambda: served_client(stage), "a free place")
    payload = Payload(4 * MIB)
    client = stage.connect()
    sending = send_payload(client, payload)
    assert receive_digest(client).result() == expected(payload)
    sending.result()
    assert len(stage.proxy.log_lines()) <= 4


@differs("original", reason="spins in accept and logs each failure: 8 MB in 0.6 s", run=False)
def test_out_of_files_ends_with_a_connection(stage):
    """A client that waits for an fd is served when another connection closes."""
    stage.launch(stage.echo("unix"), listeners=[stage.listener()])
    first = stage.connect()
    greet(first)
    stage.proxy.set_fd_limit(max(stage.proxy.fds()) + 1)
    client = stage.connect()
    client.sendall(b"hello")
    wait_until(stage.proxy.log_lines, "a line about it")
    first.close()
    assert read_exactly(client, 5) == b"hello"


@differs("original", reason="holds two pipes for each connection: 6 fds (252) or 8 (262)")
@every_pair
def test_two_fds_per_idle_connection(stage, listen, target):
    """Twenty idle connections over which bytes have passed hold forty fds, all sockets."""
    stage.launch(stage.echo(target), listeners=[stage.listener(listen)])
    warm_up = stage.connect()
    greet(warm_up)
    before = len(stage.proxy.fds())
    for _ in range(20):
        greet(stage.connect())
    assert len(stage.proxy.fds()) == before + 40


@differs("original", reason="holds two pipes for each connection")
@main_pairs
def test_no_pipe_is_kept_after_a_bulk_transfer(stage, listen, target):
    """Connections that have moved megabytes and are idle again hold two fds each."""
    backend = stage.forward(listen, target)
    pairs = []
    before = len(stage.proxy.fds())
    for _ in range(8):
        client = stage.connect()
        server = backend.accept()
        payload = Payload(4 * MIB)
        sending = send_payload(client, payload, half_close=False)
        assert receive_digest(server, payload.size).result() == expected(payload)
        sending.result()
        pairs.append((client, server))
    # The shared pool may keep a few pipes, but not two for each connection.
    assert len(stage.proxy.fds()) <= before + 2 * len(pairs) + 8
    assert all(is_quiet(client) for client, _ in pairs)


@differs("original", reason="resolves in a thread, literal addresses too", when={"processes": 1})
@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_tasks_max(stage, name, processes):
    """With TasksMax=3 or less the program works, also with a name, which is looked up in a thread.

    RLIMIT_NPROC stands in for TasksMax=: it makes the same call fail in the same way.
    """
    prefix = as_unprivileged_user(stage.executable)
    prefix = ["prlimit", f"--nproc={processes}", *prefix]
    target = stage.echo().replace("127.0.0.1", name)
    stage.launch(target, listeners=[stage.listener()], prefix=prefix)
    for _ in range(5):
        greet(stage.connect())
    assert len(stage.proxy.log_lines()) <= 1


def test_unprivileged_user_with_many_bulk_streams(stage):
    """Where the kernel allows a user few or tiny pipes, transfers go on without them."""
    prefix = as_unprivileged_user(stage.executable)
    backend = stage.forward("tcp4", "tcp4", prefix=prefix)
    transfers = []
    for number in range(150):
        client = stage.connect()
        server = backend.accept()
        payload = Payload(300_000, seed=number)
        sending = send_payload(client, payload, half_close=False)
        transfers.append((sending, server, payload))
    for sending, server, payload in transfers:
        assert receive_digest(server, payload.size).result() == expected(payload)
        sending.result()


def test_load_leaves_nothing_behind(stage):
    """2000 short connections, 200 bulk ones and 30 resets leave fds and memory where they were.

    The load is applied twice: after the second time there is no more than after the first.
    """
    stage.launch(stage.echo("unix"), listeners=[stage.listener()], prefix=nofile(1024, 4096))
    greet(stage.connect())

    def load():
        for _ in range(1000):
            client = stage.connect()
            greet(client)
            client.close()
        bulk = []
        for number in range(100):
            client = stage.connect()
            payload = Payload(400_000, seed=number)
            bulk.append((receive_digest(client, payload.size), client, payload))
        sendings = [send_payload(client, payload, half_close=False) for _, client, payload in bulk]
        for sending in sendings:
            sending.result()
        for reading, client, payload in bulk:
            assert reading.result() == expected(payload)
            client.close()
        for _ in range(15):
            reset(stage.connect())

    def sockets():
        return stage.proxy.socket_count()

    before = sockets()
    load()
    wait_until(lambda: sockets() <= before, "all sockets are closed")
    fds, resident = len(stage.proxy.fds()), stage.proxy.resident_bytes()
    load()
    wait_until(lambda: sockets() <= before, "all sockets are closed again")
    assert len(stage.proxy.fds()) <= fds + 4
    assert stage.proxy.resident_bytes() <= resident + MIB


def test_this_machine_allows_enough_open_files():
    """The test process itself may open as many files as the largest test needs."""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 1024


@differs("original", reason="gives up at the first refusal", run=False)
def test_out_of_files_when_an_outage_ends(stage):
    """The target comes back while only one fd is left, which the connection itself needs."""
    backend = stage.absent()
    stage.launch(backend.target, listeners=[stage.listener()])
    limit = stage.proxy.fd_limit()[0]
    client = stage.connect()
    client.sendall(b"hello")
    stage.proxy.wait_for_log("holding clients")
    stage.proxy.set_fd_limit(limit_that_leaves(stage.proxy, 1))
    backend.start_listening()
    server = backend.accept()
    assert read_exactly(server, 5) == b"hello"
    stage.proxy.wait_for_log("answers after")
    stage.proxy.set_fd_limit(limit)
    server.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"


@differs("original", reason="has no counters to log: SIGUSR1 ends it", run=False)
def test_out_of_files_when_counters_are_requested(stage):
    """Without a free fd SIGUSR1 still causes a line, and clients are still served."""
    # With a service manager the module for it would be loaded already, because of STATUS=.
    stage.launch(
        stage.echo(),
        listeners=[stage.listener()],
        environment={"NOTIFY_SOCKET": None},
        wait=False,
    )
    greet(stage.connect())
    limit = stage.proxy.fd_limit()[0]
    stage.proxy.set_fd_limit(limit_that_leaves(stage.proxy, 0))
    stage.proxy.send_signal(signal.SIGUSR1)
    wait_until(stage.proxy.log_lines, "an answer")
    stage.proxy.set_fd_limit(limit)
    greet(stage.connect())
