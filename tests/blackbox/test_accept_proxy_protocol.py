"""--accept-proxy-protocol=: clients of these networks are those that their headers tell of."""

import os
import shutil
import signal
import socket
import subprocess

import pytest
from kit.datagrams import status
from kit.differences import differs
from kit.proxy_header import LOCAL, SIGNATURE, V1, V2, V2_TLV
from kit.sockets import open_connection, quiet_port, read_exactly, read_to_end
from kit.traffic import Payload, expected, greet, is_served, receive_digest, send_payload
from kit.varlink import PROXY
from kit.waiting import patience, wait_until

pytestmark = differs("original", reason="accepts no PROXY header", run=False)

V1_UNKNOWN = b"PROXY UNKNOWN\r\n"
UNIX_NAMES = (b"/run/client", b"/run/" + b"n" * 103)
V2_UNSPECIFIED = SIGNATURE + b"\x21\0\0\0"
FROM = "--accept-proxy-protocol="
LOOPBACK = f"{FROM}127.0.0.0/8"


def unix_header(name):
    """A header of version 2 for a client with this name."""
    return SIGNATURE + b"\x21\x31\0\xd8" + name.ljust(108, b"\0") + b"/run/front".ljust(108, b"\0")


headers = pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])


def launch(stage, *arguments, listen="tcp4", target=None, **options):
    """Launch the program in front of a backend, which is returned."""
    backend = stage.backend() if target is None else target
    listener = stage.listener(listen)
    stage.launch(*arguments, backend.target, listeners=[listener], **options)
    return backend


# ── the header is taken, and nothing else ────────────────────────────────────────────────────────


@headers
@pytest.mark.parametrize(("listen", "networks"), [("tcp4", "127.0.0.1"), ("unix", "unix")])
def test_the_header_is_taken(stage, header, listen, networks):
    backend = launch(stage, FROM + networks, listen=listen)
    client = stage.connect()
    client.sendall(header + b"request")
    server = backend.accept()
    assert read_exactly(server, 7) == b"request"
    server.sendall(b"answer")
    assert read_exactly(client, 6) == b"answer"
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(server) == (b"", "eof")


@headers
def test_it_may_come_in_pieces(stage, header):
    backend = launch(stage, LOOPBACK)
    client = stage.connect()
    for byte in header + b"request":
        client.sendall(bytes([byte]))
    assert read_exactly(backend.accept(), 7) == b"request"


@headers
def test_bulk_behind_it(stage, header):
    backend = launch(stage, LOOPBACK)
    client = stage.connect()
    client.sendall(header)
    payload = Payload(8 << 20)
    sending = send_payload(client, payload, half_close=False)
    server = backend.accept()
    assert receive_digest(server, payload.size).result() == expected(payload)
    sending.result()


def test_from_others_it_is_bytes(stage):
    """Neither is one expected from them, nor is it believed."""
    backend = launch(stage, f"{FROM}10.0.0.0/8,unix")
    client = stage.connect()
    client.sendall(V1 + b"request")
    assert read_exactly(backend.accept(), len(V1) + 7) == V1 + b"request"


def test_an_ipv4_client_of_an_ipv6_listener(stage):
    backend = stage.backend()
    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    with listener:
        stage.launch(LOOPBACK, backend.target, listeners=[listener])
        client = stage.connect_to(("127.0.0.1", listener.getsockname()[1]), socket.AF_INET)
        client.sendall(V1 + b"request")
        assert read_exactly(backend.accept(), 7) == b"request"


@headers
def test_a_connected_socket(stage, header):
    """With Accept=yes."""
    listener, backend = stage.listener(), stage.backend()
    client = stage.connect(listener)
    connection, _ = listener.accept()
    stage.launch(LOOPBACK, backend.target, listeners=[connection], names="connection", wait=False)
    connection.close()
    client.sendall(header + b"request")
    assert read_exactly(backend.accept(), 7) == b"request"


