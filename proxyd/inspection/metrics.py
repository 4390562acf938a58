"""io.systemd.Metrics: counters and gauges, as integers, with the unit in the name.

What a target's open connections have moved is not in its counters before the relay has passed them
all. So a list waits for that, and everybody who asks meanwhile shares the next pass.
"""

from _collections_abc import Callable, Iterable, Iterator

from proxyd._relay import CONNECT_BUCKETS_US, Relay, SnapshotRows
from proxyd.acceptor import Acceptor
from proxyd.held import WAIT_BUCKETS_MS
from proxyd.inspection.varlink import Fields, plain, reply
from proxyd.stats import all_endings
from proxyd.target import Target
from proxyd.upstream import Upstream

DOMAIN = "net.socketproxyd."

_FAMILIES = (
    ("Accepted", "counter", "Clients accepted"),
    ("BytesToClients", "counter", "Bytes delivered to clients"),
    ("BytesToTargets", "counter", "Bytes delivered to targets"),
    ("ConnectUSecBucket", "counter", "Connects that took at most le, by target"),
    ("ConnectUSecCount", "counter", "Connects that succeeded, by target"),
    ("ConnectUSecSum", "counter", "How long connects took that succeeded, by target"),
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
    ("TargetBytesDown", "counter", "Bytes delivered to clients, by target"),
    ("TargetBytesUp", "counter", "Bytes delivered to targets, by target"),
    ("TargetEnded", "counter", "Connections that have ended, by target and how"),
    ("Threads", "gauge", "Threads that forward"),
    ("Up", "gauge", "Whether the target is believed to be up: 1 or 0, by target"),
)
"""Name, type and description of each family, in the order of their names."""

_TYPES = {name: kind for name, kind, _ in _FAMILIES}

Metric = tuple[str, Fields | None, int]
"""Name, fields and value."""


class Passes:
    """Has the relay count what open connections have moved, for all who wait."""

    __slots__ = ("_next", "_number", "_relay", "_running")

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._number = 0
        """Of the pass that is under way; 0: there is none."""
        self._running: list[Callable[[], None]] = []
        """What to call at its end."""
        self._next: list[Callable[[], None]] = []
        """What to call at the end of the next one: it must begin after the question."""

    def request(self, call: Callable[[], None]) -> None:
        """Have `call` called at the end of a pass that begins now or later."""
        self._next.append(call)
        self._begin()

    def _begin(self) -> None:
        if self._number == 0 and self._next:
            self._running, self._next = self._next, []
            self._number = self._relay.start_snapshot(False)

    def handle(self, event: SnapshotRows) -> None:
        """Take an event, which may be that of another snapshot."""
        if event.number != self._number:
            return
        done, self._running, self._number = self._running, [], 0
        for call in done:
            call()
        self._begin()


class Messages:
    """Messages that can all be made at once, though perhaps not yet."""

    __slots__ = ("_make", "_ready", "_wake", "finished")

    def __init__(self, make: Callable[[], list[Fields]], *, ready: bool) -> None:
        """`make` returns the replies; without `ready`, it may be called after set_ready()."""
        self._make = make
        self._ready = ready
        self._wake: Callable[[], None] | None = None
        self.finished = False

    def set_ready(self) -> None:
        """Answer now."""
        self._ready = True
        if self._wake is not None:
            self._wake()

    @property
    def overflows(self) -> bool:
        """Tell that the rest is made only when the caller has read."""
        return False

    def on_more(self, wake: Callable[[], None]) -> None:
        """Call `wake` when it is ready."""
        self._wake = wake

    def next(self) -> bytes | None:
        """Return everything; None before it is ready."""
        if not self._ready:
            return None
        self.finished = True
        *others, last = self._make()
        return b"".join([reply(one, continues=True) for one in others]) + reply(last)

    def close(self) -> None:
        """Do nothing more for the caller."""
        self._wake = None


def describe() -> Messages:
    """Answer Describe."""
    return Messages(_descriptions, ready=True)


def _descriptions() -> list[Fields]:
    return [
        {"name": DOMAIN + name, "description": text, "type": kind} for name, kind, text in _FAMILIES
    ]


def metrics(
    passes: Passes, acceptor: Acceptor, relay: Relay, upstreams: list[Upstream]
) -> Messages:
    """Answer List."""
    messages = Messages(lambda: _list(acceptor, relay, upstreams), ready=False)
    passes.request(messages.set_ready)
    return messages


def _list(acceptor: Acceptor, relay: Relay, upstreams: list[Upstream]) -> list[Fields]:
    found = [*_overall(acceptor, relay, upstreams), *_by_target(relay, upstreams)]
    found.sort(key=lambda metric: metric[0])  # a family stays together
    return [
        {"name": DOMAIN + name, "object": None, "fields": fields, "value": value}
        for name, fields, value in found
    ]


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


def _by_target(relay: Relay, upstreams: list[Upstream]) -> Iterator[Metric]:
    """Yield the metrics of each target; all ports of HOST:* are one."""
    groups: dict[Target, list[Upstream]] = {}
    for upstream in upstreams:
        groups.setdefault(upstream.target, []).append(upstream)
    for target, members in groups.items():
        fields: Fields = {"target": plain(target.text)}
        yield "Failed", fields, sum(one.held.failed for one in members)
        yield "Held", fields, sum(len(one.held) for one in members)
        yield "Served", fields, sum(one.connected for one in members)
        yield "Up", fields, int(all(one.outage.up for one in members))
        counts = [sum(n) for n in zip(*(one.held.waits for one in members), strict=True)]
        waited_us = sum(one.held.waited_ms for one in members) * 1000
        bounds = [bound_ms * 1000 for bound_ms in WAIT_BUCKETS_MS]
        yield from _histogram("HeldUSec", fields, bounds, counts, waited_us)
        totals = relay.target_totals(target.index)
        yield "TargetBytesDown", fields, totals.bytes_to_clients
        yield "TargetBytesUp", fields, totals.bytes_to_target
        for ending, count in totals.endings.items():
            yield "TargetEnded", fields | {"how": ending}, count
        took = list(totals.connects)
        yield from _histogram("ConnectUSec", fields, CONNECT_BUCKETS_US, took, totals.connect_us)


def _histogram(
    name: str, fields: Fields, bounds: Iterable[int], counts: list[int], sum_us: int
) -> Iterator[Metric]:
    """Yield a histogram, cumulated as Prometheus has them; the last count has no bound."""
    total = 0
    for bound, count in zip([*map(str, bounds), "+Inf"], counts, strict=True):
        total += count
        yield f"{name}Bucket", fields | {"le": bound}, total
    yield f"{name}Count", fields, total
    yield f"{name}Sum", fields, sum_us
