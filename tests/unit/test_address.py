"""Packed addresses, compared with those of the kernel, for which they are made."""

import errno
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import address


def bound(family, name):
    """Return the name that the kernel reports for a socket bound to `name`, as `_socket` does."""
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind(name)
        return sock.getsockname()


def test_ipv4_bytes():
    assert address.pack_inet("127.0.0.1", 0x1234) == (
        socket.AF_INET.to_bytes(2, "little" if os.sys.byteorder == "little" else "big")
        + b"\x12\x34\x7f\x00\x00\x01"
        + bytes(8)
    )


def test_ipv6_bytes():
    packed = address.pack_inet6("fe80::1", 0x1234, 7)
    assert len(packed) == 28
    assert packed[2:8] == b"\x12\x34\0\0\0\0"
    assert packed[8:24] == socket.inet_pton(socket.AF_INET6, "fe80::1")
    assert int.from_bytes(packed[24:], os.sys.byteorder) == 7


def test_vsock_bytes():
    packed = address.pack_vsock(2, 80)
    words = [int.from_bytes(packed[at : at + 4], os.sys.byteorder) for at in (4, 8, 12)]
    assert (len(packed), words) == (16, [80, 2, 0])


def test_unix_bytes():
    assert address.pack_unix("/a")[2:] == b"/a\0"
    assert address.pack_unix(b"@a")[2:] == b"\0a"


@pytest.mark.parametrize(
    ("path", "fits"),
    [
        ("/" + "a" * 106, True),
        ("/" + "a" * 107, False),
        ("@" + "a" * 107, True),
        ("@" + "a" * 108, False),
        ("", False),
        ("@", False),
        ("/a\0b", False),
    ],
)
def test_unix_length(path, fits):
    if fits:
        assert len(address.pack_unix(path)) <= 110
    else:
        with pytest.raises(ValueError, match="."):
            address.pack_unix(path)


def test_undecodable_paths_survive():
    assert address.pack_unix(os.fsdecode(b"/\xff"))[2:] == b"/\xff\0"


@pytest.mark.parametrize(
    ("packed", "text"),
    [
        (address.pack_inet("127.0.0.1", 80), "127.0.0.1:80"),
        (address.pack_inet("::1", 80), "[::1]:80"),
        (address.pack_inet("fe80::1%lo", 80), "[fe80::1%lo]:80"),
        (address.pack_inet("fe80::1%4294967295", 80), "[fe80::1%4294967295]:80"),
        (address.pack_unix("/run/x"), "/run/x"),
        (address.pack_unix("@x"), "@x"),
        (address.pack_vsock(2, 80), "vsock:2:80"),
        (address.pack_vsock(address.VMADDR_CID_ANY, 80), "vsock::80"),
        (b"\1\0" if os.sys.byteorder == "little" else b"\0\1", "unix client"),
        (b"\x63\0" if os.sys.byteorder == "little" else b"\0\x63", "address family 99"),
    ],
)
def test_text(packed, text):
    assert address.text(packed) == text


@pytest.mark.parametrize(
    "host", ["", "a", "127.1", "1.2.3.4.5", ":", "::1::", "\udcff", "1.2.3.4\0"]
)
def test_not_an_address(host):
    with pytest.raises(ValueError, match="is not an IP address"):
        address.pack_inet(host, 80)


def test_the_index_of_an_interface():
    assert address.interface_index("lo") == socket.if_nametoindex("lo")
    with pytest.raises(OSError, match="No such device") as caught:
        address.interface_index("nope")
    assert caught.value.errno == errno.ENODEV


