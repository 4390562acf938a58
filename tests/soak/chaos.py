"""Disturbances: processes are stopped, targets restarted, one proxy runs out of fds, one is
restarted and reloaded, and one is killed."""

import heapq
import time

from soak.world import STOP_MS

# The shortest and the longest pause before each disturbance, in seconds.
_EVERY = {"stop": (2, 6), "restart": (5, 12), "squeeze": (3, 8), "renew": (1, 5), "crash": (2, 6)}

_AWAY = 0.0, 3.0  # seconds that a restarted target is away
_SQUEEZED = 0.3, 1.5  # seconds that fds are short


class Chaos:
    """`tick()` does what is due; `settle()` undoes everything and pauses until `resume()`."""

    def __init__(self, world, dice):
        self.world = world
        self.dice = dice
        self.counts = dict.fromkeys(_EVERY, 0)
        self.counts["kill"] = 0
        self.counts["reload"] = 0
        self.faults = []
        """What went wrong when a proxy was renewed."""
        self._due = []
        self._undo = []
        self._serial = 0
        self._few = next(one for one in world.served if one.name == "few").proxy
        self._limit = self._few.fd_limit()
        self._new = next(one for one in world.served if one.name == "new")
        self._killed = next(one for one in world.served if one.name == "killed")
        self._begin(_EVERY.keys() - {"crash"})  # the lasting connections are too young for it

    def resume(self):
        self._begin(_EVERY)

    def _begin(self, disturbances):
        self._due = []
        for what in sorted(disturbances):
            self._again(what)

    def tick(self):
        now = time.monotonic()
        while self._undo and self._undo[0][0] <= now:
            heapq.heappop(self._undo)[2]()
        while self._due and self._due[0][0] <= now:
            what = heapq.heappop(self._due)[2]
            getattr(self, what)()
            self.counts[what] += 1
            self._again(what)

    def settle(self):
        """Undo all disturbances, and begin no more."""
        self._due = []
        while self._undo:
            heapq.heappop(self._undo)[2]()

    def _at(self, heap, seconds, what):
        self._serial += 1
        heapq.heappush(heap, (time.monotonic() + seconds, self._serial, what))

    def _again(self, what):
        self._at(self._due, self.dice.uniform(*_EVERY[what]), what)

    def stop(self):
        """Send SIGSTOP to a load process, and later SIGCONT."""
        load = self.dice.choice(self.world.loads)
        load.stop()
        self._at(self._undo, self.dice.uniform(0.05, STOP_MS / 1000), load.go_on)

    def restart(self):
        """Kill the targets of one proxy or let them exit, and start them again later."""
        target = self.world.shaky
        if self.dice.random() < 0.5:
            self.counts["kill"] += 1
            target.kill()
        else:
            target.go_on()
            target.process.stdin.close()
            target.cpu_before = target.cpu_seconds()
            target.process.wait(timeout=60)
        self._at(self._undo, self.dice.uniform(*_AWAY), target.start)

    def renew(self):
        """Restart or reload one proxy, whose connections go on."""
        reloads = self.dice.random() < 0.5
        self.counts["reload"] += reloads
        faults = self._new.reload() if reloads else self._new.restart()
        self.faults += [f"{self._new.name}: {text}" for text in faults]

    def crash(self):
        """Kill one proxy, whose connections go on if they are old enough."""
        self.faults += [f"{self._killed.name}: {text}" for text in self._killed.kill()]

    def squeeze(self):
        """Leave one proxy fewer fds than it needs, so that accept, socket and pipe2 fail."""
        self._few.set_fd_limit(self._limit_that_leaves(self.dice.randrange(4)), self._limit[1])
        self._at(
            self._undo,
            self.dice.uniform(*_SQUEEZED),
            lambda: self._few.set_fd_limit(*self._limit),
        )

    def _limit_that_leaves(self, room):
        """Return the soft limit that leaves exactly `room` free numbers."""
        used, limit = self._few.fds(), 0
        while room or limit in used:
            room -= limit not in used
            limit += 1
        return min(limit, self._limit[1])
