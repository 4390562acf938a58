"""Numbers for the log and for `systemctl status`."""

import os
import time
from _collections_abc import Iterable

from proxyd import log
from proxyd._relay import ENDING_CLIENT_GONE, ENDING_CUT, Relay
from proxyd.acceptor import Acceptor
from proxyd.connect_errors import short_reason
from proxyd.sizes import bytes_text
from proxyd.upstream import Upstream

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd._relay import Ended, Totals

_RECENT_MS = 60_000
"""How long STATUS= says when the last client was refused or has failed: the server sees to it."""

_TARGETS_MAX = 8
"""STATUS= names at most this many targets that clients wait for."""

_STATUS_MAX = 3900
"""In bytes: sd_notify(3) drops a message of more than 4096."""


def status(acceptor: Acceptor, relay: Relay, upstreams: list[Upstream]) -> str:
    """Return the line for STATUS=."""
    waiting = _sums((one.group, [one.waiting]) for one in upstreams)
    held = sum(len(one.held) for one in upstreams)
    count = relay.connections + held - sum(waits for (waits,) in waiting.values())
    limit = relay.connections_max
    full = f" (limit {limit})" if relay.connections + held >= limit else ""
    parts = [f"{count} connection{'' if count == 1 else 's'}{full}"]
    groups = [(group, waits) for group, (waits,) in waiting.items() if waits]
    for group, waits in groups[:_TARGETS_MAX]:
        parts.append(f"{waits} waiting for {group}{_outage(group, upstreams, relay.now_ms)}")
    if len(groups) > _TARGETS_MAX:
        others = sum(waits for _, waits in groups[_TARGETS_MAX:])
        parts.append(f"{others} waiting for {len(groups) - _TARGETS_MAX} other targets")
    totals = relay.totals()
    parts.append(f"{bytes_text(totals.bytes_to_targets + totals.bytes_to_clients)} forwarded")
    refused = totals.refused + acceptor.refused - acceptor.unknown
    if refused:
        parts.append(f"{refused} refused at the limit{_ago(acceptor.refused_ms, relay.now_ms)}")
    if acceptor.unknown:
        parts.append(f"{acceptor.unknown} refused without an address to announce")
    parts += _failed(upstreams, relay.now_ms)
    return _bounded(", ".join(parts))


def _outage(group: str, upstreams: list[Upstream], now_ms: int) -> str:
    """Return since when a target is down, and why, if it is."""
    for upstream in upstreams:
        outage = upstream.outage
        if upstream.group == group and not outage.up and outage.since_ms is not None:
            since = clock_text(outage.since_ms, now_ms)
            return f", down since {since} ({short_reason(outage.why, upstream.text)})"
    return ""


def _failed(upstreams: list[Upstream], now_ms: int) -> list[str]:
    """Return how many clients were given up, and about the last of them, if there are any."""
    failed = sum(one.held.failed for one in upstreams)
    if not failed:
        return []
    last = max(upstreams, key=lambda one: one.held.failed_ms or 0)
    ago = _ago(last.held.failed_ms, now_ms)
    why = f" ({short_reason(last.held.failed_why, last.text)})" if ago else ""
    return [f"{failed} failed{ago}{why}"]


def _ago(when_ms: int | None, now_ms: int) -> str:
    """Return how long ago something was, unless that is long: nothing would keep it true."""
    if when_ms is None or now_ms - when_ms >= _RECENT_MS:
        return ""
    return f", last {(now_ms - when_ms) // 1000} s ago"


def draining(relay: Relay, upstreams: list[Upstream], stop_ms: int | None) -> str:
    """Return the line for STATUS= while connections drain; `stop_ms`: None for no limit."""
    count = relay.connections + sum(len(one.held) for one in upstreams)
    until = "" if stop_ms is None else f", until {clock_text(stop_ms, relay.now_ms)}"
    return f"Draining: {count} connection{'' if count == 1 else 's'} left{until}"


def clock_text(when_ms: int, now_ms: int) -> str:
    """Return the time of day of a moment of the relay's clock."""
    return time.strftime("%H:%M:%S", time.localtime(time.time() + (when_ms - now_ms) / 1000))


def _bounded(text: str) -> str:
    data = log.printable(text).encode("utf-8", "backslashreplace")
    if len(data) > _STATUS_MAX:
        data = data[: _STATUS_MAX - 3] + "…".encode()
    return data.decode("utf-8", "ignore")


def summary(acceptor: Acceptor, relay: Relay, upstreams: list[Upstream]) -> list[str]:
    """Return everything since the start: a line in all, one per target, and one for threads.

    Accepted is the sum of open, waiting, refused, failed and all that have ended.
    """
    totals = relay.totals()
    held = sum(len(one.held) for one in upstreams)
    failed = sum(one.held.failed for one in upstreams)
    endings = [f"{n} {name}" for name, n in all_endings(totals, upstreams).items() if n]
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


def all_endings(totals: "Totals", upstreams: list[Upstream]) -> dict[str, int]:
    """Return how many connections and held clients have ended, by how."""
    ends = dict(totals.endings)
    ends[ENDING_CUT] += sum(one.held.cut for one in upstreams)
    ends[ENDING_CLIENT_GONE] += sum(one.held.gone for one in upstreams)
    return ends


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
