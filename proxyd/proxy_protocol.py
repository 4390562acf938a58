"""PROXY protocol headers, versions 1 and 2 (haproxy.org, proxy-protocol.txt)."""

import _socket

from proxyd import address as sockaddr
from proxyd._relay import socket_names

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_LOCAL, _PROXY = b"\x20", b"\x21"
_TCP4, _TCP6 = b"\x11", b"\x21"
_INET = (sockaddr.AF_INET, sockaddr.AF_INET6)


class UnknownAddressError(Exception):
    """The addresses of a TCP client are unknown, because it has been reset."""


def header(version: int, client: int, peer: bytes) -> bytes:
    """Return the header that tells a target the addresses of `client`, an accepted socket.

    `peer` is the client's packed address from accept(2), because getpeername(2) fails after a
    reset. IPv4-mapped addresses are sent as IPv4. A client of another family (UNIX, VSOCK) is sent
    as UNKNOWN (v1), or as LOCAL without addresses (v2), for which a receiver uses the addresses of
    the connection, that is, ours. So a TCP client is never sent as that.

    Raises UnknownAddressError.
    """
    own = socket_names(client)[1]
    if sockaddr.family(peer or own) not in _INET:
        if not own:
            raise UnknownAddressError
        return b"PROXY UNKNOWN\r\n" if version == 1 else _SIGNATURE + _LOCAL + bytes(3)
    peer, own = sockaddr.unmapped(peer), sockaddr.unmapped(own)
    if sockaddr.family(peer) != sockaddr.family(own):  # either may be b""
        raise UnknownAddressError
    return _v1(peer, own) if version == 1 else _v2(peer, own)


def _v1(peer: bytes, own: bytes) -> bytes:
    family = sockaddr.family(peer)
    words = (
        "PROXY",
        "TCP4" if family == sockaddr.AF_INET else "TCP6",
        _socket.inet_ntop(family, _host(peer)),
        _socket.inet_ntop(family, _host(own)),
        str(sockaddr.port(peer)),
        str(sockaddr.port(own)),
    )
    return " ".join(words).encode() + b"\r\n"


def _v2(peer: bytes, own: bytes) -> bytes:
    kind = _TCP4 if sockaddr.family(peer) == sockaddr.AF_INET else _TCP6
    body = _host(peer) + _host(own) + peer[2:4] + own[2:4]
    return _SIGNATURE + _PROXY + kind + len(body).to_bytes(2, "big") + body


def _host(address: bytes) -> bytes:
    """Return the address without family and port, in network byte order."""
    return address[4:8] if sockaddr.family(address) == sockaddr.AF_INET else address[8:24]
