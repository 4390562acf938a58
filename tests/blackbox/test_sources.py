"""One client's share of the limit (--connections-max-per-source=)."""

import os

import pytest
from kit.datagrams import greet as greet_datagram
from kit.datagrams import status
from kit.differences import differs
from kit.privileges import UNUSED_UID, need_root
from kit.sockets import open_connection, read_to_end
from kit.traffic import greet, is_served
from kit.varlink import PROXY
from kit.waiting import wait_until

pytestmark = differs("original", reason="knows no limit of a source", run=False)

REFUSED = "Hit connection limit of a source, refusing connection."
SHARE = "--connections-max-per-source="


@pytest.mark.parametrize("more", [(), ("--proxy-protocol=v1",)])
def test_one_address_cannot_take_all(stage, more):
    """It has its share, whoever connects it; another one is served."""
    backend = stage.backend()
    stage.launch(f"{SHARE}4", *more, backend.target, listeners=[stage.listener()])
    clients = [stage.connect(source="127.0.0.1") for _ in range(4)]
    for client in clients:
        client.sendall(b"served")
        assert backend.accept().recv(100)
    late = [stage.connect(source="127.0.0.1") for _ in range(300)]
    assert {read_to_end(client)[0] for client in late} == {b""}
    other = stage.connect(source="127.0.0.2")
    other.sendall(b"other")
    assert backend.accept().recv(100)
    lines = stage.proxy.log_lines(REFUSED)
    assert f" Client: 127.0.0.1:{late[0].getsockname()[1]}." in lines[0]
    status(stage.proxy, "5 connections, ", "300 refused at the limit of their source")


def test_a_place_becomes_free(stage):
    stage.launch(f"{SHARE}2", stage.echo(), listeners=[stage.listener()])
    clients = [stage.connect() for _ in range(2)]
    for client in clients:
        greet(client)
    assert not is_served(stage.connect())
    clients[0].close()
    wait_until(lambda: is_served(stage.connect()), "a free place")
    assert not is_served(stage.connect())


def test_held_clients_count(stage):
    absent = stage.absent()
    stage.launch(f"{SHARE}2", absent.target, listeners=[stage.listener()])
    clients = [stage.connect(source="127.0.0.1") for _ in range(2)]
    status(stage.proxy, "2 waiting for")
    assert read_to_end(stage.connect(source="127.0.0.1"))[0] == b""
    other = stage.connect(source="127.0.0.2")
    status(stage.proxy, "3 waiting for")
    absent.start_listening()
    for _ in (*clients, other):
        absent.accept()
    assert read_to_end(stage.connect(source="127.0.0.1"))[0] == b""


def test_a_unix_client_counts_by_its_user(stage):
    need_root("to be another user")
    listener = stage.listener("unix")
    os.chmod(listener.getsockname(), 0o777)
    stage.launch(f"{SHARE}2", stage.echo(), listeners=[listener])
    for _ in range(2):
        greet(stage.connect())
    assert not is_served(stage.connect())
    assert as_user(UNUSED_UID, lambda: greet(open_connection(listener.getsockname(), 1)))
    assert not is_served(stage.connect())


def as_user(uid, work):
    """Whether `work()` succeeds in a process of this user."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setuid(uid)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_users_that_are_not_known_are_not_limited(stage):
    """As under PrivateUsers=: only root is known, and all others are one uid."""
    need_root("to be another user")
    listener = stage.listener("unix")
    os.chmod(listener.getsockname(), 0o777)
    prefix = ["unshare", "--user", "--map-root-user"]
    proxy = stage.launch(f"{SHARE}1", stage.echo(), listeners=[listener], prefix=prefix)
    proxy.wait_for_log("does not apply to UNIX clients of users that are not known here")

    def several():
        clients = [open_connection(listener.getsockname(), listener.family) for _ in range(5)]
        for client in clients:
            greet(client)

    assert as_user(UNUSED_UID, several)
    greet(stage.connect())
    assert not is_served(stage.connect())


def test_flows_of_datagrams(datagrams):
    """Those that talk keep their places; the others make room for new ones of their address."""
    listener = datagrams.listener()
    echo = datagrams.echo().text
    proxy = datagrams.launch(f"{SHARE}2", echo, listeners=[listener])
    for _ in range(20):
        greet_datagram(datagrams.client(listener))
    clients = [datagrams.client(listener) for _ in range(2)]
    for client in clients * 2:
        greet_datagram(client)
    datagrams.client(listener).send(b"no place")
    proxy.wait_for_log("Hit connection limit of a source, refusing datagram. Client: 127.0.0.1:")
    for client in clients:
        greet_datagram(client)


def test_it_is_seen(stage, inspected):
    """In the status of the inspection, and in the metrics."""
    caller = inspected(f"{SHARE}1", stage.echo())
    greet(stage.connect())
    assert not is_served(stage.connect())
    (reply,) = caller.call(f"{PROXY}.Status")
    assert reply["parameters"]["limits"]["connectionsMaxPerSource"] == 1
    found = caller.metrics()
    assert (found["Refused",], found["RefusedBySource",]) == (1, 1)
    assert found["ConnectionsMaxPerSource",] == 1


@pytest.mark.parametrize("number", ["0", "-1", "x", "", "4294967296"])
def test_a_bad_number_is_one_line(stage, number):
    outcome = stage.run(SHARE + number, stage.echo(), listeners=[stage.listener()])
    assert outcome.status == 1
    assert outcome.stderr == (
        f"Failed to parse {SHARE} argument: {number}: "
        "expected a number of connections from 1 to 2147483647\n"
    )
