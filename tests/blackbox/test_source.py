"""--source=: where connections and datagrams to targets come from."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from kit.differences import differs
from kit.privileges import as_unprivileged_user, need_root
from kit.routed import CLIENT, FRONT, OTHER_CLIENT, SPARE, TARGET, Routed
from kit.sockets import read_to_end
from kit.traffic import talk
from kit.waiting import wait_until

pytestmark = differs("original", reason="has no --source=", run=False)

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "transparent"

families = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])


@pytest.fixture
def routed():
    """The networks of a client, of the proxy and of a target."""
    one = Routed()
    yield one
    one.close()


def launch(stage, routed, listeners, *arguments, **options):
    """Start the program in its network."""
    notify = stage.notify_socket(stage.path("notify"))  # abstract names end at the namespace
    options = {"prefix": routed.proxy.prefix, "notify": notify} | options
    return stage.launch(*arguments, listeners=listeners, **options)


def forward(stage, routed, family, *arguments, listen=None):
    """Launch the program in front of a backend, which is returned."""
    backend = routed.backend(family)
    listener = routed.listener(listen or family, None if listen is None else "::")
    launch(stage, routed, [listener], *arguments, backend.target)
    return backend


def connect(stage, routed, family, source=None):
    """A client of the program."""
    port = stage.proxy.listeners[0].getsockname()[1]
    return routed.connect((FRONT[family], port), family, source or CLIENT[family])


def logged(stage, part):
    """The first line on stderr with `part`, once it is there."""
    stage.proxy.wait_for_log(part)
    return stage.proxy.log_lines(part)[0]


def peer(server):
    """The address that a backend sees, and its port."""
    return server.getpeername()[:2]


# ── an address, an interface ─────────────────────────────────────────────────────────────────────


@families
@pytest.mark.parametrize("header", [[], ["--proxy-protocol=v1"]], ids=["relay", "policy"])
def test_connections_come_from_the_address(stage, routed, family, header):
    backend = forward(stage, routed, family, f"--source={SPARE[family]}", *header)
    client = connect(stage, routed, family)
    server = backend.accept()
    assert peer(server)[0] == SPARE[family]
    if header:
        assert server.recv(1000).startswith(b"PROXY TCP")
    talk(client, server)
    assert stage.proxy.log() == ""


@families
def test_the_one_of_two_whose_family_is_the_targets(stage, routed, family):
    both = [f"--source={SPARE[one]}" for one in (socket.AF_INET, socket.AF_INET6)]
    backend = forward(stage, routed, family, *both)
    client = connect(stage, routed, family)
    server = backend.accept()
    assert peer(server)[0] == SPARE[family]
    talk(client, server)


def test_held_clients_come_from_the_address(stage, routed):
    """So does the probe of a target that is down."""
    family = socket.AF_INET
    backend = routed.backend(family)
    port = backend.port()
    backend.close()
    source = f"--source={SPARE[family]}"
    launch(stage, routed, [routed.listener(family)], source, f"{TARGET[family]}:{port}")
    clients = [connect(stage, routed, family) for _ in range(3)]
    stage.proxy.wait_for_log("holding clients until it answers")
    backend = routed.backend(family, port)
    for client in clients:
        server = backend.accept()
        assert peer(server)[0] == SPARE[family]
        talk(client, server)


def test_a_port_of_its_own(stage, routed):
    family = socket.AF_INET
    backend = forward(stage, routed, family, f"--source={SPARE[family]}:4321")
    client = connect(stage, routed, family)
    server = backend.accept()
    assert peer(server) == (SPARE[family], 4321)
    talk(client, server)
    waiting = connect(stage, routed, family)  # one target has one connection from a port
    assert f"local port 4321 of {SPARE[family]} is in use" in logged(stage, "in use")
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(server) == (b"", "eof")
    client.close()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    server.close()
    other = backend.accept()
    assert peer(other) == (SPARE[family], 4321)
    talk(waiting, other)


@families
def test_an_interface(stage, routed, family):
    """Even if the routes lead elsewhere."""
    v = "-6" if family == socket.AF_INET6 else "-4"
    routed.proxy.run(f"ip {v} route add blackhole {TARGET[family]}")
    routed.proxy.run(f"ip {v} route add {TARGET[family]} dev back metric 9999")
    backend = forward(stage, routed, family, "--source=back")
    client = connect(stage, routed, family)
    server = backend.accept()
    talk(client, server)


@families
def test_datagrams_come_from_the_address(stage, routed, family):
    listener = routed.datagram_socket(routed.proxy, family, FRONT[family])
    server = routed.datagram_socket(routed.target, family, TARGET[family])
    host = f"[{TARGET[family]}]" if family == socket.AF_INET6 else TARGET[family]
    target = f"{host}:{server.getsockname()[1]}"
    launch(stage, routed, [listener], f"--source={SPARE[family]}", "--idle-timeout=4s", target)
    client = routed.datagram_socket(routed.client, family, CLIENT[family])
    client.sendto(b"question", listener.getsockname())
    data, flow = server.recvfrom(100)
    assert (data, flow[0]) == (b"question", SPARE[family])
    server.sendto(b"answer", flow)
    assert client.recv(100) == b"answer"


# ── the client's address ─────────────────────────────────────────────────────────────────────────


@families
@pytest.mark.parametrize("by_mark", [False, True], ids=["interface", "mark"])
@pytest.mark.parametrize("header", [[], ["--proxy-protocol=v2"]], ids=["relay", "policy"])
def test_the_target_sees_the_client(stage, routed, family, by_mark, header):
    if by_mark and shutil.which("nft") is None:
        pytest.skip("no nft, for the mark")
    routed.lead_back(by_mark=by_mark)
    backend = forward(stage, routed, family, "--source=client", *header)
    for source in (CLIENT[family], OTHER_CLIENT[family]):
        client = connect(stage, routed, family, source)
        server = backend.accept()
        assert peer(server)[0] == source
        if header:
            assert server.recv(1000).startswith(b"\r\n\r\n\0\r\nQUIT\n")
        talk(client, server)
    assert stage.proxy.log() == ""


def test_an_ipv4_mapped_client_is_an_ipv4_one(stage, routed):
    routed.lead_back()
    family = socket.AF_INET
    backend = forward(stage, routed, family, "--source=client", listen=socket.AF_INET6)
    client = connect(stage, routed, family)
    server = backend.accept()
    assert peer(server)[0] == CLIENT[family]
    talk(client, server)


def test_each_held_client_has_its_own_address(stage, routed):
    """Whichever of them is probed for, no client gets the connection of another address."""
    routed.lead_back()
    family = socket.AF_INET
    backend = routed.backend(family)
    port = backend.port()
    backend.close()
    target = f"{TARGET[family]}:{port}"
    launch(stage, routed, [routed.listener(family)], "--source=client", target)
    sources = [CLIENT[family], OTHER_CLIENT[family]] * 4
    clients = [(connect(stage, routed, family, source), source) for source in sources]
    stage.proxy.wait_for_log("holding clients until it answers")
    for number, (client, source) in enumerate(clients):
        client.sendall(f"{source} {number}\n".encode())
    backend = routed.backend(family, port)
    answered = set()
    for _ in clients:
        server = backend.accept()
        source, _, number = server.makefile("r").readline().partition(" ")
        assert peer(server)[0] == source
        answered.add(int(number))
        talk(clients[int(number)][0], server)
    assert answered == set(range(len(clients)))


def test_a_client_that_cannot_get_through_holds_up_no_other(stage, routed):
    """One whose answers are lost waits alone."""
    routed.lead_back()
    family = socket.AF_INET
    routed.target.run(f"ip route add blackhole {OTHER_CLIENT[family]}")
    backend = forward(stage, routed, family, "--source=client")
    lost = [connect(stage, routed, family, OTHER_CLIENT[family]) for _ in range(8)]
    for _ in range(3):
        client = connect(stage, routed, family)
        server = backend.accept()
        assert peer(server)[0] == CLIENT[family]
        talk(client, server)
    routed.target.run(f"ip route del blackhole {OTHER_CLIENT[family]}")
    for _ in lost:
        assert peer(backend.accept())[0] == OTHER_CLIENT[family]


def test_a_client_of_another_family_is_refused(stage, routed):
    """Nor does it get the proxy's address."""
    routed.lead_back()
    family = socket.AF_INET6
    backend = forward(stage, routed, family, "--source=client", listen=socket.AF_INET6)
    client = connect(stage, routed, socket.AF_INET)
    assert read_to_end(client)[0] == b""
    line = logged(stage, "Failed to connect")
    assert "the client has no address of its family, for --source=client" in line
    assert f"Client: {CLIENT[socket.AF_INET]}:" in line
    client = connect(stage, routed, family)
    server = backend.accept()
    assert peer(server)[0] == CLIENT[family]
    talk(client, server)


