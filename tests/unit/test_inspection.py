"""The inspection: its callers, and what its methods say, on a fake relay."""

import array
import errno
import json
import os
import re
import socket
from types import SimpleNamespace

import pytest
from kit.fake_relay import FakeRelay, connection_info

from proxyd import __version__
from proxyd import address as sockaddr
from proxyd._relay import CONNECT_BUCKETS_US, Begun, Ended, HalfInfo
from proxyd.event_loop import EventLoop
from proxyd.header_reader import HEADER_MS, Sender
from proxyd.held import WAIT_BUCKETS_MS, HeldClient
from proxyd.inspection import caller as caller_module
from proxyd.inspection import callers as callers_module
from proxyd.inspection.caller import CALL_MAX, STALL_MS
from proxyd.inspection.callers import DISCARD_MS
from proxyd.inspection.interfaces import METRICS, PROXY, TEXTS
from proxyd.inspection.listing import ROWS_MAX
from proxyd.inspection.rows import RowMaker
from proxyd.inspection.service import Service
from proxyd.inspection.watch import UNREAD_MAX
from proxyd.refusals import Refusals
from proxyd.target import parse_target
from proxyd.upstream import Upstream

SERVICE = "org.varlink.service"
TARGET = "/run/backend"
LISTENER = "127.0.0.1:80"
START_MS = 7_000_000


class Gone(Exception):
    """The service has closed the connection."""


class World:
    """A service, and its callers."""

    def __init__(self, callers_max, per_source=0):
        self.relay = FakeRelay(start_ms=START_MS)
        self.relay.connections_max = 256
        self.loop = EventLoop()
        self.loop.relay = self.relay
        target = parse_target(TARGET)
        self.upstream = Upstream(self.loop, None, target, 0, None)
        self.listener = SimpleNamespace(
            text=LISTENER,
            name="web",
            target=target,
            upstream=self.upstream,
            accepting=True,
            datagram=False,
        )
        self.acceptor = acceptor = SimpleNamespace(
            listeners=[self.listener],
            refusals=Refusals(self.loop.relay),
            passed_in=0,
            awaiting_header=4,
            header_reader=None,
            cut=0,
            per_source=per_source,
        )
        acceptor.refusals.count, acceptor.refusals.headerless = 1, 2
        parts = self.loop, acceptor, [self.upstream]
        self.service = Service(*parts, lambda: "fine", START_MS - 5000, 3, callers_max)
        self.callers = self.service.callers
        self.sockets = []

    def connect(self):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self.sockets.append(ours)
        self.callers.add(theirs.detach())
        self.settle()
        return ours

    def settle(self):
        """Let the service do what it can."""
        while True:
            for fd in list(self.callers._by_fd):
                self.loop._handlers[fd](5)
            self.callers.step(self.relay.now_ms)
            busy = self.callers.next_ms(self.relay.now_ms) == self.relay.now_ms
            answers, self.relay.answers = self.relay.answers, []
            for event in answers:
                self.service.handle(event)
            if not busy and not answers:
                return

    def pass_time(self, ms):
        self.relay.now_ms += ms
        self.settle()

    def ask(self, caller, method, more=False, oneway=False, **parameters):
        call = {"method": method, "parameters": parameters, "more": more, "oneway": oneway}
        caller.send(json.dumps(call).encode() + b"\0")

    def replies(self, caller):
        """All messages that have come."""
        data = b""
        while True:
            self.settle()
            try:
                piece = caller.recv(1 << 20)
            except BlockingIOError:
                break
            if not piece:
                if data:
                    break
                raise Gone
            data += piece
        assert data.endswith(b"\0") or not data
        return [json.loads(message) for message in data.split(b"\0")[:-1]]

    def call(self, method, more=False, **parameters):
        """The replies to one call; all but the last have `continues`."""
        caller = self.connect()
        self.ask(caller, method, more, **parameters)
        replies = self.replies(caller)
        caller.close()
        self.settle()
        assert [one.get("continues", False) for one in replies] == [True for _ in replies[1:]] + [
            False
        ]
        return replies

    def listed(self, **parameters):
        replies = self.call(f"{PROXY}.List", more=True, **parameters)
        return [one["parameters"]["connection"] for one in replies]

    def hold(self, since_ms=START_MS, connection=0, kind=socket.AF_UNIX):
        ours, theirs = socket.socketpair(kind)
        self.sockets.append(ours)
        client = HeldClient(theirs.detach(), kind, None, "", since_ms)
        client.connection = connection
        self.upstream.held.add(client)
        return client, ours

    def closed(self, caller):
        try:
            self.replies(caller)
        except (Gone, ConnectionResetError):
            return True
        return False

    def close(self):
        self.callers.close_all()
        self.upstream.drop_all()
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def world():
    worlds = []

    def make(callers_max=64):
        worlds.append(World(callers_max))
        return worlds[-1]

    yield make
    for one in worlds:
        one.close()


