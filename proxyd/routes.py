"""Where the clients of each listener go: one upstream for all that lead to the same place."""

from proxyd import address
from proxyd.event_loop import EventLoop
from proxyd.listen import Listener
from proxyd.options import Options, milliseconds
from proxyd.upstream import Upstream

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd.ports import Ports
    from proxyd.resolver import Resolver
    from proxyd.target import Target


class Routes:
    """The targets of all listeners, and the upstreams of those for streams."""

    __slots__ = ("_loop", "_options", "_ports", "_resolver", "targets", "upstreams")

    def __init__(
        self,
        loop: EventLoop,
        options: Options,
        listeners: list[Listener],
        resolver: "Resolver | None",
    ) -> None:
        """Set the index of each target, and `upstream` and `ports` of each listener."""
        self._loop = loop
        self._options = options
        self._resolver = resolver
        self._ports: dict[Target, Ports] = {}
        self.upstreams: list[Upstream] = []
        self.targets = list(dict.fromkeys(one.target for one in listeners))
        for index, target in enumerate(self.targets):
            target.index = index
            loop.relay.add_upstream(index)
        for listener in listeners:
            if not listener.datagram:
                self._assign_upstream(listener)

    def _assign_upstream(self, listener: Listener) -> None:
        target = listener.target
        port = address.port(listener.address) if target.any_port else target.service or 0
        same = [one for one in self.upstreams if one.target is target and one.port == port]
        listener.upstream = same[0] if same else self._make_upstream(target, port)
        listener.ports = None
        if (target.any_port and not listener.connected) or _is_bound_to_client(target):
            listener.ports = self._ports_of(target)
            listener.ports.add_fixed(listener.upstream)

    def _ports_of(self, target: "Target") -> "Ports":
        if target not in self._ports:
            from proxyd.ports import Ports

            self._ports[target] = Ports(
                lambda port, client: self._make_upstream(target, port, client),
                self.upstreams.remove,
                by_client=_is_bound_to_client(target),
            )
        return self._ports[target]

    def _make_upstream(self, target: "Target", port: int, client: bytes = b"") -> Upstream:
        timeout_ms = milliseconds(self._options.connect_timeout)
        upstream = Upstream(self._loop, self._resolver, target, port, timeout_ms, client)
        upstream.settle(milliseconds(self._options.settle_time) or 0)
        self.upstreams.append(upstream)
        return upstream


def _is_bound_to_client(target: "Target") -> bool:
    """Tell whether sockets to a target are bound to the address of the client."""
    return target.source is not None and target.source.client
