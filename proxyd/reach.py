"""The way to one target, and the clients that wait for it.

Socket activation promises that a client waits while the service starts. So a target that cannot
be reached yet is an outage, not an error: its clients are held, the oldest of them tries again
and again (one probe, however many wait; its own connection, since an empty one would upset
one-shot servers), and once it gets through all the others follow.
"""

import errno
import os

from proxyd import address as sockaddr
from proxyd import log
from proxyd.listen import Listener
from proxyd.loop import EPOLLET, Loop
from proxyd.race import RETRYABLE, STAGGER_MS, Race
from proxyd.target import Target

TYPE_CHECKING = False  # as typing has it; a literal target never loads the resolver
if TYPE_CHECKING:
    import _socket

    from proxyd._relay import Event
    from proxyd.resolver import Resolver

PROBE_MS = 10
"""Pause between two probes at first …"""

EAGER_MS = 150
"""… for so long; then the pause doubles …"""

PROBE_SLOWEST_MS = 250
"""… up to this."""

LOOKUP_MS = 1000
"""Pause between two look-ups of a name that is not there yet."""

ACCESS_MS = 1000
"""How long EACCES may be the moment between a server's bind(2) and chmod(2) of its socket."""


class Client:
    """An accepted client that waits. It owns its fd, and is in `Reach.held`."""

    __slots__ = ("deadline_ms", "fd", "listener", "name", "pending", "race", "since_ms")

    def __init__(
        self, fd: int, listener: Listener, pending: bytes | None, name: str, since_ms: int
    ) -> None:
        self.fd = fd
        self.listener = listener
        self.pending = pending
        """What the target must get first: a PROXY header, bytes already taken from the client."""
        self.name = name
        """Its address, for log lines at debug level; "" otherwise."""
        self.since_ms = since_ms
        self.deadline_ms: int | None = None
        self.race: Race | None = None


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
        self._resolver = resolver
        self.target = target
        self.port = port
        """With `HOST:*` the listener's."""
        self._host = target.host
        self.timeout_ms = timeout_ms
        """How long a client is held; 0: one attempt, None: for ever."""
        self._address = target.address
        """The packed address of a literal target."""
        if target.any_port and target.address is not None:
            self._address = sockaddr.with_port(target.address, port)
        self.text = target.text.removesuffix("*") + str(port) if target.any_port else target.text
        self.held: dict[int, Client] = {}
        """By fd, the oldest first."""
        self.served = 0
        """Connections begun here; the gates count their own."""
        self.returned = 0
        """Of all of them, those that the target did not answer."""
        self.failed = 0
        """Clients given up."""
        self._good = b""
        """Of a name: the address that answered last, and promptly."""
        self._looking = False
        """A look-up is under way."""
        self._answer: list[bytes] = []
        self._lookup_error: _socket.gaierror | None = None
        self._racing: dict[int, Client] = {}
        """Those of `held` that have an attempt under way."""
        self._finished: list[Client] = []
        """Those of `held` whose attempt has ended, either way."""
        self._up = True
        """Whether to believe that the target can be reached: if not, only one probes."""
        self._down_ms: int | None = None
        """Since when there is an outage."""
        self._why = ""
        """The last reason, for the log."""
        self._held_total = 0
        """Clients that had to wait in this outage."""
        self._eager_until_ms = 0
        self._pause_ms = PROBE_MS
        self._probe_ms = 0
        """When the next probe is due."""
        self._first_deadline_ms: int | None = None

    @property
    def express(self) -> bytes | None:
        """Where the relay may connect clients to without asking; None while there is doubt."""
        return self._address if self._up and not self.held else None

    # ── clients come ─────────────────────────────────────────────────────────────────────────

    def take(
        self, fd: int, listener: Listener, cookie: int, header: bytes | None, name: str
    ) -> None:
        """Serve an accepted client; its fd is owned from now on.

        While all is well the relay does it all: one call, and no state in Python.
        """
        address = self._address if self._host is None else self._prompt_address()
        if address is None or not self._up or self.held:
            self._hold(Client(fd, listener, header, name, self._relay.now_ms))
            return
        timeout_ms = self.timeout_ms if self._host is None else STAGGER_MS
        try:
            number = self._relay.connect(
                fd, listener.family, address, header, cookie, timeout_ms or 0
            )
        except OSError as failure:
            client = Client(fd, listener, header, name, self._relay.now_ms)
            self._hold(client)
            self._connect_failed(client, failure.errno or errno.EIO)
        else:
            self._entered(number, name)

    def take_back(self, listener: Listener, event: "Event") -> None:
        """A connect of the relay has failed: the client is ours again. `event` is a FAILED one."""
        _, fd, error, _, pending, since_ms, number = event
        self.returned += 1
        note = self._loop.notes.pop(number, "") if self._loop.notes is not None else ""
        client = Client(fd, listener, pending, note.partition(" → ")[0], since_ms)
        self._hold(client)
        self._connect_failed(client, error)

    def _connect_failed(self, client: Client, error: int) -> None:
        """The relay could not connect a client, who is held now."""
        if self._host is None:
            self._attempt_failed(client, error)
        else:
            self._good = b""  # step() tries all the addresses of the name

    def drop_all(self) -> int:
        """Close all who wait; how many they were."""
        count = len(self.held)
        for client in list(self.held.values()):
            self._close(client)
        return count

    # ── time goes by ─────────────────────────────────────────────────────────────────────────

    def next_ms(self) -> int | None:
        """When step() is to be called at the latest, None: not before the next event."""
        times = [client.race.next_ms for client in self._racing.values() if client.race]
        times.append(self._first_deadline_ms)
        if not self._up and not self._racing and not self._looking:
            times.append(self._probe_ms)
        return min((time for time in times if time is not None), default=None)

    def step(self, now_ms: int) -> None:
        """Go on with those who wait."""
        for client in list(self._racing.values()):
            if client.race and client.race.next_ms is not None and now_ms >= client.race.next_ms:
                client.race.step(now_ms)
        finished, self._finished = self._finished, []  # those that have ended just now as well
        for client in finished:
            self._race_ended(client)
        if self._first_deadline_ms is not None and now_ms >= self._first_deadline_ms:
            self._expire(now_ms)
        while self._start_some(now_ms):
            pass
        if self._up and not self.held:
            self._end_outage(now_ms)

    def _start_some(self, now_ms: int) -> bool:
        """Start the attempts that are due; True if there may be more."""
        due = self._due(now_ms)
        addresses = self._addresses(now_ms) if due else None
        if not addresses:
            return False
        for client in due:
            self._start(client, addresses, now_ms)
            if not self._up:
                return False
        return True

    def _due(self, now_ms: int) -> list[Client]:
        """Who may try now: everybody while all is well, otherwise the oldest from time to time."""
        if self._up:
            return [client for client in self.held.values() if client.race is None]
        if self._racing or now_ms < self._probe_ms:
            return []
        return list(self.held.values())[:1]

    def _expire(self, now_ms: int) -> None:
        """Give up those who have waited for as long as they may."""
        for client in list(self.held.values()):
            if client.deadline_ms is not None and now_ms >= client.deadline_ms:
                if client.race is not None and client.race.error:
                    self._why = self._reason(client.race.error)
                self._give_up(client, self._why or self._reason(errno.ETIMEDOUT))
        self._first_deadline_ms = min(
            (c.deadline_ms for c in self.held.values() if c.deadline_ms is not None), default=None
        )

    # ── one client's attempt ─────────────────────────────────────────────────────────────────

    def _start(self, client: Client, addresses: list[bytes], now_ms: int) -> None:
        client.race = Race(self._loop, addresses, lambda: self._finished.append(client))
        self._racing[client.fd] = client
        if client.race.start(now_ms):
            self._race_ended(client)

    def _race_ended(self, client: Client) -> None:
        race, client.race = client.race, None
        if race is None:
            return  # the client has gone meanwhile
        del self._racing[client.fd]
        if race.fd < 0:
            self._attempt_failed(client, race.error)
            return
        self._up = True
        prompt = self._relay.now_ms - client.since_ms < STAGGER_MS // 2
        self._good = race.address if prompt else b""
        self._unhold(client)
        try:
            number = self._relay.adopt(
                client.fd, client.listener.family, race.fd, client.pending, race.error
            )
        except OSError as failure:
            self._relay.hang_up(race.fd)
            self._hold(client)
            self._attempt_failed(client, failure.errno or errno.EIO)
        else:
            self._entered(number, client.name)

    def _attempt_failed(self, client: Client, error: int) -> None:
        """A client waits on, or is given up."""
        reason = self._reason(error)
        if self._hopeful(client, error):
            self._outage(reason)
        else:
            self._give_up(client, reason)

    def _hopeful(self, client: Client, error: int) -> bool:
        """Tell whether the target may be there later."""
        if self.timeout_ms == 0:
            return False
        if error == errno.EACCES and self._is_unix():
            return self._relay.now_ms - client.since_ms < ACCESS_MS
        return error in RETRYABLE

    def _is_unix(self) -> bool:
        return self._address is not None and sockaddr.family(self._address) == sockaddr.AF_UNIX

    def _entered(self, number: int, name: str) -> None:
        self.served += 1
        if self._loop.notes is not None:
            self._loop.notes[number] = f"{name} → {self.text}"

    def _reason(self, error: int) -> str:
        if error == errno.ELOOP and not self._is_unix():
            text = "it met itself, since nobody listens there"
        else:
            text = os.strerror(error)
        return f"Failed to connect to remote host: {text} ({self.text})"

    # ── outages ──────────────────────────────────────────────────────────────────────────────

    def _outage(self, reason: str) -> None:
        """The target cannot be reached: note it once, and set the next probe."""
        now_ms = self._relay.now_ms
        self._why = reason
        self._up = False
        if self._down_ms is None:
            self._down_ms = now_ms
            self._held_total = len(self.held)
            log.limited(f"outage {self.text}", f"{reason}, holding clients until it answers.")
        if now_ms < self._eager_until_ms:
            self._pause_ms = PROBE_MS
        else:
            self._pause_ms = min(self._pause_ms * 2, PROBE_SLOWEST_MS)
        self._probe_ms = now_ms + self._pause_ms

    def _end_outage(self, now_ms: int) -> None:
        if self._down_ms is None:
            return
        span = _span_text(now_ms - self._down_ms)
        clients = "1 client was" if self._held_total == 1 else f"{self._held_total} clients were"
        log.limited(
            f"reached {self.text}", f"{self.text} answers after {span}, {clients} held.", log.INFO
        )
        self._down_ms = None
        self._why = ""

    # ── who is held ──────────────────────────────────────────────────────────────────────────

    def _hold(self, client: Client) -> None:
        if not self.held:
            self._eager_until_ms = self._relay.now_ms + EAGER_MS
            self._pause_ms = PROBE_MS
        self._held_total += 1
        youngest = next(reversed(self.held.values()), client)
        self.held[client.fd] = client
        if client.since_ms < youngest.since_ms:  # its connect has failed late
            self.held = dict(sorted(self.held.items(), key=lambda item: item[1].since_ms))
        if self.timeout_ms:
            client.deadline_ms = client.since_ms + self.timeout_ms
            if self._first_deadline_ms is None or client.deadline_ms < self._first_deadline_ms:
                self._first_deadline_ms = client.deadline_ms
        try:
            # For what is always reported, EPOLLERR and EPOLLHUP, and once.
            self._loop.watch(client.fd, lambda _events: self._close(client), EPOLLET)
        except OSError:
            pass  # then a hang-up is noticed later, by the relay

    def _unhold(self, client: Client) -> None:
        self._loop.unwatch(client.fd)
        del self.held[client.fd]

    def _close(self, client: Client) -> None:
        """Drop a client: it hung up, or we give up."""
        if client.race is not None:
            client.race.cancel()
            client.race = None
            self._racing.pop(client.fd, None)
        self._unhold(client)
        self._relay.hang_up(client.fd)
        if self._up and not self.held:
            self._end_outage(self._relay.now_ms)

    def _give_up(self, client: Client, reason: str) -> None:
        self._close(client)
        self.failed += 1
        log.limited(f"failed {self.text}", f"{reason}.", log.ERROR)

    # ── names ────────────────────────────────────────────────────────────────────────────────

    def _prompt_address(self) -> bytes | None:
        """The address that answered last, promptly, while the look-up is fresh."""
        if not self._good or self._resolver is None or self._host is None:
            return None
        return self._good if self._resolver.fresh(self._host, self._relay.now_ms) else None

    def _addresses(self, now_ms: int) -> list[bytes]:
        """Where to connect to; nothing while that is looked up, or if it cannot be known."""
        if self._host is None or self._resolver is None:
            return [self._address] if self._address is not None else []
        if self._looking:
            return []
        self._looking = True
        self._resolver.ask(self._host, now_ms, self._resolved)
        if self._looking:
            return []  # step() comes again when the answer does, and then it is fresh
        if self._lookup_error is not None:
            self._lookup_failed(self._lookup_error, self._host)
        return self._answer

    def _resolved(self, addresses: list[bytes], error: "_socket.gaierror | None") -> None:
        """The resolver's answer, perhaps from within ask()."""
        self._looking = False
        self._lookup_error = error
        self._answer = [sockaddr.with_port(address, self.port) for address in addresses]
        if self._good not in self._answer:
            self._good = b""

    def _lookup_failed(self, error: "_socket.gaierror", host: bytes) -> None:
        from proxyd.resolver import RETRYABLE as PASSING

        reason = f"Failed to resolve host: {error.strerror} ({host.decode()})"
        if error.errno in PASSING and self.timeout_ms != 0:
            self._outage(reason)
            self._probe_ms = self._relay.now_ms + LOOKUP_MS
            return
        for client in list(self.held.values()):
            if client.race is None:
                self._give_up(client, reason)


def _span_text(ms: int) -> str:
    """A span for people, even where there is no fd left to load the module that knows how."""
    try:
        from proxyd.timespan import format_usec
    except (OSError, ImportError):
        return f"{ms} ms"
    return format_usec(ms * 1000)