@pytest.fixture
def stranger(monkeypatch):
    """Have all callers be another user than root and our own."""
    monkeypatch.setattr(
        caller_module, "peer_of", lambda _sock: SimpleNamespace(uid=7, privileged=False)
    )


def error(name, **fields):
    return [{"error": name, "parameters": fields}]


# ── interfaces ────────────────────────────────────────────────────────────────────────────────────


def test_the_service_describes_itself(world):
    (info,) = world().call(f"{SERVICE}.GetInfo")
    assert info["parameters"]["interfaces"] == sorted(TEXTS)
    assert info["parameters"]["version"] == __version__


@pytest.mark.parametrize("name", TEXTS)
def test_interfaces_are_described(world, name):
    one = world()
    (text,) = one.call(f"{SERVICE}.GetInterfaceDescription", interface=name)
    assert text["parameters"]["description"] == TEXTS[name]
    methods = {f"{name}.{word}" for word in re.findall(r"^method (\w+)", TEXTS[name], re.MULTILINE)}
    assert methods == {known for known in one.service._methods if known.startswith(f"{name}.")}


def test_our_own_interface_has_no_type_that_older_readers_do_not_know():
    code = re.sub("#.*", "", TEXTS[PROXY])
    assert not re.search(r"\bany\b", code)


@pytest.mark.parametrize(
    ("method", "parameters", "answer"),
    [
        ("a.b.C", {}, error(f"{SERVICE}.InterfaceNotFound", interface="a.b")),
        ("nothing", {}, error(f"{SERVICE}.InterfaceNotFound", interface="")),
        (f"{PROXY}.X", {}, error(f"{SERVICE}.MethodNotFound", method=f"{PROXY}.X")),
        (f"{PROXY}.List", {}, error(f"{SERVICE}.ExpectedMore")),
        (f"{PROXY}.Watch", {}, error(f"{SERVICE}.ExpectedMore")),
        (f"{METRICS}.List", {}, error(f"{SERVICE}.ExpectedMore")),
        (f"{METRICS}.Describe", {}, error(f"{SERVICE}.ExpectedMore")),
        (f"{PROXY}.Status", {"x": 1}, error(f"{SERVICE}.InvalidParameter", parameter="x")),
        (f"{PROXY}.Terminate", {}, error(f"{SERVICE}.InvalidParameter", parameter="id")),
        (
            f"{SERVICE}.GetInterfaceDescription",
            {"interface": "a.b"},
            error(f"{SERVICE}.InterfaceNotFound", interface="a.b"),
        ),
        (
            f"{SERVICE}.GetInterfaceDescription",
            {},
            error(f"{SERVICE}.InvalidParameter", parameter="interface"),
        ),
    ],
)
def test_errors_of_calls(world, method, parameters, answer):
    assert world().call(method, **parameters) == answer


@pytest.mark.parametrize("method", ["List", "Watch", "Terminate"])
def test_single_connections_are_not_for_everybody(world, stranger, method):
    one = world()
    denied = error(f"{SERVICE}.PermissionDenied")
    assert one.call(f"{PROXY}.{method}", more=True, id=1) == denied
    assert one.relay.snapshots == 0
    assert one.relay.terminated == []


@pytest.mark.usefixtures("stranger")
def test_status_and_metrics_are_for_everybody(world):
    one = world()
    assert one.call(f"{PROXY}.Status")[0]["parameters"]["status"] == "fine"
    for method in ("List", "Describe"):
        assert len(one.call(f"{METRICS}.{method}", more=True)) > 10


# ── callers ───────────────────────────────────────────────────────────────────────────────────────


def test_several_calls_at_once_are_answered_in_order(world):
    one = world()
    caller = one.connect()
    calls = [json.dumps({"method": name}).encode() for name in ("a.B", f"{SERVICE}.GetInfo", "c.D")]
    caller.send(b"\0".join(calls) + b"\0")
    first, second, third = one.replies(caller)
    assert first["parameters"] == {"interface": "a"}
    assert "vendor" in second["parameters"]
    assert third["parameters"] == {"interface": "c"}


def test_a_call_may_come_byte_by_byte(world):
    one = world()
    caller = one.connect()
    for byte in b'{"method": "a.B"}\0':
        caller.send(bytes([byte]))
        one.settle()
    assert len(one.replies(caller)) == 1


