"""What is measured: each work with its load, its families and its unit."""

from dataclasses import dataclass

TCP_TCP, UNIX_TCP, TCP_UNIX, UNIX_UNIX = "tcp-tcp", "unix-tcp", "tcp-unix", "unix-unix"
UDP_UDP, UDP1_UDP = "udp-udp", "udp1-udp"
PAIRS = (TCP_TCP, UNIX_TCP, TCP_UNIX, UNIX_UNIX)
KIB = 1024

TWO_CPUS = (
    "pingpong",
    "connect",
    "bulk-up-1-256K/tcp-tcp",
    "bulk-up-8-256K/tcp-tcp",
    "bulk-down-8-256K/tcp-tcp",
    "mixed",
)
"""Works that compare one thread with two, while proxy and load may use both CPUs."""


@dataclass(frozen=True)
class Work:
    """One row of the report.

    ``kind``    load (one run of load.c), idle or start, which have modules of their own
    ``pair``    the families of client and target
    ``load``    arguments of load.c
    ``counter`` the field of load.c's answer that is divided by ``per`` to count the units
    ``unit``    name of the unit that CPU time is reported for
    ``short``   whether it is also part of the short form
    """

    name: str
    pair: str
    kind: str = "load"
    load: tuple[str, ...] = ()
    counter: str = "round_trips"
    per: float = 1
    unit: str = "round trip"
    short: bool = False

    @property
    def title(self) -> str:
        """The name with the families."""
        return f"{self.name}/{self.pair}"

    @property
    def clients(self) -> int:
        """How many there are at least; thousands if they come and go."""
        counts = [word.partition("=") for word in self.load]
        clients = sum(int(n) for key, _, n in counts if key in ("pings", "uploads", "downloads"))
        return clients or 1000

    @property
    def lasts(self) -> bool:
        """Whether its connections are streams that outlast the warm-up."""
        counts = ("pings=", "uploads=", "downloads=")
        return not self.pair.startswith("udp") and any(one.startswith(counts) for one in self.load)

    @property
    def latency_of(self) -> str:
        """The unit that percentiles are reported for; empty if there are none."""
        return self.unit if self.counter != "bytes" else ""


def pingpong(size: int, connections: int, label: str, pair: str, *, short: bool = False) -> Work:
    """One message of ``size`` bytes in flight on each connection."""
    load = (f"pings={connections}", f"size={size}")
    return Work(f"pingpong-{label}x{connections}", pair, load=load, short=short)


def bulk(direction: str, connections: int, write: int, pair: str) -> Work:
    """Streams in one direction, in writes of ``write`` bytes."""
    streams = "uploads" if direction == "up" else "downloads"
    return Work(
        f"bulk-{direction}-{connections}-{write // KIB}K",
        pair,
        load=(f"{streams}={connections}", f"write={write}"),
        counter="bytes",
        per=1e9,
        unit="GB",
        short=in_short_form(direction, connections, write, pair),
    )


def short_connections(pair: str) -> Work:
    """Connect, 64 bytes each way, close; 32 at a time."""
    load = ("dials=32", "size=64")
    return Work("connect", pair, load=load, counter="dials", unit="connection", short=True)


def mixed(pair: str) -> Work:
    """Messages alongside eight streams, which take most of the CPU: the latency is the point."""
    load = ("pings=64", "size=64", "uploads=4", "downloads=4", f"write={64 * KIB}")
    return Work("mixed", pair, load=load, short=True)


def datagrams(direction: str, flows: int, size: int, segments: int, *, short: bool = False) -> Work:
    """Datagrams in one direction; with ``segments`` their sender hands over several at once."""
    streams = "uploads" if direction == "up" else "downloads"
    load = (f"{streams}={flows}", f"size={size}", f"segments={segments}", "window=64")
    gso = "-gso" if segments > 1 else ""
    return Work(
        f"datagrams-{direction}-{size}Bx{flows}{gso}",
        UDP_UDP,
        load=load,
        counter="datagrams",
        unit="datagram",
        short=short,
    )


def datagram_works() -> list[Work]:
    """Every work of datagrams."""
    return [
        pingpong(64, 1, "64B", UDP_UDP),
        pingpong(64, 64, "64B", UDP_UDP, short=True),
        pingpong(1200, 64, "1200B", UDP_UDP),
        datagrams("up", 1, 64, 1),
        datagrams("up", 1, 1200, 1, short=True),
        datagrams("up", 64, 1200, 1),
        datagrams("up", 1, 1200, 16, short=True),
        datagrams("down", 1, 64, 1),
        datagrams("down", 1, 1200, 1, short=True),
        datagrams("down", 1, 1200, 16),
        datagrams("down", 16, 1200, 16, short=True),
        Work(
            "flow",
            UDP1_UDP,
            load=("dials=32", "size=64"),
            counter="dials",
            unit="flow",
            short=True,
        ),
        Work("idle", UDP_UDP, "idle"),
    ]


def all_works() -> list[Work]:
    """Every work, in the order of the report."""
    works = [
        pingpong(64, connections, "64B", pair, short=pair == TCP_TCP)
        for connections in (1, 64)
        for pair in PAIRS
    ]
    works += [pingpong(4 * KIB, 16, "4K", TCP_TCP), pingpong(64 * KIB, 4, "64K", TCP_TCP)]
    works += [short_connections(pair) for pair in PAIRS]
    works += [
        bulk(direction, connections, write, pair)
        for pair in PAIRS
        for connections in (1, 8)
        for direction in ("up", "down")
        for write in (16 * KIB, 256 * KIB)
    ]
    works += [mixed(TCP_TCP)]
    works += [Work("idle", TCP_TCP, "idle", short=True)]
    works += [Work("start", TCP_TCP, "start", unit="start", short=True)]
    return works + datagram_works()


def in_short_form(direction: str, connections: int, write: int, pair: str) -> bool:
    """One stream up for each pair; the other shapes for TCP only."""
    if write != 256 * KIB:
        return False
    return (direction, connections) == ("up", 1) or pair == TCP_TCP


def select(patterns: list[str], *, short: bool) -> list[Work]:
    """The works of a form, or those whose title begins with one of ``patterns``."""
    works = all_works()
    if not patterns:
        return [work for work in works if work.short or not short]
    return [work for work in works if any(matches(work, pattern) for pattern in patterns)]


def matches(work: Work, pattern: str) -> bool:
    """Whether a pattern selects a work.

    ``bulk`` selects every bulk work, ``bulk-up-1/unix-tcp`` those of this pair that begin so.
    """
    name, slash, pair = pattern.partition("/")
    return work.name.startswith(name) and (not slash or work.pair.startswith(pair))
