"""PROXY headers that clients begin with, versions 1 and 2 (haproxy.org, proxy-protocol.txt)."""

import _socket

from proxyd import address as sockaddr
from proxyd.crc32c import crc32c

SIZE_MAX = 4096
"""The longest header that is read, in bytes."""

_V1_MAX = 107
"""With it the specification allows a receiver to give up."""

_V1 = b"PROXY "
_V2 = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED = 16
"""Signature, command, family and length."""

_LOCAL, _PROXY = 0, 1
_UNSPECIFIED, _TCP4, _TCP6, _UNIX = 0x00, 0x11, 0x21, 0x31
_ADDRESSES = {_UNSPECIFIED: 0, _TCP4: 12, _TCP6: 36, _UNIX: 216}
"""The size of the addresses, by family."""

_CRC32C, _NOOP = 0x03, 0x04


class HeaderError(Exception):
    """What was received is no PROXY header, or a bad one."""


class ReceivedHeader:
    """What a header says. The addresses are packed, and b"" where it does not say any."""

    __slots__ = ("checksum", "local", "own", "peer", "size", "tlvs", "unix")

    def __init__(  # noqa: PLR0913 - all that a header says
        self,
        size: int,
        peer: bytes = b"",
        own: bytes = b"",
        *,
        local: bool = False,
        unix: bytes = b"",
        tlvs: bytes = b"",
        checksum: bool = False,
    ) -> None:
        self.size = size
        """Of the header, in bytes."""
        self.peer = peer
        """The client."""
        self.own = own
        """What the client connected to."""
        self.local = local
        """The connection is the balancer's own, such as a health check."""
        self.unix = unix
        """The addresses of a UNIX client, as they were received."""
        self.tlvs = tlvs
        """The further fields of version 2, without checksum and padding."""
        self.checksum = checksum
        """Whether there was a checksum."""


def parse(data: bytes) -> ReceivedHeader | None:
    """Read the header that `data` begins with; None: it may be one, but is not complete.

    `data` may be more than the header. Raises HeaderError as early as it is clear that it is none.
    """
    for start, read in ((_V1, _parse_v1), (_V2, _parse_v2)):
        if data.startswith(start):
            return read(data)
        if start.startswith(data):
            return None
    raise HeaderError("no PROXY header")


# ── version 1 ─────────────────────────────────────────────────────────────────────────────────────


def _parse_v1(data: bytes) -> ReceivedHeader | None:
    line, end, _ = data[:_V1_MAX].partition(b"\r\n")
    if not end:
        if len(data) >= _V1_MAX:
            raise HeaderError("a PROXY header of version 1 without an end")
        return None
    size = len(line) + len(end)
    words = line.decode("latin-1").split(" ")
    if words[1] == "UNKNOWN":
        return ReceivedHeader(size)  # what follows is to be ignored
    family = {"TCP4": sockaddr.AF_INET, "TCP6": sockaddr.AF_INET6}.get(words[1])
    if family is None or len(words) != 6:
        raise HeaderError("a PROXY header of version 1 with other words than it has")
    peer, own = (
        sockaddr.pack_host(family, _host(family, host), _port(port))
        for host, port in ((words[2], words[4]), (words[3], words[5]))
    )
    return ReceivedHeader(size, peer, own)


def _host(family: int, text: str) -> bytes:
    try:
        return _socket.inet_pton(family, text)
    except (OSError, ValueError):  # ValueError: it contains a NUL
        raise HeaderError("a PROXY header of version 1 with a bad address") from None


def _port(digits: str) -> bytes:
    if not digits.isascii() or not digits.isdigit() or len(digits) > 5:
        raise HeaderError("a PROXY header of version 1 with a bad port")
    number = int(digits)
    if number > 65535 or str(number) != digits:
        raise HeaderError("a PROXY header of version 1 with a bad port")
    return number.to_bytes(2, "big")


# ── version 2 ─────────────────────────────────────────────────────────────────────────────────────


def _parse_v2(data: bytes) -> ReceivedHeader | None:
    if len(data) > 12 and data[12] not in (0x20 | _LOCAL, 0x20 | _PROXY):
        raise HeaderError("a PROXY header of version 2 with an unknown command")
    if len(data) < _V2_FIXED:
        return None
    size = _V2_FIXED + int.from_bytes(data[14:16], "big")
    if size > SIZE_MAX:
        raise HeaderError(f"a PROXY header of {size} bytes")
    if len(data) < size:
        return None
    if data[12] & 0xF == _LOCAL:
        return ReceivedHeader(size, local=True)  # the rest is to be ignored
    return _parse_proxy(data[:size])


def _parse_proxy(header: bytes) -> ReceivedHeader:
    family = header[13]
    length = _ADDRESSES.get(family)
    if length is None:
        raise HeaderError("a PROXY header of version 2 for another transport than TCP or UNIX")
    addresses = header[_V2_FIXED : _V2_FIXED + length]
    if len(addresses) < length:
        raise HeaderError("a PROXY header of version 2 without room for its addresses")
    tlvs, checksum = _parse_tlvs(header, _V2_FIXED + length)
    peer = own = unix = b""
    if family == _UNIX:
        unix = addresses
        peer = _unix_address(addresses[:108])
    elif family != _UNSPECIFIED:
        kind = sockaddr.AF_INET if family == _TCP4 else sockaddr.AF_INET6
        half = (length - 4) // 2
        peer = sockaddr.pack_host(kind, addresses[:half], addresses[-4:-2])
        own = sockaddr.pack_host(kind, addresses[half:-4], addresses[-2:])
    return ReceivedHeader(len(header), peer, own, unix=unix, tlvs=tlvs, checksum=checksum)


def _parse_tlvs(header: bytes, at: int) -> tuple[bytes, bool]:
    """Return the fields to pass on, and whether there was a checksum, which is checked."""
    kept = []
    checksum = None
    while at < len(header):
        start, at = at, at + 3
        end = at + int.from_bytes(header[at - 2 : at], "big")
        if end > len(header) or at > len(header):
            raise HeaderError("a PROXY header of version 2 with a field beyond its end")
        if header[start] == _CRC32C:
            if checksum is not None or end - at != 4:
                raise HeaderError("a PROXY header of version 2 with a bad checksum field")
            checksum = at
        elif header[start] != _NOOP:
            kept.append(header[start:end])
        at = end
    if checksum is not None:
        rest = header[:checksum] + bytes(4) + header[checksum + 4 :]
        if crc32c(rest) != int.from_bytes(header[checksum : checksum + 4], "big"):
            raise HeaderError("a PROXY header of version 2 whose checksum is wrong")
    return b"".join(kept), checksum is not None


def _unix_address(padded: bytes) -> bytes:
    """Pack the name of a UNIX socket, which NULs follow; an abstract one begins with a NUL too."""
    abstract = padded.startswith(b"\0")
    name = padded.rstrip(b"\0") if abstract else padded.partition(b"\0")[0]
    return sockaddr.from_socket_name(sockaddr.AF_UNIX, name)
