"""What an error of connect(2) says about the target: whether a later attempt may succeed.

The errors are documented in connect(2), ip(7), tcp(7), unix(7) and vsock(7); what causes which is
tested in tests/unit/test_connect_errors.py. An error in none of the tables is permanent.
"""

import errno
import posix

from proxyd import address as sockaddr

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd.source_address import SourceAddress

_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""This machine is short of fds or memory, which says nothing about the target."""

_DENIED = (errno.EPERM, errno.EACCES)
"""A permission that may be granted later, but seldom by itself: so it is logged at once."""

_IP = frozenset(
    (
        *_OURS,
        *_DENIED,  # cgroup BPF, seccomp, LSM; a prohibit route, ICMPv6 administratively prohibited
        errno.ECONNREFUSED,  # no listener, or ICMP port unreachable
        errno.EHOSTUNREACH,  # no answer to ARP, ICMP host unreachable or prohibited
        errno.ENETUNREACH,  # no route yet
        errno.EHOSTDOWN,  # ICMP host unknown
        errno.ENONET,  # ICMP host isolated
        errno.ENOPROTOOPT,  # ICMP protocol unreachable, from a firewall
        errno.ENETDOWN,  # the interface is down
        errno.ENODEV,  # the interface of the scope, or of a VRF, does not exist
        errno.EINVAL,  # a blackhole route; but see is_temporary()
        errno.ETIMEDOUT,
        errno.EAGAIN,  # an IPsec policy whose keys are still being negotiated
        errno.EADDRNOTAVAIL,  # no local port is free, or there is no local address yet
        errno.EADDRINUSE,  # the local port of --source= is in use
        errno.ELOOP,  # it was connected to itself: there is no listener
    )
)

_UNIX = frozenset(
    (
        *_OURS,
        *_DENIED,  # between bind(2) and chmod(2), or before chgrp(1)
        errno.ECONNREFUSED,  # no listener
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
        errno.ECONNRESET,  # no listener, as virtio reports it
        errno.EPIPE,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.ENODEV,  # the virtual machine has not started, or its transport is not loaded
        errno.ETIMEDOUT,  # it is booting
        errno.EAGAIN,
        errno.EADDRNOTAVAIL,
    )
)

_TEMPORARY = {
    sockaddr.AF_INET: _IP,
    sockaddr.AF_INET6: _IP,
    sockaddr.AF_UNIX: _UNIX,
    sockaddr.AF_VSOCK: _VSOCK,
}

CLOSED_EARLY = -1
"""In place of an errno: the target has accepted, and closed or reset before it could settle."""


def is_temporary(error: int, address: bytes) -> bool:
    """Tell whether a later connect to `address` may succeed."""
    if error == CLOSED_EARLY:
        return True
    if error == errno.EINVAL and _lacks_scope(address):
        return False
    return error in _TEMPORARY.get(sockaddr.family(address), ())


def is_denied(error: int) -> bool:
    """Tell whether to log a temporary error at once, because an administrator may have to act."""
    return error in _DENIED


def is_congestion(error: int, address: bytes) -> bool:
    """Tell whether the target is up and its backlog is full."""
    return error == errno.EAGAIN and _is_unix(address)


def was_reached(error: int, address: bytes) -> bool:
    """Tell whether the target accepted, even if it has reset since. On VSOCK, a reset refuses."""
    if error in (errno.ECONNRESET, errno.EPIPE):
        return sockaddr.family(address) != sockaddr.AF_VSOCK
    return error == 0


def describe(
    error: int,
    address: bytes | None,
    target: str,
    verb: str = "connect to",
    source: "SourceAddress | None" = None,
) -> str:
    """Return the line that says why `target` cannot be reached.

    `address`: the only address that it has, None if there are several. `source`: what sockets to it
    are bound to.
    """
    if error == errno.ELOOP and (address is None or not _is_unix(address)):
        text = "it was connected to itself, because nothing listens there"
    elif error == CLOSED_EARLY:
        text = "it accepts and closes at once"
    elif source is not None and (why := source.explain(error, address)):
        text = why
    elif error == errno.EADDRNOTAVAIL:
        text = "no local port is free, or there is no local address"
    else:
        text = posix.strerror(error)
    return f"Failed to {verb} remote host: {text} ({target})"


def short_reason(why: str, target: str) -> str:
    """Return what describe() has said, without what surrounds it in the log."""
    for verb in ("connect to", "reach"):
        why = why.removeprefix(f"Failed to {verb} remote host: ")
    return why.removesuffix(f" ({target})")


def _is_unix(address: bytes) -> bool:
    return sockaddr.family(address) == sockaddr.AF_UNIX


def _lacks_scope(address: bytes) -> bool:
    """Tell whether it is link-local IPv6 without an interface: EINVAL is permanent then."""
    if sockaddr.family(address) != sockaddr.AF_INET6:
        return False
    return sockaddr.is_link_local(address) and not any(address[24:28])
