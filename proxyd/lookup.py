"""Where a target is that has to be looked up: a name, or an address with an interface.

A literal address needs nothing of this, and does not load it.
"""

import errno
import os

from proxyd import address as sockaddr
from proxyd.connect_errors import may_pass
from proxyd.target import Target

TYPE_CHECKING = False  # as typing has it
if TYPE_CHECKING:
    import _socket

    from proxyd.resolver import Resolver

LOOKUP_MS = 1000
"""Pause between two look-ups of a name that is not there yet."""

LATE_MS = 1800
"""A look-up that takes longer counts as failed until it ends (RFC 8767 section 5)."""


class Interface:
    """A link-local address, whose interface is looked up for each connection.

    One that is made anew has another index, and the name may be another interface's by now.
    """

    __slots__ = ("_port", "_target", "failure", "only", "passes")

    late_ms = None
    pause_ms = 0
    several = looking = False

    def __init__(self, target: Target, port: int) -> None:
        self._target = target
        self._port = port
        self.only = sockaddr.with_port(target.address or b"", port)
        self.failure = ""
        self.passes = False

    def prompt(self, now_ms: int) -> bytes | None:
        """See Lookup."""
        return next(iter(self.addresses(now_ms)), None)

    def addresses(self, _now_ms: int) -> list[bytes]:
        """See Lookup."""
        try:
            self.only = sockaddr.with_port(self._target.scoped(), self._port)
        except OSError as error:
            number = error.errno or errno.EIO
            why = os.strerror(number)
            self.failure = f"Failed to connect to remote host: {why} ({self._target.text})"
            self.passes = may_pass(number, self.only)
            return []
        return [self.only]

    def won(self, address: bytes, prompt: bool) -> None:
        """See Lookup."""

    def lost(self) -> None:
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
        "passes",
    )

    pause_ms = LOOKUP_MS
    """When to try again after a failure."""
    only: bytes | None = None
    """The one address that there is, if there can be no other."""

    def __init__(self, host: bytes, port: int, resolver: "Resolver") -> None:
        self._host = host
        self._port = port
        self._resolver = resolver
        self._known: list[bytes] = []
        """The resolver's last answer, to tell it from the next."""
        self._answer: list[bytes] = []
        """The same, with the port."""
        self._error: _socket.gaierror | None = None
        """Or why there is none."""
        self._good = b""
        """The address to connect clients to, while one is believed to be prompt."""
        self._slow: set[bytes] = set()
        """Addresses to be tried last."""
        self.looking = False
        """A look-up is under way that clients wait for."""
        self.late_ms: int | None = None
        """When that takes too long and addresses() is to be called; None: it need not be."""
        self.failure = ""
        """Why addresses() had none; "" while it is not known yet."""
        self.passes = False
        """Whether there may be some later."""

    @property
    def several(self) -> bool:
        """Tell whether there is another address to try where one is slow."""
        return len(self._answer) > 1

    def prompt(self, now_ms: int) -> bytes | None:
        """Where to connect a client to that is not held for it; None where that is not known.

        To be called for each client, for that keeps the answer fresh.
        """
        known = self._resolver.current(self._host, now_ms)
        if not known:
            return None
        if known is not self._known:
            self._learn(known)
        return self._good or None

    def addresses(self, now_ms: int) -> list[bytes]:
        """Where to connect to, in this order; nothing while that is looked up, or unknown.

        Whoever waits for a look-up calls again when there is an answer, which is fresh then.
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
            self._failed(self._error)
        return self._in_order()

    def won(self, address: bytes, prompt: bool) -> None:
        """`address` has answered, and those that were tried before it have not."""
        for other in self._in_order():
            if other == address:
                break
            self._slow.add(other)
        self._slow.discard(address)
        self._good = address if prompt else b""

    def lost(self) -> None:
        """What prompt() said was not."""
        self._slow.add(self._good)
        self._good = b""

    def _in_order(self) -> list[bytes]:
        return sorted(self._answer, key=self._slow.__contains__)

    def _resolved(self, addresses: list[bytes], error: "_socket.gaierror | None") -> None:
        """Take the resolver's answer, perhaps from within ask()."""
        self.looking, self.late_ms = False, None
        self._error = error
        self._learn(addresses)

    def _learn(self, addresses: list[bytes]) -> None:
        """Keep an answer. If it says something new, its first address is tried as a prompt one."""
        before = set(self._answer)
        self._known = addresses
        self._answer = [sockaddr.with_port(address, self._port) for address in addresses]
        self._slow.intersection_update(self._answer)
        if self._good not in self._answer:
            self._good = b""
            if before != set(self._answer):
                self._good = next((one for one in self._answer if one not in self._slow), b"")

    def _late(self, now_ms: int) -> None:
        """Let the last good answer stand in, if there is one."""
        addresses = self._resolver.current(self._host, now_ms)
        if addresses:
            self._resolved(addresses, None)
            return
        self.late_ms = None
        self.failure = f"Failed to resolve host: no answer yet ({self._host.decode()})"
        self.passes = True

    def _failed(self, error: "_socket.gaierror") -> None:
        from proxyd.resolver import RETRYABLE as PASSING

        self.failure = f"Failed to resolve host: {error.strerror} ({self._host.decode()})"
        self.passes = error.errno in PASSING
