"""Targets: literal addresses, names, several addresses of one name."""

import re
import socket

import pytest
from kit.differences import differs
from kit.namespaces import with_hosts, with_name_server
from kit.sockets import TCP, UNIX, read_exactly, read_to_end
from kit.traffic import greet, is_served
from kit.waiting import wait_until


def port_of(target):
    """The port in HOST:PORT."""
    return target.rsplit(":", 1)[1]


@pytest.mark.parametrize("family", [*TCP, *UNIX])
def test_literal_target(stage, family):
    """IPv4, IPv6 (`::1:PORT`), a path and an abstract name."""
    stage.launch(stage.echo(family), listeners=[stage.listener()])
    greet(stage.connect())


@differs("original", reason="takes the brackets for part of the name")
def test_bracketed_ipv6(stage):
    """`[V6]:PORT`, the usual form."""
    stage.launch(f"[::1]:{port_of(stage.echo('tcp6'))}", listeners=[stage.listener()])
    greet(stage.connect())


@differs("original", reason="takes the brackets for part of the name")
def test_bracketed_ipv6_with_scope(stage):
    """`[V6%SCOPE]:PORT` with the loopback device as the scope of a link-local address."""
    target = f"[fe80::1%lo]:{port_of(stage.echo('tcp6'))}"
    stage.launch(*stage.one_attempt, target, listeners=[stage.listener()])
    assert read_to_end(stage.connect())[0] == b""  # parsed, but no host has it
    stage.proxy.wait_for_log("Failed to connect to remote host:")


@differs("original", reason="knows paths only by their slash")
def test_unix_prefix(stage):
    """`unix:PATH`."""
    stage.launch(f"unix:{stage.echo('unix')}", listeners=[stage.listener()])
    greet(stage.connect())


def test_name(stage):
    """A name is looked up."""
    stage.launch(f"localhost:{port_of(stage.echo())}", listeners=[stage.listener()])
    for _ in range(3):
        greet(stage.connect())


def test_many_clients_of_a_name(stage):
    """Fifty clients at once wait for the same name."""
    stage.launch(f"localhost:{port_of(stage.echo())}", listeners=[stage.listener()])
    clients = [stage.connect() for _ in range(50)]
    for client in clients:
        greet(client)


@differs("original-252", reason="tries the first address only")
def test_every_address_of_a_name_is_tried(stage):
    """Only one of three addresses listens, and not the one that the look-up puts first."""
    hosts = ["127.0.0.3 many.test", "127.0.0.2 many.test", "127.0.0.1 many.test"]
    for host in ("127.0.0.2", "127.0.0.3"):
        target = f"many.test:{port_of(stage.echo(host=host))}"
        prefix = with_hosts(stage.directory, hosts)
        listener = stage.listener()
        stage.launch(target, listeners=[listener], prefix=prefix)
        greet(stage.connect(listener))


@differs("original-252", reason="tries the first address only")
def test_both_protocols_of_a_name_are_tried(stage):
    """Of a name's IPv6 and IPv4 addresses only the IPv4 one listens, and the reverse."""
    prefix = with_hosts(stage.directory, ["::1 both.test", "127.0.0.1 both.test"])
    for family in TCP:
        listener = stage.listener()
        stage.launch(
            f"both.test:{port_of(stage.echo(family))}", listeners=[listener], prefix=prefix
        )
        greet(stage.connect(listener))


def test_name_that_does_not_exist(stage):
    """For a name that cannot be resolved the client is closed, with one line as by the original."""
    prefix = with_hosts(stage.directory, ["127.0.0.1 localhost"])
    stage.launch(*stage.one_attempt, "missing.test:80", listeners=[stage.listener()], prefix=prefix)
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.wait_for_log("Failed to resolve host: ")
    assert len(stage.proxy.log_lines()) == 1