def test_the_client_of_a_header_counts(stage, routed):
    routed.lead_back()
    family = socket.AF_INET
    backend = forward(stage, routed, family, "--source=client", "--accept-proxy-protocol=0.0.0.0/0")
    client = connect(stage, routed, family)
    client.sendall(f"PROXY TCP4 {OTHER_CLIENT[family]} 203.0.113.1 5000 443\r\n".encode())
    server = backend.accept()
    assert peer(server)[0] == OTHER_CLIENT[family]
    talk(client, server)


def test_a_held_client_of_a_header_keeps_its_address_over_a_reload(stage, routed):
    routed.lead_back()
    family = socket.AF_INET
    backend = routed.backend(family)
    port = backend.port()
    backend.close()
    arguments = ["--source=client", "--accept-proxy-protocol=0.0.0.0/0", f"{TARGET[family]}:{port}"]
    launch(stage, routed, [routed.listener(family)], *arguments)
    client = connect(stage, routed, family)
    client.sendall(f"PROXY TCP4 {OTHER_CLIENT[family]} 203.0.113.1 5000 443\r\n".encode())
    stage.proxy.wait_for_log("holding clients until it answers")
    stage.proxy.send_signal(signal.SIGHUP)
    stage.proxy.wait_for_log("Going on with 0 open and 1 waiting")
    backend = routed.backend(family, port)
    server = backend.accept()
    assert peer(server)[0] == OTHER_CLIENT[family]
    talk(client, server)


