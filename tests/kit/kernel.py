"""Duplicates of the program's own fds, to inspect them from outside: pidfd_getfd(2)."""

import ctypes
import errno
import os
import socket

import pytest

SYS_PIDFD_GETFD = 438

_libc = ctypes.CDLL(None, use_errno=True)


def duplicate(pidfd, fd):
    """Duplicate an fd of another process. Raises FileNotFoundError if it has been closed."""
    copy = _libc.syscall(SYS_PIDFD_GETFD, pidfd, fd, 0)
    if copy < 0:
        error = ctypes.get_errno()
        kind = FileNotFoundError if error == errno.EBADF else OSError
        raise kind(error, os.strerror(error))
    return copy


def borrowed_sockets(proxy):
    """Duplicates of the program's TCP connections. Skips the test if they are not permitted."""
    found = []
    for fd, what in proxy.fds().items():
        if not what.startswith("socket:"):
            continue
        try:
            entry = socket.socket(fileno=duplicate(proxy.pidfd, fd))
        except OSError as error:
            pytest.skip(f"pidfd_getfd: {error.strerror}")
        listens = entry.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if entry.family in (socket.AF_INET, socket.AF_INET6) and not listens:
            found.append(entry)
        else:
            entry.close()
    return found
