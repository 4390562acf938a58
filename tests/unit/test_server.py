"""When the program ends, what signals do, and what the main loop does meanwhile."""

import errno
import os
import signal
import socket
import threading

import pytest
from kit.fake_relay import GONE, NO_FDS, STAY, FakeListener, FakeRelay, SleepsForeverError

from proxyd import acceptor as acceptor_module
from proxyd import address as sockaddr
from proxyd import log, workers
from proxyd import server as server_module
from proxyd._relay import AcceptFailed, ConnectFailed, Ended, Ready, WorkersWanted
from proxyd.acceptor import PAUSE_MS, upstream_of
from proxyd.event_loop import EventLoop
from proxyd.listen import Listener
from proxyd.options import Options, milliseconds
from proxyd.server import Server, run
from proxyd.target import parse_target

PATIENCE = 20
"""Seconds after which something that has not happened counts as failed."""

START_MS = 7_000_000

NOTHING_LEFT = (
    "0 open, 0 waiting, 0 refused, 0 failed; "
    "0 bytes to targets, 0 bytes to clients, 0 spliced, 0 copied; none ended"
)
"""The end of the totals of a fake relay, which counts no ends."""


class World:
    """A Server on a fake relay."""

    def __init__(self, monkeypatch, tmp_path):
        self.patch = monkeypatch
        self.relay = FakeRelay(start_ms=START_MS)
        monkeypatch.setattr(server_module, "EventLoop", self.make_loop)
        monkeypatch.setattr(server_module, "signal_fd", self.signal_fd)
        monkeypatch.setattr(server_module, "take_signals", self.take_signals)
        monkeypatch.setattr(acceptor_module, "RelayListener", FakeListener)
        monkeypatch.setattr(log.time, "monotonic", lambda: self.relay.now_ms / 1000)
        self.signals, self.send_signal = os.pipe()
        self.pending_signals = []
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(tmp_path / "notify"))
        self.manager.setblocking(False)
        self.environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "FDSTORE": "0"}
        self.options = Options()
        self.listeners = []

    def make_loop(self, buffer_size):
        loop = EventLoop()
        self.relay.report_ends = loop.relay.report_ends
        loop.relay = self.relay
        return loop

    def signal_fd(self, numbers):
        self.numbers = set(numbers)
        return self.signals

    def take_signals(self):
        arrived, self.pending_signals = self.pending_signals, []
        return arrived

    def listen(self, target, address="/listener", connected=False, fd=-1):
        pack = sockaddr.pack_inet if isinstance(address, tuple) else sockaddr.pack_unix
        packed = pack(*address) if isinstance(address, tuple) else pack(address)
        listener = Listener(1000 + len(self.listeners) if fd < 0 else fd, "x", packed, connected)
        listener.target = parse_target(target) if isinstance(target, str) else target
        self.listeners.append(listener)
        return listener

    def make(self):
        if not self.listeners:
            self.listen("/run/backend")
        self.server = Server(self.options, self.listeners, self.environ)
        return self.server

    def serve(self):
        """Run to the end; the exit status."""
        return self.make().serve()

    def signal(self, number):
        """An action for the script of the relay: a signal arrives."""

        def arrive():
            self.pending_signals.append(number)
            return [Ready(self.signals, 1)]

        return arrive

    @property
    def now_ms(self):
        return self.relay.now_ms - START_MS

    @property
    def notified(self):
        heard = []
        while True:
            try:
                heard += self.manager.recv(4096).decode().splitlines()
            except BlockingIOError:
                return [text for text in heard if not text.startswith("STATUS=")]

    def close(self):
        for fd in (self.signals, self.send_signal):
            os.close(fd)
        self.manager.close()
        if hasattr(self, "server"):
            self.server.notifier.close()


@pytest.fixture
def world(monkeypatch, tmp_path):
    one = World(monkeypatch, tmp_path)
    yield one
    one.close()


# ── idle ──────────────────────────────────────────────────────────────────────────────────────────


def test_it_exits_after_the_idle_time_counted_from_the_start(world):
    world.options.exit_idle_time = 5_000_000
    assert world.serve() == 0
    assert world.now_ms == 5000
    assert world.notified == ["READY=1", "STOPPING=1"]


def test_without_an_idle_time_it_waits_forever(world):
    with pytest.raises(SleepsForeverError):
        world.serve()


