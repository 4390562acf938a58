"""What the service manager is told, and when: sd_notify(3)."""

import errno
import os
from _collections_abc import Callable

from proxyd import log
from proxyd._relay import Relay
from proxyd.notify import PASSING, Notifier

STATUS_MS = 2000
"""STATUS= is sent at most so often, and only if it says something new."""

EXTEND_EVERY_MS = 10_000
EXTEND_BY_USEC = 30_000_000
"""While connections finish after SIGTERM, the stop timeout is put off by so much, so often."""

RETRY_MS = 10
"""Pause before what could not be sent is sent again; it doubles …"""

RETRY_SLOWEST_MS = 1000
"""… up to this while the queue of NOTIFY_SOCKET is full …"""

RETRY_GONE_MS = 10_000
"""… and up to this while nobody has that socket."""

_ORDER = ("READY", "STOPPING", "WATCHDOG", "EXTEND", "STATUS")
"""READY=1 comes before STOPPING=1 even if both are late; the watchdog before what can wait."""


class Manager:
    """Keeps the service manager informed. `status` makes the text of STATUS=.

    Messages are kept until they are sent, each kind once, in the order of `_ORDER`.
    """

    def __init__(self, notifier: Notifier, status: Callable[[], str], relay: Relay) -> None:
        self._notifier = notifier
        self._relay = relay
        self._status = status
        self._told = ""
        """The last STATUS= that was sent."""
        self._due: dict[str, Callable[[], bool]] = {}
        """Kind → what sends it."""
        self._pause_ms = RETRY_MS
        self._retry_ms: int | None = None
        """When to send what is due once more, after it could not be sent."""
        self._status_ms: int | None = None
        self._extend_ms: int | None = None
        # Half the interval, sd_watchdog_enabled(3).
        self._watchdog_every_ms = max(notifier.watchdog_usec // 2000, 1)
        self._watchdog_ms: int | None = None
        self._alive_ms = relay.now_ms
        """When WATCHDOG=1 was sent last."""
        if notifier.watchdog_usec:
            self._watchdog_ms = relay.now_ms + self._watchdog_every_ms
            relay.ping_workers()

    def ready(self) -> None:
        """Every listener is armed."""
        if self._notifier.enabled:
            self._told = self._status()
            text = f"READY=1\nSTATUS={self._told}"
            self._send("READY", lambda: self._notifier.send(text), self._relay.now_ms)

    def stopping(self, now_ms: int, waits: bool) -> None:
        """No more clients are accepted; with `waits` the open connections may still finish.

        Otherwise this is the last that is sent, and nobody waits for it.
        """
        self._send("STOPPING", self._notifier.stopping, now_ms)
        self._extend_ms = now_ms if waits and self._notifier.enabled else None

    def close(self) -> None:
        """Nothing more is sent."""
        self._notifier.close()

    @property
    def wanted(self) -> bool:
        """Tell whether anybody listens, and tick() is to be called when the first client comes."""
        return self._notifier.enabled

    def next_ms(self) -> int | None:
        """When tick() is to be called at the latest."""
        times = (self._status_ms, self._extend_ms, self._watchdog_ms, self._retry_ms)
        return min((time for time in times if time is not None), default=None)

    def tick(self, now_ms: int, busy: bool) -> None:
        """Send what is due; `busy` while there are connections, whose bytes count."""
        if self._watchdog_ms is not None and now_ms >= self._watchdog_ms:
            self._watch(now_ms)
        if self._extend_ms is not None and now_ms >= self._extend_ms:
            self._extend_ms = now_ms + EXTEND_EVERY_MS
            self._send("EXTEND", lambda: self._notifier.extend(EXTEND_BY_USEC), now_ms)
        if self._status_ms is None:
            self._status_ms = now_ms + STATUS_MS if busy and self.wanted else None
        elif now_ms >= self._status_ms:
            self._status_ms = now_ms + STATUS_MS if busy else None
            text = self._status()
            if text != self._told:
                self._told = text
                self._send("STATUS", lambda: self._notifier.status(text), now_ms)
        if self._retry_ms is not None and now_ms >= self._retry_ms:
            self._flush(now_ms)

    def _watch(self, now_ms: int) -> None:
        """Say that we are alive, if every thread has said so to us; otherwise look again soon."""
        if not self._relay.workers_answered:
            self._watchdog_ms = now_ms + -(-self._watchdog_every_ms // 8)
            self._due.pop("WATCHDOG", None)  # no longer true
            self._complain_if_late(now_ms, "a thread does not answer")
            return
        self._watchdog_ms = now_ms + self._watchdog_every_ms
        self._relay.ping_workers()
        self._send("WATCHDOG", self._notifier.watchdog, now_ms)

    def _send(self, kind: str, send: Callable[[], bool], now_ms: int) -> None:
        """Send a message, at the latest when the service manager takes it."""
        if self._notifier.enabled:
            self._due[kind] = send
            self._flush(now_ms)

    def _flush(self, now_ms: int) -> None:
        """Send what is due, the most urgent first, until something does not go out."""
        for kind in _ORDER:
            if kind not in self._due:
                continue
            if not self._due[kind]():
                self._rest(now_ms)
                return
            del self._due[kind]
            if kind == "WATCHDOG":
                self._alive_ms = now_ms
        self._retry_ms = None
        self._pause_ms = RETRY_MS

    def _rest(self, now_ms: int) -> None:
        """Wait before the next attempt, each time longer."""
        error = self._notifier.error
        slowest = RETRY_SLOWEST_MS if error in PASSING else RETRY_GONE_MS
        if self._watchdog_ms is not None:
            slowest = min(slowest, -(-self._watchdog_every_ms // 8))
        self._retry_ms = now_ms + min(self._pause_ms, slowest)
        self._pause_ms = min(self._pause_ms * 2, slowest)
        if "WATCHDOG" in self._due:
            full = error == errno.EAGAIN
            why = "the queue of NOTIFY_SOCKET is full" if full else os.strerror(error)
            self._complain_if_late(now_ms, why)

    def _complain_if_late(self, now_ms: int, why: str) -> None:
        """Log that the service manager has waited for longer than WatchdogSec=, and why."""
        late_ms = now_ms - self._alive_ms - self._notifier.watchdog_usec // 1000
        if late_ms >= 0:
            log.limited("watchdog", f"WATCHDOG=1 is {late_ms} ms late: {why}.")