def test_clients_are_served_after_a_failed_look_up(stage):
    """A name that appears later serves the clients that come after it."""
    prefix = with_hosts(stage.directory, ["127.0.0.1 localhost"])
    target = stage.echo()
    stage.launch(
        *stage.one_attempt,
        f"later.test:{port_of(target)}",
        listeners=[stage.listener()],
        prefix=prefix,
    )
    assert read_to_end(stage.connect())[0] == b""
    with open(stage.path("hosts"), "a") as hosts:
        hosts.write("127.0.0.1 later.test\n")
    wait_until(lambda: is_served(stage.connect()), "a served client")


@pytest.mark.parametrize("family", ["tcp4", "unix"])
def test_refused_connection(stage, family):
    """Without a listener the client is closed, one line says why, and the program continues."""
    backend = stage.backend(family)
    target = backend.target
    backend.close()
    stage.launch(*stage.one_attempt, target, listeners=[stage.listener()])
    received, _ = read_to_end(stage.connect())
    assert received == b""
    stage.proxy.wait_for_log("Failed to connect to remote host: Connection refused")
    assert len(stage.proxy.log_lines()) == 1
    assert not stage.proxy.has_ended()


def test_missing_path(stage):
    """For a path that does not exist it is the same, with another reason."""
    stage.launch(*stage.one_attempt, stage.path("missing"), listeners=[stage.listener()])
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.wait_for_log("Failed to connect to remote host: No such file or directory")


def test_path_that_is_no_socket(stage):
    """A file at the path of the target is one line; the kernel says only: refused."""
    path = stage.path("file")
    with open(path, "w"):
        pass
    stage.launch(*stage.one_attempt, path, listeners=[stage.listener()])
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.wait_for_log("Failed to connect to remote host: ")


def test_failures_do_not_disturb_other_connections(stage):
    """When a target stops listening, an open connection to it continues."""
    backend = stage.forward("tcp4", "unix", *stage.one_attempt)
    client, server = stage.connect(), backend.accept()
    backend.listener.close()
    for _ in range(5):
        assert read_to_end(stage.connect())[0] == b""
    client.sendall(b"still here")
    assert read_exactly(server, 10) == b"still here"


@differs("original", reason="each failure is a line of its own")
def test_log_lines_about_failures_are_limited(stage):
    """Fifty clients without a target are a few lines, with the number left out."""
    stage.launch(*stage.one_attempt, stage.path("missing"), listeners=[stage.listener("unix")])
    for _ in range(50):
        assert read_to_end(stage.connect())[0] == b""
    assert 1 <= len(stage.proxy.log_lines("Failed to connect to remote host:")) <= 5


def test_target_that_accepts_and_resets(stage):
    """A target that accepts and closes at once is not tried again."""
    client, server = stage.pair("tcp4", "tcp4")
    server.close()
    assert read_to_end(client)[0] == b""
    assert not re.search("(?i)traceback|failed", stage.proxy.log())


@differs("original", reason="has one target only", run=False)
def test_look_up_that_hangs_delays_no_other_client(stage):
    """While a name server does not answer, other clients are served, and the program can end."""
    silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        silent.bind(("127.0.0.53", 53))
    except OSError as error:
        pytest.skip(f"no port 53 for a name server: {error}")
    with silent:
        silent.settimeout(10)
        listeners = [stage.listener(), stage.listener()]
        stage.launch(
            "slow=name-that-hangs.test:80",
            f"fast={stage.echo()}",
            listeners=listeners,
            names="slow:fast",
            prefix=with_name_server(stage.directory, "127.0.0.53"),
        )
        before = stage.connect(listeners[1])
        greet(before)
        waiting = [stage.connect(listeners[0]) for _ in range(6)]
        silent.recv(512)  # the look-up has begun, and gets no answer
        for _ in range(50):
            greet(before)
            greet(stage.connect(listeners[1]))
        for client in waiting:
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.recv(1)
        assert stage.proxy.end()  # which waits for no look-up
