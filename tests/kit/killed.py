"""A connection that outlives its relay: process after process forwards it, and each is killed.

This process holds both ends, and copies of the relay's sockets. What else a relay leaves behind is
in its slate, and pipes are in pages.
"""

import array
import mmap
import os
import random
import signal
import socket
import struct
import sys
import time
import traceback
from collections import Counter

from kit.pattern import Stream
from kit.slate_view import Slate
from kit.sockets import open_listener
from kit.stepped import accept, open_client
from kit.stepping import Stepped
from kit.waiting import patience
from proxyd._relay import Relay, recover, slate_create

UNIT = 64 * 1024
"""The largest copy: small, so that spills are filled often."""

STARTED, GOES_ON, OVER, DROPPED = 1, 2, 3, 4
"""What a child says: it uses the new slate; and the connection goes on. Or it had ended already; or
nobody can know how it has ended."""

INTENTS = ("copy", "flush", "splice")

STUCK = 64 * 1024
"""The receive buffers at both ends, in bytes."""


class Direction:
    """A checked stream from one end to the other."""

    def __init__(self, number, source, sink, chance):
        self.stream = Stream(1, number)
        self.source = source
        self.sink = sink
        self.chance = chance
        self.sent = 0
        self.received = 0
        self.finished = False
        self.ended = False

    def send(self, limit):
        """Send until nothing fits, but at most about `limit` bytes."""
        while limit > 0:
            try:
                count = self.source.send(self.stream.piece(self.sent, limit))
            except BlockingIOError:
                return
            self.sent += count
            limit -= count

    def receive(self, limit):
        """Read and check what is there, but at most `limit` bytes."""
        while limit > 0 and not self.ended:
            try:
                data = self.sink.recv(min(limit, 1 << 17))
            except BlockingIOError:
                return
            self.stream.check(self.received, data)
            self.received += len(data)
            limit -= len(data)
            self.ended = not data

    def finish(self):
        """No more is sent."""
        self.source.shutdown(socket.SHUT_WR)
        self.finished = True

    def step(self):
        """Move some bytes, or none."""
        if not self.finished and self.chance.random() < 0.8:
            self.send(self.chance.choice((1, 3000, 70_000, 300_000)))
        if self.chance.random() < 0.6:
            self.receive(self.chance.choice((1, 5000, 80_000, 400_000)))


