"""Varlink, answered: the metrics of all running proxies through one connection.

systemd-report(1) reads each socket in /run/systemd/report/, but a socket for each proxy cannot be
there. An Accept=yes socket unit starts this instead; `varlinkctl call exec:` does so as well, and
`ssh-exec:` on another machine. Single connections are not served: their ids are those of one proxy,
which has a socket of its own.
"""

import os
import socket
from collections.abc import Iterator
from typing import Protocol

from proxyd import __version__
from proxyd.ctl import ask
from proxyd.ctl.find import find
from proxyd.errors import UsageError
from proxyd.inspection.interfaces import METRICS, TEXTS
from proxyd.inspection.varlink import (
    SERVICE,
    Call,
    CallError,
    Fields,
    MessageError,
    failure,
    parse,
    plain,
    reply,
)

FD_NAMES = ("varlink", "connection")
"""The second is what older versions of systemd, such as 252, call the socket of Accept=yes."""

DOMAIN = "net.socketproxyd."
"""What metrics begin with: systemd-report drops others, and then fails."""

INTERFACES = (METRICS, SERVICE)

_CALL_MAX = 1 << 16
_CHUNK = 1 << 16
_CALLER_PATIENCE = 30.0
_PROXY_PATIENCE = 3.0
"""Seconds for one proxy; systemd-report gives all of them together 30."""


class Peer(Protocol):
    """A caller, whose calls are read and answered."""

    def recv(self, size: int, /) -> bytes:
        """Return some bytes; none at the end. Raises OSError."""

    def sendall(self, data: bytes, /) -> None:
        """Send bytes. Raises OSError."""


class StandardStreams:
    """The caller is at stdin and stdout, as with `varlinkctl call ssh-exec:`."""

    def recv(self, size: int, /) -> bytes:
        """Read from stdin."""
        return os.read(0, size)

    def sendall(self, data: bytes, /) -> None:
        """Write to stdout."""
        while data:
            data = data[os.write(1, data) :]


def caller() -> Peer | None:
    """Return the caller that was passed to this process; None without one. Raises UsageError."""
    if os.environ.get("SYSTEMD_VARLINK_LISTEN") == "-":
        return StandardStreams()
    fd = _passed_fd()
    if fd is None:
        return None
    try:
        passed = socket.socket(fileno=fd)
        passed.getpeername()
    except OSError as error:
        raise UsageError(f"{FD_NAMES[0]} is not a connected socket: {error.strerror}") from None
    passed.settimeout(_CALLER_PATIENCE)
    return passed


def _passed_fd() -> int | None:
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    count = os.environ.get("LISTEN_FDS", "")
    at = next((at for at, name in enumerate(names) if name in FD_NAMES), None)
    if at is None or not count.isdecimal() or at >= int(count):
        return None
    return 3 + at


def serve(peer: Peer, user: bool) -> int:
    """Answer calls until the caller has gone; return the exit status."""
    try:
        for message in _messages(peer):
            answer = _answered(parse(message), user)
            if answer:
                peer.sendall(answer)
    except (TimeoutError, BrokenPipeError, ConnectionResetError):
        return 0  # it has its answers, or does not want them
    except MessageError:  # what has come is no call, so nothing after it can be understood
        return 1
    return 0


def _messages(peer: Peer) -> Iterator[bytes]:
    """Yield what is sent, without the NULs. Raises MessageError."""
    buffer = bytearray()
    while data := peer.recv(_CHUNK):
        buffer += data
        while (end := buffer.find(b"\0")) >= 0:
            message = bytes(buffer[:end])
            del buffer[: end + 1]
            yield message
        if len(buffer) > _CALL_MAX:
            raise MessageError("too long")


def _answered(call: Call, user: bool) -> bytes:
    """Return all replies to a call."""
    try:
        *others, last = _answer(call, user)
    except CallError as error:
        data = failure(error)
    else:
        data = b"".join([reply(one, continues=True) for one in others]) + reply(last)
    return b"" if call.oneway else data


def _answer(call: Call, user: bool) -> list[Fields]:
    """Return what each reply holds, at least one. Raises CallError."""
    interface, _, name = call.method.rpartition(".")
    if interface not in INTERFACES:
        raise CallError(f"{SERVICE}.InterfaceNotFound", interface=plain(interface))
    if interface == METRICS and name in ("List", "Describe"):
        call.require_more()
        call.allow()
        return _metrics(name, user)
    if interface == SERVICE and name == "GetInfo":
        call.allow()
        return [_INFO]
    if interface == SERVICE and name == "GetInterfaceDescription":
        call.allow("interface")
        return [{"description": TEXTS[_known(call.text("interface"))]}]
    raise CallError(f"{SERVICE}.MethodNotFound", method=plain(call.method))


def _known(interface: str | None) -> str:
    """Return the name of an interface that is served here. Raises CallError."""
    if interface is None:
        raise CallError(f"{SERVICE}.InvalidParameter", parameter="interface")
    if interface not in INTERFACES:
        raise CallError(f"{SERVICE}.InterfaceNotFound", interface=plain(interface))
    return interface


_INFO: Fields = {
    "vendor": "systemd-socket-proxyd for Python",
    "product": "socket-proxyctl",
    "version": __version__,
    "url": "",
    "interfaces": list(INTERFACES),
}


def _metrics(name: str, user: bool) -> list[Fields]:
    """Return the descriptions, each once, or the values with the unit that each belongs to.

    A proxy that does not answer is left out: the report of the others is worth more.
    """
    try:
        proxies = find([], [], user).proxies
    except UsageError:  # without a service manager none is known
        proxies = []
    answers = ask.metrics(proxies, _PROXY_PATIENCE)
    replies: list[Fields] = []
    described: set[str] = set()
    for proxy, (descriptions, values) in answers.results:
        if name == "List":
            replies += [one | {"object": proxy.unit} for one in values if _is_ours(one)]
            continue
        for one in descriptions:
            if _is_ours(one) and one["name"] not in described:
                described.add(one["name"])
                replies.append(one)
    if not replies:
        raise CallError(f"{METRICS}.NoSuchMetric")
    return replies


def _is_ours(metric: Fields) -> bool:
    return str(metric["name"]).startswith(DOMAIN)
