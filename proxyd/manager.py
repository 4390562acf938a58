"""What the service manager is told, and when: sd_notify(3)."""

from _collections_abc import Callable

from proxyd._relay import Relay
from proxyd.notify import Notifier

STATUS_MS = 2000
"""STATUS= is sent at most so often, and only if it says something new."""

EXTEND_EVERY_MS = 10_000
EXTEND_BY_USEC = 30_000_000
"""While connections finish after SIGTERM, the stop timeout is put off by so much, so often."""


class Manager:
    """Keeps the service manager informed. `status` makes the text of STATUS=."""

    def __init__(self, notifier: Notifier, status: Callable[[], str], relay: Relay) -> None:
        self._notifier = notifier
        self._relay = relay
        self._status = status
        self._told = ""
        self._status_ms: int | None = None
        self._extend_ms: int | None = None
        # Half the interval, sd_watchdog_enabled(3).
        self._watchdog_every_ms = max(notifier.watchdog_usec // 2000, 1)
        self._watchdog_ms: int | None = None
        if notifier.watchdog_usec:
            self._watchdog_ms = relay.now_ms + self._watchdog_every_ms
            relay.ask()

    def ready(self) -> None:
        """Every listener is armed."""
        if self._notifier.enabled:
            self._told = self._status()
            self._notifier.send(f"READY=1\nSTATUS={self._told}")

    def stopping(self, now_ms: int, waits: bool) -> None:
        """No more clients are accepted; with `waits` the open connections may still finish."""
        self._notifier.stopping()
        self._extend_ms = now_ms if waits and self._notifier.enabled else None

    @property
    def wanted(self) -> bool:
        """Tell whether anybody listens, and tick() is to be called when the first client comes."""
        return self._notifier.enabled

    def next_ms(self) -> int | None:
        """When tick() is to be called at the latest."""
        times = (self._status_ms, self._extend_ms, self._watchdog_ms)
        return min((time for time in times if time is not None), default=None)

    def tick(self, now_ms: int, busy: bool) -> None:
        """Send what is due; `busy` while there are connections, whose bytes count."""
        if self._watchdog_ms is not None and now_ms >= self._watchdog_ms:
            self._watch(now_ms)
        if self._extend_ms is not None and now_ms >= self._extend_ms:
            self._notifier.extend(EXTEND_BY_USEC)
            self._extend_ms = now_ms + EXTEND_EVERY_MS
        if self._status_ms is None:
            self._status_ms = now_ms + STATUS_MS if busy and self.wanted else None
        elif now_ms >= self._status_ms:
            self._status_ms = now_ms + STATUS_MS if busy else None
            text = self._status()
            if text != self._told:
                self._told = text
                self._notifier.status(text)

    def _watch(self, now_ms: int) -> None:
        """Say that we are alive, if every thread has said so to us; otherwise look again soon."""
        if not self._relay.answered:
            self._watchdog_ms = now_ms + -(-self._watchdog_every_ms // 8)
            return
        self._notifier.watchdog()
        self._watchdog_ms = now_ms + self._watchdog_every_ms
        self._relay.ask()