def test_the_idle_time_counts_from_the_end_of_the_last_connection(world):
    world.options.exit_idle_time = 5_000_000
    world.relay.at(1000, world.relay.come)
    world.relay.at(4000, world.relay.come)
    world.relay.at(20_000, world.relay.leave)
    world.relay.at(21_000, world.relay.leave)
    assert world.serve() == 0
    assert world.now_ms == 26_000


def test_a_connection_in_between_counts_without_an_event(world):
    """One that comes and goes while the relay runs on by itself."""
    world.environ.clear()
    world.options.exit_idle_time = 5_000_000
    world.relay.at(1000, world.relay.come)
    world.relay.at(4000, world.relay.leave)
    assert world.serve() == 0
    assert world.now_ms == 9000


def test_with_an_idle_time_of_0_the_client_that_started_it_is_served(world):
    world.options.exit_idle_time = 0
    world.relay.backlog = [STAY]
    world.relay.at(60_000, world.relay.leave)
    assert world.serve() == 0
    assert world.relay.accepted == 1
    assert world.now_ms == 60_000


def test_with_an_idle_time_of_0_and_no_client_it_exits_at_once(world):
    world.options.exit_idle_time = 0
    assert world.serve() == 0
    assert world.now_ms == 0


def test_a_client_of_the_last_moment_is_served(world):
    world.options.exit_idle_time = 5_000_000
    world.relay.at(5000, world.relay.come)
    world.relay.at(30_000, world.relay.leave)
    assert world.serve() == 0
    assert world.relay.accepted == 1
    assert world.now_ms == 35_000


class Rested:
    """Stands in for the entrance of the inspection."""

    def __init__(self):
        self.resting = False

    def rest(self):
        self.resting = True

    def resume(self):
        self.resting = False

    def step(self, now_ms):
        pass

    def next_ms(self, now_ms):
        return None

    def close(self):
        pass


def test_after_a_client_of_the_last_moment_callers_are_served_again(world):
    world.options.exit_idle_time = 5_000_000
    inspection = Rested()
    rested = []
    world.relay.at(5000, world.relay.come)
    world.relay.at(6000, lambda: rested.append(inspection.resting))
    world.relay.at(30_000, world.relay.leave)
    server = world.make()
    server.inspection = inspection
    assert server.serve() == 0
    assert rested == [False]
    assert inspection.resting  # it has ended


