"""PROXY protocol headers, versions 1 and 2 (haproxy.org, proxy-protocol.txt)."""

import _socket

from proxyd import address as sockaddr
from proxyd._relay import socket_names

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd.received_header import ReceivedHeader

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_LOCAL, _PROXY = b"\x20", b"\x21"
_UNSPECIFIED, _TCP4, _TCP6, _UNIX = b"\0", b"\x11", b"\x21", b"\x31"
_CRC32C = b"\x03\0\x04"
"""The head of the checksum's field."""
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
    return _v1(peer, own) if version == 1 else _v2(*_addresses(peer, own))


def pass_on(version: int, received: "ReceivedHeader") -> bytes:
    """Return the header that tells a target what another one has said.

    Version 1 has no words for a UNIX client, nor for the further fields of version 2.
    """
    known = received.peer and not received.unix
    peer, own = sockaddr.unmapped(received.peer), sockaddr.unmapped(received.own)
    if sockaddr.family(peer) != sockaddr.family(own):  # only one of them is mapped
        peer, own = received.peer, received.own
    if version == 1:
        return _v1(peer, own) if known else b"PROXY UNKNOWN\r\n"
    if received.local:
        return _SIGNATURE + _LOCAL + bytes(3)
    kind, body = _UNSPECIFIED, b""
    if known:
        kind, body = _addresses(peer, own)
    elif received.unix:
        kind, body = _UNIX, received.unix
    return _v2(kind, body, received.tlvs, checksum=received.checksum)


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


def _addresses(peer: bytes, own: bytes) -> tuple[bytes, bytes]:
    """Return the family of version 2, and the addresses."""
    kind = _TCP4 if sockaddr.family(peer) == sockaddr.AF_INET else _TCP6
    return kind, _host(peer) + _host(own) + peer[2:4] + own[2:4]


def _v2(kind: bytes, addresses: bytes, tlvs: bytes = b"", *, checksum: bool = False) -> bytes:
    body = addresses + tlvs + (_CRC32C + bytes(4) if checksum else b"")
    whole = _SIGNATURE + _PROXY + kind + len(body).to_bytes(2, "big") + body
    if not checksum:
        return whole
    from proxyd.crc32c import crc32c

    return whole[:-4] + crc32c(whole).to_bytes(4, "big")


def _host(address: bytes) -> bytes:
    """Return the address without family and port, in network byte order."""
    return address[4:8] if sockaddr.family(address) == sockaddr.AF_INET else address[8:24]
