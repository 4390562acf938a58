"""One client's share of the limit: by address, by /64 of IPv6, by uid."""

import contextlib
import errno
import gc
import os
import socket
import subprocess

import pytest
from kit.child import in_child
from kit.datagram_rig import receive_all
from kit.namespaces import in_own_network
from kit.rig import FAMILIES
from kit.rights import kernel_refuses, send_slow
from kit.sockets import open_listener, reset
from kit.stepped import close, open_client

from proxyd._datagram import DROP_SOURCE, FlowEnded, FlowsRefused
from proxyd._relay import Accepted, Refused, Relay, RelayListener

OTHER_IPV4 = "127.0.0.2"


def limit(rig, places, connections_max=64, **more):
    """Limit each source of a rig."""
    rig.relay.connections_max = connections_max
    rig.relay.limit_sources(places, **more)


def client_from(rig, host):
    """A client with this address, which need not be accepted yet."""
    sock = rig.keep(socket.socket(FAMILIES[rig.client_family]))
    sock.setblocking(False)
    sock.bind((host, 0))
    sock.connect_ex(rig.listen_socket.getsockname())
    return sock


def is_refused(rig, sock):
    """Whether a client was closed without a byte."""
    return rig.read_to_end(sock)[0] == b""


def admit(rig, count=1):
    """Clients that are the policy's, until the rig is closed."""
    wanted = len(rig.of_kind(Accepted)) + count
    for _ in range(count):
        rig.keep(open_client(rig.listen_socket))
    rig.until(lambda: len(rig.of_kind(Accepted)) == wanted, "the clients")


def refusals(rig):
    return rig.of_kind(Refused)


# ── connections ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("automatic", [True, False])
def test_a_source_has_its_share(rigs, automatic):
    """Whether the relay or the policy connects its clients."""
    rig = rigs()
    limit(rig, 2)
    if automatic:
        rig.listener.auto_connect(rig.address)
        first = [rig.keep(open_client(rig.listen_socket)) for _ in range(2)]
        [rig.accept_at_backend() for _ in first]
    else:
        first = [rig.link().client for _ in range(2)]
    third = rig.keep(open_client(rig.listen_socket))
    assert is_refused(rig, third)
    event, *more = refusals(rig)
    assert (event.listener, event.by_source, more) == (0, True, [])
    assert event.peer[2:4] == third.getsockname()[1].to_bytes(2, "big")
    assert (rig.totals().refused, rig.relay.refused_by_source) == (1, 1)
    other = client_from(rig, OTHER_IPV4)
    if automatic:
        rig.accept_at_backend()
    else:
        rig.connect(rig.take_client())
        rig.accept_at_backend()
    other.send(b"served")
    reset(first.pop())
    rig.until(lambda: rig.relay.connections == 2, "a place")
    if automatic:
        rig.keep(open_client(rig.listen_socket))
        rig.accept_at_backend()
    else:
        rig.link()
    assert len(refusals(rig)) == 1


def test_the_limit_of_all_gives_the_place_of_the_source_back(rigs):
    rig = rigs()
    limit(rig, 5, connections_max=1)
    rig.listener.auto_connect(rig.address)
    first = rig.keep(open_client(rig.listen_socket))
    rig.accept_at_backend()
    for _ in range(8):
        assert is_refused(rig, rig.keep(open_client(rig.listen_socket)))
    assert not any(event.by_source for event in refusals(rig))
    reset(first)
    rig.until(lambda: not rig.relay.connections, "the end of the first")
    rig.keep(open_client(rig.listen_socket))
    rig.accept_at_backend()
    assert rig.relay.refused_by_source == 0


def test_clients_of_the_policy_count(rigs):
    """Held ones; and hanging up gives the place back."""
    rig = rigs()
    limit(rig, 1)
    _, held = rig.new_client()
    assert is_refused(rig, rig.keep(open_client(rig.listen_socket)))
    rig.relay.hang_up(held)
    _, held = rig.new_client()
    rig.relay.hang_up(held, True)
    _, held = rig.new_client()
    assert is_refused(rig, rig.keep(open_client(rig.listen_socket)))
    rig.relay.hang_up(held)


def test_a_failed_connect_keeps_the_place(rigs):
    """At once, and later: the client is the policy's, and still there."""
    rig = rigs()
    limit(rig, 1)
    rig.backend.close()  # so it is refused
    rig.sockets.remove(rig.backend)
    rig.listener.auto_connect(rig.address)
    rig.keep(open_client(rig.listen_socket))
    rig.until(rig.failures, "the failure")
    assert is_refused(rig, rig.keep(open_client(rig.listen_socket)))
    client = rig.failures()[0].client
    failed = rig.relay.connect(client, FAMILIES["tcp4"], b"\x01\x00/nowhere\x00")
    assert failed.error == errno.ENOENT
    assert is_refused(rig, rig.keep(open_client(rig.listen_socket)))
    rig.relay.hang_up(client)
    rig.events.remove(rig.failures()[0])
    rig.keep(open_client(rig.listen_socket))
    rig.until(rig.failures, "another one")


