"""A peer or another process tries to block the program: others are served, SIGTERM works."""

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess

import pytest
from kit.differences import differs
from kit.sockets import read_exactly, read_to_end
from kit.traffic import greet
from kit.waiting import wait_until

LINGER_S = 600

blocks = differs("original", reason="waits in close(2) or accept4(2), signals too", run=False)
with_threads = pytest.mark.parametrize(
    "options", [(), ("--threads=3", "--hand-over=always")], ids=["one", "three"]
)

STRACE = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=accept4"]
OWN_PID = ["/bin/sh", "-c", 'LISTEN_PID=$$ exec "$0" "$@"']
"""strace(1) starts the program as a child."""

ACCEPT4 = ("288", "242")
"""Its system call number on x86-64, and on arm64 and others."""

OLDER_KERNEL = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/socket.h>
int setsockopt(int fd, int level, int name, const void *value, socklen_t size)
{
    int (*real)(int, int, int, const void *, socklen_t) = dlsym(RTLD_NEXT, "setsockopt");
    if (level == SOL_SOCKET && name == 83) {
        errno = ENOPROTOOPT;
        return -1;
    }
    return real(fd, level, name, value, size);
}
"""


@pytest.fixture(params=["this kernel", "before 6.16"])
def environment(request, tmp_path):
    """With SO_PASSRIGHTS where this kernel has it, and without."""
    if request.param == "this kernel":
        return {}
    if not shutil.which("cc"):
        pytest.skip("SKIPPED LOUDLY: no C compiler, to make this kernel look older")
    source = tmp_path / "older.c"
    source.write_text(OLDER_KERNEL)
    library = tmp_path / "older.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


@pytest.fixture
def slow():
    """Make TCP sockets whose close(2) takes LINGER_S, because their peers do not read."""
    peers = []

    def make():
        with socket.create_server(("127.0.0.1", 0)) as server:
            one = socket.create_connection(server.getsockname())
            peers.append(server.accept()[0])
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                one.send(bytes(65536))
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_S))
        return one

    yield make
    for peer in peers:
        peer.close()


def send_one(connection, one, data=b"!", proxy=None):
    """Send bytes with a socket of which the receiver gets the only reference.

    OSError if the kernel refuses it. A `proxy` that runs is stopped meanwhile: if it dropped its
    reference before we drop ours, we would be the one that waits.
    """
    if proxy is not None:
        proxy.send_signal(signal.SIGSTOP)
        wait_until(lambda: process_state(proxy.worker) == "T", "the stop")
    try:
        socket.send_fds(connection, [data], [one.fileno()])
    except OSError:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        raise
    finally:
        one.close()
        if proxy is not None:
            proxy.send_signal(signal.SIGCONT)


def process_state(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


def others_are_served(stage, listener):
    for _ in range(5):
        with contextlib.closing(stage.connect(listener)) as client:
            greet(client)


def ends_on_sigterm(stage):
    stage.proxy.send_signal(signal.SIGTERM)
    assert stage.proxy.wait() == 0


# ── file descriptors over UNIX sockets ───────────────────────────────────────────────────────────


@blocks
@with_threads
def test_descriptors_queued_before_the_start(stage, slow, options, environment):
    listener = stage.listener("unix")
    early = [stage.connect(listener) for _ in range(3)]
    for client in early:
        send_one(client, slow(), b"hello")
    stage.launch(*options, stage.echo(), listeners=[listener], environment=environment)
    others_are_served(stage, listener)
    ends_on_sigterm(stage)


@blocks
@with_threads
def test_descriptors_sent_later(stage, slow, options, environment):
    listener = stage.listener("unix")
    stage.launch(*options, stage.echo(), listeners=[listener], environment=environment)
    client = stage.connect(listener)
    greet(client)
    with contextlib.suppress(PermissionError):  # where the kernel can refuse them
        send_one(client, slow(), proxy=stage.proxy)
    client.sendall(b"more")
    others_are_served(stage, listener)
    ends_on_sigterm(stage)


@blocks
@with_threads
def test_descriptors_from_a_target(stage, slow, options, environment):
    listener, backend = stage.listener("unix"), stage.backend("unix")
    stage.launch(*options, backend.target, listeners=[listener], environment=environment)
    clients = [stage.connect(listener) for _ in range(2)]
    targets = [backend.accept() for _ in clients]
    for target in targets:
        with contextlib.suppress(PermissionError):
            send_one(target, slow(), proxy=stage.proxy)
    other = stage.connect(listener)
    other.sendall(b"hello")
    assert read_exactly(backend.accept(), 5) == b"hello"
    ends_on_sigterm(stage)


@blocks
def test_descriptors_of_refused_clients(stage, slow, environment):
    listener = stage.listener("unix")
    stage.launch("-c1", stage.echo(), listeners=[listener], environment=environment)
    served = stage.connect(listener)
    greet(served)
    for _ in range(10):
        client = stage.connect(listener)
        with contextlib.suppress(OSError):  # refused or closed already
            send_one(client, slow(), proxy=stage.proxy)
    greet(served)
    ends_on_sigterm(stage)


@blocks
def test_descriptors_of_held_clients(stage, slow, environment):
    """They are given up, or cut by SIGTERM, while what they have sent is unread."""
    listener = stage.listener("unix")
    where = stage.path("target")
    stage.launch("--connect-timeout=200ms", where, listeners=[listener], environment=environment)
    client = stage.connect(listener)
    send_one(client, slow(), proxy=stage.proxy)
    assert read_to_end(client)[0] == b""
    held = stage.connect(listener)
    send_one(held, slow(), proxy=stage.proxy)
    ends_on_sigterm(stage)


@blocks
@pytest.mark.parametrize("how", ["drain", "idle exit"])
def test_a_close_that_waits_does_not_count_as_a_connection(stage, slow, environment, how):
    """Neither a drain nor an idle exit waits for it, and it is counted once."""
    listener = stage.listener("unix")
    options = ["--drain-timeout=1min"] if how == "drain" else ["--exit-idle-time=300ms"]
    options += ["-c1", stage.echo()]
    proxy = stage.launch(*options, listeners=[listener], environment=environment)
    served = stage.connect(listener)
    greet(served)
    proxy.send_signal(signal.SIGSTOP)
    refused = stage.connect(listener)
    send_one(refused, slow())
    proxy.send_signal(signal.SIGCONT)
    assert read_to_end(refused)[0] == b""
    wait_until(lambda: a_close_waits(proxy.worker), "a close that waits")
    proxy.send_signal(signal.SIGUSR1)
    proxy.wait_for_log("2 accepted, 1 open, 0 waiting, 1 refused, 0 failed;")
    served.close()
    if how == "drain":
        proxy.send_signal(signal.SIGTERM)
    assert proxy.wait(timeout=20) == 0


def a_close_waits(pid):
    return any("linger" in waits or "wait_woken" in waits for waits in wait_channels(pid))


def wait_channels(pid):
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/wchan") as wchan:
            yield wchan.read()


@blocks
def test_descriptors_in_the_backlog_at_the_end(stage, slow, environment):
    """A listener of our own is closed while clients are in its backlog."""
    where = stage.path("own")
    proxy = stage.launch("-c1", f"--listen={where}", stage.echo(), environment=environment)
    with contextlib.closing(stage.connect_to(where, socket.AF_UNIX)) as served:
        greet(served)
        proxy.send_signal(signal.SIGSTOP)
        waiting = stage.connect_to(where, socket.AF_UNIX)
        with contextlib.suppress(PermissionError):
            send_one(waiting, slow())
        proxy.send_signal(signal.SIGTERM)
        proxy.send_signal(signal.SIGCONT)
        assert proxy.wait() == 0
    assert not os.path.exists(where)


# ── settings of a listener ───────────────────────────────────────────────────────────────────────


@blocks
@pytest.mark.parametrize("seconds", [0, LINGER_S])
@pytest.mark.parametrize("when", ["before", "later"])
def test_linger_of_the_listener(stage, seconds, when):
    """Clients inherit it: close(2) would wait for a slow reader, or reset it."""
    listener, backend = stage.listener("tcp4"), stage.backend("tcp4")

    def set_linger():
        value = struct.pack("ii", 1, seconds)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)

    if when == "before":
        set_linger()
    stage.launch(backend.target, listeners=[listener])
    if when == "later":
        set_linger()
    client = stage.connect(listener)
    target = backend.accept()
    client.shutdown(socket.SHUT_WR)
    assert read_to_end(target)[0] == b""
    size = 3_000_000
    target.sendall(bytes(size))
    target.close()
    wait_until(lambda: stage.proxy.socket_count() == stage.proxy.sockets_at_start, "its close")
    other = stage.connect(listener)
    other.sendall(b"hello")
    assert read_exactly(backend.accept(), 5) == b"hello"
    data, end = read_to_end(client)
    assert (len(data), end) == (size, "eof")


@blocks
def test_a_listener_that_another_process_makes_blocking(stage):
    """It clears O_NONBLOCK and accepts the client just before accept4(2), which then waits.
    SIGTERM ends the program all the same."""
    if not shutil.which("strace"):
        pytest.skip("SKIPPED LOUDLY: no strace here")
    listener = stage.listener("tcp4")
    stage.launch(
        stage.echo(),
        listeners=[listener],
        prefix=[*STRACE, "-e", "inject=accept4:delay_enter=1000000", *OWN_PID],
    )
    client = stage.connect(listener)
    wait_until(lambda: is_about_to_accept(stage.proxy.worker), "accept4, which begins late")
    listener.setblocking(True)
    taken, _ = listener.accept()
    taken.close()
    client.close()
    wait_until(lambda: waits_in(stage.proxy.worker, "accept"), "accept4 that waits")
    os.kill(stage.proxy.worker, signal.SIGTERM)
    assert stage.proxy.wait() == 0


def is_about_to_accept(pid):
    with open(f"/proc/{pid}/syscall") as call:
        return call.read().split()[0] in ACCEPT4


def waits_in(pid, what):
    with open(f"/proc/{pid}/wchan") as wchan:
        return what in wchan.read()


# ── signals that a parent has ignored ────────────────────────────────────────────────────────────


@differs("original", reason="SIGHUP kills it")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(stage, number):
    """As for a program started with `&` or nohup(1)."""
    ignore = "HUP" if number == signal.SIGHUP else "INT"
    stage.launch(
        stage.echo(),
        listeners=[stage.listener()],
        prefix=["/bin/sh", "-c", f'trap "" {ignore}; exec "$0" "$@"'],
    )
    stage.proxy.send_signal(number)
    greet(stage.connect())
    assert not stage.proxy.has_ended()
    ends_on_sigterm(stage)