def test_oneway_calls_are_not_answered(world):
    one = world()
    caller = one.connect()
    one.ask(caller, f"{SERVICE}.GetInfo", oneway=True)
    one.ask(caller, f"{PROXY}.Status", oneway=True)
    one.ask(caller, "a.B")
    assert len(one.replies(caller)) == 1


def test_a_caller_that_has_shut_down_its_side_gets_its_replies(world):
    one = world()
    caller = one.connect()
    one.ask(caller, f"{SERVICE}.GetInfo")
    caller.shutdown(socket.SHUT_WR)
    assert len(one.replies(caller)) == 1
    assert one.closed(caller)


@pytest.mark.parametrize(
    "message", [b"GET / HTTP/1.1\r\n\r\n\0", b"\0", b"{}\0", b"[" * 9000 + b"\0"]
)
def test_what_is_not_a_call_ends_the_connection(world, message):
    one = world()
    caller = one.connect()
    caller.send(message)
    assert one.closed(caller)
    assert len(one.callers) == 0


@pytest.mark.parametrize(("size", "kept"), [(CALL_MAX, True), (CALL_MAX + 1, False)])
def test_a_call_has_a_maximum_size(world, size, kept):
    one = world()
    caller = one.connect()
    data = b'{"method": "a.B", "parameters": {"x": "' + b"x" * size
    data = data[: size - 3] + b'"}}' + b"\0"
    while data:
        try:
            data = data[caller.send(data) :]
        except (BrokenPipeError, ConnectionResetError):
            break
        one.settle()
    assert one.closed(caller) != kept


def test_a_caller_that_stalls_is_dropped(world):
    one = world()
    caller, idle = one.connect(), one.connect()
    caller.send(b"{")
    one.settle()
    one.pass_time(STALL_MS - 1)
    assert len(one.callers) == 2
    one.pass_time(1)
    assert one.closed(caller)
    one.pass_time(STALL_MS * 100)
    assert not one.closed(idle)  # it asks nothing, and may do so


def test_a_caller_that_does_not_read_is_dropped(world):
    one = world()
    one.relay.infos = [connection_info(n) for n in range(10_000)]
    caller = one.connect()
    one.ask(caller, f"{PROXY}.List", more=True)
    one.settle()
    one.pass_time(STALL_MS - 1)
    assert len(one.callers) == 1
    one.pass_time(1)
    assert len(one.callers) == 0
    assert one.listed(state="open")  # its snapshot is not in the way


def test_a_caller_that_reads_slowly_is_not_dropped(world):
    one = world()
    one.relay.infos = [connection_info(n) for n in range(2000)]
    caller = one.connect()
    one.ask(caller, f"{PROXY}.List", more=True)
    data = b""
    while data.count(b"\0") < 2000:
        one.pass_time(STALL_MS - 1)
        data += caller.recv(100_000)
    assert len(one.callers) == 1


@pytest.fixture
def pipe():
    rd, wr = os.pipe()
    yield rd, wr
    for fd in (rd, wr):
        try:
            os.close(fd)
        except OSError:
            pass  # the test has


def offend(one, wr):
    """A caller that has sent a descriptor before the kernel was asked to refuse any."""
    ours, theirs = socket.socketpair()
    one.sockets.append(ours)
    ours.setblocking(False)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [wr]))]
    ours.sendmsg([b'{"method": "a.B"}\0'], rights)
    one.callers.add(theirs.detach())
    one.settle()
    return ours


def test_descriptors_are_not_taken(world, pipe):
    one = world()
    before = len(os.listdir("/proc/self/fd"))
    caller = offend(one, pipe[1])
    assert one.closed(caller)
    assert len(os.listdir("/proc/self/fd")) == before + 1  # the caller's
    assert len(one.relay.discards) == 1


def test_sockets_that_cannot_be_closed_keep_their_places(world, stranger, pipe):
    """There are never more of them than callers, and none of them takes a connection's place."""
    one = world(callers_max=16)
    one.relay.may_discard = False
    for _ in range(12):
        offend(one, pipe[1])
    fds = one.relay.discards[:8]
    assert len(one.callers) == 0
    assert one.callers.next_ms(one.relay.now_ms) == one.relay.now_ms + DISCARD_MS
    assert one.relay.let_go == one.relay.cut == []
    del one.relay.discards[:]
    one.pass_time(DISCARD_MS - 1)
    assert one.relay.discards == []
    one.relay.may_discard = True
    one.pass_time(1)
    assert one.relay.discards[:8] == fds
    assert one.callers.next_ms(one.relay.now_ms) is None
    assert one.call(f"{PROXY}.Status")


