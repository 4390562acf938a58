"""Name look-ups, off the main thread.

getaddrinfo(3) blocks, for as long as the name servers like. So it runs on a few threads, and the
main loop hears of an answer through an eventfd. Nobody ever waits for these threads, not at exit
either.
"""

import _socket
import _thread
import os
from _collections_abc import Callable

from proxyd import address as sockaddr
from proxyd import log
from proxyd.errors import reason

FRESH_MS = 1000
"""An answer, or the lack of one, serves for so long."""

STALE_MS = 5 * 60 * 1000
"""While look-ups fail, the last good answer serves for so long."""

_THREADS_MAX = 4

RETRYABLE = (
    _socket.EAI_AGAIN,
    _socket.EAI_NONAME,  # the name may appear: a container's does when it starts
    getattr(_socket, "EAI_NODATA", -5),
    _socket.EAI_MEMORY,  # and these are ours, not the name's: they pass as well
    _socket.EAI_SYSTEM,
)
"""Errors after which the name may be found later."""

Done = Callable[[list[bytes], "_socket.gaierror | None"], None]


class Name:
    """One host name: the last good answer, and who waits for the next."""

    __slots__ = ("addresses", "asked_ms", "error", "good_ms", "host", "waiting")

    def __init__(self, host: bytes) -> None:
        self.host = host
        self.addresses: list[bytes] = []
        """Packed, port 0, in the order to try them."""
        self.good_ms: int | None = None
        """When they were looked up."""
        self.asked_ms: int | None = None
        """When the last look-up ended."""
        self.error: _socket.gaierror | None = None
        """How it ended."""
        self.waiting: list[Done] = []
        """Not empty: a look-up is under way."""


class Resolver:
    """Looks names up; belongs to the main thread but for _work()."""

    __slots__ = ("_answers", "_jobs", "_names", "_threads", "_under_way", "fd")

    def __init__(self) -> None:
        from _queue import SimpleQueue

        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable when collect() has something to do."""
        self._names: dict[bytes, Name] = {}
        self._jobs: SimpleQueue[Name] = SimpleQueue()
        self._answers: SimpleQueue[tuple[Name, list[bytes], _socket.gaierror | None]] = (
            SimpleQueue()
        )
        self._threads = 0
        self._under_way = 0
        """Look-ups whose answer was not collected yet."""

    def start(self, hosts: list[bytes]) -> None:
        """Start a thread; where there can be none, look `hosts` up once and for all."""
        if self._add_thread():
            return
        log.warning("No thread can be started for name look-ups: names are resolved once, now.")
        for host in dict.fromkeys(hosts):
            name = self._names[host] = Name(host)
            name.addresses, name.error = _look_up(host)
            if name.error is not None:
                log.error(f"Failed to resolve host: {name.error.strerror} ({host.decode()})")

    def fresh(self, host: bytes, now_ms: int) -> bool:
        """Tell whether ask() would answer at once, with addresses."""
        name = self._names.get(host)
        return name is not None and name.good_ms is not None and now_ms - name.good_ms < FRESH_MS

    def ask(self, host: bytes, now_ms: int, done: Done) -> None:
        """Call `done` with the addresses of `host`, or with none and the error; perhaps at once.

        All who ask for one name while it is looked up wait for the same look-up.
        """
        name = self._names.setdefault(host, Name(host))
        if self._threads == 0:
            done(name.addresses, name.error)
        elif not name.waiting and name.asked_ms is not None and now_ms - name.asked_ms < FRESH_MS:
            self._tell(name, now_ms, [done])
        else:
            name.waiting.append(done)
            if len(name.waiting) == 1:
                self._submit(name)

    def collect(self, now_ms: int) -> None:
        """Hand out the answers that have come."""
        try:
            os.eventfd_read(self.fd)
        except (BlockingIOError, InterruptedError):
            return  # if there is something, it is announced again
        while not self._answers.empty():
            name, addresses, error = self._answers.get()
            self._under_way -= 1
            name.asked_ms, name.error = now_ms, error
            if name.error is None:
                name.addresses, name.good_ms = addresses, now_ms
            waiting, name.waiting = name.waiting, []
            self._tell(name, now_ms, waiting)

    def _tell(self, name: Name, now_ms: int, waiting: list[Done]) -> None:
        addresses: list[bytes] = []
        if name.good_ms is not None and now_ms - name.good_ms < STALE_MS:
            addresses = name.addresses
        if addresses and name.error is not None:
            log.limited(
                f"resolve {name.host!r}",
                f"Failed to resolve host: {name.error.strerror} ({name.host.decode()}); "
                "using its last addresses.",
            )
        for done in waiting:
            done(addresses, None if addresses else name.error)

    def _submit(self, name: Name) -> None:
        self._under_way += 1
        if self._threads < min(self._under_way, _THREADS_MAX):
            self._add_thread()
        self._jobs.put(name)

    def _add_thread(self) -> bool:
        try:
            _thread.start_new_thread(self._work, ())
        except (RuntimeError, MemoryError):  # TasksMax=, RLIMIT_NPROC
            return False
        self._threads += 1
        return True

    def _work(self) -> None:
        """Look up what is asked for, for ever. Runs on a thread of its own."""
        while True:
            name = self._jobs.get()
            self._answers.put((name, *_look_up(name.host)))
            os.eventfd_write(self.fd, 1)


def _look_up(host: bytes) -> tuple[list[bytes], "_socket.gaierror | None"]:
    """Return the addresses of `host`, families interleaved, or the error. Blocks.

    No AI_ADDRCONFIG: it hides ::1 and 127.0.0.1 from a machine without a network.
    """
    try:
        found = _socket.getaddrinfo(host, None, 0, _socket.SOCK_STREAM)
        return interleaved([sockaddr.from_socket_name(info[0], info[4]) for info in found]), None
    except _socket.gaierror as error:
        return [], error
    except (OSError, MemoryError) as error:  # no fd or no memory is left
        return [], _socket.gaierror(_socket.EAI_SYSTEM, reason(error) or "Out of memory")
    except ValueError as error:
        return [], _socket.gaierror(_socket.EAI_FAIL, str(error))


def interleaved(addresses: list[bytes]) -> list[bytes]:
    """Alternate the families, beginning with that of the first (RFC 8305, section 4)."""
    unique = list(dict.fromkeys(addresses))
    first = [a for a in unique if a[:2] == unique[0][:2]]
    other = [a for a in unique if a[:2] != unique[0][:2]]
    mixed: list[bytes] = []
    for index in range(max(len(first), len(other))):
        mixed += first[index : index + 1] + other[index : index + 1]
    return mixed
