"""The inspection socket: Varlink calls to a running proxy."""

import json
import os
import signal
import socket
import stat

import pytest
from kit.differences import differs
from kit.sockets import read_exactly
from kit.varlink import METRICS, PROXY
from kit.waiting import wait_until

pytestmark = differs("original", reason="cannot be inspected", run=False)


def launch(stage, folder, *arguments, target=None, **environment):
    environment = {"RUNTIME_DIRECTORY": f"{folder}:/second"} | environment
    return stage.launch(
        *arguments,
        target or stage.echo(),
        listeners=[stage.listener()],
        environment=environment,
    )


def greet(client):
    client.sendall(b"x")
    assert read_exactly(client, 1) == b"x"


def test_there_is_a_socket_in_the_runtime_directory(stage, folder, callers):
    proxy = launch(stage, folder)
    path = f"{folder}/inspect"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
    client = stage.connect()
    greet(client)
    caller = callers(path)
    (reply,) = caller.call(f"{PROXY}.Status")
    assert reply["parameters"]["pid"] == proxy.pid
    assert reply["parameters"]["open"] == 1
    assert reply["parameters"]["status"].startswith("1 connection, ")
    proxy.send_signal(signal.SIGTERM)
    assert proxy.wait() == 0
    assert caller.closed()
    assert not os.path.exists(path)


def test_an_instance_may_have_a_colon_in_its_name(stage, callers):
    path = stage.path("proxy@[::1]:80")
    os.mkdir(path)
    proxy = launch(stage, path)
    (reply,) = callers(f"{path}/inspect").call(f"{PROXY}.Status")
    assert reply["parameters"]["pid"] == proxy.pid


def test_counters_equal_the_traffic(stage, folder, callers):
    launch(stage, folder)
    for size in (1, 1000, 100_000):
        with stage.connect() as client:
            client.sendall(b"x" * size)
            read_exactly(client, size)
    caller = callers(f"{folder}/inspect")
    wait_until(lambda: caller.metrics()["Ended", "ended"] == 3, "all have ended")
    found = caller.metrics()
    assert found["Accepted",] == 3
    assert found["Open",] == 0
    assert found["BytesToTargets",] == found["BytesToClients",] == 101_001


def test_there_is_none_without_a_runtime_directory_or_if_it_is_not_wanted(stage, folder):
    launch(stage, folder, "--inspect=no")
    assert os.listdir(folder) == []
    proxy = launch(stage, folder, RUNTIME_DIRECTORY=None)
    assert os.listdir(folder) == []
    assert not proxy.log_lines("inspection")


def test_a_path_of_its_own(stage, folder, callers):
    path = stage.path("elsewhere")
    launch(stage, folder, f"--inspect={path}")
    assert os.listdir(folder) == []
    assert callers(path).call(f"{PROXY}.Status")


def test_an_inherited_socket(stage, callers):
    listener, inspection = stage.listener(), stage.listener("unix")
    stage.launch(
        "--inspect=fd:look", stage.echo(), listeners=[listener, inspection], names="web:look"
    )
    greet(stage.connect(listener))
    (reply,) = callers(inspection.getsockname()).call(f"{PROXY}.Status")
    assert [one["name"] for one in reply["parameters"]["listeners"]] == ["web"]


def test_a_folder_that_is_not_there_is_one_warning(stage, folder):
    proxy = launch(stage, f"{folder}/absent")
    greet(stage.connect())
    (line,) = proxy.log_lines("No inspection socket: ")
    assert "No such file or directory" in line


def test_callers_put_off_no_idle_exit(stage, folder, callers):
    proxy = launch(stage, folder, "--exit-idle-time=1s")
    greet(stage.connect())
    for client in list(stage._clients):
        client.close()
    caller, idle = callers(f"{folder}/inspect"), callers(f"{folder}/inspect")
    try:
        while not proxy.has_ended():
            assert caller.call(f"{PROXY}.Status")
    except (AssertionError, OSError):
        pass  # it ended before it answered
    assert proxy.wait() == 0
    assert idle.closed()


def test_callers_take_no_place_of_a_connection(stage, folder, callers):
    launch(stage, folder, "--connections-max=1")
    held = [callers(f"{folder}/inspect") for _ in range(60)]
    assert held[0].call(f"{PROXY}.Status")
    greet(stage.connect())


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n\0", b"\0" * 9, b"x" * 200_000, b"[" * 60_000 + b"\0"]
)
def test_garbage_harms_nothing(stage, folder, callers, garbage):
    launch(stage, folder)
    client = stage.connect()
    caller = callers(f"{folder}/inspect")
    try:
        caller.sock.sendall(garbage)
    except OSError:
        pass  # it was dropped before the end
    assert caller.closed()
    greet(client)
    assert callers(f"{folder}/inspect").call(f"{PROXY}.Status")


