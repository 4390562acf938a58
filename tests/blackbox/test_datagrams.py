"""Datagrams: what is forwarded, to whom, and from which address."""

import contextlib
import errno
import os
import signal
import socket
import struct

import pytest
from kit.datagrams import (
    DATAGRAM_MAX,
    UDP_GRO,
    UDP_SEGMENT,
    every_pair,
    greet,
)
from kit.differences import differs
from kit.sockets import read_to_end
from kit.traffic import greet as greet_stream
from kit.waiting import never_within, patience, wait_until

pytestmark = differs("original", reason="forwards no datagrams", run=False)


SO_PASSRIGHTS = 83  # asm-generic/socket.h; Linux 6.16


# ── there and back ────────────────────────────────────────────────────────────────────────────────


@every_pair
def test_there_and_back(datagrams, listen, target):
    """A datagram of each family reaches a target of each family, and so does the answer."""
    listener, server = datagrams.forward(listen, target)
    client = datagrams.client(listener)
    client.send(b"question")
    data, flow = server.receive()
    assert data == b"question"
    server.answer(b"answer", flow)
    assert client.recv(100) == b"answer"


def test_without_a_service_manager(datagrams):
    """--listen=udp: and --listen=unix-dgram: open the sockets, and the log tells where."""
    echo = datagrams.echo()
    path = datagrams.stage.path("log")
    proxy = datagrams.launch("--listen=udp:127.0.0.1:0", f"--listen=unix-dgram:{path}", echo.text)
    (udp, local) = proxy.log_lines("Listening on ")
    assert local == f"Listening on unix-dgram:{path}."
    host, _, port = udp.removeprefix("Listening on udp:").removesuffix(".").rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((host, int(port)))
        client.settimeout(patience())
        greet(client)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.bind("")
        client.connect(path)
        client.settimeout(patience())
        greet(client)
    assert proxy.end()
    assert not os.path.exists(path)


def test_each_client_has_a_flow_of_its_own(datagrams):
    """The target sees one address per client, which stays the same."""
    listener, server = datagrams.forward()
    clients = [datagrams.client(listener) for _ in range(20)]
    flows = {}
    for turn in range(3):
        for number, client in enumerate(clients):
            client.send(b"%d %d" % (turn, number))
            data, flow = server.receive()
            assert data == b"%d %d" % (turn, number)
            assert flows.setdefault(number, flow) == flow
    assert len(set(flows.values())) == len(clients)
    for number, flow in flows.items():
        server.answer(b"for %d" % number, flow)
    for number, client in enumerate(clients):
        assert client.recv(100) == b"for %d" % number


def test_what_waits_before_the_start_is_delivered_in_order(datagrams):
    """The datagrams that have started the program are in the queue of the listener."""
    server, listener = datagrams.target(), datagrams.listener()
    client = datagrams.client(listener)
    for number in range(100):
        client.send(b"%d" % number)
    datagrams.launch(server.text, listeners=[listener])
    flow = server.expect(*[b"%d" % number for number in range(100)])
    server.answer(b"all", flow)
    assert client.recv(100) == b"all"


def test_streams_and_datagrams_through_one_program(datagrams):
    """One port of both kinds, and one target of both kinds."""
    stage = datagrams.stage
    stream, backend = stage.listener(), stage.echo()
    port = int(backend.rpartition(":")[2])
    try:
        datagrams.echo(port=port)
        listener = datagrams.listener(port=stream.getsockname()[1])
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        pytest.skip("the port is taken by another UDP socket")
    datagrams.launch(backend, listeners=[stream, listener])
    greet_stream(stage.connect(stream))
    greet(datagrams.client(listener))
    greet_stream(stage.connect(stream))


def test_a_target_for_each_listener_by_its_name(datagrams):
    """NAME=TARGET serves datagrams too, with and without a word for the kind."""
    one, other = datagrams.target(), datagrams.target("unix")
    listeners = [datagrams.listener(), datagrams.listener("udp6")]
    datagrams.launch(
        f"a=udp:{one.text}", f"b=unix-dgram:{other.text}", listeners=listeners, names="a:b"
    )
    datagrams.client(listeners[0]).send(b"to one")
    datagrams.client(listeners[1]).send(b"to the other")
    one.expect(b"to one")
    other.expect(b"to the other")


def test_the_port_that_the_client_sent_to(datagrams):
    """HOST:* is the port of the listener."""
    listener = datagrams.listener(host="127.0.0.2")
    server = datagrams.target(port=listener.getsockname()[1])
    datagrams.launch("127.0.0.1:*", listeners=[listener])
    datagrams.client(listener).send(b"hello")
    server.expect(b"hello")


