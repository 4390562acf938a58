"""Flows of datagrams: how many there are, how long they last, and how the program ends."""

import fcntl
import resource
import select
import signal
import termios

import pytest
from kit.datagrams import greet, is_served, status
from kit.differences import differs
from kit.sockets import read_to_end
from kit.traffic import greet as greet_stream
from kit.varlink import METRICS, PROXY, CallFailed
from kit.waiting import never_within, wait_until

pytestmark = differs("original", reason="forwards no datagrams", run=False)

REFUSED = "Hit connection limit, refusing datagram."


def established(datagrams, listener):
    """A client whose flow is established: it has sent again after an answer."""
    client = datagrams.client(listener)
    greet(client)
    greet(client)
    return client


# ── the limit ─────────────────────────────────────────────────────────────────────────────────────


def test_the_limit_counts_flows(datagrams):
    """Clients that talk keep their places; another one is refused, with a line."""
    listener = datagrams.listener()
    proxy = datagrams.launch("-c3", datagrams.echo().text, listeners=[listener])
    clients = [established(datagrams, listener) for _ in range(3)]
    other = datagrams.client(listener)
    other.send(b"no place")
    proxy.wait_for_log(REFUSED)
    port = other.getsockname()[1]
    assert f"{REFUSED} Client: 127.0.0.1:{port}." in proxy.log()
    for client in clients:
        greet(client)
    status(proxy, "0 connections, 3 flows (limit 3)", "1 datagrams dropped")


def test_a_flow_that_has_its_answer_makes_room(datagrams):
    """As a question to a name server does: thousands of clients, one after the other."""
    listener = datagrams.listener()
    proxy = datagrams.launch("-c5", datagrams.echo().text, listeners=[listener])
    for _ in range(100):
        client = datagrams.client(listener)
        greet(client)
        client.close()
    assert not proxy.log_lines(REFUSED)


def test_a_flow_without_an_answer_makes_room(datagrams):
    """Spoofed senders do not lock out a client that talks."""
    listener, server = datagrams.forward("udp4", "udp4", "-c5")
    for number in range(100):
        client = datagrams.client(listener)
        client.send(b"%d" % number)
        server.expect(b"%d" % number)
        client.close()
    client = datagrams.client(listener)
    client.send(b"question")
    server.answer(b"answer", server.expect(b"question"))
    assert client.recv(100) == b"answer"


def test_the_limit_counts_flows_and_connections_together(datagrams):
    """Two flows and one connection are three; neither kind gets another."""
    stage = datagrams.stage
    stream, listener = stage.listener(), datagrams.listener()
    names = [f"a={stage.echo()}", f"b={datagrams.echo().text}"]
    proxy = datagrams.launch("-c3", *names, listeners=[stream, listener], names="a:b")
    flows = [established(datagrams, listener) for _ in range(2)]
    connection = stage.connect(stream)
    greet_stream(connection)
    status(proxy, "1 connection, 2 flows (limit 3)")
    assert read_to_end(stage.connect(stream))[0] == b""
    proxy.wait_for_log("Hit connection limit, refusing connection.")
    assert not is_served(datagrams.client(listener), 0.3)
    for client in flows:
        greet(client)
    greet_stream(connection)


def test_a_connection_takes_the_place_of_a_flow_that_is_over(datagrams):
    """At the limit, a question that has its answer is worth less than a client that connects."""
    stage = datagrams.stage
    stream, listener = stage.listener(), datagrams.listener()
    names = [f"a={stage.echo()}", f"b={datagrams.echo().text}"]
    datagrams.launch("-c2", *names, listeners=[stream, listener], names="a:b")
    for _ in range(2):
        greet(datagrams.client(listener))
    for _ in range(2):
        greet_stream(stage.connect(stream))


def test_the_limit_of_files_counts_flows(datagrams):
    """A flow has one descriptor; the limit is lowered with one warning."""
    listener = datagrams.listener()
    proxy = datagrams.launch(
        datagrams.echo().text, listeners=[listener], prefix=["prlimit", "--nofile=64:64"]
    )
    (line,) = proxy.log_lines("open files")
    assert line.startswith("The limit of 64 open files allows ")
    allowed = int(line.split(" allows ")[1].split()[0])
    assert line.endswith(f"{allowed} flows, not 256: raise LimitNOFILE=.")
    assert 40 <= allowed < 64
    for _ in range(allowed):
        established(datagrams, listener)
    assert not is_served(datagrams.client(listener), 0.3)
    proxy.wait_for_log(REFUSED)


def test_without_a_descriptor_a_datagram_is_dropped(datagrams):
    """With one line; the flows that there are go on, and later ones are made again."""
    listener = datagrams.listener()
    proxy = datagrams.launch(datagrams.echo().text, listeners=[listener])
    first = established(datagrams, listener)
    _, hard = resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, (len(proxy.fds()), hard))
    other = datagrams.client(listener)
    other.send(b"dropped")
    proxy.wait_for_log("Failed to open a socket for datagrams: Too many open files. Dropping them.")
    greet(first)
    resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, (hard, hard))
    greet(other)


