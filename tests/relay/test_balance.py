"""What a main worker that is too busy for one CPU hands over, and when it keeps everything.

The test steps the main worker without a pause, so that it is as busy as a worker can be. A file in
place of /proc/stat says whether a CPU is idle.
"""

import os
import socket
import subprocess
import sys
import time
from types import MappingProxyType

import pytest
from kit.rig import PATIENCE_S
from kit.sockets import reset
from kit.stepped import Incoming, Outgoing, close, half_close
from kit.traffic import payload
from kit.workers import Workers

from proxyd._relay import WorkersWanted

UNKNOWN = -1
"""The fd of a /proc/stat that could not be opened: a CPU is taken to be idle."""

NO_RULES = MappingProxyType({})

HZ = os.sysconf("SC_CLK_TCK")


class Machine:
    """A /proc/stat whose CPUs were idle for as long as the test says."""

    FIELDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq")

    def __init__(self, path):
        self.ticks = dict.fromkeys(self.FIELDS, 12345)
        self.file = path.open("wb")
        self.write()

    def open(self):
        """An fd of the file; the relay that is given it owns it."""
        return os.open(self.file.name, os.O_RDONLY)

    def write(self):
        words = " ".join(str(self.ticks[field]) for field in self.FIELDS)
        text = f"cpu  {words} 0 0 0\ncpu0 {words} 0 0 0\nintr 1 2 3\n"
        os.pwrite(self.file.fileno(), text.encode(), 0)

    def set(self, field, seconds):
        """Let the CPUs have spent that many seconds more than at the start."""
        ticks = 20000 + int(seconds * HZ)
        if ticks != self.ticks[field]:
            self.ticks[field] = ticks
            self.write()


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path / "stat")
    yield machine
    machine.file.close()


@pytest.fixture
def offloading(rigs):
    """Makes a rig that offloads when it is busy."""

    def make(*pair, stat=UNKNOWN, count=1, window_ms=1, rules=NO_RULES, first=0, **options):
        """The workers of a rig. `first` connections are made before the workers start, and so stay
        with the main worker: if making one takes longer than a window, the main worker may count as
        busy and hand it over. They are also silent for longer than a window."""
        rig = rigs(*pair, **options)
        links = [rig.link() for _ in range(first)]
        if links:
            rig.pass_time(2 * window_ms / 1000)
        rig.relay.offload_when_busy(stat, window_ms, **rules)
        rig.pace_ms = 0
        workers = Workers(rig, count)
        workers.first = links
        return workers

    return make


def keep_busy(workers, links, *, turns=None, each=lambda: None):
    """Echo a byte on every link, again and again: until one is handed over, or for `turns`."""
    count = 0
    before = workers.rig.relay.handed_over
    deadline = time.monotonic() + PATIENCE_S
    for link in links:
        link.client.send(b"x")
    while (workers.rig.relay.handed_over == before) if turns is None else count < turns:
        assert time.monotonic() < deadline, "nothing was handed over"
        for link in links:
            for one in (link.client, link.target):
                try:
                    one.send(one.recv(9))
                except BlockingIOError:
                    pass
        each()
        workers.rig.turn()
        count += 1


def fall_silent(workers, links):
    """Read the bytes that keep_busy() has left in transit."""
    for link in links:
        link.client.send(b".")
        while workers.rig.read(link.target, 1) != b".":
            pass
        link.target.send(b".")
        while workers.rig.read(link.client, 1) != b".":
            pass


def end_both(workers, link):
    """Close both ends of a connection that is no longer needed, to save descriptors."""
    close(link.client)
    close(link.target)
    workers.rig.until_ended(link.id)


def quiet_link(workers):
    """A connection with some traffic, made while the relay had little to do."""
    workers.rig.pace_ms = 5
    link = workers.rig.link()
    link.client.send(b"word")
    assert workers.rig.read(link.target, 4) == b"word"
    workers.rig.pass_time(0.05)
    workers.rig.pace_ms = 0
    return link


