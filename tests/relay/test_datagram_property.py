"""In whatever order things happen: no datagram is cut, doubled or overtaken; all are counted."""

import contextlib
import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kit.datagram_rig import DatagramRig, receive_all, send_segmented
from kit.rig import open_fds

from proxyd._datagram import DROP_CLIENT, DROP_UNANSWERABLE

CLIENTS = 3
PAIRS = [("udp4", "udp4"), ("dual", "udp6"), ("udp4", "unix"), ("unix", "udp4"), ("unix", "unix")]
UNIX = ("unix",)
HEADERS = {"udp4": 28, "dual": 52, "unix": 16}

sizes = st.sampled_from([0, 1, 64, 64, 64, 1200, 1200, 9000])


def make_machine(listen, target, proxy):
    """The rules for one pair of families."""

    class Machine(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.before = open_fds()
            self.folder = os.path.join(folder[0], os.urandom(4).hex())
            os.mkdir(self.folder)
            self.rig = DatagramRig(self.folder, listen, target, proxy=proxy)
            self.rig.relay.connections_max = CLIENTS
            self.clients = [self.rig.client() for _ in range(CLIENTS)]
            self.sent = [[] for _ in range(CLIENTS)]
            self.answered = [[] for _ in range(CLIENTS)]
            self.next = 0
            self.places = [0] * CLIENTS
            """How far into `sent` the server has seen."""
            self.reply_places = [0] * CLIENTS
            self.flows = {}
            """Client → where the server answers it."""
            self.up = True

        def datagram(self, number, size):
            self.next += 1
            return b"%d %d " % (number, self.next) + b"." * size

        @rule(number=st.integers(0, CLIENTS - 1), size=sizes, count=st.integers(1, 12))
        def send(self, number, size, count):
            for _ in range(count):
                data = self.datagram(number, size)
                with contextlib.suppress(BlockingIOError):
                    self.clients[number].send(data)
                    self.sent[number].append(data)

        @precondition(lambda self: listen not in UNIX)
        @rule(number=st.integers(0, CLIENTS - 1), count=st.integers(2, 20))
        def send_burst(self, number, count):
            parts = [self.datagram(number, 100)[:60] for _ in range(count)]
            send_segmented(self.clients[number], b"".join(parts), 60)
            self.sent[number] += parts

        @rule(number=st.integers(0, CLIENTS - 1), size=sizes, count=st.integers(1, 12))
        def reply(self, number, size, count):
            if not self.up or number not in self.flows:
                return
            for _ in range(count):
                data = self.datagram(number, size)
                with contextlib.suppress(OSError):
                    self.rig.server.sendto(data, self.flows[number])
                    self.answered[number].append(data)

        @rule()
        def turn(self):
            self.rig.turn()

        @rule()
        def receive(self):
            self.take_at_server()
            self.take_at_clients()

        def take_at_server(self):
            if not self.up:
                return
            for data, sender in receive_all(self.rig.server):
                body = data[HEADERS[listen] :] if proxy else data
                number = int(body.split(b" ")[0])
                self.flows[number] = sender
                place = self.sent[number].index(body, self.places[number])
                self.places[number] = place + 1

        def take_at_clients(self):
            for number, client in enumerate(self.clients):
                for data, _ in receive_all(client):
                    place = self.answered[number].index(data, self.reply_places[number])
                    self.reply_places[number] = place + 1

        @precondition(lambda self: self.up)
        @rule()
        def end_server(self):
            self.take_at_server()
            self.rig.server_ends()
            self.up = False

        @precondition(lambda self: not self.up)
        @rule()
        def begin_server(self):
            self.rig.server_begins()
            self.up = True

        @rule()
        def probe(self):
            self.rig.target.probe()

        @rule()
        def drop_held(self):
            if self.rig.target.state == "down":
                self.rig.target.drop_held()
                assert self.rig.target.held == 0

        @rule(number=st.integers(0, CLIENTS - 1))
        def terminate(self, number):
            rows = self.rig.datagrams.rows()
            if number < len(rows):
                assert self.rig.datagrams.terminate(rows[number].flow)

        @rule()
        def listener_pauses(self):
            self.rig.listener.stop()
            self.rig.turn()
            self.rig.listener.start()

        @invariant()
        def gauges_agree(self):
            rows = self.rig.datagrams.rows()
            assert len(rows) == self.rig.datagrams.flows == self.rig.relay.connections
            assert len(rows) <= CLIENTS
            totals = self.rig.datagrams.totals()
            assert totals.flows == len(rows) + sum(totals.endings.values())

        def teardown(self):
            self.take_at_server()
            if not self.up:
                self.rig.server_begins()
                self.up = True
            for _ in range(60):
                self.rig.target.probe()
                self.rig.settle()
                self.take_at_server()
                self.take_at_clients()
            totals = self.rig.datagrams.totals()
            to_clients = (DROP_CLIENT, DROP_UNANSWERABLE)
            dropped = sum(n for why, n in totals.dropped.items() if why not in to_clients)
            seen = totals.datagrams_to_targets + dropped
            sent = sum(len(one) for one in self.sent)
            # The kernel counts a burst as one.
            lost = self.rig.listener.kernel_dropped
            assert seen == sent if lost == 0 else seen + lost <= sent
            assert self.rig.target.held == 0
            self.rig.close()
            assert open_fds() - self.before == set()

    return Machine


folder = [""]


@pytest.mark.parametrize("proxy", [False, True], ids=["plain", "proxy"])
@pytest.mark.parametrize(("listen", "target"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_datagrams_and_numbers_add_up(tmp_path, listen, target, proxy):
    folder[0] = str(tmp_path)
    case = make_machine(listen, target, proxy).TestCase
    case.settings = settings(
        max_examples=15,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    case().runTest()
