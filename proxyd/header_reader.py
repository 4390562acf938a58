"""Clients that begin with a PROXY header, which is read here before they are served.

They come from the networks of --accept-proxy-protocol=. A header is looked at without being taken
until it is complete, and then taken to its last byte: what follows belongs to the target.
"""

import _socket
import errno

from proxyd._relay import refuse_rights
from proxyd.address import AF_UNIX
from proxyd.event_loop import EPOLLET, EPOLLIN, EventLoop
from proxyd.listen import Listener
from proxyd.received_header import SIZE_MAX, HeaderError, ReceivedHeader, parse

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

HEADER_MS = 5000
"""How long a client may take to send its header."""

_EPOLLHUP = 0x10
_EPOLLRDHUP = 0x2000


class Sender:
    """A client whose header is not complete yet. The HeaderReader owns its fd."""

    __slots__ = ("deadline_ms", "fd", "listener", "peer")

    def __init__(self, listener: Listener, fd: int, peer: bytes, deadline_ms: int) -> None:
        self.listener = listener
        self.fd = fd
        self.peer = peer
        """Its packed address, which is not that of the client in the header."""
        self.deadline_ms = deadline_ms


class HeaderReader:
    """Reads the headers of clients. Until then each of them takes a place of the limit."""

    __slots__ = ("_admit", "_loop", "_refuse", "_senders", "cut")

    def __init__(
        self,
        loop: EventLoop,
        admit: "Callable[[Sender, ReceivedHeader], None]",
        refuse: "Callable[[Sender, str], None]",
    ) -> None:
        """Pass each client on.

        `admit` is called with one whose header was read, and owns its fd then; `refuse` with one
        that was closed, and why.
        """
        self._loop = loop
        self._admit = admit
        self._refuse = refuse
        self._senders: dict[int, Sender] = {}
        """By fd, the oldest first."""
        self.cut = 0
        """Clients that had not sent their header when the program ended."""

    def __len__(self) -> int:
        """Return how many clients have not sent their whole header yet."""
        return len(self._senders)

    def take(self, listener: Listener, fd: int, peer: bytes) -> None:
        """Serve a client once its header was read; the fd is owned from now on."""
        sender = Sender(listener, fd, peer, self._loop.relay.now_ms + HEADER_MS)
        self._senders[fd] = sender
        if listener.family == AF_UNIX:
            refuse_rights(fd)
        if self._read(sender):
            return  # as a rule it has come with the connection
        try:
            events = EPOLLIN | _EPOLLRDHUP | EPOLLET
            self._loop.watch(fd, lambda events: self._ready(sender, events), events)
        except OSError as error:
            self._drop(sender, f"it could not be watched: {error.strerror}")

    def step(self, now_ms: int) -> None:
        """Refuse the clients whose time is over."""
        for sender in list(self._senders.values()):
            if now_ms < sender.deadline_ms:
                return
            self._drop(sender, f"no PROXY header within {HEADER_MS // 1000} s")

    def next_ms(self) -> int | None:
        """When to call step() at the latest; None: not before the next client."""
        return next((one.deadline_ms for one in self._senders.values()), None)

    def drop_all(self) -> int:
        """Cut the clients; return their number."""
        for sender in self._senders.values():
            self._loop.hang_up(sender.fd, reset=True)
        count = len(self._senders)
        self.cut += count
        self._senders.clear()
        return count

    def _ready(self, sender: Sender, events: int) -> None:
        if not self._read(sender) and events & (_EPOLLRDHUP | _EPOLLHUP):
            self._drop(sender, "the end of the connection in the PROXY header")

    def _read(self, sender: Sender) -> bool:
        """Read the header, if it is complete; return False if there has to be more of it."""
        try:
            header = take_header(sender.fd, sender.listener.family)
        except HeaderError as error:
            self._drop(sender, str(error))
            return True
        if header is None:
            return False
        del self._senders[sender.fd]
        self._loop.unwatch(sender.fd)
        self._admit(sender, header)
        return True

    def _drop(self, sender: Sender, why: str) -> None:
        del self._senders[sender.fd]
        self._loop.hang_up(sender.fd)
        self._refuse(sender, why)


def take_header(fd: int, family: int) -> ReceivedHeader | None:
    """Take the header from a socket, and nothing behind it; None if it is not complete yet.

    Raises HeaderError if there is none, or will be none.
    """
    sock = _socket.socket(family, _socket.SOCK_STREAM, 0, fileno=fd)
    try:
        return _take(sock, family)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return None
        raise HeaderError(f"{error.strerror} before a PROXY header") from None
    finally:
        sock.detach()


def _take(sock: _socket.socket, family: int) -> ReceivedHeader | None:
    data, _, flags, _ = sock.recvmsg(SIZE_MAX, 0, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
    if family == AF_UNIX and flags & _socket.MSG_CTRUNC:
        # They are not taken, since closing them may wait for as long as their sender likes.
        raise HeaderError("descriptors with a PROXY header")
    if not data:
        raise HeaderError("the end of the connection before a PROXY header")
    header = parse(data)
    if header is not None and len(sock.recv(header.size, _socket.MSG_DONTWAIT)) != header.size:
        raise HeaderError("an urgent byte in the PROXY header")
    return header
