"""The parts of the program that have to do with its connections."""

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

    from proxyd.acceptor import Acceptor
    from proxyd.event_loop import EventLoop, PolicyEvent
    from proxyd.listen import Listener
    from proxyd.options import Options
    from proxyd.sd_notify import Notifier
    from proxyd.target import Target
    from proxyd.upstream import Upstream


class Parts:
    """What continuity needs of a server. Everything stays the server's."""

    __slots__ = (
        "acceptor",
        "busy",
        "entrance",
        "handle",
        "loop",
        "notifier",
        "options",
        "targets",
        "upstreams",
    )

    def __init__(  # noqa: PLR0913, PLR0917 - all that has to do with connections
        self,
        loop: "EventLoop",
        acceptor: "Acceptor",
        upstreams: "list[Upstream]",
        targets: "list[Target]",
        notifier: "Notifier",
        options: "Options",
        entrance: "Listener | None",
        handle: "Callable[[PolicyEvent], None]",
        busy: "Callable[[], bool]",
    ) -> None:
        """`entrance` is the inspection socket; `handle` handles an event of the relay."""
        self.loop = loop
        self.acceptor = acceptor
        self.upstreams = upstreams
        self.targets = targets
        self.notifier = notifier
        self.options = options
        self.entrance = entrance
        self.handle = handle
        self.busy = busy
        """Tells whether there are connections or held clients."""
