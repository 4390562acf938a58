"""Storing a descriptor in the store of the service manager, and whether it was taken.

Whether there is a store, and room in it, no manager says. So what is stored is the receiving end of
a queue: if it is refused, it is closed, which its sending end shows once the manager has answered a
barrier (sd_notify(3)).
"""

import posix
import select

from proxyd.continuity import fd_queue

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

    from proxyd.continuity.parts import Parts

ANSWER_MS = 2000
"""How long the service manager may take to answer; after that it counts as one without a store."""


class Deposit:
    """An attempt to store the receiving end of a queue. Owns the sending end."""

    __slots__ = ("_barrier", "_on_answer", "_parts", "_unsent", "sender", "until_ms", "waits")

    def __init__(
        self,
        parts: "Parts",
        name: str,
        fds: tuple[int, ...] = (),
        on_answer: "Callable[[], object]" = lambda: None,
    ) -> None:
        """Begin it, under this name. `fds` are put into the queue first. Raises OSError."""
        self._parts = parts
        self._on_answer = on_answer
        self.waits = True
        """Whether the manager has not answered yet …"""
        self.until_ms = parts.loop.relay.now_ms + ANSWER_MS
        """… and until when it may."""
        self._barrier = -1
        self._unsent: list[tuple[str, int]] = []
        """Messages, and the descriptors that go along, which are ours."""
        parts.loop.relay.trim_pipes()  # descriptors may be short
        self.sender, receiver = fd_queue.pair()
        try:
            # FDPOLL=0: otherwise it is removed as soon as this process has ended.
            self._unsent.append((f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", receiver.detach()))
            if fds:
                fd_queue.send(self.sender, [(name.encode(), fds)])
            self._barrier, theirs = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
            self._unsent.append(("BARRIER=1", theirs))
            parts.loop.watch(self._barrier, lambda _events: self._answered(), quiet=True)
        except OSError:
            self.close()
            raise
        parts.notifier.store(self._send)

    def _send(self) -> bool:
        """Send what is left; False: the service manager is busy. A missing one is late at once."""
        try:
            while self._unsent and self._parts.notifier.send_fd(*self._unsent[0]):
                posix.close(self._unsent.pop(0)[1])
        except OSError:  # which was logged
            self.until_ms = self._parts.loop.relay.now_ms
            return True
        return not self._unsent

    def _answered(self) -> None:
        self.waits = False
        self._parts.loop.unwatch(self._barrier)
        self._on_answer()

    def is_late(self, now_ms: int) -> bool:
        """Tell whether the manager has taken too long."""
        return self.waits and now_ms >= self.until_ms

    def is_kept(self) -> bool:
        """Tell whether it is in the store."""
        if self.waits or self.sender.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self.sender, 0)
        try:
            return not poll.poll(0)  # a hang-up: the receiving end was closed
        except OSError:
            return True  # no memory: if it was closed, sending will fail

    def close(self) -> None:
        """Close our ends. What is stored stays in the store."""
        self.waits = False
        self._parts.notifier.forget_store()
        for _, fd in self._unsent:
            posix.close(fd)
        self._unsent = []
        self.sender.close()
        if self._barrier >= 0:
            self._parts.loop.unwatch(self._barrier)
            posix.close(self._barrier)
            self._barrier = -1
