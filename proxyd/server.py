"""The main loop, and when the program ends.

One connection, from top to bottom: the relay (_relay.pyx) accepts it, and connects it if Acceptor
has allowed that in advance. Otherwise it hands the client to Acceptor, whose Upstream connects it
and gives both sockets back to the relay. The relay forwards until both sides are done.
"""

import _signal  # type: ignore[import-not-found]

from proxyd import log, stats
from proxyd._relay import (
    Accepted,
    AcceptFailed,
    ConnectFailed,
    DatagramsChanged,
    Ended,
    NotKept,
    Old,
    Refused,
    WorkersWanted,
    signal_fd,
    take_signals,
)
from proxyd.acceptor import Acceptor, upstream_of
from proxyd.event_loop import EventLoop
from proxyd.limits import fit_connections
from proxyd.listen import Listener
from proxyd.options import milliseconds
from proxyd.routes import Routes
from proxyd.sd_notify import Notifier, NotifySocket
from proxyd.succession import Succession

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from proxyd.continuity.parcel import Parcel
    from proxyd.continuity.parts import Parts
    from proxyd.continuity.root import Root
    from proxyd.datagrams import DatagramPolicy
    from proxyd.event_loop import PolicyEvent
    from proxyd.inspection.entrance import Entrance
    from proxyd.inspection.service import Service
    from proxyd.options import Options
    from proxyd.resolver import Resolver
    from proxyd.target import Target

STATUS_AGES_MS = 60_000
"""How long STATUS= says when the last client was refused or has failed."""


def run(  # noqa: PLR0913, PLR0917 - all that the program has at its start
    options: "Options",
    listeners: list[Listener],
    environ: "MutableMapping[str, str]",
    entrance: Listener | None = None,
    parcel: "Parcel | None" = None,
    root: "Root | None" = None,
    *,
    stored: "Sequence[str]" = (),
) -> int:
    """Serve until the end; return the exit status. The listeners stay the caller's.

    `entrance`: the inspection socket. `parcel`: the connections of the last process; `root`: these
    connections, if it was killed. `stored`: names in the store of what is of no use any more.
    """
    server = Server(options, listeners, environ, entrance)
    try:
        server.succession.take(parcel, root, stored=stored)
        return server.serve()
    finally:
        server.relay.close_all()  # after an error, too: a client that is cut must not see a FIN
        server.acceptor.stop()  # before other processes may get the listeners
        if server.datagrams is not None:
            server.datagrams.finish()
        if server.inspection is not None:
            server.inspection.close()
        for upstream in server.upstreams:
            upstream.drop_all()
        server.acceptor.drop_all()
        server.notifier.close()
        log.flush_limited()


