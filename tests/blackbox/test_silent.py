"""Silent hosts and temporary errors, in network namespaces (needs root)."""

import socket
import subprocess

import pytest
from kit.differences import differs
from kit.namespaces import in_network_namespace_of, namespace_prefix
from kit.socket_state import is_quiet
from kit.sockets import read_exactly, read_to_end
from kit.waiting import never_within, patience, wait_until

pytestmark = differs("original", reason="gives up at the first refusal", run=False)

HOST = "10.99.0.2"
HOST6 = "fd99::2"

NETWORK = f"""
ip link set lo up &&
ip link add v0 type veth peer name v1 && ip link set v0 up && ip link set v1 up &&
ip addr add 10.99.0.1/24 dev v0 && ip addr add fd99::1/64 dev v0 nodad &&
ip neigh add {HOST} lladdr 02:00:00:00:00:77 dev v0 nud permanent &&
ip neigh add {HOST6} lladdr 02:00:00:00:00:77 dev v0 nud permanent &&
{{ [ ! -e /proc/sys/net/ipv4/tcp_syn_linear_timeouts ] ||
  echo 0 >/proc/sys/net/ipv4/tcp_syn_linear_timeouts; }}
""".strip()
"""HOST never answers: its MAC address does not exist. SYNs are sent at 0, 1, 3, 7 and 15 s."""


def start(stage, *arguments, setup=NETWORK):
    """Start the program in a network namespace of its own, with a listener from outside."""
    prefix = namespace_prefix(setup)
    notify = stage.notify_socket(stage.path("notify"))  # abstract names end at the namespace
    listener = stage.listener()
    stage.launch(*arguments, listeners=[listener], prefix=prefix, notify=notify)


def in_namespace(stage, *command):
    """Run a command in the network namespace of the program."""
    enter = ["nsenter", f"--target={stage.proxy.pid}", "--net"]
    subprocess.run([*enter, *command], check=True)


def serve_within(stage, host, port):
    """A listener in the program's network namespace, which clients reach once `host` exists."""

    def listen():
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family)
        # The address may not be ours yet.
        listener.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND
        listener.bind((host, port))
        listener.listen()
        listener.settimeout(15)
        return listener

    return in_network_namespace_of(stage.proxy.pid, listen)


def accept_used(listener):
    """Accept the next connection that is not reset; (socket, the peer's address).

    A new attempt and the kernel's next SYN of an older one may succeed at the same moment. The one
    that no client needs is reset, without a byte, and the target may have accepted it first.
    """
    while True:
        server, address = listener.accept()
        server.settimeout(patience())
        try:
            server.recv(1, socket.MSG_PEEK)
        except ConnectionResetError:
            server.close()
            continue
        except TimeoutError:
            pass  # the caller is going to miss the bytes
        return server, address


def add_address(stage, host=HOST):
    """Let the host exist from now on."""
    in_namespace(stage, "ip", "addr", "add", f"{host}/{128 if ':' in host else 32}", "dev", "lo")


def test_a_host_that_wakes_up_is_found_before_the_kernel_finds_it(stage):
    """A plain connect(2) that has begun at the same time is still waiting by then."""
    start(stage, "--connect-timeout=1min", f"{HOST}:4000")
    client = stage.connect()
    client.sendall(b"x")

    def connect():
        alone = socket.socket()
        alone.setblocking(False)
        alone.connect_ex((HOST, 4000))
        return alone

    alone = in_network_namespace_of(stage.proxy.pid, connect)
    never_within(3.3, lambda: not is_quiet(client), "an answer")
    with alone, serve_within(stage, HOST, 4000) as listener:
        add_address(stage)
        server, address = accept_used(listener)
        assert address != alone.getsockname(), "the kernel's SYN of 7 s was faster"
        with server:
            assert read_exactly(server, 1) == b"x"
    stage.proxy.wait_for_log("Connection timed out (10.99.0.2:4000), holding clients until it")


def test_all_held_clients_are_served_then_without_an_empty_probe(stage):
    start(stage, "--connect-timeout=1min", f"{HOST}:4000")
    clients = [stage.connect() for _ in range(12)]
    for number, client in enumerate(clients):
        client.sendall(b"%02d" % number)
    never_within(2.5, lambda: not all(map(is_quiet, clients)), "an answer")
    with serve_within(stage, HOST, 4000) as listener:
        add_address(stage)
        heard = []
        for _ in clients:
            server, _ = accept_used(listener)
            with server:
                heard.append(read_exactly(server, 2))
        assert sorted(heard) == [b"%02d" % number for number in range(12)]


