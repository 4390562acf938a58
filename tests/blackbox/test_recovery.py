"""Promise: with a descriptor store, a kill costs no connection older than a second, and no byte."""

import os
import random
import re
import signal
import socket

import pytest
from kit.differences import differs
from kit.kept import add_attempts, attempts, kept, kill_and_start, wait_kept
from kit.manager import Manager, restart, start, stop
from kit.privileges import locks_memory, may_lock_no_memory
from kit.sockets import read_exactly, read_to_end
from kit.traffic import greet, in_background, payload
from kit.waiting import wait_until

pytestmark = differs("original", reason="it cuts its connections", run=False)

ALL = "--crash-recovery=all"

UNIX = pytest.param("unix", marks=locks_memory)

families = pytest.mark.parametrize("family", ["tcp4", "tcp6", UNIX])
in_threads = pytest.mark.parametrize(
    "threads", [["--threads=1"], ["--threads=3", "--hand-over=always"]], ids=["1", "3"]
)


def keep_clients(stage, manager, *arguments, count=1):
    """Clients that a kill of the program would cost nothing."""
    stage.launch(*arguments, listeners=[stage.listener()], names="web", notify=manager)
    clients = [stage.connect() for _ in range(count)]
    for client in clients:
        greet(client)
    wait_kept(manager, count)
    return clients


@families
def test_connections_go_on(stage, manager, family):
    echo = stage.echo(family)
    stage.launch(ALL, echo, listeners=[stage.listener(family)], names="web", notify=manager)
    clients = [stage.connect() for _ in range(20)]
    for client in clients:
        greet(client)
    for threads in "131":
        wait_kept(manager, 20)
        kill_and_start(stage, manager, f"--threads={threads}", ALL, echo)
        for client in clients:
            greet(client)
        assert "Going on with 20 open connections: the last process was killed." in (
            stage.proxy.log()
        )
        assert "reset" not in stage.proxy.log()
    greet(stage.connect())


@in_threads
@pytest.mark.parametrize("target", ["tcp4", UNIX])
@pytest.mark.parametrize("listen", ["tcp4", UNIX])
def test_streams_go_on(stage, manager, listen, target, threads):
    """Killed in the middle of everything, several times."""
    backend = stage.backend(target)
    arguments = [*threads, ALL, backend.target]
    stage.launch(*arguments, listeners=[stage.listener(listen)], names="web", notify=manager)
    client = stage.connect()
    server = backend.accept()
    wait_kept(manager, 1)
    up, down = payload(40_000_000), payload(40_000_000, 2)
    jobs = [
        in_background(lambda: client.sendall(up)),
        in_background(lambda: server.sendall(down)),
        in_background(lambda: read_exactly(client, len(down))),
        in_background(lambda: read_exactly(server, len(up))),
    ]
    for _ in range(5):
        wait_kept(manager, 1)
        kill_and_start(stage, manager, *arguments)
        assert "Going on with 1 open" in stage.proxy.log()
    assert jobs[2].result() == down
    assert jobs[3].result() == up
    client.shutdown(socket.SHUT_WR)
    wait_kept(manager, 1)
    kill_and_start(stage, manager, *arguments)
    assert read_to_end(server) == (b"", "eof")
    server.sendall(b"last words")
    server.close()
    assert read_to_end(client) == (b"last words", "eof")


def test_killed_while_it_recovers(stage, manager):
    """Before and while it begins a new generation: nothing has been taken out."""
    chance = random.Random(1)
    echo = stage.echo()
    clients = keep_clients(stage, manager, echo, count=50)
    for _ in range(10):
        stage.proxy.kill()
        start(stage, manager, echo, wait=False)
        with_luck = chance.randrange(100_000)
        for _ in range(with_luck):
            pass  # some moment of the start
    kill_and_start(stage, manager, echo)
    for client in clients:
        greet(client)


def test_a_connection_that_kills_each_process(stage, manager):
    """What looks like that is given up, even where no start limit ends it."""
    echo = stage.echo()
    (client,) = keep_clients(stage, manager, echo)
    add_attempts(manager, 48)
    kill_and_start(stage, manager, echo)
    greet(client)
    wait_until(lambda: attempts(manager) == 0, "it to last")
    add_attempts(manager, 49)
    kill_and_start(stage, manager, echo)
    assert attempts(manager) in (50, 0)
    greet(client)
    wait_until(lambda: attempts(manager) == 0, "it to last")
    add_attempts(manager, 50)
    kill_and_start(stage, manager, echo)
    assert read_to_end(client) == (b"", "reset")
    assert "killed: 50 processes that went on with them were, too" in stage.proxy.log()
    again = stage.connect()
    greet(again)
    wait_kept(manager, 1)
    kill_and_start(stage, manager, echo)
    greet(again)


