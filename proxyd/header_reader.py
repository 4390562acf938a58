"""Clients that begin with a PROXY header, which is read here before they are served.

They come from the networks of --accept-proxy-protocol=. A header is looked at without being taken
until it is complete, and then taken to its last byte: what follows belongs to the target.
"""

import _socket
import errno
import posix

from proxyd._relay import ENDING_CUT, peer_pid, refuse_rights, socket_names
from proxyd.address import AF_UNIX, port
from proxyd.event_loop import EPOLLET, EPOLLIN, EventLoop
from proxyd.listen import Listener
from proxyd.received_header import SIZE_MAX, HeaderError, ReceivedHeader, parse

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEADER_MS = 5000
"""How long a client may take to send its header."""

REFUSED = "refused"
"""How a client ends that does not send one."""

_EPOLLHUP = 0x10
_EPOLLRDHUP = 0x2000


class Sender:
    """A client whose header is not complete yet. The HeaderReader owns its fd."""

    __slots__ = ("deadline_ms", "fd", "id", "listener", "peer", "pid", "target")

    state = "header"
    """As the inspection calls it."""

    def __init__(self, listener: Listener, fd: int, peer: bytes, deadline_ms: int) -> None:
        self.listener = listener
        self.fd = fd
        self.peer = peer
        """Its packed address, which is not that of the client in the header."""
        self.pid = 0
        """Its process, if it waits; 0: not known."""
        self.deadline_ms = deadline_ms
        self.id = 0
        """The id that its connection will have; 0: its header came at once."""
        self.target = ""
        """Where it will be connected to, if it waits."""

    @property
    def since_ms(self) -> int:
        """When it was accepted."""
        return self.deadline_ms - HEADER_MS


class HeaderReader:
    """Reads the headers of clients. Until then each of them takes a place of the limit."""

    __slots__ = ("_admit", "_loop", "_refuse", "_senders", "cut")

    def __init__(
        self,
        loop: EventLoop,
        admit: "Callable[[Sender, ReceivedHeader], bool]",
        refuse: "Callable[[Sender, str], None]",
    ) -> None:
        """Pass each client on.

        `admit` is called with one whose header was read, owns its fd then, and tells whether it was
        let in; `refuse` with one that was closed, and why.
        """
        self._loop = loop
        self._admit = admit
        self._refuse = refuse
        self._senders: dict[int, Sender] = {}
        """By fd, the oldest first."""
        self.cut = 0
        """Clients that were reset before that: terminated, or at the end of the program."""

    def __len__(self) -> int:
        """Return how many clients have not sent their whole header yet."""
        return len(self._senders)

    def __iter__(self) -> "Iterator[Sender]":
        """Iterate over these clients, the oldest first."""
        return iter(self._senders.values())

    def take(
        self,
        listener: Listener,
        fd: int,
        peer: bytes,
        deadline_ms: int | None = None,
        connection: int = 0,
    ) -> None:
        """Serve a client once its header was read; the fd is owned from now on.

        If another process has accepted it: `deadline_ms`, until when it may take its time, and the
        id that it has there.
        """
        latest_ms = self._loop.relay.now_ms + HEADER_MS
        deadline_ms = latest_ms if deadline_ms is None else min(deadline_ms, latest_ms)
        self._senders[fd] = sender = Sender(listener, fd, peer, deadline_ms)
        sender.id = connection
        if listener.family == AF_UNIX:
            refuse_rights(fd)
        if self._read(sender):
            return  # as a rule it has come with the connection
        self._wait(sender)
        try:
            events = EPOLLIN | _EPOLLRDHUP | EPOLLET
            self._loop.watch(fd, lambda events: self._ready(sender, events), events)
        except OSError as error:
            self._drop(sender, f"it could not be watched: {error.strerror}")

    def step(self, now_ms: int) -> None:
        """Refuse the clients whose time is over."""
        late_ms = self.next_ms()
        if late_ms is None or now_ms < late_ms:
            return
        for sender in list(self):
            if now_ms < sender.deadline_ms:
                return
            self._drop(sender, f"no PROXY header within {HEADER_MS // 1000} s")

    def next_ms(self) -> int | None:
        """When to call step() at the latest; None: not before the next client."""
        oldest = next(iter(self), None)
        return None if oldest is None else oldest.deadline_ms

    def terminate(self, connection: int) -> bool:
        """Reset the client with this id; False: there is none."""
        found = [sender for sender in self if sender.id == connection]
        for sender in found:
            self._cut(sender)
        return bool(found)

    def drop_all(self) -> int:
        """Cut the clients; return their number."""
        senders = list(self)
        for sender in senders:
            self._cut(sender)
        return len(senders)

    def _cut(self, sender: Sender) -> None:
        self._tell(sender, ENDING_CUT)
        del self._senders[sender.fd]
        self._loop.hang_up(sender.fd, reset=True)
        self.cut += 1

    def _wait(self, sender: Sender) -> None:
        """Take note of what the inspection shows of a client that waits."""
        sender.id = sender.id or self._loop.relay.new_id()
        sender.peer = sender.peer or socket_names(sender.fd)[0]
        sender.pid = peer_pid(sender.fd) if sender.listener.family == AF_UNIX else 0
        sender.target = _target_of(sender)
        self._tell(sender, "")

    def forget(self) -> None:
        """Close the clients without a word: another process goes on with them."""
        for sender in self._senders.values():
            self._loop.unwatch(sender.fd)
            posix.close(sender.fd)
        self._senders.clear()

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
        if not self._admit(sender, header):
            self._tell(sender, REFUSED)
        return True

    def _drop(self, sender: Sender, why: str) -> None:
        self._tell(sender, REFUSED)
        del self._senders[sender.fd]
        self._loop.hang_up(sender.fd)
        self._refuse(sender, why)

    def _tell(self, sender: Sender, how: str) -> None:
        """Tell watchers of a client that waits (""), or how one that has waited ends."""
        if sender.id and self._loop.on_held is not None:
            self._loop.on_held(sender.target, sender, how)


def _target_of(sender: Sender) -> str:
    listener = sender.listener
    if not listener.target.any_port:
        return listener.target.text
    number = port(socket_names(sender.fd)[1]) or listener.upstream.port
    return f"{listener.target.text.removesuffix('*')}{number}"


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