def test_the_index_of_an_interface_when_descriptors_have_run_out(monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(address._socket, "socket", refuse)
    with pytest.raises(OSError, match="Too many"):  # not: there is no such interface
        address.pack_inet("fe80::1%lo", 80)


def test_with_scope():
    packed = address.pack_inet6("fe80::1", 80, 3)
    assert address.with_scope(address.pack_inet6("fe80::1", 80), 3) == packed


def test_unknown_interface():
    with pytest.raises(address.UnknownInterfaceError, match="no network interface 'nope'"):
        address.pack_inet("fe80::1%nope", 80)


@pytest.mark.parametrize("scope", ["", "4294967296", "9" * 5000])
def test_bad_scope(scope):
    with pytest.raises(ValueError, match="."):
        address.pack_inet(f"fe80::1%{scope}", 80)


def test_names_from_the_kernel_pack_to_what_was_bound(tmp_path):
    for family, name in (
        (socket.AF_INET, ("127.0.0.1", 0)),
        (socket.AF_UNIX, str(tmp_path / "s")),
        (socket.AF_UNIX, f"\0proxyd-test-{os.getpid()}"),
        (socket.AF_UNIX, ""),
    ):
        sockname = bound(family, name)
        packed = address.from_socket_name(family, sockname)
        assert address.family(packed) == family
        back = address.to_socket_name(packed)
        assert back == (os.fsencode(sockname) if family == socket.AF_UNIX else sockname)


def test_a_path_that_fills_sun_path_is_read():
    packed = address.from_socket_name(socket.AF_UNIX, "/" + "a" * 107)
    assert address.text(packed) == "/" + "a" * 107


def test_a_vsock_name_is_packed_and_unpacked():
    packed = address.from_socket_name(socket.AF_VSOCK, (2, 80))
    assert packed == address.pack_vsock(2, 80)
    assert address.to_socket_name(packed) == (2, 80)


def test_other_families_are_refused():
    with pytest.raises(ValueError, match="address family 17 is not supported"):
        address.from_socket_name(17, ("lo", 3))


def test_unmapped():
    mapped = address.pack_inet("::ffff:192.0.2.1", 8080)
    assert address.unmapped(mapped) == address.pack_inet("192.0.2.1", 8080)
    other = address.pack_inet("::fffe:192.0.2.1", 8080)
    assert address.unmapped(other) is other


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_with_port(host):
    assert address.with_port(address.pack_inet(host, 0), 8080) == address.pack_inet(host, 8080)


@given(st.ip_addresses(), st.integers(0, 65535))
def test_addresses_survive_their_text(ip, port):
    packed = address.pack_inet(str(ip), port)
    host, service = address.split_host(address.text(packed))
    assert address.pack_inet(host, address.parse_port(service, 0)) == packed
    assert address.port(packed) == port


@given(st.binary(min_size=1, max_size=107))
def test_paths_survive_packing(raw):
    path = b"/" + raw.replace(b"\0", b"x")[:106]
    assert address.unix_name(address.pack_unix(path)) == path
    assert address.unix_name(address.pack_unix(b"@" + raw)) == b"\0" + raw


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("h", ("h", None)),
        ("h:1", ("h", "1")),
        ("::1:80", ("::1", "80")),
        ("[::1]", ("::1", None)),
        ("[::1]:80", ("::1", "80")),
        ("[fe80::1%2]:*", ("fe80::1%2", "*")),
        (":", ("", "")),
    ],
)
def test_split_host(text, split):
    assert address.split_host(text) == split


@pytest.mark.parametrize("text", ["[", "[]", "[::1", "[::1]80", "[h]:80", "[127.0.0.1]:80"])
def test_split_host_garbage(text):
    with pytest.raises(ValueError, match="expected"):
        address.split_host(text)


@pytest.mark.parametrize("text", ["", "0", "65536", "-1", "+1", " 1", "1_0", "\u0661", "9" * 5000])
def test_not_a_port(text):
    with pytest.raises(ValueError, match="is not a port number"):
        address.parse_port(text)


@pytest.mark.parametrize(
    ("text", "packed"),
    [
        ("/a", address.pack_unix("/a")),
        ("@a", address.pack_unix("@a")),
        ("unix:/a", address.pack_unix("/a")),
        ("unix:a/b", address.pack_unix("a/b")),
        ("unix:@a", address.pack_unix("@a")),
        ("vsock:2:80", address.pack_vsock(2, 80)),
        ("vsock::80", address.pack_vsock(2**32 - 1, 80)),
        ("unix:80", None),
        ("vsock:80", None),
        ("localhost", None),
    ],
)
def test_parse_local(text, packed):
    assert address.parse_local(text) == packed


@pytest.mark.parametrize("text", ["vsock:x:80", "vsock:2:", "vsock:2:4294967296", "vsock:2:80:1"])
def test_parse_local_garbage(text):
    with pytest.raises(ValueError, match="is not a (CID|VSOCK port number) from 0 to 4294967295"):
        address.parse_local(text)
