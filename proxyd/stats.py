"""Numbers for the log and for `systemctl status`."""

import os
from _collections_abc import Iterable

from proxyd._relay import ENDING_CLIENT_GONE, ENDING_CUT, Relay
from proxyd.acceptor import Acceptor
from proxyd.upstream import Upstream

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd._relay import Ended

_UNITS = "BKMGTPE"


def status(relay: Relay, upstreams: list[Upstream]) -> str:
    """Return the line for STATUS=."""
    waiting = _sums((one.group, [one.waiting]) for one in upstreams)
    held = sum(len(one.held) for one in upstreams)
    count = relay.connections + held - sum(waits for (waits,) in waiting.values())
    parts = [f"{count} connection{'' if count == 1 else 's'}"]
    parts += [f"{waits} waiting for {group}" for group, (waits,) in waiting.items() if waits]
    totals = relay.totals()
    parts.append(f"{bytes_text(totals.bytes_to_targets + totals.bytes_to_clients)} forwarded")
    return ", ".join(parts)


def bytes_text(count: int) -> str:
    """Format a number of bytes, to base 1024: 512B, 1.2G."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.{1 if unit and value < 99.95 else 0}f}{_UNITS[unit]}"


def summary(acceptor: Acceptor, relay: Relay, upstreams: list[Upstream]) -> list[str]:
    """Return everything since the start: a line in all, one per target, and one for threads.

    Accepted is the sum of open, waiting, refused, failed and all that have ended.
    """
    totals = relay.totals()
    held = sum(len(one.held) for one in upstreams)
    failed = sum(one.held.failed for one in upstreams)
    ends = dict(totals.endings)  # held clients end as well
    ends[ENDING_CUT] += sum(one.held.cut for one in upstreams)
    ends[ENDING_CLIENT_GONE] += sum(one.held.gone for one in upstreams)
    endings = [f"{count} {name}" for name, count in ends.items() if count]
    line = (
        f"{totals.accepted + acceptor.passed_in} accepted, {relay.connections} open, "
        f"{held} waiting, {totals.refused + acceptor.refused} refused, {failed} failed; "
        f"{totals.bytes_to_targets} bytes to targets, {totals.bytes_to_clients} bytes to clients, "
        f"{totals.spliced} spliced, {totals.copied} copied; {', '.join(endings) or 'none ended'}"
    )
    rows = _sums((one.group, [one.connected, len(one.held), one.held.failed]) for one in upstreams)
    lines = [line] + [
        f"{group}: {served} served, {waiting} waiting, {failed} failed"
        for group, (served, waiting, failed) in rows.items()
    ]
    if relay.thread_count > 1:
        lines.append(f"{relay.thread_count} threads, {relay.handed_over} connections handed over")
    return lines


def _sums(rows: Iterable[tuple[str, list[int]]]) -> dict[str, list[int]]:
    """Add up the rows of each group."""
    sums: dict[str, list[int]] = {}
    for group, numbers in rows:
        before = sums.get(group, [0] * len(numbers))
        sums[group] = [one + other for one, other in zip(before, numbers, strict=True)]
    return sums


def ending(label: str, event: "Ended") -> str:
    """Return the line of one connection in the log at debug level."""
    errors = (("client", event.client_error), ("target", event.target_error))
    sides = [f"{side}: {os.strerror(error)}" for side, error in errors if error]
    why = f" ({', '.join(sides)})" if sides else ""
    return (
        f"{label}: {event.bytes_up} bytes up, {event.bytes_down} bytes down "
        f"in {event.duration_ms} ms, {event.ending}{why}."
    )
