"""`HOST:*` for clients that connected to another port than their listener's.

A firewall or a program in the kernel can lead any port to one listener, and the client's own socket
knows which port it was: Transparent=yes with a TPROXY rule, or BPF sk_lookup. Each such port has an
upstream of its own, made for its first client. There may be 65535 of them, so an upstream without a
held client is discarded before there are many.
"""

from proxyd.upstream import Upstream

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

_IDLE_MAX = 32
"""Beyond this number, upstreams are kept only while they hold a client."""


class Ports:
    """The upstreams for the other ports of one target."""

    __slots__ = ("_by_port", "_discard", "_fixed", "_make")

    def __init__(
        self, make: "Callable[[int], Upstream]", discard: "Callable[[Upstream], None]"
    ) -> None:
        """`make` returns a new upstream for a port, `discard` is called with one to forget."""
        self._make = make
        self._discard = discard
        self._fixed: dict[int, Upstream] = {}
        """Those of listeners, which stay."""
        self._by_port: dict[int, Upstream] = {}
        """Those made here; the one used last comes last."""

    def add_fixed(self, upstream: Upstream) -> None:
        """Use the upstream of a listener for the clients of its port."""
        self._fixed[upstream.port] = upstream

    @property
    def held(self) -> int:
        """The number of clients that upstreams made here hold."""
        return sum([len(upstream.held) for upstream in self._by_port.values()])

    def upstream(self, port: int) -> Upstream:
        """Return the upstream for `port`."""
        if port in self._fixed:
            return self._fixed[port]
        upstream = self._by_port.pop(port, None)
        if upstream is None:
            upstream = self._make(port)
            upstream.set_group(upstream.target.text)
        self._by_port[port] = upstream
        if len(self._by_port) > _IDLE_MAX:
            self._discard_idle(upstream)
        return upstream

    def _discard_idle(self, heir: Upstream) -> None:
        """Discard those used longest ago; `heir` takes over their counters."""
        for port, upstream in list(self._by_port.items()):
            if upstream is heir or len(self._by_port) <= _IDLE_MAX:
                return
            if not upstream.held:
                del self._by_port[port]
                self._discard(upstream)
                heir.replace(upstream)
