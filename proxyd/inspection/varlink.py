"""Varlink messages, https://varlink.org: one JSON object and a NUL in each direction."""

import json

from proxyd import log

SERVICE = "org.varlink.service"

Fields = dict[str, object]


class MessageError(Exception):
    """A message is not a call. There is no reply to such a message; the caller is dropped."""


class CallError(Exception):
    """The error with which a call is answered. `fields` are its parameters."""

    def __init__(self, name: str, **fields: object) -> None:
        super().__init__(name)
        self.name = name
        self.fields: Fields = fields


class Call:
    """One call of a method."""

    __slots__ = ("method", "more", "oneway", "parameters")

    def __init__(self, method: str, parameters: Fields, *, more: bool, oneway: bool) -> None:
        self.method = method
        self.parameters = parameters
        self.more = more
        """Whether the caller takes several replies."""
        self.oneway = oneway
        """Whether the caller takes no reply at all."""

    def require_more(self) -> None:
        """Raise CallError unless the caller takes several replies."""
        if not self.more:
            raise CallError(f"{SERVICE}.ExpectedMore")

    def allow(self, *names: str) -> None:
        """Raise CallError for a parameter that is not among `names`."""
        for name in self.parameters:
            if name not in names:
                raise CallError(f"{SERVICE}.InvalidParameter", parameter=plain(name))

    def text(self, name: str) -> str | None:
        """Return a string parameter; None if it is absent or null. Raises CallError."""
        value = self.parameters.get(name)
        if value is not None and not isinstance(value, str):
            raise CallError(f"{SERVICE}.InvalidParameter", parameter=name)
        return value

    def integer(self, name: str) -> int:
        """Return an integer parameter of 64 bits. Raises CallError."""
        value = self.parameters.get(name)
        # A Boolean is an int in Python, but not in JSON.
        if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
            raise CallError(f"{SERVICE}.InvalidParameter", parameter=name)
        return value


def parse(message: bytes) -> Call:
    """Read a message, without its NUL. Raises MessageError."""
    try:
        value = json.loads(message)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise MessageError("not JSON") from None
    if not isinstance(value, dict):
        raise MessageError("not an object")
    method = value.get("method")
    parameters = value.get("parameters")
    if not isinstance(method, str) or not isinstance(parameters, dict | None):
        raise MessageError("not a call")
    more, oneway = (_flag(value, name) for name in ("more", "oneway"))
    if more and oneway:
        raise MessageError("more and oneway exclude each other")
    return Call(method, parameters or {}, more=more, oneway=oneway)


def _flag(value: Fields, name: str) -> bool:
    flag = value.get(name)
    if flag is not None and not isinstance(flag, bool):
        raise MessageError(f"{name} is not a Boolean")
    return bool(flag)


def reply(parameters: Fields, *, continues: bool = False) -> bytes:
    """Return the message of one reply; with `continues`, more will follow."""
    return message(_encode(parameters), continues=continues)


def message(parameters: str, *, continues: bool = False) -> bytes:
    """Return the message of one reply whose parameters are JSON already."""
    more = ',"continues":true' if continues else ""
    return f'{{"parameters":{parameters}{more}}}\0'.encode()


def failure(error: CallError) -> bytes:
    """Return the message of an error."""
    return f"{_encode({'error': error.name, 'parameters': error.fields})}\0".encode()


def _encode(value: Fields) -> str:
    return json.dumps(value, separators=(",", ":"))


def plain(text: str) -> str:
    """Escape what JSON libraries refuse or what would control a terminal.

    Paths and abstract names are chosen by peers: they may contain NUL, or bytes that are no UTF-8.
    """
    return log.printable(text)
