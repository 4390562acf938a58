"""The scenarios of the walk.

The script of a scenario is a generator that yields whenever the program is to have a turn.
"""

import os
import signal
import socket

from faults.callers import INFO, LIST, METRICS, STATUS, TERMINATE, WATCH
from faults.datagrams import IDLE_OPTION
from faults.world import COMPLETE, CUT, REFUSED, half_close, reset_client, reset_far

BULK = 1536 * 1024
"""More bytes than the sockets and a pipe hold."""

SO_RCVBUFFORCE = 33
"""As SO_RCVBUF, beyond net.core.rmem_max; socket(7)."""

SCENARIOS = {}


class Scenario:
    """How the program is started, and what happens to it."""

    def __init__(self, script, *, client="tcp4", target="tcp4", options=(), **more):
        self.name = script.__name__.replace("_", "-") + more.pop("suffix", "")
        self.title = (script.__doc__ or "").strip().split("\n")[0]
        self.script = script
        self.client = client
        self.target = target
        self.options = list(options)
        self.copies = more.pop("copies", False)
        """The relay copies: splice is not allowed."""
        self.listens = more.pop("listens", True)
        """The backend listens from the start."""
        self.early = more.pop("early", False)
        """The script begins before the program does."""
        self.ends = more.pop("ends", False)
        """The program ends by itself, or is ended by the script."""
        self.accepted = more.pop("accepted", False)
        """The program is given a connection instead of a listener (Accept=yes)."""
        self.by_name = more.pop("by_name", False)
        """The target is a name."""
        self.has_threads = self.by_name or any("--threads" in option for option in options)
        """Threads of the program work outside its turns."""
        self.opens = more.pop("opens", False)
        """The program opens its listener itself (--listen=)."""
        self.inspected = more.pop("inspected", False)
        """The program has an inspection socket …"""
        self.inspected_by_default = more.pop("inspected_by_default", False)
        """… or is to have one if it can."""
        self.kills = more.pop("kills", 0)
        """The number of processes that are killed, one after the other. The second one is the first
        whose calls fail."""
        self.keeps = more.pop("keeps", False) or self.kills > 0
        """What keeps connections in case of a kill may stay until the end of the program."""
        self.restarts = more.pop("restarts", False) or self.keeps
        """The service manager has a store, and starts the program again whenever it has ended."""
        self.quarantines = more.pop("quarantines", False)
        """A UNIX client may be closed in the quarantine, whose thread stays until the end."""
        per_source = any("--connections-max-per-source" in one for one in self.options)
        self.blocks_kept = 2 * self.quarantines + 4 * per_source + 6 * self.keeps
        """The number of blocks that the program may keep until its end: for this thread, to
        remember sources, and for a slate and its pages. An entry without a client is freed when
        another one is looked for."""
        self.datagrams = more.pop("datagrams", None)
        """(Families of a listener of datagrams and of its target); None: there is none."""
        self.environment = more.pop("environment", {})
        self.quick = more.pop("quick", True)
        """Part of the quick walk."""
        assert not more, more


def scenario(**options):
    """Register a script as a scenario, or as one for each of `pairs`, which are families (of
    `datagram_pairs`: of listener and target of datagrams); the first `quick_pairs` of these are
    part of the quick walk."""
    pairs = options.pop("pairs", None)
    datagram_pairs = options.pop("datagram_pairs", [])
    quick = options.pop("quick", True)
    quick_pairs = options.pop("quick_pairs", 1)

    def enter(script):
        for number, (client, target) in enumerate(pairs or [(None, None)]):
            families = {"client": client, "target": target} if client else {}
            suffix = f"-{client}-{target}" if client else ""
            quickly = quick and number < quick_pairs
            one = Scenario(script, suffix=suffix, quick=quickly, **families, **options)
            SCENARIOS[one.name] = one
        return script

    def enter_datagrams(script):
        asked_for = [*options.pop("options", ()), IDLE_OPTION]
        for number, pair in enumerate(datagram_pairs):
            suffix = f"-{pair[0]}-{pair[1]}"
            quickly = quick and number < quick_pairs
            one = Scenario(
                script, suffix=suffix, quick=quickly, datagrams=pair, options=asked_for, **options
            )
            SCENARIOS[one.name] = one
        return script

    return enter_datagrams if datagram_pairs else enter


ALL_KINDS = [("tcp4", "tcp4"), ("tcp4", "unix"), ("unix", "tcp4"), ("unix", "unix")]


