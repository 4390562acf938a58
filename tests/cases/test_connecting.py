"""Cases 10, 15, 16 and 18 to 24: how connections are established."""

import contextlib
import os
import socket

import pytest
from cases.pairs import (
    FAMILIES,
    assert_same,
    costs_nothing,
    every_pair,
    hear,
    needs_a_program,
    not_applicable,
    say,
    stays_open,
    to_tcp,
    to_unix,
)
from kit.namespaces import in_network_namespace_of, namespace_prefix
from kit.proxy_header import LOCAL, header_of
from kit.socket_state import is_quiet
from kit.sockets import TCP, UNIX, open_listener, read_exactly, read_to_end, reset, target_text
from kit.traffic import Payload, is_served
from kit.waiting import never_within, wait_until

LEFT_AWAY_S = 0.4
"""Seconds for which a target stays away: longer than the pause before the first retry."""

ONE_PORT = 'ip link set lo up && echo "50001 50001" >/proc/sys/net/ipv4/ip_local_port_range'

tcp_from_tcp = pytest.mark.parametrize(("listen", "target"), [(a, b) for a in TCP for b in TCP])


def talk(client, server):
    """Send a word in each direction."""
    say(client, b"question", "the client")
    assert_same(read_exactly(server, 8), b"question", "the question")
    say(server, b"answer")
    assert_same(read_exactly(client, 6), b"answer", "the answer")


def first_words(side):
    """The first bytes received, or b"" if the stream ends before."""
    try:
        return side.recv(100)
    except ConnectionResetError:
        return b""


def accept_from(backend, what):
    """Accept the target's next connection."""
    try:
        return backend.accept()
    except AssertionError:
        raise AssertionError(f"{what} never reaches the target") from None


def waits(client, what):
    """Nothing arrives at the client, neither a byte nor the end, while its target is away."""
    stays_open(client, LEFT_AWAY_S, f"{what} is let go at once")


# ── 10 ───────────────────────────────────────────────────────────────────────────────────────────


@to_tcp
def test_10a_hup_during_connect(stage, listen, target):
    """HUP during connect: what the client sent before it left is delivered, then its end.

    The target's backlog is full, so that the connect takes long.
    """
    needs_a_program(stage)
    backend = stage.backend(target, backlog=0)
    stage.launch(backend.target, listeners=[stage.listener(listen)])
    talk(stage.connect(), backend.accept())
    waiting = stage.fill_backlog(backend)
    client = stage.connect()
    client.sendall(b"request")
    client.close()
    costs_nothing(stage, "connects")
    for filler in waiting:
        backend.accept()
        filler.close()
    hear(accept_from(backend, "the request"), b"request", "the request")


@tcp_from_tcp
def test_10b_reset_during_connect(stage, listen, target):
    """HUP during connect: a client that resets meanwhile leaves nothing behind."""
    needs_a_program(stage)
    backend = stage.backend(target, backlog=0)
    stage.launch(backend.target, listeners=[stage.listener(listen)])
    first = stage.connect()
    talk(first, backend.accept())
    before = stage.proxy.socket_count()
    waiting = stage.fill_backlog(backend)
    client = stage.connect()
    client.sendall(b"request")
    wait_until(lambda: stage.proxy.socket_count() == before + 2, "the connect is under way")
    reset(client)
    costs_nothing(stage, "connects")
    if stage.is_ours:  # without waiting for the end of the connect
        wait_until(lambda: stage.proxy.socket_count() <= before, "both sockets are closed", 5)
    for filler in waiting:
        backend.accept()
        filler.close()
    wait_until(
        lambda: serve_a_client(backend) or stage.proxy.socket_count() <= before,
        "both sockets are closed",
    )


def serve_a_client(backend):
    """Be a server: accept a connection if there is one, read to the end and close."""
    backend.listener.settimeout(0)
    with contextlib.suppress(BlockingIOError), backend.listener.accept()[0] as server:
        read_to_end(server)