def test_several_options_add_up(stage):
    backend = launch(stage, f"{FROM}10.0.0.0/8", f"{FROM}unix", LOOPBACK)
    stage.connect().sendall(V1 + b"request")
    assert read_exactly(backend.accept(), 7) == b"request"


# ── and passed on ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("received", "version", "sent"),
    [
        (V1, "v1", V1),
        (V1, "v2", V2),
        (V2, "v1", V1),
        (V2, "v2", V2),
        (V2_TLV, "v2", V2_TLV),
        (V2_TLV, "v1", V1),
        (V1_UNKNOWN, "v1", V1_UNKNOWN),
        (V1_UNKNOWN, "v2", V2_UNSPECIFIED),
        (LOCAL, "v1", V1_UNKNOWN),
        (LOCAL, "v2", LOCAL),
        (unix_header(UNIX_NAMES[0]), "v1", V1_UNKNOWN),
        (unix_header(UNIX_NAMES[1]), "v2", unix_header(UNIX_NAMES[1])),
    ],
)
@pytest.mark.parametrize("held", [False, True])
def test_passed_on(stage, received, version, sent, held):
    backend = launch(
        stage,
        LOOPBACK,
        f"--proxy-protocol={version}",
        target=stage.absent() if held else None,
    )
    client = stage.connect()
    client.sendall(received + b"request")
    if held:
        status(stage.proxy, "1 waiting for")
        backend.start_listening()
    assert read_exactly(backend.accept(), len(sent) + 7) == sent + b"request"


def test_others_are_announced_as_themselves(stage):
    backend = launch(stage, f"{FROM}127.0.0.2", "--proxy-protocol=v1")
    client = stage.connect()
    client.sendall(b"request")
    name = client.getsockname()
    own = client.getpeername()
    header = f"PROXY TCP4 {name[0]} {own[0]} {name[1]} {own[1]}\r\n".encode()
    assert read_exactly(backend.accept(), len(header) + 7) == header + b"request"


# ── what is no header ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", "no PROXY header"),
        (V1.replace(b"5000", b"05000"), "a PROXY header of version 1 with a bad port"),
        (V2[:-1] + b"\0" * 5000, None),
        (
            SIGNATURE + b"\x21\x11\xff\xff",
            "a PROXY header of 65551 bytes",
        ),
    ],
)
def test_a_bad_header_is_one_line(stage, data, why):
    backend = launch(stage, LOOPBACK)
    client = stage.connect()
    name = "{}:{}".format(*client.getsockname())
    listener = "{}:{}".format(*client.getpeername())
    client.sendall(data)
    if why is None:
        assert read_exactly(backend.accept(), 10) == bytes(10)
        return
    assert read_to_end(client)[0] == b""
    stage.proxy.wait_for_log("Refusing connection to ")
    assert stage.proxy.log_lines() == [f"Refusing connection to {listener}: {why}. Client: {name}."]
    status(stage.proxy, "1 refused without a PROXY header")
    good = stage.connect()
    good.sendall(V1 + b"x")
    assert read_exactly(backend.accept(), 1) == b"x"


def test_a_client_that_says_nothing_is_refused(stage):
    """Within seconds; meanwhile, and after that, others are served."""
    backend = launch(stage, LOOPBACK)
    silent = [stage.connect() for _ in range(3)]
    silent[1].sendall(V2[:20])
    good = stage.connect()
    good.sendall(V1 + b"x")
    assert read_exactly(backend.accept(), 1) == b"x"
    assert {read_to_end(client)[0] for client in silent} == {b""}
    stage.proxy.wait_for_log("no PROXY header within 5 s")
    greet_through(stage, backend)


def greet_through(stage, backend):
    client = stage.connect()
    client.sendall(V1 + b"x")
    assert read_exactly(backend.accept(), 1) == b"x"


def test_a_client_that_ends_is_refused_at_once(stage):
    launch(stage, LOOPBACK)
    client = stage.connect()
    client.sendall(V1[:9])
    client.shutdown(socket.SHUT_WR)
    stage.proxy.wait_for_log("the end of the connection in the PROXY header")


