"""Promise: with a descriptor store, a restart costs no connection and no byte."""

import os
import random
import signal
import socket
import threading

import pytest
from kit.differences import differs
from kit.manager import Manager, restart, start, stop
from kit.sockets import read_exactly, read_to_end
from kit.traffic import greet, in_background, payload
from kit.waiting import wait_until

pytestmark = differs("original", reason="it cuts its connections")

families = pytest.mark.parametrize("family", ["tcp4", "tcp6", "unix"])


@families
def test_connections_go_on(stage, manager, family):
    echo = stage.echo(family)
    stage.launch(echo, listeners=[stage.listener(family)], names="web", notify=manager)
    clients = [stage.connect() for _ in range(20)]
    for client in clients:
        greet(client)
    for threads in "131":
        restart(stage, manager, f"--threads={threads}", echo)
        for client in clients:
            greet(client)
        assert "Going on with 20 open and 0 waiting connections." in stage.proxy.log()
    greet(stage.connect())
    stop(stage)
    assert "Totals: 21 accepted, 0 open, 0 waiting, 21 kept, 0 refused" in stage.proxy.log()


@families
@pytest.mark.parametrize("threads", [[], ["--threads=3", "--hand-over=always"]], ids=["1", "3"])
def test_a_stream_during_restarts(stage, manager, family, threads):
    backend = stage.backend(family)
    arguments = [*threads, backend.target]
    stage.launch(*arguments, listeners=[stage.listener(family)], names="web", notify=manager)
    client = stage.connect()
    target = backend.accept()
    up, down = payload(30_000_000), payload(30_000_000, 2)
    jobs = [
        in_background(lambda: client.sendall(up)),
        in_background(lambda: target.sendall(down)),
        in_background(lambda: read_exactly(client, len(down))),
        in_background(lambda: read_exactly(target, len(up))),
    ]
    for _ in range(3):
        restart(stage, manager, *arguments)
    assert jobs[2].result() == down
    assert jobs[3].result() == up
    client.shutdown(socket.SHUT_WR)
    restart(stage, manager, *arguments)
    assert read_to_end(target) == (b"", "eof")
    target.sendall(b"last words")
    target.close()
    assert read_to_end(client) == (b"last words", "eof")


def converse(clients, echoes, over):
    """Have every client send something, and check its echo, until it is over."""
    chance = random.Random(1)
    while not over.is_set():
        for client in clients:
            greet(client, chance.randbytes(chance.choice([1, 100, 5000, 70_000])))
            echoes.append(client)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_many_conversations(stage, manager, threads):
    arguments = [f"--threads={threads}", "--hand-over=always", stage.echo()]
    stage.launch(*arguments, listeners=[stage.listener()], names="web", notify=manager)
    clients = [stage.connect() for _ in range(30)]
    echoes, over = [], threading.Event()
    job = in_background(lambda: converse(clients, echoes, over))
    for _ in range(5):
        count = len(echoes) + 10
        wait_until(lambda least=count: len(echoes) >= least, "some conversation")
        restart(stage, manager, *arguments)
        assert "Going on with 30 open" in stage.proxy.log()
    over.set()
    job.result()


def test_connections_keep_their_target(stage, manager):
    first, second = stage.backend(), stage.backend()
    stage.launch(first.target, listeners=[stage.listener()], names="web", notify=manager)
    client = stage.connect()
    target = first.accept()
    restart(stage, manager, "--connections-max=1", second.target)
    client.sendall(b"to the old target")
    assert read_exactly(target, 17) == b"to the old target"
    client.close()
    assert read_to_end(target) == (b"", "eof")
    target.close()
    other = stage.connect()
    second.accept().sendall(b"new")
    assert read_exactly(other, 3) == b"new"


def test_held_clients_wait_on(stage, manager):
    backend = stage.absent()
    arguments = ["--connect-timeout=1min", backend.target]
    stage.launch(*arguments, listeners=[stage.listener()], names="web", notify=manager)
    client = stage.connect()
    client.sendall(b"question")
    stage.proxy.wait_for_log("holding")
    restart(stage, manager, *arguments)
    backend.start_listening()
    assert read_exactly(backend.accept(), 8) == b"question"


def test_a_held_client_is_announced_as_the_new_options_want(stage, manager):
    backend = stage.absent()
    arguments = ["--connect-timeout=1min", backend.target]
    stage.launch(*arguments, listeners=[stage.listener()], names="web", notify=manager)
    client = stage.connect()
    client.sendall(b"question")
    stage.proxy.wait_for_log("holding")
    restart(stage, manager, "--proxy-protocol=v1", *arguments)
    backend.start_listening()
    address, port = client.getsockname()
    expected = f"PROXY TCP4 {address} 127.0.0.1 {port} {client.getpeername()[1]}\r\nquestion"
    assert read_exactly(backend.accept(), len(expected)) == expected.encode()


def test_a_listener_that_is_not_there_any_more(stage, manager):
    """Its connections go on; a client that it had accepted, and that is held, is reset."""
    echo, absent = stage.echo(), stage.absent()
    first, second, third = (stage.listener() for _ in range(3))
    targets = [f"one={echo}", f"two={echo}", f"three={absent.target}", "--connect-timeout=1min"]
    stage.launch(*targets, listeners=[first, second, third], names="one:two:three", notify=manager)
    client, held = stage.connect(second), stage.connect(third)
    greet(client)
    stage.proxy.wait_for_log("holding")
    stop(stage)
    ((name, stored),) = manager.stored
    manager.clear()
    stage.launch(echo, listeners=[first, stored], names=f"one:{name}", notify=manager)
    assert "Going on with 1 open and 0 waiting connections." in stage.proxy.log()
    greet(client)
    greet(stage.connect())
    with pytest.raises(ConnectionResetError):
        held.recv(1)