def test_what_the_kernel_drops_is_counted(datagrams):
    """A full receive queue, while the target is down."""
    server, listener = datagrams.absent(), datagrams.listener(receive_buffer=1)
    proxy = datagrams.launch(server.text, listeners=[listener])
    client = datagrams.client(listener)
    for number in range(500):
        client.send(b"%d" % number)
    proxy.wait_for_log("holding datagrams")
    proxy.send_signal(signal.SIGUSR1)
    proxy.wait_for_log(" by the kernel")
    server.start()
    server.expect(b"0")


# ── the time that they last ───────────────────────────────────────────────────────────────────────


def test_an_idle_flow_ends(datagrams):
    """--idle-timeout= shortens the time; its descriptor is closed."""
    listener = datagrams.listener()
    proxy = datagrams.launch("--idle-timeout=300ms", datagrams.echo().text, listeners=[listener])
    before = proxy.socket_count()
    clients = [established(datagrams, listener) for _ in range(5)]
    assert proxy.socket_count() == before + 5
    wait_until(lambda: proxy.socket_count() == before, "the end of the flows")
    for client in clients:
        greet(client)  # a new flow


@pytest.mark.parametrize("way", ["up", "down"])
def test_both_directions_keep_a_flow(datagrams, way):
    """Each alone renews it."""
    listener, server = datagrams.forward("udp4", "udp4", "--idle-timeout=500ms")
    client = datagrams.client(listener)
    client.send(b"first")
    flow = server.expect(b"first")
    for number in range(10):
        never_within(0.15, datagrams.stage.proxy.has_ended, "the end")
        if way == "up":
            client.send(b"%d" % number)
            assert server.expect(b"%d" % number) == flow
        else:
            server.answer(b"%d" % number, flow)
            assert client.recv(100) == b"%d" % number


def test_a_long_idle_timeout_does_not_keep_a_flow_longer(datagrams):
    """15 minutes, as units on demand have it: a question without an answer has 30 s."""
    listener, server = datagrams.forward("udp4", "udp4", "--idle-timeout=15min")
    proxy = datagrams.stage.proxy
    before = proxy.socket_count()
    datagrams.client(listener).send(b"question")
    server.expect(b"question")
    assert proxy.socket_count() == before + 1
    wait_until(lambda: proxy.socket_count() == before, "the end of the flow", 60)


# ── the idle exit ─────────────────────────────────────────────────────────────────────────────────


def test_flows_put_off_the_idle_exit(datagrams):
    """It ends after the last one has expired."""
    listener = datagrams.listener()
    proxy = datagrams.launch(
        "--exit-idle-time=300ms",
        "--idle-timeout=1s",
        datagrams.echo().text,
        listeners=[listener],
        wait=False,
    )
    client = datagrams.client(listener)
    for _ in range(6):
        greet(client)
        never_within(0.2, proxy.has_ended, "the end")
    assert proxy.wait() == 0


def test_with_an_idle_time_of_0_what_has_started_the_program_is_served(datagrams):
    """Everything in the queue is."""
    server, listener = datagrams.target(), datagrams.listener()
    client = datagrams.client(listener)
    for number in range(200):
        client.send(b"%d" % number)
    options = "--exit-idle-time=0", "--idle-timeout=100ms"
    proxy = datagrams.launch(*options, server.text, listeners=[listener], wait=False)
    server.expect(*[b"%d" % number for number in range(200)])
    assert proxy.wait() == 0


def test_held_datagrams_put_off_the_idle_exit(datagrams):
    """An exit with datagrams in the queue would start the program again at once."""
    server, listener = datagrams.absent(), datagrams.listener()
    proxy = datagrams.launch(
        "--exit-idle-time=100ms", "--idle-timeout=100ms", server.text, listeners=[listener]
    )
    datagrams.client(listener).send(b"waits")
    proxy.wait_for_log("holding datagrams")
    never_within(0.5, proxy.has_ended, "the end")
    server.start()
    server.expect(b"waits")
    assert proxy.wait() == 0


def test_after_the_idle_exit_the_queue_is_empty(datagrams):
    """Dropped datagrams do not start the program again either."""
    server, listener = datagrams.absent(), datagrams.listener()
    options = "--exit-idle-time=100ms", "--connect-timeout=200ms", "--idle-timeout=100ms"
    proxy = datagrams.launch(*options, server.text, listeners=[listener], wait=False)
    client = datagrams.client(listener)
    for _ in range(50):
        client.send(b"dropped")
    assert proxy.wait() == 0
    assert fcntl.ioctl(listener, termios.FIONREAD, bytes(4)) == bytes(4)


