"""IP networks, as --accept-proxy-protocol= names them."""

import _socket

from proxyd.address import AF_INET, AF_INET6

Network = tuple[bytes, int]
"""Address in network byte order, and how many of its bits count."""

UNIX = "unix"
"""Stands for all clients of UNIX sockets."""


def parse_networks(text: str) -> tuple[list[Network], bool]:
    """Read `NETWORK[,NETWORK...]`; return the networks, and whether `unix` is among them.

    Raises ValueError.
    """
    words = text.split(",")
    return [_parse(word) for word in words if word != UNIX], UNIX in words


def _parse(text: str) -> Network:
    """Read an address, or a network as ADDRESS/BITS."""
    host, slash, digits = text.partition("/")
    for family in (AF_INET, AF_INET6):
        try:
            address = _socket.inet_pton(family, host)
        except (OSError, ValueError):  # ValueError: it contains a NUL
            continue
        width = len(address) * 8
        return _mask(text, address, _bits(digits, width) if slash else width)
    raise ValueError(
        f"expected an address, a network such as 192.0.2.0/24, or {UNIX}, not '{text}'"
    )


def _bits(digits: str, maximum: int) -> int:
    if digits.isascii() and digits.isdigit() and len(digits) <= 3 and int(digits) <= maximum:
        return int(digits)
    raise ValueError(f"expected a prefix length from 0 to {maximum}, not '{digits}'")


def _mask(text: str, address: bytes, bits: int) -> Network:
    """Return the network; bits of the address beyond the prefix are a mistake."""
    width = len(address) * 8
    number = int.from_bytes(address, "big")
    beyond = number & (1 << width - bits) - 1
    if beyond:
        family = AF_INET if width == 32 else AF_INET6
        host = _socket.inet_ntop(family, (number - beyond).to_bytes(width // 8, "big"))
        raise ValueError(f"expected no bits beyond the prefix, as in {host}/{bits}, not '{text}'")
    if width == 128 and bits >= 96 and number >> 32 == 0xFFFF:
        return address[12:], bits - 96  # IPv4-mapped: an IPv4 network
    return address, bits