# ── addresses ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("hosts", [("0.0.0.0", "udp4"), ("::", "udp6")])
def test_replies_come_from_the_address_that_was_sent_to(datagrams, hosts):
    """Clients of a wildcard listener are connected, so they take no answer from elsewhere."""
    host, family = hosts
    listener = datagrams.listener(family, host=host)
    datagrams.launch(datagrams.echo().text, listeners=[listener])
    reached = ["127.0.0.1", "127.0.0.2", "127.1.2.3"] + (["::1"] if host == "::" else [])
    clients = [datagrams.client(listener, host=one) for one in reached]
    for _ in range(3):
        for client in clients:
            greet(client)


def test_one_client_and_two_addresses_of_the_listener_are_two_flows(datagrams):
    """A client that sends to two addresses is answered from each of them."""
    listener = datagrams.listener(host="0.0.0.0")
    server = datagrams.target()
    datagrams.launch(server.text, listeners=[listener])
    port = listener.getsockname()[1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind(("127.0.0.1", 0))
        client.settimeout(patience())
        flows = []
        for host in ("127.0.0.2", "127.0.0.3"):
            client.sendto(host.encode(), (host, port))
            flows.append(server.receive())
        for host, flow in reversed(flows):
            server.answer(b"to " + host, flow)
        for host, _ in reversed(flows):
            assert client.recvfrom(100) == (b"to " + host, (host.decode(), port))


def test_a_stranger_is_not_passed_on(datagrams):
    """Only the target may send to the socket of a flow."""
    listener, server = datagrams.forward()
    client = datagrams.client(listener)
    client.send(b"question")
    _, flow = server.receive()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"forged", flow)
    server.answer(b"answer", flow)
    assert client.recv(100) == b"answer"


def test_a_unix_sender_without_a_name_is_heard(datagrams):
    """It cannot be answered; the answer is counted as dropped."""
    listener, server = datagrams.forward("unix", "unix")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.sendto(b"line", listener.getsockname())
    flow = server.expect(b"line")
    assert flow
    server.answer(b"answer", flow)
    datagrams.stage.proxy.send_signal(signal.SIGUSR1)
    datagrams.stage.proxy.wait_for_log("1 no return address")


# ── what is in a datagram ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 1, 1200, 1473, 9000, DATAGRAM_MAX])
@pytest.mark.parametrize("families", [("udp4", "udp4"), ("udp4", "unix"), ("unix", "unix")])
def test_datagrams_of_every_size_arrive_whole(datagrams, families, size):
    """None is cut, joined or left out, the empty one included."""
    listener, server = datagrams.forward(*families)
    client = datagrams.client(listener)
    data = os.urandom(size)
    for _ in range(3):
        client.send(data)
        received, flow = server.receive()
        assert received == data
        server.answer(data, flow)
        assert client.recv(1 << 18) == data


def test_a_large_unix_datagram(datagrams):
    """UNIX datagrams may be larger than those over IP."""
    listener, server = datagrams.forward("unix", "unix")
    client = datagrams.client(listener)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    data = os.urandom(150_000)
    client.send(data)
    server.expect(data)


def test_what_is_too_large_for_the_target_is_dropped_and_counted(datagrams):
    """A UNIX datagram of 100 kB cannot be sent over UDP; the next one can."""
    listener, server = datagrams.forward("unix", "udp4")
    client = datagrams.client(listener)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    client.send(bytes(100_000))
    client.send(b"small")
    server.expect(b"small")
    datagrams.stage.proxy.send_signal(signal.SIGUSR1)
    datagrams.stage.proxy.wait_for_log("1 too large")


def segments(sock, data, size):
    """Send `data` in datagrams of `size` bytes by one call (UDP_SEGMENT)."""
    option = (socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("H", size))
    sock.sendmsg([data], [option])


@pytest.mark.parametrize("size", [64, 1200])
def test_segments_of_one_call_stay_datagrams(datagrams, size):
    """What is sent by segmentation offload is not joined, in either direction."""
    listener, server = datagrams.forward()
    client = datagrams.client(listener)
    data = os.urandom(size * 20 + 7)
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    for _ in range(5):
        segments(client, data, size)
        flow = server.expect(*pieces)
    server.sock.connect(flow)
    for _ in range(5):
        segments(server.sock, data, size)
        assert [client.recv(1 << 16) for _ in pieces] == pieces


def test_many_datagrams_arrive_in_order_and_once(datagrams):
    """A client that waits for each hundredth answer gets 20 000 of them."""
    listener = datagrams.listener()
    datagrams.launch(datagrams.echo().text, listeners=[listener])
    client = datagrams.client(listener)
    for number in range(0, 20_000, 100):
        for one in range(number, number + 100):
            client.send(b"%d" % one)
        for one in range(number, number + 100):
            assert client.recv(100) == b"%d" % one


