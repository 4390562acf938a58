"""Sockets whose last close(2) waits, and how a peer sends them (SCM_RIGHTS)."""

import array
import contextlib
import os
import socket
import struct

LINGER_S = 600


class SlowSocket:
    """A TCP socket whose close(2) waits for LINGER_S or release(): its peer does not read."""

    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.socket = socket.create_connection(server.getsockname())
            self.peer, _ = server.accept()
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.socket.send(bytes(65536))
        linger = struct.pack("ii", 1, LINGER_S)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def release(self):
        """End the close(2) that waits. May be called again."""
        if self.peer.fileno() < 0:
            return
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.peer.close()


def send_slow(connection, data, flags=0):
    """Send bytes with a slow socket, whose only copy is then in the message; the SlowSocket.

    Raises OSError if the kernel refuses descriptors.
    """
    slow = SlowSocket()
    fds = array.array("i", [slow.socket.fileno()])
    try:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
        assert connection.sendmsg([data], ancillary, flags) == len(data)
    except OSError:
        slow.release()
        raise
    finally:
        slow.socket.close()
    return slow


def kernel_refuses():
    """Whether this kernel can refuse descriptors (SO_PASSRIGHTS, Linux 6.16)."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, 83, 0)
        except OSError:
            return False
    return True


def thread_ids():
    """The ids of the threads of this process; /proc may show a joined one for a moment longer."""
    return set(os.listdir("/proc/self/task"))


def waits_in_close(thread):
    """Whether the kernel has it wait elsewhere than in epoll_wait(2)."""
    try:
        with open(f"/proc/self/task/{thread}/wchan") as wchan:
            place = wchan.read()
    except OSError:
        return False
    return place not in ("0", "") and "epoll" not in place and "ep_poll" not in place