def test_those_that_are_young_are_reset(stage, manager):
    echo = stage.echo()
    (old,) = keep_clients(stage, manager, echo)
    os.kill(stage.proxy.pid, signal.SIGSTOP)
    young = stage.connect()
    kill_and_start(stage, manager, echo)
    greet(old)
    greet(young)  # it was not accepted yet
    other = stage.connect()
    greet(other)
    stage.proxy.kill()
    assert read_to_end(other) in ((b"", "reset"), (b"", "eof"))


def test_what_has_ended_does_not_come_back(stage, manager):
    """It is ended in spite of the copies of its sockets."""
    backend = stage.backend()
    stage.launch(backend.target, listeners=[stage.listener()], names="web", notify=manager)
    pairs = [(stage.connect(), backend.accept()) for _ in range(3)]
    wait_kept(manager, 3)
    client, server = pairs[0]
    client.sendall(b"bye")
    client.close()
    assert read_to_end(server) == (b"bye", "eof")
    server.close()
    client, server = pairs[1]
    server.close()
    assert read_to_end(client) == (b"", "eof")
    client.close()
    wait_kept(manager, 1)
    kill_and_start(stage, manager, backend.target)
    assert "Going on with 1 open" in stage.proxy.log()
    client, server = pairs[2]
    client.sendall(b"hello")
    assert read_exactly(server, 5) == b"hello"


def test_restart_after_kill_after_restart(stage, manager):
    """A parcel wins over root, which is removed before: there is room for one of them."""
    echo = stage.echo()
    (client,) = keep_clients(stage, manager, echo)
    for _ in range(2):
        wait_kept(manager, 1)
        restart(stage, manager, echo)
        greet(client)
        wait_kept(manager, 1)
        kill_and_start(stage, manager, echo)
        greet(client)


@pytest.mark.parametrize("drained", [False, True])
def test_killed_while_draining(stage, manager, drained):
    """Root stays until the drain is over: what is not over goes on."""
    arguments = ["--drain-timeout=1h", stage.echo()]
    clients = keep_clients(stage, manager, *arguments, count=2)
    stage.proxy.send_signal(signal.SIGTERM)
    manager.wait_for("STOPPING=1")
    clients[0].close()
    wait_kept(manager, 1)
    if drained:
        stage.proxy.send_signal(signal.SIGTERM)  # at once
        assert stage.proxy.wait() == 0
        assert [name for name, _ in manager.stored] == ["proxyd-parcel"]
        start(stage, manager, *arguments)
    else:
        kill_and_start(stage, manager, *arguments)
    greet(clients[1])


def test_reload_keeps_root(stage, manager):
    echo = stage.echo()
    (client,) = keep_clients(stage, manager, echo)
    for _ in range(2):
        wait_kept(manager, 1)
        manager.clear()
        stage.proxy.send_signal(signal.SIGHUP)
        manager.wait_for("READY=1")
        greet(client)
    wait_kept(manager, 1)
    kill_and_start(stage, manager, echo)
    greet(client)
    client.close()
    wait_kept(manager, 0)


@pytest.mark.parametrize("how", ["stop", "idle exit"])
def test_nothing_is_left_in_the_store(stage, manager, how):
    arguments = [stage.echo()]
    if how == "idle exit":
        arguments.insert(0, "--exit-idle-time=1s")
    (client,) = keep_clients(stage, manager, *arguments)
    client.close()
    wait_kept(manager, 0)
    if how == "stop":
        stop(stage)
    else:
        assert stage.proxy.wait() == 0
    wait_until(lambda: not manager.stored, "FDSTOREREMOVE=1")


@pytest.mark.parametrize(("listen", "target"), [("unix", "tcp4"), ("tcp4", "unix")])
def test_by_default_tcp_alone(stage, manager, listen, target):
    """A connection with a UNIX socket is not kept; nor does it keep one over TCP from it."""
    backends = stage.backend("tcp4"), stage.backend(target)
    arguments = [f"tcp={backends[0].target}", f"mixed={backends[1].target}"]
    listeners = [stage.listener("tcp4"), stage.listener(listen)]
    stage.launch(*arguments, listeners=listeners, names="tcp:mixed", notify=manager)
    mixed = stage.connect(listeners[1])
    backends[1].accept()
    tcp = stage.connect(listeners[0])
    server = backends[0].accept()
    wait_kept(manager, 1)
    kill_and_start(stage, manager, *arguments, listener_names=["tcp", "mixed"])
    assert "Going on with 1 open" in stage.proxy.log()
    tcp.sendall(b"hello")
    assert read_exactly(server, 5) == b"hello"
    assert read_to_end(mixed) == (b"", "reset" if listen == "tcp4" else "eof")