def test_its_own_listeners_are_kept(stage, manager):
    """With their files, unless the new options want them no more."""
    kept, dropped = stage.path("kept"), stage.path("dropped")
    echo = stage.echo()
    listen = [f"--listen={kept}", f"--listen={dropped}"]
    stage.launch(*listen, echo, notify=manager)
    client = stage.connect_to(kept, socket.AF_UNIX)
    greet(client)
    inode = os.stat(kept).st_ino
    stop(stage)
    waiting = stage.connect_to(kept, socket.AF_UNIX)
    ((name, stored),) = manager.stored
    manager.clear()
    stage.launch(listen[0], echo, listeners=[stored], names=name, notify=manager)
    greet(client)
    greet(waiting)
    assert os.stat(kept).st_ino == inode
    assert not os.path.exists(dropped)


def test_a_drain_first(stage, manager):
    """What has not ended by then is kept."""
    stage.launch(
        "--drain-timeout=1s",
        stage.echo(),
        listeners=[stage.listener()],
        names="web",
        notify=manager,
    )
    client, other = stage.connect(), stage.connect()
    greet(client)
    greet(other)
    stage.proxy.send_signal(signal.SIGTERM)
    manager.wait_for("STOPPING=1")
    greet(client)
    other.close()
    assert stage.proxy.wait() == 0
    assert "Stopped; 1 open and 0 waiting connections are kept" in stage.proxy.log()
    start(stage, manager, stage.echo())
    greet(client)


def test_sigusr2_does_not_drain(stage, manager):
    """For RestartKillSignal=: all connections are kept at once."""
    arguments = ["--drain-timeout=1h", stage.echo()]
    stage.launch(*arguments, listeners=[stage.listener()], names="web", notify=manager)
    client = stage.connect()
    greet(client)
    stop(stage, signal.SIGUSR2)
    start(stage, manager, *arguments)
    greet(client)


def test_nothing_is_kept_if_all_have_ended(stage, manager):
    stage.launch(
        "--drain-timeout=1h",
        stage.echo(),
        listeners=[stage.listener()],
        names="web",
        notify=manager,
    )
    client = stage.connect()
    greet(client)
    stage.proxy.send_signal(signal.SIGTERM)
    manager.wait_for("STOPPING=1")
    client.close()
    assert stage.proxy.wait() == 0
    wait_until(lambda: not manager.stored, "FDSTOREREMOVE=1")


def test_what_the_log_calls_a_connection_is_kept(stage, manager):
    """At debug level, where each end has a line."""
    echo = stage.echo()
    debug = {"SYSTEMD_LOG_LEVEL": "debug"}
    stage.launch(echo, listeners=[stage.listener()], names="web", notify=manager, environment=debug)
    client = stage.connect()
    greet(client)
    name = client.getsockname()[1]
    stop(stage)
    start(stage, manager, echo, environment=debug)
    greet(client)
    client.close()
    stage.proxy.wait_for_log(f"127.0.0.1:{name} → {echo}")


def test_a_plain_stop_resets_them(stage, manager):
    stage.launch(stage.echo(), listeners=[stage.listener()], names="web", notify=manager)
    client = stage.connect()
    greet(client)
    stop(stage)
    manager.drop()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_plain_stop_resets_held_clients(stage, manager):
    backend = stage.absent()
    arguments = ["--connect-timeout=1min", backend.target]
    stage.launch(*arguments, listeners=[stage.listener()], names="web", notify=manager)
    client = stage.connect()
    stage.proxy.wait_for_log("holding")
    stop(stage)
    assert "0 open and 1 waiting connections are kept" in stage.proxy.log()
    manager.drop()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


@pytest.mark.parametrize("what", ["no room", "deaf"])
def test_a_manager_without_a_store(stage, what):
    """As ever: the connections are reset, and the end waits for 2 s at most."""
    manager = Manager(room=0 if what == "no room" else 1, deaf=what == "deaf")
    try:
        stage.launch(stage.echo(), listeners=[stage.listener()], notify=manager)
        client = stage.connect()
        greet(client)
        stop(stage)
        assert "1 open and 0 waiting connections were cut" in stage.proxy.log()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    finally:
        manager.close()


def test_a_stored_parcel_that_is_bad(stage, manager):
    """One line, and the start goes on."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(b"garbage")
    manager.stored.append(("proxyd-parcel", theirs.detach()))
    start(stage, manager, stage.echo())
    (line,) = stage.proxy.log_lines("parcel is bad")
    assert "it is none" in line
    greet(stage.connect())
    wait_until(lambda: not manager.stored, "FDSTOREREMOVE=1")
    ours.close()


def test_an_empty_parcel(stage, manager):
    """The last process has died after it had asked for a store."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    manager.stored.append(("proxyd-parcel", theirs.detach()))
    start(stage, manager, stage.echo())
    greet(stage.connect())
    wait_until(lambda: not manager.stored, "FDSTOREREMOVE=1")
    assert not stage.proxy.log_lines("parcel")


def test_a_reload_after_a_restart(stage, manager):
    stage.launch(stage.echo(), listeners=[stage.listener()], names="web", notify=manager)
    client = stage.connect()
    greet(client)
    restart(stage, manager, stage.echo())  # another target
    manager.clear()
    stage.proxy.send_signal(signal.SIGHUP)
    manager.wait_for("READY=1")
    greet(client)
    greet(stage.connect())