@families
@pytest.mark.parametrize("by_mark", [False, True], ids=["interface", "mark"])
def test_datagrams_of_clients(stage, routed, family, by_mark):
    if by_mark and shutil.which("nft") is None:
        pytest.skip("no nft, for the mark")
    routed.lead_back(by_mark=by_mark)
    listener = routed.datagram_socket(routed.proxy, family, FRONT[family])
    server = routed.datagram_socket(routed.target, family, TARGET[family])
    host = f"[{TARGET[family]}]" if family == socket.AF_INET6 else TARGET[family]
    target = f"{host}:{server.getsockname()[1]}"
    launch(stage, routed, [listener], "--source=client", "--idle-timeout=4s", target)
    for source in (CLIENT[family], OTHER_CLIENT[family]) * 2:
        client = routed.datagram_socket(routed.client, family, source)
        for number in range(3):
            client.sendto(b"question %d" % number, listener.getsockname())
            data, flow = server.recvfrom(100)
            assert (data, flow[0]) == (b"question %d" % number, source)
            server.sendto(b"answer", flow)
            assert client.recv(100) == b"answer"
    assert stage.proxy.log() == ""


def test_datagrams_of_another_family_are_dropped(stage, routed):
    routed.lead_back()
    family = socket.AF_INET
    listener = routed.datagram_socket(routed.proxy, socket.AF_INET6, "::")
    server = routed.datagram_socket(routed.target, family, TARGET[family])
    target = f"{TARGET[family]}:{server.getsockname()[1]}"
    launch(stage, routed, [listener], "--source=client", "--idle-timeout=4s", target)
    port = listener.getsockname()[1]
    client = routed.datagram_socket(routed.client, socket.AF_INET6, CLIENT[socket.AF_INET6])
    client.sendto(b"lost", (FRONT[socket.AF_INET6], port))
    line = logged(stage, "Failed to open a socket for datagrams")
    assert "the client has no address of its family, for --source=client" in line
    client = routed.datagram_socket(routed.client, family, CLIENT[family])
    client.sendto(b"question", (FRONT[family], port))
    data, flow = server.recvfrom(100)
    assert (data, flow[0]) == (b"question", CLIENT[family])


def test_a_client_with_the_port_of_a_flow_is_no_loop(stage, routed):
    """The kernel knows nothing of the client's own ports when it chooses one for a flow."""
    routed.lead_back()
    family = socket.AF_INET
    listener = routed.datagram_socket(routed.proxy, family, FRONT[family])
    server = routed.datagram_socket(routed.target, family, TARGET[family])
    target = f"{TARGET[family]}:{server.getsockname()[1]}"
    launch(stage, routed, [listener], "--source=client", "--idle-timeout=4s", target)
    client = routed.datagram_socket(routed.client, family, CLIENT[family])
    client.sendto(b"one", listener.getsockname())
    _, flow = server.recvfrom(100)
    client = routed.datagram_socket(routed.client, family, *flow)
    client.sendto(b"two", listener.getsockname())
    data, other = server.recvfrom(100)
    assert data == b"two"
    assert other != flow
    server.sendto(b"answer", other)
    assert client.recv(100) == b"answer"


