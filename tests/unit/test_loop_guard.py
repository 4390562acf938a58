"""Which listeners may have ourselves as a client, by network namespace and family."""

import os
import shutil
import socket
import subprocess
import sys

import pytest

from proxyd import address as sockaddr
from proxyd import loop_guard
from proxyd._relay import CHECK_TCP, CHECK_UNIX
from proxyd.listen import Listener
from proxyd.loop_guard import what_to_check
from proxyd.target import parse_target

PATIENCE = 20

SO_NETNS_COOKIE = 71


def listener(sock, target):
    one = Listener(sock.fileno(), "x", sockaddr.from_socket_name(sock.family, sock.getsockname()))
    one.target = parse_target(target)
    return one


@pytest.fixture
def listening():
    opened = []

    def make(kind, where):
        sock = socket.socket(kind)
        opened.append(sock)
        try:
            sock.bind(where)
        except OSError as error:
            pytest.skip(f"SKIPPED LOUDLY: cannot listen on {where}: {error}")
        sock.listen()
        return sock

    yield make
    for sock in opened:
        sock.close()


@pytest.fixture
def netns_cookies():
    with socket.socket() as sock:
        try:
            sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
        except OSError:
            pytest.skip("SKIPPED LOUDLY: this kernel has no SO_NETNS_COOKIE (Linux 5.14)")


TARGETS = ["127.0.0.1:80", "[::1]:80", "backend:80", "127.0.0.1:*", "/run/x"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("kind", "where"), [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0))]
)
def test_a_tcp_listener_in_our_network_is_checked(listening, netns_cookies, kind, where, target):
    sock = listening(kind, where)
    assert what_to_check(listener(sock, target)) == CHECK_TCP
    # The check has not closed the fd that it borrowed.
    assert sock.getsockname()[0] == where[0]


@pytest.mark.parametrize(
    ("target", "check"),
    [("/run/x", CHECK_UNIX), ("@x", CHECK_UNIX), ("127.0.0.1:80", 0), ("backend:80", 0)],
)
def test_a_unix_listener_is_checked_if_the_target_is_unix_too(listening, tmp_path, target, check):
    sock = listening(socket.AF_UNIX, str(tmp_path / "socket"))
    assert what_to_check(listener(sock, target)) == check


def test_other_families_are_not_checked():
    one = Listener(-1, "x", sockaddr.pack_vsock(1, 80))
    one.target = parse_target("127.0.0.1:80")
    assert what_to_check(one) == 0


def test_without_the_cookie_nothing_is_checked(listening, monkeypatch):
    def too_old(sock):
        raise OSError(92, "Protocol not available")

    monkeypatch.setattr(loop_guard, "_network_of", too_old)
    sock = listening(socket.AF_INET, ("127.0.0.1", 0))
    assert what_to_check(listener(sock, "127.0.0.1:80")) == 0
    assert sock.getsockname()


def test_without_an_fd_to_compare_with_nothing_is_checked(listening, monkeypatch):
    sock = listening(socket.AF_INET, ("127.0.0.1", 0))
    one = listener(sock, "127.0.0.1:80")

    class Exhausted:
        SOCK_STREAM = socket.SOCK_STREAM

        @staticmethod
        def socket(*_, **__):
            raise OSError(24, "Too many open files")

    monkeypatch.setattr(loop_guard, "_socket", Exhausted)
    assert what_to_check(one) == 0


LISTEN_ELSEWHERE = """
import socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
sock = socket.socket()
sock.bind(("0.0.0.0", 0))
sock.listen()
socket.send_fds(channel, [b"x"], [sock.fileno()])
"""


def listen_elsewhere(unshare):
    """The fd of a listener in another network namespace; None if one cannot be made."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [*unshare, sys.executable, "-c", LISTEN_ELSEWHERE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode != 0:
            return None
        _, (fd,), _, _ = socket.recv_fds(ours, 10, 1)
        return fd


def test_a_listener_in_another_network_is_not_checked(netns_cookies):
    """There, an equal address is another one."""
    if shutil.which("unshare") is None:
        pytest.skip("SKIPPED LOUDLY: no unshare(1): listeners of other networks are not tested")
    fd = listen_elsewhere(["unshare", "--net"])
    if fd is None:
        fd = listen_elsewhere(["unshare", "--user", "--map-root-user", "--net"])
    if fd is None:
        pytest.skip("SKIPPED LOUDLY: may not unshare a network namespace (needs root)")
    with socket.socket(fileno=fd) as sock:
        assert what_to_check(listener(sock, "127.0.0.1:80")) == 0
        assert os.fstat(fd)
