"""Signals, the end of the program, and what happens to open connections."""

import re
import signal
import socket
import time

import pytest
from kit.differences import differs
from kit.socket_state import is_quiet
from kit.sockets import read_exactly, read_to_end
from kit.traffic import Payload, expected, greet, receive_digest, send_payload
from kit.waiting import never_within, wait_until

MIB = 1 << 20

killed = differs("original", reason="has no handler: the signal kills it, without STOPPING=1")
no_drain = differs("original", reason="has no --drain-timeout=", run=False)
both_signals = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@killed
@both_signals
def test_clean_end(stage, number):
    """SIGTERM and SIGINT end the program with exit status 0, after STOPPING=1."""
    stage.launch(stage.echo(), listeners=[stage.listener()])
    greet(stage.connect())
    stage.proxy.send_signal(number)
    assert stage.proxy.wait() == 0
    stage.proxy.notify.wait_for("STOPPING=1")


@killed
@both_signals
def test_clean_end_without_clients(stage, number):
    """The same for a program that has not had a client."""
    stage.launch(stage.echo(), listeners=[stage.listener()])
    if not stage.is_ours:
        greet(stage.connect())
    stage.proxy.send_signal(number)
    assert stage.proxy.wait() == 0


def test_backlog_stays_with_the_service_manager(stage):
    """A client that comes after the stop is not refused: the next start serves it."""
    listener, target = stage.listener(), stage.echo()
    stage.launch(target, listeners=[listener])
    greet(stage.connect())
    stage.proxy.send_signal(signal.SIGTERM)
    stage.proxy.wait()
    waiting = stage.connect(listener)
    waiting.sendall(b"hello")
    stage.launch(target, listeners=[listener])
    assert read_exactly(waiting, 5) == b"hello"


@differs("original", reason="SIGUSR1 kills it")
def test_counters(stage):
    """SIGUSR1 writes the counters to the log: connections and bytes, exactly."""
    stage.launch("-c1", stage.echo(), listeners=[stage.listener()])
    client = stage.connect()
    client.sendall(b"x" * 4321)
    assert read_exactly(client, 4321)
    assert read_to_end(stage.connect())[0] == b""
    stage.proxy.send_signal(signal.SIGUSR1)
    stage.proxy.wait_for_log(" accepted, ")
    (said,) = stage.proxy.log_lines(" accepted, ")
    for word in ("open", "refused", "failed", "spliced", "copied"):
        assert word in said
    assert len(re.findall(r"\b4321\b|\b4\.2K", said)) >= 2
    greet(client)


@differs("original", reason="SIGUSR1 kills it")
def test_many_counter_signals(stage):
    """A hundred SIGUSR1 in a row do not disturb a connection."""
    stage.launch(stage.echo(), listeners=[stage.listener()])
    client = stage.connect()
    for _ in range(100):
        stage.proxy.send_signal(signal.SIGUSR1)
        greet(client)


@differs("original", reason="dies of SIGPIPE unless its parent ignores it", always=False)
def test_sigpipe_that_the_parent_does_not_ignore(stage):
    """With the default SIGPIPE, as from a shell, a write to a closed peer is survived."""
    backend = stage.forward("unix", "unix", sigpipe_ignored=False)
    for _ in range(50):
        client = stage.connect()
        server = backend.accept()
        server.close()
        try:
            for _ in range(3):
                client.sendall(b"x" * 1000)
        except OSError:
            pass
        client.close()
    client, server = stage.connect(), backend.accept()
    client.sendall(b"alive")
    assert read_exactly(server, 5) == b"alive"


@no_drain
class TestDrain:
    """--drain-timeout= is how long open connections may go on after SIGTERM."""

    @both_signals
    def test_open_connections_may_finish(self, stage, number):
        """A transfer is completed; then the program exits at once, with status 0."""
        client, server = stage.pair("tcp4", "tcp4", "--drain-timeout=1h")
        client.sendall(b"request")
        assert read_exactly(server, 7) == b"request"
        stage.proxy.send_signal(number)
        stage.proxy.notify.wait_for("STOPPING=1")
        payload = Payload(8 * MIB)
        sending = send_payload(server, payload)
        assert receive_digest(client).result() == expected(payload)
        sending.result()
        assert not stage.proxy.has_ended()
        client.close()
        assert stage.proxy.wait() == 0

    def test_no_client_is_accepted_any_more(self, stage):
        """A client that comes while the others finish stays in the backlog."""
        backend = stage.forward("tcp4", "tcp4", "--drain-timeout=1h")
        client, server = stage.connect(), backend.accept()
        stage.proxy.send_signal(signal.SIGTERM)
        stage.proxy.notify.wait_for("STOPPING=1")
        late = stage.connect()
        late.sendall(b"hello")
        backend.listener.settimeout(0.3)
        with pytest.raises(TimeoutError):
            backend.listener.accept()
        assert is_quiet(late)
        client.close()
        server.close()
        assert stage.proxy.wait() == 0
        assert is_quiet(late)

    def test_stop_timeout_is_extended(self, stage):
        """EXTEND_TIMEOUT_USEC= is sent while connections finish, so that nothing kills it."""
        stage.pair("tcp4", "tcp4", "--drain-timeout=1h")
        stage.proxy.send_signal(signal.SIGTERM)
        values = stage.proxy.notify.values
        wait_until(lambda: values("EXTEND_TIMEOUT_USEC"), "EXTEND_TIMEOUT_USEC=")
        assert all(int(value) > 0 for value in values("EXTEND_TIMEOUT_USEC"))
        assert stage.proxy.cpu_share(0.3) < 0.2
        stage.proxy.send_signal(signal.SIGTERM)
        assert stage.proxy.wait() == 0

    @both_signals
    def test_second_signal_ends_at_once(self, stage, number):
        """A second signal of either kind ends the wait, with exit status 0 all the same."""
        client, _ = stage.pair("tcp4", "tcp4", "--drain-timeout=1h")
        stage.proxy.send_signal(signal.SIGTERM)
        stage.proxy.notify.wait_for("STOPPING=1")
        never_within(0.2, stage.proxy.has_ended, "the end while a connection is open")
        stage.proxy.send_signal(number)
        assert stage.proxy.wait() == 0
        read_to_end(client)

    def test_connections_are_cut_after_the_drain_timeout(self, stage):
        """The rest is cut, and counted in the log; the exit status is 0."""
        start = time.monotonic()
        backend = stage.forward("tcp4", "tcp4", "--drain-timeout=300ms")
        clients = [stage.connect() for _ in range(3)]
        for _ in clients:
            backend.accept()
        stage.proxy.send_signal(signal.SIGTERM)
        assert stage.proxy.wait() == 0
        assert time.monotonic() - start >= 0.3
        assert any("3" in line for line in stage.proxy.log_lines())

    def test_without_a_span_connections_are_cut(self, stage):
        """By default SIGTERM does not wait for open connections."""
        client, _ = stage.pair("tcp4", "tcp4")
        stage.proxy.send_signal(signal.SIGTERM)
        assert stage.proxy.wait() == 0
        read_to_end(client)


