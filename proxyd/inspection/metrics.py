"""io.systemd.Metrics: counters and gauges, as integers, with the unit in the name.

What a target's open connections have moved is not in its counters before the relay has passed them
all. So a list waits for that, and everybody who asks meanwhile shares the next pass.
"""

from itertools import accumulate

from proxyd._relay import CONNECT_BUCKETS_US, Relay, SnapshotRows
from proxyd.acceptor import Acceptor
from proxyd.held import WAIT_BUCKETS_MS
from proxyd.inspection.caller import SharedStream
from proxyd.inspection.varlink import Fields, plain, reply
from proxyd.stats import all_endings
from proxyd.target import Target
from proxyd.upstream import Upstream

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from proxyd.datagrams import DatagramPolicy

DOMAIN = "net.socketproxyd."

_FAMILIES = (
    ("Accepted", "counter", "Clients accepted"),
    ("AwaitingHeader", "gauge", "Clients that have not sent their PROXY header yet"),
    ("BytesToClients", "counter", "Bytes delivered to clients"),
    ("BytesToTargets", "counter", "Bytes delivered to targets"),
    ("ConnectUSecBucket", "counter", "Connects that took at most le, by target"),
    ("ConnectUSecCount", "counter", "Connects that succeeded, by target"),
    ("ConnectUSecSum", "counter", "How long connects took that succeeded, by target"),
    ("ConnectionsMax", "gauge", "The limit of connections"),
    ("ConnectionsMaxPerSource", "gauge", "The limit of connections of one source; 0: none"),
    ("Ended", "counter", "Connections and held clients that have ended, by how"),
    ("Failed", "counter", "Clients given up because their target could not be reached, by target"),
    ("Held", "gauge", "Clients that wait for their target, by target"),
    ("HeldUSecBucket", "counter", "Clients served after they were held for at most le, by target"),
    ("HeldUSecCount", "counter", "Clients served after they were held, by target"),
    ("HeldUSecSum", "counter", "How long clients served were held in all, by target"),
    ("Open", "gauge", "Connections open or connecting"),
    (
        "Refused",
        "counter",
        "Clients refused: at a limit, or for lack of an address or a PROXY header",
    ),
    ("RefusedBySource", "counter", "Of these, clients refused at the limit of their source"),
    ("RefusedWithoutHeader", "counter", "Of these, clients that sent no good PROXY header"),
    ("Served", "counter", "Connections brought to a target, including those connecting, by target"),
    ("TargetBytesDown", "counter", "Bytes delivered to clients, by target"),
    ("TargetBytesUp", "counter", "Bytes delivered to targets, by target"),
    ("TargetEnded", "counter", "Connections that have ended, by target and how"),
    ("Threads", "gauge", "Threads that forward"),
    ("Up", "gauge", "Whether the target is believed to be up: 1 or 0, by target"),
)
"""Name, type and description of each family, in the order of their names."""

_DATAGRAM_FAMILIES = (
    ("DatagramBytesToClients", "counter", "Bytes delivered to clients in datagrams, by target"),
    ("DatagramBytesToTargets", "counter", "Bytes delivered to targets in datagrams, by target"),
    ("DatagramsDropped", "counter", "Datagrams dropped, by target and cause"),
    ("DatagramsDroppedByKernel", "counter", "Datagrams dropped in full receive queues"),
    ("DatagramsToClients", "counter", "Datagrams delivered to clients, by target"),
    ("DatagramsToTargets", "counter", "Datagrams delivered to targets, by target"),
    ("Flows", "gauge", "Flows of datagrams that are open"),
    ("FlowsBegun", "counter", "Flows of datagrams begun, by target"),
    ("FlowsEnded", "counter", "Flows of datagrams that have ended, by how"),
)
"""The same where there are listeners of datagrams."""
_PIECE = 64
"""How many metrics are made at once: the relay waits while they are made into text."""

Metric = tuple[str, Fields, str, "Sequence[str]", "Sequence[int]"]
"""Name, fields, and the values: one for each label, which is the value of one more field, if that
has a name."""


