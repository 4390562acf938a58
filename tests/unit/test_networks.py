"""The networks of --accept-proxy-protocol=."""

import pytest

from proxyd.networks import parse_networks


def packed(*numbers):
    return bytes(numbers)


@pytest.mark.parametrize(
    ("text", "networks", "unix"),
    [
        ("unix", [], True),
        ("192.0.2.1", [(packed(192, 0, 2, 1), 32)], False),
        ("10.0.0.0/8,unix", [(packed(10, 0, 0, 0), 8)], True),
        ("0.0.0.0/0", [(bytes(4), 0)], False),
        ("::/0", [(bytes(16), 0)], False),
        ("2001:db8::/33", [(packed(0x20, 0x01, 0x0D, 0xB8) + bytes(12), 33)], False),
        ("::1", [(bytes(15) + b"\1", 128)], False),
        # An IPv4-mapped network is an IPv4 one.
        ("::ffff:10.0.0.0/104", [(packed(10, 0, 0, 0), 8)], False),
        ("::ffff:10.1.2.3", [(packed(10, 1, 2, 3), 32)], False),
    ],
)
def test_networks(text, networks, unix):
    assert parse_networks(text) == (networks, unix)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected an address, a network such as 192.0.2.0/24, or unix, not ''"),
        ("10.0.0.0/8,", "expected an address, a network such as 192.0.2.0/24, or unix, not ''"),
        (
            "localhost",
            "expected an address, a network such as 192.0.2.0/24, or unix, not 'localhost'",
        ),
        ("10.0.0", "expected an address, a network such as 192.0.2.0/24, or unix, not '10.0.0'"),
        ("Unix", "expected an address, a network such as 192.0.2.0/24, or unix, not 'Unix'"),
        ("[::1]", "expected an address, a network such as 192.0.2.0/24, or unix, not '[::1]'"),
        (
            "fe80::1%lo",
            "expected an address, a network such as 192.0.2.0/24, or unix, not 'fe80::1%lo'",
        ),
        ("10.0.0.0/33", "expected a prefix length from 0 to 32, not '33'"),
        ("10.0.0.0/", "expected a prefix length from 0 to 32, not ''"),
        ("10.0.0.0/+8", "expected a prefix length from 0 to 32, not '+8'"),
        ("10.0.0.0/0000008", "expected a prefix length from 0 to 32, not '0000008'"),
        ("::/129", "expected a prefix length from 0 to 128, not '129'"),
        ("10.0.0.0/255.0.0.0", "expected a prefix length from 0 to 32, not '255.0.0.0'"),
        ("10.0.0.1/8", "expected no bits beyond the prefix, as in 10.0.0.0/8, not '10.0.0.1/8'"),
    ],
)
def test_what_is_no_network(text, why):
    with pytest.raises(ValueError, match="^") as error:
        parse_networks(text)
    assert str(error.value) == why
