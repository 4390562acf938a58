"""--proxy-protocol=: the target gets the client's address, byte for byte as specified."""

import os
import shutil
import socket
import subprocess

import pytest
from kit.differences import differs
from kit.proxy_header import LOCAL, header_of
from kit.socket_state import is_quiet
from kit.sockets import read_exactly, read_to_end, reset
from kit.traffic import Payload, expected, receive_digest, send_payload
from kit.waiting import never_within, patience

pytestmark = differs("original", reason="has no --proxy-protocol= (262 has one)", run=False)

both_versions = pytest.mark.parametrize("version", ["v1", "v2"])


def assert_arrives(server, header):
    """Assert that these are the first bytes that the target reads."""
    assert read_exactly(server, len(header)) == header


@both_versions
@pytest.mark.parametrize(("listen", "family"), [("tcp4", "TCP4"), ("tcp6", "TCP6")])
@pytest.mark.parametrize("target", ["tcp4", "tcp6", "unix"])
def test_tcp_client(stage, listen, target, family, version):
    """The client's address and port, and those that it connected to, for any target."""
    client, server = stage.pair(listen, target, f"--proxy-protocol={version}")
    client.sendall(b"request")
    assert_arrives(server, header_of(version, client, family) + b"request")
    server.sendall(b"answer")
    assert read_exactly(client, 6) == b"answer"


@both_versions
def test_ipv4_client_of_a_dual_stack_listener(stage, version):
    """An IPv4-mapped address is sent as IPv4."""
    backend = stage.backend()
    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    with listener:
        stage.launch(f"--proxy-protocol={version}", backend.target, listeners=[listener])
        address = ("127.0.0.1", listener.getsockname()[1])
        client = stage.connect_to(address, socket.AF_INET)
        client.sendall(b"request")
        assert_arrives(backend.accept(), header_of(version, client, "TCP4") + b"request")


@pytest.mark.parametrize(("version", "header"), [("v1", b"PROXY UNKNOWN\r\n"), ("v2", LOCAL)])
@pytest.mark.parametrize("listen", ["unix", "abstract"])
@pytest.mark.parametrize("target", ["tcp4", "unix"])
def test_unix_client(stage, listen, target, version, header):
    """A UNIX client has no address to send: UNKNOWN in v1, LOCAL without addresses in v2."""
    client, server = stage.pair(listen, target, f"--proxy-protocol={version}")
    client.sendall(b"request")
    assert_arrives(server, header + b"request")


@both_versions
def test_header_comes_without_a_request(stage, version):
    """The header does not wait for the client's first byte: the server may speak first."""
    client, server = stage.pair("tcp4", "tcp4", f"--proxy-protocol={version}")
    assert_arrives(server, header_of(version, client, "TCP4"))
    server.sendall(b"220 ready")
    assert read_exactly(client, 9) == b"220 ready"
    never_within(0.1, lambda: not is_quiet(server), "a second header")


@both_versions
def test_client_that_ends_at_once(stage, version):
    """A client that sends nothing and half-closes is a header and an end."""
    client, server = stage.pair("tcp4", "tcp4", f"--proxy-protocol={version}")
    header = header_of(version, client, "TCP4")
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(server) == (header, "eof")


@both_versions
def test_header_before_bulk(stage, version):
    """Megabytes follow the header, and no byte is lost or duplicated."""
    client, server = stage.pair("tcp4", "tcp4", f"--proxy-protocol={version}")
    payload = Payload(8 << 20)
    sending = send_payload(client, payload, half_close=False)
    assert_arrives(server, header_of(version, client, "TCP4"))
    assert receive_digest(server, payload.size).result() == expected(payload)
    sending.result()


@both_versions
def test_header_of_a_held_client(stage, version):
    """A client that was held has a header with its own address, once."""
    backend = stage.absent()
    stage.launch(f"--proxy-protocol={version}", backend.target, listeners=[stage.listener()])
    client = stage.connect()
    client.sendall(b"request")
    never_within(0.3, lambda: not is_quiet(client), "an end of a held client")
    backend.start_listening()
    assert_arrives(backend.accept(), header_of(version, client, "TCP4") + b"request")


@both_versions
def test_each_client_has_its_own_header(stage, version):
    """Each connection of twenty clients of two listeners has the header of its own client."""
    backend = stage.backend()
    listeners = [stage.listener("tcp4"), stage.listener("tcp6")]
    stage.launch(f"--proxy-protocol={version}", backend.target, listeners=listeners)
    headers = set()
    for number in range(20):
        client = stage.connect(listeners[number % 2])
        headers.add(header_of(version, client, ("TCP4", "TCP6")[number % 2]))
    lengths = {len(header) for header in headers}
    for _ in range(20):
        server = backend.accept()
        received = read_exactly(server, min(lengths))
        while received not in headers:
            received += read_exactly(server, 1)
        headers.remove(received)
    assert not headers


