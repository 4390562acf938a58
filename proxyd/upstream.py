"""One target: clients are connected to it, or held while it cannot be reached.

Socket activation promises that a client waits while the service starts. So a target that cannot be
reached yet is an outage, not an error: its clients are held, and probed for one attempt after the
other. A successful probe becomes the connection of the oldest client, because an empty connection
would upset one-shot servers. Then all other clients follow.

A UNIX target whose backlog is full is congested, which is not an outage: its clients wait in order,
and every few milliseconds as many as fit are connected.
"""

import errno

from proxyd import log
from proxyd._relay import ConnectFailed, socket_names
from proxyd.connect_errors import describe, is_congestion, is_denied, is_temporary
from proxyd.event_loop import EventLoop
from proxyd.happy_eyeballs import SILENT_MS, STAGGER_MS, HappyEyeballs, Winner
from proxyd.held import HeldClient, HeldClients
from proxyd.outage import Outage
from proxyd.target import Target, address_source

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd._relay import RelayListener
    from proxyd.resolver import Resolver

FIRST_FEW = 4
"""How many attempts to make at once at a target that is believed to be up, until one succeeds."""


class Upstream:
    """Connects clients to one target.

    The main loop calls step() after each batch while clients are held, and when next_ms() says so.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the parts that it ties together
        self,
        loop: EventLoop,
        resolver: "Resolver | None",
        target: Target,
        port: int,
        timeout_ms: int | None,
        client: bytes = b"",
    ) -> None:
        """`client`: the packed address of all its clients, if sockets are bound to that."""
        self._loop = loop
        self._relay = loop.relay
        self.target = target
        self.port = port
        """With `HOST:*`, the listener's."""
        self.timeout_ms = timeout_ms
        """How long a client is held; 0: for one attempt, None: forever."""
        self.text = target.text.removesuffix("*") + str(port) if target.any_port else target.text
        self.group = self.text
        """Limits repeated log lines, and names the row of the statistics."""
        self.held = HeldClients(loop, self.text, self._client_left)
        self._relay_listeners: list[RelayListener] = []
        """Those whose clients come here."""
        self.served = 0
        """Connections begun here; the relay's listeners count their own."""
        self.returned = 0
        """Of all of these, connects that have failed."""
        self._source = address_source(target, port, resolver)
        self._attempts = HappyEyeballs(loop, self.held.expects_end, repeats=timeout_ms != 0)
        self._attempts.client = client
        self._proven = True
        """Whether the target counts as up as soon as it accepts a connection."""
        self.outage = Outage(self.text)
        self._round_ms = 0
        """When the next round of attempts may begin …"""
        self._round_is_set = False
        """… even though the current one goes on."""
        self._late_error = 0
        """Of a connect of the relay; left to step(), because others of the batch may fail too."""

    def settle(self, settle_ms: int) -> None:
        """Have each connection stay up for `settle_ms` before anything is sent on it.

        That is repeated until one has, and again after each outage. 0: it need not.
        """
        self._attempts.settle_ms = settle_ms
        self._proven = settle_ms == 0

    def add_listener(self, relay_listener: "RelayListener") -> None:
        """Count the connections that the relay makes for a listener's clients."""
        self._relay_listeners.append(relay_listener)

    def set_group(self, group: str) -> None:
        """Be logged and counted as one of many."""
        self.group = self.outage.group = group

    def replace(self, other: "Upstream") -> None:
        """Take over the counters of another upstream of the group, which is not used any more."""
        self.served += other.served
        self.returned += other.returned
        self.held.add_counters(other.held)
        other._attempts.retire()

    @property
    def auto_connect_address(self) -> bytes | None:
        """Where the relay may connect clients by itself; None while the target is in doubt."""
        return self._source.fixed if self.outage.up and self._proven and not self.held else None

    @property
    def waiting(self) -> int:
        """The number of clients that wait longer than a prompt look-up and connect take."""
        oldest, now_ms = self.held.oldest, self._relay.now_ms
        prompt = oldest is None or (self.outage.up and now_ms - oldest.since_ms < STAGGER_MS)
        return 0 if prompt else len(self.held)

    # ── clients ───────────────────────────────────────────────────────────────────────────────────

    def take(  # noqa: PLR0913, PLR0917 - all that is known about a client
        self, fd: int, family: int, index: int, header: bytes | None, name: str,
        peer: bytes = b"", connection: int = 0,
    ) -> None:  # fmt: skip
        """Serve a client of the listener `index`, with this packed address; the fd is owned now.

        `connection`: its id, if it has one already. If the target is up, that is one call of the
        relay, and Python keeps no state.
        """
        address = self._source.prompt(self._relay.now_ms)
        if address is None or not self.outage.up or not self._proven or self.held:
            client = HeldClient(fd, family, header, name, self._relay.now_ms, peer)
            client.listener = index
            client.id = connection
            self.hold(client)
            return
        terms = index, self.connect_ms, self.target.index, peer or socket_names(fd)[0]
        outcome = self._relay.connect(fd, family, address, header, *terms, connection=connection)
        if isinstance(outcome, ConnectFailed):
            self.served += 1  # like a connect that fails later
            self.take_back(outcome, family, name, connection)
        else:
            self._connected(outcome, name)

    def take_back(self, failed: ConnectFailed, family: int, name: str = "", new: int = 0) -> None:
        """Hold a client whose connect has failed, at once or later; `new`: its id, if at once."""
        self.returned += 1
        name = name or self._loop.pop_label(failed.connection).partition(" → ")[0]
        about = name, failed.opened_ms, failed.peer
        client = HeldClient(failed.client, family, failed.pending, *about)
        client.listener = failed.listener
        client.connection = failed.connection
        client.id = failed.connection or new
        client.has_unsent = failed.has_unsent
        self.hold(client)
        waited_ms = self._relay.now_ms - failed.opened_ms
        silent = failed.error == errno.ETIMEDOUT and waited_ms >= self.connect_ms
        if silent and self.timeout_ms != 0:
            self._source.failed()  # no answer yet, which is not a failure
        else:
            self._connect_failed(client, failed.error)

    @property
    def connect_ms(self) -> int:
        """How long a connect of the relay may take; 0: as long as the kernel tries."""
        several = self._source.several
        if self.timeout_ms == 0:
            return STAGGER_MS if several else 0
        longest_ms = STAGGER_MS if several else SILENT_MS
        return longest_ms if self.timeout_ms is None else min(self.timeout_ms, longest_ms)

    def drop_all(self) -> int:
        """Cut all held clients; return their number."""
        count = self.held.cut_all()
        self._rest_if_none_held()
        return count

    def hold(self, client: HeldClient) -> None:
        """Hold a client, whose fd is owned from now on."""
        self.outage.client_held(self._relay.now_ms, first=not self.held)
        self.held.add(client)

    def _connect_failed(self, client: HeldClient, error: int) -> None:
        """The relay could not connect `client`, which is held now."""
        self._source.failed()
        address = self._source.only
        if address is None:
            return  # step() will try all addresses of the name
        if self.timeout_ms == 0 or not is_temporary(error, address):
            self._give_up(client, self._reason(error))
        elif is_congestion(error, address):
            self._note_congestion(error)
        else:
            self._late_error = error

    def _client_left(self, client: HeldClient, how: str) -> None:
        self._rest_if_none_held()
        if client.name:
            log.debug(f"{client.name} → {self.text}: {how} while it was held.")

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────

    def next_ms(self) -> int | None:
        """When to call step() at the latest; None: not before the next event."""
        times = [self._deadline_ms, self._next_round_ms(), self._attempts.next_ms]
        times.append(self.outage.next_ms)
        return min((time for time in times if time is not None), default=None)

    def _next_round_ms(self) -> int | None:
        """When the next round of attempts may begin; None: after an event."""
        if self._attempts.running and not self._round_is_set:
            return None
        if not self._source.looking:
            return self._round_ms
        late_ms = self._source.late_ms
        return None if late_ms is None else max(late_ms, self._round_ms)

    def step(self, now_ms: int) -> None:
        """Do what is due for the held clients."""
        if self._late_error:
            error, self._late_error = self._late_error, 0
            self._note_outage(self._reason(error), denied=is_denied(error))
        while self.held and self._attempt(now_ms):
            pass
        self._expire(now_ms)
        if self.held:
            self.outage.step(now_ms)
        self._rest_if_none_held()

    def _attempt(self, now_ms: int) -> bool:
        """Make the attempts that are due; return True if there may be more to do at once."""
        attempts = self._attempts
        if now_ms >= self._round_ms and (self._round_is_set or not attempts.running):
            addresses = self._addresses(now_ms)
            if addresses:
                attempts.begin(addresses, now_ms)
                self._round_is_set = False
            elif not attempts.running:
                return False
        attempts.must_settle = not self._proven
        attempts.step(now_ms, self._wanted(), len(self.held))
        if self._serve_winners():
            return True
        if attempts.over:
            return self._round_failed()
        self._set_next_round(now_ms)
        self._note_silence(now_ms)
        return False

    def _wanted(self) -> int:
        """Return how many connections to attempt at once."""
        if not self.outage.up or not self._proven:
            return 1
        return len(self.held) if self._attempts.preferred else min(len(self.held), FIRST_FEW)

    def _serve_winners(self) -> bool:
        """Give each new connection to the oldest client; return True if there was one."""
        any_winner = False
        while self.held and (winner := self._attempts.take_winner()) is not None:
            any_winner = True
            if not winner.proven and not self.held.expects_end():
                self._loop.hang_up(winner.fd, reset=True)  # the client that expected it has left
                continue
            if winner.proven:
                self.outage.succeed()
                self._proven = True
                self._source.succeeded(winner.address, winner.took_ms < STAGGER_MS // 2)
            self._serve(winner)
        return any_winner

    def _serve(self, winner: Winner) -> None:
        client = next(iter(self.held))
        try:
            connection = self.held.serve(client, winner.fd, winner.error, self.target.index)
        except OSError as failed:
            self._loop.hang_up(winner.fd, reset=True)
            self.hold(client)
            self._note_outage(self._reason(failed.errno or errno.EIO))
        else:
            self._connected(connection, client.name)

    def _connected(self, connection: int, name: str) -> None:
        self.served += 1
        self._loop.set_label(connection, f"{name} → {self.text}")

    def _round_failed(self) -> bool:
        """All addresses have failed since the last connection.

        Clients wait on, or are given up; return True if there is to be another round at once.
        """
        attempts = self._attempts
        error = attempts.error
        attempts.end_round()
        if error == 0:
            return True  # the round has ended with a connection
        if attempts.temporary and self.timeout_ms != 0:
            if attempts.congested:
                self._note_congestion(error)
            else:
                self._note_outage(self._reason(error), denied=is_denied(error))
            return False
        for client in list(self.held)[: attempts.failures if self.outage.up else 1]:
            self._give_up(client, self._reason(error))
        return True

    def _set_next_round(self, now_ms: int) -> None:
        """Set when to begin the next round while addresses of this one are still silent.

        Addresses that have failed are tried again, and a name may have another address by then.
        """
        attempts = self._attempts
        if self._round_is_set or not attempts.tried or self.timeout_ms == 0:
            return
        if attempts.partly_failed:
            self._round_ms = self.outage.next_probe_ms(now_ms)
        elif self._source.fixed is None:
            self._round_ms = now_ms + SILENT_MS
        else:
            return
        self._round_is_set = True

    def _note_silence(self, now_ms: int) -> None:
        """A target that has been silent for SILENT_MS is an outage; its attempts go on."""
        since_ms = self._attempts.silent_since_ms
        if not self.outage.up or self._attempts.settling or self.timeout_ms == 0:
            return
        if since_ms is not None and now_ms - since_ms >= SILENT_MS:
            round_ms = self._round_ms
            self._note_outage(self._reason(self._attempts.error or errno.ETIMEDOUT))
            self._round_ms = round_ms

    def _expire(self, now_ms: int) -> None:
        """Give up the clients whose time is over."""
        while self._deadline_ms is not None and now_ms >= self._deadline_ms:
            if self._attempts.error:
                self.outage.why = self._reason(self._attempts.error)
            reason = self.outage.why or self._reason(errno.ETIMEDOUT)
            self._give_up(next(iter(self.held)), reason)

    @property
    def _deadline_ms(self) -> int | None:
        """Until when the oldest client may wait. A connection that settles has been reached."""
        oldest = self.held.oldest
        if oldest is None or not self.timeout_ms:
            return None
        return max(oldest.since_ms + self.timeout_ms, self._attempts.settled_ms or 0)

    # ── outages ───────────────────────────────────────────────────────────────────────────────────

    def _note_outage(self, reason: str, *, denied: bool = False) -> None:
        """The target cannot be reached: log it once, and set the next probe."""
        self._proven = self._attempts.settle_ms == 0
        self._attempts.must_settle = not self._proven
        self._round_ms = self.outage.fail(
            reason, self._relay.now_ms, len(self.held), cold=self.connected <= 0, denied=denied
        )

    @property
    def connected(self) -> int:
        """The number of connections brought to the target, including those still connecting."""
        by_relay = sum([one.connected_count for one in self._relay_listeners])
        return self.served + by_relay - self.returned

    def _note_congestion(self, error: int) -> None:
        """The target is up, but its backlog is full."""
        now_ms, held = self._relay.now_ms, len(self.held)
        self._round_ms = self.outage.congest(self._reason(error), now_ms, held)

    def _reason(self, error: int) -> str:
        return describe(error, self._source.only, self.text, source=self.target.source)

    def _give_up(self, client: HeldClient, reason: str) -> None:
        self.held.give_up(client, reason)
        self._rest_if_none_held()
        self.outage.given_up(reason, client.peer)

    def _rest_if_none_held(self) -> None:
        """Stop the attempts, and end the outage if there was one, once no client is held."""
        if not self.held:
            self._attempts.stop()
            self._late_error = 0
            self.outage.end(self._relay.now_ms)

    # ── addresses ─────────────────────────────────────────────────────────────────────────────────

    def _addresses(self, now_ms: int) -> list[bytes]:
        """Return where to connect to; nothing during a look-up, or if it has failed."""
        addresses = self._source.addresses(now_ms)
        if not addresses and self._source.failure:
            self._lookup_failed()
        return addresses

    def _lookup_failed(self) -> None:
        """Without an address, all clients wait on, or are given up."""
        source = self._source
        if self.timeout_ms == 0 and source.looking:
            return  # it is late, but it is the only attempt
        if not source.looking:
            self._attempts.stop()  # its addresses do not belong to the target any more
        if source.temporary and self.timeout_ms != 0:
            self._note_outage(source.failure)
            self._round_ms = max(self._round_ms, self._relay.now_ms + source.pause_ms)
        elif self._attempts.pending == 0:
            for client in list(self.held):
                self._give_up(client, source.failure)
