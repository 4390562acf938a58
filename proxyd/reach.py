"""The way to one target, and the clients that wait for it.

Socket activation promises that a client waits while the service starts. So a target that cannot
be reached yet is an outage, not an error: its clients are held, one attempt after the other is
made for the oldest of them (one probe, however many wait; it becomes that client's connection,
since an empty one would upset one-shot servers), and once one gets through all the others follow.

Where a UNIX target's backlog is full, that is congestion and no outage: the clients wait in their
order, and as many as there is room for are let in every few milliseconds.
"""

import errno
import os

from proxyd import address as sockaddr
from proxyd import log
from proxyd._relay import ConnectFailed, peek, socket_error
from proxyd.connect_errors import is_congestion, is_denied, may_pass
from proxyd.listen import Listener
from proxyd.loop import EPOLLET, Loop
from proxyd.outage import Outage, Pace
from proxyd.race import LET_GO, SILENT_MS, STAGGER_MS, Race, Won
from proxyd.target import Target

TYPE_CHECKING = False  # as typing has it; a literal target never loads the resolver
if TYPE_CHECKING:
    from proxyd._relay import RelayListener
    from proxyd.lookup import Interface, Lookup
    from proxyd.resolver import Resolver

CONGESTION_MS = 5
"""Pause until a full backlog is tried again: the server may take a client at any moment."""

FIRST_FEW = 4
"""How many attempts are made at a target believed to be there before one has been answered."""


_COUNTERS = ("served", "returned", "failed", "gone", "cut")


class Client:
    """An accepted client that waits. It owns its fd, and is in `Reach.held`."""

    __slots__ = ("fd", "listener", "name", "pending", "since_ms", "taken")

    def __init__(
        self, fd: int, listener: Listener, pending: bytes | None, name: str, since_ms: int
    ) -> None:
        self.fd = fd
        self.listener = listener
        self.pending = pending
        """What the target must get first: a PROXY header, bytes already taken from the client."""
        self.taken = False
        """Whether some of that is the client's own."""
        self.name = name
        """Its address, for log lines at debug level; "" otherwise."""
        self.since_ms = since_ms

    def has_spoken(self) -> bool:
        """Tell whether there are bytes of it that no target has got yet."""
        return self.taken or peek(self.fd) > 0

    def has_left(self) -> bool:
        """Tell whether it is gone, for a hang-up: it has reset, or has nothing to say.

        A UNIX client that sends and closes hangs up too, but it has spoken and is served.
        """
        return socket_error(self.fd) != 0 or not self.has_spoken()

    def has_ended(self) -> bool:
        """Tell whether it has sent its end, and nothing before it."""
        return not self.taken and peek(self.fd) == 0