def test_log_lines_about_them_are_limited(stage):
    launch(stage, LOOPBACK)
    for _ in range(100):
        client = stage.connect()
        client.sendall(b"nonsense")
        read_to_end(client)
    assert stage.proxy.end()
    assert len(stage.proxy.log_lines("Refusing connection")) <= 3


# ── the client is the one in the header ──────────────────────────────────────────────────────────


def test_the_inspection_shows_it(stage, inspected):
    backend = stage.backend()
    caller = inspected(LOOPBACK, backend.target)
    client = stage.connect()
    client.sendall(V1 + b"x")
    assert read_exactly(backend.accept(), 1) == b"x"
    (row,) = caller.connections()
    assert row["client"] == "192.0.2.1:5000"
    bad = stage.connect()
    bad.sendall(b"nonsense")
    read_to_end(bad)
    waiting = stage.connect()
    wait_until(lambda: caller.metrics()["AwaitingHeader",] == 1, "the client that waits")
    found = caller.metrics()
    assert (found["Refused",], found["RefusedWithoutHeader",]) == (1, 1)
    waiting.sendall(V2)
    backend.accept()
    assert caller.metrics()["AwaitingHeader",] == 0


def test_held_clients_are_shown_with_it(stage, inspected):
    absent = stage.absent()
    caller = inspected(LOOPBACK, absent.target)
    stage.connect().sendall(V1)
    (row,) = wait_until(caller.connections, "the held client")
    assert (row["client"], row["state"]) == ("192.0.2.1:5000", "held")


@pytest.mark.parametrize("name", UNIX_NAMES)
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("listen", ["tcp4", "unix"])
def test_a_unix_client_is_shown_by_its_name(stage, inspected, name, held, listen):
    """The whole of it, also when its connect has failed."""
    backend = stage.absent() if held else stage.backend()
    caller = inspected(LOOPBACK, f"{FROM}unix", backend.target, listeners=[stage.listener(listen)])
    stage.connect().sendall(unix_header(name) + b"x")
    if not held:
        assert read_exactly(backend.accept(), 1) == b"x"
    (row,) = wait_until(caller.connections, "the client")
    assert (row["client"], row["state"]) == (name.decode(), "held" if held else "open")
    if held:
        backend.start_listening()
        assert read_exactly(backend.accept(), 1) == b"x"


def test_clients_that_wait_are_listed(stage, inspected):
    """As what they are, and with the ids that their connections will have."""
    backend = stage.backend()
    caller = inspected(LOOPBACK, backend.target)
    client = stage.connect()
    (row,) = wait_until(caller.connections, "the client that waits")
    name = "{}:{}".format(*client.getsockname())
    assert (row["client"], row["state"], row["heldUSec"]) == (name, "header", None)
    assert (row["target"], row["targetAddress"]) == (backend.target, None)
    assert caller.connections(state="held") == []
    assert len(caller.connections(state="header", target=backend.target)) == 1
    client.sendall(V1 + b"x")
    backend.accept()
    (connected,) = caller.connections()
    assert (connected["client"], connected["state"]) == ("192.0.2.1:5000", "open")
    assert connected["id"] == row["id"]


def test_they_keep_their_ids_when_they_are_held(stage, inspected):
    absent = stage.absent()
    caller = inspected(LOOPBACK, absent.target)
    clients = [stage.connect() for _ in range(2)]
    wait_until(lambda: len(caller.connections(state="header")) == 2, "the clients that wait")
    ids = {row["id"] for row in caller.connections()}
    for client in clients:
        client.sendall(V1 + b"x")
    wait_until(lambda: len(caller.connections(state="held")) == 2, "the held clients")
    assert {row["id"] for row in caller.connections()} == ids
    absent.start_listening()
    for _ in clients:
        assert read_exactly(absent.accept(), 1) == b"x"
    assert {row["id"] for row in caller.connections(state="open")} == ids


