"""Numbers for the log and for `systemctl status`."""

import posix
import time

from proxyd import log
from proxyd._relay import ENDING_CLIENT_GONE, ENDING_CUT, Relay
from proxyd.acceptor import Acceptor
from proxyd.connect_errors import short_reason
from proxyd.outage import Outage
from proxyd.refusals import Refusals
from proxyd.sizes import bytes_text
from proxyd.upstream import Upstream

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Iterable

    from proxyd._datagram import DatagramTotals
    from proxyd._relay import Ended, Totals
    from proxyd.datagrams import DatagramPolicy

_RECENT_MS = 60_000
"""How long STATUS= says when the last client was refused or has failed: the server sees to it."""

_TARGETS_MAX = 8
"""STATUS= names at most this many targets that clients wait for."""

_DATAGRAM_TARGETS_MAX = 4
"""STATUS= names at most this many targets that datagrams wait for."""

_STATUS_MAX = 3900
"""In bytes: sd_notify(3) drops a message of more than 4096."""


def status(
    acceptor: Acceptor,
    relay: Relay,
    upstreams: list[Upstream],
    datagrams: "DatagramPolicy | None" = None,
) -> str:
    """Return the line for STATUS=."""
    waiting = _sums((one.group, [one.waiting]) for one in upstreams)
    held = sum(len(one.held) for one in upstreams) + acceptor.awaiting_header
    flows = datagrams.flows if datagrams is not None else 0
    count = relay.connections - flows + held - sum(waits for (waits,) in waiting.values())
    limit = relay.connections_max
    parts = [_counted(count, "connection")]
    if datagrams is not None:
        parts.append(_counted(flows, "flow"))
    if relay.connections + held >= limit:
        parts[-1] += f" (limit {limit})"
    groups = [(group, waits) for group, (waits,) in waiting.items() if waits]
    for group, waits in groups[:_TARGETS_MAX]:
        parts.append(f"{waits} waiting for {group}{_outage(group, upstreams, relay.now_ms)}")
    if len(groups) > _TARGETS_MAX:
        others = sum(waits for _, waits in groups[_TARGETS_MAX:])
        parts.append(f"{others} waiting for {len(groups) - _TARGETS_MAX} other targets")
    totals = relay.totals()
    moved = totals.bytes_to_targets + totals.bytes_to_clients
    if datagrams is not None:
        parts += _datagrams_waiting(datagrams, relay.now_ms)
        moved += _datagram_bytes(datagrams)
    parts.append(f"{bytes_text(moved)} forwarded")
    parts += _refused(acceptor.refusals, relay)
    parts += _failed(upstreams, relay.now_ms)
    if datagrams is not None:
        parts += _datagrams_dropped(datagrams, relay.now_ms)
    return _bounded(", ".join(parts))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _outage(group: str, upstreams: list[Upstream], now_ms: int) -> str:
    """Return since when a target is down, and why, if it is."""
    for upstream in upstreams:
        if upstream.group == group and (text := _outage_of(upstream.outage, upstream.text, now_ms)):
            return text
    return ""


def _refused(refusals: Refusals, relay: Relay) -> list[str]:
    """Return how many clients were refused, by reason."""
    by_source = relay.refused_by_source
    others = refusals.unknown + refusals.headerless + by_source
    at_limit = relay.totals().refused + refusals.count - others
    now_ms = relay.now_ms
    reasons = (
        (at_limit, f"at the limit{_ago(refusals.limit_ms, now_ms)}"),
        (by_source, f"at the limit of their source{_ago(refusals.source_limit_ms, now_ms)}"),
        (refusals.unknown, "without an address to announce"),
        (refusals.headerless, f"without a PROXY header{_ago(refusals.headerless_ms, now_ms)}"),
    )
    return [f"{count} refused {why}" for count, why in reasons if count]


def _failed(upstreams: list[Upstream], now_ms: int) -> list[str]:
    """Return how many clients were given up, and about the last of them, if there are any."""
    failed = sum(one.held.failed for one in upstreams)
    if not failed:
        return []
    last = max(upstreams, key=lambda one: one.held.failed_ms or 0)
    ago = _ago(last.held.failed_ms, now_ms)
    why = f" ({short_reason(last.held.failed_why, last.text)})" if ago else ""
    return [f"{failed} failed{ago}{why}"]


