"""What the log and `systemctl status` say in numbers."""

import os
from _collections_abc import Iterable

from proxyd._relay import ENDING_CLIENT_GONE, ENDING_CUT, Relay
from proxyd.intake import Intake
from proxyd.reach import Reach

TYPE_CHECKING = False  # as typing has it
if TYPE_CHECKING:
    from proxyd._relay import Ended

_UNITS = "BKMGTPE"


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
    count = relay.connections + held - sum(waits for (waits,) in waiting.values())
    parts = [f"{count} connection{'' if count == 1 else 's'}"]
    parts += [f"{waits} waiting for {kind}" for kind, (waits,) in waiting.items() if waits]
    totals = relay.totals()
    parts.append(f"{bytes_text(totals.bytes_to_targets + totals.bytes_to_clients)} forwarded")
    return ", ".join(parts)


def summary(intake: Intake, relay: Relay, reaches: list[Reach]) -> list[str]:
    """Everything since the start: one line, one for each target, and one if there are threads.

    Accepted is the sum of open, waiting, refused, failed and all that have ended.
    """
    totals = relay.totals()
    held = sum(len(reach.held) for reach in reaches)
    failed = sum(reach.failed for reach in reaches)
    ends = dict(totals.endings)  # held clients end as well
    ends[ENDING_CUT] += sum(reach.cut for reach in reaches)
    ends[ENDING_CLIENT_GONE] += sum(reach.gone for reach in reaches)
    endings = [f"{count} {ending}" for ending, count in ends.items() if count]
    line = (
        f"{totals.accepted + intake.passed_in} accepted, {relay.connections} open, {held} waiting, "
        f"{totals.refused + intake.refused} refused, {failed} failed; "
        f"{totals.bytes_to_targets} bytes to targets, {totals.bytes_to_clients} bytes to clients, "
        f"{totals.spliced} spliced, {totals.copied} copied; {', '.join(endings) or 'none ended'}"
    )
    rows = _sums(
        (reach.kind, [_served(intake, reach), len(reach.held), reach.failed]) for reach in reaches
    )
    lines = [line] + [
        f"{kind}: {served} served, {waiting} waiting, {failed} failed"
        for kind, (served, waiting, failed) in rows.items()
    ]
    if relay.thread_count > 1:
        lines.append(f"{relay.thread_count} threads, {relay.handed_over} connections handed over")
    return lines


def ending(note: str, event: "Ended") -> str:
    """One connection's line in the log at debug level."""
    errors = (("client", event.client_error), ("target", event.target_error))
    sides = [f"{side}: {os.strerror(error)}" for side, error in errors if error]
    why = f" ({', '.join(sides)})" if sides else ""
    return (
        f"{note}: {event.bytes_up} bytes up, {event.bytes_down} bytes down "
        f"in {event.duration_ms} ms, {event.ending}{why}."
    )


def _sums(rows: Iterable[tuple[str, list[int]]]) -> dict[str, list[int]]:
    """Add up the rows of each kind."""
    sums: dict[str, list[int]] = {}
    for kind, numbers in rows:
        before = sums.get(kind, [0] * len(numbers))
        sums[kind] = [one + other for one, other in zip(before, numbers, strict=True)]
    return sums


def _served(intake: Intake, reach: Reach) -> int:
    """Connections brought to a target, those still under way included."""
    express = sum(door.gate.connected_count for door in intake.doors if door.way is reach)
    return express + reach.served - reach.returned
