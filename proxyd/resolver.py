"""Name look-ups in separate threads.

getaddrinfo(3) blocks for as long as the name servers take. So it runs in threads, at most one per
name, and a look-up that hangs delays no other name. An eventfd tells the main loop of an answer.
The program never waits for these threads, not even at exit.

A look-up has one of three results. Addresses are used for a second; while clients come, they are
looked up again before that. That the name does not exist, or has no address, is an answer as well:
the addresses known before are wrong from then on, because they may belong to another service. All
other results are failures, and the last good answer is used for longer (RFC 8767).
"""

import _socket
import posix

from proxyd import address as sockaddr
from proxyd import log, threads
from proxyd.errors import reason

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

    Done = Callable[[list[bytes], _socket.gaierror | None], None]

FRESH_MS = 1000
"""How long an answer, or the lack of one, is used."""

AHEAD_MS = 250
"""Addresses in use are looked up again this long before, plus the time of a look-up."""

STALE_MS = 5 * 60 * 1000
"""How long the last good answer is used while look-ups fail."""

LATE_MS = 1800
"""A look-up that takes longer counts as failed (RFC 8767 section 5, client response timer)."""

FAILING_MS = 30_000
"""How long after a failure no client waits for the next look-up (failure recheck timer)."""

_NODATA = getattr(_socket, "EAI_NODATA", -5)

GONE = (_socket.EAI_NONAME, _NODATA)
"""Errors that are answers: the name does not exist, or has no address."""

RETRYABLE = (
    *GONE,  # the name may appear, as that of a container does when it starts
    _socket.EAI_AGAIN,
    _socket.EAI_MEMORY,  # this machine is short of memory or fds, which is temporary, too
    _socket.EAI_SYSTEM,
)
"""Errors after which a later look-up may succeed."""


class Name:
    """One host name: the last good answer, and the callbacks for the next."""

    __slots__ = (
        "addresses",
        "began_ms",
        "ended_ms",
        "error",
        "good_ms",
        "host",
        "took_ms",
        "waiting",
    )

    def __init__(self, host: bytes) -> None:
        self.host = host
        self.addresses: list[bytes] = []
        """Packed, with port 0, in the order to try them; a new list for each good answer."""
        self.good_ms: int | None = None
        """When they were looked up."""
        self.ended_ms: int | None = None
        """When the last look-up ended."""
        self.error: _socket.gaierror | None = None
        """Its error, None if it succeeded."""
        self.took_ms = 0
        """How long it took."""
        self.began_ms: int | None = None
        """When the look-up that is under way began; None: none is."""
        self.waiting: list[Done] = []
        """To be called when it ends."""

    def usable(self, now_ms: int) -> list[bytes]:
        """Return the addresses if they may be used without another look-up; otherwise none."""
        if self.good_ms is None:
            return []
        if self.error is None and self.fresh(now_ms):
            return self.addresses
        stands_in = self.failing(now_ms) and now_ms - self.good_ms < STALE_MS
        return self.addresses if stands_in else []

    def failing(self, now_ms: int) -> bool:
        """Tell whether the last look-up has failed recently, or the current one is late."""
        if self.began_ms is not None and now_ms - self.began_ms >= LATE_MS:
            return True
        failed = self.error is not None and self.ended_ms is not None
        return failed and now_ms - (self.ended_ms or 0) < FAILING_MS

    def fresh(self, now_ms: int) -> bool:
        """Tell whether the result of the last look-up, good or bad, is still used."""
        return self.ended_ms is not None and now_ms - self.ended_ms < FRESH_MS

    def due(self, now_ms: int) -> bool:
        """Tell whether to look it up again, so that no client will have to wait for that."""
        if self.began_ms is not None or self.ended_ms is None:
            return False
        ahead_ms = min(AHEAD_MS + self.took_ms, FRESH_MS) if self.error is None else 0
        return now_ms - self.ended_ms >= FRESH_MS - ahead_ms

    def learn(self, addresses: list[bytes], error: "_socket.gaierror | None", now_ms: int) -> None:
        """Store the result of the look-up that was under way."""
        self.took_ms = now_ms - (now_ms if self.began_ms is None else self.began_ms)
        self.began_ms = None
        self.ended_ms, self.error = now_ms, error
        if error is None:
            self.addresses, self.good_ms = addresses, now_ms
        elif error.errno in GONE:
            self.addresses, self.good_ms = [], None


