"""Varlink, answered: the metrics of all running proxies through one socket.

systemd-report(1) reads each socket in /run/systemd/report/, but a socket for each proxy cannot be
there. An Accept=yes socket unit starts this instead; `varlinkctl call exec:` does so as well.
"""

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

from proxyd import __version__
from proxyd.ctl import ask
from proxyd.ctl.client import METRICS
from proxyd.ctl.find import find
from proxyd.errors import UsageError

FD_NAME = "varlink"

DOMAIN = "net.socketproxyd"
"""What metrics begin with: systemd-report drops others, and then fails."""

_SERVICE = "org.varlink.service"
_CALL_MAX = 1 << 16
_CALLER_PATIENCE = 30.0
_PROXY_PATIENCE = 3.0
"""Seconds for one proxy; systemd-report gives all of them together 30."""

_METRICS_TEXT = """\
interface io.systemd.Metrics

type MetricFamilyType (counter, gauge, string, object)

method List() -> (name: string, object: ?string, fields: ?object, value: any)

method Describe() -> (name: string, description: string, type: MetricFamilyType)

error NoSuchMetric()
"""

_SERVICE_TEXT = """\
interface org.varlink.service

method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error MethodNotImplemented (method: string)
error InvalidParameter (parameter: string)
error PermissionDenied ()
error ExpectedMore ()
"""

_TEXTS = {METRICS: _METRICS_TEXT, _SERVICE: _SERVICE_TEXT}

Reply = dict[str, Any]


class CallError(Exception):
    """The error that a call is answered with."""

    def __init__(self, name: str, **parameters: str) -> None:
        super().__init__(name)
        self.name = name
        self.parameters = parameters


def passed_fd() -> int | None:
    """Return the fd of the caller that has been passed to this process; None without one."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    count = os.environ.get("LISTEN_FDS", "")
    if FD_NAME not in names or not count.isdecimal() or names.index(FD_NAME) >= int(count):
        return None
    return 3 + names.index(FD_NAME)


def serve(fd: int, user: bool) -> int:
    """Answer the calls on a connected socket until its end; return the exit status."""
    try:
        caller = socket.socket(fileno=fd)
        caller.getpeername()
    except OSError as error:
        raise UsageError(f"{FD_NAME} is not a connected socket: {error.strerror}") from None
    with caller:
        caller.settimeout(_CALLER_PATIENCE)
        try:
            for message in _messages(caller):
                for reply in _replies(message, user):
                    caller.sendall(json.dumps(reply, separators=(",", ":")).encode() + b"\0")
        except (TimeoutError, BrokenPipeError, ConnectionResetError):
            return 0  # it has its answers, or does not want them
        except _NotACallError:
            return 1
    return 0


class _NotACallError(Exception):
    """What has come is no call, so nothing after it can be understood."""


def _messages(caller: socket.socket) -> Iterator[bytes]:
    buffer = bytearray()
    while data := caller.recv(1 << 16):
        buffer += data
        while (end := buffer.find(b"\0")) >= 0:
            message = bytes(buffer[:end])
            del buffer[: end + 1]
            yield message
        if len(buffer) > _CALL_MAX:
            raise _NotACallError


def _replies(message: bytes, user: bool) -> Iterator[Reply]:
    """Yield the replies to a call; `continues` is in all but the last."""
    method, parameters, more, oneway = _parse(message)
    try:
        answers = _answer(method, parameters, more, user)
    except CallError as error:
        answers = [{"error": error.name, "parameters": error.parameters}]
    else:
        answers = [{"parameters": one, "continues": True} for one in answers]
        del answers[-1]["continues"]
    if not oneway:
        yield from answers


def _parse(message: bytes) -> tuple[str, dict[str, Any], bool, bool]:
    try:
        call = json.loads(message)
    except (ValueError, RecursionError):
        raise _NotACallError from None
    if not isinstance(call, dict) or not isinstance(call.get("method"), str):
        raise _NotACallError
    parameters = call.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise _NotACallError
    return call["method"], parameters, call.get("more") is True, call.get("oneway") is True


def _answer(method: str, parameters: dict[str, Any], more: bool, user: bool) -> list[Reply]:
    """Return what each reply holds, at least one. Raises CallError."""
    interface, _, name = method.rpartition(".")
    if interface not in _TEXTS:
        raise CallError(f"{_SERVICE}.InterfaceNotFound", interface=interface)
    if interface == METRICS:
        if name not in ("List", "Describe"):
            raise CallError(f"{_SERVICE}.MethodNotFound", method=method)
        if not more:
            raise CallError(f"{_SERVICE}.ExpectedMore")
        return _metrics(name, user)
    if name == "GetInfo":
        return [_INFO]
    if name == "GetInterfaceDescription":
        asked = parameters.get("interface")
        if not isinstance(asked, str):
            raise CallError(f"{_SERVICE}.InvalidParameter", parameter="interface")
        if asked not in _TEXTS:
            raise CallError(f"{_SERVICE}.InterfaceNotFound", interface=asked)
        return [{"description": _TEXTS[asked]}]
    raise CallError(f"{_SERVICE}.MethodNotFound", method=method)


_INFO = {
    "vendor": "systemd-socket-proxyd for Python",
    "product": "socket-proxyctl",
    "version": __version__,
    "url": "",
    "interfaces": sorted(_TEXTS),
}


def _metrics(name: str, user: bool) -> list[Reply]:
    """Return the descriptions, each once, or the values with the unit that each belongs to.

    A proxy that does not answer is left out: the report of the others is worth more.
    """
    answers = ask.metrics(find([], [], user).proxies, _PROXY_PATIENCE)
    replies: list[Reply] = []
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


def _is_ours(metric: dict[str, Any]) -> bool:
    return isinstance(metric["name"], str) and metric["name"].startswith(f"{DOMAIN}.")
