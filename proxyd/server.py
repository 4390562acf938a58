"""The main loop, and when the program ends.

One connection, from top to bottom: the relay (_relay.pyx) accepts it and connects it on the terms
that Intake has set, or hands it to Intake; then Reach finds a way to its target and gives both back
to the relay, which forwards until both sides are done.
"""

import _signal  # type: ignore[import-not-found]
from _collections_abc import MutableMapping

from proxyd import address, log
from proxyd._relay import (
    ConnectFailed,
    Ended,
    Ready,
    WorkersWanted,
    signal_fd,
    take_signals,
)
from proxyd.errors import reason
from proxyd.intake import Door, Intake
from proxyd.limits import fit_connections
from proxyd.listen import Listener
from proxyd.loop import Loop
from proxyd.manager import Manager
from proxyd.notify import Notifier
from proxyd.reach import Reach

TYPE_CHECKING = False  # as typing has it
if TYPE_CHECKING:
    from proxyd._relay import Event
    from proxyd.cli import Options
    from proxyd.ports import Ports
    from proxyd.resolver import Resolver
    from proxyd.target import Target


def run(options: "Options", listeners: list[Listener], environ: MutableMapping[str, str]) -> int:
    """Serve until there is a reason to end; the exit status. The listeners stay the caller's."""
    server = Server(options, listeners, environ)
    try:
        return server.serve()
    finally:
        server.relay.close_all()  # after an error too: whoever is cut must not see a clean end
        server.intake.disarm()  # before the listeners are closed, which others may have, too
        for reach in server.reaches:
            reach.drop_all()
        server.manager.close()
        log.flush_limited()


