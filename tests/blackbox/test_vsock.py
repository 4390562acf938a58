"""vsock:CID:PORT as a target and with --listen=, where the kernel has it."""

import shutil
import socket
import subprocess
from pathlib import Path
from types import MappingProxyType

import pytest
from kit.differences import differs
from kit.socket_state import is_quiet
from kit.sockets import read_exactly, read_to_end
from kit.waiting import never_within, patience

pytestmark = differs("original", reason="has no AF_VSOCK", run=False)

LOOPBACK = 1
"""VMADDR_CID_LOCAL, see vsock(7)."""


STANDIN = Path(__file__).with_name("vsock_standin.c")


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """A library to preload that implements AF_VSOCK with TCP, with the errors of a real one."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in of vsock")
    library = tmp_path_factory.mktemp("vsock") / "standin.so"
    subprocess.run(
        [compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, STANDIN, "-ldl"],
        check=True,
    )
    return {"LD_PRELOAD": str(library)}


class Loopback:
    """A target on a real vsock loopback."""

    environment = MappingProxyType({})

    def __init__(self, listener):
        self.listener = listener
        cid, port = listener.getsockname()
        self.target = f"vsock:{cid}:{port}"

    @classmethod
    def open(cls, request):
        return cls(vsock_listener())

    def stop(self):
        """Stop listening; return the address at which to start again."""
        address = self.listener.getsockname()
        self.listener.close()
        return address

    def start(self, address):
        self.listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        self.listener.bind(address)
        self.listener.listen(64)

    def accept(self):
        self.listener.settimeout(patience())
        return self.listener.accept()[0]


class StandIn(Loopback):
    """The same with TCP sockets that the program takes for vsock ones."""

    def __init__(self, listener, environment):
        self.listener = listener
        self.environment = environment
        self.target = f"vsock:1:{listener.getsockname()[1]}"

    @classmethod
    def open(cls, request):
        environment = request.getfixturevalue("standin")
        return cls(socket.create_server(("127.0.0.1", 0), backlog=64), environment)

    def start(self, address):
        self.listener = socket.create_server(address, backlog=64)


@pytest.fixture(params=[Loopback, StandIn])
def vsock(request, stage):
    """A vsock target that can be stopped and started."""
    target = request.param.open(request)
    yield target
    target.listener.close()


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
    """A vsock target, such as a virtual machine."""
    with vsock_listener() as backend:
        cid, port = backend.getsockname()
        stage.launch(f"vsock:{cid}:{port}", listeners=[stage.listener()])
        client = stage.connect()
        client.sendall(b"hello")
        with backend.accept()[0] as server:
            assert read_exactly(server, 5) == b"hello"
            server.sendall(b"world")
        assert read_to_end(client) == (b"world", "eof")


def test_bytes_that_come_before_the_connect_is_done(stage, vsock):
    """send(2) fails with ENOTCONN, and not with EAGAIN as on TCP: the client must not be cut."""
    stage.launch(vsock.target, listeners=[stage.listener()], environment=vsock.environment)
    for number in range(60):
        client = stage.connect()
        client.sendall(b"hello %d" % number)
        with vsock.accept() as server:
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(server) == (b"hello %d" % number, "eof")


def test_header_and_bytes_before_the_connect_is_done(stage, vsock):
    stage.launch(
        "--proxy-protocol=v1",
        vsock.target,
        listeners=[stage.listener("unix")],
        environment=vsock.environment,
    )
    client = stage.connect()
    client.sendall(b"hello")
    with vsock.accept() as server:
        assert read_exactly(server, 20) == b"PROXY UNKNOWN\r\nhello"


def test_target_that_does_not_listen_yet(stage, vsock):
    """A vsock connect is refused with ECONNRESET: the clients wait, and no byte is lost."""
    address = vsock.stop()
    stage.launch(vsock.target, listeners=[stage.listener()], environment=vsock.environment)
    clients = [stage.connect() for _ in range(10)]
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
    stage.proxy.wait_for_log("holding clients")
    never_within(0.3, lambda: not all(map(is_quiet, clients)), "an end of a held client")
    vsock.start(address)
    seen = set()
    for _ in clients:
        with vsock.accept() as server:
            seen.add(read_exactly(server, 1))
    assert seen == {b"%d" % number for number in range(10)}


def test_target_that_does_not_listen_without_connect_timeout(stage, vsock):
    vsock.stop()
    stage.launch(
        "--connect-timeout=0",
        vsock.target,
        listeners=[stage.listener()],
        environment=vsock.environment,
    )
    client = stage.connect()
    assert read_to_end(client)[0] == b""
    stage.proxy.wait_for_log("Failed to connect to remote host: Connection refused")


def test_the_inspection_tells_of_it(stage, inspected, vsock):
    caller = inspected(vsock.target, environment=dict(vsock.environment))
    client = stage.connect()
    client.sendall(b"x")
    with vsock.accept() as server:
        assert read_exactly(server, 1) == b"x"
        row = caller.connection_of(client)
        assert (row["target"], row["state"]) == (vsock.target, "open")
        if not isinstance(vsock, StandIn):  # whose kernel knows the TCP address
            assert row["targetAddress"] == vsock.target
        assert caller.metrics()["TargetBytesUp", vsock.target] == 1
        caller.terminate(row["id"])
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_listen(stage):
    """--listen=vsock:CID:PORT; a vsock client counts as one without an address."""
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


def test_clients_of_one_machine_share_a_limit(stage):
    """A source is a CID, whatever the port."""
    with vsock_listener() as listener:
        stage.launch("--connections-max-per-source=2", stage.echo(), listeners=[listener])
        clients = [socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) for _ in range(3)]
        for client in clients:
            client.settimeout(patience())
            client.connect(listener.getsockname())
        for client in clients[:2]:
            client.sendall(b"hello")
            assert read_exactly(client, 5) == b"hello"
        assert read_to_end(clients[2])[0] == b""
        stage.proxy.wait_for_log(
            "Hit connection limit of a source, refusing connection. Client: vsock:1:"
        )
        for client in clients:
            client.close()


def test_target_that_is_not_there(stage):
    """A vsock target that cannot be reached is one line, like any other."""
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
    """Anything else than CID:PORT is one line that shows it, and exit status 1."""
    for arguments in ([text], [f"--listen={text}", "127.0.0.1:1"]):
        outcome = stage.run(*arguments)
        assert outcome.status == 1
        assert len(outcome.stderr.splitlines()) == 1
        assert text in outcome.stderr
