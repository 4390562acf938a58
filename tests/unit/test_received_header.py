"""PROXY headers that clients begin with, byte for byte as proxy-protocol.txt defines them."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import address
from proxyd.crc32c import crc32c
from proxyd.proxy_protocol import pass_on
from proxyd.received_header import SIZE_MAX, HeaderError, parse

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
PEER4, OWN4 = address.pack_inet("192.0.2.1", 5000), address.pack_inet("198.51.100.2", 443)
PEER6, OWN6 = address.pack_inet("2001:db8::1", 5000), address.pack_inet("2001:db8::2", 443)
V1_TCP4 = b"PROXY TCP4 192.0.2.1 198.51.100.2 5000 443\r\n"
V1_TCP6 = b"PROXY TCP6 2001:db8::1 2001:db8::2 5000 443\r\n"
TLV_ALPN = b"\x01\0\x02h2"
TLV_NOOP = b"\x04\0\x03abc"


def v2(command, family, body):
    return SIGNATURE + bytes([0x20 | command, family]) + struct.pack("!H", len(body)) + body


def addresses(peer, own):
    hosts = (peer[4:8] + own[4:8]) if len(peer) == 16 else (peer[8:24] + own[8:24])
    return hosts + peer[2:4] + own[2:4]


V2_TCP4 = v2(1, 0x11, addresses(PEER4, OWN4))
V2_TCP6 = v2(1, 0x21, addresses(PEER6, OWN6))
V2_LOCAL = v2(0, 0, b"")


def with_crc(header):
    """A header of version 2 with a checksum at its end."""
    body = header[16:] + b"\x03\0\x04" + bytes(4)
    header = header[:14] + struct.pack("!H", len(body)) + body
    return header[:-4] + struct.pack("!I", crc32c(header))


GOOD = {
    "v1 tcp4": (V1_TCP4, PEER4, OWN4),
    "v1 tcp6": (V1_TCP6, PEER6, OWN6),
    "v1 unknown": (b"PROXY UNKNOWN\r\n", b"", b""),
    "v1 unknown with more": (b"PROXY UNKNOWN anything \xff at all\r\n", b"", b""),
    "v2 tcp4": (V2_TCP4, PEER4, OWN4),
    "v2 tcp6": (V2_TCP6, PEER6, OWN6),
    "v2 local": (V2_LOCAL, b"", b""),
    "v2 local with garbage": (v2(0, 0xFF, b"garbage"), b"", b""),
    "v2 unspecified": (v2(1, 0, b""), b"", b""),
    "v2 tlvs": (v2(1, 0x11, addresses(PEER4, OWN4) + TLV_NOOP + TLV_ALPN), PEER4, OWN4),
    "v2 checksum": (with_crc(V2_TCP4), PEER4, OWN4),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_headers(name):
    data, peer, own = GOOD[name]
    header = parse(data)
    assert (header.size, header.peer, header.own) == (len(data), peer, own)
    assert header.local == name.startswith("v2 local")
    for after in (b"x", data, bytes(5000)):
        header = parse(data + after)
        assert (header.size, header.peer) == (len(data), peer)


@pytest.mark.parametrize("name", GOOD)
def test_every_beginning_is_incomplete(name):
    data, _, _ = GOOD[name]
    for size in range(len(data)):
        assert parse(data[:size]) is None


BAD = {
    "something else": b"GET / HTTP/1.1\r\n",
    "almost": b"PROXX",
    "v1 without a family": b"PROXY \r\n",
    "v1 lower case": b"proxy TCP4 192.0.2.1 198.51.100.2 5000 443\r\n",
    "v1 another family": b"PROXY UDP4 192.0.2.1 198.51.100.2 5000 443\r\n",
    "v1 unknown, glued": b"PROXY UNKNOWNX\r\n",
    "v1 two spaces": b"PROXY TCP4  192.0.2.1 198.51.100.2 5000 443\r\n",
    "v1 a word more": b"PROXY TCP4 192.0.2.1 198.51.100.2 5000 443 1\r\n",
    "v1 a word less": b"PROXY TCP4 192.0.2.1 198.51.100.2 5000\r\n",
    "v1 newline": b"PROXY TCP4 192.0.2.1 198.51.100.2 5000 443\n\r\n",
    "v1 the other family": b"PROXY TCP4 2001:db8::1 2001:db8::2 5000 443\r\n",
    "v1 bad address": b"PROXY TCP4 192.0.2.256 198.51.100.2 5000 443\r\n",
    "v1 octal address": b"PROXY TCP4 192.0.02.1 198.51.100.2 5000 443\r\n",
    "v1 NUL": b"PROXY TCP4 192.0.2.1\0 198.51.100.2 5000 443\r\n",
    "v1 scope": b"PROXY TCP6 fe80::1%eth0 2001:db8::2 5000 443\r\n",
    "v1 port too high": b"PROXY TCP4 192.0.2.1 198.51.100.2 65536 443\r\n",
    "v1 leading zero": b"PROXY TCP4 192.0.2.1 198.51.100.2 05000 443\r\n",
    "v1 sign": b"PROXY TCP4 192.0.2.1 198.51.100.2 +500 443\r\n",
    "v1 digits of another script": "PROXY TCP4 192.0.2.1 198.51.100.2 ٥ 443\r\n".encode(),
    "v1 without an end": b"PROXY UNKNOWN " + b"x" * 93,
    "v2 version 1": SIGNATURE + b"\x11\x11",
    "v2 another command": SIGNATURE + b"\x22\x11",
    "v2 udp": v2(1, 0x12, addresses(PEER4, OWN4)),
    "v2 another family": v2(1, 0x41, bytes(100)),
    "v2 too short": v2(1, 0x11, addresses(PEER4, OWN4)[:-1]),
    "v2 no addresses": v2(1, 0x21, b""),
    "v2 too long": v2(1, 0x11, bytes(SIZE_MAX - 15)),
    "v2 half a field": v2(1, 0x11, addresses(PEER4, OWN4) + b"\x01\0"),
    "v2 field beyond the end": v2(1, 0x11, addresses(PEER4, OWN4) + b"\x01\0\x05abcd"),
    "v2 wrong checksum": with_crc(V2_TCP4)[:-1] + b"\0",
    "v2 short checksum": v2(1, 0x11, addresses(PEER4, OWN4) + b"\x03\0\x03abc"),
    "v2 two checksums": with_crc(with_crc(V2_TCP4)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers(name):
    """One byte more than what shows that it is none is never waited for."""
    with pytest.raises(HeaderError):
        parse(BAD[name])


def test_the_longest_header():
    body = addresses(PEER4, OWN4)
    rest = SIZE_MAX - 16 - len(body)
    header = v2(1, 0x11, body + b"\xe0" + struct.pack("!H", rest - 3) + bytes(rest - 3))
    assert len(header) == SIZE_MAX
    assert parse(header).size == SIZE_MAX
    assert parse(header[:-1]) is None


def test_a_header_that_will_be_too_long_is_refused_at_once():
    with pytest.raises(HeaderError, match="of 4097 bytes"):
        parse(SIGNATURE + b"\x21\x11" + struct.pack("!H", SIZE_MAX - 15))


def test_the_checksum_is_crc32c():
    """RFC 3720, B.4."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"123456789") == 0xE3069283


