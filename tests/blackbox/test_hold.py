"""A client is held while its target cannot be reached yet, and served as soon as it can be."""

import os
import signal
import socket
import subprocess
import time

import pytest
from kit.differences import differs
from kit.namespaces import in_network_namespace_of, namespace_prefix, with_hosts
from kit.privileges import as_unprivileged_user
from kit.socket_state import is_quiet
from kit.sockets import fill_backlog, open_listener, read_exactly, read_to_end, reset
from kit.stage import Backend
from kit.traffic import talk
from kit.waiting import never_within, wait_until

HOLD = 0.4
"""Seconds for which a target does not listen: longer than the first, quick retries."""

pytestmark = differs("original", reason="gives up at the first refusal", run=False)


def assert_held(*clients, seconds=HOLD):
    """Assert that the clients receive nothing, no byte and no end, for that long."""
    for client in clients:
        never_within(
            seconds / len(clients),
            lambda held=client: not is_quiet(held),
            "an end of a held client",
        )


def assert_served(clients, backend):
    """Assert that all of them are served once the target listens."""
    backend.start_listening()
    for client in clients:
        client.sendall(b"x")
    for _ in clients:
        assert read_exactly(backend.accept(), 1) == b"x"


@pytest.mark.parametrize("listen", ["tcp4", "unix"])
@pytest.mark.parametrize("target", ["tcp4", "tcp6", "unix", "abstract"])
def test_target_that_listens_later(stage, listen, target):
    """Connection refused (TCP) or a socket file without a listener (UNIX): the client waits."""
    backend = stage.absent(target)
    stage.launch(backend.target, listeners=[stage.listener(listen)])
    client = stage.connect()
    assert_held(client)
    backend.start_listening()
    talk(client, backend.accept())


@pytest.mark.parametrize("stale", [False, True])
def test_socket_file_that_appears_later(stage, stale):
    """A path that does not exist, or a stale socket file that the service replaces."""
    path = stage.path("later")
    if stale:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
    stage.launch(path, listeners=[stage.listener()])
    client = stage.connect()
    assert_held(client)
    if stale:
        os.unlink(path)
    backend = Backend(socket.socket(socket.AF_UNIX))
    backend.listener.bind(path)
    backend.start_listening()
    talk(client, backend.accept())
    backend.close()


def test_abstract_name_that_appears_later(stage):
    """An abstract name that is not bound yet."""
    name = f"proxyd-later-{os.getpid()}"
    stage.launch(f"@{name}", listeners=[stage.listener()])
    client = stage.connect()
    assert_held(client)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        listener.settimeout(10)
        with listener.accept()[0] as server:
            talk(client, server)


def test_target_that_does_not_answer(stage):
    """A silent TCP target is given up after --connect-timeout=, with one line."""
    backend = stage.backend("tcp4", backlog=0)
    waiting = fill_backlog(backend.listener.getsockname(), socket.AF_INET)
    stage.launch("--connect-timeout=500ms", backend.target, listeners=[stage.listener()])
    client = stage.connect()
    assert read_to_end(client)[0] == b""
    stage.proxy.wait_for_log("Failed to connect to remote host: ")
    for connection in waiting:
        connection.close()


def test_what_was_sent_while_held_is_delivered(stage):
    """Bytes that a client sends while it is held arrive first, in order."""
    backend = stage.absent()
    stage.launch(backend.target, listeners=[stage.listener()])
    client = stage.connect()
    for number in range(10):
        client.sendall(b"part %d " % number)
    assert_held(client)
    backend.start_listening()
    client.sendall(b"and the rest")
    client.shutdown(socket.SHUT_WR)
    expected = b"".join(b"part %d " % number for number in range(10)) + b"and the rest"
    assert read_to_end(backend.accept()) == (expected, "eof")


