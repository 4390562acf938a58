"""Terminate, and who may call what."""

import errno
import os

import pytest
from kit.differences import differs
from kit.privileges import UNUSED_UID, as_unprivileged_user, need_root
from kit.socket_state import hung_up, was_reset
from kit.sockets import TCP, main_pairs, read_exactly
from kit.varlink import METHODS, METRICS, PROXY, SERVICE, CallFailed, call_as, text_of
from kit.waiting import wait_until

pytestmark = differs("original", reason="cannot be inspected", run=False)

PUBLIC = {f"{PROXY}.Status", f"{METRICS}.List", f"{METRICS}.Describe"}


def gone(peer, family):
    """Wait until a peer has been reset; a UNIX socket, which has no reset, has hung up."""
    wait_until(lambda: (was_reset if family in TCP else hung_up)(peer), f"a reset, {family}")
    if family in TCP:
        with pytest.raises(ConnectionResetError):
            peer.recv(1)


@main_pairs
@pytest.mark.parametrize("threads", ["--threads=1", "--threads=3"])
def test_an_open_connection_is_reset_on_both_sides(stage, inspected, listen, target, threads):
    backend = stage.backend(target)
    caller = inspected(
        threads, "--hand-over=always", backend.target, listeners=[stage.listener(listen)]
    )
    pairs = []
    for _ in range(4):
        client = stage.connect()
        server = backend.accept()
        client.sendall(b"x")
        read_exactly(server, 1)
        pairs.append((client, server))
    numbers = sorted(row["id"] for row in caller.connections())
    for number, (client, server) in zip(numbers[:3], pairs[:3], strict=True):
        caller.terminate(number)
        gone(client, listen)
        gone(server, target)
        with pytest.raises(CallFailed, match="NoSuchConnection"):
            caller.terminate(number)
    assert [row["id"] for row in caller.connections()] == numbers[3:]
    client, server = pairs[3]
    server.sendall(b"still here")
    assert read_exactly(client, 10) == b"still here"
    assert caller.metrics()["Ended", "cut"] == 3


def test_a_held_client_is_reset_and_the_others_wait(stage, inspected):
    backend = stage.absent()
    caller = inspected("--connect-timeout=1min", backend.target)
    first, second = stage.connect(), stage.connect()
    rows = wait_until(
        lambda: len(rows := caller.connections(state="held")) == 2 and rows, "two held clients"
    )
    caller.terminate(rows[0]["id"])
    gone(first, "tcp4")
    with pytest.raises(CallFailed, match="NoSuchConnection"):
        caller.terminate(rows[0]["id"])
    assert [row["client"] for row in caller.connections()] == [text_of(second.getsockname())]
    backend.start_listening()
    second.sendall(b"x")
    assert read_exactly(backend.accept(), 1) == b"x"
    found = caller.metrics()
    assert (found["Ended", "cut"], found["Failed", backend.target]) == (1, 0)


def test_a_connecting_client_is_reset(stage, inspected):
    backend = stage.backend(backlog=0)
    stage.fill_backlog(backend)
    caller = inspected("--connect-timeout=1min", backend.target)
    client = stage.connect()
    (row,) = wait_until(caller.connections, "the client")
    caller.terminate(row["id"])  # it is connecting, or held because that took too long
    gone(client, "tcp4")
    assert caller.connections() == []


@pytest.mark.parametrize("number", [0, -1, 7, 2**63 - 1, -(2**63)])
def test_an_id_that_there_is_not(stage, inspected, number):
    caller = inspected(stage.echo())
    client = stage.connect()
    client.sendall(b"x")
    assert read_exactly(client, 1) == b"x"
    with pytest.raises(CallFailed, match=f"{PROXY}.NoSuchConnection"):
        caller.terminate(number)
    client.sendall(b"x")
    assert read_exactly(client, 1) == b"x"


@pytest.mark.parametrize("number", [None, "1", 1.5, True, 2**63, [], {}])
def test_what_is_no_id(stage, inspected, number):
    caller = inspected(stage.echo())
    (reply,) = caller.call(f"{PROXY}.Terminate", id=number)
    assert reply == {"error": f"{SERVICE}.InvalidParameter", "parameters": {"parameter": "id"}}


@pytest.mark.parametrize("method", METHODS)
def test_what_another_user_may_call(stage, inspected, folder, method):
    """The proxy runs as root here: it is neither root nor the proxy's user."""
    prefix = as_unprivileged_user(stage.executable)
    caller = inspected(stage.echo())
    client = stage.connect()
    client.sendall(b"x")
    assert read_exactly(client, 1) == b"x"
    (row,) = caller.connections()
    parameters = {"id": row["id"]} if method.endswith("Terminate") else {}
    reply = call_as(prefix, f"{folder}/inspect", method, **parameters)
    if method in PUBLIC:
        assert "error" not in reply
    else:
        assert reply == {"error": f"{SERVICE}.PermissionDenied", "parameters": {}}
    client.sendall(b"x")
    assert read_exactly(client, 1) == b"x"


def test_the_user_of_the_proxy_may_call_everything_and_a_third_one_may_not(
    stage, inspected, folder
):
    own = as_unprivileged_user(stage.executable)
    os.chown(folder, UNUSED_UID, UNUSED_UID)
    caller = inspected(stage.echo(), prefix=own)
    client = stage.connect()
    client.sendall(b"x")
    assert read_exactly(client, 1) == b"x"
    other = [part.replace(str(UNUSED_UID), str(UNUSED_UID + 1)) for part in own]
    path = f"{folder}/inspect"
    (row,) = caller.connections()  # root
    refused = call_as(other, path, f"{PROXY}.Terminate", id=row["id"])
    assert refused["error"] == f"{SERVICE}.PermissionDenied"
    told = call_as(own, path, f"{PROXY}.List")
    assert told["parameters"]["connection"]["id"] == row["id"]
    assert call_as(own, path, f"{PROXY}.Terminate", id=row["id"]) == {"parameters": {}}
    gone(client, "tcp4")


def test_nobody_is_not_a_friend(stage, inspected, folder):
    """A proxy that runs as the overflow uid, 65534, trusts root alone: in a user namespace every
    user without a name there appears as that one."""
    need_root("to become another user")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    os.chown(folder, 65534, 65534)
    caller = inspected(stage.echo(), prefix=nobody)
    refused = call_as(nobody, f"{folder}/inspect", f"{PROXY}.List")
    assert refused["error"] == f"{SERVICE}.PermissionDenied"
    assert caller.connections() == []  # root


def test_the_errno_of_a_write_after_it(stage, inspected):
    """What a program sees that writes on."""
    backend = stage.backend()
    caller = inspected(backend.target)
    client = stage.connect()
    server = backend.accept()
    (row,) = caller.connections()
    caller.terminate(row["id"])
    wait_until(lambda: was_reset(client) and was_reset(server), "the resets")
    for peer in (client, server):
        with pytest.raises(OSError) as raised:
            peer.sendall(b"x")
        assert raised.value.errno in (errno.ECONNRESET, errno.EPIPE)
