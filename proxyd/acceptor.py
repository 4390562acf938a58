"""Accepting: which clients are accepted, and when none is.

The relay accepts, and connects by itself wherever the policy allows that in advance. This module
allows it, and admits the clients for which it does not.
"""

import errno
import posix

from proxyd import log
from proxyd._relay import (
    CHECK_PORT,
    Accepted,
    AcceptFailed,
    Refused,
    RelayListener,
    socket_names,
    tune_socket,
)
from proxyd.address import port
from proxyd.event_loop import EventLoop
from proxyd.listen import Listener
from proxyd.loop_guard import what_to_check
from proxyd.peers import client_label
from proxyd.refusals import Refusals
from proxyd.upstream import Upstream

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

    from proxyd.header_reader import HeaderReader, Sender
    from proxyd.networks import Network
    from proxyd.received_header import ReceivedHeader

PAUSE_MS = 100
"""How long no client is accepted after fds or memory have run out, unless a connection ends."""

_ERRORS_OF_CLIENT = (
    errno.ECONNABORTED,
    errno.EPROTO,
    errno.ENOPROTOOPT,
    errno.ENONET,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ETIMEDOUT,
    errno.EINTR,
)
"""Errors of accept(2) that concern only the client that was to be accepted."""

_ERRORS_OF_LISTENER = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP)
"""Errors of accept(2) after which the listener will never accept again."""