def test_a_caller_with_credentials_is_served(world):
    """With PassCredentials=yes they come with every message, and are no descriptors."""
    one = world()
    ours, theirs = socket.socketpair()
    one.sockets.append(ours)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    ours.setblocking(False)
    one.ask(ours, "a.B")
    one.callers.add(theirs.detach())
    assert len(one.replies(ours)) == 1
    one.ask(ours, "a.B")
    assert len(one.replies(ours)) == 1


def hang_up(one):
    """Announce that every caller has hung up, as epoll does for one that has closed."""
    for fd in list(one.callers._by_fd):
        one.loop._handlers[fd](5 | 16)


def test_what_a_caller_has_sent_before_it_left_is_done(world):
    """`varlinkctl call --oneway` sends, and closes."""
    one = world()
    client, ours = one.hold()
    caller = one.connect()
    one.ask(caller, f"{PROXY}.Terminate", oneway=True, id=77)
    one.ask(caller, f"{PROXY}.Terminate", id=client.id)
    caller.close()
    hang_up(one)
    one.settle()
    assert one.relay.terminated == [77]
    assert ours.recv(1) == b""
    assert len(one.callers) == 0


@pytest.mark.parametrize("method", [f"{PROXY}.List", f"{PROXY}.Watch", f"{METRICS}.List"])
def test_nothing_is_told_to_a_caller_that_has_left(world, method):
    one = world()
    caller = one.connect()
    one.ask(caller, method, more=True)
    caller.close()
    hang_up(one)
    one.settle()
    assert len(one.callers) == 0
    assert one.relay.snapshots == 0
    assert not one.relay.report_begins


def test_a_watcher_that_leaves_is_forgotten(world):
    one = world()
    caller = one.connect()
    one.ask(caller, f"{PROXY}.Watch", more=True)
    one.settle()
    assert one.relay.report_begins
    caller.close()
    hang_up(one)
    one.settle()
    assert len(one.callers) == 0
    assert not one.relay.report_begins
    assert one.loop.on_held is None


def test_a_message_that_begins_behind_another_may_not_stall(world):
    one = world()
    caller = one.connect()
    caller.send(b'{"method": "a.B"}\0{')
    assert len(one.replies(caller)) == 1
    one.pass_time(STALL_MS)
    assert one.closed(caller)


def test_an_event_of_a_caller_that_is_gone_does_not_meet_the_next_one(world):
    """Their sockets may have the same number."""
    one = world()
    one.relay.infos = [connection_info(n) for n in range(1000)]
    first = one.connect()
    one.ask(first, f"{PROXY}.List", more=True)
    one.callers.step(one.relay.now_ms)
    (gone,) = one.callers._by_fd.values()
    second, theirs = socket.socketpair()
    one.sockets.append(second)
    second.setblocking(False)
    one.callers.close_all()
    with theirs:
        os.dup2(theirs.fileno(), gone.fd)
    one.callers.add(gone.fd)
    one.callers._wake(gone)
    one.settle()
    assert not one.closed(second)
    one.ask(second, "a.B")
    assert len(one.replies(second)) == 1


def test_idle_callers_cost_a_turn_nothing(world, monkeypatch):
    one = world()
    for _ in range(10):
        one.connect()
    monkeypatch.setattr(caller_module.Caller, "stalled_ms", property(lambda _self: 1 // 0))
    one.callers.step(one.relay.now_ms)
    assert one.callers.next_ms(one.relay.now_ms) is None


def test_places_are_limited(world):
    one = world(callers_max=8)
    callers = [one.connect() for _ in range(8)]
    for caller in callers:
        caller.send(b"{")
    one.settle()
    late = one.connect()
    assert one.closed(late)
    assert len(one.callers) == 8


def test_an_idle_caller_makes_room(world):
    one = world(callers_max=8)
    callers = []
    for _ in range(9):
        callers.append(one.connect())
        one.pass_time(10)
    assert [one.closed(caller) for caller in callers] == [True] + [False] * 8


def test_strangers_leave_places_for_others(world, monkeypatch):
    one = world(callers_max=16)
    kinds = [SimpleNamespace(uid=7, privileged=False)] * 20 + [
        SimpleNamespace(uid=0, privileged=True)
    ] * 8
    monkeypatch.setattr(caller_module, "peer_of", lambda _sock: kinds.pop(0))
    callers = []
    for _ in range(28):
        callers.append(one.connect())
        if not one.closed(callers[-1]):
            callers[-1].send(b"{")
            one.settle()
    assert sum(not one.closed(caller) for caller in callers[:20]) == 8
    assert sum(not one.closed(caller) for caller in callers[20:]) == 8


def test_a_fault_that_concerns_all_ends_all_callers(world, capfd):
    one = world()
    callers = [one.connect() for _ in range(2)]
    one.service.callers.fail(ValueError("x"))
    assert all(map(one.closed, callers))
    assert len(one.service.callers) == 0
    assert "Internal error in the inspection: ValueError: x" in capfd.readouterr().err


def test_a_fault_of_ours_ends_one_caller_only(world, capfd):
    one = world()
    one.service._methods[f"{PROXY}.Status"] = lambda _call: 1 // 0
    caller, other = one.connect(), one.connect()
    one.ask(caller, f"{PROXY}.Status")
    assert one.closed(caller)
    assert not one.closed(other)
    assert "Internal error in the inspection: ZeroDivisionError" in capfd.readouterr().err


# ── List ──────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_to_list(world):
    one = world()
    assert one.call(f"{PROXY}.List", more=True) == error(f"{PROXY}.NoSuchConnection")


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 128, 1000])
def test_all_connections_are_listed_once(world, count):
    one = world()
    one.relay.infos = [connection_info(n) for n in range(1, count + 1)]
    assert [row["id"] for row in one.listed()] == list(range(1, count + 1))


