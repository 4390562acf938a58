"""List: it tells exactly the live connections, and the truth about each of them."""

import os
import re
import shutil
import socket
import subprocess
import threading
import time

import pytest
from kit.differences import differs
from kit.flows import Flow, at_lowest_priority, handed_over
from kit.sockets import (
    main_pairs,
    read_exactly,
    read_to_end,
    reset,
    send_until_stuck,
)
from kit.varlink import PROXY, text_of
from kit.waiting import patience, wait_until

pytestmark = differs("original", reason="cannot be inspected", run=False)

SEGMENT = bytes(1 << 16)

threads = pytest.mark.parametrize("threads", ["--threads=1", "--threads=3"])


def greet(client, server, data=b"x"):
    """Move bytes both ways, so that the connection is known to be open."""
    client.sendall(data)
    assert read_exactly(server, len(data)) == data
    server.sendall(data)
    assert read_exactly(client, len(data)) == data


def in_state(caller, state, count=1):
    """Wait until there are `count` connections in a state; return their rows."""

    def found():
        rows = [row for row in caller.connections() if row["state"] == state]
        return rows if len(rows) == count else None

    return wait_until(found, f"{count} {state}")


# ── one connection in each state ─────────────────────────────────────────────────────────────────


@main_pairs
@threads
def test_rows_are_the_connections_with_their_addresses(stage, inspected, listen, target, threads):
    backend, listener = stage.backend(target), stage.listener(listen)
    caller = inspected(threads, "--hand-over=always", backend.target, listeners=[listener])
    assert caller.connections() == []
    pairs = []
    for size in range(1, 8):
        client = stage.connect()
        server = backend.accept()
        greet(client, server, bytes(size))
        pairs.append((client, server, size))
    rows = {row["id"]: row for row in caller.connections()}
    assert len(rows) == len(pairs)
    # Ids are in the order in which clients were accepted.
    for number, (client, server, size) in zip(sorted(rows), pairs, strict=True):
        row = rows[number]
        assert row["state"] == "open"
        assert row["client"] == text_of(client.getsockname()) or listen in ("unix", "abstract")
        assert row["clientPID"] == (os.getpid() if listen in ("unix", "abstract") else None)
        assert row["listener"] == text_of(listener.getsockname())
        assert row["target"] == text_of(backend.target)
        assert row["targetAddress"] == text_of(server.getsockname())
        if target in ("unix", "abstract"):
            assert row["localAddress"] is None  # unbound
        else:
            assert row["localAddress"] == text_of(server.getpeername())
        half = {"bytes": size, "inFlight": 0, "state": "flowing", "datagrams": None}
        assert (row["up"], row["down"]) == (half, half)
        assert row["connectUSec"] >= 0
        assert row["heldUSec"] is None
    used = {row["thread"] for row in rows.values()}
    assert used == ({0} if threads == "--threads=1" else {0, 1, 2})
    for client, server, _ in pairs[::2]:
        client.close()
        assert read_to_end(server) == (b"", "eof")
        server.close()
    left = wait_until(
        lambda: len(found := caller.connections()) == 3 and found, "three connections"
    )
    assert {row["id"] for row in left} == set(sorted(rows)[1::2])


@pytest.mark.skipif(not shutil.which("ss"), reason="no ss here")
def test_local_addresses_pair_rows_with_ss(stage, inspected):
    backend = stage.backend()
    caller = inspected(backend.target)
    for _ in range(3):
        greet(stage.connect(), backend.accept())
    done = subprocess.run(["ss", "-Htnp"], check=True, capture_output=True, text=True)
    pid = f"pid={stage.proxy.worker},"
    sockets = [line.split()[3:5] for line in done.stdout.splitlines() if pid in line]
    listener = text_of(stage.proxy.listeners[0].getsockname())
    wanted = [[row["localAddress"], row["targetAddress"]] for row in caller.connections()]
    wanted += [[listener, row["client"]] for row in caller.connections()]
    assert sorted(sockets) == sorted(wanted)


