"""PROXY protocol headers, versions 1 and 2 (haproxy.org, proxy-protocol.txt)."""

import _socket

from proxyd import address as sockaddr
from proxyd._relay import socket_names

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_LOCAL, _PROXY = b"\x20", b"\x21"
_TCP4, _TCP6 = b"\x11", b"\x21"


def header(version: int, client: int) -> bytes:
    """Return the header that tells a target who `client`, an accepted socket, is.

    IPv4-mapped addresses are sent as IPv4. What is neither TCP over IPv4 nor over IPv6 is
    UNKNOWN (v1), or LOCAL without addresses (v2): the receiver then uses the real ones.
    """
    peer, own = (sockaddr.unmapped(name) if name else b"" for name in socket_names(client))
    inet = (
        len(peer) > 2
        and sockaddr.family(peer) == sockaddr.family(own)
        and sockaddr.family(peer) in (sockaddr.AF_INET, sockaddr.AF_INET6)
    )
    if version == 1:
        return _v1(peer, own) if inet else b"PROXY UNKNOWN\r\n"
    return _v2(peer, own) if inet else _SIGNATURE + _LOCAL + bytes(3)


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
    """The address without family and port, in network byte order."""
    return address[4:8] if sockaddr.family(address) == sockaddr.AF_INET else address[8:24]
