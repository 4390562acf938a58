"""How many connections the fd limit allows."""

from proxyd import log
from proxyd._relay import raise_fd_limit

# What is open beside connections: stdio (3), epoll, signals, the service manager's socket, the
# extension's eventfd, a client that is accepted only to be refused, what writes to stderr, and two
# to spare.
_BASE = 11

_PER_LOOKUP = 4
"""A socket to each of up to three name servers, and a file; there is one look-up for each name."""

_ATTEMPTS = 4
"""Connects beyond one for each client that waits: race.SPARE_ALL."""

_PER_THREAD = 2
"""Of each further thread: its epoll and the bell of its inbox; the first has such a bell then."""

_QUARANTINE = 3
"""With UNIX sockets: the epoll and the bell of its thread, and the bell of the first."""

_STAT = 1
"""With several threads /proc/stat or /proc/uptime is kept open."""

_PER_CONNECTION = 2
"""Client and target. Pipes are had only while they can be."""

_WITH_PIPES = 6
"""A connection that stalls both ways holds two pipes."""


def fit_connections(
    wanted: int, listeners: int, threads: int, *, names: int, unix: bool = False
) -> int:
    """Raise the soft RLIMIT_NOFILE to what `wanted` connections need; return how many fit.

    `names` is how many have to be looked up. The limit is never lowered, and never raised past
    the hard one. One that is too small costs one warning, and connections: at least one remains.
    """
    base = _BASE + _ATTEMPTS + listeners + _PER_LOOKUP * names
    if unix:
        base += _QUARANTINE
    if threads > 1:
        base += 1 + _STAT + _PER_THREAD * (threads - 1)
    limit = raise_fd_limit(base + _WITH_PIPES * wanted)
    fitting = max((limit - base) // _PER_CONNECTION, 1)
    if fitting >= wanted:
        return wanted
    log.warning(
        f"The limit of {limit} open files allows {fitting} connections, not {wanted}: "
        "raise LimitNOFILE=."
    )
    return fitting