def test_a_row(world):
    one = world()
    half = HalfInfo(10, 3, "draining")
    one.relay.infos = [
        connection_info(
            5,
            state="lingering",
            client=sockaddr.pack_inet6("::ffff:10.0.0.1", 5000),
            client_pid=77,
            target=sockaddr.pack_unix(b"/run/\xff"),
            local=sockaddr.pack_inet("10.0.0.2", 81),
            opened_ms=START_MS - 2000,
            active_ms=START_MS - 500,
            held_ms=20,
            connect_us=120,
            up=half,
            thread=2,
        )
    ]
    (row,) = one.listed()
    since = row.pop("sinceUSec")
    assert since > 1_700_000_000_000_000
    assert row == {
        "id": 5,
        "state": "lingering",
        "listener": LISTENER,
        "client": "10.0.0.1:5000",
        "clientPID": 77,
        "target": TARGET,
        "targetAddress": "/run/\\xff",
        "localAddress": "10.0.0.2:81",
        "ageUSec": 2_020_000,
        "idleUSec": 500_000,
        "heldUSec": 20_000,
        "connectUSec": 120,
        "up": {"bytes": 10, "inFlight": 3, "state": "draining", "datagrams": None},
        "down": {"bytes": 0, "inFlight": 0, "state": "flowing", "datagrams": None},
        "thread": 2,
    }
    fields = re.search(r"type Connection \((.*?)^\)", TEXTS[PROXY], re.DOTALL | re.MULTILINE)[1]
    assert set(re.findall(r"^  (\w+):", fields, re.MULTILINE)) == {*row, "sinceUSec"}


def test_what_is_not_known_is_null(world):
    one = world()
    one.relay.infos = [connection_info(5, local=sockaddr.from_socket_name(socket.AF_UNIX, ""))]
    (row,) = one.listed()
    null = {"clientPID", "targetAddress", "localAddress", "heldUSec", "connectUSec"}
    assert {name for name, value in row.items() if value is None} == null
    assert row["client"] == ""


def test_held_clients_are_listed(world):
    one = world()
    client, _ = one.hold(since_ms=START_MS - 300)
    one.relay.infos = [connection_info(1)]
    rows = one.listed()
    assert [row["state"] for row in rows] == ["open", "held"]
    assert rows[1]["id"] == client.id > 0
    assert rows[1]["heldUSec"] == 300_000
    assert rows[1]["target"] == TARGET
    assert [row["id"] for row in one.listed(state="open")] == [1]
    assert [row["state"] for row in one.listed(state="held", target=TARGET)] == ["held"]
    assert one.call(f"{PROXY}.List", more=True, target="/other") == error(
        f"{PROXY}.NoSuchConnection"
    )
    wrong = error(f"{SERVICE}.InvalidParameter", parameter="state")
    assert one.call(f"{PROXY}.List", more=True, state="closed") == wrong


@pytest.mark.parametrize("told", [True, False])
def test_a_client_whose_connect_fails_meanwhile_is_listed_once(world, told):
    """The relay may have told of it, or it may have left the relay before."""
    one = world()
    caller = one.connect()
    one.relay.infos = [connection_info(4, state="connecting")] if told else []
    one.ask(caller, f"{PROXY}.List", more=True)
    for fd in list(one.callers._by_fd):
        one.loop._handlers[fd](5)
    for _ in range(3):
        one.callers.step(one.relay.now_ms)  # the snapshot has begun, and no row has come
    assert one.relay.snapshots == 1
    one.relay.now_ms += 5
    one.hold(since_ms=START_MS - 3, connection=4)
    one.hold(since_ms=START_MS + 5)  # this one came later
    rows = [reply["parameters"]["connection"] for reply in one.replies(caller)]
    assert [row["id"] for row in rows] == [4]


