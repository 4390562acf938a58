"""Entries of the journal with fields, https://systemd.io/JOURNAL_NATIVE_PROTOCOL/.

They are for the rare events that the catalog explains; everything else is a line on stderr. This
is imported with the first of them. In a unit with LogNamespace= the service manager mounts the
sockets of that namespace here (systemd.exec(5)), so an entry goes where the lines go.
"""

import _socket

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Mapping

SOCKET = "/run/systemd/journal/socket"

_IDENTIFIER = "systemd-socket-proxyd"
"""As the lines have it by default: the name of the program."""

_DAEMON = 3
"""The facility, syslog(3), as the lines have it by default."""


def send(priority: int, message: str, fields: "Mapping[str, str]") -> None:
    """Send an entry; no value may contain a newline. Never waits.

    Raises OSError if the journal has not taken it: its socket cannot be reached from here, its
    queue is full, or the entry is too large for a datagram.
    """
    entry = {
        "MESSAGE": message,
        "PRIORITY": str(priority),
        "SYSLOG_FACILITY": str(_DAEMON),
        "SYSLOG_IDENTIFIER": _IDENTIFIER,
        **fields,
    }
    text = "".join([f"{name}={value}\n" for name, value in entry.items()])
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    try:
        data = text.encode("utf-8", "backslashreplace")
        sock.sendto(data, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL, SOCKET)
    finally:
        sock.close()
