"""Held clients: accepted, and waiting for a target that cannot be reached yet."""

from proxyd._relay import (
    ENDING_CLIENT_GONE,
    ENDING_CUT,
    peek,
    peer_pid,
    socket_error,
    socket_names,
)
from proxyd.address import AF_UNIX
from proxyd.event_loop import EPOLLET, EventLoop

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAILED = "failed"
"""How a client ends that is given up; for other ends there are words of the relay."""

WAIT_BUCKETS_MS = (5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 60_000)
"""Upper bounds of the times that clients were held, for the metrics."""


class HeldClients:
    """The clients that are held for one target, the oldest first. Owns their fds."""

    __slots__ = (
        "_added",
        "_by_fd",
        "_loop",
        "_on_leave",
        "_target",
        "cut",
        "failed",
        "failed_ms",
        "failed_why",
        "gone",
        "waited_ms",
        "waits",
    )

    def __init__(
        self, loop: EventLoop, target: str, on_leave: "Callable[[HeldClient, str], None]"
    ) -> None:
        """`on_leave` is called with a client that has left or was cut, after it was closed."""
        self._loop = loop
        self._target = target
        self._on_leave = on_leave
        self._by_fd: dict[int, HeldClient] = {}
        self._added = 0
        self.failed = 0
        """Clients given up …"""
        self.failed_ms: int | None = None
        """… when the last of them was …"""
        self.failed_why = ""
        """… and why."""
        self.gone = 0
        """Clients that left."""
        self.cut = 0
        """Clients that were held when the program ended, or that were terminated."""
        self.waits = [0] * (len(WAIT_BUCKETS_MS) + 1)
        """How many of the clients served were held for how long, by WAIT_BUCKETS_MS."""
        self.waited_ms = 0
        """How long they were held in all."""

    def __len__(self) -> int:
        """Return the number of held clients."""
        return len(self._by_fd)

    def __iter__(self) -> "Iterator[HeldClient]":
        """Iterate over the clients, the oldest first."""
        return iter(self._by_fd.values())

    def add(self, client: "HeldClient") -> None:
        """Hold a client, in the order in which clients were accepted."""
        self._added += 1
        client.number = client.number or self._added  # it keeps its number if it is held again
        is_new = not client.id and not client.connection  # otherwise it was told of before
        client.id = client.id or client.connection or self._loop.relay.new_id()
        if is_new:
            self._tell(client, "")
        youngest = next(reversed(self._by_fd.values()), client)
        self._by_fd[client.fd] = client
        if client.arrival < youngest.arrival:  # its connect has taken longer to fail
            self._by_fd = dict(sorted(self._by_fd.items(), key=lambda item: item[1].arrival))
        try:
            # Only for EPOLLERR and EPOLLHUP, which are always reported. A TCP client that has sent
            # FIN is still served: close(2) and a half-close look the same from here.
            self._loop.watch(client.fd, lambda _events: self._hung_up(client), EPOLLET)
        except OSError:
            pass  # the relay will notice later that it has left

    def give_up(self, client: "HeldClient", why: str) -> None:
        """Close a client plainly, as the original does; if it has sent bytes, that is a reset."""
        self._close(client, FAILED)
        self.failed += 1
        self.failed_ms = self._loop.relay.now_ms
        self.failed_why = why

    def terminate(self, client: "HeldClient") -> None:
        """Reset one client, because an administrator wants it."""
        self._close(client, ENDING_CUT, reset=True)
        self.cut += 1
        self._on_leave(client, "terminated")

    def cut_all(self) -> int:
        """Reset all clients; return their number."""
        clients = list(self)
        for client in clients:
            self._close(client, ENDING_CUT, reset=True)
        self.cut += len(clients)
        return len(clients)

    def serve(self, client: "HeldClient", fd: int, error: int, upstream: int) -> int:
        """Give a client its connection to the target; return the id.

        `upstream`: the index under which it counts. Raises OSError, and both fds are the caller's.
        """
        self.remove(client)
        waited_ms = self._loop.relay.now_ms - client.since_ms
        connection = self._loop.relay.adopt(
            client.fd,
            client.family,
            fd,
            client.preamble,
            error,
            listener=client.listener,
            upstream=upstream,
            peer=client.peer,
            held_ms=waited_ms,
            connection=client.id,
        )
        self.waits[sum([waited_ms > bound_ms for bound_ms in WAIT_BUCKETS_MS])] += 1
        self.waited_ms += waited_ms
        return connection

    def add_counters(self, other: "HeldClients") -> None:
        """Take over the counters of other clients."""
        self.waits = [one + more for one, more in zip(self.waits, other.waits, strict=True)]
        self.waited_ms += other.waited_ms
        if (other.failed_ms or 0) > (self.failed_ms or 0):
            self.failed_ms, self.failed_why = other.failed_ms, other.failed_why
        self.failed += other.failed
        self.gone += other.gone
        self.cut += other.cut

    def expects_end(self) -> bool:
        """Tell whether the oldest client has closed without sending anything.

        If so, a target that closes early is no reason to hold it.
        """
        return self.oldest is not None and self.oldest.has_ended()

    @property
    def oldest(self) -> "HeldClient | None":
        """The client that is served next; None if there is none."""
        return next(iter(self), None)

    def _hung_up(self, client: "HeldClient") -> None:
        if client.has_left():
            self._close(client, ENDING_CLIENT_GONE)
            self.gone += 1
            self._on_leave(client, ENDING_CLIENT_GONE)

    def _close(self, client: "HeldClient", how: str, *, reset: bool = False) -> None:
        self._tell(client, how)
        self.remove(client)
        self._loop.hang_up(client.fd, reset=reset)

    def _tell(self, client: "HeldClient", how: str) -> None:
        if self._loop.on_held is not None:
            self._loop.on_held(self._target, client, how)

    def remove(self, client: "HeldClient") -> None:
        """Stop holding a client; its fd is the caller's again."""
        self._loop.unwatch(client.fd)
        del self._by_fd[client.fd]


