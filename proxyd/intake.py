"""Accepting: who comes in, and when nobody does.

The relay accepts, and within its terms connects at once (accept.pxd). Here the terms are set, and
the clients admitted for which there are none.
"""

import errno
import os
from _collections_abc import Callable

from proxyd import log
from proxyd._relay import (
    CHECK_PORT,
    Accepted,
    AcceptFailed,
    Refused,
    RelayListener,
    socket_names,
    tune_socket,
)
from proxyd.address import port, text, unmapped
from proxyd.listen import Listener
from proxyd.loop import Loop
from proxyd.loops import what_to_check
from proxyd.reach import Reach

TYPE_CHECKING = False  # as typing has it
if TYPE_CHECKING:
    from proxyd.ports import Ports

PAUSE_MS = 100
"""How long nobody is accepted when fds or memory have run out, unless a connection ends."""

_PASSING = (
    errno.ECONNABORTED,
    errno.EPROTO,
    errno.ENOPROTOOPT,
    errno.ENONET,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ETIMEDOUT,
    errno.EINTR,
)
"""Errors of accept(2) that tell of the client that was to be accepted, and of no other."""

_BROKEN = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP)
"""Errors of accept(2) that tell of the listener, not of the client that was to be accepted."""


class Door:
    """A listener and the way to its target."""

    __slots__ = ("broken", "gate", "index", "listener", "open", "ports", "way")

    def __init__(
        self, loop: Loop, index: int, listener: Listener, way: Reach, ports: "Ports | None" = None
    ) -> None:
        self.index = index
        """In Intake.doors; what events call the listener."""
        self.listener = listener
        self.way = way
        self.ports = ports
        """With `HOST:*`: the ways of clients that connected to another port than the listener's."""
        check = what_to_check(listener) | (CHECK_PORT if ports is not None else 0)
        self.gate = RelayListener(loop.relay, listener.fd, listener.family, check, index)
        way.gates.append(self.gate)
        self.open = False
        self.broken = False

    def way_of(self, fd: int) -> Reach:
        """The way for one client, which may have reset meanwhile: its socket knows its port."""
        if self.ports is None:
            return self.way
        number = port(socket_names(fd)[1])
        return self.ports.way(number) if number else self.way


