"""Varlink, as a caller: one JSON object and a NUL each way, over a UNIX socket."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any, Self

from proxyd.inspection.interfaces import PROXY
from proxyd.inspection.varlink import SERVICE

PATIENCE = 10.0
"""Seconds within which a proxy has to answer; one that forwards answers in milliseconds."""

_REPLY_MAX = 1 << 20
_CHUNK = 1 << 16


class ReplyError(Exception):
    """The other side answered with an error, or with something that is no reply."""

    def __init__(self, name: str, parameters: dict[str, Any] | None = None) -> None:
        super().__init__(name)
        self.name = name
        self.parameters = parameters or {}

    def __str__(self) -> str:
        """Return what it means, if that is known."""
        details = f" {json.dumps(self.parameters)}" if self.parameters else ""
        return _MEANINGS.get(self.name) or f"{self.name}{details}"


_MEANINGS = {
    f"{SERVICE}.PermissionDenied": "only root and the proxy's own user may do this",
    f"{SERVICE}.InterfaceNotFound": "what answers is no proxy, or one of another version",
    f"{SERVICE}.MethodNotFound": "what answers is a proxy of another version",
    f"{PROXY}.NoSuchConnection": "no such connection",
}


class Client:
    """A connection to an inspection socket. Raises OSError and ReplyError."""

    __slots__ = ("_buffer", "_deadline", "_patience", "_socket")

    def __init__(self, path: str, patience: float | None = PATIENCE) -> None:
        self._patience = patience
        """Seconds for a call with all its replies; None: for ever."""
        self._deadline = self._new_deadline()
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._limit()
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def fileno(self) -> int:
        """Return the fd, for a selector."""
        return self._socket.fileno()

    def call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters of the only reply."""
        self.send(method, parameters)
        return self._reply()[0]

    def stream(self, method: str, parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the parameters of each reply of a call with `more`."""
        self.send(method, parameters, more=True)
        more = True
        while more:
            reply, more = self._reply()
            yield reply

    def send(self, method: str, parameters: dict[str, Any], more: bool = False) -> None:
        """Send a call."""
        call: dict[str, Any] = {"method": method, "parameters": parameters}
        if more:
            call["more"] = True
        self._deadline = self._new_deadline()
        self._limit()
        self._socket.sendall(json.dumps(call).encode() + b"\0")

    def read_some(self) -> bool:
        """Read once; return False at the end of the stream."""
        self._limit()
        return self._fill()

    def complete(self) -> Iterator[dict[str, Any]]:
        """Yield the parameters of the replies that have been read."""
        while (data := self._take()) is not None:
            yield _parse(data)[0]

    def _reply(self) -> tuple[dict[str, Any], bool]:
        while (data := self._take()) is None:
            self._limit()
            if not self._fill():
                raise ConnectionResetError(104, "the proxy closed the connection")
        return _parse(data)

    def _new_deadline(self) -> float | None:
        return None if self._patience is None else time.monotonic() + self._patience

    def _limit(self) -> None:
        """Let the next system call wait until the deadline at most."""
        if self._deadline is None:
            return
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(110, "timed out")
        self._socket.settimeout(left)

    def _fill(self) -> bool:
        try:
            data = self._socket.recv(_CHUNK)
        except TimeoutError:
            raise TimeoutError(110, "timed out") from None
        self._buffer += data
        return bool(data)

    def _take(self) -> bytes | None:
        """Remove the first message from the buffer and return it; None if it is not complete."""
        end = self._buffer.find(b"\0")
        if end < 0:
            if len(self._buffer) > _REPLY_MAX:
                raise ReplyError("the reply is too long")
            return None
        message = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return message


def _parse(data: bytes) -> tuple[dict[str, Any], bool]:
    """Return the parameters of a reply, and whether more replies follow. Raises ReplyError."""
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError):
        raise ReplyError("the reply is not JSON") from None
    if not isinstance(reply, dict):
        raise ReplyError("the reply is not an object")
    parameters = reply.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise ReplyError("the parameters of the reply are not an object")
    if "error" in reply:
        raise ReplyError(str(reply["error"]), parameters)
    return parameters, bool(reply.get("continues"))
