"""PROXY headers, as specified in HAProxy's proxy-protocol.txt, sections 2.1 (v1) and 2.2 (v2)."""

import ipaddress
import struct

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LOCAL = SIGNATURE + b"\x20\x00\x00\x00"


def header_of(version, client, family):
    """The header for a TCP client; `client` is its own end of the connection."""
    source, destination = client.getsockname(), client.getpeername()
    addresses = [ipaddress.ip_address(end[0]) for end in (source, destination)]
    addresses = [getattr(address, "ipv4_mapped", None) or address for address in addresses]
    ports = (source[1], destination[1])
    if version == "v1":
        return f"PROXY {family} {addresses[0]} {addresses[1]} {ports[0]} {ports[1]}\r\n".encode()
    packed = addresses[0].packed + addresses[1].packed + struct.pack("!HH", *ports)
    code = {"TCP4": 0x11, "TCP6": 0x21}[family]
    return SIGNATURE + bytes([0x21, code]) + struct.pack("!H", len(packed)) + packed
