"""NOTIFY_SOCKET: messages that are sent, or cannot be sent."""

import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd.sd_notify import NotifySocket


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """Return a socket that receives, and the NOTIFY_SOCKET that leads to it."""
    name = tmp_path / "notify" if request.param == "path" else f"@proxyd-notify-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(name).replace("@", "\0"))
        sock.setblocking(False)
        yield sock, str(name)


@pytest.fixture
def notifier(request):
    """Return a function that makes a NotifySocket, closed at the end."""

    def make(**environ):
        made = NotifySocket(environ)
        request.addfinalizer(made.close)
        return made

    return make


def test_messages(manager, notifier):
    sock, name = manager
    out = notifier(NOTIFY_SOCKET=name)
    assert out.enabled
    assert out.send("READY=1")
    assert out.status("3 connections\nREADY=0")
    assert out.watchdog()
    assert out.extend(5_000_000)
    assert out.stopping()
    assert out.send("A=1\nB=\udcff")
    assert [sock.recv(4096) for _ in range(6)] == [
        b"READY=1",
        b"STATUS=3 connections READY=0",
        b"WATCHDOG=1",
        b"EXTEND_TIMEOUT_USEC=5000000",
        b"STOPPING=1",
        b"A=1\nB=\\udcff",
    ]


def test_without_a_manager(notifier, capfd):
    out = notifier(WATCHDOG_USEC="1000")
    assert not out.enabled
    assert not out.send("READY=1")
    assert out.watchdog_usec == 0
    assert capfd.readouterr().err == ""


def test_a_busy_manager_is_not_waited_for(manager, notifier, capfd):
    _, name = manager
    out = notifier(NOTIFY_SOCKET=name)
    sent = [out.status("x" * 1000) for _ in range(2000)]
    assert sent[0]
    assert not sent[-1]
    assert capfd.readouterr().err == ""


def test_a_manager_that_is_gone_is_one_warning(manager, notifier, capfd):
    sock, name = manager
    out = notifier(NOTIFY_SOCKET=name)
    sock.close()
    assert not out.send("READY=1")
    assert not out.stopping()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("Failed to send to NOTIFY_SOCKET: ")


@pytest.mark.parametrize("value", ["x", "vsock:2:80", "@", "/" + "a" * 200, "\udcff"])
def test_garbage_in_notify_socket(notifier, capfd, value):
    out = notifier(NOTIFY_SOCKET=value)
    assert not out.enabled
    assert not out.send("READY=1")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("Ignoring NOTIFY_SOCKET=")


@pytest.mark.parametrize(
    ("environ", "usec"),
    [
        ({}, 0),
        ({"WATCHDOG_USEC": "3000000"}, 3_000_000),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3_000_000),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, 0),
        ({"WATCHDOG_PID": str(os.getpid())}, 0),
        ({"WATCHDOG_PID": "x"}, 0),
    ],
)
def test_the_interval_of_the_watchdog(notifier, capfd, environ, usec):
    assert notifier(NOTIFY_SOCKET="@x", **environ).watchdog_usec == usec
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["WATCHDOG_USEC", "WATCHDOG_PID"])
@pytest.mark.parametrize(
    "value", ["", "x", "0", "-1", "1s", "18446744073709551615", "٣", "9" * 5000]
)
def test_garbage_in_the_variables_of_the_watchdog(notifier, capfd, name, value):
    environ = {"WATCHDOG_USEC": "1000"} | {name: value}
    assert notifier(NOTIFY_SOCKET="@x", **environ).watchdog_usec == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"Ignoring {name}=")


@given(
    st.dictionaries(
        st.sampled_from(["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"]),
        st.text(st.characters(min_codepoint=1)),
    )
)
def test_any_environment(environ):
    NotifySocket(environ).close()


def test_a_descriptor(manager, notifier):
    sock, name = manager
    out = notifier(NOTIFY_SOCKET=name)
    file = os.open("/dev/null", os.O_RDONLY)
    assert out.send("FDSTORE=1", file)
    data, fds, _, _ = socket.recv_fds(sock, 4096, 2)
    assert data == b"FDSTORE=1"
    assert os.path.sameopenfile(file, fds[0])
    assert len(fds) == 1
    for fd in (file, *fds):
        os.close(fd)