@scenario(pairs=[("tcp4", "tcp4"), ("unix", "unix"), ("tcp6", "unix")], quick_pairs=2, early=True)
def short(world):
    """A short exchange; the client is there before the program starts."""
    yield from world.exchange()


@scenario(pairs=[("tcp4", "tcp4"), ("unix", "tcp4")])
def reply(world):
    """The client half-closes, and is answered only then."""
    yield from world.exchange(up=100_000, down=100_000, answers_at_end=True)


@scenario(pairs=ALL_KINDS, quick_pairs=4)
def bulk(world):
    """Streams both ways; the client reads nothing until all is stuck."""
    conn = world.connect(BULK, BULK)
    conn.reads = False
    yield from world.until_still()
    conn.reads = True


@scenario(pairs=[("tcp4", "tcp4"), ("unix", "unix")], copies=True)
def copied(world):
    """As bulk, without splice."""
    yield from bulk(world)


def until_stuck(world, conn):
    """Run until the backend has recognised the client and stopped reading, and all is full."""
    world.backend_reads = False
    yield from world.until(lambda: conn.far is not None or conn.hearing.end or conn.sending.error)
    yield from world.until_still()


@scenario(pairs=[("tcp4", "tcp4"), ("tcp4", "unix")])
def stuck_target(world):
    """As bulk, with a backend that reads nothing until all is stuck."""
    conn = world.connect(BULK, 1000)
    yield from until_stuck(world, conn)
    if conn.far is not None:
        conn.far.reads = True


@scenario(client="tcp4", target="tcp4", quick=False)
def full_pipe(world):
    """As stuck_target, with more in the pipe than one read takes out."""
    world.listen_socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 2 * BULK)
    yield from stuck_target(world)


@scenario(pairs=[("tcp4", "tcp4"), ("tcp4", "unix"), ("unix", "tcp4")])
def client_reset(world):
    """The client crashes in the middle of a stream, while the backend reads nothing."""
    conn = world.connect(BULK, 1000, expect=CUT)
    yield from until_stuck(world, conn)
    reset_client(conn)
    yield from world.turns(3)
    if conn.far is not None:
        conn.far.reads = True


@scenario(pairs=[("tcp4", "tcp4"), ("tcp4", "unix")])
def target_reset(world):
    """The backend crashes in the middle of two streams, with the client's bytes unread."""
    conn = world.connect(BULK, BULK, expect=CUT)
    conn.reads = False
    yield from until_stuck(world, conn)
    if conn.far is not None:
        reset_far(conn)
    yield from world.turns(3)
    conn.reads = True


@scenario()
def several(world):
    """Simultaneous connections, short ones and streams."""
    for size in (300, 200_000, 300, 50_000):
        world.connect(size, size)
    yield from world.turns(3)
    world.connect(300, 300)
    yield from world.until_all_over()


@scenario(options=["--proxy-protocol=v1"])
def proxy_v1(world):
    """With a PROXY header, as text."""
    world.proxy_protocol = "v1"
    yield from world.exchange()


@scenario(options=["--proxy-protocol=v2"], quick=False)
def proxy_v2(world):
    """With a PROXY header, as bytes."""
    world.proxy_protocol = "v2"
    yield from world.exchange()


HEADERS = ["--accept-proxy-protocol=127.0.0.0/8,unix", "--proxy-protocol=v2"]
V1_HEADER = b"PROXY TCP4 192.0.2.1 198.51.100.2 5000 443\r\n"
UNIX_HEADER = (
    b"\r\n\r\n\0\r\nQUIT\n\x21\x31\0\xe6"
    + b"/run/a-client-with-quite-a-long-name".ljust(108, b"\0")
    + b"/run/front".ljust(108, b"\0")
    + b"\x04\0\x04noop"
    + b"\x05\0\x04id-7"
)


@scenario(
    pairs=[("tcp4", "tcp4"), ("unix", "unix")],
    quick_pairs=2,
    early=True,
    quarantines=True,
    options=HEADERS,
)
def headers(world):
    """Clients begin with PROXY headers: at once, in pieces, bad ones, and none within 5 s."""
    world.proxy_protocol = "v2"
    world.header = V1_HEADER
    world.connect(300, 500)
    yield from world.turns(3)
    late = world.connect(300, 500, header=UNIX_HEADER)
    rest, late.sending.rest = late.sending.rest, late.sending.rest[:0]
    late.sending.then, then = None, late.sending.then
    world.connect(300, 300, expect=REFUSED, header=b"PROXY TCP4 192.0.2.1\r\n")
    for size in (5, 100, len(rest)):
        late.sending.rest, rest = rest[:size], rest[size:]
        yield from world.turns(3)
    late.sending.then = then
    world.connect(0, 300, then=None, expect=REFUSED, header=V1_HEADER[:9])
    yield from world.until_all_over()