class Resolver:
    """Looks names up. Belongs to the main thread, except for _work()."""

    __slots__ = ("_answers", "_jobs", "_names", "_sharing", "_threads", "_under_way", "fd")

    def __init__(self) -> None:
        from _queue import SimpleQueue

        self.fd = posix.eventfd(0, posix.EFD_CLOEXEC | posix.EFD_NONBLOCK)
        """Readable when collect() has something to do."""
        self._names: dict[bytes, Name] = {}
        self._jobs: SimpleQueue[Name] = SimpleQueue()
        self._answers: SimpleQueue[tuple[Name, list[bytes], _socket.gaierror | None]] = (
            SimpleQueue()
        )
        self._threads = 0
        self._under_way = 0
        """Look-ups whose result has not been collected yet; at most one per name."""
        self._sharing = False
        """Whether it was logged that a thread could not be started."""

    def start(self, hosts: list[bytes]) -> None:
        """Start a thread; if that fails, look `hosts` up now, once and for all."""
        if self._add_thread():
            return
        log.warning("No thread can be started for name look-ups: names are resolved once, now.")
        for host in dict.fromkeys(hosts):
            name = self._names[host] = Name(host)
            name.addresses, name.error = _look_up(host)
            if name.error is not None:
                log.error(f"Failed to resolve host: {name.error.strerror} ({host.decode()})")

    def ask(self, host: bytes, now_ms: int, done: "Done") -> None:
        """Call `done` with the addresses of `host`, or with none and the error; possibly at once.

        All callers that ask for a name during its look-up wait for the same look-up.
        """
        name = self._names.setdefault(host, Name(host))
        addresses = self.current(host, now_ms)
        if addresses:
            done(addresses, None)
        elif self._threads == 0 or (name.began_ms is None and name.fresh(now_ms)):
            done([], name.error)
        else:
            name.waiting.append(done)
            if name.began_ms is None:
                self._submit(name, now_ms)

    def current(self, host: bytes, now_ms: int) -> list[bytes]:
        """Return the addresses of `host` if they are known now; otherwise none.

        To be called for each client, which keeps the answer fresh. The list is the same object
        until there is another answer.
        """
        name = self._names.get(host)
        if name is None:
            return []
        if self._threads == 0:
            return name.addresses
        addresses = name.usable(now_ms)
        if addresses:
            if name.error is not None or not name.fresh(now_ms):
                _warn_of_stale(name)
            if name.due(now_ms):
                self._submit(name, now_ms)
        return addresses

    def collect(self, now_ms: int) -> None:
        """Pass on the results that have arrived."""
        try:
            posix.eventfd_read(self.fd)
        except (BlockingIOError, InterruptedError):
            return  # if there is a result, the eventfd becomes readable again
        while not self._answers.empty():
            name, addresses, error = self._answers.get()
            self._under_way -= 1
            name.learn(addresses, error, now_ms)
            waiting, name.waiting = name.waiting, []
            addresses = name.usable(now_ms)
            if waiting and addresses and error is not None:
                _warn_of_stale(name)
            for done in waiting:
                done(addresses, None if addresses else error)

    def _submit(self, name: Name, now_ms: int) -> None:
        name.began_ms = now_ms
        self._under_way += 1
        if self._threads < self._under_way and not self._add_thread() and not self._sharing:
            self._sharing = True
            log.warning(
                "No further thread can be started for name look-ups: "
                f"all names share {self._threads}, and wait for each other."
            )
        self._jobs.put(name)

    def _add_thread(self) -> bool:
        try:
            threads.start(self._work)
        except (RuntimeError, MemoryError):  # TasksMax=, RLIMIT_NPROC
            return False
        self._threads += 1
        return True

    def _work(self) -> None:  # pragma: no cover - it runs, but not traced: a _thread
        """Look names up, forever. Runs in a thread of its own."""
        while True:
            name = self._jobs.get()
            self._answers.put((name, *_look_up(name.host)))
            posix.eventfd_write(self.fd, 1)


def _warn_of_stale(name: Name) -> None:
    why = "no answer yet" if name.error is None else name.error.strerror
    log.limited(
        f"resolve {name.host!r}",
        f"Failed to resolve host: {why} ({name.host.decode()}); using its last addresses.",
    )


def _look_up(host: bytes) -> tuple[list[bytes], "_socket.gaierror | None"]:
    """Return the addresses of `host`, families interleaved, or the error. Blocks."""
    addresses, error = _get(host, 0)
    if error is None or error.errno != _NODATA:
        return addresses, error
    # glibc reports that, too, if one family has no address and the look-up of the other failed.
    for family in (sockaddr.AF_INET6, sockaddr.AF_INET):
        addresses, single = _get(host, family)
        if single is None or single.errno not in GONE:
            return addresses, single
    return [], error


def _get(host: bytes, family: int) -> tuple[list[bytes], "_socket.gaierror | None"]:
    """Call getaddrinfo(3).

    Without AI_ADDRCONFIG, which would hide ::1 and 127.0.0.1 on a machine without a network.
    """
    try:
        found = _socket.getaddrinfo(host, None, family, _socket.SOCK_STREAM)
        return interleaved([sockaddr.from_socket_name(info[0], info[4]) for info in found]), None
    except _socket.gaierror as error:
        return [], error
    except (OSError, MemoryError) as error:  # pragma: no cover - no fd, no memory; in _work()
        return [], _socket.gaierror(_socket.EAI_SYSTEM, reason(error) or "Out of memory")
    except ValueError as error:  # pragma: no cover - in _work()
        return [], _socket.gaierror(_socket.EAI_FAIL, str(error))


def interleaved(addresses: list[bytes]) -> list[bytes]:
    """Alternate the families, beginning with that of the first address (RFC 8305, section 4)."""
    unique = list(dict.fromkeys(addresses))
    first = [a for a in unique if a[:2] == unique[0][:2]]
    other = [a for a in unique if a[:2] != unique[0][:2]]
    mixed: list[bytes] = []
    for index in range(max(len(first), len(other))):
        mixed += first[index : index + 1] + other[index : index + 1]
    return mixed
