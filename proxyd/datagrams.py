"""Datagrams: the listeners and targets that have them, and what the log says of their flows.

A flow is what one client sends to one listener, and what comes back. The relay (_datagram.pyx)
makes, forwards and ends flows by itself: no datagram passes through Python. This module says where
to, takes the events, and is imported only if there is a listener of datagrams.
"""

import errno
import posix

from proxyd import address as sockaddr
from proxyd import log
from proxyd._datagram import (
    DatagramListener,
    Datagrams,
    DatagramTotals,
    FlowBegun,
    FlowEnded,
    FlowFailed,
    FlowInfo,
    FlowsRefused,
    ListenerFailed,
    LoopFound,
    TargetDown,
    TargetHolds,
    TargetUp,
)
from proxyd.datagram_upstream import DatagramUpstream
from proxyd.event_loop import EventLoop
from proxyd.listen import Listener
from proxyd.loop_guard import is_guarded
from proxyd.peers import address_note, flow_label

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

    from proxyd._datagram import DatagramEvent
    from proxyd.resolver import Resolver
    from proxyd.target import Target

QUIET_MS = 1000
"""While the program drains, replies are over once no datagram has passed for this long."""


class DatagramPolicy:
    """Has datagrams forwarded from all listeners of them. The listeners stay the caller's."""

    def __init__(
        self,
        loop: EventLoop,
        listeners: list[Listener],
        resolver: "Resolver | None",
        timeout_ms: int | None,
        *,
        proxy: bool,
    ) -> None:
        """Each listener has its target and index already; those of streams are left alone.

        `timeout_ms`: how long datagrams are held, None for no limit; `proxy`: whether each gets a
        PROXY header. Raises OSError.
        """
        self._loop = loop
        self._relay = loop.relay
        self._listeners = listeners
        self.relay_part = Datagrams(loop.relay)
        """The relay's side of it."""
        self.relay_part.idle_ms = loop.relay.idle_ms
        self.upstreams: list[DatagramUpstream] = []
        self.refused = 0
        """Datagrams refused at the limit, as far as events have told."""
        self.refused_ms: int | None = None
        """When a datagram was last refused at the limit."""
        self.on_flow: Callable[[FlowInfo, str | None], object] | None = None
        """Called with each flow that begins, and, with how, each that ends, if report() is on."""
        self._stopped_ms: int | None = None
        """When stop() was called."""
        for listener in listeners:
            if listener.datagram:
                self._add(listener, resolver, timeout_ms, proxy=proxy)
        self.report(wanted=False)

    def _add(
        self,
        listener: Listener,
        resolver: "Resolver | None",
        timeout_ms: int | None,
        *,
        proxy: bool,
    ) -> None:
        target = listener.target
        port = sockaddr.port(listener.address) if target.any_port else target.service or 0
        upstream = self._find(target, port)
        if upstream is None:
            parts = self.relay_part, self._relay, resolver, target, port, timeout_ms
            upstream = DatagramUpstream(*parts, index=len(self.upstreams))
            self.upstreams.append(upstream)
        listener.datagram_upstream = upstream
        listener.datagram_relay = DatagramListener(
            self.relay_part,
            listener.fd,
            upstream.relay_target,
            listener.index,
            guarded=is_guarded(listener),
            proxy=proxy,
        )

    def _find(self, target: "Target", port: int) -> DatagramUpstream | None:
        same = [one for one in self.upstreams if one.target is target and one.port == port]
        return same[0] if same else None

    def report(self, *, wanted: bool) -> None:
        """Set whether somebody wants to know when flows begin and end."""
        self.relay_part.report_flows = wanted or self._loop.labelled

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Start to receive. Raises OSError."""
        for listener in self._own_listeners():
            listener.datagram_relay.start()
            listener.accepting = True

    def step(self, now_ms: int) -> None:
        """Take the events, and do what is due."""
        self._take_events()
        if self._stopped_ms is None:
            for upstream in self.upstreams:
                upstream.step(now_ms)
            self._take_events()  # a probe may be over already

    def next_ms(self) -> int | None:
        """When to call step() at the latest; None: not before the next event."""
        if self._stopped_ms is not None:
            return self._quiet_ms if self.relay_part.flows else None
        times = [upstream.next_ms() for upstream in self.upstreams]
        return min((time for time in times if time is not None), default=None)

    @property
    def flows(self) -> int:
        """The number of flows, which the relay counts as connections, too."""
        return self.relay_part.flows

    @property
    def holds(self) -> bool:
        """Tell whether datagrams wait for a target."""
        return self._stopped_ms is None and any(one.holds for one in self.upstreams)

    @property
    def _quiet_ms(self) -> int:
        """When all flows will count as quiet after stop(), unless a datagram passes."""
        return max(self.relay_part.last_ms, self._stopped_ms or 0) + QUIET_MS

    def needs_first_flow(self) -> bool:
        """Tell whether step() is to be called when there is a first flow: to refresh an address."""
        return any(not upstream.is_fixed for upstream in self.upstreams)

    @property
    def failed_ms(self) -> list[int | None]:
        """When datagrams for each target were last dropped because it could not be reached."""
        return [upstream.failed_ms for upstream in self.upstreams]

    def totals(self) -> DatagramTotals:
        """Return the counters of all listeners and targets."""
        return self.relay_part.totals()

    # ── events ────────────────────────────────────────────────────────────────────────────────────

    def _take_events(self) -> None:
        while events := self.relay_part.take_events():
            for event in events:
                self._handle(event)

    def _handle(self, event: "DatagramEvent") -> None:
        if isinstance(event, TargetDown):
            self.upstreams[event.target].failed(event.error)
        elif isinstance(event, TargetHolds):
            self.upstreams[event.target].begin_to_hold()
        elif isinstance(event, TargetUp):
            self.upstreams[event.target].succeeded()
        elif isinstance(event, FlowBegun):
            self._flow_begun(event.info)
        elif isinstance(event, FlowEnded):
            self._flow_ended(event.info, event.ending)
        else:
            self._handle_trouble(event)

    def _handle_trouble(
        self, event: "FlowsRefused | LoopFound | FlowFailed | ListenerFailed"
    ) -> None:
        listener = self._listeners[event.listener]
        where = listener.text
        if isinstance(event, FlowsRefused):
            self._note_refusal(event)
        elif isinstance(event, LoopFound):
            log.limited(
                f"loop {where}",
                f"Refusing datagram: target {listener.datagram_upstream.text} leads back to our "
                f"own listener {where}.",
            )
        elif isinstance(event, FlowFailed):
            log.limited(
                "datagram exhausted",
                f"Failed to open a socket for datagrams: {_why_no_socket(event.error, listener)}. "
                "Dropping them.",
            )
        else:
            log.error(f"Failed to receive from {where}: {posix.strerror(event.error)}.")
            listener.accepting = False
            listener.broken = True

    def _note_refusal(self, event: FlowsRefused) -> None:
        self.refused += event.count
        self.refused_ms = self._relay.now_ms
        limit = "connection limit of a source" if event.by_source else "connection limit"
        log.limited(
            f"datagram {limit}", f"Hit {limit}, refusing datagram.{address_note(event.peer)}"
        )

    def _flow_begun(self, info: FlowInfo) -> None:
        if self._loop.labelled:
            log.debug(f"New flow from {flow_label(info.client)} to {self._target_text(info)}.")
        if self.on_flow is not None:
            self.on_flow(info, None)

    def _flow_ended(self, info: FlowInfo, how: str) -> None:
        if self._loop.labelled:
            label = f"{flow_label(info.client)} → {self._target_text(info)}"
            log.debug(
                f"{label}: {info.datagrams_up} datagrams ({info.bytes_up} bytes) up, "
                f"{info.datagrams_down} ({info.bytes_down} bytes) down "
                f"in {self._relay.now_ms - info.opened_ms} ms, {how}."
            )
        if self.on_flow is not None:
            self.on_flow(info, how)

    def _target_text(self, info: FlowInfo) -> str:
        return self.upstreams[info.target_index].text

    # ── the end ───────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> None:
        """Stop receiving; what waits in the queues of the listeners stays there. Replies go on."""
        self._stopped_ms = self._relay.now_ms
        for listener in self._own_listeners():
            if listener.accepting:
                listener.accepting = False
                listener.datagram_relay.stop()

    def end(self) -> None:
        """End all flows. The datagrams in hand are lost."""
        lost = sum([upstream.relay_target.held for upstream in self.upstreams])
        waited_for = self.relay_part.flows - self.quiet_flows
        self.relay_part.close_all()
        self._take_events()
        if waited_for or lost:
            flows = "1 flow was" if waited_for == 1 else f"{waited_for} flows were"
            held = "1 held datagram was" if lost == 1 else f"{lost} held datagrams were"
            log.info(f"Stopped; {flows} cut, {held} lost.")

    @property
    def quiet_flows(self) -> int:
        """The number of flows that are not waited for: while the program drains, quiet ones."""
        draining = self._stopped_ms is not None
        return self.relay_part.flows if draining and self._relay.now_ms >= self._quiet_ms else 0

    def finish(self) -> None:
        """Stop receiving, and leave the listeners as another program expects them."""
        for listener in self._own_listeners():
            listener.accepting = False
            listener.datagram_relay.finish()

    def _own_listeners(self) -> list[Listener]:
        return [listener for listener in self._listeners if listener.datagram]


def _why_no_socket(error: int, listener: Listener) -> str:
    source = listener.target.source
    if source is not None and (why := source.explain(error, None)):
        return why
    return "no local port is free" if error == errno.EAGAIN else posix.strerror(error)