@to_tcp
def test_10c_target_that_hangs_up_at_once(stage, listen, target):
    """HUP during connect: the client sees that its target resets, and other clients are served."""
    backend = stage.forward(listen, target)
    for _ in range(5):
        client = stage.connect()
        reset_until_told(backend, client)
        received, _ = read_to_end(client)
        assert received == b"", "bytes from nowhere"
    talk(stage.connect(), accept_from(backend, "the next client"))
    costs_nothing(stage, "has nothing to do")


def reset_until_told(backend, client):
    """Be a target that resets every connection, until the client sees the end."""
    backend.listener.settimeout(0)

    def client_saw_an_end():
        with contextlib.suppress(BlockingIOError):
            reset(backend.listener.accept()[0])
        return not is_quiet(client)

    wait_until(client_saw_an_end, "the client sees the end")


# ── 15, 16 ───────────────────────────────────────────────────────────────────────────────────────


@every_pair
def test_15a_emfile_at_accept(stage, listen, target):
    """EMFILE/ENFILE at accept: no CPU, open connections continue, waiting clients come later."""
    stage.launch(stage.echo(target), listeners=[stage.listener(listen)])
    first = stage.connect()
    assert is_served(first)
    former = stage.proxy.leave_no_fd()
    client = stage.connect()
    client.sendall(b"hello")
    wait_for_the_failure(stage)
    costs_nothing(stage, "is out of files")
    assert is_served(first), "the open connection is lost"
    stage.proxy.set_fd_limit(former)
    assert_same(read_exactly(client, 5), b"hello", "the answer to the waiting client")


@every_pair
def test_15b_enfile_at_accept(stage, faults, listen, target):
    """EMFILE/ENFILE at accept: the same when the whole system is out of files."""
    stage.launch(stage.echo(target), listeners=[stage.listener(listen)])
    first = stage.connect()
    assert is_served(first)
    with faults.of("accept", "ENFILE"):
        client = stage.connect()
        client.sendall(b"hello")
        wait_for_the_failure(stage)
        costs_nothing(stage, "is out of files")
        assert is_served(first), "the open connection is lost"
    assert_same(read_exactly(client, 5), b"hello", "the answer to the waiting client")


def wait_for_the_failure(stage):
    """Wait until accept has failed. Other programs may log nothing about it, so do not wait."""
    if stage.is_ours:
        wait_until(stage.proxy.log_lines, "a line about it")


@every_pair
def test_16a_econnaborted_at_accept(stage, faults, listen, target):
    """ECONNABORTED at accept: that client is gone; the next one is served, at no CPU."""
    stage.launch(stage.echo(target), listeners=[stage.listener(listen)])
    first = stage.connect()
    assert is_served(first)
    with faults.of("accept", "ECONNABORTED"):
        for _ in range(3):
            assert read_to_end(stage.connect())[0] == b"", "bytes from nowhere"
        costs_nothing(stage, "has nothing to do")
    assert is_served(first), "the open connection is lost"
    assert is_served(stage.connect()), "the next client is not served"


@every_pair
def test_16b_reset_in_the_backlog(stage, listen, target):
    """ECONNABORTED at accept: clients that reset in the backlog do not disturb others."""
    listener = stage.listener(listen)
    for _ in range(10):
        reset(stage.connect(listener))
    stage.launch(stage.echo(target), listeners=[listener])
    assert is_served(stage.connect()), "the next client is not served"
    if stage.is_ours:
        never_within(0.1, stage.proxy.log_lines, "a line of log")


# ── 18, 19 ───────────────────────────────────────────────────────────────────────────────────────


@to_unix
def test_18_unix_backlog_full(stage, listen, target):
    """UNIX backlog full: the client waits until there is room, and is served."""
    needs_a_program(stage)
    backend = stage.backend(target, backlog=0)
    waiting = stage.fill_backlog(backend)
    stage.launch(backend.target, listeners=[stage.listener(listen)])
    client = stage.connect()
    waits(client, "the client")
    for filler in waiting:
        backend.accept()
        filler.close()
    talk(client, accept_from(backend, "the client"))


