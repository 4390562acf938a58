"""What the methods do. Imported with the first caller."""

import posix

from proxyd import __version__
from proxyd._relay import Ended, SnapshotRows, Terminated
from proxyd.acceptor import Acceptor
from proxyd.connect_errors import short_reason
from proxyd.event_loop import EventLoop
from proxyd.inspection.access import Peer
from proxyd.inspection.caller import Stream
from proxyd.inspection.callers import Callers
from proxyd.inspection.interfaces import METRICS, PROXY, TEXTS
from proxyd.inspection.listing import ListStream
from proxyd.inspection.metrics import MetricsStream, Passes, collect, describe
from proxyd.inspection.rows import Names, RowMaker
from proxyd.inspection.snapshot import Snapshots
from proxyd.inspection.terminate import Terminations
from proxyd.inspection.varlink import SERVICE, Call, CallError, Fields, plain, reply
from proxyd.inspection.watch import Watchers
from proxyd.outage import Outage
from proxyd.upstream import Upstream

TYPE_CHECKING = False  # as in typing
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from proxyd.datagram_upstream import DatagramUpstream
    from proxyd.datagrams import DatagramPolicy
    from proxyd.event_loop import InspectionEvent
    from proxyd.header_reader import Sender
    from proxyd.held import HeldClient

_FOR_EVERYBODY = (f"{PROXY}.Status", f"{METRICS}.List", f"{METRICS}.Describe")

_STATES = ("header", "held", "connecting", "open", "lingering", "flow")


class Service:
    """Answers the callers of one proxy."""

    def __init__(  # noqa: PLR0913, PLR0917 - the parts of the program that it shows
        self,
        loop: EventLoop,
        acceptor: Acceptor,
        upstreams: list[Upstream],
        status: "Callable[[], str]",
        started_ms: int,
        threads_max: int,
        callers_max: int,
        datagrams: "DatagramPolicy | None" = None,
    ) -> None:
        self._loop = loop
        self._datagrams = datagrams
        self._relay = loop.relay
        self._acceptor = acceptor
        self._upstreams = upstreams
        self._status_text = status
        self._started_ms = started_ms
        self._limits: Fields = {
            "connectionsMax": loop.relay.connections_max,
            "connectionsMaxPerSource": acceptor.per_source or None,
            "threadsMax": threads_max,
            "callersMax": callers_max,
        }
        self._names = Names(acceptor)
        clock = lambda: loop.relay.now_ms  # noqa: E731
        self._snapshots = Snapshots(self._relay, clock, self._names, self._waiting)
        self._passes = Passes(
            self._relay, lambda: collect(acceptor, loop.relay, upstreams, datagrams)
        )
        self._terminations = Terminations(self._relay)
        self._watchers = Watchers(loop, self._relay, self._make_rows, datagrams)
        self.callers = Callers(loop, self._answer, callers_max)
        self._methods: dict[str, Callable[[Call], bytes | Stream]] = {
            f"{SERVICE}.GetInfo": _get_info,
            f"{SERVICE}.GetInterfaceDescription": _get_interface_description,
            f"{PROXY}.List": self._list,
            f"{PROXY}.Watch": self._watch,
            f"{PROXY}.Terminate": self._terminate,
            f"{PROXY}.Status": self._status,
            f"{METRICS}.List": self._list_metrics,
            f"{METRICS}.Describe": self._describe_metrics,
        }

    def _waiting(self) -> "Iterator[tuple[str, HeldClient | Sender]]":
        """Return the target of each client that Python has, and the client."""
        for sender in self._acceptor.header_reader or ():
            yield sender.target, sender
        for upstream in self._upstreams:
            for client in upstream.held:
                yield upstream.text, client

    def _make_rows(self) -> RowMaker:
        return RowMaker(self._names, self._loop.relay.now_ms)

    # ── events ────────────────────────────────────────────────────────────────────────────────────

    def handle(self, event: "InspectionEvent") -> None:
        """Take an event that the relay has sent because it was asked to."""
        if isinstance(event, Ended):
            self._watchers.ended(event)
        elif isinstance(event, SnapshotRows):
            self._snapshots.handle(event)
            self._passes.handle(event)
        elif isinstance(event, Terminated):
            self._terminations.answer(event)
        else:
            self._watchers.begun(event.info)

    # ── methods ───────────────────────────────────────────────────────────────────────────────────

    def _answer(self, call: Call, peer: Peer) -> bytes | Stream:
        """Answer a call. Raises CallError."""
        method = self._methods.get(call.method)
        if method is None:
            raise _unknown(call.method)
        public = call.method in _FOR_EVERYBODY or call.method.startswith(f"{SERVICE}.")
        if not public and not peer.privileged:
            raise CallError(f"{SERVICE}.PermissionDenied")
        return method(call)

    def _list(self, call: Call) -> Stream:
        call.require_more()
        call.allow("target", "state")
        state = call.text("state")
        if state not in (None, *_STATES):
            raise CallError(f"{SERVICE}.InvalidParameter", parameter="state")
        return ListStream(self._snapshots, call.text("target"), state, self._datagrams)

    def _watch(self, call: Call) -> Stream:
        call.require_more()
        call.allow()
        return self._watchers.add()

    def _terminate(self, call: Call) -> bytes | Stream:
        call.allow("id")
        connection = call.integer("id")
        for upstream in self._upstreams:
            for client in upstream.held:
                if client.id == connection:
                    upstream.held.terminate(client)
                    return reply({})
        if connection <= 0:
            raise CallError(f"{PROXY}.NoSuchConnection")
        reader = self._acceptor.header_reader
        if reader is not None and reader.terminate(connection):
            return reply({})
        if self._datagrams is not None and self._datagrams.relay_part.terminate(connection):
            return reply({})
        return self._terminations.begin(connection)

    def _status(self, call: Call) -> bytes:
        call.allow()
        relay = self._loop.relay
        makes = self._make_rows()
        datagrams = self._datagrams
        flows = datagrams.flows if datagrams is not None else 0
        others = datagrams.upstreams if datagrams is not None else []
        return reply(
            {
                "version": __version__,
                "pid": posix.getpid(),
                "startedUSec": makes.since_us(self._started_ms),
                "status": plain(self._status_text()),
                "open": relay.connections - flows,
                "held": sum(len(one.held) for one in self._upstreams),
                "flows": flows,
                "datagrams": _datagrams(datagrams) if datagrams is not None else None,
                "threads": relay.thread_count,
                "limits": self._limits,
                "listeners": [
                    {
                        "name": plain(one.name),
                        "address": plain(one.text),
                        "kind": "datagram" if one.datagram else "stream",
                        "target": plain(one.target.text),
                        "accepting": one.accepting,
                    }
                    for one in self._acceptor.listeners
                ],
                "targets": [_target(one, makes) for one in self._upstreams]
                + [_datagram_target(one, makes) for one in others],
            }
        )

    def _list_metrics(self, call: Call) -> Stream:
        call.require_more()
        call.allow()
        return MetricsStream(self._passes)

    def _describe_metrics(self, call: Call) -> bytes:
        call.require_more()
        call.allow()
        return describe(datagrams=self._datagrams is not None)