def test_what_cannot_be_listed_is_an_error_after_the_others(world):
    one = world()
    one.relay.infos = [connection_info(n) for n in range(3)]
    one.relay.missing = 2
    *rows, last = one.call(f"{PROXY}.List", more=True)
    assert [row["parameters"]["connection"]["id"] for row in rows] == [0, 1, 2]
    assert [last] == error(f"{PROXY}.Incomplete", missing=2)
    one.relay.infos = []
    assert one.call(f"{PROXY}.List", more=True) == error(f"{PROXY}.Incomplete", missing=2)


def test_clients_without_a_header_are_listed_and_terminated(world):
    one = world()
    peer = sockaddr.pack_inet("192.0.2.7", 5000)
    sender = Sender(one.listener, 9, peer, START_MS - 2000 + HEADER_MS)
    sender.id, sender.target = 7, TARGET
    one.acceptor.header_reader = Reader([sender])
    one.hold()
    (row,) = one.listed(state="header")
    about = {"id": 7, "state": "header", "client": "192.0.2.7:5000", "target": TARGET}
    assert row.items() >= about.items()
    assert (row["ageUSec"], row["heldUSec"], row["listener"]) == (2_000_000, None, LISTENER)
    assert [one["state"] for one in one.listed()] == ["header", "held"]
    assert one.call(f"{PROXY}.Terminate", id=8) != [{"parameters": {}}]
    assert one.call(f"{PROXY}.Terminate", id=7) == [{"parameters": {}}]


class Reader(list):
    """Stands in for a HeaderReader."""

    def terminate(self, connection):
        return connection == 7


def test_held_clients_are_listed_in_pieces(world, monkeypatch):
    """Even if they have left by the time that their turn comes."""
    one = world()
    clients = [one.hold()[0] for _ in range(200)]
    caller = one.connect()
    one.ask(caller, f"{PROXY}.List", more=True)
    made = []
    held = RowMaker.waiting
    monkeypatch.setattr(RowMaker, "waiting", lambda *args: made.append(0) or held(*args))
    most = 0
    while not one.callers._by_fd or len(made) < 200:
        before = len(made)
        for fd in list(one.callers._by_fd):
            one.loop._handlers[fd](5)
        for one_caller in list(one.callers._by_fd.values()):
            one_caller.step(one.relay.now_ms)
        for event in one.relay.answers:
            one.service.handle(event)
        one.relay.answers = []
        most = max(most, len(made) - before)
        if len(made) == ROWS_MAX:
            one.upstream.drop_all()
    assert most == ROWS_MAX
    rows = [reply["parameters"]["connection"] for reply in one.replies(caller)]
    assert [row["id"] for row in rows] == [client.id for client in clients]
    assert {row["clientPID"] for row in rows} == {os.getpid()}


def test_a_snapshot_forgets_the_callers_that_have_left(world):
    one = world()
    one.relay.infos = [connection_info(n) for n in range(1000)]
    callers = [one.connect() for _ in range(3)]
    for caller in callers:
        one.ask(caller, f"{PROXY}.List", more=True)
    for fd in list(one.callers._by_fd):
        one.loop._handlers[fd](5)
    while len(one.callers._ready):
        one.callers.step(one.relay.now_ms)
    snapshots = one.service._snapshots
    snapshot = snapshots._running
    one.callers.close_all()
    assert snapshot.wakes == []
    assert snapshots._next is None
    assert one.service._passes._running is None


def test_callers_that_come_meanwhile_share_the_next_snapshot(world, monkeypatch):
    monkeypatch.setattr(callers_module, "TURN_S", 60)  # all in one turn, on any machine
    one = world()
    one.relay.infos = [connection_info(n) for n in range(5)]
    callers = [one.connect() for _ in range(6)]
    for caller in callers:
        one.ask(caller, f"{PROXY}.List", more=True)
    assert [len(one.replies(caller)) for caller in callers] == [5] * 6
    assert one.relay.snapshots == 2


# ── Watch ─────────────────────────────────────────────────────────────────────────────────────────