@scenario(
    pairs=[("tcp4", "tcp4"), ("unix", "unix")],
    listens=False,
    inspected=True,
    options=[*HEADERS, "--connections-max-per-source=3"],
)
def headers_hold(world):
    """Clients with headers are listed before these are there, are held then, and share a limit."""
    world.proxy_protocol = "v2"
    world.header = V1_HEADER
    world.call(WATCH)
    late = world.connect(300, 500)
    rest, late.sending.rest = late.sending.rest, late.sending.rest[:20]
    late.sending.then, then = None, late.sending.then
    yield from world.turns(5)
    callers = [world.call(LIST), world.call(METRICS, STATUS)]
    yield from world.until(lambda: all(caller.over for caller in callers))
    late.sending.rest, late.sending.then = rest[20:], then
    for header in (V1_HEADER, UNIX_HEADER):
        world.connect(300, 500, header=header)
    yield from world.turns(20)
    caller = world.call(LIST)
    yield from world.until(lambda: caller.over)
    world.backend.listen(64)
    yield from world.until_all_over()


@scenario(
    pairs=[("tcp4", "tcp4"), ("tcp6", "tcp4"), ("unix", "unix")],
    quarantines=True,
    options=["--connections-max-per-source=2"],
)
def per_source(world):
    """More clients of one source than it may have; then there is a place again."""
    stay = [world.connect(300, 300, then=None) for _ in range(2)]
    yield from world.until(lambda: all(c.far is not None or c.hearing.end for c in stay))
    world.connect(300, 300, expect=CUT)
    yield from world.turns(20)
    half_close(stay[0].client)
    yield from world.until(lambda: stay[0].over)
    yield from world.exchange()
    half_close(stay[1].client)
    yield from world.until_all_over()


@scenario(
    options=["--connections-max-per-source=2", "--proxy-protocol=v1"], listens=False, quick=False
)
def per_source_hold(world):
    """Clients of one source are held, and count."""
    world.proxy_protocol = "v1"
    for expect in (COMPLETE, COMPLETE, CUT):
        world.connect(300, 300, expect=expect)
        yield from world.turns(10)
    world.backend.listen(64)
    yield from world.until_all_over()


@scenario(datagram_pairs=[("udp4", "udp4")], options=["--connections-max-per-source=2"])
def asked_by_one_source(world):
    """The flows of one source make room for others of it."""
    for _ in range(4):
        yield from world.datagrams.asked(world.datagrams.asker())
    yield from world.exchange()


@scenario(pairs=[("tcp4", "tcp4"), ("unix", "unix")], listens=False, early=True)
def hold(world):
    """Two clients come before the backend listens, and are held."""
    world.connect(300, 500)
    world.connect(300, 500)
    yield from world.turns(40)
    world.backend.listen(64)
    yield from world.until_all_over()


@scenario(listens=False, options=["--connect-timeout=1s"], quick=False)
def given_up(world):
    """The backend never listens: the client is refused."""
    yield from world.exchange(expect=REFUSED)
    world.backend.listen(64)


@scenario(by_name=True)
def name(world):
    """The target is a name."""
    yield from world.exchange()
    yield from world.exchange()


@scenario(options=["-c2"])
def limit(world):
    """More clients than may be connected."""
    stay = [world.connect(300, 300, then=None) for _ in range(2)]
    yield from world.until(lambda: all(c.far is not None or c.hearing.end for c in stay))
    world.connect(300, 300, expect=CUT)
    yield from world.turns(60)
    for conn in stay:
        conn.sending.then = half_close


@scenario(options=["--drain-timeout=60s"], ends=True)
def drain(world):
    """SIGTERM in the middle of a stream, which is allowed to finish."""
    conn = world.connect(BULK, BULK)
    conn.reads = False
    yield from world.until_still()
    os.kill(os.getpid(), signal.SIGTERM)
    yield from world.turns(5)
    conn.reads = True


@scenario(ends=True)
def stop(world):
    """SIGTERM in the middle of a stream, which is cut."""
    conn = world.connect(BULK, BULK, expect=CUT)
    conn.reads = False
    yield from world.until_still()
    os.kill(os.getpid(), signal.SIGTERM)
    yield from world.turns(3)
    conn.reads = True


