"""vsock:CID:PORT as a target and with --listen=, where the kernel has it."""

import socket

import pytest
from harness.differences import differs
from harness.sockets import read_exactly, read_to_end

pytestmark = differs("original", reason="has no AF_VSOCK", run=False)

LOOPBACK = 1
"""VMADDR_CID_LOCAL, see vsock(7)."""


def vsock_listener():
    """A listening vsock socket on loopback, or a skip that says what is missing."""
    if not has_vsock():
        pytest.skip("this kernel has no vsock")
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        listener.bind((LOOPBACK, socket.VMADDR_PORT_ANY))
        listener.listen()
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
            probe.settimeout(2)
            probe.connect(listener.getsockname())
            listener.accept()[0].close()
    except OSError as error:
        listener.close()
        pytest.skip(f"no vsock loopback here: {error}")
    listener.settimeout(10)
    return listener


def has_vsock():
    """Whether the kernel knows the address family at all."""
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True


def test_target(stage):
    """A vsock target, as of a virtual machine."""
    with vsock_listener() as backend:
        cid, port = backend.getsockname()
        stage.launch(f"vsock:{cid}:{port}", listeners=[stage.listener()])
        client = stage.connect()
        client.sendall(b"hello")
        with backend.accept()[0] as server:
            assert read_exactly(server, 5) == b"hello"
            server.sendall(b"world")
        assert read_to_end(client) == (b"world", "eof")


def test_listen(stage):
    """--listen=vsock:CID:PORT, and a vsock client counts as one without an address."""
    with vsock_listener() as probe:
        port = probe.getsockname()[1] + 1
    backend = stage.backend()
    stage.launch(f"--listen=vsock:{LOOPBACK}:{port}", "--proxy-protocol=v1", backend.target)
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
        client.connect((LOOPBACK, port))
        client.sendall(b"hello")
        assert read_exactly(backend.accept(), 20) == b"PROXY UNKNOWN\r\nhello"


def test_inherited_listener(stage):
    """A vsock listener from the service manager."""
    with vsock_listener() as listener:
        stage.launch(stage.echo(), listeners=[listener])
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
            client.settimeout(10)
            client.connect(listener.getsockname())
            client.sendall(b"hello")
            assert read_exactly(client, 5) == b"hello"


def test_target_that_is_not_there(stage):
    """A vsock target that cannot be reached is one line, as any other, and no crash."""
    stage.launch("--connect-timeout=0", "vsock:1:4294967294", listeners=[stage.listener()])
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.wait_for_log("Failed to connect to remote host: ")
    assert len(stage.proxy.log_lines()) == 1


def test_listen_without_vsock(stage):
    """Where the kernel has no vsock, --listen= says so in one line, exit status 1."""
    if has_vsock():
        pytest.skip("this kernel has vsock")
    outcome = stage.run("--listen=vsock:1:5000", "127.0.0.1:1")
    assert outcome.status == 1
    assert len(outcome.stderr.splitlines()) == 1
    assert "vsock:1:5000" in outcome.stderr


@pytest.mark.parametrize("text", ["vsock:x:1", "vsock:1:x", "vsock:1:99999999999"])
def test_bad_address(stage, text):
    """What is not CID:PORT is one line that shows it, exit status 1."""
    for arguments in ([text], [f"--listen={text}", "127.0.0.1:1"]):
        outcome = stage.run(*arguments)
        assert outcome.status == 1
        assert len(outcome.stderr.splitlines()) == 1
        assert text in outcome.stderr
