"""PROXY headers, as specified in HAProxy's proxy-protocol.txt, sections 2.1 (v1) and 2.2 (v2)."""

import ipaddress
import struct

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LOCAL = SIGNATURE + b"\x20\x00\x00\x00"

# What a balancer says of one client, in each version; the last one with a TLV.
V1 = b"PROXY TCP4 192.0.2.1 198.51.100.2 5000 443\r\n"
V2 = (
    SIGNATURE
    + b"\x21\x11\0\x0c"
    + bytes([192, 0, 2, 1, 198, 51, 100, 2])
    + struct.pack("!HH", 5000, 443)
)
TLV = b"\x05\0\x04id-7"
V2_TLV = V2[:14] + struct.pack("!H", 12 + len(TLV)) + V2[16:] + TLV


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
