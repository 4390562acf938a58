"""What the log and `systemctl status` say in numbers."""

import os
from _collections_abc import Iterable

from proxyd._relay import Relay
from proxyd.intake import Intake
from proxyd.reach import Reach

TYPE_CHECKING = False  # as typing has it
if TYPE_CHECKING:
    from proxyd._relay import Event

_UNITS = "BKMGTPE"

# What HOW_* in _connection.pxd stands for, in a sum and for one connection.
_ENDINGS = ("ended", "reset", "idle", "cut", "client gone")
_CUT, _GONE = 3, 4  # held clients end so too


def bytes_text(count: int) -> str:
    """Write a number of bytes short, to base 1024: 512B, 1.2G."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.{1 if unit and value < 99.95 else 0}f}{_UNITS[unit]}"


def status(relay: Relay, reaches: list[Reach]) -> str:
    """One line for STATUS=."""
    waiting = _sums((reach.kind, [reach.waiting]) for reach in reaches)
    held = sum(len(reach.held) for reach in reaches)
    count = relay.open + held - sum(waits for (waits,) in waiting.values())
    parts = [f"{count} connection{'' if count == 1 else 's'}"]
    parts += [f"{waits} waiting for {kind}" for kind, (waits,) in waiting.items() if waits]
    _, _, to_targets, to_clients, *_ = relay.counters()
    parts.append(f"{bytes_text(to_targets + to_clients)} forwarded")
    return ", ".join(parts)


def summary(intake: Intake, relay: Relay, reaches: list[Reach]) -> list[str]:
    """Everything since the start: one line, one for each target, and one if there are threads.

    Accepted is the sum of open, waiting, refused, failed and all that have ended.
    """
    accepted, refused, to_targets, to_clients, spliced, copied, ended = relay.counters()
    held = sum(len(reach.held) for reach in reaches)
    failed = sum(reach.failed for reach in reaches)
    ends = list(ended)
    ends[_CUT] += sum(reach.cut for reach in reaches)
    ends[_GONE] += sum(reach.gone for reach in reaches)
    endings = [f"{count} {how}" for how, count in zip(_ENDINGS, ends, strict=True) if count]
    line = (
        f"{accepted + intake.passed_in} accepted, {relay.open} open, {held} waiting, "
        f"{refused + intake.refused} refused, {failed} failed; "
        f"{to_targets} bytes to targets, {to_clients} bytes to clients, "
        f"{spliced} spliced, {copied} copied; {', '.join(endings) or 'none ended'}"
    )
    rows = _sums(
        (reach.kind, [_served(intake, reach), len(reach.held), reach.failed]) for reach in reaches
    )
    lines = [line] + [
        f"{kind}: {served} served, {waiting} waiting, {failed} failed"
        for kind, (served, waiting, failed) in rows.items()
    ]
    if relay.threads > 1:
        lines.append(f"{relay.threads} threads, {relay.handed_over} connections handed over")
    return lines


def ending(note: str, event: "Event") -> str:
    """One connection's line in the log at debug level; `event` is an ENDED one."""
    _, _, how, up, down, took_ms, errnos = event
    sides = [
        f"{side}: {os.strerror(error)}"
        for side, error in zip(("client", "target"), errnos, strict=True)
        if error
    ]
    why = f" ({', '.join(sides)})" if sides else ""
    return f"{note}: {up} bytes up, {down} bytes down in {took_ms} ms, {_ENDINGS[how]}{why}."


def _sums(rows: Iterable[tuple[str, list[int]]]) -> dict[str, list[int]]:
    """Add up the rows of each kind."""
    sums: dict[str, list[int]] = {}
    for kind, numbers in rows:
        before = sums.get(kind, [0] * len(numbers))
        sums[kind] = [one + other for one, other in zip(before, numbers, strict=True)]
    return sums


def _served(intake: Intake, reach: Reach) -> int:
    """Connections brought to a target, those still under way included."""
    express = sum(door.gate.served for door in intake.doors if door.way is reach)
    return express + reach.served - reach.returned