@threads
def test_held_clients(stage, inspected, threads):
    backend = stage.absent()
    caller = inspected(threads, "--connect-timeout=1min", backend.target)
    clients = [stage.connect() for _ in range(5)]
    rows = in_state(caller, "held", 5)
    assert [row["client"] for row in rows] == [text_of(one.getsockname()) for one in clients]
    assert len({row["id"] for row in rows}) == 5
    for row in rows:
        assert row["heldUSec"] == row["ageUSec"] == row["idleUSec"]
        assert (row["targetAddress"], row["localAddress"], row["connectUSec"]) == (None,) * 3
        assert row["up"]["bytes"] == row["down"]["bytes"] == 0
        assert row["target"] == backend.target
    backend.start_listening()
    for client in clients:
        greet(client, backend.accept())
    served = in_state(caller, "open", 5)
    # The same ids, and how long each was held.
    assert {row["id"]: row["client"] for row in served} == {
        row["id"]: row["client"] for row in rows
    }
    assert all(0 < row["heldUSec"] <= row["ageUSec"] for row in served)


def test_connecting_clients(stage, inspected):
    """A target whose backlog is full says nothing: the connect is under way."""
    backend = stage.backend(backlog=0)
    stage.fill_backlog(backend)
    caller = inspected("--connect-timeout=1min", backend.target)
    client = stage.connect()
    (row,) = wait_until(lambda: caller.connections(state="connecting"), "a connect under way")
    assert row["client"] == text_of(client.getsockname())
    assert row["targetAddress"] == backend.target
    assert row["localAddress"].startswith("127.0.0.1:")
    assert row["connectUSec"] is None


def test_lingering_connections(stage, inspected):
    """The client has reset, and the target has not taken all yet."""
    backend = stage.backend(receive_buffer=4096)
    caller = inspected(backend.target)
    client = stage.connect()
    server = backend.accept()
    size = 100_000
    client.sendall(bytes(size))
    wait_until(lambda: caller.connection_of(client)["up"]["bytes"] == size, "all with the kernel")
    name = text_of(client.getsockname())
    reset(client)
    (row,) = in_state(caller, "lingering")
    assert row["client"] == name
    assert (row["up"]["bytes"], row["up"]["state"]) == (size, "draining")
    assert row["down"]["state"] == "dead"
    assert read_to_end(server) == (bytes(size), "reset")
    wait_until(lambda: caller.connections() == [], "the end")


def test_filters(stage, inspected):
    here, there = stage.backend(), stage.absent()
    listeners = [stage.listener(), stage.listener()]
    caller = inspected(
        "--connect-timeout=1min",
        f"a={here.target}",
        f"b={there.target}",
        listeners=listeners,
        names="a:b",
    )
    greet(stage.connect(listeners[0]), here.accept())
    stage.connect(listeners[1])
    in_state(caller, "held")
    assert [row["state"] for row in caller.connections(state="held")] == ["held"]
    assert [row["state"] for row in caller.connections(target=here.target)] == ["open"]
    assert caller.connections(target=here.target, state="held") == []
    assert caller.connections(target="elsewhere") == []
    (reply,) = caller.call(f"{PROXY}.List", more=True, state="closed")
    assert reply["error"] == "org.varlink.service.InvalidParameter"


# ── what is told of one ──────────────────────────────────────────────────────────────────────────


def test_bytes_in_flight_and_what_is_delivered(stage, inspected):
    backend = stage.backend(receive_buffer=4096)
    caller = inspected(backend.target)
    client = stage.connect()
    server = backend.accept()
    sent = send_until_stuck(client, SEGMENT, limit=1 << 24)
    row = caller.connection_of(client)
    assert row["up"]["inFlight"] > 0
    assert row["up"]["bytes"] + row["up"]["inFlight"] <= sent
    assert row["down"] == {"bytes": 0, "inFlight": 0, "state": "flowing", "datagrams": None}
    read_exactly(server, sent)
    row = wait_until(
        lambda: (row := caller.connection_of(client))["up"]["inFlight"] == 0 and row, "all out"
    )
    assert row["up"] == {"bytes": sent, "inFlight": 0, "state": "flowing", "datagrams": None}


