"""What an error of connect(2) says about the target: that it may be there later, or never.

The errors stand in connect(2), ip(7), tcp(7), unix(7) and vsock(7); what raises which was tried
(tests/blackbox/test_connect_errors.py). What is in no table is for ever.
"""

import errno

from proxyd import address as sockaddr

_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Nothing left here to connect with: no word about the target, and it passes."""

_DENIED = (errno.EPERM, errno.EACCES)
"""A permission that may still be given. It seldom comes by itself, so the log says so at once."""

_IP = frozenset(
    (
        *_OURS,
        *_DENIED,  # cgroup BPF, seccomp, LSM; a prohibit route, ICMPv6 administratively prohibited
        errno.ECONNREFUSED,  # nobody listens, or ICMP port unreachable
        errno.EHOSTUNREACH,  # no answer to ARP, ICMP host unreachable or prohibited
        errno.ENETUNREACH,  # no route yet
        errno.EHOSTDOWN,  # ICMP host unknown
        errno.ENONET,  # ICMP host isolated
        errno.ENOPROTOOPT,  # ICMP protocol unreachable, from a firewall
        errno.ENETDOWN,  # the interface is down
        errno.ENODEV,  # the interface of the scope, or of a VRF, is not there
        errno.EINVAL,  # a blackhole route; but see may_pass()
        errno.ETIMEDOUT,
        errno.EAGAIN,  # an IPsec policy whose keys are still negotiated
        errno.EADDRNOTAVAIL,  # no local port is free, or no local address is there yet
        errno.ELOOP,  # it met itself: nobody listens there
    )
)

_UNIX = frozenset(
    (
        *_OURS,
        *_DENIED,  # between bind(2) and chmod(2), or a group that is yet to be given
        errno.ECONNREFUSED,  # nobody listens
        errno.ENOENT,  # not bound yet
        errno.EAGAIN,  # the backlog is full: congestion, see is_congestion()
        errno.ETIMEDOUT,
    )
)

_VSOCK = frozenset(
    (
        *_OURS,
        *_DENIED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,  # nobody listens, in the words of virtio
        errno.EPIPE,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.ENODEV,  # the machine is not started, or its transport is not loaded
        errno.ETIMEDOUT,  # it is booting
        errno.EAGAIN,
        errno.EADDRNOTAVAIL,
    )
)

_PASSING = {
    sockaddr.AF_INET: _IP,
    sockaddr.AF_INET6: _IP,
    sockaddr.AF_UNIX: _UNIX,
    sockaddr.AF_VSOCK: _VSOCK,
}

_LINK_LOCAL_MASK = 0xFFC0
_LINK_LOCAL = 0xFE80  # fe80::/10, RFC 4291 2.5.6


def may_pass(error: int, address: bytes) -> bool:
    """Tell whether a later connect to `address` may succeed."""
    if error == errno.EINVAL and _lacks_scope(address):
        return False
    return error in _PASSING.get(sockaddr.family(address), ())


def is_denied(error: int) -> bool:
    """Tell whether an administrator should hear of it at once, though it may pass."""
    return error in _DENIED


def is_congestion(error: int, address: bytes) -> bool:
    """Tell whether the target is there, with a full backlog."""
    return error == errno.EAGAIN and sockaddr.family(address) == sockaddr.AF_UNIX


def was_reached(error: int, address: bytes) -> bool:
    """Tell whether the target has accepted, whatever it did then. On VSOCK a reset refuses."""
    if error in (errno.ECONNRESET, errno.EPIPE):
        return sockaddr.family(address) != sockaddr.AF_VSOCK
    return error == 0


def _lacks_scope(address: bytes) -> bool:
    """Tell whether it is a link-local IPv6 address on no interface: EINVAL for ever."""
    if sockaddr.family(address) != sockaddr.AF_INET6:
        return False
    prefix = int.from_bytes(address[8:10], "big")
    return prefix & _LINK_LOCAL_MASK == _LINK_LOCAL and not any(address[24:28])
