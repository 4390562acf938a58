"""Keeping connections for the next process, in case that this one is killed.

Once a connection is a second old, and if there is a store, root (root.py) is stored, and the relay
is told to keep what would be lost in a slate. Both last as long as the process, and longer.
"""

import posix

from proxyd import log
from proxyd._relay import slate_create
from proxyd.activation import PAGES_NAME
from proxyd.continuity import blocks as text_blocks
from proxyd.continuity import departure
from proxyd.continuity import root as roots
from proxyd.continuity.deposit import Deposit
from proxyd.errors import reason

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd._relay import Relay
    from proxyd.continuity.parts import Parts
    from proxyd.continuity.root import Root

_STREAM_UNIT = 256 * 1024
"""Bytes that a worker copies at a time, unless an option says otherwise: see Relay."""

_PAGE = 4096
"""What a unit of a slate is a multiple of, in bytes."""

_SLOTS_MAX = 1 << 20

_NOT_KEPT = "Connections are not kept in case of a kill"

_LASTS_MS = 1000
"""How long after it went on a process has shown that what it went on with does not kill it."""


class Keeper:
    """Has root stored, and connections kept from then on. Owns root, which the relay uses."""

    __slots__ = ("_deposit", "_is_stored", "_lasts_ms", "_parts", "_root")

    def __init__(self, parts: "Parts", root: "Root | None" = None) -> None:
        """`root` is in the store already; None: have a new one stored. Raises OSError."""
        self._parts = parts
        self._deposit: Deposit | None = None
        self._is_stored = True
        """Whether it may be in the store."""
        self._lasts_ms: int | None = None
        """When this process has lasted; None: it has, or has nothing of another one."""
        self._root = root or roots.make()
        if root is not None:
            self._lasts_ms = parts.loop.relay.now_ms + _LASTS_MS if root.attempts else None
            return
        try:
            inner = (self._root.receiver.fileno(),)
            self._deposit = Deposit(parts, PAGES_NAME, inner, self._answered)
        except OSError:
            self._root.close()
            raise

    def begin(self) -> None:
        """Keep connections from now on, if root is stored."""
        if self.is_stored:
            begin(self._parts, self._root)

    @property
    def is_stored(self) -> bool:
        """Tell whether root is in the store, for all that is known."""
        return self._deposit is None and self._is_stored

    @property
    def waits(self) -> bool:
        """Tell whether the service manager has yet to say whether root is stored."""
        return self._deposit is not None

    def _answered(self) -> None:
        """The service manager has stored root, or refused it: then nothing is kept."""
        if self._deposit is not None and self._deposit.is_kept():
            self._settle()
            begin(self._parts, self._root)
        else:
            self._is_stored = False
            self._give_up()

    def _settle(self) -> None:
        if self._deposit is not None:
            self._deposit.close()
            self._deposit = None

    def _give_up(self) -> None:
        self._settle()
        self._root.close()

    @property
    def until_ms(self) -> int | None:
        """When step() is to be called at the latest."""
        return self._lasts_ms if self._deposit is None else self._deposit.until_ms

    def step(self, now_ms: int) -> None:
        """Give up once the service manager takes too long; note that this process has lasted."""
        if self._deposit is not None and self._deposit.is_late(now_ms):
            self.remove()
            log.info(f"{_NOT_KEPT}: the service manager does not answer.")
        if self._lasts_ms is not None and now_ms >= self._lasts_ms:
            self._lasts_ms = None
            self._note_that_it_lasts()

    def _note_that_it_lasts(self) -> None:
        try:
            self._root.last()
        except OSError as error:
            log.warning(f"Connections may be reset after a kill: {reason(error)}")

    def remove(self) -> None:
        """Have the service manager drop root: nobody is to go on with what is in it."""
        self._lasts_ms = None
        if self._is_stored:
            self._is_stored = False
            self._parts.notifier.remove_stored(PAGES_NAME)
        if self._deposit is not None:
            self._give_up()

    def bequeath(self) -> int:
        """Return what a program needs of root that goes on in place of this one; -1: nothing."""
        if self._deposit is not None:
            self.remove()  # what becomes of it, nobody would know
        return self._root.receiver.fileno() if self.is_stored else -1


def begin(parts: "Parts", root: "Root") -> None:
    """Keep connections from now on, those that rest at once: a new slate, and a new generation."""
    relay = parts.loop.relay
    try:
        slate = _create(parts)
        try:
            root.begin(slate)
            relay.use_slate(slate, root.sender_fd, root.generation)
            if relay.resting:
                _enter(relay)
            root.commit()
        finally:
            posix.close(slate)
    except (OSError, ValueError, MemoryError) as error:
        log.warning(f"{_NOT_KEPT}: {reason(error)}")
        forget(parts, root)


def _enter(relay: "Relay") -> None:
    try:
        relay.enter_all()
    except OSError as error:
        log.warning(f"Not all connections are kept in case of a kill: {reason(error)}")


def _create(parts: "Parts") -> int:
    """Return the fd of a new slate. Raises OSError, ValueError."""
    options = parts.options
    unit = -(-(options.buffer_size or _STREAM_UNIT) // _PAGE) * _PAGE
    relay = parts.loop.relay
    slots = min(max(relay.connections_max, relay.resting, 1), _SLOTS_MAX)
    return slate_create(text_blocks.write(departure.places(parts)), slots, options.threads, unit)


def forget(parts: "Parts", root: "Root") -> None:
    """Have nobody go on with what is in root so far."""
    try:
        root.empty()
    except OSError as error:
        log.warning(f"Failed to forget what the last process has left: {reason(error)}")
        parts.notifier.remove_stored(PAGES_NAME)  # it is not true any more