@to_tcp
def test_19_eaddrnotavail(stage, listen, target):
    """EADDRNOTAVAIL: if no local port is left, the client waits for one, and is served."""
    needs_a_program(stage)
    host = {"tcp4": "127.0.0.1", "tcp6": "::1"}[target]
    listener = launch_alone(stage, listen, target, f"{host}:4000")
    with listener:
        first = stage.connect()
        with listener.accept()[0] as server:
            talk(first, server)
            second = stage.connect()
            try:
                waits(second, "the client")
            finally:
                reset(server)
        read_to_end(first)
        first.close()
        with listener.accept()[0] as server:
            talk(second, server)


def launch_alone(stage, listen, target, text, *arguments, port=4000):
    """Start the program in a network with a single local port; the target's listener there, or
    None without a `port`."""
    notify = stage.notify_socket(stage.path("notify"))  # abstract names end at the namespace
    options = {"prefix": namespace_prefix(ONE_PORT), "notify": notify}
    stage.launch(*arguments, text, listeners=[stage.listener(listen)], **options)
    home = os.readlink("/proc/self/ns/net")
    wait_until(
        lambda: os.readlink(f"/proc/{stage.proxy.pid}/ns/net") != home, "a network of its own"
    )
    wait_until(lambda: "lo" in interfaces_up(stage.proxy.pid), "loopback is up there")
    if port is None:
        return None
    return in_network_namespace_of(
        stage.proxy.pid, lambda: open_listener(target, stage.directory, port=port)
    )


def interfaces_up(pid):
    """Names of interfaces with an IPv6 address there: loopback gets one when it comes up."""
    with open(f"/proc/{pid}/net/if_inet6") as table:
        return {line.split()[-1] for line in table}


# ── 20, 21 ───────────────────────────────────────────────────────────────────────────────────────


@to_tcp
def test_20_tcp_self_connect(stage, listen, target):
    """TCP self-connect: the client is disconnected; it never reads its own bytes as an answer.

    The target's port is dead and the only local port: the kernel connects the socket to itself.
    """
    needs_a_program(stage)
    host = {"tcp4": "127.0.0.1", "tcp6": "::1"}[target]
    patient = ["--connect-timeout=300ms"] if stage.is_ours else []
    launch_alone(stage, listen, target, f"{host}:50001", *patient, port=None)
    for _ in range(5):
        client = stage.connect()
        client.sendall(b"is there an echo?")
        assert first_words(client) == b"", "takes its own bytes for the target's answer"


@pytest.mark.parametrize("family", FAMILIES)
def test_21_target_is_own_listener(stage, family):
    """target = own listener: clients are disconnected, without a storm of connections to itself."""
    listener = stage.listener(family)
    target = target_text(listener.getsockname(), listener.family)
    stage.launch(target, listeners=[listener])
    for _ in range(5):
        assert let_go(stage), "the client waits for ever"
    costs_nothing(stage, "has nothing to do")
    size = fd_table_size(stage.proxy)
    assert size <= 256, f"connects to itself until more than {size // 2} files are open"
    if stage.is_ours:
        wait_until(stage.proxy.log_lines, "a line about the loop")
        assert len(stage.proxy.log_lines()) <= 2
        assert f"target {target} leads back" in stage.proxy.log()


def let_go(stage):
    """Whether a client gets its end and no byte; it may be reset as early as its connect."""
    try:
        with stage.connect() as client:
            return read_to_end(client)[0] == b""
    except ConnectionResetError:
        return True
    except AssertionError:
        return False