class HeldClient:
    """An accepted client that waits for its target."""

    state = "held"
    """As the inspection calls it."""

    __slots__ = (
        "connection",
        "family",
        "fd",
        "has_unsent",
        "id",
        "listener",
        "name",
        "number",
        "peer",
        "pid",
        "preamble",
        "since_ms",
    )

    def __init__(  # noqa: PLR0913, PLR0917 - all that is known about a client
        self,
        fd: int,
        family: int,
        preamble: bytes | None,
        name: str,
        since_ms: int,
        peer: bytes = b"",
    ) -> None:
        self.fd = fd
        self.peer = peer or socket_names(fd)[0]
        """Its packed address. Once it has reset, its socket does not know it any more."""
        self.pid = peer_pid(fd) if family == AF_UNIX else 0
        """Its process; 0: not known."""
        self.listener = 0
        """The index of the one that it came from."""
        self.family = family
        self.preamble = preamble
        """What the target gets first: a PROXY header, or bytes already read from the client."""
        self.has_unsent = False
        """Whether the preamble contains bytes of the client itself."""
        self.name = name
        """Its address, for log lines at debug level; "" otherwise."""
        self.since_ms = since_ms
        """When it was accepted."""
        self.connection = 0
        """The id of its connection, if that has failed later than at once; otherwise 0."""
        self.id = 0
        """The id of its connection, of the one that has failed or of the next; 0: not held yet."""
        self.number = 0
        """How many clients were held up to this one; 0: it has not been held yet."""

    @property
    def arrival(self) -> tuple[int, bool, int, int]:
        """What to sort by for the order in which clients were accepted.

        Of the clients of one millisecond, those with a connection came first, because no connection
        is begun while a client is held. Connections may fail in any order; their ids rise.
        """
        return self.since_ms, self.connection == 0, self.connection, self.number

    def has_left(self) -> bool:
        """Tell, after a hang-up, whether it is gone: it has reset, or has sent nothing.

        A UNIX client that sends and closes hangs up too, but what it has sent must be delivered.
        """
        return socket_error(self.fd) != 0 or (not self.has_unsent and peek(self.fd) <= 0)

    def has_ended(self) -> bool:
        """Tell whether it has closed without sending anything."""
        return not self.has_unsent and peek(self.fd) == 0