@both_versions
def test_header_of_a_connected_socket(stage, version):
    """With Accept=yes the connection has its header too."""
    listener, backend = stage.listener(), stage.backend()
    client = stage.connect(listener)
    connection, _ = listener.accept()
    stage.launch(
        f"--proxy-protocol={version}",
        backend.target,
        listeners=[connection],
        names="connection",
        wait=False,
    )
    connection.close()
    server = backend.accept()
    assert_arrives(server, header_of(version, client, "TCP4"))


@both_versions
@pytest.mark.parametrize(
    ("listen", "family"), [("tcp4", "TCP4"), ("tcp6", "TCP6"), ("dual", "TCP4")]
)
def test_client_that_has_reset_before_it_is_accepted(stage, listen, family, version):
    """It is announced with its own address. UNKNOWN or LOCAL would mean the proxy itself, and the
    target would carry out its request with the proxy's rights."""
    backend = stage.backend("unix")  # connected at once, so all that was sent arrives
    if listen == "dual":
        listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        client = stage.connect_to(("127.0.0.1", listener.getsockname()[1]), socket.AF_INET)
    else:
        listener = stage.listener(listen)
        client = stage.connect(listener)
    with listener:
        header = header_of(version, client, family)
        client.sendall(b"request")
        reset(client)
        stage.launch(f"--proxy-protocol={version}", backend.target, listeners=[listener])
        assert read_to_end(backend.accept())[0] == header + b"request"


@both_versions
def test_connected_socket_that_has_been_reset(stage, version):
    """With Accept=yes the address of a client that has reset is unknown: it is refused."""
    listener, backend = stage.listener(), stage.backend()
    client = stage.connect(listener)
    connection, _ = listener.accept()
    client.sendall(b"request")
    reset(client)
    outcome = stage.run(
        f"--proxy-protocol={version}", backend.target, listeners=[connection], names="connection"
    )
    connection.close()
    assert outcome.status == 0
    assert [line.partition(" to ")[0] for line in outcome.stderr.splitlines()] == [
        "Refusing connection"
    ]
    assert is_quiet(backend.listener)


NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error;
events {{}}
http {{
  access_log {folder}/access; log_format main "$remote_addr $status"; access_log {folder}/log main;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  set_real_ip_from 127.0.0.1; set_real_ip_from unix:; real_ip_header proxy_protocol;
  server {{
    listen {listen} proxy_protocol; root {folder};
    allow 127.0.0.1; allow unix:; deny all;
  }}
}}
"""


@both_versions
@pytest.mark.parametrize("family", ["tcp4", "unix"])
def test_a_reset_client_gets_no_access_to_nginx(stage, version, family):
    """nginx allows requests from the proxy's own address, and none from this client's."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    folder = stage.path("nginx")
    os.mkdir(folder)
    os.chmod(folder, 0o755)
    backend = stage.absent(family)
    at = backend.target if family == "tcp4" else f"unix:{folder}/socket"
    target = backend.target if family == "tcp4" else f"{folder}/socket"
    backend.close()
    with open(f"{folder}/secret", "w") as secret, open(f"{folder}/conf", "w") as conf:
        secret.write("secret")
        conf.write(NGINX.format(folder=folder, listen=at))
    listener = stage.listener()
    for _ in range(20):
        client = socket.create_connection(listener.getsockname(), source_address=("127.0.0.5", 0))
        client.sendall(b"GET /secret HTTP/1.0\r\n\r\n")
        reset(client)
    with subprocess.Popen([nginx, "-c", f"{folder}/conf"], stderr=subprocess.DEVNULL) as server:
        try:
            stage.launch(f"--proxy-protocol={version}", target, listeners=[listener])
            for source, status in (("127.0.0.5", b"403"), ("127.0.0.1", b"200")):
                with socket.create_connection(
                    listener.getsockname(), timeout=patience(), source_address=(source, 0)
                ) as client:
                    client.sendall(b"GET /secret HTTP/1.0\r\n\r\n")
                    assert client.recv(12).endswith(status)
        finally:
            server.terminate()
    with open(f"{folder}/log") as log:
        lines = [line.split() for line in log]
    assert [source for source, status in lines if status == "200"] == ["127.0.0.1"]
    assert {source for source, _ in lines} == {"127.0.0.1", "127.0.0.5"}


def test_no_header_without_the_option(stage):
    """By default the target reads what the client sent and nothing before it."""
    client, server = stage.pair("tcp4", "tcp4")
    client.sendall(b"request")
    assert read_exactly(server, 7) == b"request"