def test_silent_targets_leave_the_fds_to_others(stage):
    """Even if LimitNOFILE= is small and many clients wait for a silent host."""
    silent, healthy = stage.listener(), stage.listener()
    prefix = ["prlimit", "--nofile=64", *namespace_prefix(NETWORK)]
    notify = stage.notify_socket(stage.path("notify"))
    stage.launch(
        f"silent={HOST}:4000",
        "healthy=127.0.0.1:4001",
        listeners=[silent, healthy],
        names="silent:healthy",
        prefix=prefix,
        notify=notify,
    )
    with serve_within(stage, "127.0.0.1", 4001) as listener:
        waiting = [stage.connect(silent) for _ in range(15)]
        never_within(2.2, lambda: not all(map(is_quiet, waiting)), "an end")
        connects = sum("SYN_SENT" in line for line in _sockets_within(stage))
        assert 1 <= connects <= 4 + 3
        client = stage.connect(healthy)
        client.sendall(b"x")
        with listener.accept()[0] as server:
            assert read_exactly(server, 1) == b"x"


def _sockets_within(stage):
    """The lines of /proc/net/tcp in the program's network namespace, with SYN_SENT by name."""
    with open(f"/proc/{stage.proxy.pid}/net/tcp") as table:
        return [line.replace(" 02 ", " SYN_SENT ") for line in table.read().splitlines()[1:]]


ROUTES = [
    ("blackhole", "Invalid argument"),
    ("prohibit", "Permission denied"),
    ("unreachable", "No route to host"),
    ("throw", "Network is unreachable"),
]


@pytest.mark.parametrize("host", ["10.98.0.2", "fd98::2"])
@pytest.mark.parametrize(("kind", "word"), ROUTES)
def test_a_route_that_comes_later(stage, kind, word, host):
    """A route that forbids a connection may be replaced."""
    network = host.rpartition("2")[0]
    network += "/64" if ":" in host else "0/24"
    target = f"[{host}]:4000" if ":" in host else f"{host}:4000"
    setup = f"ip link set lo up && ip route add {kind} {network}"
    start(stage, "--connect-timeout=1min", target, setup=setup)
    client = stage.connect()
    client.sendall(b"x")
    stage.proxy.wait_for_log(f"Failed to connect to remote host: {word} ({target}), holding")
    with serve_within(stage, host, 4000) as listener:
        in_namespace(stage, "ip", "route", "del", kind, network)
        add_address(stage, host)
        with listener.accept()[0] as server:
            assert read_exactly(server, 1) == b"x"


REJECTIONS = [
    ("icmp type admin-prohibited", "No route to host"),
    ("icmp type host-prohibited", "No route to host"),
    ("icmp type net-prohibited", "Network is unreachable"),
    ("icmp type prot-unreachable", "Protocol not available"),
    ("icmp type port-unreachable", "Connection refused"),
    ("tcp reset", "Connection refused"),
]


@pytest.mark.parametrize(("answer", "word"), REJECTIONS)
def test_a_firewall_that_opens_later(stage, answer, word):
    rule = f"tcp dport 4000 reject with {answer}"
    setup = (
        "ip link set lo up && nft add table inet t && "
        "nft 'add chain inet t in { type filter hook input priority 0; }' && "
        f"nft 'add rule inet t in {rule}'"
    )
    start(stage, "--connect-timeout=1min", "127.0.0.1:4000", setup=setup)
    client = stage.connect()
    client.sendall(b"x")
    stage.proxy.wait_for_log(f"Failed to connect to remote host: {word} (127.0.0.1:4000), holding")
    with serve_within(stage, "127.0.0.1", 4000) as listener:
        in_namespace(stage, "nft", "flush", "ruleset")
        with listener.accept()[0] as server:
            assert read_exactly(server, 1) == b"x"


def test_a_firewall_that_drops_and_opens_later(stage):
    setup = (
        f"{NETWORK} && nft add table inet t && "
        "nft 'add chain inet t out { type filter hook output priority 0; }' && "
        "nft 'add rule inet t out tcp dport 4000 drop'"
    )
    start(stage, "--connect-timeout=1min", "127.0.0.1:4000", setup=setup)
    client = stage.connect()
    client.sendall(b"x")
    stage.proxy.wait_for_log("Connection timed out (127.0.0.1:4000), holding clients")
    with serve_within(stage, "127.0.0.1", 4000) as listener:
        in_namespace(stage, "nft", "flush", "ruleset")
        with accept_used(listener)[0] as server:
            assert read_exactly(server, 1) == b"x"


def test_link_local_without_a_scope_is_a_permanent_error(stage):
    stage.launch("--connect-timeout=1h", "[fe80::1]:4000", listeners=[stage.listener()])
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.wait_for_log("Failed to connect to remote host: Invalid argument ([fe80::1]:4000).")


def test_a_vsock_machine_that_is_not_running(stage):
    """ENODEV or a similar error: the client waits."""
    try:
        with socket.socket(socket.AF_VSOCK) as probe:
            probe.settimeout(3)
            probe.connect((3, 4000))
    except OSError as error:
        if error.errno is None or error.errno == 97:
            pytest.skip(f"no vsock here: {error}")
    stage.launch("--connect-timeout=1h", "vsock:3:4000", listeners=[stage.listener()])
    client = stage.connect()
    stage.proxy.wait_for_log("vsock:3:4000), holding clients until it answers.")
    wait_until(lambda: is_quiet(client), "a client that waits")