def test_datagrams_that_lead_back(stage, routed):
    """A loop is found, though its datagrams come from the address of the client."""
    family = socket.AF_INET
    listener = routed.datagram_socket(routed.proxy, family, FRONT[family])
    target = f"{FRONT[family]}:{listener.getsockname()[1]}"
    launch(stage, routed, [listener], "--source=client", "--idle-timeout=4s", target)
    client = routed.datagram_socket(routed.client, family, CLIENT[family])
    client.sendto(b"round", listener.getsockname())
    assert "leads back to our own listener" in logged(stage, "Refusing datagram")


def commands_of(unit, key):
    """The commands in a unit of the example."""
    lines = (EXAMPLE / unit).read_text().splitlines()
    return [line.removeprefix(f"{key}=").lstrip("-") for line in lines if line.startswith(key)]


def test_the_units_of_the_example(stage, routed):
    """Their commands, in the networks for which they are written, there and back."""
    if shutil.which("nft") is None:
        pytest.skip("no nft, for the example")
    family = socket.AF_INET
    for command in commands_of("web-proxy-routes.service", "ExecStart"):
        routed.proxy.run(command)
    (command,) = commands_of("web-proxy.service", "ExecStart")
    launch(stage, routed, [routed.listener(family, port=80)], *command.split()[1:])
    backend = routed.backend(family, 80)
    client = connect(stage, routed, family)
    server = backend.accept()
    assert peer(server)[0] == CLIENT[family]
    talk(client, server)
    client.close()
    server.close()
    at_start = stage.proxy.sockets_at_start
    wait_until(lambda: stage.proxy.socket_count() <= at_start, "the end of the connection")
    for command in commands_of("web-proxy-routes.service", "ExecStopPost"):
        routed.proxy.run(command)
    left = [*routed.proxy.prefix, "sh", "-c", "ip rule; ip -6 rule; nft list ruleset"]
    shown = subprocess.run(left, check=True, capture_output=True, text=True).stdout
    assert "fwmark" not in shown
    assert "divert" not in shown


def test_nginx_logs_the_client(stage, routed):
    nginx = shutil.which("nginx")
    if nginx is None:
        pytest.skip("no nginx")
    routed.lead_back()
    family = socket.AF_INET
    log, pid = stage.path("access.log"), stage.path("nginx.pid")
    config = stage.path("nginx.conf")
    with open(config, "w", encoding="ascii") as file:
        file.write(
            f"daemon off; pid {pid}; error_log stderr; user root; events {{}}\n"
            f"http {{ access_log {log}; server {{ listen {TARGET[family]}:80; return 204; }} }}\n"
        )
    server = subprocess.Popen([*routed.target.prefix, nginx, "-c", config])
    try:
        listener = routed.listener(family)
        launch(stage, routed, [listener], "--source=client", f"{TARGET[family]}:80")
        for source in (CLIENT[family], OTHER_CLIENT[family]):
            client = connect(stage, routed, family, source)
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert read_to_end(client)[0].startswith(b"HTTP/1.1 204")
        wait_until(lambda: _lines(log) >= 2, "two lines in nginx's log")
        with open(log, encoding="ascii") as file:
            seen = [line.split()[0] for line in file]
        assert seen == [CLIENT[family], OTHER_CLIENT[family]]
    finally:
        server.terminate()
        server.wait()


def _lines(path):
    with open(path, encoding="ascii") as file:
        return len(file.readlines())


# ── what is missing ──────────────────────────────────────────────────────────────────────────────


def test_without_the_capability_it_does_not_start(stage):
    outcome = stage.run(
        "--source=client",
        "127.0.0.1:80",
        listeners=[stage.listener()],
        prefix=as_unprivileged_user(stage.executable),
    )
    assert outcome.status == 1
    assert outcome.stderr == (
        "--source=client needs the capability CAP_NET_ADMIN or CAP_NET_RAW "
        "(AmbientCapabilities=): Operation not permitted\n"
    )


