"""What a relay with more to do than a CPU can gives away, and when it keeps everything.

The boss is stepped by the test without a pause, and so is as busy as a relay can be; whether a CPU
is idle says a file in the place of /proc/stat.
"""

import os
import socket
import subprocess
import sys
import time
from types import MappingProxyType

import pytest
from kit.crew import Crewed
from kit.rig import PATIENCE_S
from kit.sockets import reset
from kit.stepped import Incoming, Outgoing, close, half_close
from kit.traffic import payload

from proxyd._relay import WorkersWanted

NOBODY_KNOWS = -1
"""The fd of a /proc/stat that cannot be had: a CPU is idle then."""

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
        """An fd, which is for a relay to own."""
        return os.open(self.file.name, os.O_RDONLY)

    def write(self):
        words = " ".join(str(self.ticks[field]) for field in self.FIELDS)
        text = f"cpu  {words} 0 0 0\ncpu0 {words} 0 0 0\nintr 1 2 3\n"
        os.pwrite(self.file.fileno(), text.encode(), 0)

    def set(self, field, seconds):
        """Let the CPUs have spent so many seconds more than at the start."""
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
def sharing(rigs):
    def make(*pair, stat=NOBODY_KNOWS, threads=1, window_ms=1, rules=NO_RULES, first=0, **options):
        """`first` connections are made before there is a crew, and stay with the boss: where making
        one takes longer than a window, a boss may count as busy meanwhile, and gives it away. They
        are silent for longer than a window, too."""
        rig = rigs(*pair, **options)
        links = [rig.link() for _ in range(first)]
        if links:
            rig.pass_time(2 * window_ms / 1000)
        rig.relay.offload_when_busy(stat, window_ms, **rules)
        rig.pace_ms = 0
        crew = Crewed(rig, threads)
        crew.first = links
        return crew

    return make


def keep_busy(crew, links, *, turns=None, each=lambda: None):
    """Echo a byte on every link, again and again: until one was handed over, or for some turns."""
    count = 0
    before = crew.rig.relay.handed_over
    deadline = time.monotonic() + PATIENCE_S
    for link in links:
        link.client.send(b"x")
    while (crew.rig.relay.handed_over == before) if turns is None else count < turns:
        assert time.monotonic() < deadline, "nothing was handed over"
        for link in links:
            for one in (link.client, link.target):
                try:
                    one.send(one.recv(9))
                except BlockingIOError:
                    pass
        each()
        crew.rig.turn()
        count += 1


def fall_silent(crew, links):
    """Read what keep_busy() has left on its way."""
    for link in links:
        link.client.send(b".")
        while crew.rig.read(link.target, 1) != b".":
            pass
        link.target.send(b".")
        while crew.rig.read(link.client, 1) != b".":
            pass


def end_both(crew, link):
    """Close both ends of a connection that is needed no longer; the descriptors are few."""
    close(link.client)
    close(link.target)
    crew.rig.until_ended(link.id)


def quiet_link(crew):
    """A connection over which something was said, while the relay had little to do."""
    crew.rig.pace_ms = 5
    link = crew.rig.link()
    link.client.send(b"word")
    assert crew.rig.read(link.target, 4) == b"word"
    crew.rig.pass_time(0.05)
    crew.rig.pace_ms = 0
    return link