class Server:
    """Ties the parts together, and decides when to end."""

    def __init__(
        self,
        options: "Options",
        listeners: list[Listener],
        environ: "MutableMapping[str, str]",
        entrance: Listener | None = None,
    ) -> None:
        self.options = options
        self.loop = EventLoop(options.buffer_size)
        self.relay = self.loop.relay
        self.relay.idle_ms = milliseconds(options.idle_timeout) or 0
        self._handle_signals()
        if options.source is not None:
            from proxyd.source_setup import use_source

            unix_headers = (options.accept_proxy_protocol or ([], False))[1]
            use_source(options.source, self.relay, listeners, unix_headers=unix_headers)
        hosts = [one.target.host for one in listeners if one.target.host is not None]
        self.resolver = self._make_resolver(hosts) if hosts else None
        routes = Routes(self.loop, options, listeners, self.resolver)
        self.upstreams = routes.upstreams
        streams = [one for one in listeners if not one.datagram]
        single = len(listeners) == 1 and listeners[0].connected
        self.notifier = Notifier(NotifySocket(environ), self._status, self.relay)
        recovers = self.notifier.has_store and options.crash_recovery != "no" and not single
        connections_max = fit_connections(
            options.connections_max,
            len(listeners),
            options.threads,
            names=len(set(hosts)),
            unix=any(one.involves_unix for one in listeners),
            inspected=entrance is not None,
            streams=bool(streams),
            kept=recovers,
        )
        self.acceptor = Acceptor(self.loop, listeners, connections_max, options.proxy_protocol)
        self.datagrams = self._make_datagrams() if len(streams) < len(listeners) else None
        if options.accept_proxy_protocol is not None:
            networks, unix_clients = options.accept_proxy_protocol
            self.acceptor.expect_headers(networks, unix_clients=unix_clients)
        if options.connections_max_per_source:
            from proxyd.sources import limit_sources

            limit_sources(self.acceptor, self.datagrams, options.connections_max_per_source)
        if options.threads > 1 and not single:
            from proxyd import workers

            workers.use(self.relay, options.threads, at_once=options.always_hand_over)
        self.inspection = self._make_inspection(entrance) if entrance is not None else None
        self.succession = Succession(self.notifier, lambda: self._parts(routes.targets, entrance))
        self.relay.report_old = recovers
        self.relay.keeps_unix = options.crash_recovery == "all"
        self.relay.wake_on_first = self.notifier.enabled or (
            self.datagrams is not None and self.datagrams.needs_first_flow()
        )
        self.held_ms = self.relay.now_ms
        """When a client was last held."""
        self.exit_idle_ms = milliseconds(options.exit_idle_time)
        if single:
            self.exit_idle_ms = 0  # Accept=yes: the program ends with its only connection
        self.summary_wanted = False
        """Whether to log the counters: after the batch of events, as they do not add up before."""
        self.stopping = False
        self.stop_ms: int | None = None
        """While stopping, when to end in any case; None: with the last connection."""

    # ── parts ─────────────────────────────────────────────────────────────────────────────────────

    def _handle_signals(self) -> None:
        ends = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP)
        signals = signal_fd((*ends, _signal.SIGUSR1, _signal.SIGUSR2))
        self.loop.watch(signals, lambda _events: self._signalled())

    def _make_resolver(self, hosts: list[bytes]) -> "Resolver":
        from proxyd.resolver import Resolver

        resolver = Resolver()
        resolver.start(hosts)
        self.loop.watch(resolver.fd, lambda _events: resolver.collect(self.relay.now_ms))
        return resolver

    def _make_datagrams(self) -> "DatagramPolicy":
        from proxyd.datagrams import DatagramPolicy

        parts = self.loop, self.acceptor.listeners, self.resolver
        timeout_ms = milliseconds(self.options.connect_timeout)
        return DatagramPolicy(*parts, timeout_ms, proxy=self.options.proxy_protocol != 0)

    def _make_inspection(self, entrance: Listener) -> "Entrance":
        from proxyd.inspection.entrance import Entrance

        started_ms = self.relay.now_ms

        def make_service(callers_max: int) -> "Service":
            from proxyd.inspection.service import Service

            threads, status = self.options.threads, self._status
            parts = self.loop, self.acceptor, self.upstreams
            return Service(*parts, status, started_ms, threads, callers_max, self.datagrams)

        return Entrance(self.loop, entrance, make_service)

    def _parts(self, targets: "list[Target]", entrance: Listener | None) -> "Parts":
        from proxyd.continuity.parts import Parts

        streams = self.loop, self.acceptor, self.upstreams, targets
        own = self.options, entrance, self._handle, self._busy
        return Parts(*streams, self.notifier, *own)

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────

    def serve(self) -> int:
        """Serve until the end; return the exit status."""
        self.acceptor.start()
        if self.datagrams is not None:
            self.datagrams.start()
        self._log_listening()
        self.notifier.ready()
        self._tick()
        while not self._over():
            self._turn(self._timeout_ms())
        self._end()
        return 1 if self.acceptor.broken and not self.stopping else 0

    def _log_listening(self) -> None:
        """Log where --listen= listens, with the port that the kernel has chosen for 0."""
        inherited = len(self.acceptor.listeners) - len(self.options.listen)
        for listener in self.acceptor.listeners[inherited:]:
            log.info(f"Listening on {listener.text}.")

    def _turn(self, timeout_ms: int) -> None:
        for event in self.loop.run(timeout_ms):
            self._handle(event)
        self._tick()

    def _handle(self, event: "PolicyEvent") -> None:
        if isinstance(event, ConnectFailed) and event.listener < 0:
            # It came to a listener of the last process, which is not configured any more.
            self.loop.hang_up(event.client, reset=True)
        elif isinstance(event, ConnectFailed):
            listener = self.acceptor.listeners[event.listener]
            upstream_of(listener, event.client, event.peer).take_back(event, listener.family)
        elif isinstance(event, Ended):
            if self.loop.labelled:
                self._log_end(event)
            if self.inspection is not None:
                self.inspection.handle(event)
        elif isinstance(event, WorkersWanted):
            self._start_threads()
        elif isinstance(event, Old | NotKept):
            self.succession.handle(event)
        elif isinstance(event, Accepted | AcceptFailed | Refused):
            self.acceptor.handle(event)
        elif self.inspection is not None and not isinstance(event, DatagramsChanged):
            self.inspection.handle(event)  # the other one calls for _tick(), and no more

    def _log_end(self, event: Ended) -> None:
        log.debug(stats.ending(self.loop.pop_label(event.connection), event))

    def _start_threads(self) -> None:
        from proxyd import workers

        workers.start(self.relay, self.options.threads)

    def _tick(self) -> None:
        """Do what the time, or the last batch of events, has made due."""
        now_ms = self.relay.now_ms
        for upstream in self.upstreams:
            if upstream.held:
                self.held_ms = now_ms
                upstream.step(now_ms)
        if self.datagrams is not None:
            self.datagrams.step(now_ms)
            self.held_ms = now_ms if self.datagrams.holds else self.held_ms
        if self.acceptor.awaiting_header:
            self.held_ms = now_ms
        self.acceptor.tick(now_ms)
        self.acceptor.update_relay()
        if self.summary_wanted:
            self.summary_wanted = False
            self._log_summary()
        if self.inspection is not None:
            self.inspection.step(now_ms)
        self.succession.step(now_ms)
        self.notifier.tick(now_ms, self._busy() or self._status_ages(now_ms))
        ends = self.stopping or self.exit_idle_ms is not None or self.acceptor.broken
        last = 0 if self.relay.connections > 0 and ends else -1
        self.relay.wake_at_count = max(self.acceptor.wake_at_count(), last)

    def _log_summary(self) -> None:
        for line in stats.summary(self.acceptor, self.relay, self.upstreams, self.datagrams):
            log.info(line)

    def _timeout_ms(self) -> int:
        """Return how long the relay may run without us; -1: until something happens."""
        times = [self.notifier.next_ms(), self.acceptor.next_ms()]
        times += [self.succession.next_ms(), self._idle_exit_ms()]
        if not self.succession.waits_for_store:
            times.append(self.stop_ms)
        if self.inspection is not None:
            times.append(self.inspection.next_ms(self.relay.now_ms))
        if self.datagrams is not None:
            times.append(self.datagrams.next_ms())
        times += [upstream.next_ms() for upstream in self.upstreams if upstream.held]
        soonest = min((time for time in times if time is not None), default=None)
        return -1 if soonest is None else max(soonest - self.relay.now_ms, 0)

    # ── the end ───────────────────────────────────────────────────────────────────────────────────

    def _over(self) -> bool:
        now_ms = self.relay.now_ms
        if self.succession.waits_for_store:
            return False
        if self.stopping:
            over = not self._busy() or (self.stop_ms is not None and now_ms >= self.stop_ms)
            return over and self.succession.may_leave(busy=self._busy())
        if self.acceptor.broken and not self._busy():
            return True
        end_ms = self._idle_exit_ms()
        return end_ms is not None and now_ms >= end_ms and not self._client_came()

    def _idle_exit_ms(self) -> int | None:
        """Return when --exit-idle-time= will be over, unless a client comes; None: never."""
        if self.exit_idle_ms is None or self._busy() or self.acceptor.resume_ms is not None:
            return None
        return max(self.relay.last_end_ms, self.held_ms) + self.exit_idle_ms

    def _client_came(self) -> bool:
        """Look once more before an idle exit: the client that started the program is served."""
        accepted = -1
        if self.inspection is not None:
            self.inspection.rest()  # its callers are not to put off the end
        while not self._busy():
            before, accepted = accepted, self.relay.totals().accepted
            if accepted == before and not self.loop.had_events:
                break
            self._turn(0)
        came = self._busy() or self.acceptor.resume_ms is not None
        if self.inspection is not None and came:
            self.inspection.resume()
        return came

    def _busy(self) -> bool:
        ignored, holds = 0, False
        if self.datagrams is not None:
            ignored, holds = self.datagrams.quiet_flows, self.datagrams.holds
        held = holds or any(upstream.held for upstream in self.upstreams)
        held = held or self.acceptor.awaiting_header > 0
        return held or self.relay.connections > ignored

    def _signalled(self) -> None:
        for number in take_signals():
            if number == _signal.SIGUSR1:
                self.summary_wanted = True
            elif number != _signal.SIGHUP:
                self._stop(drains=number != _signal.SIGUSR2)
            elif not self.stopping and not self.succession.reload():
                self._stop()  # while stopping, a service manager may send it (SendSIGHUP=)

    def _stop(self, *, drains: bool = True) -> None:
        """On SIGTERM or SIGINT: stop accepting, and drain; the second time, end at once.

        SIGUSR2 is for RestartKillSignal=: no drain, since the next process goes on with all.
        """
        now_ms = self.relay.now_ms
        if self.stopping:
            self.stop_ms = now_ms
            return
        self.stopping = True
        drain_ms = milliseconds(self.options.drain_timeout) if drains else 0
        self.stop_ms = None if drain_ms is None else now_ms + drain_ms
        self.acceptor.stop()
        if self.datagrams is not None:
            self.datagrams.stop()
        self.notifier.stopping(now_ms, waits=drain_ms != 0)
        self.succession.stop(busy=self._busy())

    def _end(self) -> None:
        if not self.stopping:
            self.notifier.stopping(self.relay.now_ms, waits=False)
        if self.datagrams is not None:
            self.datagrams.end()
        self.succession.leave()
        cut = self.relay.close_all()
        if self.loop.labelled:
            self.acceptor.stop()
            for event in self.loop.run(0):
                self._handle(event)
        waiting = sum(upstream.drop_all() for upstream in self.upstreams)
        waiting += self.acceptor.drop_all()
        if cut or waiting:
            log.info(f"Stopped; {cut} open and {waiting} waiting connections were cut.")
        self._log_totals()

    def _log_totals(self) -> None:
        """Log what all the connections were, before nothing knows it any more."""
        for line in stats.totals(self.acceptor, self.relay, self.upstreams, self.datagrams):
            log.info(line)

    def _status(self) -> str:
        if self.stopping:
            parts = self.acceptor, self.relay, self.upstreams
            return stats.draining(*parts, self.stop_ms, self.datagrams)
        return stats.status(self.acceptor, self.relay, self.upstreams, self.datagrams)

    def _status_ages(self, now_ms: int) -> bool:
        """Tell whether the status says how long ago something was."""
        refusals = self.acceptor.refusals
        times = [refusals.limit_ms, refusals.source_limit_ms, refusals.headerless_ms]
        times += [one.held.failed_ms for one in self.upstreams]
        if self.datagrams is not None:
            times += [self.datagrams.refused_ms, *self.datagrams.failed_ms]
        return any(time is not None and now_ms - time < STATUS_AGES_MS for time in times)