# ── UNIX ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "text"), [(b"/run/client", "/run/client"), (b"\0abstract", "@abstract"), (b"", "")]
)
def test_unix_addresses(name, text):
    body = name.ljust(108, b"\0") + b"/run/listener".ljust(108, b"\0")
    header = parse(v2(1, 0x31, body))
    assert address.family(header.peer) == address.AF_UNIX
    assert address.unix_name(header.peer) == name
    assert header.unix == body
    assert text == "" or address.text(header.peer) == text
    assert pass_on(2, header) == v2(1, 0x31, body)
    assert pass_on(1, header) == b"PROXY UNKNOWN\r\n"


# ── passed on ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("received", "v1", "v2"),
    [
        (V1_TCP4, V1_TCP4, V2_TCP4),
        (V2_TCP4, V1_TCP4, V2_TCP4),
        (V1_TCP6, V1_TCP6, V2_TCP6),
        (V2_TCP6, V1_TCP6, V2_TCP6),
        (b"PROXY UNKNOWN x\r\n", b"PROXY UNKNOWN\r\n", v2(1, 0, b"")),
        (v2(0, 0x11, addresses(PEER4, OWN4)), b"PROXY UNKNOWN\r\n", V2_LOCAL),
        (
            b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:198.51.100.2 5000 443\r\n",
            V1_TCP4,
            V2_TCP4,
        ),
        (
            b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 5000 443\r\n",
            b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 5000 443\r\n",
            v2(1, 0x21, addresses(address.pack_inet("::ffff:192.0.2.1", 5000), OWN6)),
        ),
        # NOOP is dropped, other fields are kept, and the checksum is made anew.
        (
            v2(1, 0x11, addresses(PEER4, OWN4) + TLV_NOOP + TLV_ALPN),
            V1_TCP4,
            v2(1, 0x11, addresses(PEER4, OWN4) + TLV_ALPN),
        ),
        (
            with_crc(v2(1, 0x11, addresses(PEER4, OWN4) + TLV_ALPN + TLV_NOOP)),
            V1_TCP4,
            with_crc(v2(1, 0x11, addresses(PEER4, OWN4) + TLV_ALPN)),
        ),
        (v2(1, 0, TLV_ALPN), b"PROXY UNKNOWN\r\n", v2(1, 0, TLV_ALPN)),
    ],
)
def test_passed_on(received, v1, v2):
    header = parse(received)
    assert (pass_on(1, header), pass_on(2, header)) == (v1, v2)


# ── anything ──────────────────────────────────────────────────────────────────────────────────────

pieces = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([data for data, _, _ in GOOD.values()]),
    st.sampled_from([SIGNATURE, b"PROXY ", b"PROXY TCP4 ", b"\r\n", b"\x21\x11\0\x0c"]),
)


@given(st.lists(pieces, max_size=6).map(b"".join))
def test_any_bytes(data):
    """They are a header, the beginning of one, or none, and that for good."""
    outcomes = []
    for size in range(len(data) + 1):
        try:
            header = parse(data[:size])
        except HeaderError:
            outcomes.append("none")
        else:
            outcomes.append("incomplete" if header is None else header.size)
    for before, after in itertools.pairwise(outcomes):
        assert before in ("incomplete", after)


@given(
    st.sampled_from([0x11, 0x21, 0x00, 0x31]),
    st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=50)), max_size=8),
    st.binary(min_size=216, max_size=216),
    st.booleans(),
)
def test_what_is_passed_on_says_the_same(family, fields, filler, checksum):
    sizes = {0x11: 12, 0x21: 36, 0x00: 0, 0x31: 216}
    tlvs = b"".join(
        bytes([kind]) + struct.pack("!H", len(value)) + value for kind, value in fields if kind != 3
    )
    data = v2(1, family, filler[: sizes[family]] + tlvs)
    header = parse(with_crc(data) if checksum else data)
    again = parse(pass_on(2, header))
    assert (again.unix, again.tlvs) == (header.unix, header.tlvs)
    assert again.checksum == header.checksum == checksum
    assert address.unmapped(again.peer) == address.unmapped(header.peer)