class Pages:
    """What relays have sent away: root's queue, and the pages announced there."""

    def __init__(self):
        kind = socket.AF_UNIX, socket.SOCK_SEQPACKET
        self.receiver, self.sender = socket.socketpair(*kind)

    def take(self):
        """({pipe's number: read end}, [(slot, entry, client, target)]): the caller's."""
        pipes, entries = {}, []
        for _, ends in self.messages(self.receiver):
            page, sender = (socket.socket(fileno=fd) for fd in ends)
            with page, sender:
                for text, fds in self.messages(page):
                    first, number = text.split()
                    if first == b"p":
                        (pipes[int(number)],) = fds
                    else:
                        entries.append((int(first), int(number), *fds))
        return pipes, entries

    def messages(self, receiver):
        """[(data, fds)] of all that is in a queue."""
        found = []
        while True:
            try:
                data, ancillary, _, _ = receiver.recvmsg(64, 256, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            if not data:
                return found
            fds = array.array("i")
            for _, _, payload in ancillary:
                fds.frombytes(payload)
            found.append((data, fds.tolist()))

    def close(self):
        for fd in close_all_of(*self.take()):
            os.close(fd)
        self.receiver.close()
        self.sender.close()


def close_all_of(pipes, entries):
    return [*pipes.values(), *(fd for entry in entries for fd in entry[2:])]


class Generation:
    """A slate, and its pages, if there are any."""

    def __init__(self, with_pages):
        self.file = slate_create(b"", 4, 1, UNIT)
        self.slate = Slate(self.file)
        self.pages = Pages() if with_pages else None
        self.pipes = {}
        self.entries = []

    def take_pages(self):
        """The process that used it is dead: take what is in its pages."""
        if self.pages is not None:
            pipes, entries = self.pages.take()
            self.pipes |= pipes
            self.entries += entries

    def close(self):
        self.slate.close()
        os.close(self.file)
        for fd in close_all_of(self.pipes, self.entries):
            os.close(fd)
        if self.pages is not None:
            self.pages.close()


class Killed:
    """One connection, and relays that are killed. `counts`: how often a process was killed while an
    intent was open, a spill was there, a pipe was filled, and so on."""

    def __init__(self, pair, directory, seed, *, pages=False, **options):
        self.chance = random.Random(seed)
        self.options = {"stream_unit": UNIT, "pipe_size": UNIT} | options
        self.with_pages = pages
        self.counts = Counter()
        self.sockets = []
        self.client, self.client_fd = self.connected(pair[0], directory)
        self.server, self.target_fd = self.connected(pair[1], directory)
        self.families = (self.client_fd.family, self.target_fd.family)
        self.directions = [
            Direction(0, self.client, self.server, self.chance),
            Direction(1, self.server, self.client, self.chance),
        ]
        self.generation = None
        self.said = mmap.mmap(-1, 4096)
        self.child = None
        self.over = False
        """Whether the connection has ended, as far as relays are concerned."""

    def connected(self, family, directory):
        """(our end, the relay's)."""
        with open_listener(family, directory) as listener:
            ours = open_client(listener, receive_buffer=STUCK, send_buffer=STUCK)
            theirs = accept(listener)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STUCK)
        if family != "unix":  # as an accepted one: see socket_guard()
            guard = struct.pack("ii", 1, 0)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, guard)
        self.sockets += [ours, theirs]
        return ours, theirs

    def close(self):
        if self.child is not None:
            self.kill()
        for each in self.sockets:
            each.close()
        if self.generation is not None:
            self.generation.close()
        self.said.close()

    # ── what happens ─────────────────────────────────────────────────────────────────────────

    def run(self, kills, wanted):
        """Kill that number of relays, and more until all of `wanted` was counted; and again while
        the streams end, one after the other. Everything has to arrive."""
        self.start(interrupted=False)
        killed = 0
        while killed < kills or not all(self.counts[what] for what in wanted):
            assert killed < 100 * kills, f"never seen: {self.counts}"
            self.kill_one()
            killed += 1
        for direction in self.chance.sample(self.directions, 2):
            direction.finish()
            for _ in range(kills // 5):
                if not self.over:
                    self.kill_one()
        self.end()

    def kill_one(self):
        """Let a relay go on, kill it, and start the next one."""
        how = self.chance.random()
        if how < 0.5:
            self.exchange()
            self.kill()
        elif how < 0.75:
            self.exchange_in_steps()
        else:
            self.unblock_in_steps()
        if not self.over:
            self.look()
            self.start(interrupted=True)

    def start(self, *, interrupted):
        """Start a relay that goes on. Some are killed before that."""
        while not self.over:
            if self.generation is not None:
                self.generation.take_pages()
            new = Generation(self.with_pages)
            self.said[0] = 0
            self.child = self.fork(new)
            if interrupted and self.chance.random() < 0.3:
                self.spin(self.chance.random() * 0.004)
                self.kill()
                self.counts["killed while it started"] += 1
            else:
                self.await_word(GOES_ON)
            if self.said[0] not in (STARTED, GOES_ON):  # the old one counts
                new.close()
                self.over = self.said[0] != 0
            else:
                if self.generation is not None:
                    self.generation.close()
                self.generation = new
            if self.child is not None:
                return

    def exchange(self):
        """Move bytes for a random time."""
        for _ in range(self.chance.choice((0, 1, 2, 3, 8))):
            for direction in self.directions:
                direction.step()
            self.spin(self.chance.choice((0, 0, 0.0001)))
        self.spin(self.chance.random() * 0.0002)

    def exchange_in_steps(self):
        """Move bytes while the relay is stopped, let it do some of its work, and kill it."""
        stepped = Stepped(self.child)
        for direction in self.directions:
            direction.step()
        stepped.to_system_calls(self.chance.randrange(16))
        stepped.instructions(self.chance.choice((0, self.chance.randrange(8), 150)))
        self.kill()

    def unblock_in_steps(self):
        """Fill one direction and empty it while the relay is stopped: what is held is to be sent.
        Kill it while it does so."""
        number = self.chance.randrange(2)
        direction = self.directions[number]
        end = time.perf_counter() + 0.02
        while time.perf_counter() < end and not self.holds(number) and not direction.finished:
            direction.send(1 << 20)
        stepped = Stepped(self.child)
        direction.receive(1 << 22)
        stepped.to_system_calls(self.chance.randrange(3, 8))
        stepped.instructions(self.chance.choice((0, self.chance.randrange(8), 150)))
        self.kill()

    def holds(self, direction):
        """Whether the relay has bytes that it cannot send."""
        slots = self.generation.slate.slots()
        return any(
            slot.halves[direction].spill_size or slot.halves[direction].pipe for slot in slots
        )

    def kill(self):
        os.kill(self.child, signal.SIGKILL)
        self.take_status(signal.SIGKILL)

    def look(self):
        """Count what the killed one was in the middle of."""
        slate = self.generation.slate
        open_intents = slate.intents()
        for intent in open_intents:
            self.counts[f"intent: {INTENTS[intent.what]}"] += 1
        for slot in slate.slots():
            for half in slot.halves:
                self.counts["spill"] += half.spill_size > 0
                self.counts["pipe"] += half.pipe > 0

    def end(self):
        """Everything arrives, and the end."""
        if self.said[0] == DROPPED:
            self.counts["dropped at its end"] += 1
            return
        if self.over:
            self.let_go()
        deadline = time.monotonic() + patience()
        while not all(direction.ended for direction in self.directions):
            assert time.monotonic() < deadline, self.state()
            for direction in self.directions:
                direction.receive(1 << 20)
            if self.child is not None:
                self.check_child()
            time.sleep(0.0005)
        for direction in self.directions:
            assert direction.received == direction.sent, self.state()
        if not self.over:
            self.take_status(0)

    def let_go(self):
        """What was not ended by a relay ends with the last copies of its sockets."""
        self.client_fd.close()
        self.target_fd.close()
        self.generation.take_pages()
        self.generation.close()
        self.generation = None

    # ── the child ────────────────────────────────────────────────────────────────────────────

    def fork(self, new):
        sys.stderr.flush()
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            self.relay(new)
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def relay(self, new):
        """Go on with the connection, with the new slate, until it ends."""
        relay = Relay(**self.options)
        if self.generation is not None and not self.generation.slate.slots():
            self.said[0] = OVER
            return
        if self.generation is None:
            fds = self.client_fd.detach(), self.target_fd.detach()
            relay.adopt(fds[0], self.families[0], fds[1])
            relay.run(0)
            relay.freeze()
        elif not self.recover(relay):
            self.said[0] = DROPPED
            return
        root = -1 if new.pages is None else new.pages.sender.fileno()
        relay.use_slate(new.file, root, 1)
        assert relay.enter_all() == 1, "not entered"
        self.said[0] = STARTED
        relay.thaw()
        self.said[0] = GOES_ON
        relay.wake_at_count = 0
        while relay.connections:
            relay.run()

    def recover(self, relay):
        """Whether it can go on."""
        old = self.generation
        (slot,) = old.slate.slots()
        entries = old.entries or [
            (slot.index, slot.entry, self.client_fd.detach(), self.target_fd.detach())
        ]
        parcel = os.memfd_create("parcel")
        fds, dropped = recover(old.file, entries, old.pipes, parcel)
        if dropped and all(direction.finished for direction in self.directions):
            return False
        assert dropped == 0, f"dropped: {slot}"
        assert relay.import_connections(parcel, 0, fds, [0], [0]) == (1, 0)
        os.close(parcel)
        return True

    def await_word(self, word):
        deadline = time.monotonic() + patience()
        while self.said[0] < word:
            assert time.monotonic() < deadline, "the relay does not go on"
            self.check_child()
            time.sleep(0.0002)

    def check_child(self):
        """It must not have failed."""
        pid, status = os.waitpid(self.child, os.WNOHANG)
        if pid:
            self.child = None
            self.over = True
            assert status == 0, "the relay has failed: see its traceback"

    def take_status(self, wanted):
        if self.child is not None:
            _, status = os.waitpid(self.child, 0)
            self.child = None
            self.over = status == 0 and all(direction.finished for direction in self.directions)
            assert self.over or status == wanted, "the relay has failed: see its traceback"

    def spin(self, seconds):
        """Wait as exactly as one can."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    def state(self):
        return ", ".join(f"{one.received} of {one.sent}" for one in self.directions)
