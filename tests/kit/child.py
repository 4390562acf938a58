"""Run a piece of a test in a process of its own: it may crash, hang, or be short of something."""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
import time
import traceback

import pytest

SKIPPED = 77


def in_child(function, patience=10.0):
    """Run `function` in a forked child, and fail unless it returns in time."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        except pytest.skip.Exception as reason:
            status = SKIPPED
            print(f"skipped: {reason}", file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = wait_for(child, patience)
    assert status is not None, f"hung for {patience:g} s"
    assert not os.WIFSIGNALED(status), signal.Signals(os.WTERMSIG(status)).name
    if os.waitstatus_to_exitcode(status) == SKIPPED:
        pytest.skip("not possible here; see what the child said")
    assert os.waitstatus_to_exitcode(status) == 0, "failed; see its traceback"


def wait_for(child, patience):
    """The wait status of a child, or None and it was killed."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


# ── a network of its own ─────────────────────────────────────────────────────────────────────────

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1


def enter_own_network():
    """Leave this process's network for a namespace with nothing in it but loopback. OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "no network namespace")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def in_own_network(function):
    """Has `function` see a network namespace with nothing in it but loopback. For in_child()."""

    def run():
        try:
            enter_own_network()
        except OSError as error:
            pytest.skip(f"no network namespace: {os.strerror(error.errno)}")
        function()

    return run