def stay_busy(workers, links, seconds, each=lambda: None):
    """Keep the relay busy for that long, whether or not it hands something over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        keep_busy(workers, links, turns=20, each=each)


# ── what is handed over ──────────────────────────────────────────────────────────────────────────


def test_half_of_the_work_is_handed_over(offloading):
    workers = offloading(window_ms=100)
    links = [quiet_link(workers) for _ in range(8)]
    keep_busy(workers, links)
    assert 1 <= workers.rig.relay.handed_over <= 4
    workers.until_assigned(links)
    assert set(workers.workers_of(links)) == {0, 1}


def test_bytes_and_ends_survive_a_hand_over(offloading, pair, mode):
    """Streams in both directions; some end while others continue, whatever is buffered."""
    workers = offloading(*pair, **mode)
    up, down = payload(1_500_000), payload(1_000_000, 2)
    rounds = 0
    while workers.rig.relay.handed_over == 0 or rounds < 2:
        links = [workers.rig.link() for _ in range(4)]
        there = [Incoming(link.target) for link in links]
        back = [Incoming(link.client) for link in links]
        workers.rig.run(
            *[Outgoing(link.client, up, half_close) for link in links],
            *[Outgoing(link.target, down, half_close) for link in links],
            *there,
            *back,
        )
        assert [(flow.data == up, flow.end) for flow in there] == [(True, "eof")] * 4
        assert [(flow.data == down, flow.end) for flow in back] == [(True, "eof")] * 4
        for link in links:
            assert workers.rig.until_ended(link.id) == ("ended", len(up), len(down))
        rounds += 1
        assert rounds < 100, "nothing was handed over"
    assert workers.rig.relay.connections == 0


def test_buffered_bytes_are_handed_over(offloading, pair, mode):
    """A connection whose target does not read takes the bytes buffered in it along."""
    workers = offloading(*pair, window_ms=50, first=1, **mode)
    (stalled,) = workers.first
    others = []
    sent = 0
    deadline = time.monotonic() + PATIENCE_S
    while workers.worker_of(stalled.client_fd) in (0, None):
        assert time.monotonic() < deadline, "it was not handed over"
        others.append(workers.rig.link())
        if len(others) > 3:
            end_both(workers, others.pop(0))
        sent += workers.rig.fill(stalled.client)
        # A window must end within these turns, after one in which the connection moved bytes.
        keep_busy(workers, others, turns=20)
        workers.rig.read(stalled.target, 100_000)
        sent -= 100_000
    data = b"\xa5" * sent
    assert workers.rig.read(stalled.target, sent) == data
    stalled.target.send(b"answer")
    assert workers.rig.read(stalled.client, 6) == b"answer"


def test_unfinished_work_is_handed_over(offloading, way):
    """A connection that has spent the budget of its turn continues without an event."""
    workers = offloading("tcp4", "tcp4", window_ms=0, **way)
    data = payload(6_000_000)
    while workers.rig.relay.handed_over < 40:
        links = [workers.rig.adopted_link(send_buffer=4_000_000) for _ in range(4)]
        for link in links:
            link.target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_000_000)
        flows = [Outgoing(link.client, data, half_close) for link in links]
        heard = [Incoming(link.target) for link in links]
        for _ in range(3):
            for flow in flows:  # as much as the sockets hold
                flow.step()
            workers.rig.turn()
        workers.rig.run(*flows, *heard)
        assert [(flow.data == data, flow.end) for flow in heard] == [(True, "eof")] * 4
        for link in links:
            close(link.target)
            assert workers.rig.until_ended(link.id) == ("ended", len(data), 0)


def test_ends_are_passed_on_after_a_hand_over(offloading, pair):
    workers = offloading(*pair, first=4)
    links = workers.first
    keep_busy(workers, links)
    moved = [link for link in links if workers.worker_of(link.client_fd) != 0]
    assert moved
    fall_silent(workers, links)
    for link, end in zip(moved, (close, reset, half_close), strict=False):
        end(link.client)
        how = "reset" if end is reset and "unix" not in pair else "eof"
        assert workers.rig.read_to_end(link.target) == (b"", how)
        close(link.target)
        workers.rig.until_ended(link.id)


def test_a_busy_main_worker_hands_over_new_connections(offloading):
    """Even those that it would keep because it has fewer connections than the other worker."""
    workers = offloading(first=2)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert time.monotonic() < deadline
        keep_busy(workers, workers.first, turns=5)
        links = [workers.rig.link() for _ in range(4)]
        workers.until_assigned(links)
        if 1 in workers.workers_of(links):
            return
        for link in links:
            end_both(workers, link)


def test_connections_handed_over_count_for_their_new_worker(offloading):
    """A new connection goes to the worker with the fewest, these included."""
    workers = offloading(window_ms=1000)
    links = [quiet_link(workers) for _ in range(8)]
    keep_busy(workers, links)
    links += [workers.rig.link() for _ in range(8)]  # before the next window ends
    workers.until_assigned(links)
    numbers = workers.workers_of(links)
    assert abs(numbers.count(0) - numbers.count(1)) <= 1
    for link in [link for link, worker in zip(links, numbers, strict=True) if worker == 1]:
        reset(link.client)
        workers.rig.until_ended(link.id)
    link = workers.rig.link()
    workers.until_assigned([link])
    assert workers.worker_of(link.client_fd) == 1


def test_workers_are_asked_for_once(offloading):
    workers = offloading(count=0)
    links = [workers.rig.link() for _ in range(4)]
    workers.rig.until(
        lambda: keep_busy(workers, links, turns=5) or workers.rig.of_kind(WorkersWanted),
        "the WorkersWanted event",
    )
    stay_busy(workers, links, 0.1)
    assert len(workers.rig.of_kind(WorkersWanted)) == 1
    assert workers.rig.relay.thread_count == 1
    workers.rig.relay.ping_workers()
    workers.start(1)
    assert workers.rig.relay.workers_answered  # the new one had not started when it was asked
    assert workers.rig.relay.thread_count == 2
    keep_busy(workers, links)
    assert len(workers.rig.of_kind(WorkersWanted)) == 1


@pytest.mark.parametrize("field", ["idle", "iowait"])
def test_idle_time_is_read(offloading, machine, field):
    workers = offloading(stat=machine.open(), window_ms=20)
    links = [workers.rig.link() for _ in range(4)]
    began = time.monotonic()
    keep_busy(workers, links, each=lambda: machine.set(field, time.monotonic() - began))


class Cpus(Machine):
    """Four CPUs; those in `idle` have been idle ever since the start, the others never."""

    def __init__(self, path, idle, form):
        self.idle, self.form, self.began = idle, form, time.monotonic()
        super().__init__(path)

    def write(self):
        seconds = time.monotonic() - self.began
        if self.form == "uptime":
            text = f"{12345 + seconds:.2f} {500 + seconds * len(self.idle):.2f}\n"
        else:
            ticks = [5000 + int(seconds * HZ) * (number in self.idle) for number in range(4)]
            text = f"cpu  1 2 3 {sum(ticks)} 7 0 0 0 0 0\n"
            text += "".join(
                f"cpu{number} 1 2 3 {ticks[number]} 7 0 0 0 0 0\n" for number in range(4)
            )
            text += "intr 1 2 3\nctxt 4\n"
        os.pwrite(self.file.fileno(), text.encode(), 0)


@pytest.fixture
def cpus(tmp_path):
    """Makes Cpus."""
    made = []

    def make(idle, form="stat"):
        made.append(Cpus(tmp_path / "cpus", idle, form))
        return made[-1]

    yield make
    for one in made:
        one.file.close()


@pytest.mark.parametrize("usable", [{2}, {1, 2}, {2, 3, 5000}, {0, 1, 2, 3}])
def test_an_idle_cpu_that_may_be_used(offloading, cpus, usable):
    machine = cpus({2})
    workers = offloading(stat=machine.open(), window_ms=50, rules={"cpus": usable})
    links = [workers.rig.link() for _ in range(4)]
    keep_busy(workers, links, each=machine.write)


def test_uptime_is_read_on_a_large_machine(offloading, cpus):
    """/proc/uptime, which is shorter than /proc/stat, has the idle time of all CPUs too."""
    machine = cpus({0}, "uptime")
    workers = offloading(stat=machine.open(), window_ms=50)
    links = [workers.rig.link() for _ in range(4)]
    keep_busy(workers, links, each=machine.write)


def test_a_quota_that_is_not_used_up(offloading):
    """Ten CPUs: more than this process can use."""
    workers = offloading(window_ms=50, rules={"quota": 1000}, first=4)
    keep_busy(workers, workers.first)


# ── what is not handed over ──────────────────────────────────────────────────────────────────────


def test_everything_stays_while_one_worker_is_enough(offloading):
    """A main worker that sleeps between messages keeps its connections, and the new ones."""
    workers = offloading(window_ms=100)
    links = [quiet_link(workers) for _ in range(10)]
    assert workers.workers_of(links) == [0] * 10
    assert workers.rig.relay.handed_over == 0
    assert not workers.rig.of_kind(WorkersWanted)


@pytest.mark.parametrize("field", [None, "user", "nice", "system", "irq", "softirq"])
def test_everything_stays_without_an_idle_cpu(offloading, machine, field):
    workers = offloading(stat=machine.open(), window_ms=20)
    links = [workers.rig.link() for _ in range(4)]
    began = time.monotonic()

    def spend():
        if field is not None:
            machine.set(field, time.monotonic() - began)

    stay_busy(workers, links, 0.3, spend)
    links.append(workers.rig.link())
    assert workers.workers_of(links) == [0] * 5
    assert workers.rig.relay.handed_over == 0


@pytest.mark.parametrize("usable", [{0}, {0, 1, 3}, {5000, 100_000}, set()])
def test_an_idle_cpu_that_may_not_be_used(offloading, cpus, usable):
    """A cpuset or an affinity mask leaves it to other processes."""
    machine = cpus({2})
    workers = offloading(stat=machine.open(), window_ms=20, rules={"cpus": usable})
    links = [workers.rig.link() for _ in range(4)]
    stay_busy(workers, links, 0.3, machine.write)
    assert workers.rig.relay.handed_over == 0


def test_a_large_machine_that_is_busy(offloading, cpus):
    machine = cpus((), "uptime")
    workers = offloading(stat=machine.open(), window_ms=20)
    links = [workers.rig.link() for _ in range(4)]
    stay_busy(workers, links, 0.3, machine.write)
    assert workers.rig.relay.handed_over == 0


@pytest.mark.parametrize("stat", ["idle", "unknown"])
def test_everything_stays_where_a_quota_is_used_up(offloading, cpus, stat):
    """CPUQuota=: an idle CPU is of no use then. Any busy process has used more than 1 %."""
    machine = cpus({0, 1, 2, 3})
    fd = machine.open() if stat == "idle" else UNKNOWN
    workers = offloading(stat=fd, window_ms=20, rules={"quota": 1})
    links = [workers.rig.link() for _ in range(4)]
    stay_busy(workers, links, 0.3, machine.write)
    assert workers.rig.relay.handed_over == 0


def test_everything_stays_where_the_relay_waits_for_a_cpu(offloading, cpus):
    """A quota that is not visible from inside may be the reason. Here, four other processes compete
    for the only CPU that the relay may use."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usable)})
    rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        machine = cpus({0, 1, 2, 3})
        workers = offloading(stat=machine.open(), window_ms=200, rules={"wait_max": 25})
        links = [workers.rig.link() for _ in range(4)]
        stay_busy(workers, links, 1.5, machine.write)
        assert workers.rig.relay.handed_over == 0
    finally:
        os.sched_setaffinity(0, usable)
        for rival in rivals:
            rival.kill()
            rival.wait()


