"""A WireGuard tunnel through the program: the kernel's, or else that of wireguard-go."""

import os
import socket
import subprocess

import pytest
from kit.namespaces import Namespace
from kit.waiting import patience, wait_until

LISTEN = 51820


@pytest.fixture
def networks():
    """The networks of a server and a client, linked by a cable."""
    server, client = Namespace(), Namespace()
    server.run(
        "ip link set lo up; ip link add cable type veth peer name cable netns " + client.path
    )
    server.run("ip addr add 192.0.2.1/24 dev cable; ip link set cable up")
    client.run("ip link set lo up; ip addr add 192.0.2.2/24 dev cable; ip link set cable up")
    yield server, client
    server.close()
    client.close()


def add_interface(programs, running, network, name):
    """An interface of the kernel, or else one of wireguard-go; returns which it is."""
    try:
        network.run(f"ip link add {name} type wireguard")
    except subprocess.CalledProcessError:
        go = programs.command("wireguard-go", "--foreground", name, network=network.prefix)
        process = running.start(go, env=os.environ | {"LOG_LEVEL": "error"})
        shown = [*network.prefix, "ip", "link", "show", name]
        wait_until(
            lambda: (
                subprocess.run(shown, capture_output=True, check=False).returncode == 0
                or process.poll() is not None
            ),
            f"the interface {name}; wireguard-go: {running.output(process)}",
        )
        if process.poll() is not None:
            pytest.skip(f"no WireGuard here: {running.output(process).strip()}")
        return "wireguard-go"
    return "the kernel"


def keys(programs, run):
    wg = programs.command("wg")
    private = run([*wg, "genkey"]).strip()
    done = subprocess.run(
        [*wg, "pubkey"], input=private, capture_output=True, text=True, check=True
    )
    return private, done.stdout.strip()


def test_a_tunnel(stage, datagrams, programs, running, run, networks):
    server, client = networks
    names = f"wgs{os.getpid() % 10000}", f"wgc{os.getpid() % 10000}"
    (server_key, server_public), (client_key, client_public) = (
        keys(programs, run),
        keys(programs, run),
    )
    for network, name in zip(networks, names, strict=True):
        add_interface(programs, running, network, name)
    files = {}
    for name, key in zip(names, (server_key, client_key), strict=True):
        files[name] = stage.path(name)
        with open(files[name], "w", encoding="ascii") as file:
            file.write(key)

    def wg(network, *words):
        run(programs.command("wg", "set", *words, network=network.prefix))

    wg(server, names[0], "private-key", files[names[0]], "listen-port", str(LISTEN),
       "peer", client_public, "allowed-ips", "10.9.0.2/32")  # fmt: skip
    datagrams.launch(
        f"--listen=udp:192.0.2.1:{LISTEN + 1}",
        f"127.0.0.1:{LISTEN}",
        prefix=server.prefix,
        notify=stage.notify_socket(stage.path("notify")),  # abstract names are a network's own
    )
    wg(client, names[1], "private-key", files[names[1]],
       "peer", server_public, "endpoint", f"192.0.2.1:{LISTEN + 1}",
       "allowed-ips", "10.9.0.1/32")  # fmt: skip
    server.run(f"ip addr add 10.9.0.1/24 dev {names[0]}; ip link set {names[0]} up")
    client.run(f"ip addr add 10.9.0.2/24 dev {names[1]}; ip link set {names[1]} up")
    echo = server.enter(lambda: bound("10.9.0.1"))
    peer = client.enter(lambda: bound("10.9.0.2"))
    with echo, peer:
        for number in range(20):
            peer.sendto(b"%d" % number + bytes(1300), ("10.9.0.1", echo.getsockname()[1]))
            data, address = echo.recvfrom(2000)
            echo.sendto(data, address)
            assert peer.recv(2000) == b"%d" % number + bytes(1300)


def bound(host):
    """A UDP socket with this address of the tunnel."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, 0))
    sock.settimeout(2 * patience())
    return sock