def test_an_adopted_connection_keeps_the_place(rigs):
    rig = rigs()
    limit(rig, 1)
    link = rig.adopted_link()
    assert is_refused(rig, rig.keep(open_client(rig.listen_socket)))
    close(link.client)
    close(link.target)
    rig.until_ended(link.id)
    rig.adopted_link()


def test_a_place_comes_back_from_another_thread(rigs):
    rig = rigs()
    limit(rig, 3)
    rig.relay.start_worker()
    for _ in range(20):
        links = [rig.link() for _ in range(3)]
        for link in links:
            close(link.client)
            close(link.target)
            rig.until_ended(link.id)
    assert rig.relay.refused_by_source == 0
    links = [rig.link() for _ in range(3)]
    assert is_refused(rig, rig.keep(open_client(rig.listen_socket)))


# ── what a source is ─────────────────────────────────────────────────────────────────────────────


def test_an_ipv6_source_is_a_64(rigs):
    def scenario():
        with open("/proc/sys/net/ipv6/conf/lo/disable_ipv6") as file:
            if file.read(1) != "0":
                pytest.skip("no IPv6 here")
        for host in (
            "2001:db8::1",
            "2001:db8::2",
            "2001:db8:0:1::1",
            "64:ff9b::c000:201",
            "64:ff9b::c000:202",
        ):
            add_address(host)
        rig = rigs("tcp6", "tcp6")
        limit(rig, 1)
        client_from(rig, "2001:db8::1")
        rig.until(lambda: len(rig.of_kind(Accepted)) == 1, "the first")
        assert is_refused(rig, client_from(rig, "2001:db8::2"))
        client_from(rig, "2001:db8:0:1::1")
        rig.until(lambda: len(rig.of_kind(Accepted)) == 2, "another network")
        # Translated IPv4 addresses count as such (RFC 6052).
        client_from(rig, "64:ff9b::c000:201")
        client_from(rig, "64:ff9b::c000:202")
        rig.until(lambda: len(rig.of_kind(Accepted)) == 4, "two IPv4 clients")
        assert is_refused(rig, client_from(rig, "64:ff9b::c000:202"))

    in_child(in_own_network(scenario))


def add_address(host):
    """Add an address to loopback."""
    command = ["ip", "addr", "add", f"{host}/128", "dev", "lo", "nodad"]
    subprocess.run(command, check=True)


def test_ipv4_over_an_ipv6_listener_is_the_same_source(rigs, tmp_path):
    """Its address is mapped; another listener of the relay has it as it is."""
    rig = rigs()
    limit(rig, 1)
    dual = rig.keep(socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True))
    dual.setblocking(False)
    listener = RelayListener(rig.relay, dual.fileno(), socket.AF_INET6, 0, 1)
    listener.start()
    admit(rig)
    late = rig.keep(socket.create_connection(("127.0.0.1", dual.getsockname()[1])))
    late.setblocking(False)
    assert is_refused(rig, late)
    assert refusals(rig)[0].listener == 1
    listener.stop()


def test_a_unix_source_is_a_user(rigs):
    rig = rigs("abstract", "tcp4")
    limit(rig, 2)
    admit(rig, 2)
    assert is_refused(rig, rig.keep(open_client(rig.listen_socket)))

    if os.getuid() == 0:
        with another_user(rig.listen_socket.getsockname()):
            rig.until(lambda: len(rig.of_kind(Accepted)) == 3, "the other user")


@contextlib.contextmanager
def another_user(address):
    """A connection from a process of another user."""
    leave, stay = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(stay)
            os.setuid(12345)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(address)
                os.read(leave, 1)
        finally:
            os._exit(0)
    os.close(leave)
    try:
        yield
    finally:
        os.close(stay)
        os.waitpid(child, 0)


def test_the_overflow_uid_is_no_source(rigs):
    rig = rigs("unix", "tcp4")
    limit(rig, 1, nobody=os.getuid())
    admit(rig, 5)
    assert not refusals(rig)


def test_sources_are_forgotten(rigs):
    """There may be many, and memory for those that have places only."""
    rig = rigs()
    limit(rig, 1)
    for number in range(2000):
        sock = client_from(rig, f"127.1.{number >> 8}.{number & 255}")
        rig.relay.hang_up(rig.take_client())
        rig.sockets.remove(sock)
        sock.close()
    assert not refusals(rig)


def test_limiting_twice_or_late_is_no_matter_for_its_memory():
    relay = Relay()
    relay.limit_sources(1 << 30)
    del relay
    gc.collect()


