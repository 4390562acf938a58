"""What errors of connect(2) mean, by family; tests/blackbox makes the kernel return them."""

import errno
import os

import pytest

from proxyd import address as sockaddr
from proxyd.connect_errors import is_congestion, is_denied, is_temporary, was_reached

TARGETS = {
    "inet": sockaddr.pack_inet("192.0.2.1", 80),
    "inet6": sockaddr.pack_inet("2001:db8::1", 80),
    "unix": sockaddr.pack_unix("/run/x"),
    "vsock": sockaddr.pack_vsock(3, 80),
}

OURS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
DENIED = {errno.EPERM, errno.EACCES}
IP = OURS | DENIED
IP |= {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EHOSTDOWN}
IP |= {errno.EADDRNOTAVAIL, errno.EINVAL, errno.ENETDOWN, errno.ENODEV, errno.ELOOP, errno.ENONET}
IP |= {errno.EADDRINUSE}
IP |= {errno.EAGAIN, errno.ENOPROTOOPT}
UNIX = OURS | DENIED | {errno.ECONNREFUSED, errno.ENOENT, errno.EAGAIN, errno.ETIMEDOUT}
VSOCK = OURS | DENIED | {errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.EHOSTUNREACH}
VSOCK |= {errno.ENETUNREACH, errno.ENETDOWN, errno.ENODEV, errno.ETIMEDOUT, errno.EAGAIN}
VSOCK |= {errno.EADDRNOTAVAIL}
PASSING = {"inet": IP, "inet6": IP, "unix": UNIX, "vsock": VSOCK}


@pytest.mark.parametrize("error", sorted(errno.errorcode), ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", TARGETS)
def test_each_error_has_a_verdict_in_each_family(kind, error):
    assert is_temporary(error, TARGETS[kind]) == (error in PASSING[kind]), os.strerror(error)


@pytest.mark.parametrize(
    ("address", "passes"),
    [
        ("fe80::1", False),
        ("febf::1", False),
        ("fe80::1%1", True),
        ("fec0::1", True),
        ("::1", True),
        ("fd00::1", True),
        ("192.0.2.1", True),
    ],
)
def test_einval_of_an_address_without_its_scope_is_permanent(address, passes):
    assert is_temporary(errno.EINVAL, sockaddr.pack_inet(address, 80)) == passes
    assert is_temporary(errno.ENETUNREACH, sockaddr.pack_inet(address, 80))


def test_only_unix_targets_are_congested():
    assert [kind for kind, one in TARGETS.items() if is_congestion(errno.EAGAIN, one)] == ["unix"]
    assert not is_congestion(errno.ECONNREFUSED, TARGETS["unix"])


def test_which_errors_are_a_missing_permission():
    assert {error for error in errno.errorcode if is_denied(error)} == DENIED


def test_a_reset_shows_that_the_target_was_reached_except_on_vsock():
    for error in (errno.ECONNRESET, errno.EPIPE):
        reached = [kind for kind, one in TARGETS.items() if was_reached(error, one)]
        assert reached == ["inet", "inet6", "unix"]
    for one in TARGETS.values():
        assert was_reached(0, one)
        assert not was_reached(errno.ECONNREFUSED, one)
        assert not was_reached(errno.EINPROGRESS, one)
