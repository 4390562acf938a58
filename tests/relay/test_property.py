"""A property of the whole relay: whatever happens to several connections in whatever order, each
stream arrives as a direct connection would have delivered it.

The state machine steps the relay itself, without a thread, so that a failure shrinks to a list of
steps that can be replayed: copy them into a test, or let hypothesis replay them from its database.

RELAY_EXAMPLES=20000 searches harder than CI does, and with other examples each time.
RELAY_SHRINK=0 reports a failure without shrinking it.
"""

import array
import contextlib
import faulthandler
import os
import socket
import tempfile

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from kit.parcel import carry_over
from kit.rig import MODES, Rigs
from kit.socket_state import set_option, unacknowledged
from kit.sockets import is_unix, open_listener, reset
from kit.stepped import accept, half_close, open_client
from kit.traffic import payload

from proxyd._relay import ENDINGS, ConnectFailed, Ended, connected, socket_names

HANG_S = 120
"""An example that takes longer is taken to hang: the run ends with the stack of every thread."""

STUCK_TURNS = 150
"""The relay is stuck if nothing has moved in this many turns of up to STUCK_MS, though it must."""

STUCK_MS = 8

EXAMPLES = int(os.environ.get("RELAY_EXAMPLES", "1000"))
"""In total: a quarter of them for each of the MODES."""

STEPS = 30
SHRINK = os.environ.get("RELAY_SHRINK", "1") != "0"

DISCARDED_MAX = 900_000
"""Bytes for a side that is gone that the relay is sure to take: less than DRAIN_BYTES."""

CONNECTIONS_MAX = 4
TEXT = payload(1 << 20) * 2
"""All streams are parts of this, each beginning at a different place."""

families = st.sampled_from(["tcp4", "unix", "tcp6"])
buffers = st.sampled_from([None, None, 2048, 16384])
sizes = st.one_of(
    st.integers(1, 200),
    st.sampled_from([1448, 16384, 16385, 65536, 65537, 131072]),
    st.integers(1, 400_000),
    st.just(1_000_000),  # a stream, as far as it fits
)
uploads = st.integers(100_000, 700_000)
some_turns = st.integers(0, 2)
which = st.integers(0, CONNECTIONS_MAX - 1)
side_names = st.sampled_from(["client", "target"])


