"""A target that cannot be reached: when it is probed, and what the log says of that.

The log tells it once, not per attempt or client.

A target that has never been reached is still starting, which is normal, so that is told at info
level; a warning follows where it lasts.
"""

from proxyd import log

COLD_MS = 10_000
"""Longer than this a target may not take to start without a warning."""

CONGESTED_MS = 1000
"""A backlog that is full for longer than this is told."""


PROBE_MS = 10
"""Pause between two probes at first …"""

EAGER_MS = 150
"""… for so long; then the pause doubles …"""

PROBE_SLOWEST_MS = 250
"""… up to this."""


class Pace:
    """The pauses between the probes of a target that cannot be reached."""

    __slots__ = ("_eager_until_ms", "_pause_ms")

    def __init__(self) -> None:
        self._eager_until_ms = 0
        self._pause_ms = PROBE_MS

    def begin(self, now_ms: int) -> None:
        """A client waits, and none did before."""
        self._eager_until_ms = now_ms + EAGER_MS
        self._pause_ms = PROBE_MS

    def next(self, now_ms: int) -> int:
        """Return when the next probe is due, after one that has failed just now."""
        if now_ms < self._eager_until_ms:
            self._pause_ms = PROBE_MS
        else:
            self._pause_ms = min(self._pause_ms * 2, PROBE_SLOWEST_MS)
        return now_ms + self._pause_ms


class Outage:
    """A time without a connection to one target, from the first failure to the last client."""

    __slots__ = ("_denied", "_held_total", "_text", "_told", "_warn_ms", "kind", "since_ms", "why")

    def __init__(self, text: str) -> None:
        self._text = text
        """The target's."""
        self.kind = text
        """Outages of one kind are told at most once in 5 s."""
        self.since_ms: int | None = None
        """None: there is none."""
        self.why = ""
        """The last reason."""
        self._held_total = 0
        """How many clients had to wait."""
        self._warn_ms: int | None = None
        """When to warn, since it still lasts."""
        self._told = False
        """Whether the log has said that clients wait."""
        self._denied = False
        """Whether it has said that a permission is missing."""

    @property
    def next_ms(self) -> int | None:
        """When to call step() at the latest."""
        return self._warn_ms

    def held(self) -> None:
        """Count one more client that waits."""
        self._held_total += 1

    def fail(self, reason: str, now_ms: int, held: int, *, cold: bool, denied: bool) -> None:
        """Take note of an attempt that has failed, for `reason`."""
        self.why = reason
        if not self._told:
            self._begin(now_ms, held)
            self._warn_ms = now_ms + COLD_MS if cold and not denied else None
            self._tell(log.INFO if cold and not denied else log.WARNING)
        elif denied and not self._denied:
            self._tell(log.WARNING)
        self._denied = self._denied or denied

    def congest(self, reason: str, now_ms: int, held: int) -> None:
        """Take note of a full backlog, which is told only where it lasts."""
        self.why = reason
        if self.since_ms is None:
            self._begin(now_ms, held)
            self._warn_ms = now_ms + CONGESTED_MS

    def step(self, now_ms: int) -> None:
        """Warn, once it has lasted for too long."""
        if self._warn_ms is None or self.since_ms is None or now_ms < self._warn_ms:
            return
        self._warn_ms = None
        if not self._told:
            self._tell(log.WARNING)
            return
        span = _span_text(now_ms - self.since_ms)
        log.limited(f"lasting {self.kind}", f"{self.why}, clients have been held for {span}.")

    def end(self, now_ms: int, *, answered: bool) -> None:
        """Nobody waits any more, and the target can be reached as far as we know."""
        if answered and self._told and self.since_ms is not None:
            span = _span_text(now_ms - self.since_ms)
            count = self._held_total
            clients = "1 client was" if count == 1 else f"{count} clients were"
            text = f"{self._text} answers after {span}, {clients} held."
            log.limited(f"reached {self.kind}", text, log.INFO)
        self.since_ms = self._warn_ms = None
        self._told = self._denied = False
        self.why = ""

    def _begin(self, now_ms: int, held: int) -> None:
        if self.since_ms is None:
            self.since_ms = now_ms
            self._held_total = held

    def _tell(self, level: int) -> None:
        self._told = True
        text = f"{self.why}, holding clients until it answers."
        log.limited(f"outage {self.kind}", text, level)


def _span_text(ms: int) -> str:
    """A span for people, even where there is no fd left to load the module that knows how."""
    try:
        from proxyd.timespan import format_usec
    except (OSError, ImportError):
        return f"{ms} ms"
    return format_usec(ms * 1000)
