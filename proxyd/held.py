"""Held clients: accepted, and waiting for a target that cannot be reached yet."""

from _collections_abc import Callable, Iterator

from proxyd._relay import peek, socket_error
from proxyd.event_loop import EPOLLET, EventLoop


class HeldClients:
    """The clients that are held for one target, the oldest first. Owns their fds."""

    __slots__ = ("_added", "_by_fd", "_loop", "_on_leave", "cut", "failed", "gone")

    def __init__(self, loop: EventLoop, on_leave: "Callable[[HeldClient], None]") -> None:
        """`on_leave` is called with a client that has left, after it was closed."""
        self._loop = loop
        self._on_leave = on_leave
        self._by_fd: dict[int, HeldClient] = {}
        self._added = 0
        self.failed = 0
        """Clients given up."""
        self.gone = 0
        """Clients that left."""
        self.cut = 0
        """Clients that were held when the program ended."""

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

    def give_up(self, client: "HeldClient") -> None:
        """Close a client plainly, as the original does; if it has sent bytes, that is a reset."""
        self._close(client)
        self.failed += 1

    def cut_all(self) -> int:
        """Reset all clients; return their number."""
        clients = list(self)
        for client in clients:
            self._close(client, reset=True)
        self.cut += len(clients)
        return len(clients)

    def add_counters(self, other: "HeldClients") -> None:
        """Take over the counters of other clients."""
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
            self._close(client)
            self.gone += 1
            self._on_leave(client)

    def _close(self, client: "HeldClient", *, reset: bool = False) -> None:
        self.remove(client)
        self._loop.hang_up(client.fd, reset=reset)

    def remove(self, client: "HeldClient") -> None:
        """Stop holding a client; its fd is the caller's again."""
        self._loop.unwatch(client.fd)
        del self._by_fd[client.fd]


class HeldClient:
    """An accepted client that waits."""

    __slots__ = (
        "connection",
        "family",
        "fd",
        "has_unsent",
        "name",
        "number",
        "preamble",
        "since_ms",
    )

    def __init__(
        self, fd: int, family: int, preamble: bytes | None, name: str, since_ms: int
    ) -> None:
        self.fd = fd
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