def test_as_many_as_the_limit_of_open_files_allows(stage, manager):
    """What keeps them needs fds, too: no client is promised one of these."""
    arguments, prefix = ["-c1000", stage.echo()], ["prlimit", "--nofile=900:900"]
    listeners = [stage.listener()]
    stage.launch(*arguments, listeners=listeners, names="web", notify=manager, prefix=prefix)
    (line,) = stage.proxy.log_lines()
    count = int(re.search(r"allows (\d+) connections", line)[1])
    clients = []
    for total in (count // 2, count):
        clients += [stage.connect() for _ in range(total - len(clients))]
        for client in clients:
            greet(client)
        wait_kept(manager, total)
    assert stage.proxy.log_lines() == [line]
    for begin in (kill_and_start, restart):
        begin(stage, manager, *arguments, prefix=prefix)
        for client in clients:
            greet(client)
        assert stage.proxy.log_lines()[0] == line
        assert stage.proxy.log_lines()[1].startswith(f"Going on with {count} open ")
        wait_kept(manager, count)
        assert len(stage.proxy.log_lines()) == 2


def test_memory_that_cannot_be_locked(stage, manager):
    """Then no connection with a UNIX socket is kept, which is said once; TCP is kept."""
    prefix = may_lock_no_memory()
    backends = stage.backend("tcp4"), stage.backend("unix")
    arguments = [ALL, f"tcp={backends[0].target}", f"mixed={backends[1].target}"]
    listeners = [stage.listener("tcp4"), stage.listener("tcp4")]
    stage.launch(*arguments, listeners=listeners, names="tcp:mixed", notify=manager, prefix=prefix)
    pairs = [(stage.connect(listeners[end]), backends[end].accept()) for end in (0, 0, 1, 1)]
    wait_kept(manager, 2)
    stage.proxy.wait_for_log("Not all connections are kept in case of a kill: ")
    assert len(stage.proxy.log_lines()) == 1
    kill_and_start(stage, manager, *arguments, listener_names=["tcp", "mixed"])
    assert "Going on with 2 open" in stage.proxy.log()
    for client, server in pairs[:2]:
        client.sendall(b"hello")
        assert read_exactly(server, 5) == b"hello"
    for client, _ in pairs[2:]:
        assert read_to_end(client) == (b"", "reset")


def test_what_cannot_be_used(stage, manager):
    """It is dropped: as long as it is in the store, nothing ends the connections in it."""
    echo = stage.echo()
    stage.launch(echo, listeners=[stage.listener()], names="web", notify=manager)
    ours, theirs = socket.socketpair()
    manager.stored.append(("proxyd-pages", theirs.detach()))
    stage.proxy.kill()
    start(stage, manager, echo)
    with ours:
        assert read_to_end(ours) == (b"", "eof")
    assert "Cannot use what the last process has left" in stage.proxy.log()
    client = stage.connect()
    greet(client)
    wait_kept(manager, 1)


def test_not_wanted(stage, manager):
    """--crash-recovery=no: nothing is stored; what was stored before is gone on with, once."""
    echo = stage.echo()
    (client,) = keep_clients(stage, manager, echo)
    kill_and_start(stage, manager, "--crash-recovery=no", echo)
    greet(client)
    wait_until(lambda: not manager.stored, "FDSTOREREMOVE=1")
    stage.proxy.kill()
    assert read_to_end(client) == (b"", "reset")


@pytest.mark.parametrize("room", [0, 1])
def test_without_a_store(stage, room):
    """Refused, or nobody answers: as ever."""
    manager = Manager(room, deaf=room == 1)
    echo = stage.echo()
    stage.launch(echo, listeners=[stage.listener()], names="web", notify=manager)
    client = stage.connect()
    greet(client)
    manager.wait_for("FDNAME=proxyd-pages")
    if room:
        manager.wait_for("FDSTOREREMOVE=1")
    greet(client)
    stage.proxy.kill()
    assert read_to_end(client) == (b"", "reset")
    manager.close()


def test_a_service_without_store(stage):
    manager = Manager()
    options = {"names": "web", "notify": manager, "environment": {"FDSTORE": "0"}}
    stage.launch(stage.echo(), listeners=[stage.listener()], **options)
    client = stage.connect()
    greet(client)
    assert kept(manager) == 0
    assert not manager.stored
    manager.close()


def test_too_few_descriptors(stage, manager):
    """What does not fit into the table of the next process is reset, with one line."""
    echo = stage.echo()
    keep_clients(stage, manager, echo, count=20)
    kill_and_start(
        stage, manager, "--connections-max=5", echo, prefix=["prlimit", "--nofile=40:40"]
    )
    assert stage.proxy.log_lines("Had to reset")
