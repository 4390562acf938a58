"""The descriptor store of the service manager: where a parcel waits for the next process.

Whether there is a store, and room in it, no manager says. So an empty parcel is stored first: if it
is refused, its receiving end is closed, which its sending end shows once the manager has answered
a barrier (sd_notify(3)). Only then are connections put into it.
"""

import posix
import select

from proxyd import log
from proxyd.continuity import departure, parcel
from proxyd.errors import reason

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd.continuity.parts import Parts

ANSWER_MS = 2000
"""How long the service manager may take to answer; after that it counts as one without a store."""


class Store:
    """An attempt to store a parcel. Close it in the end: what is stored stays in the store."""

    __slots__ = ("_barrier", "_parts", "_sender", "until_ms", "waits")

    def __init__(self, parts: "Parts") -> None:
        """Begin it. Raises OSError."""
        self._parts = parts
        self.waits = True
        """Whether the manager has not answered yet …"""
        self.until_ms = parts.loop.relay.now_ms + ANSWER_MS
        """… and until when it may."""
        self._barrier = -1
        parts.loop.relay.trim_pipes()  # descriptors may be short
        self._sender, receiver = parcel.pair()
        try:
            self.waits = self._store(receiver.fileno())
        except OSError:
            self.close()
            raise
        finally:
            receiver.close()

    def _store(self, receiver: int) -> bool:
        """Have the empty parcel stored; tell whether there will be an answer. Raises OSError."""
        notifier = self._parts.notifier
        self._barrier, theirs = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
        try:
            self._parts.loop.watch(self._barrier, lambda _events: self._answered(), quiet=True)
            # FDPOLL=0: otherwise it is removed as soon as this process has ended.
            text = f"FDSTORE=1\nFDNAME={parcel.NAME}\nFDPOLL=0"
            return notifier.send_fd(text, receiver) and notifier.send_fd("BARRIER=1", theirs)
        finally:
            posix.close(theirs)

    def step(self, now_ms: int) -> None:
        """Give up waiting once it has taken too long."""
        if self.waits and now_ms >= self.until_ms:
            log.warning("No store for connections: the service manager does not answer.")
            self.close()

    def fill(self) -> bool:
        """Put everything into the parcel, if it is in the store; tell whether it is.

        The relay has nothing left then, and nothing that was sent on is closed with a word.
        """
        if self.waits or not self._is_kept():
            return False
        if not self._parts.busy():
            self._parts.notifier.remove_stored()  # all have ended in time
            return False
        try:
            what = departure.pack(self._parts, self._sender)
        except (OSError, MemoryError) as error:
            log.warning(f"Failed to keep the connections: {reason(error)}")
            self._give_up()
            return False
        if not self._is_kept():  # some managers close what they refuse only after their answer
            self._give_up()
            return False
        departure.leave(self._parts)
        log.info(f"Stopped; {what} are kept for the next start.")
        return True

    def _give_up(self) -> None:
        """Have everything again, to end it as without a store."""
        departure.resume(self._parts)
        self._parts.acceptor.stop()

    def _is_kept(self) -> bool:
        if self._sender.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self._sender, 0)
        try:
            return not poll.poll(0)  # a hang-up: the receiving end was closed
        except OSError:
            return True  # no memory: if it was closed, sending will fail

    def close(self) -> None:
        """Close our ends. What is stored stays in the store."""
        self.waits = False
        self._sender.close()
        if self._barrier >= 0:
            self._parts.loop.unwatch(self._barrier)
            posix.close(self._barrier)
            self._barrier = -1

    def _answered(self) -> None:
        self.waits = False
        self._parts.loop.unwatch(self._barrier)
