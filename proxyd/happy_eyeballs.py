"""Attempts to connect to one target, staggered over its addresses (RFC 8305, Happy Eyeballs).

A host that is silent, because it boots or is being woken up, gets SYNs from the kernel only after
1, 3, 7 and 15 s. So an attempt that is not answered within SILENT_MS gets another one alongside,
and the first that succeeds wins. Nothing is sent on a connection here. So any connection will do
for any client, and a surplus one is reset.
"""

import errno

from proxyd._relay import connected, peek
from proxyd.connect_errors import CLOSED_EARLY, is_congestion, is_temporary, was_reached
from proxyd.event_loop import EventLoop

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

STAGGER_MS = 250
"""Connection Attempt Delay, RFC 8305 section 5."""

SILENT_MS = 1000
"""An attempt without an answer gets another one alongside after this time."""

SPARE = 3
"""Attempts to one target beyond the connections that its clients need …"""

ATTEMPTS_MAX = 32
"""… and the maximum of all attempts to it."""


class HappyEyeballs:
    """The attempts to one target, in rounds over its addresses.

    begin() starts a round, step() makes the attempts that are due, take_winner() returns the
    connections. A round is `over` when every address has been tried and no attempt is pending.
    """

    __slots__ = (
        "_attempts",
        "_candidates",
        "_clients",
        "_expects_end",
        "_loop",
        "_repeats",
        "_stagger_ms",
        "_winners",
        "client",
        "congested",
        "error",
        "failures",
        "must_settle",
        "next_ms",
        "preferred",
        "settle_ms",
        "silent_since_ms",
        "temporary",
    )

    def __init__(
        self, loop: EventLoop, expects_end: "Callable[[], bool]", *, repeats: bool
    ) -> None:
        """`repeats`: whether a silent address gets another attempt.

        `expects_end` tells whether the next client has closed without sending anything. If so, a
        target that closes early is just what this client is to see.
        """
        self._loop = loop
        self._expects_end = expects_end
        self._repeats = repeats
        self._candidates: list[Candidate] = []
        self._attempts: dict[int, Attempt] = {}
        """By fd, the oldest first. Their sockets are owned here."""
        self._winners: list[Winner] = []
        self._clients = 0
        """How many are held; each of them has an fd for one attempt."""
        self._stagger_ms = 0
        """When the next address is due."""
        self.client = b""
        """The packed address of all clients, if sockets are bound to that."""
        self.settle_ms = 0
        """How long a new connection has to stay up …"""
        self.must_settle = False
        """… before a client gets it, if it has to."""
        self.preferred = b""
        """The address that has answered, to be tried first."""
        self.error = 0
        """Of this round, since the last connection: if possible, a temporary one."""
        self.temporary = False
        """Whether a later attempt may succeed after `error`."""
        self.congested = False
        """Whether `error` is a full backlog."""
        self.failures = 0
        """How many attempts at the first address have failed since the last connection."""
        self.silent_since_ms: int | None = None
        """Since when there have been attempts but no connection."""
        self.next_ms: int | None = None
        """When to call step() at the latest; None: not before the next event."""
        loop.budget.join(self.surplus)

    # ── rounds ────────────────────────────────────────────────────────────────────────────────────

    def begin(self, addresses: list[bytes], now_ms: int) -> None:
        """Start a round. Pending attempts to any of `addresses` continue."""
        pending = {one.address: one for one in self._candidates if one.pending}
        order = sorted(addresses, key=lambda address: address != self.preferred)
        self._candidates = [
            pending.pop(address) if address in pending else Candidate(address) for address in order
        ]
        for fd in [fd for fd, one in self._attempts.items() if one.candidate.address in pending]:
            self._close(fd)
        self._stagger_ms = now_ms
        self._clear_errors()
        if self.silent_since_ms is None:
            self.silent_since_ms = now_ms

    def step(self, now_ms: int, wanted: int, clients: int) -> None:
        """Make the attempts that are due, for `wanted` connections; `clients` are held."""
        self._clients = clients
        self.next_ms = None
        for fd in [fd for fd, one in self._attempts.items() if one.settled_ms is not None]:
            if fd in self._attempts:  # a winner closes other attempts
                self._check(fd)
        if not self.settling:
            self._dial_all_due(now_ms, wanted)
        if self.settling:
            self.next_ms = self.settled_ms

    def take_winner(self) -> "Winner | None":
        """Return a connection, which the caller owns; None if there is none."""
        return self._winners.pop(0) if self._winners else None

    def retire(self) -> None:
        """Stop for good: this target is not used any more."""
        self.stop()
        self._loop.budget.leave(self.surplus)

    def stop(self) -> None:
        """Close everything, with a reset, as no client is left."""
        for fd in list(self._attempts):
            self._close(fd)
        for winner in self._winners:
            self._loop.hang_up(winner.fd, reset=True)
        self._winners = []
        self.preferred = b""
        self.next_ms = None
        self.end_round()

    def end_round(self) -> None:
        """Have the next begin() try every address anew."""
        self._candidates = []
        self.silent_since_ms = None

    # ── state ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def pending(self) -> int:
        """The number of attempts under way."""
        return len(self._attempts)

    def surplus(self) -> int:
        """Return the number of sockets beyond one per held client, for the budget."""
        return max(len(self._attempts) + len(self._winners) - max(self._clients, 1), 0)

    @property
    def over(self) -> bool:
        """Tell whether the round has ended."""
        return self.tried and not self._attempts

    @property
    def partly_failed(self) -> bool:
        """Tell whether some addresses have failed and all others are silent."""
        return self.tried and not all(one.pending for one in self._candidates)

    @property
    def tried(self) -> bool:
        """Tell whether every address of the round has been tried."""
        return self.running and all(one.dialled_ms is not None for one in self._candidates)

    @property
    def running(self) -> bool:
        """Tell whether a round has begun."""
        return bool(self._candidates)

    @property
    def settling(self) -> bool:
        """Tell whether a connection is settling."""
        return self.settled_ms is not None

    @property
    def settled_ms(self) -> int | None:
        """When the first connection will have settled; None if none is settling."""
        times = [attempt.settled_ms for attempt in self._attempts.values()]
        return min((time for time in times if time is not None), default=None)

    # ── dialling ──────────────────────────────────────────────────────────────────────────────────

    def _dial_all_due(self, now_ms: int, wanted: int) -> None:
        attempts_max = min(wanted + SPARE, ATTEMPTS_MAX)
        while len(self._attempts) > attempts_max:
            self._close(next(iter(self._attempts)))
        if self._candidates:
            self._dial_first(now_ms, wanted, attempts_max)
        for candidate in self._candidates:
            if len(self._winners) >= wanted or self.settling:
                return
            if not self._dial_due(candidate, now_ms, attempts_max):
                return
        for candidate in self._candidates:
            if self._repeats and candidate.pending and candidate.dialled_ms is not None:
                self._step_at(max(candidate.dialled_ms + SILENT_MS, now_ms + 1))

    def _dial_first(self, now_ms: int, wanted: int, attempts_max: int) -> None:
        """Make as many attempts at the first address as connections are wanted."""
        first = self._candidates[0]
        if first.dialled_ms is not None and not first.pending:
            return  # it has failed in this round
        while len(self._attempts) + len(self._winners) < wanted and not self.settling:
            if not self._dial(first, now_ms, attempts_max):
                return
            self._stagger_ms = now_ms + STAGGER_MS

    def _dial_due(self, candidate: "Candidate", now_ms: int, attempts_max: int) -> bool:
        """Try an address if it is due; return False if the addresses after it are not due yet."""
        if candidate.dialled_ms is None:
            if self._attempts and now_ms < self._stagger_ms:
                self._step_at(self._stagger_ms)
                return False
            if self._dial(candidate, now_ms, attempts_max):
                self._stagger_ms = now_ms + STAGGER_MS
            return candidate.dialled_ms is not None
        silent = candidate.pending and now_ms - candidate.dialled_ms >= SILENT_MS
        if silent and self._repeats and self.tried:  # not before every address has been tried
            self._dial(candidate, now_ms, attempts_max)
        return True

    def _dial(self, candidate: "Candidate", now_ms: int, attempts_max: int) -> bool:
        """Start an attempt; return False if it fails at once, or must wait for another to end."""
        if not self._make_room(now_ms, attempts_max):
            return False
        candidate.dialled_ms = now_ms
        try:
            address = candidate.address
            fd = self._loop.dial(address, lambda fd, _events: self._check(fd), self.client)
        except OSError as failure:
            self._record_failure(failure.errno or errno.EIO, candidate.address)
            return False
        self._attempts[fd] = Attempt(candidate, now_ms)
        candidate.pending += 1
        return self._check(fd)

    def _make_room(self, now_ms: int, attempts_max: int) -> bool:
        """Tell whether one more attempt is allowed; the oldest gives way once it is silent."""
        count = len(self._attempts) + len(self._winners)
        reserved = count < max(self._clients, 1)
        if count < attempts_max and (reserved or not self._loop.budget.exhausted):
            return True
        if not self._attempts:
            return False
        fd, oldest = next(iter(self._attempts.items()))
        if now_ms - oldest.since_ms < SILENT_MS:
            self._step_at(oldest.since_ms + SILENT_MS)
            return False
        if self._check(fd) and fd in self._attempts:
            self._close(fd)
        return True

    def _step_at(self, when_ms: int) -> None:
        if self.next_ms is None or when_ms < self.next_ms:
            self.next_ms = when_ms

    # ── answers ───────────────────────────────────────────────────────────────────────────────────

    def _check(self, fd: int) -> bool:
        """See what has become of an attempt; return False if it has failed and is closed."""
        attempt = self._attempts[fd]
        if attempt.settled_ms is not None:
            return self._check_settling(fd, attempt)
        error = connected(fd)
        if error == errno.EINPROGRESS:
            return True
        if not was_reached(error, attempt.candidate.address):
            self._failed(fd, error)
            return False
        if not self.must_settle:
            self._win(fd, error)
            return True
        attempt.settled_ms = self._loop.relay.now_ms + self.settle_ms
        return self._closed_early(fd, error) if error else self._check_settling(fd, attempt)

    def _check_settling(self, fd: int, attempt: "Attempt") -> bool:
        """The target has accepted; nothing is sent before it is known to keep the connection."""
        received = peek(fd)
        settled = self._loop.relay.now_ms >= (attempt.settled_ms or 0)
        if received > 0 or (received == -errno.EAGAIN and settled):
            self._win(fd, 0)
        elif received != -errno.EAGAIN:
            return self._closed_early(fd, -received)
        return True

    def _closed_early(self, fd: int, error: int) -> bool:
        """The target has closed (0) or reset; return False if no client can use the connection."""
        if self._expects_end():
            self._take(fd, error, proven=False)
            return True
        self._failed(fd, CLOSED_EARLY)
        return False

    def _win(self, fd: int, error: int) -> None:
        """A connection is made: attempts at other addresses have lost.

        So have older ones, because the kernel repeats their SYNs ever less often.
        """
        address = self._attempts[fd].candidate.address
        since_ms = self._attempts[fd].since_ms
        self._take(fd, error, proven=True)
        self.must_settle = False
        self.preferred = address
        self.silent_since_ms = None
        self._clear_errors()
        for other, attempt in list(self._attempts.items()):
            if attempt.candidate.address == address and attempt.since_ms > since_ms - STAGGER_MS:
                continue
            error = errno.EINPROGRESS if attempt.settled_ms is not None else connected(other)
            if was_reached(error, attempt.candidate.address):
                self._take(other, error, proven=True)
            else:
                self._close(other)

    def _take(self, fd: int, error: int, proven: bool) -> None:
        attempt = self._attempts.pop(fd)
        attempt.candidate.pending -= 1
        self._loop.forget(fd)
        took_ms = self._loop.relay.now_ms - attempt.since_ms
        self._winners.append(Winner(fd, attempt.candidate.address, error, took_ms, proven))

    def _failed(self, fd: int, error: int) -> None:
        self._record_failure(error, self._attempts[fd].candidate.address)
        self._close(fd)

    def _record_failure(self, error: int, address: bytes) -> None:
        """Keep the error, unless there is a temporary one already."""
        if self._candidates and address == self._candidates[0].address:
            self.failures += 1
        if not self.temporary:
            self.error = error
            self.temporary = is_temporary(error, address)
            self.congested = is_congestion(error, address)

    def _clear_errors(self) -> None:
        self.error = self.failures = 0
        self.temporary = self.congested = False

    def _close(self, fd: int) -> None:
        attempt = self._attempts.pop(fd, None)
        if attempt is not None:
            attempt.candidate.pending -= 1
            self._loop.hang_up(fd, reset=True)


class Candidate:
    """One address in a round of attempts."""

    __slots__ = ("address", "dialled_ms", "pending")

    def __init__(self, address: bytes) -> None:
        self.address = address
        self.dialled_ms: int | None = None
        """When it was last dialled; None: not in this round yet."""
        self.pending = 0
        """The number of its attempts under way."""


class Attempt:
    """A socket that is connecting, or connected and settling."""

    __slots__ = ("candidate", "settled_ms", "since_ms")

    def __init__(self, candidate: Candidate, since_ms: int) -> None:
        self.candidate = candidate
        self.since_ms = since_ms
        self.settled_ms: int | None = None
        """When it will have settled; None: it is not connected yet."""


class Winner:
    """A connected socket, for the taker to adopt or to reset."""

    __slots__ = ("address", "error", "fd", "proven", "took_ms")

    def __init__(self, fd: int, address: bytes, error: int, took_ms: int, proven: bool) -> None:
        self.fd = fd
        self.address = address
        self.error = error
        """The error with which the target has already closed it; 0: it has not."""
        self.took_ms = took_ms
        self.proven = proven
        """Whether the target has kept it; False if it was closed early."""
