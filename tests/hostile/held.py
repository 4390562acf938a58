"""What a program holds for its connections: in its own memory, in pipes and in socket buffers.

It is read from the program's fds, duplicated with pidfd_getfd(2), and so does not depend on what
else runs on the machine.
"""

import contextlib
import fcntl
import os
import socket
import struct
import termios

from kit.kernel import duplicate

from bench import memory

SO_MEMINFO = 55
_RMEM, _WMEM, _QUEUED = 0, 2, 5  # SK_MEMINFO_*: linux/sock_diag.h


class Held:
    """All of it in bytes, except the numbers of `pipes` and `sockets`."""

    def __init__(self, proxy):
        self.private = memory.private([proxy.pid])
        self.pipes = self.pipe_bytes = self.sockets = self.received = self.sending = 0
        for fd, what in proxy.fds().items():
            with contextlib.suppress(FileNotFoundError):
                if what.startswith("socket:"):
                    self._add_socket(proxy.pidfd, fd)
                elif what.startswith("pipe:"):
                    self._add_pipe(proxy.pidfd, fd)

    def _add_socket(self, pidfd, fd):
        with socket.socket(fileno=duplicate(pidfd, fd)) as sock:
            counts = struct.unpack("9I", sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))
            self.sockets += 1
            self.received += counts[_RMEM]
            self.sending += max(counts[_WMEM], counts[_QUEUED])

    def _add_pipe(self, pidfd, fd):
        copy = duplicate(pidfd, fd)
        try:
            if fcntl.fcntl(copy, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                self.pipes += 1
                inside = fcntl.ioctl(copy, termios.FIONREAD, bytes(4))
                self.pipe_bytes += int.from_bytes(inside, "little")
        finally:
            os.close(copy)