class Side:
    """One end of a connection, and how much it has sent and received so far."""

    def __init__(self, connection, start, preamble=b""):
        self.socket = connection
        self.start = start
        """Where in TEXT its stream begins."""
        self.preamble = preamble
        """What the relay sends first, on its behalf."""
        self.sent = 0
        """Bytes of its stream so far, the preamble included."""
        self.surely = 0
        """Bytes that had reached the relay's socket when this side reset."""
        self.received = 0
        self.must_send = 0
        """Bytes that it must send before it reads again."""
        self.state = "open"
        """open, half-closed, closed or reset: what it did itself."""
        self.half_closed = False
        """It has ended its stream cleanly, whatever it did later."""
        self.heard_of_reset = False
        """A write failed. The kernel reports the error only once: a read now finds a plain end."""
        self.end = None
        """How the other side's stream ended here: eof or reset."""

    @property
    def alive(self):
        return self.state in ("open", "half-closed")

    def text(self, start, size):
        """A piece of the stream, the preamble included."""
        piece = self.preamble[start : start + size]
        start += len(piece) - len(self.preamble) + self.start
        return piece + TEXT[start : start + size - len(piece)]

    def send(self, size, flags=0, fds=()):
        """Send as much as fits; the errno, or 0."""
        data = self.text(self.sent, size)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sent += self.socket.sendmsg([data], ancillary, flags | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            pass
        except PermissionError:
            assert fds  # the relay refuses them if the kernel can (SO_PASSRIGHTS)
        except (ConnectionResetError, BrokenPipeError) as error:
            self.heard_of_reset = True
            return error.errno
        return 0


class Conversation:
    """A connection and its two sides; the target's socket is None until it has been accepted."""

    def __init__(self, number, client, start, preamble):
        self.number = number
        self.client = Side(client, start, preamble)
        self.client.sent = len(preamble)
        self.target = Side(None, start + (1 << 19))
        self.established = False
        """Whether the relay is certain to know that the target is connected."""
        self.dropped = False
        """The client left before that: the relay may drop the connection."""
        self.preamble = len(preamble)
        """Bytes that the relay was given for the target, not taken from the client."""

    def sides(self):
        return [self.client, self.target]

    def other(self, side):
        return self.target if side is self.client else self.client


class Conversations(RuleBasedStateMachine):
    """Any interleaving of what peers can do to their connections."""

    stderr = None
    mode = "splice"
    """A key of MODES; each has a test of its own."""

    def __init__(self):
        super().__init__()
        faulthandler.dump_traceback_later(HANG_S, exit=True, file=self.stderr)
        self.rig = None
        self.talks = []

    @initialize(
        pair=st.tuples(families, families),
        sizes=st.tuples(buffers, buffers, buffers, buffers),
    )
    def begin(self, pair, sizes):
        self.folder = tempfile.TemporaryDirectory()
        self.rigs = Rigs(self.folder.name)
        self.rig = self.rigs(
            *pair,
            client_buffers={"receive_buffer": sizes[0], "send_buffer": sizes[1]},
            target_buffers={"receive_buffer": sizes[2], "send_buffer": sizes[3]},
            **MODES[self.mode],
        )
        listener = open_listener(pair[1], self.folder.name)
        self.dead = socket_names(listener.fileno())[1]
        listener.close()
        self.open("connect", 0, 0, None)

    # ── new connections ──────────────────────────────────────────────────────────────────────

    @precondition(lambda self: len(self.talks) < CONNECTIONS_MAX)
    @rule(
        how=st.sampled_from(["connect", "connect", "refused", "adopt", "auto_connect"]),
        words=st.sampled_from([0, 0, 5, 70_000]),
        preamble=st.sampled_from([0, 0, 20, 50_000]),
        send_buffer=buffers,
    )
    def open(self, how, words, preamble, send_buffer):
        """A client comes, which may have sent bytes already, and is connected to the target."""
        rig, start = self.rig, 100_000 * len(self.talks)
        rig.listener.auto_connect(rig.address if how == "auto_connect" else None)
        client = rig.keep(open_client(rig.listen_socket, **rig.client_buffers))
        preamble = b"" if how == "auto_connect" else payload(preamble, 3)
        talk = Conversation(None, client, start, preamble)
        if words:
            talk.client.send(words)
        self.talks.append(talk)
        if how == "auto_connect":
            before = rig.listener.connected_count
            rig.until(lambda: rig.listener.connected_count > before, "the client")
            talk.number = self.last_id() + 1
            return
        fd = rig.take_client()
        if how == "adopt":
            target = rig.relay.dial(rig.address)
            if send_buffer:
                set_option(target, socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
            rig.until(lambda: connected(target) == 0, "the dialled connection")
            talk.number = rig.relay.adopt(fd, client.family, target, preamble)
            talk.established = True
        elif how == "refused" and rig.target_family != "unix":
            talk.number = rig.relay.connect(fd, client.family, self.dead, preamble=preamble)
            self.connect_again(talk)
        else:
            talk.number = rig.connect(fd, preamble=preamble)

    def last_id(self):
        return max((talk.number or 0 for talk in self.talks), default=0)

    def connect_again(self, talk):
        """Do what the policy does: the next attempt gets what the failed one gives back."""
        rig = self.rig
        rig.until(rig.failures, "the refusal")
        (event,) = rig.failures()
        rig.events.remove(event)
        talk.preamble = len(event.pending)
        talk.number = rig.connect(event.client, preamble=event.pending)

    @precondition(lambda self: any(talk.target.socket is None for talk in self.talks))
    @rule()
    def accept(self):
        """The backend accepts the oldest connection of its backlog."""
        self.accept_one()

    def accept_one(self):
        rig = self.rig
        try:
            connection = accept(rig.backend, send_buffer=rig.target_buffers["send_buffer"])
        except BlockingIOError:
            return
        rig.keep(connection)
        talk = next(talk for talk in self.talks if talk.target.socket is None)
        talk.target.socket = connection

    # ── what the peers do ────────────────────────────────────────────────────────────────────

    def side(self, number, name, *states):
        """(conversation, side) if that side is connected and in one of these states."""
        talk = self.talks[number % len(self.talks)]
        side = getattr(talk, name)
        if side.socket is None or side.state not in states:
            return None, None
        return talk, side

    @rule(
        number=which,
        name=side_names,
        size=sizes,
        kind=st.sampled_from(["", "", "", "", "oob", "fd"]),
        turns=some_turns,
    )
    def write(self, number, name, size, kind, turns):
        """Send as much as fits, and run some turns of the relay, or none."""
        talk, side = self.side(number, name, "open")
        if not side or side.must_send:
            return
        if kind == "oob":
            error = side.send(1, socket.MSG_OOB)
        elif kind == "fd" and is_unix(side.socket):
            error = side.send(min(size, 1000), fds=[self.rig.epoll])
        else:
            error = side.send(size)
        assert not error or not talk.other(side).alive, (
            "a write failed, although the other side is there"
        )
        self.turn(turns)

    @rule(number=which, name=side_names, size=uploads)
    def insist(self, number, name, size):
        """Stop reading until that much has been sent, like a client that first finishes its upload.

        Not both sides at once: they would wait for each other. And not more than the relay takes
        for a side that is gone.
        """
        talk, side = self.side(number, name, "open")
        if side and not talk.other(side).must_send:
            untaken = side.sent - talk.other(side).received
            side.must_send = max(0, min(size, DISCARDED_MAX - untaken))

    def pay(self, side):
        """Send what it must send, as much as fits now; True if anything has moved."""
        before = side.sent
        error = side.state != "open" or side.send(side.must_send)
        all_said = not side.text(side.sent, 1)
        side.must_send = 0 if error or all_said else side.must_send - (side.sent - before)
        return bool(error) or all_said or side.sent > before

    @rule(number=which, name=side_names, size=sizes, turns=some_turns)
    def read(self, number, name, size, turns):
        talk, side = self.side(number, name, "open", "half-closed")
        if side:
            self.receive(talk, side, size)
        self.turn(turns)

    def receive(self, talk, side, size):
        """Read up to `size` bytes, and compare them; True if there was anything."""
        if side.end or side.must_send:
            return False
        other = talk.other(side)
        try:
            chunk = side.socket.recv(size)
        except BlockingIOError:
            return False
        except (ConnectionResetError, BrokenPipeError):
            side.end = "reset"
            self.judge(talk, other, side)
            return True
        if not chunk:
            side.end = "eof"
            self.judge(talk, other, side)
            return True
        assert side.received + len(chunk) <= other.sent, "more than was sent"
        assert chunk == other.text(side.received, len(chunk)), "not what was sent"
        side.received += len(chunk)
        talk.established = True
        return True

    @rule(
        number=which,
        name=side_names,
        size=sizes,
        turns=some_turns,
        end=st.sampled_from(["half_close", "close", "reset"]),
        upload=st.one_of(st.just(0), uploads),
    )
    def last_words(self, number, name, size, turns, end, upload):
        """Send and leave: the bytes may be anywhere in transit, and the reader may be slow."""
        if upload:
            self.insist(number, "client" if name == "target" else "target", upload)
        self.write(number, name, size, "", turns)
        getattr(self, end)(number, name)

    @rule(number=which, name=side_names)
    def half_close(self, number, name):
        _, side = self.side(number, name, "open")
        if not side:
            return
        with contextlib.suppress(OSError):  # it may have been reset meanwhile
            half_close(side.socket)
        side.state = "half-closed"
        side.half_closed = True

    @rule(number=which, name=side_names)
    def close(self, number, name):
        """A full close, with or without unread input."""
        talk, side = self.side(number, name, "open", "half-closed")
        if not side:
            return
        talk.dropped |= is_unix(side.socket) and not talk.established
        side.socket.close()
        side.state = "closed"

    @rule(number=which, name=side_names)
    def reset(self, number, name):
        talk, side = self.side(number, name, "open", "half-closed")
        if not side:
            return
        talk.dropped |= not talk.established
        if is_unix(side.socket):
            side.surely = side.sent
        else:
            side.surely = side.sent - unacknowledged(side.socket.fileno())
        reset(side.socket)
        side.state = "reset"

    @rule(turns=st.integers(1, 4))
    def turn(self, turns):
        """Run a few turns of the relay."""
        for _ in range(turns):
            self.rig.turn()

    @rule()
    def settle(self):
        """Let the relay do all that it can do now."""
        self.rig.settle()
        for talk in self.talks:
            talk.established = True

    @rule()
    def carry_over(self):
        """Another relay goes on with all connections, as after a restart."""
        count = self.rig.relay.connections
        assert carry_over(self.rig) == (count, 0)

    # ── what must hold ───────────────────────────────────────────────────────────────────────

    def judge(self, talk, sender, receiver):
        """`receiver`, still alive, has read the end of `sender`'s stream: was it the right one?"""
        state, everything = sender.state, receiver.received == sender.sent
        if talk.dropped:
            return
        assert state != "open", f"{receiver.end} from nowhere"
        unheard = receiver.sent > sender.received
        if state == "half-closed":
            assert everything, "the end before the last byte"
            assert receiver.end == "eof"
        elif state == "closed" and (is_unix(sender.socket) or not unheard):
            assert everything, "the end before the last byte"
            assert receiver.end == "eof" or unheard
        elif state == "reset":
            assert unheard or receiver.received >= sender.surely, "lost in the relay"
            if not is_unix(sender.socket) and not is_unix(receiver.socket):
                heard = receiver.end == "reset" or receiver.heard_of_reset
                assert heard or sender.half_closed

    def landed(self):
        return all(self.arrived(talk) for talk in self.talks)

    def arrived(self, talk):
        """Whether everything has arrived that must arrive at sides that are still alive."""
        for receiver in talk.sides():
            sender = talk.other(receiver)
            if receiver.socket is None:
                return False
            if not receiver.alive or receiver.end:
                continue
            if sender.state != "open" or receiver.received < sender.sent:
                return False
        return True

    def land(self):
        """Read everything that still arrives, and wait for what must arrive."""
        in_vain = 0
        while not self.landed():
            in_vain = 0 if self.read_all() else in_vain + 1
            assert in_vain < STUCK_TURNS, "stuck"
            self.rig.turn(STUCK_MS if in_vain > 1 else 0)
        assert not self.rig.of_kind(ConnectFailed)

    def read_all(self):
        """Accept the connections that wait, and read what there is; True if there was anything."""
        for _ in self.talks:
            self.accept_one()
        found = False
        for talk in self.talks:
            for side in talk.sides():
                if side.socket is not None and side.alive:
                    found |= side.must_send > 0 and self.pay(side)
                    found |= self.receive(talk, side, 1 << 20)
        return found

    def part(self):
        """Close everything: the relay must close its sockets too, and have counted everything."""
        rig = self.rig
        for talk in self.talks:
            for side in talk.sides():
                if side.socket is not None:
                    side.socket.close()
        rig.until(lambda: not rig.relay.connections, "the end of all connections")
        rig.turn()
        self.count(rig.totals(), rig.of_kind(Ended))

    def count(self, totals, ended):
        """Compare the relay's counters with what was seen."""
        ends = {event.connection: event for event in ended}
        assert sorted(event.connection for event in ended) == sorted(
            talk.number for talk in self.talks
        )
        kinds = [event.ending for event in ended]
        assert totals.endings == {kind: kinds.count(kind) for kind in ENDINGS}
        assert (totals.accepted, totals.refused) == (len(self.talks), 0)
        assert totals.spliced + totals.copied == totals.bytes_to_targets + totals.bytes_to_clients
        assert totals.bytes_to_targets <= sum(talk.client.sent for talk in self.talks)
        assert totals.bytes_to_targets >= sum(talk.target.received for talk in self.talks)
        assert totals.bytes_to_clients <= sum(talk.target.sent for talk in self.talks)
        assert totals.bytes_to_clients >= sum(talk.client.received for talk in self.talks)
        for talk in self.talks:
            self.count_one(talk, ends[talk.number])

    def count_one(self, talk, event):
        """Compare an Ended event with what was seen: the ending, and the bytes from either side."""
        client, target = talk.sides()
        assert target.received <= talk.preamble + event.bytes_up <= client.sent
        assert client.received <= event.bytes_down <= target.sent
        unharmed = client.state != "reset" and target.state != "reset"
        complete = target.received == client.sent and client.received == target.sent
        if unharmed and complete:
            assert event.ending == "ended"

    def teardown(self):
        if not self.rig:
            return
        try:
            self.land()
            self.part()
        finally:
            self.rigs.close()
            self.folder.cleanup()
        assert not self.rigs.leaked()


@pytest.fixture(autouse=True)
def _no_hang(request):
    """Instead of the watchdog of all tests: each example has a time limit of its own."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        Conversations.stderr = os.dup(2)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(Conversations.stderr)


def conversations(name):
    """The test for one of the MODES."""
    machine = type("".join(map(str.capitalize, name.split())), (Conversations,), {"mode": name})
    machine.TestCase.settings = settings(
        max_examples=EXAMPLES // len(MODES),
        derandomize="RELAY_EXAMPLES" not in os.environ,  # the default suite is always the same
        stateful_step_count=STEPS,
        deadline=None,
        print_blob=True,
        phases=[phase for phase in Phase if SHRINK or phase is not Phase.shrink],
    )
    return machine.TestCase


TestSplice = conversations("splice")
TestCopy = conversations("copy")
TestSmallSplice = conversations("small splice")
TestSmallCopy = conversations("small copy")