def stay_busy(crew, links, seconds, each=lambda: None):
    """Keep the relay busy for so long, whether or not something is handed over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        keep_busy(crew, links, turns=20, each=each)


# ── what is given away ───────────────────────────────────────────────────────────────────────────


def test_half_of_the_work_is_given_away(sharing):
    crew = sharing(window_ms=100)
    links = [quiet_link(crew) for _ in range(8)]
    keep_busy(crew, links)
    assert 1 <= crew.rig.relay.handed_over <= 4
    crew.rig.until(
        lambda: None not in [crew.place_of(link.client_fd) for link in links], "their places"
    )
    assert {crew.place_of(link.client_fd) for link in links} == {0, 1}


def test_bytes_and_ends_survive_it(sharing, pair, mode):
    """Streams both ways, some of which end while others go on, whatever is held at the moment."""
    crew = sharing(*pair, **mode)
    up, down = payload(1_500_000), payload(1_000_000, 2)
    rounds = 0
    while crew.rig.relay.handed_over == 0 or rounds < 2:
        links = [crew.rig.link() for _ in range(4)]
        there = [Incoming(link.target) for link in links]
        back = [Incoming(link.client) for link in links]
        crew.rig.run(
            *[Outgoing(link.client, up, half_close) for link in links],
            *[Outgoing(link.target, down, half_close) for link in links],
            *there,
            *back,
        )
        assert [(flow.data == up, flow.end) for flow in there] == [(True, "eof")] * 4
        assert [(flow.data == down, flow.end) for flow in back] == [(True, "eof")] * 4
        for link in links:
            assert crew.rig.until_ended(link.id) == ("ended", len(up), len(down))
        rounds += 1
        assert rounds < 100, "nothing was handed over"
    assert crew.rig.relay.connections == 0


def test_what_it_holds_goes_along(sharing, pair, mode):
    """A connection whose target does not read is given away with the bytes that wait in it."""
    crew = sharing(*pair, window_ms=50, first=1, **mode)
    (stalled,) = crew.first
    others = []
    sent = 0
    deadline = time.monotonic() + PATIENCE_S
    while crew.place_of(stalled.client_fd) in (0, None):
        assert time.monotonic() < deadline, "it was not given away"
        others.append(crew.rig.link())
        if len(others) > 3:
            end_both(crew, others.pop(0))
        sent += crew.rig.stuff(stalled.client)
        # The window must end within, and it has moved bytes in the one before.
        keep_busy(crew, others, turns=20)
        crew.rig.read(stalled.target, 100_000)
        sent -= 100_000
    data = b"\xa5" * sent
    assert crew.rig.read(stalled.target, sent) == data
    stalled.target.send(b"answer")
    assert crew.rig.read(stalled.client, 6) == b"answer"


def test_more_than_one_turn_can_do_goes_along(sharing, way):
    """A connection that has spent the budget of its turn, and would go on without an event."""
    crew = sharing("tcp4", "tcp4", window_ms=0, **way)
    data = payload(6_000_000)
    while crew.rig.relay.handed_over < 40:
        links = [crew.rig.adopted(send_buffer=4_000_000) for _ in range(4)]
        for link in links:
            link.target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_000_000)
        flows = [Outgoing(link.client, data, half_close) for link in links]
        heard = [Incoming(link.target) for link in links]
        for _ in range(3):
            for flow in flows:  # as much as the sockets hold
                flow.step()
            crew.rig.turn()
        crew.rig.run(*flows, *heard)
        assert [(flow.data == data, flow.end) for flow in heard] == [(True, "eof")] * 4
        for link in links:
            close(link.target)
            assert crew.rig.until_ended(link.id) == ("ended", len(data), 0)


def test_ends_are_passed_on_by_the_other(sharing, pair):
    crew = sharing(*pair, first=4)
    links = crew.first
    keep_busy(crew, links)
    moved = [link for link in links if crew.place_of(link.client_fd) != 0]
    assert moved
    fall_silent(crew, links)
    for link, end in zip(moved, (close, reset, half_close), strict=False):
        end(link.client)
        how = "reset" if end is reset and "unix" not in pair else "eof"
        assert crew.rig.read_to_end(link.target) == (b"", how)
        close(link.target)
        crew.rig.until_ended(link.id)


def test_new_connections_go_elsewhere_meanwhile(sharing):
    """More of them than the boss can have fewer connections than the other."""
    crew = sharing(first=2)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert time.monotonic() < deadline
        keep_busy(crew, crew.first, turns=5)
        links = [crew.rig.link() for _ in range(4)]
        crew.rig.until(
            lambda links=links: None not in [crew.place_of(link.client_fd) for link in links],
            "their places",
        )
        if 1 in [crew.place_of(link.client_fd) for link in links]:
            return
        for link in links:
            end_both(crew, link)


def test_counts_go_along(sharing):
    """New ones go where the fewest are, those counted that were given away."""
    crew = sharing(window_ms=1000)
    links = [quiet_link(crew) for _ in range(8)]
    keep_busy(crew, links)
    links += [crew.rig.link() for _ in range(8)]  # before the next window ends
    crew.rig.until(
        lambda: None not in [crew.place_of(link.client_fd) for link in links], "their places"
    )
    places = [crew.place_of(link.client_fd) for link in links]
    assert abs(places.count(0) - places.count(1)) <= 1
    for link in [link for link, place in zip(links, places, strict=True) if place == 1]:
        reset(link.client)
        crew.rig.until_ended(link.id)
    link = crew.rig.link()
    crew.rig.until(lambda: crew.place_of(link.client_fd) is not None, "its place")
    assert crew.place_of(link.client_fd) == 1


def test_a_crew_is_asked_for_once(sharing):
    crew = sharing(threads=0)
    links = [crew.rig.link() for _ in range(4)]
    crew.rig.until(
        lambda: keep_busy(crew, links, turns=5) or crew.rig.of_kind(WorkersWanted),
        "the call for help",
    )
    stay_busy(crew, links, 0.1)
    assert len(crew.rig.of_kind(WorkersWanted)) == 1
    assert crew.rig.relay.thread_count == 1
    crew.rig.relay.ping_workers()
    crew.hire(1)
    assert crew.rig.relay.workers_answered  # it has not been there to be asked
    assert crew.rig.relay.thread_count == 2
    keep_busy(crew, links)
    assert len(crew.rig.of_kind(WorkersWanted)) == 1


@pytest.mark.parametrize("field", ["idle", "iowait"])
def test_idle_time_is_read(sharing, machine, field):
    crew = sharing(stat=machine.open(), window_ms=20)
    links = [crew.rig.link() for _ in range(4)]
    began = time.monotonic()
    keep_busy(crew, links, each=lambda: machine.set(field, time.monotonic() - began))


class Cpus(Machine):
    """Four CPUs; `idle` ones were idle all the time since the start, the others never."""

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
def test_an_idle_cpu_that_may_be_used(sharing, cpus, usable):
    machine = cpus({2})
    crew = sharing(stat=machine.open(), window_ms=50, rules={"cpus": usable})
    links = [crew.rig.link() for _ in range(4)]
    keep_busy(crew, links, each=machine.write)


def test_a_large_machine_is_asked_for_less(sharing, cpus):
    """/proc/uptime says how long all CPUs were idle as well."""
    machine = cpus({0}, "uptime")
    crew = sharing(stat=machine.open(), window_ms=50)
    links = [crew.rig.link() for _ in range(4)]
    keep_busy(crew, links, each=machine.write)


def test_a_quota_that_has_room(sharing):
    """Ten CPUs: whatever this process needs meanwhile."""
    crew = sharing(window_ms=50, rules={"quota": 1000}, first=4)
    keep_busy(crew, crew.first)


# ── what is not ──────────────────────────────────────────────────────────────────────────────────


def test_everything_stays_while_one_is_enough(sharing):
    """A boss that sleeps between two messages keeps what it has, and who comes new."""
    crew = sharing(window_ms=100)
    links = [quiet_link(crew) for _ in range(10)]
    assert [crew.place_of(link.client_fd) for link in links] == [0] * 10
    assert crew.rig.relay.handed_over == 0
    assert not crew.rig.of_kind(WorkersWanted)


@pytest.mark.parametrize("field", [None, "user", "nice", "system", "irq", "softirq"])
def test_everything_stays_without_an_idle_cpu(sharing, machine, field):
    crew = sharing(stat=machine.open(), window_ms=20)
    links = [crew.rig.link() for _ in range(4)]
    began = time.monotonic()

    def spend():
        if field is not None:
            machine.set(field, time.monotonic() - began)

    stay_busy(crew, links, 0.3, spend)
    links.append(crew.rig.link())
    assert [crew.place_of(link.client_fd) for link in links] == [0] * 5
    assert crew.rig.relay.handed_over == 0


@pytest.mark.parametrize("usable", [{0}, {0, 1, 3}, {5000, 100_000}, set()])
def test_an_idle_cpu_that_may_not_be_used(sharing, cpus, usable):
    """A cpuset or an affinity leaves it to others."""
    machine = cpus({2})
    crew = sharing(stat=machine.open(), window_ms=20, rules={"cpus": usable})
    links = [crew.rig.link() for _ in range(4)]
    stay_busy(crew, links, 0.3, machine.write)
    assert crew.rig.relay.handed_over == 0


def test_a_large_machine_that_is_busy(sharing, cpus):
    machine = cpus((), "uptime")
    crew = sharing(stat=machine.open(), window_ms=20)
    links = [crew.rig.link() for _ in range(4)]
    stay_busy(crew, links, 0.3, machine.write)
    assert crew.rig.relay.handed_over == 0


@pytest.mark.parametrize("stat", ["idle", "unknown"])
def test_everything_stays_where_a_quota_is_used_up(sharing, cpus, stat):
    """CPUQuota=: an idle CPU is of no use then. One per cent is less than anything that is busy
    has used."""
    machine = cpus({0, 1, 2, 3})
    fd = machine.open() if stat == "idle" else NOBODY_KNOWS
    crew = sharing(stat=fd, window_ms=20, rules={"quota": 1})
    links = [crew.rig.link() for _ in range(4)]
    stay_busy(crew, links, 0.3, machine.write)
    assert crew.rig.relay.handed_over == 0


def test_everything_stays_where_the_relay_waits_for_a_cpu(sharing, cpus):
    """Be it for a quota that cannot be seen from inside. Four others want the only CPU it has."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usable)})
    rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        machine = cpus({0, 1, 2, 3})
        crew = sharing(stat=machine.open(), window_ms=200, rules={"wait_max": 25})
        links = [crew.rig.link() for _ in range(4)]
        stay_busy(crew, links, 1.5, machine.write)
        assert crew.rig.relay.handed_over == 0
    finally:
        os.sched_setaffinity(0, usable)
        for rival in rivals:
            rival.kill()
            rival.wait()