@pytest.mark.parametrize("listen", ["tcp4", "unix"])
def test_request_and_half_close_while_held(stage, listen):
    """A client that has sent its whole request and half-closed is still served."""
    backend = stage.absent()
    stage.launch(backend.target, listeners=[stage.listener(listen)])
    client = stage.connect()
    client.sendall(b"request")
    client.shutdown(socket.SHUT_WR)
    assert_held_after_half_close(client)
    backend.start_listening()
    server = backend.accept()
    assert read_to_end(server) == (b"request", "eof")
    server.sendall(b"answer")
    server.close()
    assert read_to_end(client) == (b"answer", "eof")


def assert_held_after_half_close(client):
    """Assert that a client which has ended its own direction receives nothing."""
    client.settimeout(HOLD)
    with pytest.raises(TimeoutError):
        client.recv(1)


def test_held_clients_count_towards_the_limit(stage):
    """Held clients count against --connections-max=."""
    backend = stage.absent()
    stage.launch("-c2", backend.target, listeners=[stage.listener()])
    held = [stage.connect() for _ in range(2)]
    assert_held(*held)
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.wait_for_log("Hit connection limit, refusing connection.")
    assert_served(held, backend)


def test_connect_timeout_of_0_is_one_attempt(stage):
    """If the one attempt fails, the client is closed at once, as by the original."""
    backend = stage.absent()
    stage.launch("--connect-timeout=0", backend.target, listeners=[stage.listener()])
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.wait_for_log("Failed to connect to remote host: Connection refused")
    assert len(stage.proxy.log_lines()) == 1


def test_client_is_given_up_after_connect_timeout(stage):
    """The client is closed, not before the time is up, and the reason is logged."""
    backend = stage.absent()
    stage.launch("--connect-timeout=600ms", backend.target, listeners=[stage.listener()])
    start = time.monotonic()
    client = stage.connect()
    assert read_to_end(client)[0] == b""
    assert time.monotonic() - start >= 0.55
    stage.proxy.wait_for_log("Failed to connect to remote host: Connection refused")
    assert not stage.proxy.has_ended()


def test_each_client_has_its_own_deadline(stage):
    """A client that comes later is held for as long as the first one."""
    backend = stage.absent()
    stage.launch("--connect-timeout=1s", backend.target, listeners=[stage.listener()])
    first = stage.connect()
    never_within(0.6, lambda: not is_quiet(first), "the end of the first")
    start = time.monotonic()
    second = stage.connect()
    read_to_end(first)
    assert is_quiet(second)
    read_to_end(second)
    assert time.monotonic() - start >= 0.95


def test_one_line_when_an_outage_starts_and_one_when_it_ends(stage):
    """Twenty held clients are one line at the start and one, with their number, at the end."""
    backend = stage.absent()
    stage.launch(backend.target, listeners=[stage.listener()])
    clients = [stage.connect() for _ in range(20)]
    assert_held(*clients)
    assert len(stage.proxy.log_lines()) == 1
    assert backend.target in stage.proxy.log()
    assert_served(clients, backend)
    wait_until(lambda: len(stage.proxy.log_lines()) >= 2, "a line about the end of the outage")
    assert len(stage.proxy.log_lines()) == 2
    assert "20" in stage.proxy.log_lines()[1]


def test_second_outage_is_logged_too(stage):
    """If it follows within seconds it is logged at the exit at the latest."""
    backend = stage.absent()
    stage.launch(backend.target, listeners=[stage.listener()])
    client = stage.connect()
    assert_held(client, seconds=0.2)
    backend.start_listening()
    talk(client, backend.accept())
    wait_until(lambda: len(stage.proxy.log_lines()) == 2, "two lines")
    address = backend.listener.getsockname()
    backend.listener.close()
    client = stage.connect()
    assert_held(client, seconds=0.2)
    backend.listener = socket.create_server(address)
    talk(client, backend.accept())
    assert stage.proxy.end()
    assert len(stage.proxy.log_lines()) >= 3


