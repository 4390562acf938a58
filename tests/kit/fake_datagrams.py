"""The relay's side of datagrams, which does what the test says. The clock is the fake relay's."""

from types import SimpleNamespace

from proxyd._datagram import DROPS, FLOW_ENDINGS, FlowInfo


def totals(**counts):
    """Counters, all of them 0 but those that are given."""
    usual = {
        "flows": 0,
        "endings": {},
        "datagrams_to_targets": 0,
        "datagrams_to_clients": 0,
        "bytes_to_targets": 0,
        "bytes_to_clients": 0,
        "dropped": {},
        "kernel_dropped": 0,
    }
    assert counts.keys() <= usual.keys()
    found = SimpleNamespace(**usual | counts)
    found.dropped = dict.fromkeys(DROPS, 0) | found.dropped
    found.endings = dict.fromkeys(FLOW_ENDINGS, 0) | found.endings
    return found


def flow_info(flow, **fields):
    """What the relay tells about a flow."""
    usual = {
        "listener": 0,
        "target_index": 0,
        "client": b"",
        "local": b"",
        "target": b"",
        "own": b"",
        "opened_ms": 0,
        "active_ms": 0,
        "established": False,
        "answered": False,
        "datagrams_up": 0,
        "datagrams_down": 0,
        "bytes_up": 0,
        "bytes_down": 0,
        "kernel_drops": 0,
    }
    assert fields.keys() <= usual.keys()
    return FlowInfo(flow, *(usual | fields).values())


class FakeDatagrams:
    """Stands in for a Datagrams."""

    def __init__(self, relay):
        self.relay = relay
        self.idle_ms = 0
        self.report_flows = False
        self.source_limits = []
        """The arguments of limit_sources()."""
        self.flows = 0
        self.last_ms = 0
        self.events = []
        self.infos = []
        self.terminated = []
        self.counts = totals()
        self.targets = []
        self.listeners = []

    def take_events(self):
        events, self.events = self.events, []
        return events

    def limit_sources(self, places_max):
        self.source_limits.append(places_max)

    def totals(self):
        return self.counts

    def rows(self, after=0, limit=64):
        return [info for info in self.infos if info.flow > after][:limit]

    def terminate(self, flow):
        self.terminated.append(flow)
        return any(info.flow == flow for info in self.infos)

    def close_all(self):
        cut, self.flows = self.flows, 0
        self.relay.connections -= cut
        return cut


class FakeTarget:
    """Stands in for a DatagramTarget. `outcomes` are called by probe(), one after the other."""

    def __init__(self, datagrams, index):
        self.datagrams = datagrams
        self.index = index
        self.holds = True
        self.held = self.held_since_ms = 0
        self.addresses = []
        """All that were set, in turn."""
        self.probes = []
        """(ms, address) of each probe."""
        self.drops = []
        self.counts = totals()
        datagrams.targets.append(self)

    def set_address(self, address):
        if not self.addresses or self.addresses[-1] != address:
            self.addresses.append(address)

    def probe(self):
        self.probes.append((self.datagrams.relay.now_ms, self.addresses[-1]))

    def drop_held(self):
        dropped, self.held, self.held_since_ms = self.held, 0, 0
        self.drops.append(self.datagrams.relay.now_ms)
        return dropped

    def totals(self):
        return self.counts

    def hold(self, count=1):
        """Something is in hand from now on."""
        self.held, self.held_since_ms = count, self.datagrams.relay.now_ms


class FakeDatagramListener:
    """Stands in for a DatagramListener, and records what it is told."""

    def __init__(self, datagrams, fd, target, index, guarded=False, proxy=False):
        self.target = target
        self.index = index
        self.guarded = guarded
        self.proxy = proxy
        self.state = "new"
        datagrams.listeners.append(self)

    def start(self):
        self.state = "started"

    def stop(self):
        assert self.state == "started"
        self.state = "stopped"

    def finish(self):
        self.state = "finished"


def put_in_place(patch):
    """Put the fakes in place of the extension's classes."""
    from proxyd import datagram_upstream, datagrams

    patch.setattr(datagrams, "Datagrams", FakeDatagrams)
    patch.setattr(datagrams, "DatagramListener", FakeDatagramListener)
    patch.setattr(datagram_upstream, "DatagramTarget", FakeTarget)
