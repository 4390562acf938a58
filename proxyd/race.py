"""The connects to one target that are under way, whoever will get them.

They are staggered over its addresses (RFC 8305). A host that is silent, since it boots or is being
woken, is tried by the kernel's SYNs at 1, 3, 7, 15 s only; so an attempt that has waited for
SILENT_MS gets another one alongside, and the first that answers wins. Nothing is sent on any of
them here: any connection will do for any client, and one too many is reset.
"""

import errno
from _collections_abc import Callable

from proxyd._relay import connected, peek
from proxyd.connect_errors import is_congestion, may_pass, was_reached
from proxyd.loop import Loop

STAGGER_MS = 250
"""Connection Attempt Delay, RFC 8305 section 5."""

SILENT_MS = 1000
"""An attempt without an answer gets another one alongside after this."""

SPARE = 3
"""Attempts to one target beyond those that its clients want, …"""

MOST = 32
"""… and all attempts to it."""

SPARE_ALL = 4
"""Attempts to all targets beyond one for each held client: limits.py keeps fds for them."""

LET_GO = errno.ECONNABORTED
"""Race.error where a target that was to be watched has accepted, and closed or reset."""


class Route:
    """One address in a round of attempts."""

    __slots__ = ("address", "dialled_ms", "pending")

    def __init__(self, address: bytes) -> None:
        self.address = address
        self.dialled_ms: int | None = None
        """When last; None: its turn has not come."""
        self.pending = 0
        """Attempts under way."""


class Attempt:
    """A socket that is connecting, or connected and watched."""

    __slots__ = ("route", "settled_ms", "since_ms")

    def __init__(self, route: Route, since_ms: int) -> None:
        self.route = route
        self.since_ms = since_ms
        self.settled_ms: int | None = None
        """When it has been watched for long enough; None: it is not connected yet."""


class Won:
    """A connected socket for a client; the taker's to adopt or to reset."""

    __slots__ = ("address", "error", "fd", "proven", "took_ms")

    def __init__(self, fd: int, address: bytes, error: int, took_ms: int, proven: bool) -> None:
        self.fd = fd
        self.address = address
        self.error = error
        """With which the target has already gone again; 0: it has not."""
        self.took_ms = took_ms
        self.proven = proven
        """False: it was let go while it was watched."""


