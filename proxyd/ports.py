"""Upstreams that are made when a client needs one: for its port, or for its own address.

A firewall or a program in the kernel can lead any port to one listener, and the client's own socket
knows which port it was: Transparent=yes with a TPROXY rule, or BPF sk_lookup. Each such port has an
upstream of its own with `HOST:*`, made for its first client. With --source=client each address of
clients has: a connection that was made for one must not be given to another, and what keeps one
away from the target need not concern others. There may be many of them, so an upstream without a
held client is discarded before there are.
"""

from proxyd.address import without_port
from proxyd.upstream import Upstream

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

_IDLE_MAX = 32
"""Beyond this number, upstreams are kept only while they hold a client."""


class Ports:
    """The upstreams for the other ports of one target, or for its clients."""

    __slots__ = ("_by_client", "_by_port", "_discard", "_fixed", "_make")

    def __init__(
        self,
        make: "Callable[[int, bytes], Upstream]",
        discard: "Callable[[Upstream], None]",
        *,
        by_client: bool = False,
    ) -> None:
        """`make` returns a new upstream for a port, `discard` is called with one to forget.

        `by_client`: each address of clients has upstreams of its own, for which `make` is given it.
        """
        self._by_client = by_client
        self._make = make
        self._discard = discard
        self._fixed: dict[int, Upstream] = {}
        """Those of listeners, which stay."""
        self._by_port: dict[tuple[int, bytes], Upstream] = {}
        """Those made here, by port and client; the one used last comes last."""

    def add_fixed(self, upstream: Upstream) -> None:
        """Use the upstream of a listener for the clients of its port."""
        self._fixed[upstream.port] = upstream

    @property
    def held(self) -> int:
        """The number of clients that upstreams made here hold."""
        return sum([len(upstream.held) for upstream in self._by_port.values()])

    def upstream(self, port: int, peer: bytes = b"") -> Upstream:
        """Return the upstream for `port`, and for the client with the packed address `peer`."""
        client = without_port(peer) if self._by_client else b""
        if not client and port in self._fixed:
            return self._fixed[port]
        upstream = self._by_port.pop((port, client), None)
        if upstream is None:
            upstream = self._make(port, client)
            upstream.set_group(upstream.target.text)
        self._by_port[port, client] = upstream
        if len(self._by_port) > _IDLE_MAX:
            self._discard_idle(upstream)
        return upstream

    def _discard_idle(self, heir: Upstream) -> None:
        """Discard those used longest ago; `heir` takes over their counters."""
        for key, upstream in list(self._by_port.items()):
            if upstream is heir or len(self._by_port) <= _IDLE_MAX:
                return
            if not upstream.held:
                del self._by_port[key]
                self._discard(upstream)
                heir.replace(upstream)