# ── signals ───────────────────────────────────────────────────────────────────────────────────────


def test_sigterm_leaves_the_queue_to_the_service_manager(datagrams):
    """What comes after the signal is not read."""
    listener = datagrams.listener()
    echo = datagrams.echo()
    proxy = datagrams.launch("--drain-timeout=30s", echo.text, listeners=[listener])
    client = datagrams.client(listener)
    greet(client)
    proxy.send_signal(signal.SIGTERM)
    proxy.notify.wait_for("STOPPING=1")
    client.send(b"for the next one")
    assert proxy.wait() == 0
    assert listener.recv(100) == b"for the next one"
    assert echo.count == 1


def test_replies_go_on_while_the_program_drains(datagrams):
    """Until a second of quiet."""
    listener, server = datagrams.forward("udp4", "udp4", "--drain-timeout=30s")
    proxy = datagrams.stage.proxy
    client = datagrams.client(listener)
    client.send(b"question")
    flow = server.expect(b"question")
    proxy.send_signal(signal.SIGTERM)
    proxy.notify.wait_for("STOPPING=1")
    for number in range(8):
        never_within(0.3, proxy.has_ended, "the end")
        server.answer(b"%d" % number, flow)
        assert client.recv(100) == b"%d" % number
    assert proxy.wait() == 0
    assert "Stopped" not in proxy.log()


def test_without_a_drain_timeout_it_ends_at_once(datagrams):
    """Flows that are open are cut."""
    listener = datagrams.listener()
    proxy = datagrams.launch(datagrams.echo().text, listeners=[listener])
    greet(datagrams.client(listener))
    proxy.send_signal(signal.SIGTERM)
    assert proxy.wait() == 0
    assert "Stopped; 1 flow was cut, 0 held datagrams were lost." in proxy.log_lines()


def test_a_connection_drains_although_the_flows_are_quiet(datagrams):
    """And quiet flows do not keep the program when the last connection has ended."""
    stage = datagrams.stage
    stream, listener = stage.listener(), datagrams.listener()
    backend = stage.backend()
    names = [f"a={backend.target}", f"b={datagrams.echo().text}"]
    proxy = datagrams.launch(
        "--drain-timeout=30s", *names, listeners=[stream, listener], names="a:b"
    )
    greet(datagrams.client(listener))
    connection = stage.connect(stream)
    server = backend.accept()
    proxy.send_signal(signal.SIGTERM)
    proxy.notify.wait_for("STOPPING=1")
    never_within(1.5, proxy.has_ended, "the end")
    server.sendall(b"bye")
    server.close()
    assert read_to_end(connection) == (b"bye", "eof")
    connection.close()
    assert proxy.wait() == 0


def test_the_counters_on_sigusr1(datagrams):
    """Flows, datagrams and bytes each way, and what was dropped by which cause."""
    listener = datagrams.listener()
    echo = datagrams.echo()
    proxy = datagrams.launch(echo.text, listeners=[listener])
    clients = [established(datagrams, listener) for _ in range(3)]
    clients[0].send(b"12345")
    assert clients[0].recv(100) == b"12345"
    proxy.send_signal(signal.SIGUSR1)
    moved = "7 datagrams (35 bytes) to targets, 7 (35 bytes) to clients; dropped: none"
    proxy.wait_for_log(f"3 flows begun, 3 open, none ended; {moved}")
    proxy.wait_for_log(f"udp:{echo.text}: 3 flows begun; {moved}")


def test_the_totals_at_the_end(datagrams):
    """One line for datagrams; none for connections, of which there were none."""
    listener = datagrams.listener()
    proxy = datagrams.launch("--idle-timeout=200ms", datagrams.echo().text, listeners=[listener])
    before = proxy.socket_count()
    greet(datagrams.client(listener))
    wait_until(lambda: proxy.socket_count() == before, "the end of the flow")
    assert proxy.end()
    (line,) = proxy.log_lines("Totals: ")
    assert line.startswith("Totals: 1 flows begun, 0 open, 1 expired; 1 datagrams (5 bytes) to")


def test_the_debug_log_has_every_flow(datagrams):
    """When it begins and when it ends; never a datagram."""
    listener = datagrams.listener()
    echo = datagrams.echo()
    proxy = datagrams.launch(
        "--idle-timeout=300ms",
        echo.text,
        listeners=[listener],
        environment={"SYSTEMD_LOG_LEVEL": "debug"},
    )
    client = established(datagrams, listener)
    name = f"127.0.0.1:{client.getsockname()[1]}"
    proxy.wait_for_log(f"New flow from {name} to {echo.text}.")
    proxy.wait_for_log(f"{name} → {echo.text}: 2 datagrams (10 bytes) up, 2 (10 bytes) down in ")
    assert proxy.log_lines(" → ")[0].endswith(" ms, expired.")


