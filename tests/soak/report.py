"""What a load process tells the one that started it: JSON, one object a line, on stdout."""

import json
import sys


def tell(event, **facts):
    print(json.dumps({"event": event, **facts}), flush=True)


class Tally:
    """Counts of what was done, by name. `faults` go out at once: a process may be killed."""

    def __init__(self, who):
        self._who = who
        self.counts = {}

    def add(self, name, amount=1):
        self.counts[name] = self.counts.get(name, 0) + amount

    def fault(self, what):
        self.add("faults")
        tell("fault", who=self._who, what=str(what))

    def send(self, event="counts", **facts):
        """Tell what was counted since the last time."""
        tell(event, who=self._who, counts=self.counts, **facts)
        self.counts = {}


def read_settings():
    """The settings this process was started with: JSON, its only argument."""
    return json.loads(sys.argv[1])