def test_a_little_idle_time_is_not_enough(sharing, machine):
    """A tenth of a CPU."""
    crew = sharing(stat=machine.open(), window_ms=100)
    links = [crew.rig.link() for _ in range(4)]
    began = time.monotonic()

    def rest():
        machine.set("idle", (time.monotonic() - began) / 10)

    stay_busy(crew, links, 0.5, rest)
    assert crew.rig.relay.handed_over == 0


def test_a_single_connection_stays(sharing):
    """Nothing would be gained; nor by giving one of them that does nothing."""
    crew = sharing(window_ms=100, first=5)
    links = crew.first
    stay_busy(crew, links[-1:], 0.3)
    assert [crew.place_of(link.client_fd) for link in links] == [0] * 5


def test_whoever_is_about_to_end_stays(rigs):
    """A lingering connection has a time limit, which its relay keeps, and only one side left."""
    rig = rigs("tcp4", "tcp4", client_buffers={"receive_buffer": 4096})
    links = [rig.link() for _ in range(2)]
    ending = [rig.link() for _ in range(6)]
    last_words = payload(200_000)
    for link in ending:
        rig.send(link.target, last_words)
        rig.settle()
        reset(link.target)
    rig.settle()
    rig.relay.share(NOBODY_KNOWS, 50)
    rig.pace_ms = 0
    crew = Crewed(rig)
    keep_busy(crew, links)
    assert [crew.place_of(link.client_fd) for link in ending] == [0] * 6
    for link in ending:
        assert crew.rig.read_to_end(link.client) == (last_words, "reset")
        assert crew.rig.until_ended(link.id) == ("reset", 0, len(last_words))


def test_whoever_is_watched_stays(rigs, way):
    """Where a side has failed, and the other reads its last words slowly."""
    rig = rigs("unix", "tcp4", **way)
    links = [rig.link() for _ in range(4)]
    sent = [rig.stuff(link.target) for link in links]
    for link in links:
        reset(link.target)
    rig.settle()
    rig.relay.offload_when_busy(NOBODY_KNOWS, 0)
    Crewed(rig)
    words = [Incoming(link.client, most=200_000) for link in links]
    while not all(one.end for one in words):
        for one in words:
            one.step()
            one.most += 200_000
        rig.turn()
    assert [one.end for one in words] == ["eof"] * 4  # AF_UNIX has no reset
    assert all(0 < len(one.data) <= size for one, size in zip(words, sent, strict=True))
    assert rig.relay.handed_over == 0