def test_a_little_idle_time_is_not_enough(offloading, machine):
    """A tenth of one CPU is idle."""
    workers = offloading(stat=machine.open(), window_ms=100)
    links = [workers.rig.link() for _ in range(4)]
    began = time.monotonic()

    def rest():
        machine.set("idle", (time.monotonic() - began) / 10)

    stay_busy(workers, links, 0.5, rest)
    assert workers.rig.relay.handed_over == 0


def test_a_single_connection_stays(offloading):
    """Handing over the only busy connection would gain nothing, and neither would a silent one."""
    workers = offloading(window_ms=100, first=5)
    links = workers.first
    stay_busy(workers, links[-1:], 0.3)
    assert workers.workers_of(links) == [0] * 5


def test_a_lingering_connection_stays(rigs):
    """It has only one side left, and a time limit that its worker keeps."""
    rig = rigs("tcp4", "tcp4", client_buffers={"receive_buffer": 4096})
    links = [rig.link() for _ in range(2)]
    ending = [rig.link() for _ in range(6)]
    last_words = payload(200_000)
    for link in ending:
        rig.send(link.target, last_words)
        rig.settle()
        reset(link.target)
    rig.settle()
    rig.relay.offload_when_busy(UNKNOWN, 50)
    rig.pace_ms = 0
    workers = Workers(rig)
    keep_busy(workers, links)
    assert workers.workers_of(ending) == [0] * 6
    for link in ending:
        assert workers.rig.read_to_end(link.client) == (last_words, "reset")
        assert workers.rig.until_ended(link.id) == ("reset", 0, len(last_words))


def test_a_connection_that_is_checked_for_a_stall_stays(rigs, way):
    """One side has failed, and the other slowly reads what it had sent."""
    rig = rigs("unix", "tcp4", **way)
    links = [rig.link() for _ in range(4)]
    sent = [rig.fill(link.target) for link in links]
    for link in links:
        reset(link.target)
    rig.settle()
    rig.relay.offload_when_busy(UNKNOWN, 0)
    Workers(rig)
    words = [Incoming(link.client, limit=200_000) for link in links]
    while not all(one.end for one in words):
        for one in words:
            one.step()
            one.limit += 200_000
        rig.turn()
    assert [one.end for one in words] == ["eof"] * 4  # AF_UNIX has no reset
    assert all(0 < len(one.data) <= size for one, size in zip(words, sent, strict=True))
    assert rig.relay.handed_over == 0
