"""Where connections and datagrams to targets come from: --source=.

That is an address of this machine, an interface, or the address of the client. The relay binds the
sockets; this module knows to what, and why that has failed. It is imported only with the option.
"""

import _socket
import errno

from proxyd import address as sockaddr
from proxyd import os_text
from proxyd.address import AF_INET, AF_INET6

CLIENT = "client"
"""Stands for the address of each client."""

FAMILIES = {AF_INET: "IPv4", AF_INET6: "IPv6"}
"""Those that can be bound, and their names."""

_EXPECTED = f"expected an address, ADDRESS:PORT, [V6]:PORT, a network interface, or {CLIENT}"

_SO_BINDTODEVICE = 25  # asm-generic/socket.h; `_socket` has it or not, depending on the build


class SourceAddress:
    """What sockets to targets are bound to."""

    __slots__ = ("addresses", "client", "interface")

    def __init__(self) -> None:
        self.client = False
        """Whether that is the client's address; there are no `addresses` then."""
        self.addresses: dict[int, bytes] = {}
        """By family, packed; the port is 0 if the kernel chooses it."""
        self.interface = ""
        """Its name; "": any."""

    def add(self, text: str) -> None:
        """Read the argument of one option. Raises ValueError."""
        if text == CLIENT:
            self.client = True
        elif (address := _parse_address(text)) is not None:
            self._add_address(address, text)
        elif not sockaddr.can_be_interface(text):
            raise ValueError(_EXPECTED)
        elif self.interface not in ("", text):
            raise ValueError(f"there is another interface already, {self.interface}")
        else:
            self.interface = text
        if self.client and self.addresses:
            raise ValueError(f"{CLIENT} and an address exclude each other")

    def _add_address(self, address: bytes, text: str) -> None:
        family = sockaddr.family(address)
        if not any(sockaddr.host(address)):
            raise ValueError(f"'{text}' stands for any address, which is the default")
        if family in self.addresses:
            before = host_text(self.addresses[family])
            raise ValueError(f"there is another {FAMILIES[family]} address already, {before}")
        self.addresses[family] = address

    # ── while it serves ───────────────────────────────────────────────────────────────────────────

    def fitting(self, addresses: list[bytes]) -> list[bytes]:
        """Return those addresses of a target that there is a source for; all if there is none."""
        found = [one for one in addresses if sockaddr.family(one) in self.addresses]
        return found or addresses

    def explain(self, error: int, target: bytes | None) -> str:
        """Say why a socket for this packed address has failed; "" if that is not because of us.

        None: the address is not known, or there are several.
        """
        if error == errno.ENODEV and self.interface:
            return f"there is no network interface {self.interface}"
        if error == errno.EAFNOSUPPORT:
            if self.client:
                return f"the client has no address of its family, for --source={CLIENT}"
            return "--source= has no address of its family"
        if error not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.EAGAIN):
            return ""
        if self.client:
            return "no local port is free from the client's address"
        own = self.addresses.get(sockaddr.family(target) if target else 0)
        own = own or next(iter(self.addresses.values()), None)
        return "" if own is None else self._explain_address(error, own)

    def _explain_address(self, error: int, own: bytes) -> str:
        where = host_text(own)
        if error == errno.EADDRNOTAVAIL and not self._exists(own):
            return f"there is no local address {where}"
        if number := sockaddr.port(own):
            return f"local port {number} of {where} is in use"
        return f"no local port is free from {where}"

    def _exists(self, own: bytes) -> bool:
        """Tell whether this machine has an address; True if that cannot be found out."""
        try:
            probe = _socket.socket(sockaddr.family(own), _socket.SOCK_DGRAM)
        except OSError:
            return True
        try:
            if self.interface:
                name = os_text.encode(self.interface)
                probe.setsockopt(_socket.SOL_SOCKET, _SO_BINDTODEVICE, name)
            return can_bind(probe, own)
        except OSError:
            return True
        finally:
            probe.close()


def _parse_address(text: str) -> bytes | None:
    """Pack ADDRESS[:PORT], [V6]:PORT or V6; None if `text` is none of these. Raises ValueError."""
    host, colon, digits = text.rpartition(":")
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(_EXPECTED)
        digits = rest[1:]
        colon = rest[:1]
    elif not colon or ":" in host:
        host, colon = text, ""
    if "%" in host:
        raise ValueError("an address is without %INTERFACE here: give that in a second --source=")
    number = sockaddr.parse_port(digits) if colon else 0
    try:
        return sockaddr.unmapped(sockaddr.pack_inet(host, number))
    except ValueError:
        if colon or ":" in host or text.startswith("[") or not host.strip("0123456789."):
            raise ValueError(_EXPECTED) from None
        return None


def can_bind(probe: _socket.socket, address: bytes) -> bool:
    """Tell whether it is an address of this machine, whatever else binding may fail for."""
    try:
        probe.bind(sockaddr.to_socket_name(sockaddr.with_port(address, 0)))
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    return True


def host_text(address: bytes) -> str:
    """Format an address without its port."""
    return _socket.inet_ntop(sockaddr.family(address), sockaddr.host(address))
