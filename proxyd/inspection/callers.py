"""The callers: how many there may be, and how much of the main loop's time they get.

The main loop forwards bytes in the same thread. So the callers get half a millisecond of a turn,
piece by piece and in rotation, and the rest of their work waits for the next turn.
"""

import time

from proxyd import log
from proxyd.event_loop import EPOLLET, EPOLLIN, EventLoop
from proxyd.inspection.access import Peer
from proxyd.inspection.caller import Caller, CallerGoneError

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd.inspection.caller import Answer

DISCARD_MS = 1000
"""How long to wait before sockets that could not be closed are tried again."""

RESERVED = 8
"""Of the places for callers, those that only root and our own user may take."""

TURN_S = 0.0005
"""How long the callers may keep the main loop in one turn, beyond the piece that exceeds it."""

_EPOLLOUT, _EPOLLHUP, _EPOLLERR = 4, 16, 8


class Callers:
    """All callers. Owns their sockets."""

    __slots__ = (
        "_answer",
        "_by_fd",
        "_callers_max",
        "_discard_ms",
        "_loop",
        "_ready",
        "_stall_ms",
        "_undiscarded",
    )

    def __init__(self, loop: EventLoop, answer: "Answer", callers_max: int) -> None:
        self._loop = loop
        self._answer = answer
        self._callers_max = callers_max
        self._by_fd: dict[int, Caller] = {}
        self._ready: dict[int, Caller] = {}
        """Those that may have something to do, in the order of their turns."""
        self._stall_ms: int | None = None
        """When the first one will have stalled for too long."""
        self._undiscarded: list[tuple[int, Peer]] = []
        """Sockets of callers that are gone, whose close could block. They keep their places."""
        self._discard_ms: int | None = None
        """When to try again to close them."""

    def __len__(self) -> int:
        """Return the number of callers."""
        return len(self._by_fd)

    def add(self, fd: int) -> None:
        """Serve a caller whose socket was just accepted; it is owned from now on."""
        caller = Caller(fd, self._answer, self._loop.relay.now_ms, self._wake)
        if not caller.known or not self._make_room(caller.peer):
            self._close(caller)
            return
        self._by_fd[fd] = self._ready[fd] = caller
        try:
            self._loop.watch(
                fd,
                lambda events: self._on_event(caller, events),
                EPOLLIN | _EPOLLOUT | EPOLLET,
                quiet=True,
            )
        except OSError:  # out of memory
            self._close(caller)

    def _make_room(self, peer: Peer) -> bool:
        """Tell whether there is a place, if need be that of a caller that asks nothing."""
        peers = [one.peer for one in self._by_fd.values()]
        peers += [gone for _, gone in self._undiscarded]
        strangers = sum([not one.privileged for one in peers])
        others_max = self._callers_max - min(RESERVED, self._callers_max // 2)
        if len(peers) < self._callers_max and (peer.privileged or strangers < others_max):
            return True
        idle = [one for one in self._by_fd.values() if one.idle]
        others = [one for one in idle if not one.peer.privileged]
        victims = others or (idle if peer.privileged else [])
        if not victims:
            return False
        self._close(min(victims, key=lambda one: one.active_ms))
        return True

    def _on_event(self, caller: "Caller", events: int) -> None:
        if events & (_EPOLLHUP | _EPOLLERR):
            caller.has_left = True
        self._wake(caller)

    def _wake(self, caller: Caller) -> None:
        if self._by_fd.get(caller.fd) is caller:  # its fd may be that of another one by now
            self._ready.setdefault(caller.fd, caller)

    def step(self, now_ms: int) -> None:
        """Serve the callers for a while, and drop those that have stalled."""
        if self._ready:
            self._serve(now_ms)
        elif self._stall_ms is not None and now_ms >= self._stall_ms:
            self._drop_stalled(now_ms)
        if self._discard_ms is not None and now_ms >= self._discard_ms:
            gone, self._undiscarded, self._discard_ms = self._undiscarded, [], None
            for fd, peer in gone:
                self._discard(fd, peer)

    def _serve(self, now_ms: int) -> None:
        end = time.monotonic() + TURN_S
        while self._ready:
            fd = next(iter(self._ready))
            caller = self._ready.pop(fd)
            try:
                if caller.step(now_ms):
                    self._ready[fd] = caller  # at the end of the queue
            except CallerGoneError:
                self._close(caller)
            except Exception as error:  # noqa: BLE001 - a fault in here must not end the forwarding
                self._close(caller)
                _log_fault(error)
            if time.monotonic() >= end:
                break
        self._drop_stalled(now_ms)

    def _drop_stalled(self, now_ms: int) -> None:
        self._stall_ms = None
        for caller in list(self._by_fd.values()):
            stalled_ms = caller.stalled_ms
            if stalled_ms is None:
                continue
            if now_ms >= stalled_ms:
                self._close(caller)
            elif self._stall_ms is None or stalled_ms < self._stall_ms:
                self._stall_ms = stalled_ms

    def next_ms(self, now_ms: int) -> int | None:
        """When to call step() at the latest; None: not before the next event."""
        if self._ready:
            return now_ms
        times = (self._stall_ms, self._discard_ms)
        return min((time for time in times if time is not None), default=None)

    def fail(self, error: Exception) -> None:
        """Drop all callers, because of a fault that is not that of one of them."""
        self.close_all()
        _log_fault(error)

    def close_all(self) -> None:
        """Drop all callers."""
        for caller in list(self._by_fd.values()):
            self._close(caller)

    def _close(self, caller: Caller) -> None:
        self._by_fd.pop(caller.fd, None)
        self._ready.pop(caller.fd, None)
        caller.close()
        self._loop.unwatch(caller.fd)
        self._discard(caller.fd, caller.peer)

    def _discard(self, fd: int, peer: Peer) -> None:
        """Close a socket, unless it has descriptors in its queue, and others like it come first."""
        if not self._loop.relay.discard(fd):
            self._undiscarded.append((fd, peer))
            self._discard_ms = self._loop.relay.now_ms + DISCARD_MS


def _log_fault(error: Exception) -> None:
    text = f"Internal error in the inspection: {type(error).__name__}: {error}"
    log.limited("inspection", text, log.ERROR)