def test_a_socket_in_quarantine_keeps_its_place(rigs):
    """A client whose queue has descriptors is closed by the quarantine, whenever it can."""
    rig = rigs("unix", "tcp4", may_refuse=False) if kernel_refuses() else rigs("unix", "tcp4")
    limit(rig, 2)
    client, fd = rig.new_client()
    slow = send_slow(client, b"x")
    try:
        rig.relay.hang_up(fd)
        rig.until(lambda: rig.relay.in_quarantine == 1, "the quarantine")
        admit(rig)
        assert is_refused(rig, rig.keep(open_client(rig.listen_socket)))
    finally:
        slow.release()
    rig.until(lambda: rig.relay.in_quarantine == 0, "the close")
    admit(rig)


# ── flows of datagrams ───────────────────────────────────────────────────────────────────────────


def flows_of(rig, *hosts):
    """One flow from each address; the clients."""
    clients = []
    for host in hosts:
        clients.append(rig.client(source=host))
        clients[-1].send(b"?")
        rig.received()
    return clients


def test_a_flow_over_the_share_takes_the_place_of_its_own_source(datagram_rigs):
    rig = datagram_rigs()
    rig.datagrams.report_flows = True
    rig.relay.connections_max = 64
    rig.datagrams.limit_sources(2)
    flows_of(rig, OTHER_IPV4, "127.0.0.1", "127.0.0.1")
    ids = [row.flow for row in rig.datagrams.rows()]
    flows_of(rig, "127.0.0.1")
    ended = [(one.info.flow, one.ending) for one in rig.of_kind(FlowEnded)]
    rig.until(lambda: rig.of_kind(FlowEnded), "the end of the oldest one of its source")
    ended = [(one.info.flow, one.ending) for one in rig.of_kind(FlowEnded)]
    assert ended == [(ids[1], "evicted")]
    assert rig.datagrams.flows == 3


def test_a_source_whose_flows_talk_gets_no_more(datagram_rigs):
    rig = datagram_rigs()
    rig.relay.connections_max = 64
    rig.datagrams.limit_sources(1)
    client = rig.client(source="127.0.0.1")
    own = [rig.ask(client) for _ in range(3)][-1]
    late = rig.client(source="127.0.0.1")
    late.send(b"no place")
    event = rig.wait_for(FlowsRefused)
    assert (event.listener, event.count, event.by_source) == (0, 1, True)
    assert rig.dropped() == {DROP_SOURCE: 1}
    flows_of(rig, OTHER_IPV4)
    assert rig.ask(client) == own
    assert rig.datagrams.flows == 2


def test_flows_and_connections_have_shares_of_their_own(datagram_rigs, tmp_path):
    """Otherwise forged datagrams would use up the connections of a client."""
    rig = datagram_rigs()
    rig.relay.connections_max = 64
    rig.relay.limit_sources(1)
    rig.datagrams.limit_sources(1)
    flows_of(rig, "127.0.0.1")
    with open_listener("tcp4", tmp_path) as tcp:
        tcp.setblocking(False)
        listener = RelayListener(rig.relay, tcp.fileno(), FAMILIES["tcp4"], 0, 0)
        listener.start()
        with socket.create_connection(tcp.getsockname()):
            rig.wait_for(Accepted)
        listener.stop()
    assert rig.datagrams.flows == 1


def test_the_place_of_an_expired_flow_is_free(datagram_rigs):
    rig = datagram_rigs(fresh_ms=50, established_ms=50)
    rig.relay.connections_max = 64
    rig.datagrams.limit_sources(1)
    for _ in range(5):
        client = rig.client(source="127.0.0.1")
        rig.ask(client)
        rig.ask(client)
        rig.until(lambda: rig.datagrams.flows == 0, "the end of the flow")
    assert rig.dropped() == {}


def test_senders_of_unix_datagrams_are_not_limited(datagram_rigs):
    rig = datagram_rigs("unix", "unix")
    rig.relay.connections_max = 64
    rig.datagrams.limit_sources(1)
    for _ in range(3):
        rig.ask(rig.client())
    assert rig.datagrams.flows == 3


def test_many_sources_of_datagrams(datagram_rigs):
    """They come and go in any order; the lists of each stay right."""
    rig = datagram_rigs(fresh_ms=30, established_ms=30)
    rig.relay.connections_max = 40
    rig.datagrams.limit_sources(3)
    for number in range(400):
        client = rig.client(source=f"127.1.0.{number % 7 + 1}")
        client.send(b"?")
        if number % 3 == 0:
            rig.received()
        client.close()
        rig.sockets.remove(client)
    rig.until(lambda: rig.datagrams.flows == 0, "the end of all")
    receive_all(rig.server)