class Race:
    """Attempts at one target, in rounds over its addresses.

    begin() starts a round, step() makes the attempts that are due, `won` has the sockets that are
    connected. A round is `over` when every address has been tried and nothing is under way.
    """

    __slots__ = (
        "_attempts",
        "_expects_end",
        "_loop",
        "_routes",
        "_stagger_ms",
        "clients",
        "congested",
        "error",
        "failures",
        "hopeful",
        "next_ms",
        "paced",
        "preferred",
        "repeats",
        "settle_ms",
        "silent_since_ms",
        "watches",
        "won",
    )

    def __init__(self, loop: Loop, expects_end: Callable[[], bool]) -> None:
        """`expects_end` tells whether the next client has ended already, without a word.

        Then a target that lets go while it is watched is what this client wants to see.
        """
        self._loop = loop
        self._expects_end = expects_end
        self._routes: list[Route] = []
        self._attempts: dict[int, Attempt] = {}
        self._stagger_ms = 0
        """When the next address has its turn."""
        self.won: list[Won] = []
        self.clients = 0
        """How many are held; the caller's to keep right."""
        self.settle_ms = 0
        """For how long a new connection is watched …"""
        self.watches = False
        """… before anybody gets it, if at all."""
        self.repeats = True
        """Whether an address that is silent gets another attempt."""
        self.paced = False
        """For the caller: that it has set when to begin anew, although the round goes on."""
        self.preferred = b""
        """The address that has answered, to be tried first."""
        self.error = 0
        """Of this round, since a connection was last made: the one that promises most."""
        self.hopeful = False
        """Whether it may pass."""
        self.congested = False
        """Whether it is a full backlog."""
        self.failures = 0
        """How many attempts at the first address have failed, since a connection was made."""
        self.silent_since_ms: int | None = None
        """Since when there are attempts and no connection."""
        self.next_ms: int | None = None
        """When to call step() at the latest, None: not before the next event."""
        loop.races.append(self)

    @property
    def running(self) -> bool:
        """Whether a round has begun."""
        return bool(self._routes)

    @property
    def under_way(self) -> int:
        """How many attempts there are."""
        return len(self._attempts)

    @property
    def tried(self) -> bool:
        """Whether every address has had its turn."""
        return self.running and all(map(self._has_had_turn, self._routes))

    @property
    def over(self) -> bool:
        """Whether the round has ended."""
        return self.tried and not self._attempts

    @property
    def partial(self) -> bool:
        """Whether some addresses have failed and others are silent."""
        return self.tried and not all(route.pending for route in self._routes)

    @property
    def settling(self) -> bool:
        """Whether a connection is being watched."""
        return self.settled_ms is not None

    @property
    def settled_ms(self) -> int | None:
        """When one that is watched has been watched for long enough, None: none is."""
        times = [attempt.settled_ms for attempt in self._attempts.values()]
        return min((time for time in times if time is not None), default=None)

    # ── what the policy does ─────────────────────────────────────────────────────────────────

    def begin(self, addresses: list[bytes], now_ms: int) -> None:
        """Start a round. What is under way to one of `addresses` goes on."""
        pending = {route.address: route for route in self._routes if route.pending}
        order = sorted(addresses, key=lambda address: address != self.preferred)
        self._routes = [
            pending.pop(address) if address in pending else Route(address) for address in order
        ]
        for fd in [fd for fd, one in self._attempts.items() if one.route.address in pending]:
            self._close(fd)
        self._stagger_ms = now_ms
        self.paced = False
        self._forget_errors()
        if self.silent_since_ms is None:
            self.silent_since_ms = now_ms

    def end_round(self) -> None:
        """Have the next begin() try every address anew."""
        self._routes = []
        self.paced = False
        self.silent_since_ms = None

    def step(self, now_ms: int, wanted: int) -> None:
        """Make the attempts that are due, for `wanted` connections."""
        self.next_ms = None
        for fd in [fd for fd, one in self._attempts.items() if one.settled_ms is not None]:
            if fd in self._attempts:  # one that has won has ended others
                self._look(fd)
        if not self.settling:
            self._dial_all_due(now_ms, wanted)
        if self.settling:
            self.next_ms = self.settled_ms

    def stop(self) -> None:
        """Nobody is left to connect. A target that may have accepted sees a reset."""
        for fd in list(self._attempts):
            self._close(fd)
        for won in self.won:
            self._loop.relay.hang_up(won.fd, True)
        self.won = []
        self.preferred = b""
        self.next_ms = None
        self.end_round()

    # ── attempts ─────────────────────────────────────────────────────────────────────────────

    def _dial_all_due(self, now_ms: int, wanted: int) -> None:
        most = min(wanted + SPARE, MOST)
        while len(self._attempts) > most:
            self._close(next(iter(self._attempts)))
        if self._routes:
            self._dial_first(now_ms, wanted, most)
        for route in self._routes:
            if len(self.won) >= wanted or self.settling:
                return
            if not self._dial_due(route, now_ms, most):
                return
        for route in self._routes:
            if self.repeats and route.pending and route.dialled_ms is not None:
                self._wake_at(max(route.dialled_ms + SILENT_MS, now_ms + 1))

    def _dial_first(self, now_ms: int, wanted: int, most: int) -> None:
        """Make as many attempts at the first address as there are connections wanted."""
        route = self._routes[0]
        if route.dialled_ms is not None and not route.pending:
            return  # it has failed in this round
        while len(self._attempts) + len(self.won) < wanted and not self.settling:
            if not self._dial(route, now_ms, most):
                return
            self._stagger_ms = now_ms + STAGGER_MS

    def _dial_due(self, route: Route, now_ms: int, most: int) -> bool:
        """Try an address if its turn has come; False: the turn of those after it has not."""
        if route.dialled_ms is None:
            if self._attempts and now_ms < self._stagger_ms:
                self._wake_at(self._stagger_ms)
                return False
            if self._dial(route, now_ms, most):
                self._stagger_ms = now_ms + STAGGER_MS
            return self._has_had_turn(route)
        silent = route.pending and now_ms - route.dialled_ms >= SILENT_MS
        if silent and self.repeats and self.tried:
            self._dial(route, now_ms, most)  # not before every address has had its turn
        return True

    @staticmethod
    def _has_had_turn(route: Route) -> bool:
        return route.dialled_ms is not None

    def _dial(self, route: Route, now_ms: int, most: int) -> bool:
        """Start an attempt; False if it has failed at once, or has to wait for another to end."""
        if not self._make_room(now_ms, most):
            return False
        route.dialled_ms = now_ms
        try:
            fd = self._loop.relay.dial(route.address)
        except OSError as failure:
            self._note(failure.errno or errno.EIO, route.address)
            return False
        self._attempts[fd] = Attempt(route, now_ms)
        route.pending += 1
        self._loop.handlers[fd] = lambda _events: self._look(fd)
        return self._look(fd)

    def _make_room(self, now_ms: int, most: int) -> bool:
        """Tell whether there may be one more; the oldest makes way once it has been silent."""
        count = len(self._attempts) + len(self.won)
        if count < most and (count < max(self.clients, 1) or self._spare_left() > 0):
            return True
        if not self._attempts:
            return False
        fd, oldest = next(iter(self._attempts.items()))
        if now_ms - oldest.since_ms < SILENT_MS:
            self._wake_at(oldest.since_ms + SILENT_MS)
            return False
        if self._look(fd) and fd in self._attempts:
            self._close(fd)
        return True

    def _spare_left(self) -> int:
        return SPARE_ALL - sum([race.surplus for race in self._loop.races])

    @property
    def surplus(self) -> int:
        """Sockets beyond one for each held client, who has an fd for it."""
        return max(len(self._attempts) + len(self.won) - max(self.clients, 1), 0)

    def _wake_at(self, when_ms: int) -> None:
        if self.next_ms is None or when_ms < self.next_ms:
            self.next_ms = when_ms

    # ── answers ──────────────────────────────────────────────────────────────────────────────

    def _look(self, fd: int) -> bool:
        """See how an attempt is getting on; False if it has failed, and then it is closed."""
        attempt = self._attempts[fd]
        if attempt.settled_ms is not None:
            return self._look_settling(fd, attempt)
        error = connected(fd)
        if error == errno.EINPROGRESS:
            return True
        if not was_reached(error, attempt.route.address):
            self._failed(fd, error)
            return False
        if not self.watches:
            self._win(fd, error)
            return True
        attempt.settled_ms = self._loop.relay.now_ms + self.settle_ms
        return self._let_go(fd, error) if error else self._look_settling(fd, attempt)

    def _look_settling(self, fd: int, attempt: Attempt) -> bool:
        """The target has accepted; whether it stays is to be seen before anything is sent."""
        said = peek(fd)
        over = self._loop.relay.now_ms >= (attempt.settled_ms or 0)
        if said > 0 or (said == -errno.EAGAIN and over):
            self._win(fd, 0)
        elif said != -errno.EAGAIN:
            return self._let_go(fd, -said)
        return True

    def _let_go(self, fd: int, error: int) -> bool:
        """A watched target has closed (0) or reset; False if the connection is of no use."""
        if self._expects_end():
            self._take(fd, error, proven=False)
            return True
        self._failed(fd, LET_GO)
        return False

    def _win(self, fd: int, error: int) -> None:
        """A connection is made: attempts at other addresses have lost.

        So have older ones, which the kernel repeats more and more seldom.
        """
        address = self._attempts[fd].route.address
        since_ms = self._attempts[fd].since_ms
        self._take(fd, error, proven=True)
        self.watches = False
        self.preferred = address
        self.silent_since_ms = None
        self._forget_errors()
        for other, attempt in list(self._attempts.items()):
            if attempt.route.address == address and attempt.since_ms > since_ms - STAGGER_MS:
                continue
            error = errno.EINPROGRESS if attempt.settled_ms is not None else connected(other)
            if was_reached(error, attempt.route.address):
                self._take(other, error, proven=True)
            else:
                self._close(other)

    def _take(self, fd: int, error: int, proven: bool) -> None:
        attempt = self._attempts.pop(fd)
        attempt.route.pending -= 1
        del self._loop.handlers[fd]
        took_ms = self._loop.relay.now_ms - attempt.since_ms
        self.won.append(Won(fd, attempt.route.address, error, took_ms, proven))

    def _failed(self, fd: int, error: int) -> None:
        self._note(error, self._attempts[fd].route.address)
        self._close(fd)

    def _note(self, error: int, address: bytes) -> None:
        """Keep the error that promises most: one after which a later try may succeed."""
        if self._routes and address == self._routes[0].address:
            self.failures += 1
        if not self.hopeful:
            self.error = error
            self.hopeful = error == LET_GO or may_pass(error, address)
            self.congested = is_congestion(error, address)

    def _forget_errors(self) -> None:
        self.error = self.failures = 0
        self.hopeful = self.congested = False

    def _close(self, fd: int) -> None:
        attempt = self._attempts.pop(fd, None)
        if attempt is not None:
            attempt.route.pending -= 1
            del self._loop.handlers[fd]
            self._loop.relay.hang_up(fd, True)