@pytest.mark.parametrize("exit_idle_time", [0, 5_000_000])
def test_before_an_idle_exit_every_client_is_accepted(world, exit_idle_time):
    """The first in the backlog may have left; those behind it wait all the same."""
    world.options.exit_idle_time = exit_idle_time

    def at_the_last_moment():
        world.relay.backlog += [GONE, GONE, STAY]

    world.relay.at(exit_idle_time // 1000, at_the_last_moment)
    world.relay.at(60_000, world.relay.leave)
    assert world.serve() == 0
    assert world.relay.accepted == 3
    assert world.relay.backlog == []


def test_a_signal_at_the_last_moment_does_not_hide_a_client(world):
    """A batch that has other events for the policy accepts no clients."""
    world.options.exit_idle_time = 0
    world.relay.backlog = [STAY]
    world.relay.at(0, world.signal(signal.SIGUSR1))
    world.relay.at(60_000, world.relay.leave)
    assert world.serve() == 0
    assert world.relay.accepted == 1


@pytest.mark.parametrize("exit_idle_time", [0, 50_000])
def test_a_client_that_cannot_be_accepted_yet_prevents_an_idle_exit(world, exit_idle_time):
    """Without a free fd the client waits for the end of the pause, and so does the program."""
    world.options.exit_idle_time = exit_idle_time
    world.relay.backlog = [NO_FDS]

    def fds_become_free():
        world.relay.backlog = [STAY]

    world.relay.at(3 * PAUSE_MS + 10, fds_become_free)
    world.relay.at(60_000, world.relay.leave)
    assert world.serve() == 0
    assert world.relay.accepted == 1


def test_held_clients_prevent_an_idle_exit(world):
    world.options.exit_idle_time = 1_000_000
    world.options.connect_timeout = 8_000_000
    ours, theirs = socket.socketpair()

    def dial(address, client):
        raise OSError(errno.ENOENT, "")

    world.patch.setattr(world.relay, "dial", dial, False)
    fd = theirs.detach()
    failed = ConnectFailed(0, fd, errno.ENOENT, b"", START_MS + 500, 1)
    world.relay.at(500, lambda: [failed])
    with ours:
        assert world.serve() == 0
        assert ours.recv(1) == b""
    assert world.now_ms == 500 + 8000 + 1000


# ── the connection that was passed in ─────────────────────────────────────────────────────────────


def test_it_exits_with_the_connection_that_was_passed_in(world):
    ours, theirs = socket.socketpair()
    with ours:
        world.listen("/run/backend", connected=True, fd=theirs.detach())
        world.relay.at(7000, world.relay.leave)
        assert world.serve() == 0
    assert world.now_ms == 7000
    assert world.notified == ["READY=1", "STOPPING=1"]


# ── signals ───────────────────────────────────────────────────────────────────────────────────────

STOP = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", STOP)
def test_a_signal_ends_it(world, capfd, number):
    world.relay.at(3000, world.signal(number))
    assert world.serve() == 0
    assert world.now_ms == 3000
    assert world.notified == ["READY=1", "STOPPING=1"]
    assert world.numbers == {*STOP, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
    assert capfd.readouterr().err == ""


def test_without_a_drain_time_connections_are_cut(world, capfd):
    world.relay.at(0, world.relay.come, world.relay.come)
    world.relay.at(3000, world.signal(signal.SIGTERM))
    assert world.serve() == 0
    assert world.now_ms == 3000
    assert world.relay.connections == 0
    assert capfd.readouterr().err.splitlines() == [
        "Stopped; 2 open and 0 waiting connections were cut.",
        f"Totals: 2 accepted, {NOTHING_LEFT}.",
    ]


@pytest.mark.parametrize("drain", [20_000_000, None])
def test_with_a_drain_time_connections_may_finish(world, capfd, drain):
    world.options.drain_timeout = drain
    world.relay.at(0, world.relay.come, world.relay.come)
    world.relay.at(3000, world.signal(signal.SIGTERM))
    world.relay.at(5000, world.relay.leave)
    world.relay.at(14_000, world.relay.leave)
    assert world.serve() == 0
    assert world.now_ms == 14_000
    assert world.notified == [
        "READY=1",
        "STOPPING=1",
        "EXTEND_TIMEOUT_USEC=30000000",
        "EXTEND_TIMEOUT_USEC=30000000",
    ]
    assert capfd.readouterr().err == f"Totals: 2 accepted, {NOTHING_LEFT}.\n"


def test_the_levels_of_a_connection_and_of_the_totals(world, levels):
    world.relay.at(0, world.relay.come, world.relay.leave)
    world.options.exit_idle_time = 5_000_000
    server = world.make()
    server.loop._labels = {}
    server._handle(Ended(1, "ended", 5, 6, 70, 0, 0))
    assert server.serve() == 0
    assert [level for level, _ in levels] == [log.DEBUG, log.INFO]
    assert levels[1][1].startswith("Totals: 1 accepted, ")


def test_after_the_drain_time_connections_are_cut(world, capfd):
    world.options.drain_timeout = 20_000_000
    world.relay.at(0, world.relay.come, world.relay.come)
    world.relay.at(3000, world.signal(signal.SIGTERM))
    world.relay.at(5000, world.relay.leave)
    assert world.serve() == 0
    assert world.now_ms == 23_000
    assert capfd.readouterr().err.splitlines() == [
        "Stopped; 1 open and 0 waiting connections were cut.",
        f"Totals: 2 accepted, {NOTHING_LEFT}.",
    ]


@pytest.mark.parametrize("second", STOP)
@pytest.mark.parametrize("drain", [20_000_000, None])
def test_a_second_signal_ends_it_at_once(world, second, drain):
    world.options.drain_timeout = drain
    world.relay.at(0, world.relay.come)
    world.relay.at(3000, world.signal(signal.SIGTERM))
    world.relay.at(4000, world.signal(second))
    assert world.serve() == 0
    assert world.now_ms == 4000


def test_while_it_stops_no_client_is_accepted(world):
    world.options.drain_timeout = None
    world.relay.at(0, world.relay.come)
    world.relay.at(3000, world.signal(signal.SIGTERM), world.relay.come)
    world.relay.at(9000, world.relay.leave)
    assert world.serve() == 0
    assert world.relay.backlog == [STAY]  # left to the next start


def test_while_it_stops_a_pause_that_ends_changes_nothing(world):
    world.options.drain_timeout = None
    world.relay.at(0, world.relay.come)

    def fds_run_out():
        world.relay.backlog = [NO_FDS]

    world.relay.at(2000, fds_run_out)
    world.relay.at(2010, world.signal(signal.SIGTERM))
    world.relay.at(9000, world.relay.leave)
    assert world.serve() == 0
    assert world.now_ms == 9000
    assert not any(one.accepting for one in world.relay.listeners)


def test_there_is_no_idle_exit_while_it_stops(world):
    world.options.exit_idle_time = 1_000_000
    world.options.drain_timeout = None
    world.relay.at(0, world.relay.come)
    world.relay.at(500, world.signal(signal.SIGTERM))
    world.relay.at(60_000, world.relay.leave)
    assert world.serve() == 0
    assert world.now_ms == 60_000


def test_sigusr1_logs_the_counters_and_nothing_else(world, capfd):
    world.relay.bytes_to_targets = 10
    world.relay.at(0, world.relay.come)
    world.relay.at(3000, world.signal(signal.SIGUSR1))
    with pytest.raises(SleepsForeverError):
        # Otherwise the status would be sent on and on while there is a connection.
        world.environ.clear()
        world.serve()
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("1 accepted, 1 open, 0 waiting, 0 refused, 0 failed; 10 bytes to ")
    assert second == "/run/backend: 0 served, 0 waiting, 0 failed"


def test_sigusr1_counts_the_clients_of_its_own_batch(world, capfd):
    """One that comes with the signal is in the counters already, but not yet with the policy."""
    world.environ.clear()
    ours, theirs = socket.socketpair()
    fd = theirs.detach()
    failed = ConnectFailed(0, fd, errno.ENOENT, b"", START_MS + 500, 1)
    usr1 = world.signal(signal.SIGUSR1)

    def both():
        world.relay.accepted += 1
        return [*usr1(), failed]

    world.relay.at(500, both)
    world.relay.at(501, world.signal(signal.SIGTERM))
    with ours:
        assert world.serve() == 0
    line, last = [line for line in capfd.readouterr().err.splitlines() if " accepted, " in line]
    assert last.startswith("Totals: 1 accepted, 0 open, 0 waiting, ")
    assert line.startswith("1 accepted, 0 open, 1 waiting, 0 refused, 0 failed; ")


def test_a_wake_up_without_a_signal_changes_nothing(world):
    world.relay.at(1000, lambda: [Ready(world.signals, 1)])
    world.relay.at(2000, world.signal(signal.SIGTERM))
    assert world.serve() == 0
    assert world.now_ms == 2000


def test_an_internal_error_cuts_connections(world):
    def break_down():
        raise OSError(errno.EBADF, "broken")

    world.relay.at(0, world.relay.come)
    world.relay.at(1000, break_down)
    world.listen("/run/backend")
    with pytest.raises(OSError, match="broken"):
        run(world.options, world.listeners, {})
    assert world.relay.connections == 0


def test_an_internal_error_cuts_held_clients_too(world):
    def break_down():
        raise OSError(errno.EBADF, "broken")

    ours, theirs = socket.socketpair()
    fd = theirs.detach()
    cut = []
    world.patch.setattr(
        world.relay, "hang_up", lambda fd, reset: (os.close(fd), cut.append((fd, reset))), False
    )
    failed = ConnectFailed(0, fd, errno.ENOENT, b"", START_MS, 1)
    world.relay.at(0, lambda: [failed])
    world.relay.at(5, break_down)
    world.listen("/run/backend")
    with ours, pytest.raises(OSError, match="broken"):
        run(world.options, world.listeners, {})
    assert cut == [(fd, True)]


# ── the exit status ───────────────────────────────────────────────────────────────────────────────


def test_it_fails_when_no_listener_is_left(world, capfd):
    world.relay.at(1000, lambda: [AcceptFailed(0, errno.EINVAL)])
    assert world.serve() == 1
    assert world.now_ms == 1000
    assert "Failed to accept from" in capfd.readouterr().err


def test_it_does_not_fail_before_the_last_connection_has_ended(world):
    world.relay.at(0, world.relay.come)
    world.relay.at(1000, lambda: [AcceptFailed(0, errno.EINVAL)])
    world.relay.at(6000, world.relay.leave)
    assert world.serve() == 1
    # The end of the last connection has woken run().
    assert world.now_ms == 6000


def test_a_listener_that_breaks_while_it_stops_is_no_failure(world):
    world.options.drain_timeout = None
    world.relay.at(0, world.relay.come)
    world.relay.at(
        1000,
        lambda: [*world.signal(signal.SIGTERM)(), AcceptFailed(0, errno.EINVAL)],
    )
    world.relay.at(6000, world.relay.leave)
    assert world.serve() == 0


def test_log_lines_left_out_are_reported_at_the_end(world, capfd):
    log.limited("kind", "First.")
    log.limited("kind", "Second.")
    world.options.exit_idle_time = 0
    world.listen("/run/backend")
    assert run(world.options, world.listeners, {}) == 0
    assert capfd.readouterr().err.splitlines()[-1] == "Second. (last of 1 left out)"


# ── the debug log ─────────────────────────────────────────────────────────────────────────────────


def test_the_end_of_a_connection_is_logged_at_debug_level(world, capfd):
    log.setup({"SYSTEMD_LOG_LEVEL": "debug"})
    server = world.make()
    server.loop._labels[7] = "1.2.3.4:5 → /run/backend"
    server._handle(Ended(7, "ended", 10, 20, 30, 0, 0))
    assert "1.2.3.4:5 → /run/backend: 10 bytes up, 20 bytes down in 30 ms, ended.\n" in (
        capfd.readouterr().err
    )
    assert server.loop._labels == {}


def test_the_end_of_a_connection_that_is_cut_is_logged_at_debug_level(world, capfd):
    log.setup({"SYSTEMD_LOG_LEVEL": "debug"})
    world.relay.at(0, world.relay.come)
    world.relay.at(1000, world.signal(signal.SIGTERM))
    server = world.make()
    server.loop._labels[1] = "1.2.3.4:5 → /run/backend"
    assert server.serve() == 0
    assert "1.2.3.4:5 → /run/backend: 5 bytes up, 6 bytes down in 70 ms, cut.\n" in (
        capfd.readouterr().err
    )


# ── upstreams and options ─────────────────────────────────────────────────────────────────────────


def test_listeners_of_one_target_share_an_upstream(world):
    plain = parse_target("127.0.0.1:80")
    for number in range(3):
        world.listen(plain, f"/listener{number}")
    server = world.make()
    assert len(server.upstreams) == 1
    assert {one.upstream for one in server.acceptor.listeners} == set(server.upstreams)


def test_any_port_makes_an_upstream_for_each_port(world):
    world.patch.setattr(acceptor_module, "what_to_check", lambda listener: 0)  # needs real ones
    target = parse_target("127.0.0.1:*")
    for port in (80, 443, 80):
        world.listen(target, ("127.0.0.1", port))
    server = world.make()
    assert [one.text for one in server.upstreams] == ["127.0.0.1:80", "127.0.0.1:443"]


def test_another_port_of_a_client_has_an_upstream_made_for_it(world):
    world.patch.setattr(acceptor_module, "what_to_check", lambda listener: 0)
    target = parse_target("127.0.0.1:*")
    for port in (80, 443):
        world.listen(target, ("127.0.0.1", port))
    server = world.make()
    own = sockaddr.pack_inet("198.51.100.1", 8443)
    world.patch.setattr(acceptor_module, "socket_names", lambda fd: (b"", own))
    one, other = server.acceptor.listeners
    assert upstream_of(one, 7) is upstream_of(other, 7) is server.upstreams[2]
    own = sockaddr.pack_inet("198.51.100.1", 443)
    assert upstream_of(one, 7) is other.upstream
    assert [one.text for one in server.upstreams] == [
        "127.0.0.1:80",
        "127.0.0.1:443",
        "127.0.0.1:8443",
    ]
    ours, theirs = socket.socketpair()
    with ours:
        own = sockaddr.pack_inet("198.51.100.1", 8443)
        event = ConnectFailed(0, theirs.detach(), errno.ECONNREFUSED, b"", START_MS, 1)
        server._handle(event)
        assert [len(one.held) for one in server.upstreams] == [0, 0, 1]
        assert server.acceptor._held() == 1
        server.upstreams[2].drop_all()


def test_a_failed_connect_goes_back_to_its_upstream(world):
    world.listen(parse_target("/run/one"))
    world.listen(parse_target("/run/two"), "/other")
    server = world.make()
    ours, theirs = socket.socketpair()
    with ours:
        server._handle(ConnectFailed(1, theirs.detach(), errno.ENOENT, b"", START_MS, 1))
        assert [len(one.held) for one in server.upstreams] == [0, 1]
        server.upstreams[1].drop_all()


def test_a_literal_address_needs_no_resolver(world):
    assert world.make().resolver is None


def test_time_spans_are_rounded_up():
    assert [milliseconds(usec) for usec in (None, 0, 1, 1000, 1001)] == [None, 0, 1, 1, 2]


def test_the_relay_gets_the_idle_timeout(world):
    world.options.idle_timeout = 1_500_000
    world.make()
    assert world.relay.idle_ms == 1500


def test_without_an_idle_timeout_the_relay_gets_none(world):
    world.make()
    assert world.relay.idle_ms == 0


# ── on real sockets ───────────────────────────────────────────────────────────────────────────────


def test_a_real_connection(monkeypatch, tmp_path):
    no_signals, writer = os.pipe()
    monkeypatch.setattr(server_module, "signal_fd", lambda numbers: no_signals)
    with socket.socket() as listening, socket.socket(socket.AF_UNIX) as backend:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        backend.bind(str(tmp_path / "backend"))
        backend.listen()
        backend.settimeout(PATIENCE)
        got = []

        def answer():
            served, _ = backend.accept()
            with served:
                served.settimeout(PATIENCE)
                while data := served.recv(65536):
                    got.append(data)
                served.sendall(b"reply")

        thread = threading.Thread(target=answer)
        thread.start()
        client = socket.create_connection(listening.getsockname(), PATIENCE)
        client.sendall(b"request")
        client.shutdown(socket.SHUT_WR)
        name = sockaddr.pack_inet(*listening.getsockname())
        listener = Listener(listening.fileno(), "x", name)
        listener.target = parse_target(str(tmp_path / "backend"))
        options = Options()
        options.exit_idle_time = 0
        assert run(options, [listener], {}) == 0
        thread.join(PATIENCE)
        with client:
            assert client.recv(100) == b"reply"
            assert client.recv(100) == b""
        assert b"".join(got) == b"request"
    os.close(no_signals)
    os.close(writer)


# ── threads ───────────────────────────────────────────────────────────────────────────────────────


def test_workers_start_when_the_relay_wants_them(world):
    """The relay reads in /proc/stat how idle the machine is."""
    world.options.threads = 4
    world.options.exit_idle_time = 5_000_000
    server = world.make()
    seen = []
    (stat,) = world.relay.stats
    assert os.readlink(f"/proc/self/fd/{stat}") == "/proc/stat"
    os.close(stat)
    assert world.relay.thread_count == 1
    world.relay.at(1000, lambda: [WorkersWanted()])
    world.relay.at(2000, lambda: seen.append(world.relay.thread_count))
    assert server.serve() == 0
    assert seen == [4]


def test_workers_start_at_once_with_hand_over_always(world):
    world.options.threads = 4
    world.options.always_hand_over = True
    world.make()
    assert world.relay.thread_count == 4
    assert world.relay.stats == []


def test_one_thread_needs_no_rule(world):
    world.options.always_hand_over = True
    world.make()
    assert world.relay.thread_count == 1
    assert world.relay.stats == []


def test_a_single_connection_needs_one_thread(world):
    world.options.threads = 4
    world.options.always_hand_over = True
    world.listen("/run/backend", connected=True, fd=os.open("/dev/null", os.O_RDONLY))
    world.make()
    assert world.relay.thread_count == 1


def test_fewer_threads_where_they_are_refused(world, capfd):
    world.options.threads = 4
    world.options.exit_idle_time = 5_000_000
    world.relay.threads_max = 3
    world.relay.at(1000, lambda: [WorkersWanted()])
    assert world.serve() == 0
    os.close(*world.relay.stats)
    assert world.relay.thread_count == 3
    assert capfd.readouterr().err == (
        "Failed to start a relay thread: Resource temporarily unavailable. Going on with 3 of 4.\n"
    )


def test_without_proc_stat_a_cpu_counts_as_idle(world, monkeypatch):
    def refuse(path, flags):
        raise FileNotFoundError(errno.ENOENT, "", path)

    monkeypatch.setattr(workers.posix, "open", refuse)
    world.options.threads = 2
    world.make()
    assert world.relay.stats == [-1]


# ── --listen= ─────────────────────────────────────────────────────────────────────────────────────


def test_it_logs_its_own_listeners_but_not_those_of_the_service_manager(world, capfd):
    world.listen("/run/backend", "/theirs")
    world.listen("/run/backend", "@ours")
    world.listen("/run/backend", "/ours")
    world.options.listen = [None, None]  # the last two
    world.options.exit_idle_time = 0
    assert world.serve() == 0
    assert capfd.readouterr().err == "Listening on @ours.\nListening on /ours.\n"