@pytest.mark.parametrize("capability", ["net_admin", "net_raw"])
def test_one_capability_is_enough(stage, routed, capability):
    need_root("to keep one capability of all")
    routed.lead_back()
    family = socket.AF_INET
    backend = routed.backend(family)
    as_user = as_unprivileged_user(stage.executable)
    held = [f"--inh-caps=-all,+{capability}", f"--ambient-caps=-all,+{capability}"]
    prefix = [*routed.proxy.prefix, *as_user, *held]
    notify = stage.notify_socket(stage.path("notify"))
    os.chmod(stage.path("notify"), 0o666)
    arguments = ["--source=client", backend.target]
    stage.launch(*arguments, listeners=[routed.listener(family)], prefix=prefix, notify=notify)
    client = connect(stage, routed, family)
    server = backend.accept()
    assert peer(server)[0] == CLIENT[family]
    talk(client, server)


def test_an_address_that_comes_later(stage, routed):
    """As a target that comes later: clients are held, and the log says why."""
    family = socket.AF_INET
    backend = forward(stage, routed, family, "--source=198.51.100.77")
    (line,) = stage.proxy.log_lines("There is no")
    assert line.endswith("There is no local address 198.51.100.77 yet (--source=).")
    client = connect(stage, routed, family)
    line = logged(stage, "holding clients")
    assert "there is no local address 198.51.100.77" in line
    routed.proxy.run("ip address add 198.51.100.77/24 dev back")
    server = backend.accept()
    assert peer(server)[0] == "198.51.100.77"
    talk(client, server)


def test_an_interface_that_comes_later(stage, routed):
    family = socket.AF_INET
    backend = forward(stage, routed, family, "--source=later")
    (line,) = stage.proxy.log_lines("There is no")
    assert line.endswith("There is no network interface later yet (--source=).")
    client = connect(stage, routed, family)
    assert "there is no network interface later" in logged(stage, "holding clients")
    routed.proxy.run("ip link set back down; ip link set back name later; ip link set later up")
    server = backend.accept()
    talk(client, server)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ([], "no local port is free, or there is no local address"),
        (["--source=198.51.100.7"], "no local port is free from 198.51.100.7"),
        (["--source=client"], "no local port is free from the client's address"),
    ],
    ids=["none", "address", "client"],
)
def test_ports_that_run_out(stage, routed, source, text):
    """An outage like any other: the client is held until a port is free."""
    routed.lead_back()
    family = socket.AF_INET
    backend = forward(stage, routed, family, *source)
    routed.proxy.run("echo 40000 40001 >/proc/sys/net/ipv4/ip_local_port_range")
    pairs = []
    for _ in range(2):
        client = connect(stage, routed, family)
        pairs.append((client, backend.accept()))
    waiting = connect(stage, routed, family)
    assert text in logged(stage, "holding clients")
    for one in pairs[0]:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        one.close()
    server = backend.accept()
    talk(waiting, server)


def test_two_targets_share_one_port(stage, routed):
    """A port is chosen for each connection, not for each socket."""
    family = socket.AF_INET
    backends = [routed.backend(family) for _ in range(2)]
    listeners = [routed.listener(family) for _ in range(2)]
    targets = [f"{name}={one.target}" for name, one in zip("ab", backends, strict=True)]
    source = f"--source={SPARE[family]}"
    launch(stage, routed, listeners, source, *targets, names="a:b")
    routed.proxy.run("echo 40000 40000 >/proc/sys/net/ipv4/ip_local_port_range")
    for listener, backend in zip(listeners, backends, strict=True):
        client = routed.connect((FRONT[family], listener.getsockname()[1]), family)
        server = backend.accept()
        assert peer(server) == (SPARE[family], 40000)
        talk(client, server)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--source=127.0.0.1", "/run/x"],
            "--source= is for TCP and UDP targets, and there is none: /run/x.",
        ),
        (
            ["--source=127.0.0.1", "[::1]:80"],
            "--source= has no IPv6 address, which target [::1]:80 needs.",
        ),
        (
            ["--source=fe80::1", "[::1]:80"],
            "--source=fe80::1 is a link-local address: give its interface in a second --source=.",
        ),
    ],
)
def test_what_could_never_work(stage, arguments, text):
    outcome = stage.run(*arguments, listeners=[stage.listener()])
    assert (outcome.status, outcome.stderr) == (1, text + "\n")


def test_unix_clients_have_no_address(stage):
    listener = stage.listener("unix")
    outcome = stage.run("--source=client", "127.0.0.1:80", listeners=[listener])
    assert outcome.status == 1
    assert outcome.stderr == (
        "--source=client is for clients with an IP address, "
        f"which those of 'unknown' ({listener.getsockname()}) have not.\n"
    )
