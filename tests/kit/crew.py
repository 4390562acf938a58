"""A rig with a crew, and where its connections are."""

from kit.rig import epoll_fds


class Crewed:
    """A rig whose relay has hired `threads` more."""

    def __init__(self, rig, threads=1):
        self.rig = rig
        self.epolls = []
        self.hire(threads)

    def hire(self, threads):
        before = epoll_fds()
        for _ in range(threads):
            self.rig.relay.start_worker()
        self.epolls += sorted(epoll_fds() - before)

    def place_of(self, fd):
        """Where a socket is registered: 0 for the boss, 1 … for its crew, None for nowhere yet."""
        for place, epoll in enumerate([self.rig.epoll, *self.epolls]):
            with open(f"/proc/self/fdinfo/{epoll}") as info:
                if f"tfd: {fd:8}" in info.read():
                    return place
        return None

    def link(self, place):
        """A connection that is forwarded there: others are made first where those are due."""
        while True:
            link = self.rig.link()
            self.rig.until(lambda link=link: self.place_of(link.client_fd) is not None, "a place")
            if self.place_of(link.client_fd) == place:
                return link
