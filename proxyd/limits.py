"""What the limit of open files allows: connections, and attempts to connect."""

from proxyd import log
from proxyd._relay import raise_fd_limit

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

# Open besides connections: stdio (3), epoll, signals, the service manager's socket, the
# extension's eventfd, a client that is accepted only to be refused, what writes to stderr, and two
# to spare.
_BASE = 11

_PER_LOOKUP = 4
"""A socket to each of up to three name servers, and a file; each name has one look-up at a time."""

SPARE_ATTEMPTS = 4
"""Attempts to all targets beyond one per held client."""

_PER_THREAD = 2
"""For each further thread: its epoll instance and wake-up eventfd."""

_QUARANTINE = 3
"""With UNIX sockets: epoll instance and eventfd of the quarantine's thread, and our own eventfd."""

_STAT = 1
"""With several threads, /proc/stat or /proc/uptime is kept open."""

_PER_CONNECTION = 2
"""Client and target. Pipes are optional; without one the relay copies."""

_PER_FLOW = 1
"""What a client and its target send each other in datagrams: the socket towards the target."""

_WITH_PIPES = 6
"""A connection that stalls in both directions holds two pipes."""

_PER_KEPT = 1 / 16
"""With a descriptor store: both ends of a page, of 32 to 128 connections (relay/tidy.pxd). Root and
the first page have what is to spare: the fewer connections are possible, the more they matter."""


CALLERS_MAX = 64
"""How many callers the inspection socket has at once, if the limit of open files allows …"""

CALLERS_MIN = 4
"""… and if it does not."""


def fit_callers(connections: int) -> int:
    """Return how many callers of the inspection socket fit: connections come first."""
    needed = _BASE + SPARE_ATTEMPTS + _PER_CONNECTION * connections + 2 * CALLERS_MAX
    return CALLERS_MAX if raise_fd_limit(0) >= needed else CALLERS_MIN


def fit_connections(  # noqa: PLR0913 - each of them needs fds
    wanted: int,
    listeners: int,
    threads: int,
    *,
    names: int,
    unix: bool = False,
    inspected: bool = False,
    streams: bool = True,
    kept: bool = False,
) -> int:
    """Raise the soft RLIMIT_NOFILE to what `wanted` connections need; return how many fit.

    `names`: the number of names to look up; `inspected`: there is an inspection socket, whose
    callers take no place of a connection; `streams`: there are not only flows of datagrams, which
    have one socket each; `kept`: connections may be kept in case of a kill, as flows never are. The
    limit is never lowered, and never raised beyond the hard one. If it is too small, a warning is
    logged and fewer connections fit, at least one.
    """
    base = _BASE + SPARE_ATTEMPTS + listeners + _PER_LOOKUP * names
    if unix:
        base += _QUARANTINE
    if threads > 1:
        base += 1 + _STAT + _PER_THREAD * (threads - 1)
    if inspected:
        base += 1 + CALLERS_MIN
    pages = _PER_KEPT if kept and streams else 0
    most, least = (_WITH_PIPES, _PER_CONNECTION) if streams else (_PER_FLOW, _PER_FLOW)
    limit = raise_fd_limit(base + inspected * CALLERS_MAX + int((most + pages) * wanted))
    fitting = max(int((limit - base) / (least + pages)), 1)
    if fitting >= wanted:
        return wanted
    what = "connections" if streams else "flows"
    log.warning(
        f"The limit of {limit} open files allows {fitting} {what}, not {wanted}: "
        "raise LimitNOFILE=."
    )
    return fitting


class AttemptBudget:
    """Limits the attempts to all targets that go beyond one per held client."""

    __slots__ = ("_surpluses",)

    def __init__(self) -> None:
        self._surpluses: list[Callable[[], int]] = []

    def join(self, surplus: "Callable[[], int]") -> None:
        """Count the attempts to one more target; `surplus` returns their current number."""
        self._surpluses.append(surplus)

    def leave(self, surplus: "Callable[[], int]") -> None:
        """Stop counting the attempts to a target."""
        self._surpluses.remove(surplus)

    @property
    def exhausted(self) -> bool:
        """Tell whether no further attempt is allowed."""
        return sum([surplus() for surplus in self._surpluses]) >= SPARE_ATTEMPTS
