"""The addresses of a target that have to be looked up: a name, or an address with an interface.

They have one interface, and a literal address has it too (target.py), which never loads this.
"""

import errno

from proxyd import address as sockaddr
from proxyd.connect_errors import describe, is_temporary

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    import _socket

    from proxyd.resolver import Resolver

LOOKUP_MS = 1000
"""Pause between two look-ups of a name that does not exist yet."""

LATE_MS = 1800
"""A look-up that takes longer counts as failed until it ends (RFC 8767 section 5)."""


class Interface:
    """A link-local address whose interface is looked up for each connection.

    An interface that is created anew has another index, and its old index may be reused.
    """

    __slots__ = ("_address", "_scope", "_text", "failure", "only", "temporary")

    fixed = late_ms = None
    pause_ms = 0
    several = looking = False

    def __init__(self, address: bytes, scope: str, text: str) -> None:
        """`address` lacks `scope`, the interface's name; `text` is the target, for messages."""
        self._address = address
        self._scope = scope
        self._text = text
        self.only = address
        self.failure = ""
        self.temporary = False

    def prompt(self, now_ms: int) -> bytes | None:
        """See Lookup."""
        return next(iter(self.addresses(now_ms)), None)

    def addresses(self, _now_ms: int) -> list[bytes]:
        """See Lookup."""
        try:
            index = sockaddr.interface_index(self._scope)
        except OSError as error:
            number = error.errno or errno.EIO
            self.failure = describe(number, self.only, self._text)
            self.temporary = is_temporary(number, self.only)
            return []
        self.only = sockaddr.with_scope(self._address, index)
        return [self.only]

    def succeeded(self, address: bytes, prompt: bool) -> None:
        """See Lookup."""

    def failed(self) -> None:
        """See Lookup."""


class Lookup:
    """The addresses of a name, and which of them to try first."""

    __slots__ = (
        "_answer",
        "_error",
        "_good",
        "_host",
        "_known",
        "_port",
        "_resolver",
        "_slow",
        "failure",
        "late_ms",
        "looking",
        "temporary",
    )

    pause_ms = LOOKUP_MS
    """Pause before the next look-up after a failure."""
    fixed: bytes | None = None
    """The address, if it never changes."""
    only: bytes | None = None
    """The address, if there can be no other at the same time."""

    def __init__(self, host: bytes, port: int, resolver: "Resolver") -> None:
        self._host = host
        self._port = port
        self._resolver = resolver
        self._known: list[bytes] = []
        """The resolver's last answer, to recognise a new one."""
        self._answer: list[bytes] = []
        """The same addresses, with the port."""
        self._error: _socket.gaierror | None = None
        """Why there is no answer."""
        self._good = b""
        """The address to connect clients to at once; b"" while none is known to answer promptly."""
        self._slow: set[bytes] = set()
        """Addresses to try last."""
        self.looking = False
        """Whether clients wait for a look-up that is under way."""
        self.late_ms: int | None = None
        """When the look-up is late, and addresses() is to be called; None: it need not be."""
        self.failure = ""
        """Why addresses() returned none; "" while that is not known yet."""
        self.temporary = False
        """Whether there may be addresses later."""

    @property
    def several(self) -> bool:
        """Tell whether there is another address to try if one is slow."""
        return len(self._answer) > 1

    def prompt(self, now_ms: int) -> bytes | None:
        """Return where to connect a client to without holding it; None if that is not known.

        To be called for each client, which keeps the answer fresh.
        """
        known = self._resolver.current(self._host, now_ms)
        if not known:
            return None
        if known is not self._known:
            self._learn(known)
        return self._good or None

    def addresses(self, now_ms: int) -> list[bytes]:
        """Return where to connect to, in this order; nothing during a look-up, or if it has failed.

        During a look-up, call it again after the next event: the answer is fresh then.
        """
        self.failure = ""
        if not self.looking:
            self.looking, self.late_ms = True, now_ms + LATE_MS
            self._resolver.ask(self._host, now_ms, self._resolved)
        elif self.late_ms is not None and now_ms >= self.late_ms:
            self._late(now_ms)
        if self.looking:
            return []
        if self._error is not None:
            self._look_up_failed(self._error)
        return self._in_order()

    def succeeded(self, address: bytes, prompt: bool) -> None:
        """Record that `address` has answered, and those tried before it have not."""
        for other in self._in_order():
            if other == address:
                break
            self._slow.add(other)
        self._slow.discard(address)
        self._good = address if prompt else b""

    def failed(self) -> None:
        """Record that the address returned by prompt() did not answer promptly."""
        self._slow.add(self._good)
        self._good = b""

    def _in_order(self) -> list[bytes]:
        return sorted(self._answer, key=self._slow.__contains__)

    def _resolved(self, addresses: list[bytes], error: "_socket.gaierror | None") -> None:
        """Take the resolver's answer; may be called from within ask()."""
        self.looking, self.late_ms = False, None
        self._error = error
        self._learn(addresses)

    def _learn(self, addresses: list[bytes]) -> None:
        """Keep an answer. If it has changed, its first address is tried as a prompt one."""
        before = set(self._answer)
        self._known = addresses
        self._answer = [sockaddr.with_port(address, self._port) for address in addresses]
        self._slow.intersection_update(self._answer)
        if self._good not in self._answer:
            self._good = b""
            if before != set(self._answer):
                self._good = next((one for one in self._answer if one not in self._slow), b"")

    def _late(self, now_ms: int) -> None:
        """Use the last good answer, if there is one."""
        addresses = self._resolver.current(self._host, now_ms)
        if addresses:
            self._resolved(addresses, None)
            return
        self.late_ms = None
        self.failure = f"Failed to resolve host: no answer yet ({self._host.decode()})"
        self.temporary = True

    def _look_up_failed(self, error: "_socket.gaierror") -> None:
        from proxyd.resolver import RETRYABLE

        self.failure = f"Failed to resolve host: {error.strerror} ({self._host.decode()})"
        self.temporary = error.errno in RETRYABLE