class Intake:
    """Accepts clients from all listeners, up to the limit. The listeners stay the caller's."""

    def __init__(
        self, loop: Loop, doors: list[Door], connections_max: int, proxy_protocol: int
    ) -> None:
        self.doors = doors
        self.refused = 0
        """Clients that were refused here, not by the relay: over the limit, or without an address
        to tell the target."""
        self.passed_in = 0
        """Clients that were accepted for us (Accept=yes)."""
        self.broken = False
        """No listener is left to accept from."""
        self.resume_ms: int | None = None
        """When to accept again, after fds or memory had run out."""
        self._loop = loop
        self._relay = loop.relay
        self._ways = list({id(door.way): door.way for door in doors}.values())
        self._ports = {door.ports for door in doors if door.ports is not None}
        self._connections_max = self._relay.connections_max = connections_max
        self._proxy_protocol = proxy_protocol
        self._header: Callable[[int, int, bytes], bytes] | None = None
        self._no_header: type[Exception] = Exception
        """What `_header` raises for a client whose address is not known."""
        if proxy_protocol:  # now, and not when there may be no fd left to load it with
            from proxyd.proxy_protocol import UnknownAddressError, header

            self._header, self._no_header = header, UnknownAddressError
        self._open_at_pause = 0

    def arm(self) -> None:
        """Begin to accept. A connection that was passed in is taken at once."""
        for door in self.doors:
            tune_socket(door.listener.fd, door.listener.family)
            if door.listener.connected:
                fd, door.listener.fd = door.listener.fd, -1
                self.passed_in += 1
                self._relay.take_over(fd, door.listener.family)
                self._admit(door, fd, socket_names(fd)[0])
            else:
                door.gate.start()
                door.open = True
        self.set_terms()

    def disarm(self) -> None:
        """Accept nobody any more; what waits in a backlog stays there."""
        self.resume_ms = None
        for door in self.doors:
            self._shut(door)

    def set_terms(self) -> None:
        """Tell the relay which clients it may connect without asking, and how many."""
        self._relay.held = self._held()
        asked = self._proxy_protocol or self._loop.notes is not None
        for door in self.doors:
            door.gate.auto_connect(None if asked else door.way.express, door.way.connect_ms)

    def event(self, event: Accepted | AcceptFailed | Refused) -> None:
        """Take an event of a listener."""
        if isinstance(event, Accepted):
            self._accepted(self.doors[event.listener], event.client, event.peer)
        elif isinstance(event, AcceptFailed):
            self._not_accepted(self.doors[event.listener], event.error)
        else:
            self._log_refusal()

    def tick(self, now_ms: int) -> None:
        """Accept again once it is time, or a connection has ended."""
        if self.resume_ms is None:
            return
        if now_ms >= self.resume_ms or self._relay.connections < self._open_at_pause:
            self.resume_ms = None
            for door in self.doors:
                self._reopen(door)

    def _reopen(self, door: Door) -> None:
        if door.open or door.broken or door.listener.fd < 0:
            return
        try:
            door.gate.start()
        except OSError:  # this takes memory too: try again later
            self._rest()
        else:
            door.open = True

    def wake_at(self) -> int:
        """At how many open connections tick() wants to be called."""
        return -1 if self.resume_ms is None else self._open_at_pause - 1

    def _accepted(self, door: Door, fd: int, peer: bytes) -> None:
        if (
            self._relay.connections + self._relay.in_quarantine + self._held()
            < self._connections_max
        ):
            self._admit(door, fd, peer)
            return
        self._relay.hang_up(fd)
        self.refused += 1
        self._log_refusal()

    def _held(self) -> int:
        """How many wait for their target; they count as connections."""
        return sum([len(way.held) for way in self._ways] + [ports.held for ports in self._ports])

    def _log_refusal(self) -> None:
        log.limited("limit", "Hit connection limit, refusing connection.")

    def _admit(self, door: Door, fd: int, peer: bytes) -> None:
        """Send a client on its way to the target; `peer` is its packed address, if known."""
        header = None
        if self._header is not None:
            try:
                header = self._header(self._proxy_protocol, fd, peer)
            except self._no_header:
                self._refuse_unknown(door, fd)
                return
        way = door.way_of(fd)
        name = ""
        if self._loop.notes is not None:
            name = text(unmapped(peer or socket_names(fd)[0]))
            log.debug(f"New connection from {name} to {way.text}.")
        way.take(fd, door.listener, door.index, header, name)

    def _refuse_unknown(self, door: Door, fd: int) -> None:
        """Refuse a client that has reset before its address could be asked for.

        Announced as UNKNOWN or LOCAL, which stands for the proxy itself, it might get what it may
        not have.
        """
        self._relay.hang_up(fd, reset=True)
        self.refused += 1
        log.limited(
            "unknown",
            f"Refusing connection to {door.listener.text}: "
            "the client's address is not known any more, for a PROXY header.",
        )

    def _not_accepted(self, door: Door, error: int) -> None:
        where = door.listener.text
        if error == errno.ELOOP:
            log.limited(
                f"loop {where}",
                f"Refusing connection: target {door.way.text} leads back to our own "
                f"listener {where}.",
            )
        elif error in _PASSING:
            log.limited("accept", f"Failed to accept from {where}: {os.strerror(error)}.")
        elif error in _BROKEN:
            log.error(f"Failed to accept from {where}: {os.strerror(error)}.")
            self._shut(door)
            door.broken = True
            self.broken = all(other.broken for other in self.doors)
        else:  # nothing left to accept with, or a security module forbids it
            self._pause(error)

    def _pause(self, error: int) -> None:
        """Nothing is left to accept with: a listener would stay readable and burn a CPU."""
        self._relay.trim_pipes()
        self.disarm()
        self._rest()
        log.limited(
            "exhausted",
            f"Failed to accept: {os.strerror(error)}. Waiting until a connection ends.",
        )

    def _rest(self) -> None:
        """Accept again after a while, or when a connection has ended."""
        self._open_at_pause = self._relay.connections
        self.resume_ms = self._relay.now_ms + PAUSE_MS

    def _shut(self, door: Door) -> None:
        if door.open:
            door.open = False
            door.gate.stop()
