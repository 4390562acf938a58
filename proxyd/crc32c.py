"""CRC-32C (Castagnoli; RFC 9260, appendix A), the checksum of PROXY headers of version 2."""

_POLYNOMIAL = 0x82F63B78
"""x^0 is the highest bit."""


def crc32c(data: bytes) -> int:
    """Return the checksum of some bytes."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF


def _table_entry(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
    return byte


_TABLE = [_table_entry(byte) for byte in range(256)]
