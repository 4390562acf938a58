"""The workers of a rig's relay, and which of them forwards a connection."""

from kit.rig import epoll_fds


class Workers:
    """Further workers of the relay of `rig`: `count` of them are started."""

    def __init__(self, rig, count=1):
        self.rig = rig
        self.epolls = []
        self.start(count)

    def start(self, count):
        """Start `count` more."""
        before = epoll_fds()
        for _ in range(count):
            self.rig.relay.start_worker()
        self.epolls += sorted(epoll_fds() - before)

    def link(self, number):
        """A connection that worker `number` forwards; those of other workers are left open."""
        while True:
            link = self.rig.link()
            self.until_assigned([link])
            if self.worker_of(link.client_fd) == number:
                return link

    def until_assigned(self, links):
        """Wait until each of these connections is registered with a worker."""
        self.rig.until(lambda: None not in self.workers_of(links), "a worker for each connection")

    def workers_of(self, links):
        """The number of the worker of each connection, as worker_of() tells it."""
        return [self.worker_of(link.client_fd) for link in links]

    def worker_of(self, fd):
        """Where a socket is registered: 0 is the main worker; None is no worker, so far."""
        for number, epoll in enumerate([self.rig.epoll, *self.epolls]):
            with open(f"/proc/self/fdinfo/{epoll}") as info:
                if f"tfd: {fd:8}" in info.read():
                    return number
        return None