class Server:
    """Ties the parts together and decides when to end."""

    def __init__(
        self, options: "Options", listeners: list[Listener], environ: MutableMapping[str, str]
    ) -> None:
        self.options = options
        self.loop = Loop(options.buffer_size)
        self.relay = self.loop.relay
        self.relay.idle_ms = _milliseconds(options.idle_timeout) or 0
        self._handle_signals()
        hosts = [one.target.host for one in listeners if one.target.host is not None]
        self.resolver = self._make_resolver(hosts) if hosts else None
        self.reaches: list[Reach] = []
        self.ports: dict[Target, Ports] = {}
        """By their target."""
        self.intake = Intake(
            self.loop,
            [self._door(index, listener) for index, listener in enumerate(listeners)],
            fit_connections(
                options.connections_max,
                len(listeners),
                options.threads,
                names=len(set(hosts)),
                unix=any(_is_unix(one) for one in listeners),
            ),
            options.proxy_protocol,
        )
        single = len(listeners) == 1 and listeners[0].connected
        if options.threads > 1 and not single:
            self._use_threads()
        self.manager = Manager(Notifier(environ), self._status, self.relay)
        self.relay.wake_on_first = self.manager.wanted
        if self.loop.notes is not None:
            import proxyd.stats  # noqa: F401 - for _log_end(), while there are fds to load it with
        self.held_ms = self.relay.now_ms
        """When a client was last held."""
        self.exit_idle_ms = _milliseconds(options.exit_idle_time)
        if single:
            self.exit_idle_ms = 0  # Accept=yes: with the one connection all ends
        self.asked = False
        """Whether to log the counters; after the batch, for in the midst they do not add up."""
        self.stopping = False
        self.stop_ms: int | None = None
        """When to end in any case, once stopping; None: when the last connection has ended."""

    # ── the loop ─────────────────────────────────────────────────────────────────────────────

    def serve(self) -> int:
        """Serve until there is a reason to end; the exit status."""
        self.intake.arm()
        self._log_listening()
        self.manager.ready()
        self._tick()
        while not self._over():
            self._turn(self._timeout_ms())
        self._end()
        return 1 if self.intake.broken and not self.stopping else 0

    def _turn(self, timeout_ms: int) -> None:
        for event in self.loop.run(timeout_ms):
            self._relay_event(event)
        self._tick()

    def _relay_event(self, event: "Event") -> None:
        if isinstance(event, ConnectFailed):
            door = self.intake.doors[event.listener]
            door.way_of(event.client).take_back(door.listener, event)
        elif isinstance(event, Ended):
            self._log_end(event)
        elif isinstance(event, WorkersWanted):
            self._hire()
        elif not isinstance(event, Ready):  # those the loop has handled
            self.intake.event(event)

    def _tick(self) -> None:
        """Do what time, or the last batch of events, has made due."""
        now_ms = self.relay.now_ms
        for reach in self.reaches:
            if reach.held:
                self.held_ms = now_ms
                reach.step(now_ms)
        self.intake.tick(now_ms)
        self.intake.set_terms()
        if self.asked:
            self.asked = False
            self._log_summary()
        busy = self._busy()
        self.manager.tick(now_ms, busy)
        ends = self.stopping or self.exit_idle_ms is not None or self.intake.broken
        last = 0 if self.relay.connections > 0 and ends else -1
        self.relay.wake_at_count = max(self.intake.wake_at(), last)

    def _busy(self) -> bool:
        return self.relay.connections > 0 or any(reach.held for reach in self.reaches)

    def _timeout_ms(self) -> int:
        """How long the relay may go on without us, -1: until something happens."""
        times = [self.manager.next_ms(), self.intake.resume_ms, self.stop_ms, self._idle_exit_ms()]
        times += [reach.next_ms() for reach in self.reaches if reach.held]
        soonest = min((time for time in times if time is not None), default=None)
        return -1 if soonest is None else max(soonest - self.relay.now_ms, 0)

    def _idle_exit_ms(self) -> int | None:
        """When to end for want of clients, as things stand."""
        if self.exit_idle_ms is None or self._busy() or self.intake.resume_ms is not None:
            return None
        return max(self.relay.last_end_ms, self.held_ms) + self.exit_idle_ms

    # ── the end ──────────────────────────────────────────────────────────────────────────────

    def _over(self) -> bool:
        now_ms = self.relay.now_ms
        if self.stopping:
            return not self._busy() or (self.stop_ms is not None and now_ms >= self.stop_ms)
        if self.intake.broken and not self._busy():
            return True
        end_ms = self._idle_exit_ms()
        return end_ms is not None and now_ms >= end_ms and not self._somebody_came()

    def _somebody_came(self) -> bool:
        """Look once more before an idle exit: who started the program is always served."""
        accepted = -1
        while not self._busy() and (self.loop.heard or self.relay.totals().accepted != accepted):
            accepted = self.relay.totals().accepted
            self._turn(0)
        return self._busy() or self.intake.resume_ms is not None

    def _stop(self) -> None:
        """On SIGTERM, SIGINT or SIGHUP: no more clients, and an end; the second time at once."""
        now_ms = self.relay.now_ms
        if self.stopping:
            self.stop_ms = now_ms
            return
        self.stopping = True
        drain_ms = _milliseconds(self.options.drain_timeout)
        self.stop_ms = None if drain_ms is None else now_ms + drain_ms
        self.intake.disarm()
        self.manager.stopping(now_ms, waits=drain_ms != 0)

    def _end(self) -> None:
        if not self.stopping:
            self.manager.stopping(self.relay.now_ms, waits=False)
        cut = self.relay.close_all()
        if self.loop.notes is not None:
            self.intake.disarm()
            for event in self.loop.run(0):
                self._relay_event(event)
        waiting = sum(reach.drop_all() for reach in self.reaches)
        if cut or waiting:
            log.info(f"Stopped; {cut} open and {waiting} waiting connections were cut.")

    # ── signals ──────────────────────────────────────────────────────────────────────────────

    def _handle_signals(self) -> None:
        ends = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP)
        signals = signal_fd((*ends, _signal.SIGUSR1))
        self.loop.watch(signals, lambda _events: self._signalled())

    def _signalled(self) -> None:
        for number in take_signals():
            if number == _signal.SIGUSR1:
                self.asked = True
            else:
                self._stop()

    # ── parts ────────────────────────────────────────────────────────────────────────────────

    def _use_threads(self) -> None:
        """Let relay threads help, at once or when they are needed."""
        from proxyd import threads

        if self.options.always_hand_over:
            threads.hire(self.relay, self.options.threads)
        else:
            threads.share(self.relay)

    def _hire(self) -> None:
        from proxyd import threads

        threads.hire(self.relay, self.options.threads)

    def _make_resolver(self, hosts: list[bytes]) -> "Resolver":
        from proxyd.resolver import Resolver

        resolver = Resolver()
        resolver.start(hosts)
        self.loop.watch(resolver.fd, lambda _events: resolver.collect(self.relay.now_ms))
        return resolver

    def _door(self, index: int, listener: Listener) -> Door:
        way, target = self._way_of(listener), listener.target
        if not target.any_port or listener.connected:
            return Door(self.loop, index, listener, way)
        if target not in self.ports:
            from proxyd.ports import Ports

            self.ports[target] = Ports(lambda port: self._make_way(target, port), self.reaches)
        self.ports[target].fixed[way.port] = way
        return Door(self.loop, index, listener, way, self.ports[target])

    def _way_of(self, listener: Listener) -> Reach:
        """The Reach for a listener's target: one for all that lead to the same place."""
        target = listener.target
        port = address.port(listener.address) if target.any_port else target.service or 0
        for reach in self.reaches:
            if reach.target is target and reach.port == port:
                return reach
        self.reaches.append(self._make_way(target, port))
        return self.reaches[-1]

    def _make_way(self, target: "Target", port: int) -> Reach:
        timeout_ms = _milliseconds(self.options.connect_timeout)
        way = Reach(self.loop, self.resolver, target, port, timeout_ms)
        way.settle(_milliseconds(self.options.settle_time) or 0)
        return way

    # ── words ────────────────────────────────────────────────────────────────────────────────

    def _log_listening(self) -> None:
        """Tell where --listen= listens, with the port that the kernel has chosen for 0."""
        inherited = len(self.intake.doors) - len(self.options.listen)
        for door in self.intake.doors[inherited:]:
            log.info(f"Listening on {door.listener.text}.")

    def _log_summary(self) -> None:
        try:
            from proxyd.stats import summary
        except (OSError, ImportError) as error:  # no fd is left to load it with
            log.warning(f"Failed to load the statistics: {reason(error)}")
            return
        for line in summary(self.intake, self.relay, self.reaches):
            log.info(line)

    def _status(self) -> str:
        from proxyd.stats import status

        return status(self.relay, self.reaches)

    def _log_end(self, event: Ended) -> None:
        from proxyd.stats import ending

        note = self.loop.notes.pop(event.connection, "") if self.loop.notes is not None else ""
        log.debug(ending(note, event))


def _is_unix(listener: Listener) -> bool:
    target = listener.target.address
    return address.AF_UNIX in (listener.family, address.family(target) if target else None)


def _milliseconds(usec: int | None) -> int | None:
    """A span in ms, rounded up: a millisecond is the least, but for 0."""
    return None if usec is None else -(-usec // 1000)
