"""A parcel in the store of the service manager, where it waits for the next process.

An empty one is stored first, to see whether it is kept. Only then are connections put into it.
"""

from proxyd import log
from proxyd.activation import PARCEL_NAME
from proxyd.continuity import departure
from proxyd.continuity.deposit import Deposit
from proxyd.errors import reason

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd.continuity.parts import Parts


class Store:
    """An attempt to store a parcel. Close it in the end: what is stored stays in the store."""

    __slots__ = ("_deposit", "_parts")

    def __init__(self, parts: "Parts") -> None:
        """Begin it. Raises OSError."""
        self._parts = parts
        self._deposit = Deposit(parts, PARCEL_NAME)

    @property
    def waits(self) -> bool:
        """Tell whether the manager has not answered yet."""
        return self._deposit.waits

    @property
    def until_ms(self) -> int:
        """Return until when it may."""
        return self._deposit.until_ms

    def step(self, now_ms: int) -> None:
        """Give up waiting once it has taken too long."""
        if self._deposit.is_late(now_ms):
            log.warning("No store for connections: the service manager does not answer.")
            self.close()

    def fill(self) -> bool:
        """Put everything into the parcel, if it is in the store; tell whether it is.

        The relay has nothing left then, and nothing that was sent on is closed with a word.
        """
        if not self._deposit.is_kept():
            return False
        if not self._parts.busy():
            self._parts.notifier.remove_stored(PARCEL_NAME)  # all have ended in time
            return False
        try:
            what = departure.pack(self._parts, self._deposit.sender)
        except (OSError, MemoryError) as error:
            log.warning(f"Failed to keep the connections: {reason(error)}")
            self._give_up()
            return False
        if not self._deposit.is_kept():  # some managers close what they refuse only after an answer
            self._give_up()
            return False
        departure.leave(self._parts)
        log.info(f"Stopped; {what} are kept for the next start.")
        return True

    def _give_up(self) -> None:
        """Have everything again, to end it as without a store."""
        departure.resume(self._parts)
        self._parts.acceptor.stop()

    def close(self) -> None:
        """Close our ends. What is stored stays in the store."""
        self._deposit.close()