class TestIdleExit:
    """--exit-idle-time= ends a program that is not used any more."""

    @differs("original", reason="counts only from the end of the first connection")
    def test_from_the_start(self, stage):
        """A program that is never used ends too."""
        stage.launch("--exit-idle-time=200ms", stage.echo(), listeners=[stage.listener()])
        assert stage.proxy.wait() == 0

    def test_after_the_last_connection(self, stage):
        """After the last connection has ended, and not before."""
        stage.launch("--exit-idle-time=200ms", stage.echo(), listeners=[stage.listener()])
        first, second = stage.connect(), stage.connect()
        greet(first)
        greet(second)
        first.close()
        never_within(0.5, stage.proxy.has_ended, "the end while a connection is open")
        greet(second)
        second.close()
        assert stage.proxy.wait() == 0

    def test_a_new_connection_restarts_the_timer(self, stage):
        """A program that is used again and again, with shorter pauses, does not exit."""
        stage.launch("--exit-idle-time=2s", stage.echo(), listeners=[stage.listener()])
        for _ in range(6):
            client = stage.connect()
            greet(client)
            client.close()
            never_within(0.4, stage.proxy.has_ended, "the end between two uses")

    @differs("original-252", reason="exits without STOPPING=1", always=False)
    def test_stopping_is_notified(self, stage):
        """An idle exit sends STOPPING=1 as well."""
        stage.launch("--exit-idle-time=100ms", stage.echo(), listeners=[stage.listener()])
        client = stage.connect()
        greet(client)
        client.close()
        assert stage.proxy.wait() == 0
        stage.proxy.notify.wait_for("STOPPING=1")

    @differs("original", reason="a span of 0 is not an exit after the first use", always=False)
    @pytest.mark.parametrize("span", ["0", "1us", "1ms"])
    def test_the_client_that_started_it_is_served(self, stage, span):
        """However short the time, clients in the backlog at the start are served first."""
        for _ in range(5):
            listener, target = stage.listener(), stage.echo()
            clients = [stage.connect(listener) for _ in range(3)]
            proxy = stage.launch(
                f"--exit-idle-time={span}", target, listeners=[listener], wait=False
            )
            for client in clients:
                greet(client)
            assert not proxy.has_ended()
            for client in clients:
                client.shutdown(socket.SHUT_WR)
                assert read_to_end(client) == (b"", "eof")
                client.close()
            assert proxy.wait() == 0

    def test_infinity_means_no_exit(self, stage):
        """With `infinity`, the default, there is no idle exit."""
        stage.launch("--exit-idle-time=infinity", stage.echo(), listeners=[stage.listener()])
        client = stage.connect()
        greet(client)
        client.close()
        never_within(0.5, stage.proxy.has_ended, "the end")

    @pytest.mark.parametrize("listen", ["tcp4", "unix"])
    def test_no_client_is_lost_at_the_exit(self, stage, listen):
        """Clients that come while the program exits and is restarted repeatedly are all served.

        A service manager does this with the socket of a service that is idle now and then.
        """
        listener, target = stage.listener(listen), stage.echo()
        starts = 0
        proxy = None
        for number in range(40):
            client = stage.connect(listener)
            client.sendall(b"hello")
            if proxy is None or proxy.has_ended():
                proxy = stage.launch(
                    "--exit-idle-time=5ms", target, listeners=[listener], wait=False
                )
                starts += 1
            while not client_is_answered(client):
                if proxy.has_ended():
                    proxy = stage.launch(
                        "--exit-idle-time=5ms", target, listeners=[listener], wait=False
                    )
                    starts += 1
            assert read_exactly(client, 5) == b"hello"
            client.close()
            if number % 8 < 7:
                time.sleep(0.001 * (number % 8))  # the rhythm of the clients, around the idle time
            else:
                proxy.wait()
        assert starts >= 5


def client_is_answered(client):
    """Wait up to 50 ms for something to read."""
    client.settimeout(0.05)
    try:
        return bool(client.recv(1, socket.MSG_PEEK)) or pytest.fail("connection was dropped")
    except TimeoutError:
        return False
    finally:
        client.settimeout(15)