@scenario(options=["--idle-timeout=1s"])
def idle(world):
    """A connection over which nothing moves any more, and one that is stuck."""
    world.connect(300, 300, then=None)
    conn = world.connect(300, BULK, expect=CUT)
    conn.reads = False
    yield from world.until(lambda: world.conns[0].hearing.end)
    yield from world.until_still()
    conn.reads = True


@scenario(pairs=[("tcp4", "tcp4"), ("unix", "unix")], accepted=True, early=True, ends=True)
def passed_in(world):
    """A connection accepted by the service manager (Accept=yes)."""
    world.connect(300, 500)
    yield from world.until_all_over()


@scenario(options=["--exit-idle-time=0"], early=True, ends=True)
def exit_idle(world):
    """The program ends as soon as there is no connection."""
    yield from world.exchange()


@scenario(environment={"SYSTEMD_LOG_LEVEL": "debug"})
def logged(world):
    """Every connection is logged, and the counters on SIGUSR1."""
    yield from world.exchange()
    os.kill(os.getpid(), signal.SIGUSR1)
    yield from world.exchange()


@scenario(client="unix", opens=True)
def opened(world):
    """The program opens its listener itself, a socket file."""
    yield from world.exchange()


@scenario(pairs=[("tcp4", "tcp4"), ("unix", "unix")], inspected=True)
def inspected(world):
    """Callers ask for everything, while there are clients, and while they come and go."""
    world.call(WATCH)
    conn = world.connect(300, 300, then=None)
    yield from world.until(lambda: conn.hearing.end or len(conn.hearing.data) == 300)
    callers = [world.call(INFO, STATUS, METRICS, TERMINATE), world.call(LIST)]
    yield from world.exchange()
    yield from world.until(lambda: all(caller.over for caller in callers))
    half_close(conn.client)
    yield from world.until(lambda: conn.over)


@scenario(options=["--threads=2", "--hand-over=always"], inspected=True, quick=False)
def inspected_threads(world):
    """As inspected, with two relay threads."""
    yield from inspected(world)


@scenario(listens=False, inspected=True, quick=False)
def inspected_hold(world):
    """Clients are held, and listed."""
    for _ in range(2):
        world.connect(300, 500)
    yield from world.turns(20)
    callers = [world.call(LIST), world.call(METRICS)]
    yield from world.until(lambda: all(caller.over for caller in callers))
    world.backend.listen(64)
    yield from world.until_all_over()


@scenario(inspected_by_default=True, quick=False)
def inspected_by_default(world):
    """The inspection socket is in RuntimeDirectory=, if it can be opened there."""
    yield from world.exchange()
    if os.path.exists(world.inspection_path):
        caller = world.call(INFO, LIST)
        yield from world.until(lambda: caller.over)
    yield from world.exchange()


@scenario(options=["--threads=3", "--hand-over=always"])
def threads(world):
    """As several, with three relay threads."""
    yield from several(world)


@scenario(options=["--threads=2", "--hand-over=always"], listens=False, early=True, quick=False)
def threads_hold(world):
    """As hold, with two relay threads."""
    yield from hold(world)


@scenario(
    options=["--threads=2", "--hand-over=always", "--buffer-size=128K", "--drain-timeout=60s"],
    ends=True,
)
def threads_drain(world):
    """SIGTERM in the middle of two streams in two threads, which are allowed to finish."""
    conns = [world.connect(BULK, BULK) for _ in range(2)]
    for conn in conns:
        conn.reads = False
    yield from world.until_still()
    os.kill(os.getpid(), signal.SIGTERM)
    yield from world.turns(5)
    for conn in conns:
        conn.reads = True


@scenario(pairs=[("tcp4", "tcp4"), ("unix", "unix"), ("unix", "tcp4")], restarts=True)
def restart(world):
    """Connections in several states go on in the next process, and again in the one after it."""
    conns = [world.connect(300, 300, then=None), world.connect(BULK, BULK)]
    conns.append(world.connect(300, 100_000))
    for conn in conns[1:]:
        conn.reads = False
    yield from world.until_still()
    yield from next_process(world)
    for conn in conns[1:]:
        conn.reads = True
    yield from next_process(world)
    half_close(conns[0].client)
    yield from world.until_all_over()


