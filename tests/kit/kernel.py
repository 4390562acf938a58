"""System calls that Python 3.11 has no name for, for looking into the program from outside."""

import ctypes
import os
import socket
import threading

import pytest

SYS_PIDFD_GETFD = 438
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def borrowed_sockets(proxy):
    """Duplicates of the program's TCP connections, to read their options; skips if forbidden."""
    found = []
    for fd, what in proxy.fds().items():
        if not what.startswith("socket:"):
            continue
        copy = _libc.syscall(SYS_PIDFD_GETFD, proxy.pidfd, fd, 0)
        if copy < 0:
            pytest.skip(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
        entry = socket.socket(fileno=copy)
        listens = entry.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if entry.family in (socket.AF_INET, socket.AF_INET6) and not listens:
            found.append(entry)
        else:
            entry.close()
    return found


def in_network_namespace_of(pid, work):
    """Run `work()` in a thread that has entered the network namespace of `pid`.

    A socket stays in the namespace in which it was made, so what `work` returns may be used from
    every thread.
    """
    result = []

    def enter_and_work():
        with open(f"/proc/{pid}/ns/net") as namespace:
            if _libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                result.append(OSError(ctypes.get_errno(), "setns"))
                return
        try:
            result.append(work())
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=enter_and_work)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]