def test_a_client_that_waits_can_be_terminated(stage, inspected):
    caller = inspected(LOOPBACK, stage.backend().target)
    client = stage.connect()
    (row,) = wait_until(caller.connections, "the client that waits")
    assert caller.call(f"{PROXY}.Terminate", id=row["id"]) == [{"parameters": {}}]
    assert read_to_end(client) == (b"", "reset")
    assert caller.connections() == []


def test_watchers_see_each_of_them_once(stage, inspected, callers, folder):
    backend = stage.backend()
    caller = inspected(LOOPBACK, backend.target)
    watcher = callers(f"{folder}/inspect")
    watcher.watch()
    client = stage.connect()
    (row,) = wait_until(caller.connections, "the client that waits")
    client.sendall(V1 + b"x")
    server = backend.accept()
    assert read_exactly(server, 1) == b"x"
    client.shutdown(socket.SHUT_WR)
    server.close()
    bad = stage.connect()
    wait_until(lambda: caller.connections(state="header"), "another client that waits")
    bad.sendall(b"nonsense")
    told = []

    def ends():
        told.extend(message["parameters"] for message in watcher.messages())
        return [one["event"] for one in told].count("end") == 2

    wait_until(ends, "both ends")
    seen = [(one["event"], one["connection"]["state"], one.get("how")) for one in told]
    assert seen == [
        ("begin", "header", None),
        ("end", told[1]["connection"]["state"], "ended"),
        ("begin", "header", None),
        ("end", "header", "refused"),
    ]
    assert told[0]["connection"]["id"] == told[1]["connection"]["id"] == row["id"]


def test_the_log_shows_it(stage):
    launch(stage, LOOPBACK, environment={"SYSTEMD_LOG_LEVEL": "debug"})
    stage.connect().sendall(V1)
    stage.proxy.wait_for_log("New connection from 192.0.2.1:5000 to ")