class Passes:
    """Has the relay count what open connections have moved, for all who wait."""

    __slots__ = ("_collect", "_next", "_relay", "_running")

    def __init__(self, relay: Relay, collect: "Callable[[], list[Metric]]") -> None:
        """`collect` returns the metrics after a pass."""
        self._relay = relay
        self._collect = collect
        self._running: Pass | None = None
        self._next: Pass | None = None
        """Asked for, but not begun: it must begin after the question."""

    def request(self) -> "Pass":
        """Return a pass that begins now or later."""
        wanted = self._next = self._next or Pass()
        self._begin()
        return wanted

    def _begin(self) -> None:
        if self._running is None and self._next is not None:
            self._running, self._next = self._next, None
            self._running.number = self._relay.start_snapshot(False)

    def handle(self, event: SnapshotRows) -> None:
        """Take an event, which may be that of another snapshot."""
        done = self._running
        if done is None or event.number != done.number:
            return
        self._running = None
        if done.wakes:
            done.metrics = self._collect()
        for wake in done.wakes:
            wake()
        self._begin()


class Pass:
    """The metrics of one moment, for all who have asked for them before it."""

    __slots__ = ("metrics", "number", "wakes")

    def __init__(self) -> None:
        self.number = 0
        """The relay's; 0: it has not begun."""
        self.metrics: list[Metric] | None = None
        """None: it has not ended."""
        self.wakes: list[Callable[[], None]] = []
        """What to call at its end."""


class MetricsStream(SharedStream):
    """The replies to List."""

    __slots__ = ("_kept", "_pass", "_rest")

    def __init__(self, passes: Passes) -> None:
        self._pass = passes.request()
        super().__init__(self._pass.wakes)
        self._rest: Iterator[Fields] | None = None
        self._kept: Fields | None = None
        """The last one made, which is sent after the next one or as the end of all."""

    def next(self) -> bytes | None:
        """Return the next piece; None before it is there."""
        if self._pass.metrics is None:
            return None
        if self._rest is None:
            self._rest = _messages(self._pass.metrics)
            self._kept = next(self._rest)
        messages = []
        for _ in range(_PIECE):
            message = next(self._rest, None)
            self.finished = message is None
            messages.append(reply(self._kept or {}, continues=not self.finished))
            if self.finished:
                break
            self._kept = message
        return b"".join(messages)


def describe(*, datagrams: bool) -> bytes:
    """Answer Describe. `datagrams`: there are listeners of them."""
    known = sorted(_FAMILIES + _DATAGRAM_FAMILIES) if datagrams else _FAMILIES
    families: list[Fields] = [
        {"name": DOMAIN + name, "description": text, "type": kind} for name, kind, text in known
    ]
    *others, last = families
    return b"".join([reply(one, continues=True) for one in others]) + reply(last)


def _messages(metrics: list[Metric]) -> "Iterator[Fields]":
    for name, fields, label, texts, values in metrics:
        for text, value in zip(texts, values, strict=True):
            all_fields = fields | {label: text} if label else fields
            yield {
                "name": DOMAIN + name,
                "object": None,
                "fields": all_fields or None,
                "value": value,
            }


def collect(
    acceptor: Acceptor,
    relay: Relay,
    upstreams: list[Upstream],
    datagrams: "DatagramPolicy | None" = None,
) -> list[Metric]:
    """Return all metrics; those of one family follow each other."""
    flows = datagrams.flows if datagrams is not None else 0
    found = [*_overall(acceptor, relay, upstreams, flows), *_by_target(relay, upstreams)]
    found += _of_datagrams(datagrams) if datagrams is not None else []
    return sorted(found, key=lambda metric: metric[0])