def test_callers_that_do_not_read_harm_nobody(stage, folder, callers):
    launch(stage, folder)
    client = stage.connect()
    for _ in range(10):
        caller = callers(f"{folder}/inspect")
        caller.sock.setblocking(False)
        try:
            while True:
                caller.ask(f"{METRICS}.List", more=True)
        except BlockingIOError:
            pass
    greet(client)
    assert callers(f"{folder}/inspect").call(f"{PROXY}.Status")


def test_a_client_that_is_given_up_is_logged_with_its_address(stage, folder):
    proxy = launch(stage, folder, "--connect-timeout=0", target=stage.absent().target)
    client = stage.connect()
    name = "{}:{}".format(*client.getsockname())
    proxy.wait_for_log(f" Client: {name}.")


def test_addresses_may_be_left_out(stage, folder):
    arguments = ["--connect-timeout=0", "--log-addresses=no"]
    proxy = launch(
        stage, folder, *arguments, target=stage.absent().target, SYSTEMD_LOG_LEVEL="debug"
    )
    client = stage.connect()
    proxy.wait_for_log("Failed to connect to remote host: ")
    assert not proxy.log_lines(str(client.getsockname()[1]))


def test_the_totals_are_logged_at_the_end(stage, folder):
    proxy = launch(stage, folder)
    greet(stage.connect())
    proxy.send_signal(signal.SIGTERM)
    assert proxy.wait() == 0
    (line,) = proxy.log_lines("Totals: ")
    assert "Totals: 1 accepted, 0 open, 0 waiting, 0 refused, 0 failed; 1 bytes to targets" in line


def follow(caller, count):
    """The next events of a watcher: [(event, id, state, how)]."""
    found = []
    while len(found) < count:
        told = caller.message()["parameters"]
        row = told["connection"]
        found.append((told["event"], row["id"], row["state"], told.get("how")))
    return found


def test_a_held_client_is_watched_from_its_accept_to_its_end(stage, folder, callers):
    """Each begins once, and keeps its id when the target answers."""
    backend = stage.absent()
    launch(stage, folder, "--connect-timeout=infinity", target=backend.target)
    path = f"{folder}/inspect"
    watcher = callers(path)
    watcher.ask(f"{PROXY}.Watch", more=True)
    assert callers(path).call(f"{PROXY}.Status")  # by now the watcher is there
    first = stage.connect()
    ((event, first_number, state, _),) = follow(watcher, 1)
    assert (event, state) == ("begin", "connecting")  # the target is believed to be up
    wait_until(lambda: listed_as(callers(path), first_number) == "held", "the failed connect")
    second = stage.connect()
    ((event, second_number, state, _),) = follow(watcher, 1)
    assert (event, state) == ("begin", "held")
    assert listed_as(callers(path), second_number) == "held"
    backend.start_listening()
    for client in (first, second):
        client.sendall(b"x")
    servers = [backend.accept() for _ in range(2)]
    for sock in (*servers, first, second):
        sock.close()
    ends = follow(watcher, 2)
    assert {(event, how) for event, _, _, how in ends} <= {("end", "ended"), ("end", "reset")}
    assert {number for _, number, _, _ in ends} == {first_number, second_number}


def listed_as(caller, number):
    """The state of a connection that is listed."""
    rows = [reply["parameters"]["connection"] for reply in caller.call(f"{PROXY}.List", more=True)]
    (row,) = [row for row in rows if row["id"] == number]
    assert row["client"]
    return row["state"]


def test_the_process_of_a_held_client(stage, folder, callers):
    environment = {"RUNTIME_DIRECTORY": folder}
    listeners = [stage.listener("unix")]
    stage.launch(stage.absent().target, listeners=listeners, environment=environment)
    stage.connect()
    caller = callers(f"{folder}/inspect")
    wait_until(lambda: caller.call(f"{PROXY}.Status")[0]["parameters"]["held"], "a held client")
    (reply,) = caller.call(f"{PROXY}.List", more=True)
    assert reply["parameters"]["connection"]["clientPID"] == os.getpid()


def test_a_call_from_a_pipe(stage, folder, callers):
    """As `printf … | nc -U`: the caller has nothing more to say, and wants its reply."""
    launch(stage, folder)
    greet(stage.connect())
    caller = callers(f"{folder}/inspect")
    caller.ask(f"{PROXY}.Status")
    caller.ask(f"{METRICS}.List", more=True)
    caller.sock.shutdown(socket.SHUT_WR)
    assert caller.message()["parameters"]["open"] == 1
    while caller.message().get("continues"):
        pass
    assert caller.closed()


def test_a_caller_that_does_not_wait_for_its_reply(stage, folder, callers):
    """What it has asked for is done."""
    launch(stage, folder)
    client = stage.connect()
    greet(client)
    path = f"{folder}/inspect"
    (row,) = callers(path).call(f"{PROXY}.List", more=True)
    caller = callers(path)
    number = row["parameters"]["connection"]["id"]
    call = {"method": f"{PROXY}.Terminate", "parameters": {"id": number}, "oneway": True}
    caller.sock.sendall(json.dumps(call).encode() + b"\0")
    caller.close()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