def test_the_limit_of_a_source_is_for_it(stage):
    """Not for the balancer: its clients are many."""
    backend = launch(stage, LOOPBACK, "--connections-max-per-source=2")
    clients = []
    for number in range(6):
        clients.append(stage.connect())
        clients[-1].sendall(V1.replace(b"192.0.2.1 ", b"192.0.2.%d " % (number // 2)) + b"x")
        assert read_exactly(backend.accept(), 1) == b"x"
    late = stage.connect()
    late.sendall(V1.replace(b"192.0.2.1 ", b"192.0.2.0 ") + b"x")
    assert read_to_end(late)[0] == b""
    stage.proxy.wait_for_log(
        "Hit connection limit of a source, refusing connection. Client: 192.0.2.0:5000."
    )
    local = [stage.connect() for _ in range(4)]
    for client in local:
        client.sendall(LOCAL + b"x")
        assert read_exactly(backend.accept(), 1) == b"x"


def test_clients_that_wait_count_for_the_limit(stage):
    launch(stage, LOOPBACK, "-c2")
    waiting = [stage.connect() for _ in range(2)]
    wait_until(lambda: stage.proxy.socket_count() >= stage.proxy.sockets_at_start + 2, "both")
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.wait_for_log("Hit connection limit, refusing connection.")
    waiting.clear()


def test_a_loop_is_proven_by_the_real_peer(stage):
    """A header that claims another address does not hide it."""
    listener = stage.listener()
    target = "{}:{}".format(*listener.getsockname())
    stage.launch(LOOPBACK, "--proxy-protocol=v1", target, listeners=[listener])
    stage.connect().sendall(V1)
    stage.proxy.wait_for_log("leads back to our own listener")


# ── the end ──────────────────────────────────────────────────────────────────────────────────────


def test_a_drain_waits_for_a_header(stage):
    backend = launch(stage, LOOPBACK, "--drain-timeout=60s")
    client = stage.connect()
    wait_until(lambda: stage.proxy.socket_count() > stage.proxy.sockets_at_start, "the client")
    stage.proxy.send_signal(signal.SIGTERM)
    stage.proxy.notify.wait_for("STOPPING=1")
    client.sendall(V1 + b"x")
    server = backend.accept()
    assert read_exactly(server, 1) == b"x"
    server.close()
    client.close()
    assert stage.proxy.wait() == 0


def test_clients_without_one_are_cut_at_the_end(stage):
    launch(stage, LOOPBACK)
    client = stage.connect()
    wait_until(lambda: stage.proxy.socket_count() > stage.proxy.sockets_at_start, "the client")
    stage.proxy.send_signal(signal.SIGTERM)
    assert stage.proxy.wait() == 0
    assert read_to_end(client) == (b"", "reset")
    assert "Stopped; 0 open and 1 waiting connections were cut." in stage.proxy.log()


def test_an_idle_exit_waits_for_a_header(stage):
    backend = launch(stage, LOOPBACK, "--exit-idle-time=100ms", wait=False)
    client = stage.connect()
    client.sendall(V1[:10])
    wait_until(lambda: stage.proxy.socket_count() > 1, "the client")
    client.sendall(V1[10:] + b"x")
    assert read_exactly(backend.accept(), 1) == b"x"


# ── the option ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("", "expected an address, a network such as 192.0.2.0/24, or unix, not ''"),
        ("x", "expected an address, a network such as 192.0.2.0/24, or unix, not 'x'"),
        ("10.0.0.0/33", "expected a prefix length from 0 to 32, not '33'"),
        ("10.0.0.1/8", "expected no bits beyond the prefix, as in 10.0.0.0/8, not '10.0.0.1/8'"),
    ],
)
def test_a_bad_network_is_one_line(stage, value, why):
    outcome = stage.run(FROM + value, stage.echo(), listeners=[stage.listener()])
    assert outcome.status == 1
    assert outcome.stderr == f"Failed to parse {FROM} argument: {value}: {why}\n"


def test_datagrams_have_none(datagrams):
    listener = datagrams.listener()
    stage = datagrams.stage
    outcome = stage.run(LOOPBACK, datagrams.echo().text, listeners=[listener])
    assert outcome.status == 1
    assert outcome.stderr.startswith(f"{FROM} is for streams only: ")
    assert len(outcome.stderr.splitlines()) == 1


# ── real senders and receivers ───────────────────────────────────────────────────────────────────

HAPROXY = """
global
  nbthread 1
  log stdout format raw local0
defaults
  mode tcp
  log global
  log-format "%ci:%cp"
  timeout connect {patience}s
  timeout client {patience}s
  timeout server {patience}s
listen front
  bind {listen} {accept}
  server behind {target} {send}
"""

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error;
events {{}}
http {{
  access_log off; log_format main "$remote_addr:$remote_port - $status";
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  set_real_ip_from 127.0.0.1; real_ip_header proxy_protocol;
  server {{
    access_log {folder}/log main; listen {listen} proxy_protocol;
    location / {{ return 200 "$remote_addr"; }}
  }}
}}
"""


NGINX_IN_FRONT = """
daemon off; master_process off; pid {folder}/pid-front; error_log {folder}/error-front;
load_module {module};
events {{}}
stream {{
  server {{ listen {listen}; proxy_pass {target}; proxy_protocol on; }}
}}
"""
STREAM_MODULE = "/usr/lib/nginx/modules/ngx_stream_module.so"


class Programs:
    """Programs in front of ours and behind it."""

    def __init__(self, stage):
        self.stage = stage
        self.running = []

    def start(self, name, text, *arguments, port):
        """Run one with this configuration; wait until it listens at `port`."""
        program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            pytest.skip(f"{name} is not installed")
        folder = self.stage.path(name)
        os.makedirs(folder, exist_ok=True)
        conf = f"{folder}/conf{len(self.running)}"
        with open(conf, "w") as file:
            values = {"folder": folder, "patience": int(patience()), "module": STREAM_MODULE}
            file.write(text.format(**values))
        command = [program, *arguments, conf]
        with open(f"{conf}.log", "w") as log:
            self.running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.DEVNULL))
        running = self.running[-1]
        wait_until(lambda: listens(port) or running.poll() is not None, f"{name} at {port}")
        assert running.poll() is None, f"{name} has ended with {running.poll()}"
        return f"{conf}.log"

    def close(self):
        for one in self.running:
            one.terminate()
            one.wait()


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def programs(stage):
    made = Programs(stage)
    yield made
    made.close()


def haproxy(programs, target, *, send="", accept=""):
    port = quiet_port()
    values = {"listen": f"127.0.0.1:{port}", "accept": accept, "target": target, "send": send}
    text = HAPROXY
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return port, programs.start("haproxy", text, "-db", "-f", port=port)


def nginx_in_front(programs, target):
    """nginx has one version of the header, the first."""
    if not os.path.exists(STREAM_MODULE):
        pytest.skip("nginx has no module for streams (Debian: libnginx-mod-stream)")
    port = quiet_port()
    text = NGINX_IN_FRONT.replace("{listen}", f"127.0.0.1:{port}").replace("{target}", target)
    programs.start("nginx", text, "-c", port=port)
    return port


def nginx(programs):
    port = quiet_port()
    text = NGINX.replace("{listen}", f"127.0.0.1:{port}")
    programs.start("nginx", text, "-c", port=port)
    return port, programs.stage.path("nginx/log")


@pytest.mark.parametrize("send", ["send-proxy", "send-proxy-v2", "send-proxy-v2 crc32c"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_haproxy_in_front_nginx_behind(stage, programs, send, version):
    """nginx sees the client's address through two hops."""
    if "crc32c" in send:
        send = "send-proxy-v2 proxy-v2-options crc32c"
    behind, log = nginx(programs)
    backend = f"127.0.0.1:{behind}"
    listener = stage.listener()
    stage.launch(LOOPBACK, f"--proxy-protocol={version}", backend, listeners=[listener])
    port, _ = haproxy(programs, "{}:{}".format(*listener.getsockname()), send=send)
    name = ask_nginx_through(port)
    wait_until(lambda: f"{name} - 200" in lines_of(log), "the line of nginx")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_nginx_in_front_nginx_behind(stage, programs, version):
    behind, log = nginx(programs)
    listener = stage.listener()
    target = f"127.0.0.1:{behind}"
    stage.launch(LOOPBACK, f"--proxy-protocol={version}", target, listeners=[listener])
    front = nginx_in_front(programs, "{}:{}".format(*listener.getsockname()))
    name = ask_nginx_through(front)
    wait_until(lambda: f"{name} - 200" in lines_of(log), "the line of nginx")


def ask_nginx_through(port):
    """Ask from another address, which is answered with it; its text with the port."""
    client = socket.create_connection(("127.0.0.1", port), patience(), ("127.0.0.7", 0))
    name = client.getsockname()
    with client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert read_to_end(client)[0].endswith(b"127.0.0.7")
    return "{}:{}".format(*name)


def lines_of(path):
    with open(path) as file:
        return file.read().splitlines()


@pytest.mark.parametrize("send", ["send-proxy", "send-proxy-v2"])
def test_two_of_ours_between_two_haproxies(stage, programs, send):
    """The one behind checks the header that went through both, and logs whom it tells of."""
    echo = stage.echo()
    behind, log = haproxy(programs, echo, accept="accept-proxy")
    inner, outer = stage.listener(), stage.listener()
    passes = f"--proxy-protocol=v{1 if send == 'send-proxy' else 2}"
    stage.launch(LOOPBACK, passes, f"127.0.0.1:{behind}", listeners=[inner])
    target = "{}:{}".format(*inner.getsockname())
    stage.launch(LOOPBACK, passes, target, listeners=[outer])
    front, _ = haproxy(programs, "{}:{}".format(*outer.getsockname()), send=send)
    with open_connection(("127.0.0.1", front), socket.AF_INET) as client:
        greet(client)
        name = "{}:{}".format(*client.getsockname())
    wait_until(lambda: name in lines_of(log), "the line of HAProxy")
    assert is_served(stage.connect_to(("127.0.0.1", front), socket.AF_INET))
