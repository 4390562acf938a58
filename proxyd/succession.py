"""Whether, and how, another process is to go on with the connections of this one.

Loaded at every start, and no more than that: all that is done is in `proxyd.continuity`, which is
imported when it is needed, or some time after the start.
"""

import posix

from proxyd import log
from proxyd._relay import NotKept, Old
from proxyd.errors import reason
from proxyd.sd_notify import Notifier

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from proxyd.continuity.keep import Keeper
    from proxyd.continuity.parcel import Parcel
    from proxyd.continuity.parts import Parts
    from proxyd.continuity.reload import Reload
    from proxyd.continuity.root import Root
    from proxyd.continuity.store import Store

_LOAD_MS = 10_000
"""How long after its start a process loads what it needs at its end. Not only then: another version
may be installed meanwhile, and modules of two versions do not fit together."""


class Succession:
    """What a process takes over from the last one, and leaves to the next one."""

    __slots__ = ("_keeper", "_load_ms", "_notifier", "_parts", "_reload", "_stopped", "_store")

    def __init__(self, notifier: Notifier, parts: "Callable[[], Parts]") -> None:
        """`parts` makes what `proxyd.continuity` needs of the server."""
        self._notifier = notifier
        self._parts = parts
        self._reload: Reload | None = None
        self._store: Store | None = None
        self._keeper: Keeper | None = None
        self._stopped = False
        self._load_ms: int | None = 0
        """When to load what is needed at the end; 0 before the first step, None afterwards."""

    def take(
        self, parcel: "Parcel | None", root: "Root | None" = None, *, stored: "Sequence[str]"
    ) -> None:
        """Go on with the connections of the last process.

        `root`: what is needed of it if it was killed. `stored`: names of what the service manager
        is to drop: while it has the sockets, nothing ends them.
        """
        if root is not None:
            from proxyd.continuity import recovery

            self._keeper = recovery.take(self._parts(), root, parcel)
        elif parcel is not None:
            from proxyd.continuity import arrival

            arrival.take(self._parts(), parcel)
        for name in stored:
            self._notifier.remove_stored(name)

    def handle(self, event: Old | NotKept) -> None:
        """Keep connections from now on, in case of a kill; or warn that some are not kept."""
        if isinstance(event, NotKept):
            why = posix.strerror(event.error)
            log.warning(f"Not all connections are kept in case of a kill: {why}.")
        elif self._stopped:
            return
        elif self._keeper is not None:
            self._keeper.begin()
        else:
            self._keep()

    def _keep(self) -> None:
        try:
            from proxyd.continuity.keep import Keeper

            self._keeper = Keeper(self._parts())
        except (OSError, ImportError) as error:  # no fd is left, or a filter forbids a call
            log.info(f"Connections are not kept in case of a kill: {reason(error)}")

    def reload(self) -> bool:
        """Begin to execute the program again; return False if SIGHUP is to end it."""
        if self._reload is not None:
            return True
        try:
            from proxyd.continuity import reload
        except (OSError, ImportError) as error:  # there is no fd left to load it with
            log.warning(f"Not reloaded: {reason(error)}")
            self._notifier.reloading()  # the service manager waits for both
            self._notifier.ready()
            return True
        parts = self._parts()
        if not reload.is_possible(parts.acceptor):
            return False
        self._reload = reload.Reload(parts, lambda: self._keeper)
        return True

    def stop(self, *, busy: bool) -> None:
        """The program is to end: if it is busy, ask the service manager for a store.

        If there is one, that can wait: until the drain is over, nothing is lost by a kill.
        """
        self._stopped = True
        if self._reload is not None:
            self._reload.cancel()
            self._reload = None
        if self._keeper is None or not self._keeper.is_stored:
            self._ask(busy=busy)

    def may_leave(self, *, busy: bool) -> bool:
        """After stop(), the drain is over: tell whether nothing has to be waited for."""
        if self._store is None and self._keeper is not None and self._keeper.is_stored:
            self._ask(busy=busy)
        return not self.waits_for_store

    def _ask(self, *, busy: bool) -> None:
        self._remove_root()  # there may be room for one descriptor only
        if not busy or not self._notifier.has_store:
            return
        try:
            from proxyd.continuity.store import Store

            parts = self._parts()
            if not parts.acceptor.passed_in:  # with Accept=yes there is no next process
                self._store = Store(parts)
        except (OSError, ImportError) as error:  # no fd is left, or a filter forbids a call
            tell = log.warning if self._notifier.has_certain_store else log.info
            tell(f"Failed to keep the connections: {reason(error)}")

    @property
    def waits_for_store(self) -> bool:
        """Tell whether the service manager has yet to say whether there is a store."""
        return self._store is not None and self._store.waits

    def next_ms(self) -> int | None:
        """Return when step() is to be called at the latest."""
        times = [self._load_ms or None]
        if self._store is not None and self._store.waits:
            times.append(self._store.until_ms)
        if self._keeper is not None:
            times.append(self._keeper.until_ms)
        if self._reload is not None:
            times.append(self._reload.until_ms)
        return min((time for time in times if time is not None), default=None)

    def step(self, now_ms: int) -> None:
        """Do what the time has made due."""
        if self._load_ms is not None and now_ms >= self._load_ms:
            self._load(now_ms)
        if self._store is not None:
            self._store.step(now_ms)
        if self._keeper is not None:
            self._keeper.step(now_ms)
        if self._reload is not None:
            self._reload.step(now_ms)
            if self._reload.done:
                self._reload = None

    def _load(self, now_ms: int) -> None:
        if not self._load_ms:
            self._load_ms = now_ms + _LOAD_MS
            return
        self._load_ms = None
        try:
            from proxyd.continuity import reload, store  # noqa: F401
        except (OSError, ImportError):
            pass  # no fd is left; when it is needed, that is told

    def leave(self) -> bool:
        """Leave all connections to the next process; return False if that is not possible."""
        self._remove_root()
        if self._store is None:
            return False
        try:
            return self._store.fill()
        finally:
            self._store.close()

    def _remove_root(self) -> None:
        """Nobody is to go on with what this process has kept in case of a kill."""
        if self._keeper is not None:
            self._keeper.remove()