def test_states_of_the_halves(stage, inspected):
    backend = stage.backend(receive_buffer=4096)
    caller = inspected(backend.target)
    client = stage.connect()
    server = backend.accept()
    greet(client, server)
    states = lambda row: (row["up"]["state"], row["down"]["state"])  # noqa: E731
    assert states(caller.connection_of(client)) == ("flowing", "flowing")
    sent = send_until_stuck(client, SEGMENT, limit=1 << 24)
    client.shutdown(socket.SHUT_WR)

    def reach(wanted):
        wait_until(lambda: states(caller.connection_of(client)) == wanted, f"{wanted}")

    # The end of the stream is behind bytes that the program cannot read yet.
    assert states(caller.connection_of(client)) == ("flowing", "flowing")
    assert read_to_end(server) == (
        SEGMENT * (sent // len(SEGMENT)) + bytes(sent % len(SEGMENT)),
        "eof",
    )
    reach(("shut", "flowing"))
    server.sendall(b"still")
    assert read_exactly(client, 5) == b"still"
    assert states(caller.connection_of(client)) == ("shut", "flowing")


def test_age_and_idle_time(stage, inspected):
    backend = stage.backend()
    caller = inspected(backend.target)
    before = time.time()
    client, quiet = stage.connect(), stage.connect()
    servers = backend.accept(), backend.accept()
    for one, server in zip((client, quiet), servers, strict=True):
        greet(one, server)
    after = time.time()
    opened = caller.connection_of(client)
    # The program's clock has a resolution of a millisecond, and is read once in a turn.
    assert before - 0.1 <= opened["sinceUSec"] / 1e6 <= after + 0.01
    wait_until(lambda: caller.connection_of(client)["idleUSec"] > 300_000, "some idle time")
    greet(client, servers[0])
    active, idle = caller.connection_of(client), caller.connection_of(quiet)
    assert active["idleUSec"] + 200_000 < active["ageUSec"]
    assert active["idleUSec"] < idle["idleUSec"] <= idle["ageUSec"]
    assert abs(active["sinceUSec"] - opened["sinceUSec"]) < 100_000
    age = time.time() - active["sinceUSec"] / 1e6
    assert 0.3 <= active["ageUSec"] / 1e6 <= age + 0.01


# ── while everything changes ─────────────────────────────────────────────────────────────────────


class Churn(threading.Thread):
    """Connections that begin, move a byte and end, until stop()."""

    def __init__(self, address):
        super().__init__(daemon=True)
        self.address = address
        self.lives = {}
        """{client's address: (before its connect, after its end; None while it lives)}"""
        self.stopped = threading.Event()
        self.error = None

    def run(self):
        number = 0
        try:
            while not self.stopped.is_set():
                with socket.socket() as client:
                    client.settimeout(15)
                    began = time.monotonic()
                    client.connect(self.address)
                    name = text_of(client.getsockname())
                    self.lives.setdefault(name, []).append([began, None])
                    client.sendall(b"x")
                    read_exactly(client, 1)
                    number += 1
                    if number % 3 == 0:
                        reset(client)
                self.lives[name][-1][1] = time.monotonic()
        except Exception as error:  # told by stop()
            self.error = error

    def stop(self):
        self.stopped.set()
        self.join()
        assert self.error is None, self.error
        return self.lives


@pytest.mark.parametrize("arguments", [["--threads=1"], ["--threads=3", "--hand-over=always"]])
def test_none_is_missed_or_told_twice_while_clients_come_and_go(stage, inspected, arguments):
    caller = inspected(*arguments, "--connections-max=2000", stage.echo())
    address = stage.proxy.listeners[0].getsockname()
    steady = [stage.connect() for _ in range(200)]
    for client in steady:
        client.sendall(b"x")
        assert read_exactly(client, 1) == b"x"
    names = {text_of(client.getsockname()) for client in steady}
    churns = [Churn(address) for _ in range(4)]
    for churn in churns:
        churn.start()
    lists = []
    while len(lists) < 40 or sum(len(churn.lives) for churn in churns) < 200:
        began = time.monotonic()
        rows = caller.connections()
        lists.append((began, time.monotonic(), rows))
        assert not any(churn.error for churn in churns)
    lives = {}
    for churn in churns:
        for name, spans in churn.stop().items():
            lives.setdefault(name, []).extend(spans)
    told = 0
    for _, end, rows in lists:
        ids = [row["id"] for row in rows]
        assert len(set(ids)) == len(ids)
        clients = [row["client"] for row in rows if row["client"] in names]
        assert set(clients) == names
        assert len(clients) == len(names)
        others = {row["client"] for row in rows} - names
        told += len(others)
        for client in others:
            assert any(began <= end for began, _ in lives[client]), client
    assert told > 0


def test_none_is_missed_or_told_twice_while_they_change_threads(stage, inspected):
    backend = stage.backend()
    caller = inspected(
        "--threads=3",
        "--hand-over=busy",
        "--buffer-size=4096",
        backend.target,
        prefix=at_lowest_priority(stage, ""),  # without figures a CPU counts as idle
    )
    flows = [Flow(stage.connect(), backend.accept()) for _ in range(12)]
    names = sorted(text_of(flow.client.getsockname()) for flow in flows)
    try:
        last = {}
        rounds_left = 4
        deadline = time.monotonic() + 4 * patience()  # at that priority
        while rounds_left:
            assert time.monotonic() < deadline
            rows = caller.connections()
            assert sorted(row["client"] for row in rows) == names
            for row in rows:
                assert row["up"]["bytes"] >= last.get(row["id"], 0)
                last[row["id"]] = row["up"]["bytes"]
            # How many change threads is up to the machine: it may be a single one, once.
            if any(row["thread"] for row in rows):
                rounds_left -= 1
    finally:
        for flow in flows:
            flow.stopped.set()
    sent = {text_of(flow.client.getsockname()): flow.sent.result() for flow in flows}
    assert handed_over(stage.proxy)[1] >= 1

    def all_shut():
        rows = caller.connections()
        return rows if all(row["up"]["state"] == "shut" for row in rows) else None

    rows = wait_until(all_shut, "the ends")
    assert {row["client"]: row["up"]["bytes"] for row in rows} == sent
    for flow in flows:
        flow.stop()


# ── names that peers chose ───────────────────────────────────────────────────────────────────────

EVIL = b"\0n\x1b[2J\n\0\xff\xe2\x80\xae'\""
SHOWN = r"@n\x1b[2J\n\x00\xff\u202e'" + '"'


def no_control(data):
    """Assert that neither bytes nor decoded JSON strings control a terminal."""
    assert re.fullmatch(rb"[\x20-\x7e]*", data), data
    assert not re.search(rb"\\u00[01]|\\n|\\r|\\t|\\u202e", data.replace(rb"\\", b"")), data


def test_names_are_escaped_everywhere(stage, inspected, folder, callers):
    """Of an abstract client, of the target, of the listener, and in what a caller has sent."""
    listener, backend = stage.listener("unix"), socket.socket(socket.AF_UNIX)
    backend.bind(stage.path("t\x1b[2J\n"))
    backend.listen()
    inspected(backend.getsockname(), listeners=[listener], names="x\x1b[2J")
    client = socket.socket(socket.AF_UNIX)
    client.bind(EVIL)
    client.connect(listener.getsockname())
    client.sendall(b"x")
    server = backend.accept()[0]
    read_exactly(server, 1)
    calls = [
        (f"{PROXY}.List", True, {}),
        (f"{PROXY}.Status", False, {}),
        ("io.systemd.Metrics.List", True, {}),
        ("evil\x1b[2J.interface\n.x", False, {}),
        (f"{PROXY}.Status", False, {"\x1b[2J\n": 1}),
        ("org.varlink.service.GetInterfaceDescription", False, {"interface": "\x1b\n"}),
    ]
    for method, more, parameters in calls:
        caller = callers(f"{folder}/inspect")
        caller.ask(method, more, **parameters)
        while True:
            data = caller.raw_message()
            no_control(data)
            if b'"continues":true' not in data:
                break
    (row,) = callers(f"{folder}/inspect").connections()
    assert row["client"] == SHOWN
    assert row["target"] == backend.getsockname().replace("\x1b", r"\x1b").replace("\n", r"\n")
    for one in (client, server, backend):
        one.close()