def _overall(
    acceptor: Acceptor, relay: Relay, upstreams: list[Upstream], flows: int
) -> "Iterator[Metric]":
    totals = relay.totals()
    yield _single("Accepted", totals.accepted + acceptor.passed_in)
    yield _single("AwaitingHeader", acceptor.awaiting_header)
    yield _single("BytesToClients", totals.bytes_to_clients)
    yield _single("BytesToTargets", totals.bytes_to_targets)
    yield _single("ConnectionsMax", relay.connections_max)
    yield _single("ConnectionsMaxPerSource", acceptor.per_source)
    endings = all_endings(acceptor, totals, upstreams)
    yield "Ended", {}, "how", [*endings], [*endings.values()]
    yield _single("Open", relay.connections - flows)
    yield _single("Refused", totals.refused + acceptor.refusals.count)
    yield _single("RefusedBySource", relay.refused_by_source)
    yield _single("RefusedWithoutHeader", acceptor.refusals.headerless)
    yield _single("Threads", relay.thread_count)


def _by_target(relay: Relay, upstreams: list[Upstream]) -> "Iterator[Metric]":
    """Yield the metrics of each target; all ports of HOST:* are one."""
    groups: dict[Target, list[Upstream]] = {}
    for upstream in upstreams:
        groups.setdefault(upstream.target, []).append(upstream)
    for target, members in groups.items():
        fields: Fields = {"target": plain(target.text)}
        yield _single("Failed", sum(one.held.failed for one in members), fields)
        yield _single("Held", sum(len(one.held) for one in members), fields)
        yield _single("Served", sum(one.connected for one in members), fields)
        yield _single("Up", int(all(one.outage.up for one in members)), fields)
        counts = [sum(n) for n in zip(*(one.held.waits for one in members), strict=True)]
        waited_us = sum(one.held.waited_ms for one in members) * 1000
        yield from _histogram("HeldUSec", fields, _WAIT_BOUNDS, counts, waited_us)
        totals = relay.target_totals(target.index)
        yield _single("TargetBytesDown", totals.bytes_to_clients, fields)
        yield _single("TargetBytesUp", totals.bytes_to_target, fields)
        yield "TargetEnded", fields, "how", [*totals.endings], [*totals.endings.values()]
        took = totals.connects
        yield from _histogram("ConnectUSec", fields, _CONNECT_BOUNDS, took, totals.connect_us)


def _of_datagrams(datagrams: "DatagramPolicy") -> "Iterator[Metric]":
    totals = datagrams.totals()
    yield _single("DatagramsDroppedByKernel", totals.kernel_dropped)
    yield _single("Flows", datagrams.flows)
    yield "FlowsEnded", {}, "how", [*totals.endings], [*totals.endings.values()]
    for upstream in datagrams.upstreams:
        fields: Fields = {"target": plain(upstream.label)}
        own = upstream.relay_target.totals()
        yield _single("DatagramBytesToClients", own.bytes_to_clients, fields)
        yield _single("DatagramBytesToTargets", own.bytes_to_targets, fields)
        yield "DatagramsDropped", fields, "cause", [*own.dropped], [*own.dropped.values()]
        yield _single("DatagramsToClients", own.datagrams_to_clients, fields)
        yield _single("DatagramsToTargets", own.datagrams_to_targets, fields)
        yield _single("FlowsBegun", own.flows, fields)
        yield _single("Up", int(upstream.outage.up), fields)


def _histogram(
    name: str, fields: Fields, bounds: "Sequence[str]", counts: "Sequence[int]", sum_us: int
) -> "Iterator[Metric]":
    """Yield a histogram, cumulated as Prometheus has them; the last count has no bound."""
    cumulated = list(accumulate(counts))
    yield f"{name}Bucket", fields, "le", bounds, cumulated
    yield _single(f"{name}Count", cumulated[-1], fields)
    yield _single(f"{name}Sum", sum_us, fields)


def _single(name: str, value: int, fields: Fields | None = None) -> Metric:
    return name, fields or {}, "", ("",), (value,)


_WAIT_BOUNDS = [*(str(bound_ms * 1000) for bound_ms in WAIT_BUCKETS_MS), "+Inf"]
_CONNECT_BOUNDS = [*map(str, CONNECT_BUCKETS_US), "+Inf"]
