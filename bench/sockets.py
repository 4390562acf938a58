"""Addresses and listening sockets, in the notation of load.c: ``tcp:PORT`` or ``unix:PATH``.

``udp:PORT`` is a socket for datagrams; at ``udp1:PORT`` each client asks one question.
"""

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
BACKLOG = 4096


def enter_network() -> bool:
    """Move this process to a network of its own with only a loopback; False if not allowed.

    Each run gets a new one: without sockets in TIME_WAIT from the previous run, without the
    machine's packet filter, and without other traffic on its loopback.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        return False
    with socket.socket() as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))
    # Short connections exhaust the default range of ports within two seconds.
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("1024 65000")
    return True


def bind(family: str, path: Path) -> tuple[socket.socket, str]:
    """A listening socket, at ``path`` if ``family`` is ``unix``, and its address."""
    if family == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(path))
        address = f"unix:{path}"
    elif is_datagram(family):
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listener.bind(("127.0.0.1", 0))
        listener.setblocking(False)
        return listener, f"{family}:{listener.getsockname()[1]}"
    else:
        listener = socket.socket(socket.AF_INET)
        listener.bind(("127.0.0.1", 0))
        address = f"tcp:{listener.getsockname()[1]}"
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener, address


def is_datagram(family: str) -> bool:
    """Whether a family, or an address of it, is one of datagrams."""
    return family.startswith("udp")


def free_address(family: str, path: Path) -> str:
    """An address for a program that opens its own listening socket."""
    listener, address = bind(family, path)
    listener.close()
    path.unlink(missing_ok=True)
    return address


def connect(address: str) -> socket.socket:
    """Connect to ``address``; raises OSError."""
    kind, _, rest = address.partition(":")
    client = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
    try:
        client.connect(rest if kind == "unix" else ("127.0.0.1", int(rest)))
    except OSError:
        client.close()
        raise
    return client


def host_form(address: str) -> str:
    """Return ``127.0.0.1:PORT`` or ``/PATH``, as most programs take it on the command line."""
    kind, _, rest = address.partition(":")
    return rest if kind == "unix" else f"127.0.0.1:{rest}"