class Reach:
    """Brings clients to one target.

    Belongs to the main loop, which calls step() after every batch of events while there are
    clients in `held`, and when next_ms() says so.
    """

    def __init__(
        self,
        loop: Loop,
        resolver: "Resolver | None",
        target: Target,
        port: int,
        timeout_ms: int | None,
    ) -> None:
        self._loop = loop
        self._relay = loop.relay
        self.target = target
        self.port = port
        """With `HOST:*` the listener's."""
        self._lookup = _lookup_of(target, port, resolver)
        """None for a literal address."""
        self.timeout_ms = timeout_ms
        """How long a client is held; 0: one attempt, None: for ever."""
        self._address = target.address if self._lookup is None else None
        """The packed address of a literal target."""
        if target.any_port and self._address is not None:
            self._address = sockaddr.with_port(self._address, port)
        self.text = target.text.removesuffix("*") + str(port) if target.any_port else target.text
        self.kind = self.text
        """What the log limits its lines by, and the counters are summed up by."""
        self.held: dict[int, Client] = {}
        """By fd, the oldest first."""
        self.gates: list[RelayListener] = []
        """Those whose clients come here."""
        self.served = 0
        """Connections begun here; the gates count their own."""
        self.returned = 0
        """Of all of them, those that the target did not answer."""
        self.failed = 0
        """Clients given up."""
        self.gone = 0
        """Clients that left while they were held."""
        self.cut = 0
        """Clients that were held at the end of the program."""
        self._race = Race(loop, self._expects_end)
        self._race.repeats = timeout_ms != 0
        self._up = True
        """Whether to believe that the target can be reached: if not, only one probes."""
        self._congested = False
        """Whether its backlog was full when it was tried last."""
        self._proven = True
        """Whether a port that accepts means that the target is there."""
        self._outages = Outage(self.text)
        self._pace = Pace()
        self._probe_ms = 0
        """When the next round of attempts may begin."""
        self._announces = False
        """Whether clients come with a PROXY header."""
        self._late_error = 0
        """Of a connect of the relay; for step(), since others of the batch may have failed too."""

    def settle(self, settle_ms: int) -> None:
        """Watch the target for `settle_ms` before anything is sent to it, until it is proven.

        That is anew after each outage. 0: it is proven.
        """
        self._race.settle_ms = settle_ms
        self._proven = settle_ms == 0

    @property
    def express(self) -> bytes | None:
        """Where the relay may connect clients to without asking; None while there is doubt."""
        return self._address if self._up and self._proven and not self.held else None

    @property
    def connect_ms(self) -> int:
        """How long the relay may try before the client is ours again; 0: as long as the kernel."""
        several = self._lookup is not None and self._lookup.several
        if self.timeout_ms == 0:
            return STAGGER_MS if several else 0
        longest_ms = STAGGER_MS if several else SILENT_MS
        return longest_ms if self.timeout_ms is None else min(self.timeout_ms, longest_ms)

    @property
    def waiting(self) -> int:
        """How many clients wait for longer than a prompt look-up and connect take."""
        oldest = next(iter(self.held.values()), None)
        if oldest is None or (self._up and self._relay.now_ms - oldest.since_ms < STAGGER_MS):
            return 0
        return len(self.held)

    # ── clients come ─────────────────────────────────────────────────────────────────────────

    def take(
        self, fd: int, listener: Listener, index: int, header: bytes | None, name: str
    ) -> None:
        """Serve an accepted client; its fd is owned from now on. `index` is its listener's.

        While all is well the relay does it all: one call, and no state in Python.
        """
        self._announces = bool(header)
        address = self._address if self._lookup is None else self._prompt_address()
        if address is None or not self._up or not self._proven or self.held:
            self._hold(Client(fd, listener, header, name, self._relay.now_ms))
            return
        result = self._relay.connect(fd, listener.family, address, header, index, self.connect_ms)
        if isinstance(result, ConnectFailed):
            self.served += 1  # as with one that fails later
            self.take_back(listener, result, name)
        else:
            self._entered(result, name)

    def take_back(self, listener: Listener, failed: ConnectFailed, name: str = "") -> None:
        """A connect of the relay has failed, at once or later: the client is ours again."""
        self.returned += 1
        if self._loop.notes is not None:
            name = name or self._loop.notes.pop(failed.connection, "").partition(" → ")[0]
        client = Client(failed.client, listener, failed.pending, name, failed.opened_ms)
        # The relay reads nothing from a client whose PROXY header has not been sent.
        client.taken = bool(failed.pending) and not self._announces
        self._hold(client)
        waited_ms = self._relay.now_ms - failed.opened_ms
        silent = failed.error == errno.ETIMEDOUT and waited_ms >= self.connect_ms
        if not silent or self.timeout_ms == 0:  # otherwise it has only not answered yet
            self._connect_failed(client, failed.error)
        elif self._lookup is not None:
            self._lookup.lost()

    def _connect_failed(self, client: Client, error: int) -> None:
        """The relay could not connect a client, who is held now."""
        if self._lookup is not None:
            self._lookup.lost()
        address = self._address if self._lookup is None else self._lookup.only
        if address is None:
            return  # step() tries all the addresses of the name
        if self.timeout_ms == 0 or not may_pass(error, address):
            self._give_up(client, self._reason(error))
        elif is_congestion(error, address):
            self._congestion(error)
        else:
            self._late_error = error

    def drop_all(self) -> int:
        """Cut all who wait; how many they were."""
        clients = list(self.held.values())
        for client in clients:
            self._close(client, reset=True)
        self.cut += len(clients)
        return len(clients)

    def be_one_of(self, kind: str) -> None:
        """Be told and counted as one of many."""
        self.kind = self._outages.kind = kind

    def succeed(self, other: "Reach") -> None:
        """Count on for one of the same kind, which nobody uses any more."""
        for counter in _COUNTERS:
            setattr(self, counter, getattr(self, counter) + getattr(other, counter))
        other._race.stop()
        self._loop.races.remove(other._race)

    # ── time goes by ─────────────────────────────────────────────────────────────────────────

    def next_ms(self) -> int | None:
        """When step() is to be called at the latest, None: not before the next event."""
        times = [self._race.next_ms, self._deadline_ms, self._outages.next_ms, self._round_ms()]
        return min((time for time in times if time is not None), default=None)

    def _round_ms(self) -> int | None:
        """When the next round of attempts may begin, None: after an event."""
        if self._race.running and not self._race.paced:
            return None
        if self._lookup is None or not self._lookup.looking:
            return self._probe_ms
        late_ms = self._lookup.late_ms
        return None if late_ms is None else max(late_ms, self._probe_ms)

    def step(self, now_ms: int) -> None:
        """Go on with those who wait."""
        if self._late_error:
            error, self._late_error = self._late_error, 0
            self._outage(self._reason(error), denied=is_denied(error))
        while self.held and self._go_on(now_ms):
            pass
        self._expire(now_ms)
        if self.held:
            self._outages.step(now_ms)
        self._settle_down()

    def _go_on(self, now_ms: int) -> bool:
        """Make the attempts that are due; True if there may be more to do at once."""
        race = self._race
        if self._round_is_due(now_ms):
            addresses = self._addresses(now_ms)
            if addresses:
                race.begin(addresses, now_ms)
            elif not race.running:
                return False
        race.clients = len(self.held)
        race.watches = not self._proven
        race.step(now_ms, self._wanted())
        if self._serve_winners():
            return True
        if race.over:
            return self._round_failed()
        self._pace_round(now_ms)
        self._note_silence(now_ms)
        return False

    def _pace_round(self, now_ms: int) -> None:
        """Set when to begin anew although some addresses are still silent.

        Those that have failed are tried again, and a name may have another address by then.
        """
        race = self._race
        if race.paced or not race.tried or not race.repeats:
            return
        if race.partial:
            self._probe_ms = self._pace.next(now_ms)
        elif self._lookup is not None:
            self._probe_ms = now_ms + SILENT_MS
        else:
            return
        race.paced = True

    def _round_is_due(self, now_ms: int) -> bool:
        if self._race.running and not self._race.paced:
            return False
        return now_ms >= self._probe_ms

    def _wanted(self) -> int:
        """How many attempts to make at once."""
        if not self._up or not self._proven:
            return 1
        return len(self.held) if self._race.preferred else min(len(self.held), FIRST_FEW)

    def _round_failed(self) -> bool:
        """Every address has failed, since a connection was last made.

        Clients wait on, or are given up; True if there is to be another round at once.
        """
        race = self._race
        race.end_round()
        if race.error == 0:
            return True  # the round has ended with a connection
        reason = self._reason(race.error)
        if race.hopeful and self.timeout_ms != 0:
            if race.congested:
                self._congestion(race.error)
            else:
                self._outage(reason, denied=is_denied(race.error))
            return False
        for client in list(self.held.values())[: race.failures if self._up else 1]:
            self._give_up(client, reason)
        return True

    def _note_silence(self, now_ms: int) -> None:
        """A target that says nothing for SILENT_MS cannot be reached, as things stand."""
        since_ms = self._race.silent_since_ms
        if not self._up or since_ms is None or self._race.settling or self.timeout_ms == 0:
            return
        if now_ms - since_ms >= SILENT_MS:
            probe_ms = self._probe_ms
            self._outage(self._reason(self._race.error or errno.ETIMEDOUT))
            self._probe_ms = probe_ms  # the attempts under way go on

    @property
    def _deadline_ms(self) -> int | None:
        """Until when the oldest client may wait. A target that is watched has been reached."""
        oldest = next(iter(self.held.values()), None)
        if oldest is None or not self.timeout_ms:
            return None
        return max(oldest.since_ms + self.timeout_ms, self._race.settled_ms or 0)

    def _expire(self, now_ms: int) -> None:
        """Give up those who have waited for as long as they may."""
        while self._deadline_ms is not None and now_ms >= self._deadline_ms:
            if self._race.error:
                self._outages.why = self._reason(self._race.error)
            reason = self._outages.why or self._reason(errno.ETIMEDOUT)
            self._give_up(next(iter(self.held.values())), reason)

    # ── connections are made ─────────────────────────────────────────────────────────────────

    def _serve_winners(self) -> bool:
        """Give each new connection to the oldest client; True if there was one."""
        some = bool(self._race.won)
        while self._race.won and self.held:
            won = self._race.won.pop(0)
            if not won.proven and not self._expects_end():
                self._relay.hang_up(won.fd, True)  # whoever expected it has just left
                continue
            if won.proven:
                self._up = self._proven = True
                self._congested = False
                if self._lookup is not None:
                    self._lookup.won(won.address, won.took_ms < STAGGER_MS // 2)
            self._serve(next(iter(self.held.values())), won)
        return some

    def _serve(self, client: Client, won: Won) -> None:
        self._unhold(client)
        try:
            number = self._relay.adopt(
                client.fd, client.listener.family, won.fd, client.pending, won.error
            )
        except OSError as failed:
            self._relay.hang_up(won.fd, True)
            self._hold(client)
            self._outage(self._reason(failed.errno or errno.EIO))
        else:
            self._entered(number, client.name)

    def _entered(self, number: int, name: str) -> None:
        self.served += 1
        if self._loop.notes is not None:
            self._loop.notes[number] = f"{name} → {self.text}"

    def _expects_end(self) -> bool:
        """Tell whether the oldest client has ended without a word.

        A target that does so too is no reason to hold it.
        """
        client = next(iter(self.held.values()), None)
        return client is not None and client.has_ended()

    # ── outages ──────────────────────────────────────────────────────────────────────────────

    def _outage(self, reason: str, *, denied: bool = False) -> None:
        """The target cannot be reached: note it once, and set the next probe."""
        now_ms = self._relay.now_ms
        cold = not self._was_reached()
        self._up = False
        self._proven = self._race.settle_ms == 0
        self._race.watches = not self._proven
        self._outages.fail(reason, now_ms, len(self.held), cold=cold, denied=denied)
        self._probe_ms = self._pace.next(now_ms)

    def _congestion(self, error: int) -> None:
        """The target is there, and has no room just now."""
        now_ms = self._relay.now_ms
        self._up = self._congested = True
        self._outages.congest(self._reason(error), now_ms, len(self.held))
        self._probe_ms = now_ms + CONGESTION_MS

    def _was_reached(self) -> bool:
        """Tell whether a connection was ever made."""
        return self.served + sum([gate.connected_count for gate in self.gates]) > self.returned

    def _settle_down(self) -> None:
        """Nobody is held any more: an attempt too many is no use, and an outage may be over."""
        if self.held:
            return
        self._race.stop()
        self._late_error = 0
        if self._up:
            self._outages.end(self._relay.now_ms, answered=not self._congested)

    def _reason(self, error: int) -> str:
        if error == errno.ELOOP and not self._is_unix():
            text = "it met itself, since nobody listens there"
        elif error == LET_GO:
            text = "it accepts and closes at once"
        else:
            text = os.strerror(error)
        return f"Failed to connect to remote host: {text} ({self.text})"

    def _is_unix(self) -> bool:
        return self._address is not None and sockaddr.family(self._address) == sockaddr.AF_UNIX

    # ── who is held ──────────────────────────────────────────────────────────────────────────

    def _hold(self, client: Client) -> None:
        if not self.held:
            self._pace.begin(self._relay.now_ms)
        self._outages.held()
        youngest = next(reversed(self.held.values()), client)
        self.held[client.fd] = client
        if client.since_ms < youngest.since_ms:  # its connect has failed late
            self.held = dict(sorted(self.held.items(), key=lambda item: item[1].since_ms))
        try:
            # For what is always reported, EPOLLERR and EPOLLHUP, and once.
            self._loop.watch(client.fd, lambda _events: self._hung_up(client), EPOLLET)
        except OSError:
            pass  # then a hang-up is noticed later, by the relay

    def _hung_up(self, client: Client) -> None:
        if not client.has_left():
            return
        self._close(client)
        self.gone += 1
        if client.name:
            log.debug(f"{client.name} → {self.text}: client gone while it was held.")

    def _unhold(self, client: Client) -> None:
        self._loop.unwatch(client.fd)
        del self.held[client.fd]

    def _close(self, client: Client, reset: bool = False) -> None:
        """Let a client go: it has left, we give up, or (a reset) the program ends."""
        self._unhold(client)
        self._relay.hang_up(client.fd, reset)
        self._settle_down()

    def _give_up(self, client: Client, reason: str) -> None:
        """Close it plainly, as the original does; what it has sent makes that a reset."""
        self._close(client)
        self.failed += 1
        log.limited(f"failed {self.kind}", f"{reason}.", log.ERROR)

    # ── names ────────────────────────────────────────────────────────────────────────────────

    def _prompt_address(self) -> bytes | None:
        """Where to connect a client to without holding it; None where that is not known."""
        return self._lookup.prompt(self._relay.now_ms) if self._lookup is not None else None

    def _addresses(self, now_ms: int) -> list[bytes]:
        """Where to connect to; nothing while that is looked up, or if it cannot be known."""
        if self._lookup is None:
            return [self._address] if self._address is not None else []
        addresses = self._lookup.addresses(now_ms)
        if not addresses and self._lookup.failure:
            self._lookup_failed(self._lookup)
        return addresses

    def _lookup_failed(self, lookup: "Lookup | Interface") -> None:
        """Nobody can be connected now: all wait on, or are given up."""
        if self.timeout_ms == 0 and lookup.looking:
            return  # late, but it is the one attempt that there is
        if not lookup.looking:
            self._race.stop()  # its addresses are not the target's any more
        if lookup.passes and self.timeout_ms != 0:
            self._outage(lookup.failure)
            self._probe_ms = max(self._probe_ms, self._relay.now_ms + lookup.pause_ms)
        elif self._race.under_way == 0:
            for client in list(self.held.values()):
                self._give_up(client, lookup.failure)


def _lookup_of(
    target: Target, port: int, resolver: "Resolver | None"
) -> "Lookup | Interface | None":
    if target.scope:
        from proxyd.lookup import Interface

        return Interface(target, port)
    if target.host is not None and resolver is not None:
        from proxyd.lookup import Lookup

        return Lookup(target.host, port, resolver)
    return None
