"""A target that leads back to the program is recognized at run time and refused in one line."""

import os
import socket

from kit.differences import differs
from kit.namespaces import in_network_namespace_of, mount_prefix, namespace_prefix
from kit.sockets import read_exactly, read_to_end, target_text
from kit.traffic import talk
from kit.waiting import patience, wait_until


def is_closed(stage, listener=None):
    """Whether a client is closed without a byte; a reset may come as early as its connect."""
    try:
        with stage.connect(listener) as client:
            return read_to_end(client)[0] == b""
    except ConnectionResetError:
        return True


loops = differs("original", reason="connects to itself until its limit is reached", run=False)


@loops
def test_loop_through_another_listener(stage):
    """The target is a second listener of the same program."""
    listeners = [stage.listener(), stage.listener("unix")]
    target = target_text(listeners[1].getsockname(), socket.AF_UNIX)
    stage.launch(target, listeners=listeners)
    assert is_closed(stage, listeners[0])
    wait_until(stage.proxy.log_lines, "a line about the loop")
    assert stage.proxy.cpu_share() < 0.2


@loops
def test_loop_does_not_disturb_others(stage):
    """A loop of one pair leaves another pair of the same program alone."""
    listeners, target = [stage.listener(), stage.listener()], stage.echo()
    loop = target_text(listeners[0].getsockname(), socket.AF_INET)
    stage.launch(f"loop={loop}", f"echo={target}", listeners=listeners, names="loop:echo")
    for _ in range(5):
        assert is_closed(stage, listeners[0])
        client = stage.connect(listeners[1])
        client.sendall(b"hello")
        assert read_exactly(client, 5) == b"hello"


def test_client_on_the_same_machine_is_no_loop(stage):
    """Clients and target at one address, as usual on one machine, are not taken for a loop."""
    stage.launch(stage.echo(), listeners=[stage.listener()])
    clients = [stage.connect() for _ in range(30)]
    for client in clients:
        client.sendall(b"hello")
        assert read_exactly(client, 5) == b"hello"


def test_two_programs_in_a_row_are_no_loop(stage):
    """One program forwards to another on the same machine."""
    inner = stage.listener()
    stage.launch(stage.echo(), listeners=[inner])
    outer = stage.listener()
    stage.launch(target_text(inner.getsockname(), socket.AF_INET), listeners=[outer])
    client = stage.connect(outer)
    client.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"


def test_same_address_in_another_network_namespace(stage):
    """A listener inherited from outside, and a target with the same address inside: no loop.

    This is how a service in its own network namespace is put on the host's port.
    """
    prefix = namespace_prefix()
    listener = stage.listener()
    address = listener.getsockname()
    notify = stage.notify_socket(stage.path("notify"))  # abstract names end at the namespace
    target = target_text(address, socket.AF_INET)
    stage.launch(target, listeners=[listener], prefix=prefix, notify=notify)
    if not stage.is_ours:
        wait_until(lambda: network_of(stage.proxy.pid) != network_of("self"), "the namespace")
        wait_until(lambda: len(stage.proxy.fds()) > 5, "the program")
    inside = in_network_namespace_of(stage.proxy.pid, lambda: socket.create_server(address))
    with inside:
        assert_forwarded_to(stage, inside)


def assert_forwarded_to(stage, inside):
    """Assert that clients are forwarded to that listener."""
    inside.settimeout(patience())
    for _ in range(3):
        client = stage.connect()
        with inside.accept()[0] as server:
            talk(client, server)


def network_of(pid):
    """The network namespace of a process."""
    return os.readlink(f"/proc/{pid}/ns/net")


def test_same_path_in_another_mount_namespace(stage):
    """A listener's path outside, and another socket at the same path inside: no loop."""
    listener = stage.listener("unix")
    path = listener.getsockname()
    prefix = mount_prefix(f"-t tmpfs none {stage.directory}")
    stage.launch(path, listeners=[listener], prefix=prefix)
    outside = os.stat(stage.directory).st_dev
    root = f"/proc/{stage.proxy.pid}/root"
    wait_until(lambda: os.stat(root + stage.directory).st_dev != outside, "the private mount")
    with socket.socket(socket.AF_UNIX) as inside:
        inside.bind(root + path)
        inside.listen()
        assert_forwarded_to(stage, inside)
