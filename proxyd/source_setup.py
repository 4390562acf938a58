"""The start with --source=: what could never work, needs a privilege, or is not there yet.

It is imported only with the option.
"""

import _socket
import errno

from proxyd import address as sockaddr
from proxyd import log, os_text
from proxyd.address import AF_INET, AF_INET6
from proxyd.errors import UsageError
from proxyd.source_address import CLIENT, FAMILIES, SourceAddress, can_bind, host_text

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd._relay import Relay
    from proxyd.listen import Listener
    from proxyd.target import Target

# linux/in.h, linux/in6.h, asm-generic/socket.h; `_socket` lacks some, depending on the build
_IP_TRANSPARENT = 19
_IPV6_TRANSPARENT = 75
_SO_BINDTODEVICE = 25


def use_source(
    source: SourceAddress, relay: "Relay", listeners: "list[Listener]", *, unix_headers: bool
) -> None:
    """Have the relay bind its sockets. Raises UsageError if it could never succeed.

    `unix_headers`: UNIX clients begin with a PROXY header, which has another address. What does not
    exist yet, an interface or an address, is waited for like a target.
    """
    _check_targets(source, list(dict.fromkeys(one.target for one in listeners)))
    if source.client:
        _check_clients(listeners, unix_headers=unix_headers)
    _try(source)
    for listener in listeners:
        if _can_be_bound(listener.target):
            listener.target.source = source
    relay.bind_outgoing(
        source.addresses.get(AF_INET, b""),
        source.addresses.get(AF_INET6, b""),
        os_text.encode(source.interface),
        source.client,
    )


def _check_targets(source: SourceAddress, targets: "list[Target]") -> None:
    bound = [target for target in targets if _can_be_bound(target)]
    if not bound:
        raise UsageError(
            f"--source= is for TCP and UDP targets, and there is none: {targets[0].text}."
        )
    for target in bound:
        family = sockaddr.family(target.address or b"")
        if source.addresses and family in FAMILIES and family not in source.addresses:
            kind = FAMILIES[family]
            raise UsageError(f"--source= has no {kind} address, which target {target.text} needs.")
    v6 = source.addresses.get(AF_INET6, b"")
    if v6 and sockaddr.is_link_local(v6) and not source.interface:
        raise UsageError(
            f"--source={host_text(v6)} is a link-local address: "
            "give its interface in a second --source=."
        )


def _check_clients(listeners: "list[Listener]", *, unix_headers: bool) -> None:
    for listener in listeners:
        headers = unix_headers and listener.family == sockaddr.AF_UNIX and not listener.datagram
        if _can_be_bound(listener.target) and listener.family not in FAMILIES and not headers:
            raise UsageError(
                f"--source={CLIENT} is for clients with an IP address, "
                f"which those of '{listener.name}' ({listener.text}) have not."
            )


def _can_be_bound(target: "Target") -> bool:
    """Tell whether sockets to a target are IP ones."""
    return target.address is None or sockaddr.family(target.address) in FAMILIES


def _try(source: SourceAddress) -> None:
    """Try what needs a privilege, and tell what is not there yet. Raises UsageError."""
    interface = source.interface
    for family in source.addresses or FAMILIES:
        try:
            probe = _socket.socket(family, _socket.SOCK_STREAM)
        except OSError:
            continue  # such as a kernel without IPv6
        try:
            if interface and not _bind_to_interface(probe, interface):
                log.warning(f"There is no network interface {interface} yet (--source=).")
                interface = ""
            if source.client:
                _make_transparent(probe, family)
            address = source.addresses.get(family)
            if address is not None and not can_bind(probe, address):
                log.warning(f"There is no local address {host_text(address)} yet (--source=).")
        finally:
            probe.close()


def _bind_to_interface(probe: _socket.socket, interface: str) -> bool:
    """Return False if it does not exist yet. Raises UsageError."""
    try:
        name = os_text.encode(interface)
        probe.setsockopt(_socket.SOL_SOCKET, _SO_BINDTODEVICE, name)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return False
        raise UsageError(
            f"--source={interface} needs the capability CAP_NET_RAW before Linux 5.7: "
            f"{error.strerror}"
        ) from None
    return True


def _make_transparent(probe: _socket.socket, family: int) -> None:
    try:
        if family == AF_INET:
            probe.setsockopt(_socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        else:
            probe.setsockopt(_socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
    except OSError as error:
        raise UsageError(
            f"--source={CLIENT} needs the capability CAP_NET_ADMIN or CAP_NET_RAW "
            f"(AmbientCapabilities=): {error.strerror}"
        ) from None