def next_process(world):
    """End the program, and let the next one have turns."""
    before = world.processes
    os.kill(os.getpid(), signal.SIGTERM)
    yield from world.until(lambda: world.processes > before)
    yield from world.until_still()


@scenario(options=["--threads=2", "--hand-over=always"], restarts=True)
def restart_threads(world):
    """As restart, with two relay threads."""
    yield from restart(world)


@scenario(pairs=[("tcp4", "tcp4"), ("unix", "unix")], restarts=True, listens=False, early=True)
def restart_hold(world):
    """Clients are held, and served by the next process."""
    world.connect(300, 500)
    world.connect(300, 500)
    yield from world.turns(40)
    yield from next_process(world)
    world.backend.listen(64)
    yield from world.until_all_over()


# ── datagrams, with streams beside them ──────────────────────────────────────────────────────────

DATAGRAM_KINDS = [("udp4", "udp4"), ("unix", "unix"), ("udp4", "unix"), ("unix", "udp4")]


@scenario(datagram_pairs=DATAGRAM_KINDS, quick_pairs=2, early=True)
def asked(world):
    """Clients ask one by one and at once; the first is there before the program starts."""
    side = world.datagrams
    askers = [side.asker() for _ in range(3)]
    askers[0].ask()
    yield
    yield from side.asked(*askers, count=4)
    yield from world.exchange()
    yield from side.asked(*askers, count=2, size=1200)


@scenario(datagram_pairs=[("udp4", "udp4"), ("unix", "unix")], quick_pairs=2, listens=False)
def asked_in_vain(world):
    """Questions come before the server, and are held; later it is away for a while."""
    side = world.datagrams
    askers = [side.asker() for _ in range(2)]
    for asker in askers:
        asker.ask(3)
    yield from world.turns(40)
    world.backend.listen(64)
    side.begin_server()
    yield from world.until(lambda: all(asker.over for asker in askers))
    side.end_server()
    late = side.asker()
    late.may_lose = True
    for _ in range(3):
        late.ask()
        yield from world.turns(10)
    side.begin_server()
    yield from world.until(lambda: late.over)


@scenario(datagram_pairs=[("udp4", "unix"), ("unix", "unix")])
def asked_too_fast(world):
    """The queue of a server that does not read is full, and questions wait for room in it."""
    side = world.datagrams
    side.reads = False
    asker = side.asker()
    asker.ask(40)
    yield from world.until_still()
    side.reads = True
    yield from world.until(lambda: asker.over)


@scenario(datagram_pairs=[("udp4", "udp4"), ("unix", "udp4")], options=["--proxy-protocol=v2"])
def asked_with_header(world):
    """With a PROXY header before each datagram."""
    side = world.datagrams
    world.proxy_protocol = "v2"
    side.header_size = 28 if side.listen_family == "udp4" else 16
    yield from side.asked(side.asker(), side.asker(), count=3)


@scenario(datagram_pairs=[("udp4", "udp4")], options=["-c2"])
def asked_by_too_many(world):
    """The table of flows is full: those that have their answers make room."""
    side = world.datagrams
    for _ in range(4):
        yield from side.asked(side.asker())


@scenario(datagram_pairs=[("udp4", "udp4")], by_name=True, quick=False)
def asked_by_name(world):
    """The target is a name."""
    yield from world.datagrams.asked(world.datagrams.asker(), count=3)


@scenario(
    datagram_pairs=[("udp4", "udp4")],
    options=["--threads=2", "--hand-over=always"],
    inspected=True,
)
def asked_and_inspected(world):
    """Callers list and watch flows, streams are in two threads, and all is logged."""
    side = world.datagrams
    world.call(WATCH)
    yield from side.asked(side.asker(), count=2)
    callers = [world.call(INFO, STATUS, METRICS, TERMINATE), world.call(LIST)]
    os.kill(os.getpid(), signal.SIGUSR1)
    yield from side.asked(*side.askers, side.asker())
    yield from world.exchange()
    yield from world.until(lambda: all(caller.over for caller in callers))


@scenario(datagram_pairs=[("udp4", "udp4")], options=["--drain-timeout=60s"], ends=True)
def asked_before_the_end(world):
    """SIGTERM while an answer is on its way, which arrives."""
    side = world.datagrams
    side.answers = False
    asker = side.asker()
    asker.ask()
    yield from world.until(lambda: side.arrived or asker.over)
    os.kill(os.getpid(), signal.SIGTERM)
    yield from world.turns(5)
    side.answers = True
    yield from world.until(lambda: asker.over)
