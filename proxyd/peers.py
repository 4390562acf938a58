"""The addresses of clients in the log, for those who may log them."""

from proxyd import address
from proxyd._relay import socket_names

_wanted = True


def log_addresses(*, wanted: bool) -> None:
    """Set whether lines may contain the addresses of clients."""
    global _wanted
    _wanted = wanted


def address_note(peer: bytes) -> str:
    """Return the end of a line about a client with this packed address."""
    text = address_field(peer)
    return f" Client: {text}." if text else ""


def address_field(peer: bytes) -> str:
    """Return what the log calls a client; "" if its address is not known, or not wanted."""
    if not peer or not _wanted or _is_unnamed(peer):
        return ""
    return address.text(address.unmapped(peer))


def client_label(fd: int, peer: bytes) -> str:
    """Return what the log calls a client at debug level."""
    if not _wanted:
        return "client"
    return address.text(address.unmapped(peer or socket_names(fd)[0]))


def flow_label(peer: bytes) -> str:
    """Return what the log calls the client of a flow at debug level."""
    return address.text(address.unmapped(peer)) if peer and _wanted else "client"


def _is_unnamed(peer: bytes) -> bool:
    return address.family(peer) == address.AF_UNIX and not address.unix_name(peer)