def test_options_do_not_outlive_the_program(datagrams):
    """With UDP_GRO left on, whoever reads the listener next would get datagrams joined."""
    listener, server = datagrams.forward()
    client = datagrams.client(listener)
    client.send(b"1")
    server.expect(b"1")
    assert datagrams.stage.proxy.end()
    assert listener.getsockopt(socket.IPPROTO_UDP, UDP_GRO) == 0
    segments(client, b"abcd", 2)
    assert [listener.recv(100) for _ in range(2)] == [b"ab", b"cd"]


def test_descriptors_are_refused(datagrams):
    """They would have to be closed, which may block. Before Linux 6.16 the kernel cannot."""
    listener, _ = datagrams.forward("unix", "unix")
    client = datagrams.client(listener)
    try:
        listener.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS)
    except OSError:
        pytest.skip("the kernel cannot refuse descriptors")
    with pytest.raises(PermissionError):
        socket.send_fds(client, [b"x"], [0])


# ── PROXY protocol ────────────────────────────────────────────────────────────────────────────────

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def header(family, client, own):
    """A PROXY header, version 2, for a datagram from `client` to `own`."""
    kind, pack = {socket.AF_INET: (0x12, "!HH"), socket.AF_INET6: (0x22, "!HH")}[family]
    hosts = socket.inet_pton(family, client[0]) + socket.inet_pton(family, own[0])
    body = hosts + struct.pack(pack, client[1], own[1])
    return SIGNATURE + struct.pack("!BBH", 0x21, kind, len(body)) + body


@pytest.mark.parametrize("family", ["udp4", "udp6"])
def test_a_proxy_header_before_every_datagram(datagrams, family):
    """dnsdist and BIND read it so."""
    listener, server = datagrams.forward(family, "udp4", "--proxy-protocol=v2")
    client = datagrams.client(listener)
    expected = header(listener.family, client.getsockname(), listener.getsockname())
    for number in range(3):
        client.send(b"%d" % number)
        data, flow = server.receive()
        assert data == expected + b"%d" % number
    server.answer(b"answer", flow)
    assert client.recv(100) == b"answer"


def test_the_proxy_header_has_the_address_that_was_sent_to(datagrams):
    """On a wildcard listener it is not the wildcard; an IPv4 client is sent as IPv4."""
    listener = datagrams.listener("udp6", host="::")
    server = datagrams.target()
    datagrams.launch("--proxy-protocol=v2", server.text, listeners=[listener])
    client = datagrams.client(listener, host="127.0.0.9")
    client.send(b"hello")
    own = ("127.0.0.9", listener.getsockname()[1])
    server.expect(header(socket.AF_INET, client.getsockname(), own) + b"hello")


def test_the_proxy_header_of_a_unix_client(datagrams):
    """It has no address to announce: LOCAL, of length 0."""
    listener, server = datagrams.forward("unix", "udp4", "--proxy-protocol=v2")
    datagrams.client(listener).send(b"hello")
    server.expect(SIGNATURE + b"\x20\0\0\0hello")


def test_a_datagram_that_is_too_large_with_its_header_is_dropped(datagrams):
    """It is counted, and the next one arrives."""
    listener, server = datagrams.forward("udp4", "udp4", "--proxy-protocol=v2")
    client = datagrams.client(listener)
    client.send(bytes(DATAGRAM_MAX - 10))
    client.send(bytes(DATAGRAM_MAX - 28))
    assert len(server.receive()[0]) == DATAGRAM_MAX
    datagrams.stage.proxy.send_signal(signal.SIGUSR1)
    datagrams.stage.proxy.wait_for_log("1 too large")


# ── what is refused at the start ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--proxy-protocol=v1", "127.0.0.1:1"], "--proxy-protocol=v1 has no header for datagrams"),
        (["vsock:2:53"], "datagrams cannot be sent to a VSOCK address"),
        (["--listen=127.0.0.1:0", "udp:127.0.0.1:53"], "is a stream listener"),
        (["--listen=127.0.0.1:0", "unix-dgram:/run/x"], "is a stream listener"),
        (["--listen=udp:nowhere:53", "127.0.0.1:1"], "'nowhere' is not an IP address"),
        (["--listen=unix-dgram:x", "127.0.0.1:1"], "expected unix-dgram:/PATH"),
        (["unix-dgram:x/y"], "expected unix-dgram:/PATH"),
        (["udp:[::1]"], "no port"),
    ],
)
def test_errors_at_the_start(datagrams, arguments, message):
    """One line, and exit status 1."""
    outcome = datagrams.stage.run(*arguments, listeners=[datagrams.listener()])
    assert outcome.status == 1
    (line,) = outcome.stderr.splitlines()
    assert message in line