def test_no_addresses_in_the_log_if_they_are_not_wanted(datagrams):
    listener = datagrams.listener()
    options = "--log-addresses=no", "-c1"
    proxy = datagrams.launch(
        *options,
        datagrams.echo().text,
        listeners=[listener],
        environment={"SYSTEMD_LOG_LEVEL": "debug"},
    )
    client = established(datagrams, listener)
    other = datagrams.client(listener)
    other.send(b"refused")
    proxy.wait_for_log(REFUSED)
    for one in (client, other):
        assert f":{one.getsockname()[1]}" not in proxy.log()


# ── inspection ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def inspected(datagrams, callers):
    """A program with an echo, its listener, and a caller of its inspection socket."""
    listener, echo = datagrams.listener(), datagrams.echo()
    path = datagrams.stage.path("inspect")
    proxy = datagrams.launch(
        f"--inspect={path}", "--idle-timeout=20s", echo.text, listeners=[listener]
    )
    return proxy, listener, echo, callers(path)


def test_flows_are_listed(datagrams, inspected):
    _, listener, echo, caller = inspected
    clients = [established(datagrams, listener) for _ in range(100)]
    rows = caller.connections()
    assert len({row["id"] for row in rows}) == 100
    names = {f"127.0.0.1:{client.getsockname()[1]}" for client in clients}
    assert {row["client"] for row in rows} == names
    (row, *_) = rows
    assert (row["state"], row["target"]) == ("flow", f"udp:{echo.text}")
    assert row["targetAddress"] == echo.text
    assert row["listener"] == f"udp:127.0.0.1:{listener.getsockname()[1]}"
    assert row["localAddress"].startswith("127.0.0.1:")
    assert (row["up"]["datagrams"], row["up"]["bytes"]) == (2, 10)
    assert (row["down"]["datagrams"], row["down"]["bytes"]) == (2, 10)
    assert len(caller.connections(state="flow")) == 100
    assert caller.connections(state="open") == []


def test_the_status_has_flows(datagrams, inspected):
    _, listener, echo, caller = inspected
    established(datagrams, listener)
    found = caller.status()
    assert (found["open"], found["held"], found["flows"]) == (0, 0, 1)
    assert found["datagrams"] == {
        "flowsBegun": 1,
        "toTargets": 2,
        "toClients": 2,
        "dropped": dict.fromkeys(found["datagrams"]["dropped"], 0),
        "droppedByKernel": 0,
    }
    (one,) = found["listeners"]
    assert (one["kind"], one["accepting"]) == ("datagram", True)
    (target,) = found["targets"]
    assert (target["target"], target["kind"]) == (f"udp:{echo.text}", "datagram")
    assert (target["up"], target["served"], target["failed"]) == (True, 1, 0)


def test_a_flow_can_be_ended(datagrams, inspected):
    proxy, listener, _, caller = inspected
    client = established(datagrams, listener)
    before = proxy.socket_count()
    (row,) = caller.connections()
    caller.terminate(row["id"])
    wait_until(lambda: proxy.socket_count() == before - 1, "the end of the flow")
    with pytest.raises(CallFailed) as refused:
        caller.terminate(row["id"])
    assert refused.value.args[0] == f"{PROXY}.NoSuchConnection"
    greet(client)


def test_flows_are_watched(datagrams, inspected):
    _, listener, _, caller = inspected
    caller.ask(f"{PROXY}.Watch", more=True)
    client = datagrams.client(listener)

    def begun():
        greet(client)
        return caller.data or select.select([caller.sock], [], [], 0)[0]

    wait_until(begun, "an event")
    event = caller.message()["parameters"]
    assert (event["event"], event["connection"]["state"]) == ("begin", "flow")
    assert event["connection"]["client"] == f"127.0.0.1:{client.getsockname()[1]}"


def test_the_metrics_have_datagrams(datagrams, inspected):
    _, listener, echo, caller = inspected
    established(datagrams, listener)
    described = {one["parameters"]["name"] for one in caller.call(f"{METRICS}.Describe", more=True)}
    found = {}
    for reply in caller.call(f"{METRICS}.List", more=True):
        metric = reply["parameters"]
        assert metric["name"] in described
        key = metric["name"].removeprefix("net.socketproxyd.")
        found[key, *sorted((metric["fields"] or {}).items())] = metric["value"]
    target = ("target", f"udp:{echo.text}")
    assert found["Flows",] == 1
    assert found["Open",] == 0
    assert found["FlowsBegun", target] == 1
    assert found["DatagramsToTargets", target] == 2
    assert found["DatagramBytesToClients", target] == 10
    assert found["DatagramsDropped", ("cause", "at the limit"), target] == 0
    assert found["DatagramsDroppedByKernel",] == 0
    assert found["Up", target] == 1
