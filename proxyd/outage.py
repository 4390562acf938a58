"""Outages of a target: when it is probed, and what is logged.

An outage is logged once, not per attempt or client. A target that has never been reached is still
starting, which is normal. So that is logged at info level, and a warning follows if it lasts.
"""

from proxyd import log
from proxyd.connect_errors import short_reason
from proxyd.peers import address_field, address_note

COLD_START_MS = 10_000
"""A target that takes longer than this to start is worth a warning."""

CONGESTED_MS = 1000
"""A backlog that is full for longer than this is worth a warning."""

CONGESTION_MS = 5
"""Pause before a full backlog is tried again: the server may accept at any moment."""

PROBE_MS = 10
"""Pause between two probes for the first …"""

EAGER_MS = 150
"""… milliseconds; then it doubles …"""

PROBE_MS_MAX = 250
"""… up to this."""


class Outage:
    """Whether one target is up, and if not, since when.

    An outage lasts from the first failure until no client is held any more.
    """

    __slots__ = (
        "_denial_logged",
        "_held_total",
        "_logged",
        "_pace",
        "_text",
        "_warn_ms",
        "_what",
        "congested",
        "group",
        "since_ms",
        "up",
        "why",
    )

    def __init__(self, text: str, what: str = "clients") -> None:
        self._text = text
        """The target, for messages."""
        self._what = what
        """What is held: clients or datagrams. The kernel does not tell the number of the latter."""
        self.group = text
        """Outages of one group are logged at most once in 5 s."""
        self.up = True
        """Whether the target is believed to be up; if not, there is only one probe at a time."""
        self.congested = False
        """Whether its backlog was full at the last attempt."""
        self.since_ms: int | None = None
        """None: there is no outage, and no congestion."""
        self.why = ""
        """The last reason."""
        self._held_total = 0
        """The number of clients that had to wait."""
        self._warn_ms: int | None = None
        """When to warn if it still lasts."""
        self._logged = False
        """Whether it was logged that clients are held."""
        self._denial_logged = False
        """Whether it was logged that a permission is missing."""
        self._pace = Pace()

    @property
    def next_ms(self) -> int | None:
        """When to call step() at the latest."""
        return self._warn_ms

    def client_held(self, now_ms: int, *, first: bool) -> None:
        """Count a client that has to wait; with `first`, none did before."""
        self._held_total += 1
        if first:
            self._pace.begin(now_ms)

    def fail(self, reason: str, now_ms: int, held: int, *, cold: bool, denied: bool) -> int:
        """Record that an attempt has failed for `reason`; return when to probe.

        `held`: how many clients wait; `cold`: the target has never been reached; `denied`: a
        permission is missing.
        """
        self.up = False
        self.why = reason
        if not self._logged:
            self._begin(now_ms, held)
            self._warn_ms = now_ms + COLD_START_MS if cold and not denied else None
            self._log(log.INFO if cold and not denied else log.WARNING)
        elif denied and not self._denial_logged:
            self._log(log.WARNING)
        self._denial_logged = self._denial_logged or denied
        return self.next_probe_ms(now_ms)

    def congest(self, reason: str, now_ms: int, held: int) -> int:
        """Record a full backlog, which is logged only if it lasts; return when to try again."""
        self.up = self.congested = True
        self.why = reason
        if self.since_ms is None:
            self._begin(now_ms, held)
            self._warn_ms = now_ms + CONGESTED_MS
        return now_ms + CONGESTION_MS

    def succeed(self) -> None:
        """Record that a connection was made. The outage ends once no client is held any more."""
        self.up = True
        self.congested = False

    def step(self, now_ms: int) -> None:
        """Warn once it has lasted for too long."""
        if self._warn_ms is None or self.since_ms is None or now_ms < self._warn_ms:
            return
        self._warn_ms = None
        if not self._logged:
            self._log(log.WARNING)
            return
        span = _span_text(now_ms - self.since_ms)
        text = f"{self.why}, {self._what} have been held for {span}."
        log.limited(f"lasting {self.group}", text, log.WARNING, **self._fields())

    def end(self, now_ms: int) -> None:
        """Record that no client waits any more. That is the end, unless the target is down."""
        if not self.up:
            return
        if self._logged and self.since_ms is not None and not self.congested:
            self._log_end(now_ms - self.since_ms)
        self.since_ms = self._warn_ms = None
        self._logged = self._denial_logged = False
        self.why = ""

    def _log_end(self, span_ms: int) -> None:
        fields = {
            "MESSAGE_ID": log.RECOVERED,
            "TARGET": self._text,
            "OUTAGE_MSEC": str(span_ms),
        }
        held = ""
        if self._what == "clients":
            count = self._held_total
            held = ", 1 client was held" if count == 1 else f", {count} clients were held"
            fields["CLIENTS_HELD"] = str(count)
        text = f"{self._text} answers after {_span_text(span_ms)}{held}."
        log.limited(f"reached {self.group}", text, log.INFO, **fields)

    def given_up(self, reason: str, peer: bytes) -> None:
        """Log that a client with this packed address was given up."""
        self._log_failed(reason, f"{reason}.{address_note(peer)}", CLIENT=address_field(peer))

    def dropped(self, reason: str, what: str) -> None:
        """Log that datagrams were dropped."""
        self._log_failed(reason, f"{reason}, dropping {what}.")

    def _log_failed(self, reason: str, text: str, **fields: str) -> None:
        log.limited(
            f"failed {self.group}",
            text,
            log.ERROR,
            MESSAGE_ID=log.FAILED,
            TARGET=self._text,
            REASON=short_reason(reason, self._text),
            **fields,
        )

    def next_probe_ms(self, now_ms: int) -> int:
        """Return when the next attempt is due, after one that has just failed."""
        return self._pace.next(now_ms)

    def _begin(self, now_ms: int, held: int) -> None:
        if self.since_ms is None:
            self.since_ms = now_ms
            self._held_total = held

    def _log(self, level: int) -> None:
        self._logged = True
        text = f"{self.why}, holding {self._what} until it answers."
        log.limited(f"outage {self.group}", text, level, **self._fields())

    def _fields(self) -> dict[str, str]:
        """Return the fields of an outage for the journal."""
        reason = short_reason(self.why, self._text)
        return {"MESSAGE_ID": log.OUTAGE, "TARGET": self._text, "REASON": reason}


class Pace:
    """The pauses between the probes of a target that cannot be reached."""

    __slots__ = ("_eager_until_ms", "_pause_ms")

    def __init__(self) -> None:
        self._eager_until_ms = 0
        self._pause_ms = PROBE_MS

    def begin(self, now_ms: int) -> None:
        """Start with short pauses: a client waits, and none did before."""
        self._eager_until_ms = now_ms + EAGER_MS
        self._pause_ms = PROBE_MS

    def next(self, now_ms: int) -> int:
        """Return when the next probe is due, after one that has just failed."""
        if now_ms < self._eager_until_ms:
            self._pause_ms = PROBE_MS
        else:
            self._pause_ms = min(self._pause_ms * 2, PROBE_MS_MAX)
        return now_ms + self._pause_ms


def _span_text(ms: int) -> str:
    """Format a span; without the module for it if no fd is left to load that."""
    try:
        from proxyd.timespan import format_usec
    except (OSError, ImportError):
        return f"{ms} ms"
    return format_usec(ms * 1000)