def test_a_live_unix_socket_is_not_replaced(datagrams):
    """A stale one is."""
    path = datagrams.stage.path("s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as live:
        live.bind(path)
        outcome = datagrams.stage.run(f"--listen=unix-dgram:{path}", "127.0.0.1:1")
        assert (outcome.status, outcome.stderr) == (
            1,
            f"Failed to listen on unix-dgram:{path}: Address already in use\n",
        )
    datagrams.launch(f"--listen=unix-dgram:{path}", datagrams.echo().text)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.bind("")
        client.connect(path)
        client.settimeout(patience())
        greet(client)


# ── a loop ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["udp4", "udp6", "unix"])
def test_a_target_that_is_the_listener_is_refused(datagrams, family):
    """One line, no answer and no storm."""
    listener = datagrams.listener(family)
    text = datagrams.target(family)  # only for its form
    name = listener.getsockname()
    target = name if family == "unix" else f"{name[0]}:{name[1]}"
    del text
    proxy = datagrams.launch(target, listeners=[listener])
    client = datagrams.client(listener)
    client.send(b"hello")
    proxy.wait_for_log(f"Refusing datagram: target {target} leads back to our own listener")
    assert proxy.cpu_demand() < 0.5
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.recv(100)


def test_a_loop_over_two_listeners_ends(datagrams):
    """Each listener leads to the other: that is found as well."""
    one, other = datagrams.listener(), datagrams.listener()
    targets = [f"{sock.getsockname()[0]}:{sock.getsockname()[1]}" for sock in (other, one)]
    proxy = datagrams.launch(
        f"a={targets[0]}", f"b={targets[1]}", listeners=[one, other], names="a:b"
    )
    datagrams.client(one).send(b"hello")
    proxy.wait_for_log("leads back to our own listener")
    assert proxy.cpu_demand() < 0.5


def test_a_target_that_becomes_its_own_client_is_not_a_loop(datagrams):
    """The backend itself may be a client, with the very port that flows are sent to."""
    listener, server = datagrams.forward()
    server.answer(b"from the backend", listener.getsockname())
    server.expect(b"from the backend")
    never_within(
        0.2,
        lambda: datagrams.stage.proxy.log_lines("leads back"),
        "a message about a loop",
    )


# ── errors of the network ─────────────────────────────────────────────────────────────────────────


def test_a_client_that_is_gone_harms_no_other(datagrams):
    """An answer to a closed socket comes back as an ICMP error."""
    listener, server = datagrams.forward()
    clients = [datagrams.client(listener) for _ in range(3)]
    flows = []
    for client in clients:
        client.send(b"question")
        flows.append(server.receive()[1])
    clients[0].close()
    for flow in flows * 5:
        server.answer(b"answer", flow)
    for client in clients[1:]:
        assert [client.recv(100) for _ in range(5)] == [b"answer"] * 5
        client.send(b"again")
        server.expect(b"again")


def test_a_full_unix_client_is_skipped(datagrams):
    """A client that does not read its answers loses them, and stops nobody.

    It is not connected: the queue of one that is has no limit but the send buffer of the listener,
    which on a direct connection, too, a single client can use up.
    """
    listener, server = datagrams.forward("unix", "unix")
    other = datagrams.client(listener)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stuck:
        stuck.bind("")
        stuck.sendto(b"question", listener.getsockname())
        _, flow = server.receive()
        _answer_behind_a_full_queue(datagrams, server, flow, other)


def _answer_behind_a_full_queue(datagrams, server, flow, other):
    other.send(b"question")
    _, second = server.receive()
    server.sock.setblocking(False)
    for _ in range(2000):
        with contextlib.suppress(BlockingIOError):
            server.answer(bytes(1000), flow)
    server.sock.settimeout(patience())
    wait_until(lambda: not server.answer(b"answer", second), "room in the queue of the flow")
    assert other.recv(100) == b"answer"
    datagrams.stage.proxy.send_signal(signal.SIGUSR1)
    datagrams.stage.proxy.wait_for_log("client refused")


def test_a_stream_ends_while_datagrams_pass(datagrams):
    """Neither kind disturbs the other."""
    stage = datagrams.stage
    stream, listener = stage.listener(), datagrams.listener()
    backend, echo = stage.backend(), datagrams.echo()
    datagrams.launch(
        f"a={backend.target}", f"b={echo.text}", listeners=[stream, listener], names="a:b"
    )
    client = datagrams.client(listener)
    connection = stage.connect(stream)
    server = backend.accept()
    greet(client)
    server.sendall(b"last words")
    server.close()
    greet(client)
    assert read_to_end(connection) == (b"last words", "eof")
    greet(client)
