"""io.systemd.Metrics: counters and gauges, as integers, with the unit in the name."""

from _collections_abc import Callable, Iterable, Iterator

from proxyd._relay import Relay
from proxyd.acceptor import Acceptor
from proxyd.held import WAIT_BUCKETS_MS
from proxyd.inspection.interfaces import METRICS
from proxyd.inspection.varlink import CallError, Fields, plain, reply
from proxyd.stats import all_endings
from proxyd.upstream import Upstream

DOMAIN = "net.socketproxyd."

_FAMILIES = (
    ("Accepted", "counter", "Clients accepted"),
    ("BytesToClients", "counter", "Bytes delivered to clients"),
    ("BytesToTargets", "counter", "Bytes delivered to targets"),
    ("ConnectionsMax", "gauge", "The limit of connections"),
    ("Ended", "counter", "Connections and held clients that have ended, by how"),
    ("Failed", "counter", "Clients given up because their target could not be reached, by target"),
    ("Held", "gauge", "Clients that wait for their target, by target"),
    ("HeldUSecBucket", "counter", "Clients served after they were held for at most le, by target"),
    ("HeldUSecCount", "counter", "Clients served after they were held, by target"),
    ("HeldUSecSum", "counter", "How long clients served were held in all, by target"),
    ("Open", "gauge", "Connections open or connecting"),
    ("Refused", "counter", "Clients refused, at the limit or without an address to announce"),
    ("Served", "counter", "Connections brought to a target, including those connecting, by target"),
    ("Threads", "gauge", "Threads that forward"),
    ("Up", "gauge", "Whether the target is believed to be up: 1 or 0, by target"),
)
"""Name, type and description of each family, in the order of their names."""

_TYPES = {name: kind for name, kind, _ in _FAMILIES}

Metric = tuple[str, Fields | None, int]
"""Name, fields and value."""


class Messages:
    """A stream of messages that all exist already, except the last one's end."""

    __slots__ = ("_replies", "finished")

    def __init__(self, replies: Iterable[Fields]) -> None:
        self._replies = list(replies)
        self.finished = False

    @property
    def overflows(self) -> bool:
        """Tell that the rest is made only when the caller has read."""
        return False

    def on_more(self, wake: Callable[[], None]) -> None:
        """Do nothing: next() returns everything."""

    def next(self) -> bytes:
        """Return everything. Raises CallError if that is nothing."""
        self.finished = True
        if not self._replies:
            raise CallError(f"{METRICS}.NoSuchMetric")
        *others, last = self._replies
        return b"".join([reply(one, continues=True) for one in others]) + reply(last)

    def close(self) -> None:
        """Do nothing."""


def describe() -> Messages:
    """Answer Describe."""
    return Messages(
        {"name": DOMAIN + name, "description": text, "type": kind} for name, kind, text in _FAMILIES
    )


def metrics(acceptor: Acceptor, relay: Relay, upstreams: list[Upstream]) -> Messages:
    """Answer List."""
    found = [*_overall(acceptor, relay, upstreams), *_by_target(upstreams)]
    found.sort(key=lambda metric: metric[0])  # a family stays together
    return Messages(
        {"name": DOMAIN + name, "object": None, "fields": fields, "value": value}
        for name, fields, value in found
    )


def _overall(acceptor: Acceptor, relay: Relay, upstreams: list[Upstream]) -> Iterator[Metric]:
    totals = relay.totals()
    yield "Accepted", None, totals.accepted + acceptor.passed_in
    yield "BytesToClients", None, totals.bytes_to_clients
    yield "BytesToTargets", None, totals.bytes_to_targets
    yield "ConnectionsMax", None, relay.connections_max
    for ending, count in all_endings(totals, upstreams).items():
        yield "Ended", {"how": ending}, count
    yield "Open", None, relay.connections
    yield "Refused", None, totals.refused + acceptor.refused
    yield "Threads", None, relay.thread_count


def _by_target(upstreams: list[Upstream]) -> Iterator[Metric]:
    """Yield the metrics of each target; upstreams of one group are one target."""
    groups: dict[str, list[Upstream]] = {}
    for upstream in upstreams:
        groups.setdefault(upstream.group, []).append(upstream)
    for group, members in groups.items():
        fields: Fields = {"target": plain(group)}
        yield "Failed", fields, sum(one.held.failed for one in members)
        yield "Held", fields, sum(len(one.held) for one in members)
        yield "Served", fields, sum(one.connected for one in members)
        yield "Up", fields, int(all(one.outage.up for one in members))
        yield from _histogram(fields, members)


def _histogram(fields: Fields, members: list[Upstream]) -> Iterator[Metric]:
    """Yield the times that clients were held, cumulated as Prometheus has them."""
    counts = [sum(numbers) for numbers in zip(*(one.held.waits for one in members), strict=True)]
    total = 0
    bounds = [str(bound_ms * 1000) for bound_ms in WAIT_BUCKETS_MS]
    for bound, count in zip([*bounds, "+Inf"], counts, strict=True):
        total += count
        yield "HeldUSecBucket", fields | {"le": bound}, total
    yield "HeldUSecCount", fields, total
    yield "HeldUSecSum", fields, sum(one.held.waited_ms for one in members) * 1000