def test_begins_and_ends_are_reported(world):
    one = world()
    caller = one.connect()
    one.ask(caller, f"{PROXY}.Watch", more=True)
    assert one.replies(caller) == []
    assert one.relay.report_begins
    assert one.relay.report_ends
    info = connection_info(9)
    one.service.handle(Begun(info))
    one.service.handle(Ended(9, "reset", 1, 2, 3, 0, 0, info))
    begin, end = one.replies(caller)
    assert begin["continues"]
    assert end["continues"]
    assert begin["parameters"]["event"] == "begin"
    assert begin["parameters"]["connection"]["id"] == 9
    assert "how" not in begin["parameters"]
    assert end["parameters"]["event"] == "end"
    assert end["parameters"]["how"] == "reset"
    caller.close()
    one.callers.close_all()
    assert not one.relay.report_begins
    assert not one.relay.report_ends


def events_of(one, caller):
    """[(event, state, id, how)]"""
    found = []
    for reply in one.replies(caller):
        told = reply["parameters"]
        row = told["connection"]
        found.append((told["event"], row["state"], row["id"], told.get("how")))
    return found


def test_held_clients_begin_and_end(world):
    one = world()
    earlier, _ = one.hold()
    caller = one.connect()
    one.ask(caller, f"{PROXY}.Watch", more=True)
    assert one.replies(caller) == []
    failed, cut, left, served = clients = [one.hold() for _ in range(4)]
    assert events_of(one, caller) == [("begin", "held", client.id, None) for client, _ in clients]
    one.upstream.held.give_up(failed[0], "why")
    one.upstream.held.terminate(cut[0])
    left[1].close()
    one.upstream.held._hung_up(left[0])
    one.relay.dialled[3] = 0
    one.upstream.held.serve(served[0], 3, 0, 0)
    one.upstream.held.give_up(earlier, "why")
    assert events_of(one, caller) == [
        ("end", "held", failed[0].id, "failed"),
        ("end", "held", cut[0].id, "cut"),
        ("end", "held", left[0].id, "client gone"),
        ("end", "held", earlier.id, "failed"),
    ]


def test_a_client_whose_connect_has_failed_does_not_begin_again(world):
    """The relay has told of it."""
    one = world()
    caller = one.connect()
    one.ask(caller, f"{PROXY}.Watch", more=True)
    one.settle()
    client, _ = one.hold(connection=6)
    one.upstream.held.remove(client)
    one.upstream.held.add(client)  # its connect has failed once more
    assert one.replies(caller) == []
    one.upstream.held.cut_all()
    assert events_of(one, caller) == [("end", "held", 6, "cut")]


