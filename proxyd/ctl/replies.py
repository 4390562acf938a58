"""What proxies answer, checked before it is used: another version may send something else."""

from collections.abc import Mapping
from typing import Any

Fields = dict[str, Any]

_CONNECTION = {
    "id": int,
    "state": str,
    "client": str,
    "target": str,
    "sinceUSec": int,
    "ageUSec": int,
    "idleUSec": int,
    "up": dict,
    "down": dict,
}
_HALF = {"bytes": int, "inFlight": int, "state": str}
_MAY_BE_NULL = {"connectUSec": int, "heldUSec": int}


class UnexpectedError(Exception):
    """A reply lacks a field, or has one of another type."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the reply has no valid field '{name}'")


def event(reply: Fields) -> Fields:
    """Return an event of Watch. Raises UnexpectedError."""
    connection(reply)
    if _field(reply, "event", str) not in ("begin", "end"):
        raise UnexpectedError("event")
    return reply


def connection(reply: Fields) -> Fields:
    """Return the connection in a reply to List or Watch. Raises UnexpectedError."""
    row: Fields = _field(reply, "connection", dict)
    _fields(row, _CONNECTION)
    for way in ("up", "down"):
        _fields(row[way], _HALF)
    _nullable(row, _MAY_BE_NULL)
    return row


def missing(parameters: Fields) -> int:
    """Return how many connections a List lacks. Raises UnexpectedError."""
    count: int = _field(parameters, "missing", int)
    return count


def metric(reply: Fields) -> Fields:
    """Return a metric or its description. Raises UnexpectedError."""
    _field(reply, "name", str)
    _nullable(reply, {"fields": dict, "object": str, "type": str, "description": str})
    return reply


def status(reply: Fields) -> Fields:
    """Return a reply to Status. Raises UnexpectedError."""
    _nullable(reply, {"limits": dict, "startedUSec": int, "flows": int, "datagrams": dict})
    for name in ("listeners", "targets"):
        for one in reply.get(name) or []:
            if not isinstance(one, dict):
                raise UnexpectedError(name)
            _nullable(one, {"downSinceUSec": int})
    return reply


def _nullable(fields: Fields, types: Mapping[str, type]) -> None:
    _fields(fields, {name: kind for name, kind in types.items() if fields.get(name) is not None})


def _fields(fields: Fields, types: Mapping[str, type]) -> None:
    for name, kind in types.items():
        _field(fields, name, kind)


def _field(fields: Fields, name: str, kind: type) -> Any:  # noqa: ANN401 - the caller knows
    value = fields.get(name)
    # Times and counters have 64 bits at most; larger numbers would break the printing of times.
    if not isinstance(value, kind) or (isinstance(value, int) and abs(value) >= 1 << 63):
        raise UnexpectedError(name)
    return value
