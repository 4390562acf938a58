"""Accepting: who comes in, and when nobody does."""

import errno
import os

from proxyd import log
from proxyd._relay import socket_names, tune
from proxyd.address import text, unmapped
from proxyd.listen import Listener
from proxyd.loop import Loop
from proxyd.loops import what_to_check
from proxyd.reach import Reach

ACCEPT_MOST = 32
"""Clients accepted in a row before the connections have their turn."""

PAUSE_MS = 100
"""How long nobody is accepted when fds or memory have run out, unless a connection ends."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_BROKEN = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP)
"""Errors of accept(2) that tell of the listener, not of the client that was to be accepted."""


class Door:
    """A listener and the way to its target."""

    __slots__ = ("check", "index", "listener", "way")

    def __init__(self, index: int, listener: Listener, way: Reach) -> None:
        self.index = index
        """In Intake.doors; the relay's cookie."""
        self.listener = listener
        self.way = way
        self.check = what_to_check(listener)


class Intake:
    """Accepts clients from all listeners, up to the limit. The listeners stay the caller's."""

    def __init__(
        self, loop: Loop, doors: list[Door], connections_max: int, proxy_protocol: int
    ) -> None:
        self.doors = doors
        self.accepted = 0
        self.refused = 0
        """Accepted and closed: over the limit, or a loop."""
        self.resume_ms: int | None = None
        """When to accept again, after fds or memory had run out."""
        self._loop = loop
        self._relay = loop.relay
        self._ways = list({id(door.way): door.way for door in doors}.values())
        self._connections_max = connections_max
        self._proxy_protocol = proxy_protocol
        self._open_at_pause = 0

    def arm(self) -> None:
        """Begin to accept. A connection that was passed in is taken at once."""
        for door in self.doors:
            tune(door.listener.fd, door.listener.family)
            if door.listener.connected:
                fd, door.listener.fd = door.listener.fd, -1
                self.accepted += 1
                self._admit(door, fd)
            else:
                self._watch(door)

    def disarm(self) -> None:
        """Accept nobody any more; what waits in a backlog stays there."""
        for door in self.doors:
            self._loop.unwatch(door.listener.fd)

    def accept_everything(self) -> bool:
        """Accept from every listener until nobody waits; True if anybody came."""
        before = self.accepted
        for door in self.doors:
            while door.listener.fd in self._loop.handlers and self._accept_batch(door):
                pass
        return self.accepted > before

    @property
    def broken(self) -> bool:
        """Tell whether there is no listener left to accept from."""
        listening = [door for door in self.doors if not door.listener.connected]
        return (
            bool(listening)
            and self.resume_ms is None
            and not any(door.listener.fd in self._loop.handlers for door in listening)
        )

    def tick(self, now_ms: int) -> None:
        """Accept again once it is time, or a connection has ended."""
        if self.resume_ms is None:
            return
        if now_ms >= self.resume_ms or self._relay.open < self._open_at_pause:
            self.resume_ms = None
            for door in self.doors:
                if door.listener.fd >= 0:
                    self._watch(door)

    def wake_at(self) -> int:
        """At how many open connections tick() wants to be called."""
        return -1 if self.resume_ms is None else self._open_at_pause - 1

    def _watch(self, door: Door) -> None:
        self._loop.watch(door.listener.fd, lambda _events: self._accept_batch(door))

    def _accept_batch(self, door: Door) -> bool:
        """Accept some who wait; True if there may be more."""
        for _ in range(ACCEPT_MOST):
            fd = self._relay.accept(door.listener.fd, door.check)
            if fd < 0:
                return self._not_accepted(door, -fd)
            self.accepted += 1
            held = 0
            for way in self._ways:
                held += len(way.held)
            if self._relay.open + held >= self._connections_max:
                os.close(fd)
                self.refused += 1
                log.limited("limit", "Hit connection limit, refusing connection.")
            else:
                self._admit(door, fd)
        return True

    def _admit(self, door: Door, fd: int) -> None:
        """Send a client on its way to the target."""
        header = None
        if self._proxy_protocol:
            from proxyd.proxy_protocol import header as proxy_header

            header = proxy_header(self._proxy_protocol, fd)
        name = text(unmapped(socket_names(fd)[0])) if self._loop.notes is not None else ""
        door.way.take(fd, door.listener, door.index, header, name)

    def _not_accepted(self, door: Door, error: int) -> bool:
        """Nobody was accepted; True if the next one may be."""
        if error == errno.EAGAIN:
            return False
        if error == errno.ELOOP:
            self.accepted += 1
            self.refused += 1
            log.limited(
                f"loop {door.listener.text}",
                f"Refusing connection: target {door.way.text} leads back to our own listener "
                f"{door.listener.text}.",
            )
            return True
        if error in _EXHAUSTED:
            self._pause(error)
            return False
        if error in _BROKEN:
            log.error(f"Failed to accept from {door.listener.text}: {os.strerror(error)}.")
            self._loop.unwatch(door.listener.fd)
            return False
        # accept(2): errors of the network are the client's that was to be accepted.
        log.limited("accept", f"Failed to accept from {door.listener.text}: {os.strerror(error)}.")
        return True

    def _pause(self, error: int) -> None:
        """Nothing is left to accept with: a listener would stay readable and burn a CPU."""
        self._relay.trim()
        self._open_at_pause = self._relay.open
        self.resume_ms = self._relay.now_ms + PAUSE_MS
        self.disarm()
        log.limited(
            "exhausted",
            f"Failed to accept: {os.strerror(error)}. Waiting until a connection ends.",
        )