def test_a_watcher_that_does_not_read_is_dropped_alone(world):
    one = world()
    slow, quick = one.connect(), one.connect()
    for caller in (slow, quick):
        one.ask(caller, f"{PROXY}.Watch", more=True)
    one.settle()
    seen = 0
    for n in range(4 * UNREAD_MAX // 400):
        one.service.handle(Begun(connection_info(n)))
        seen += len(one.replies(quick))
    assert seen == 4 * UNREAD_MAX // 400
    assert len(one.callers) == 1
    assert one.relay.report_begins


# ── Terminate ─────────────────────────────────────────────────────────────────────────────────────


def test_a_connection_is_terminated(world):
    one = world()
    one.relay.infos = [connection_info(3)]
    assert one.call(f"{PROXY}.Terminate", id=3) == [{"parameters": {}}]
    assert one.call(f"{PROXY}.Terminate", id=4) == error(f"{PROXY}.NoSuchConnection")
    assert one.relay.terminated == [3, 4]


@pytest.mark.parametrize("number", [0, -5, -(2**63)])
def test_ids_that_no_connection_can_have(world, number):
    one = world()
    assert one.call(f"{PROXY}.Terminate", id=number) == error(f"{PROXY}.NoSuchConnection")
    assert one.relay.terminated == []


def test_a_held_client_is_terminated(world):
    one = world()
    client, ours = one.hold()
    other, _ = one.hold()
    assert one.call(f"{PROXY}.Terminate", id=client.id) == [{"parameters": {}}]
    assert list(one.upstream.held) == [other]
    assert one.upstream.held.cut == 1
    assert ours.recv(1) == b""


# ── Status and metrics ────────────────────────────────────────────────────────────────────────────


def test_status(world):
    one = world()
    one.relay.connections = 4
    one.hold()
    one.upstream.outage.fail("why", START_MS - 1000, 1, cold=False, denied=False)
    (answer,) = one.call(f"{PROXY}.Status")
    status = answer["parameters"]
    assert status["version"] == __version__
    assert status["pid"] == os.getpid()
    assert (status["open"], status["held"], status["threads"]) == (4, 1, 1)
    assert status["limits"] == {
        "connectionsMax": 256,
        "connectionsMaxPerSource": None,
        "threadsMax": 3,
        "callersMax": 64,
    }
    assert status["listeners"] == [
        {
            "name": "web",
            "address": LISTENER,
            "kind": "stream",
            "target": TARGET,
            "accepting": True,
        }
    ]
    assert (status["flows"], status["datagrams"]) == (0, None)
    (target,) = status["targets"]
    assert target.pop("downSinceUSec") - status["startedUSec"] == 4_000_000
    assert target == {
        "target": TARGET,
        "kind": "stream",
        "up": False,
        "reason": "why",
        "held": 1,
        "served": 0,
        "failed": 0,
    }


def metrics(one):
    """{(name, fields): value} of all metrics."""
    found = {}
    names = []
    for reply in one.call(f"{METRICS}.List", more=True):
        metric = reply["parameters"]
        fields = tuple(sorted((metric["fields"] or {}).items()))
        key = metric["name"].removeprefix("net.socketproxyd."), *fields
        assert key not in found
        assert isinstance(metric["value"], int)
        names.append(metric["name"])
        found[key] = metric["value"]
    described = [one["parameters"] for one in one.call(f"{METRICS}.Describe", more=True)]
    assert sorted(set(names)) == [family["name"] for family in described]
    assert names == sorted(names)  # a family stays together
    assert {family["type"] for family in described} <= {"counter", "gauge"}
    return found


def test_metrics(world):
    one = world()
    one.relay.connections, one.relay.accepted, one.relay.refused = 4, 30, 5
    one.relay.refused_by_source = 3
    one.relay.bytes_to_targets, one.relay.bytes_to_clients = 100, 200
    one.relay.endings = {"ended": 7, "cut": 2}
    one.upstream.held.failed = 6
    one.upstream.held.cut = 1
    one.upstream.served = 9
    served, _ = one.hold(since_ms=START_MS - 70)
    one.relay.dialled[3] = 0
    one.upstream.held.serve(served, 3, 0, 0)
    one.relay.connections = 4
    one.hold()
    one.relay.connects = (1, 2, *one.relay.connects[2:-1], 3)
    one.relay.connect_us = 999
    found = metrics(one)
    target = ("target", TARGET)
    expected = {
        ("Accepted",): 30,
        ("Open",): 4,
        ("Refused",): 6,
        ("RefusedBySource",): 3,
        ("RefusedWithoutHeader",): 2,
        ("AwaitingHeader",): 4,
        ("BytesToTargets",): 100,
        ("BytesToClients",): 200,
        ("ConnectionsMax",): 256,
        ("ConnectionsMaxPerSource",): 0,
        ("Threads",): 1,
        ("Ended", ("how", "ended")): 7,
        ("Ended", ("how", "cut")): 3,
        ("Ended", ("how", "reset")): 0,
        ("Failed", target): 6,
        ("Held", target): 1,
        ("Served", target): 9,
        ("Up", target): 1,
        ("HeldUSecBucket", ("le", "50000"), target): 0,
        ("HeldUSecBucket", ("le", "100000"), target): 1,
        ("HeldUSecBucket", ("le", "+Inf"), target): 1,
        ("HeldUSecCount", target): 1,
        ("HeldUSecSum", target): 70_000,
        ("TargetBytesUp", target): 100,
        ("TargetBytesDown", target): 200,
        ("TargetEnded", ("how", "ended"), target): 7,
        ("ConnectUSecBucket", ("le", str(CONNECT_BUCKETS_US[0])), target): 1,
        ("ConnectUSecBucket", ("le", str(CONNECT_BUCKETS_US[1])), target): 3,
        ("ConnectUSecBucket", ("le", "+Inf"), target): 6,
        ("ConnectUSecCount", target): 6,
        ("ConnectUSecSum", target): 999,
    }
    assert {key: found[key] for key in expected} == expected
    assert len([key for key in found if key[0] == "HeldUSecBucket"]) == len(WAIT_BUCKETS_MS) + 1


def test_metrics_are_made_in_pieces(world, monkeypatch):
    """A proxy with many targets is not kept by one caller."""
    one = world()
    for number in range(100):
        target = parse_target(f"/run/target{number}")
        one.service._upstreams.append(Upstream(one.loop, None, target, 0, None))
    sizes = []
    send = caller_module.Caller._send

    def note(self, now_ms):
        sizes.append(self._output.count(b"\0"))
        return send(self, now_ms)

    monkeypatch.setattr(caller_module.Caller, "_send", note)
    found = metrics(one)
    assert len([key for key in found if key[0] == "Failed"]) == 101
    assert max(sizes) <= 64


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_a_caller_that_cannot_be_watched_is_dropped(world, monkeypatch, number):
    one = world()

    def fail(fd, events=1):
        raise OSError(number, "")

    monkeypatch.setattr(one.relay, "watch", fail)
    assert one.closed(one.connect())