def test_no_empty_probe(stage):
    """The target sees as many connections as there are clients: every probe serves one."""
    backend = stage.absent()
    stage.launch(backend.target, listeners=[stage.listener()])
    clients = [stage.connect() for _ in range(5)]
    assert_held(*clients)
    backend.start_listening()
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
    heard = sorted(read_exactly(backend.accept(), 1) for _ in clients)
    assert heard == [b"0", b"1", b"2", b"3", b"4"]
    backend.listener.settimeout(0.3)
    with pytest.raises(TimeoutError):
        backend.listener.accept()


@pytest.mark.parametrize("target", ["tcp4", "unix"])
def test_two_hundred_held_clients_cost_little(stage, target):
    """Two hundred held clients share one probe and use hardly any CPU; then all are served."""
    backend = stage.absent(target)
    stage.launch(backend.target, listeners=[stage.listener("unix")])
    clients = [stage.connect() for _ in range(200)]
    assert_held(clients[0], clients[-1])
    assert stage.proxy.cpu_share(0.8) < 0.2
    assert_served(clients, backend)


def test_open_connections_continue_during_an_outage(stage):
    """While other clients are held, open connections are forwarded as before."""
    backend = stage.forward("tcp4", "tcp4")
    client = stage.connect()
    server = backend.accept()
    address = backend.listener.getsockname()
    backend.listener.close()
    held = stage.connect()
    for _ in range(20):
        talk(client, server)
    assert_held(held, seconds=0.2)
    backend.listener = socket.create_server(address)
    talk(held, backend.accept())


def test_target_that_accepts_and_resets_is_reached(stage):
    """A target that accepts and then resets is not tried again: it has been reached."""
    backend = stage.forward("tcp4", "tcp4")
    client = stage.connect()
    reset(backend.accept())
    assert read_to_end(client)[0] == b""
    backend.listener.settimeout(0.5)
    with pytest.raises(TimeoutError):
        backend.listener.accept()


def test_wrong_kind_of_target_fails_at_once(stage):
    """For a datagram socket the client is not held, because it will never serve."""
    file, datagram = stage.path("file"), stage.path("datagram")
    with open(file, "w"), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(datagram)
        stage.launch("--connect-timeout=1h", datagram, listeners=[stage.listener()])
        assert read_to_end(stage.connect())[0] == b""
        stage.proxy.wait_for_log("Failed to connect to remote host: ")


def test_socket_between_bind_and_chmod(stage):
    """A UNIX target without permission for us is tried again, with a line in the log at once."""
    prefix = as_unprivileged_user(stage.executable)
    backend = stage.backend("unix")
    path = backend.listener.getsockname()
    os.chmod(path, 0o600)
    stage.launch(backend.target, listeners=[stage.listener()], prefix=prefix)
    client = stage.connect()
    stage.proxy.wait_for_log("Permission denied")
    assert_held(client, seconds=1.3)
    os.chmod(path, 0o666)
    talk(client, backend.accept())


def test_forbidden_socket(stage):
    """If the permission stays missing, the client is given up, with the reason."""
    prefix = as_unprivileged_user(stage.executable)
    backend = stage.backend("unix")
    os.chmod(backend.listener.getsockname(), 0o600)
    stage.launch(
        "--connect-timeout=300ms", backend.target, listeners=[stage.listener()], prefix=prefix
    )
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.wait_for_log(
        f"Failed to connect to remote host: Permission denied ({backend.target})."
    )


def test_stop_while_clients_are_held(stage):
    """A program that holds clients ends at once on SIGTERM, with exit status 0."""
    backend = stage.absent()
    stage.launch("--connect-timeout=1h", backend.target, listeners=[stage.listener()])
    client = stage.connect()
    assert_held(client, seconds=0.2)
    stage.proxy.send_signal(signal.SIGTERM)
    assert stage.proxy.wait() == 0
    read_to_end(client)