def fd_table_size(proxy):
    """The size of its fd table, a power of two, which grows and never shrinks."""
    with open(f"/proc/{proxy.worker}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("FDSize:"))


# ── 22 ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("listen", TCP)
@pytest.mark.parametrize("target", FAMILIES)
def test_22a_client_that_vanishes(stage, lan, listen, target):
    """peer that vanishes: detected by keepalive, and not passed on as a clean end."""
    backend = stage.backend(target)

    def listen_there():
        listener = open_listener(listen, stage.directory, host=lan.here.address[listen])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # KeepAlive=yes
        return listener

    listener = lan.here.enter(listen_there)
    stage.listeners.append(listener)
    stage.launch(backend.target, listeners=[listener])
    client = lan.there.enter(lambda: stage.connect(listener))
    server = backend.accept()
    talk(client, server)
    lan.cut()
    check_the_loss(server, target)


def check_the_loss(side, family):
    """That side learns that the other side's host has vanished."""
    try:
        received, end = read_to_end(side)
    except AssertionError:
        raise AssertionError("the loss is not noticed: no keepalive") from None
    assert received == b"", "bytes from nowhere"
    assert end == "reset" or family in UNIX, "the loss arrives as a clean end"


@pytest.mark.parametrize("listen", FAMILIES)
@pytest.mark.parametrize("target", TCP)
def test_22b_server_that_vanishes(stage, lan, listen, target):
    """peer that vanishes: detected by keepalive, and not passed on as a clean end."""
    listener = lan.there.enter(
        lambda: open_listener(target, stage.directory, host=lan.there.address[target])
    )
    with listener:
        listener.settimeout(15)
        notify = stage.notify_socket(stage.path("notify"))
        text = target_text(listener.getsockname(), listener.family)
        front = stage.listener(listen)
        stage.launch(text, listeners=[front], prefix=lan.here.prefix, notify=notify)
        client = stage.connect()
        with listener.accept()[0] as server:
            talk(client, server)
            lan.cut()
            check_the_loss(client, listen)


# ── 23, 24 ───────────────────────────────────────────────────────────────────────────────────────


@every_pair
def test_23_client_gone_while_held(stage, listen, target):
    """client gone while held: its slot is free, and the target sees nothing of it.

    On UNIX it closes, on TCP it resets: an end alone could be a half-close.
    """
    needs_a_program(stage)
    backend = stage.absent(target)
    stage.launch("-c1", backend.target, listeners=[stage.listener(listen)])
    gone = stage.connect()
    if listen in TCP:
        gone.sendall(b"gone")
    try:
        waits(gone, "the client")
    except AssertionError:
        not_applicable("holds no clients")
    reset(gone)

    def next_one():
        client = stage.connect()
        try:
            never_within(0.1, lambda: not is_quiet(client), "refused")
        except AssertionError:
            return None
        return client

    client = wait_until(next_one, "a free slot")
    client.sendall(b"question")
    backend.start_listening()
    words = first_words(accept_from(backend, "the next client"))
    assert words == b"question", "the client that is gone shows at the target"
    backend.listener.settimeout(LEFT_AWAY_S)
    with pytest.raises(TimeoutError):
        backend.listener.accept()


def sends_header(contender, version):
    """Whether that program can send the header."""
    if contender == "original-252":
        return False
    return version == "v1" or not contender.startswith(("original", "nginx"))


@every_pair
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_24_proxy_header_sent_in_pieces(stage, faults, listen, target, version):
    """PROXY header sent in pieces: header and request arrive whole and in order.

    The target's socket takes three bytes at a time.
    """
    needs_a_program(stage)
    if not sends_header(stage.contender, version):
        not_applicable(f"sends no PROXY header {version}")
    backend = stage.backend(target)
    stage.launch(f"--proxy-protocol={version}", backend.target, listeners=[stage.listener(listen)])
    request = Payload(300).bytes()
    with faults.short_sends(3):
        client = stage.connect()
        client.sendall(request)
        server = accept_from(backend, "the header")
        if listen in UNIX:
            header = {"v1": b"PROXY UNKNOWN\r\n", "v2": LOCAL}[version]
        else:
            header = header_of(version, client, {"tcp4": "TCP4", "tcp6": "TCP6"}[listen])
        assert_same(read_exactly(server, len(header)), header, "the header")
        assert_same(read_exactly(server, len(request)), request, "the request")
