"""Which listeners have to be guarded against clients that are ourselves.

A target may lead back to one of the listeners. Equal addresses do not prove that: an inherited
listener is often in another network namespace, where its address is the backend's. Proof is that an
accepted client has the address of one of our own outgoing sockets, in the same network namespace,
or, on a UNIX socket, that our own process is its peer.
"""

import _socket

from proxyd._relay import CHECK_TCP, CHECK_UNIX
from proxyd.address import AF_INET, AF_INET6, AF_UNIX
from proxyd.listen import Listener

_SO_NETNS_COOKIE = 71  # asm-generic/socket.h; Linux 5.14


def what_to_check(listener: Listener) -> int:
    """Return how the relay is to check accepted clients: CHECK_TCP, CHECK_UNIX or 0."""
    family = listener.family
    if family == AF_UNIX:
        address = listener.target.address
        return CHECK_UNIX if address is not None and address[:2] == listener.address[:2] else 0
    if family in (AF_INET, AF_INET6) and _in_our_network(listener.fd, family):
        return CHECK_TCP
    return 0


def is_guarded(listener: Listener) -> bool:
    """Tell whether a client of a datagram listener may be one of our own sockets."""
    if listener.family == AF_UNIX:
        address = listener.target.address
        return address is not None and address[:2] == listener.address[:2]
    return _in_our_network(listener.fd, listener.family)


def _in_our_network(fd: int, family: int) -> bool:
    """Tell whether a socket is in our network namespace; False if that is unknown."""
    try:
        ours = _socket.socket(family, _socket.SOCK_STREAM)
    except OSError:
        return False
    theirs = _socket.socket(fileno=fd)
    try:
        return _network_of(theirs) == _network_of(ours)
    except OSError:
        return False
    finally:
        theirs.detach()
        ours.close()


def _network_of(sock: _socket.socket) -> bytes:
    """Return the number of a socket's network namespace. Raises OSError."""
    return sock.getsockopt(_socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