def test_a_held_client_prevents_an_idle_exit(stage):
    """--exit-idle-time= does not end a program that holds a client."""
    backend = stage.absent()
    listener = stage.listener()
    client = stage.connect(listener)  # before the program: without a client it may end at once
    stage.launch("--exit-idle-time=100ms", backend.target, listeners=[listener])
    never_within(0.6, stage.proxy.has_ended, "the exit while a client is held")
    backend.start_listening()
    talk(client, backend.accept())


def test_status_shows_held_clients(stage):
    """STATUS= shows the held clients and the target that they wait for."""
    backend = stage.absent()
    stage.launch(backend.target, listeners=[stage.listener()])
    stage.connect()
    wait_until(
        lambda: any(f"1 waiting for {backend.target}" in text for text in statuses(stage)),
        f"a status; seen: {statuses(stage)}",
    )


def statuses(stage):
    """All STATUS= texts so far."""
    return stage.proxy.notify.values("STATUS")


def test_name_that_appears_later(stage):
    """A name that does not exist yet (such as that of a container) is looked up again."""
    prefix = with_hosts(stage.directory, ["127.0.0.1 localhost"])
    backend = stage.backend()
    stage.launch(f"later.test:{backend.port()}", listeners=[stage.listener()], prefix=prefix)
    client = stage.connect()
    assert_held(client)
    with open(stage.path("hosts"), "a") as hosts:
        hosts.write("127.0.0.1 later.test\n")
    talk(client, backend.accept())


def test_name_that_does_not_appear(stage):
    """The line after --connect-timeout= begins as the original's does."""
    prefix = with_hosts(stage.directory, ["127.0.0.1 localhost"])
    stage.launch(
        "--connect-timeout=500ms", "missing.test:80", listeners=[stage.listener()], prefix=prefix
    )
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.wait_for_log("Failed to resolve host: ")


def test_dead_first_address_does_not_delay_the_second(stage):
    """The next address is tried long before the timeout of one that drops packets."""
    dead, live = stage.on_one_port(
        lambda: stage.backend(backlog=0),
        lambda port: stage.backend(host="127.0.0.2", port=port),
    )
    waiting = fill_backlog(dead.listener.getsockname(), socket.AF_INET)
    prefix = with_hosts(stage.directory, ["127.0.0.1 two.test", "127.0.0.2 two.test"])
    stage.launch(
        "--connect-timeout=1h",
        f"two.test:{dead.port()}",
        listeners=[stage.listener()],
        prefix=prefix,
    )
    for _ in range(3):
        talk(stage.connect(), live.accept(timeout=5.0))
    for connection in waiting:
        connection.close()


def test_network_that_comes_up_later(stage):
    """A target without a route (the network is not up yet) is tried again."""
    prefix = namespace_prefix("true")  # the loopback device of a new namespace is down
    notify = stage.notify_socket(stage.path("notify"))  # abstract names end at the namespace
    stage.launch("127.0.0.1:4000", listeners=[stage.listener()], prefix=prefix, notify=notify)
    listener = in_network_namespace_of(stage.proxy.pid, lambda: socket.create_server(("", 4000)))
    with listener:
        client = stage.connect()
        assert_held(client)
        up = ["nsenter", f"--target={stage.proxy.pid}", "--net", "ip", "link", "set", "lo", "up"]
        subprocess.run(up, check=True)
        listener.settimeout(10)
        with listener.accept()[0] as server:
            talk(client, server)


def test_target_whose_address_is_bound_later(stage):
    """A target that listens later, at another loopback address, is found by the retries."""
    probe = open_listener("tcp4", stage.directory, host="127.0.0.9")
    address = probe.getsockname()
    probe.close()
    stage.launch(f"{address[0]}:{address[1]}", listeners=[stage.listener()])
    client = stage.connect()
    assert_held(client)
    with socket.create_server(address) as listener:
        listener.settimeout(10)
        with listener.accept()[0] as server:
            talk(client, server)