def _datagrams_waiting(datagrams: "DatagramPolicy", now_ms: int) -> list[str]:
    """Return for which targets datagrams wait, for STATUS=. The kernel does not tell how many."""
    held = [one for one in datagrams.upstreams if one.holds]
    parts = [
        f"datagrams waiting for {one.text}{_outage_of(one.outage, one.text, now_ms)}"
        for one in held[:_DATAGRAM_TARGETS_MAX]
    ]
    more = len(held) - _DATAGRAM_TARGETS_MAX
    return parts + ([f"datagrams waiting for {more} other targets"] if more > 0 else [])


def _datagram_bytes(datagrams: "DatagramPolicy") -> int:
    """Return how many bytes were delivered, both ways."""
    totals = datagrams.totals()
    return totals.bytes_to_targets + totals.bytes_to_clients


def _datagrams_dropped(datagrams: "DatagramPolicy", now_ms: int) -> list[str]:
    """Return how many datagrams were dropped, and about the last failure, for STATUS=."""
    totals = datagrams.totals()
    count = sum(totals.dropped.values()) + totals.kernel_dropped
    if not count:
        return []
    last = max(datagrams.upstreams, key=lambda one: one.failed_ms or 0)
    ago = _ago(last.failed_ms, now_ms)
    why = f" ({short_reason(last.failed_why, last.text)})" if ago else ""
    limit = _ago(datagrams.refused_ms, now_ms)
    at_limit = f", refused at the limit{limit}" if limit else ""
    return [f"{count} datagrams dropped{ago}{why}{at_limit}"]


def _outage_of(outage: Outage, target: str, now_ms: int) -> str:
    """Return since when a target is down, and why, if it is."""
    if outage.up or outage.since_ms is None:
        return ""
    since = clock_text(outage.since_ms, now_ms)
    return f", down since {since} ({short_reason(outage.why, target)})"


def _ago(when_ms: int | None, now_ms: int) -> str:
    """Return how long ago something was, unless that is long: nothing would keep it true."""
    if when_ms is None or now_ms - when_ms >= _RECENT_MS:
        return ""
    return f", last {(now_ms - when_ms) // 1000} s ago"


def draining(
    acceptor: Acceptor,
    relay: Relay,
    upstreams: list[Upstream],
    stop_ms: int | None,
    datagrams: "DatagramPolicy | None" = None,
) -> str:
    """Return the line for STATUS= while connections drain; `stop_ms`: None for no limit."""
    flows = datagrams.flows if datagrams is not None else 0
    held = sum(len(one.held) for one in upstreams) + acceptor.awaiting_header
    count = relay.connections - flows + held
    left = [_counted(count, "connection")] + ([_counted(flows, "flow")] if flows else [])
    until = "" if stop_ms is None else f", until {clock_text(stop_ms, relay.now_ms)}"
    return f"Draining: {', '.join(left)} left{until}"


def clock_text(when_ms: int, now_ms: int) -> str:
    """Return the time of day of a moment of the relay's clock."""
    return time.strftime("%H:%M:%S", time.localtime(time.time() + (when_ms - now_ms) / 1000))


def _bounded(text: str) -> str:
    data = log.printable(text).encode("utf-8", "backslashreplace")
    if len(data) > _STATUS_MAX:
        data = data[: _STATUS_MAX - 3] + "…".encode()
    return data.decode("utf-8", "ignore")


def totals(
    acceptor: Acceptor,
    relay: Relay,
    upstreams: list[Upstream],
    datagrams: "DatagramPolicy | None",
) -> list[str]:
    """Return what all connections and flows were, for the end; nothing if there were none."""
    lines = []
    # With Accept=yes it would be a line for each connection.
    if relay.totals().accepted or acceptor.taken_over:
        lines.append(f"Totals: {summary(acceptor, relay, upstreams)[0]}.")
    if datagrams is not None and datagrams.totals().flows:
        lines.append(f"Totals: {_datagram_summary(datagrams)[0]}.")
    return lines


