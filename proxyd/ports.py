"""`HOST:*` for clients that connected to another port than their listener's.

A firewall or a program in the kernel can lead any port to one listener, and the client's own
socket knows which it was: Transparent=yes with a TPROXY rule, BPF sk_lookup. Such a port has a way
to the target of its own, made for its first client. There may be 65535 of them, so those without
a client that waits are given up before they are many.
"""

from _collections_abc import Callable

from proxyd.reach import Reach

_IDLE_MOST = 32
"""More ways than this are kept only while a client waits on each."""


class Ports:
    """The ways to the other ports of one target. `ways` has all ways of the program."""

    __slots__ = ("_all", "_by_port", "_make", "fixed")

    def __init__(self, make: Callable[[int], Reach], ways: list[Reach]) -> None:
        self._make = make
        self._all = ways
        self.fixed: dict[int, Reach] = {}
        """Those of listeners, which stay."""
        self._by_port: dict[int, Reach] = {}
        """Those that are ours; who was used last comes last."""

    @property
    def held(self) -> int:
        """How many clients wait."""
        return sum([len(way.held) for way in self._by_port.values()])

    def way(self, port: int) -> Reach:
        """Return the way to `port`."""
        if port in self.fixed:
            return self.fixed[port]
        way = self._by_port.pop(port, None)
        if way is None:
            way = self._make(port)
            way.be_one_of(way.target.text)
            self._all.append(way)
        self._by_port[port] = way
        if len(self._by_port) > _IDLE_MOST:
            self._give_some_up(way)
        return way

    def _give_some_up(self, heir: Reach) -> None:
        """Give up those that were used longest ago; `heir` goes on counting for them."""
        for port, way in list(self._by_port.items()):
            if way is heir or len(self._by_port) <= _IDLE_MOST:
                return
            if not way.held:
                del self._by_port[port]
                self._all.remove(way)
                heir.succeed(way)