class Acceptor:
    """Accepts clients from all listeners, up to the limit. The listeners stay the caller's."""

    def __init__(
        self,
        loop: EventLoop,
        listeners: list[Listener],
        connections_max: int,
        proxy_protocol: int,
    ) -> None:
        """Each has its `upstream` and `ports` already, unless it is for datagrams: not for us."""
        self.listeners = listeners
        """All, the ones for datagrams included: events name them by their index."""
        self._streams = [one for one in listeners if not one.datagram]
        self.refusals = Refusals(loop.relay)
        self.header_reader: HeaderReader | None = None
        """Reads the headers that clients begin with; None: no client does."""
        self.per_source = 0
        """How many connections each source may have, as limit_sources() has set; 0: no limit."""
        self.passed_in = 0
        """Clients that the service manager has accepted (Accept=yes)."""
        self.kept = 0
        """Clients that the next process goes on with, if there is one."""
        self.taken_over = 0
        """Clients that an earlier process has accepted, and that this one goes on with."""
        self.resume_ms: int | None = None
        """When to accept again, after fds or memory have run out."""
        self._loop = loop
        self._relay = loop.relay
        self._upstreams = list({id(one.upstream): one.upstream for one in self._streams}.values())
        self._ports = {one.ports for one in self._streams if one.ports is not None}
        self._relay.connections_max = connections_max
        self._proxy_protocol = proxy_protocol
        self._header: Callable[[int, int, bytes], bytes] | None = None
        self.no_header: type[Exception] = OSError
        """What header_for() raises for a client whose address is unknown."""
        if proxy_protocol:  # now, because later there may be no fd to load it with
            from proxyd.proxy_protocol import UnknownAddressError, header

            self._header, self.no_header = header, UnknownAddressError
        self._open_at_pause = 0
        for index, listener in enumerate(listeners):
            listener.index = index
        for listener in self._streams:
            self._add_to_relay(listener)

    def _add_to_relay(self, listener: Listener) -> None:
        by_port = listener.ports is not None and listener.target.any_port
        check = what_to_check(listener) | (CHECK_PORT if by_port else 0)
        terms = listener.fd, listener.family, check, listener.index
        relay_listener = RelayListener(self._relay, *terms)
        listener.relay_listener = relay_listener
        listener.upstream.add_listener(relay_listener)

    def limit_sources(self, places_max: int, unknown_uid: int) -> None:
        """Let each source have `places_max` connections, all users with `unknown_uid` excepted.

        Raises OSError.
        """
        self._relay.limit_sources(places_max, unknown_uid)
        self.per_source = places_max

    def expect_headers(self, networks: "list[Network]", *, unix_clients: bool) -> None:
        """Read PROXY headers from clients of these networks, and from UNIX clients if told so."""
        from proxyd.header_reader import HeaderReader

        self._relay.expect_headers(networks, unix_clients)
        self.header_reader = HeaderReader(self._loop, self._introduced, self._refuse_headerless)

    @property
    def broken(self) -> bool:
        """Whether there is no listener left to accept or receive from."""
        return all(one.broken for one in self.listeners)

    def start(self) -> None:
        """Start to accept. A connection that was passed in is served at once."""
        for listener in self._streams:
            tune_socket(listener.fd, listener.family)
            if listener.connected:
                fd, listener.fd = listener.fd, -1
                self.passed_in += 1
                self._relay.take_over(fd, listener.family)
                peer = socket_names(fd)[0]
                self._accepted(Accepted(listener.index, fd, peer, self._relay.expects_header(peer)))
            elif self.taken_over:  # they must not be lost because this fails
                self._restart(listener)
            else:
                listener.relay_listener.start()
                listener.accepting = True
        self.update_relay()

    def update_relay(self) -> None:
        """Tell the relay how many clients are held, and where it may connect others by itself."""
        self._relay.held = self._held()
        seen = self._proxy_protocol or self._loop.labelled  # each client has to pass through here
        for listener in self._streams:
            upstream = listener.upstream
            address = None if seen else upstream.auto_connect_address
            terms = upstream.connect_ms, upstream.target.index
            listener.relay_listener.auto_connect(address, *terms)

    def wake_at_count(self) -> int:
        """Return the number of open connections at which tick() is to be called; -1: never."""
        return -1 if self.resume_ms is None else self._open_at_pause - 1

    def tick(self, now_ms: int) -> None:
        """Accept again once it is time, or a connection has ended; refuse late headers."""
        if self.header_reader is not None:
            self.header_reader.step(now_ms)
        if self.resume_ms is None:
            return
        if now_ms >= self.resume_ms or self._relay.connections < self._open_at_pause:
            self.resume_ms = None
            for listener in self._streams:
                self._restart(listener)

    def next_ms(self) -> int | None:
        """When to call tick() at the latest; None: not before the next event."""
        late = None if self.header_reader is None else self.header_reader.next_ms()
        return min((time for time in (self.resume_ms, late) if time is not None), default=None)

    def drop_all(self) -> int:
        """Cut all clients that have not sent their PROXY header yet; return their number."""
        return 0 if self.header_reader is None else self.header_reader.drop_all()

    def _restart(self, listener: Listener) -> None:
        if listener.accepting or listener.broken or listener.fd < 0:
            return
        try:
            listener.relay_listener.start()
        except OSError:  # this takes memory too: try again later
            self._resume_later()
        else:
            listener.accepting = True

    # ── events ────────────────────────────────────────────────────────────────────────────────────

    def handle(self, event: Accepted | AcceptFailed | Refused) -> None:
        """Handle an event of a listener."""
        listener = self.listeners[event.listener]
        if isinstance(event, Accepted):
            self._accepted(event)
        elif isinstance(event, AcceptFailed):
            self._accept_failed(listener, event.error)
        elif event.by_source:
            self.refusals.note_source_limit(listener, event.peer, self.per_source)
        else:
            self.refusals.note_limit(listener, event.peer)

    def _accepted(self, event: Accepted) -> None:
        relay = self._relay
        listener = self.listeners[event.listener]
        if relay.connections + relay.in_quarantine + self._held() >= relay.connections_max:
            relay.hang_up(event.client)
            self.refusals.count += 1
            self.refusals.note_limit(listener, event.peer)
        elif event.sends_header and self.header_reader is not None:
            self.header_reader.take(listener, event.client, event.peer)
        else:
            self._admit(listener, event.client, event.peer)

    def go_on(
        self, listener: Listener, fd: int, peer: bytes, deadline_ms: int, number: int
    ) -> None:
        """Serve a client of an earlier process, to which it had not sent its PROXY header.

        If the options have changed, what it sends is for the target.
        """
        if self.header_reader is not None and self._relay.expects_header(peer):
            self.header_reader.take(listener, fd, peer, deadline_ms, number)
        else:
            self._relay.count_again(fd, peer)
            self._admit(listener, fd, peer, number=number)

    def _held(self) -> int:
        """Return the number of held clients, which count as connections."""
        held = [len(upstream.held) for upstream in self._upstreams]
        return sum(held + [ports.held for ports in self._ports]) + self.awaiting_header

    @property
    def awaiting_header(self) -> int:
        """The number of clients that have not sent their PROXY header yet."""
        return 0 if self.header_reader is None else len(self.header_reader)

    @property
    def cut(self) -> int:
        """The number of clients that drop_all() has cut."""
        return 0 if self.header_reader is None else self.header_reader.cut

    def _introduced(self, sender: "Sender", received: "ReceivedHeader") -> bool:
        """Serve a client whose PROXY header was read: it is the one that the header tells of.

        Return whether it was let in.
        """
        listener, fd = sender.listener, sender.fd
        if received.peer and not self._relay.count_source(fd, received.peer):
            self._relay.hang_up(fd)
            self.refusals.count += 1
            self.refusals.note_source_limit(listener, received.peer, self.per_source)
            return False
        header = None
        if self._proxy_protocol:
            from proxyd.proxy_protocol import pass_on

            header = pass_on(self._proxy_protocol, received)
        self._admit(listener, fd, received.peer or sender.peer, header, sender.id)
        return True

    def _refuse_headerless(self, sender: "Sender", why: str) -> None:
        self.refusals.add_headerless(sender.listener, sender.peer, why)

    def _admit(
        self, listener: Listener, fd: int, peer: bytes, header: bytes | None = None, number: int = 0
    ) -> None:
        """Hand a client to its upstream; `peer` is its packed address, if known.

        `header`: what the target is told first, if that is not what the socket says. `number`: its
        id, if it has one already.
        """
        try:
            header = self.header_for(fd, peer) if header is None else header
        except self.no_header:
            self._refuse_unknown(listener, fd)
            return
        upstream = upstream_of(listener, fd, peer)
        name = ""
        if self._loop.labelled:
            name = client_label(fd, peer)
            log.debug(f"New connection from {name} to {upstream.text}.")
        upstream.take(fd, listener.family, listener.index, header, name, peer, number)

    def header_for(self, fd: int, peer: bytes) -> bytes | None:
        """Return the PROXY header of a client, None without --proxy-protocol=. Raises no_header."""
        return None if self._header is None else self._header(self._proxy_protocol, fd, peer)

    def _refuse_unknown(self, listener: Listener, fd: int) -> None:
        """Refuse a client that was reset before its address was read.

        Announced as UNKNOWN or LOCAL, which stands for the proxy itself, it might be allowed more
        than it should.
        """
        self._relay.hang_up(fd, reset=True)
        self.refusals.add_unknown(listener)

    def _accept_failed(self, listener: Listener, error: int) -> None:
        where = listener.text
        if error == errno.ELOOP:
            log.limited(
                f"loop {where}",
                f"Refusing connection: target {listener.upstream.text} leads back to our own "
                f"listener {where}.",
            )
        elif error in _ERRORS_OF_CLIENT:
            log.limited("accept", f"Failed to accept from {where}: {posix.strerror(error)}.")
        elif error in _ERRORS_OF_LISTENER:
            log.error(f"Failed to accept from {where}: {posix.strerror(error)}.")
            self._stop_listener(listener)
            listener.broken = True
        else:  # out of fds or memory, or a security module forbids it
            self._pause(error)

    def _pause(self, error: int) -> None:
        """Stop accepting for a while: the listener stays readable, and would use up a CPU."""
        self._relay.trim_pipes()
        self.stop()
        self._resume_later()
        log.limited(
            "exhausted",
            f"Failed to accept: {posix.strerror(error)}. Waiting until a connection ends.",
        )

    def stop(self) -> None:
        """Stop accepting; waiting clients stay in the backlog."""
        self.resume_ms = None
        for listener in self._streams:
            self._stop_listener(listener)

    def resume_soon(self) -> None:
        """Accept again with the next tick(), after stop()."""
        self._open_at_pause = self._relay.connections
        self.resume_ms = self._relay.now_ms

    def _stop_listener(self, listener: Listener) -> None:
        if listener.accepting:
            listener.accepting = False
            listener.relay_listener.stop()

    def _resume_later(self) -> None:
        """Accept again after a pause, or when a connection has ended."""
        self._open_at_pause = self._relay.connections
        self.resume_ms = self._relay.now_ms + PAUSE_MS


def upstream_of(listener: Listener, fd: int, peer: bytes = b"") -> Upstream:
    """Return the upstream of one client, whose socket knows its port even after a reset.

    `peer`: its packed address; b"" if only its socket knows it.
    """
    if listener.ports is None:
        return listener.upstream
    names = socket_names(fd)
    number = port(names[1]) if listener.target.any_port else listener.upstream.port
    if not number:
        return listener.upstream
    return listener.ports.upstream(number, peer or names[0])