def summary(
    acceptor: Acceptor,
    relay: Relay,
    upstreams: list[Upstream],
    datagrams: "DatagramPolicy | None" = None,
) -> list[str]:
    """Return everything since the start: a line in all, one per target, and one for threads.

    Accepted is the sum of open, waiting, kept, refused, failed and all that have ended.
    """
    sums = relay.totals()
    held = sum(len(one.held) for one in upstreams) + acceptor.awaiting_header
    failed = sum(one.held.failed for one in upstreams)
    flows = datagrams.flows if datagrams is not None else 0
    endings = [f"{n} {name}" for name, n in all_endings(acceptor, sums, upstreams).items() if n]
    kept = f"{acceptor.kept} kept, " if acceptor.kept else ""
    accepted = sums.accepted + acceptor.passed_in + acceptor.taken_over
    line = (
        f"{accepted} accepted, {relay.connections - flows} open, "
        f"{held} waiting, {kept}{sums.refused + acceptor.refusals.count} refused, {failed} failed; "
        f"{sums.bytes_to_targets} bytes to targets, {sums.bytes_to_clients} bytes to clients, "
        f"{sums.spliced} spliced, {sums.copied} copied; {', '.join(endings) or 'none ended'}"
    )
    rows = _sums((one.group, [one.connected, len(one.held), one.held.failed]) for one in upstreams)
    lines = [line] + [
        f"{group}: {served} served, {waiting} waiting, {failed} failed"
        for group, (served, waiting, failed) in rows.items()
    ]
    if relay.thread_count > 1:
        lines.append(f"{relay.thread_count} threads, {relay.handed_over} connections handed over")
    if datagrams is not None:
        lines += _datagram_summary(datagrams)
    return lines


def _datagram_summary(datagrams: "DatagramPolicy") -> list[str]:
    """Return everything since the start: a line in all, and one per target."""
    totals = datagrams.totals()
    endings = [f"{count} {name}" for name, count in totals.endings.items() if count]
    ended = ", ".join(endings) or "none ended"
    flows = f"{totals.flows} flows begun, {datagrams.flows} open, {ended}"
    lines = [f"{flows}; {_moved_text(totals)}; {_dropped_text(totals)}"]
    for upstream in datagrams.upstreams:
        own = upstream.relay_target.totals()
        lines.append(
            f"{upstream.label}: {own.flows} flows begun; {_moved_text(own)}; {_dropped_text(own)}"
        )
    return lines


def _moved_text(totals: "DatagramTotals") -> str:
    return (
        f"{totals.datagrams_to_targets} datagrams ({totals.bytes_to_targets} bytes) to targets, "
        f"{totals.datagrams_to_clients} ({totals.bytes_to_clients} bytes) to clients"
    )


def _dropped_text(totals: "DatagramTotals") -> str:
    causes = [f"{count} {cause}" for cause, count in totals.dropped.items() if count]
    causes += [f"{totals.kernel_dropped} by the kernel"] if totals.kernel_dropped else []
    return f"dropped: {', '.join(causes) or 'none'}"


def all_endings(acceptor: Acceptor, totals: "Totals", upstreams: list[Upstream]) -> dict[str, int]:
    """Return how many connections and held clients have ended, by how."""
    ends = dict(totals.endings)
    ends[ENDING_CUT] += sum(one.held.cut for one in upstreams) + acceptor.cut
    ends[ENDING_CLIENT_GONE] += sum(one.held.gone for one in upstreams)
    return ends


def _sums(rows: "Iterable[tuple[str, list[int]]]") -> dict[str, list[int]]:
    """Add up the rows of each group."""
    sums: dict[str, list[int]] = {}
    for group, numbers in rows:
        before = sums.get(group, [0] * len(numbers))
        sums[group] = [one + other for one, other in zip(before, numbers, strict=True)]
    return sums


def ending(label: str, event: "Ended") -> str:
    """Return the line of one connection in the log at debug level."""
    errors = (("client", event.client_error), ("target", event.target_error))
    sides = [f"{side}: {posix.strerror(error)}" for side, error in errors if error]
    why = f" ({', '.join(sides)})" if sides else ""
    return (
        f"{label}: {event.bytes_up} bytes up, {event.bytes_down} bytes down "
        f"in {event.duration_ms} ms, {event.ending}{why}."
    )