def _unknown(method: str) -> CallError:
    interface, _, _ = method.rpartition(".")
    if interface in TEXTS:
        return CallError(f"{SERVICE}.MethodNotFound", method=plain(method))
    return CallError(f"{SERVICE}.InterfaceNotFound", interface=plain(interface))


def _get_info(call: Call) -> bytes:
    call.allow()
    return reply(
        {
            "vendor": "systemd-socket-proxyd for Python",
            "product": "systemd-socket-proxyd",
            "version": __version__,
            "url": "",
            "interfaces": sorted(TEXTS),
        }
    )


def _get_interface_description(call: Call) -> bytes:
    call.allow("interface")
    interface = call.text("interface")
    if interface is None:
        raise CallError(f"{SERVICE}.InvalidParameter", parameter="interface")
    if interface not in TEXTS:
        raise CallError(f"{SERVICE}.InterfaceNotFound", interface=plain(interface))
    return reply({"description": TEXTS[interface]})


def _target(upstream: Upstream, makes: RowMaker) -> Fields:
    return {
        "target": plain(upstream.text),
        "kind": "stream",
        **_outage(upstream.outage, upstream.text, makes),
        "held": len(upstream.held),
        "served": upstream.connected,
        "failed": upstream.held.failed,
    }


def _datagram_target(upstream: "DatagramUpstream", makes: RowMaker) -> Fields:
    totals = upstream.relay_target.totals()
    return {
        "target": plain(upstream.label),
        "kind": "datagram",
        **_outage(upstream.outage, upstream.text, makes),
        "held": upstream.relay_target.held,
        "served": totals.flows,
        "failed": upstream.dropped,
    }


def _outage(outage: Outage, target: str, makes: RowMaker) -> Fields:
    since_ms = None if outage.up else outage.since_ms
    return {
        "up": outage.up,
        "downSinceUSec": None if since_ms is None else makes.since_us(since_ms),
        "reason": plain(short_reason(outage.why, target)) if outage.why else None,
    }


def _datagrams(datagrams: "DatagramPolicy") -> Fields:
    totals = datagrams.totals()
    return {
        "flowsBegun": totals.flows,
        "toTargets": totals.datagrams_to_targets,
        "toClients": totals.datagrams_to_clients,
        "dropped": totals.dropped,
        "droppedByKernel": totals.kernel_dropped,
    }
