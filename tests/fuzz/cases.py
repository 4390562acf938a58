"""Command lines and environments, made at random from plausible words, and then damaged.

All are bytes, as for the kernel; NUL is the only byte that cannot be passed.
"""

import os
import random
from dataclasses import dataclass, field

SPANS = (
    b"0", b"5", b"90", b"5min 20s", b"500ms", b"1h", b"infinity", b"1.5h", b"-1", b"5y", b"1us",
    b"584543y", b"+5", b"", b"5 parsecs", b"infinity 5", b"18446744073709551615", b"1..5", b".",
    b"\xce\xbcs", b"5\xc2\xb5s", b"1e9", b"0x10", b"99999999999999999999999s", b"10ms",
)  # fmt: skip
NUMBERS = (
    b"5", b"1", b"256", b"0", b"65535", b"65536", b"4294967295", b"4294967296", b"-1", b"+7",
    b"0x1f", b"0b11", b"0o17", b"08", b"1_000", b" 5", b"5 ", b"", b"auto", b"\xd9\xa3", b"1e3",
    b"99999999999999999999999999", b"0" * 5000, b"9" * 5000,
)  # fmt: skip
NETWORKS = (
    b"unix", b"10.0.0.0/8", b"::1", b"10.0.0.0/8,unix,::/0", b"", b",", b"10.0.0.1/8",
    b"1.2.3.4/33", b"::ffff:1.2.3.0/120", b"fe80::1%lo", b"\xff", b"::/", b"1.2.3.4/\xd9\xa3",
    b"1/2/3",
)  # fmt: skip
SIZES = (b"4096", b"64K", b"1M", b"auto", b"4095", b"2047M", b"2048M", b"0", b"1G", b"K", b"-1K")
HOSTS = (
    b"127.0.0.1", b"::1", b"[::1]", b"localhost", b"[::1%lo]", b"fe80::1%lo", b"[fe80::1%nosuch]",
    b"[::1%1]", b"0.0.0.0", b"::", b"*", b"", b"no.such.host.invalid", b"b\xc3\xbccher.example",
    b"xn--", b"xn--a", b"256.1.1.1", b"1", b"0x7f.1", b"[127.0.0.1]", b"[", b"]", b"[]", b"a..b",
    b"-", b"_x", b"a" * 64 + b".example", b"a." * 200, b"\xff\xfe", b"\xf0\x9f\x98\x80",
    b"[::ffff:1.2.3.4]",
)  # fmt: skip
PORTS = (
    b"80", b"8080", b"65535", b"http", b"0", b"1", b"65536", b"nosuchservice", b"*", b"", b"-1",
    b"+80", b" 80", b"080", b"0x50", b"\xd9\xa1", b"99999999999999999999", b"80:80", b"80\n",
)  # fmt: skip
PATHS = (
    b"/nonexistent/x", b"@abstract", b"unix:/nonexistent/y", b"unix:@a", b"@", b"/", b"//",
    b"unix:", b"unix:x", b"@" + b"a" * 107, b"@" + b"a" * 108, b"/" + b"p" * 106, b"/" + b"p" * 108,
    b"vsock:2:80", b"vsock::80", b"vsock:4294967295:4294967295", b"vsock:2:", b"vsock:-1:1",
    b"vsock:2:80:1", b"@\xff\xff", b"/nonexistent/\xff", b"@a\nb", b"/nonexistent/a=b",
    b"udp:127.0.0.1:80", b"udp:[::1]:80", b"udp:80", b"udp:", b"udp:localhost:http", b"udp:*:80",
    b"udp:@a", b"udp:[::1%lo]:*", b"unix-dgram:/nonexistent/d", b"unix-dgram:@d", b"unix-dgram:",
    b"unix-dgram:x", b"unix-dgram:@" + b"a" * 108, b"UDP:127.0.0.1:80", b"udp:udp:1",
)  # fmt: skip
NAMES = (
    b"web", b"unknown", b"connection", b"proxy@web.socket", b"", b"a:b", b"a=b", b"\xff", b"[x",
    b"/x", b"@x", b" ", b"n" * 300, b"\x1b[31mred", b"a\nb",
)  # fmt: skip
LEVELS = (
    b"debug", b"info", b"7", b"err", b"0", b"8", b"-1", b"", b"console:debug", b"journal:7",
    b"debug,", b",", b"nosuch:debug", b"DEBUG", b"\xff", b"kmsg:debug,info",
)  # fmt: skip
SOCKETS = (
    b"@notify", b"/nonexistent/notify", b"", b"@", b"/", b"vsock:2:9", b"vsock-stream:2:9",
    b"relative", b"/" + b"n" * 200, b"@\xff", b"/tmp",
)  # fmt: skip
SOURCES = (
    b"127.0.0.1", b"127.0.0.1:9", b"::1", b"[::1]:9", b"lo", b"client", b"192.0.2.1", b"nosuch",
    b"", b"[", b"0.0.0.0", b"fe80::1", b"fe80::1%lo", b"\xff", b"a" * 16, b"1.2.3", b"::1:",
)  # fmt: skip
OPTIONS = {
    b"--connections-max": NUMBERS,
    b"--connections-max-per-source": NUMBERS,
    b"--exit-idle-time": SPANS,
    b"--accept-proxy-protocol": NETWORKS,
    b"--proxy-protocol": (b"v1", b"v2", b"v3", b"", b"V1", b"v1v2", b"1"),
    b"--source": SOURCES,
    b"--connect-timeout": SPANS,
    b"--settle-time": SPANS,
    b"--idle-timeout": SPANS,
    b"--drain-timeout": SPANS,
    b"--threads": (*NUMBERS[:6], b"auto", b"2", b"3"),
    b"--crash-recovery": (b"tcp", b"all", b"no", b"", b"All", b"tcp,unix"),
    b"--hand-over": (b"busy", b"always", b"", b"Always", b"always "),
    b"--buffer-size": SIZES,
    b"--inspect": (b"@inspect", b"/nonexistent/i", b"", b"fd:web", b"fd:", b"x", *PATHS),
    b"--log-addresses": (b"yes", b"no", b"", b"Yes", b"1"),
    b"--listen": None,
    b"--help": (),
}
ENVIRONMENT = {
    b"LISTEN_PID": (b"@own", b"@own", b"@own", *NUMBERS),
    b"LISTEN_FDS": (b"@count", b"@count", *NUMBERS),
    b"LISTEN_FDNAMES": None,
    b"LISTEN_PIDFDID": NUMBERS,
    b"NOTIFY_SOCKET": SOCKETS,
    b"WATCHDOG_USEC": NUMBERS,
    b"WATCHDOG_PID": (b"@own", *NUMBERS),
    b"RUNTIME_DIRECTORY": (b"/nonexistent", b"", b"relative", b"/a:/b", b":", b"/" + b"r" * 200),
    b"SYSTEMD_LOG_LEVEL": LEVELS,
    b"JOURNAL_STREAM": (b"1:2", b"", b":", b"x:y", b"1", b"-1:5", b"9" * 30 + b":1"),
    b"POSIXLY_CORRECT": (b"", b"1"),
    b"LANG": (b"C", b"C.UTF-8", b"de_DE.ISO-8859-1", b"\xff"),
    b"PYTHONUTF8": (b"0", b"1"),
}
_STRANGE = (
    b"\xff", b"\n", b"\t", b" ", b"=", b":", b"%", b"[", b"]", b"@", b"/", b"-", b"\x1b", b"0",
    b"\xe2\x80\xae", b"\xc2\x85", b"9", b",", b".", b"\x7f", b"{}", b"%s", b"\\",
)  # fmt: skip
_GOOD = 4
"""The number of values at the start of each list that make sense; they are drawn more often."""


@dataclass
class Case:
    """One start: arguments without the program, environment, and kinds of the fds from 3 on."""

    number: int = 0
    arguments: list = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    fds: list = field(default_factory=list)
    """Of "tcp", "tcp6", "unix", "dgram", "dgram6", "unix-dgram", "associated" (a connected datagram
    socket), "seqpacket", "pipe", "connected", "closed"."""

    def shell(self):
        """Return it as a command to type."""
        words = [
            f"{name.decode()}={os.fsdecode(value)!r}" for name, value in self.environment.items()
        ]
        words += ["systemd-socket-proxyd", *(repr(os.fsdecode(word)) for word in self.arguments)]
        text = " ".join(
            word if len(word) < 300 else f"{word[:300]}…({len(word)})" for word in words
        )
        return f"{text}  # fds: {' '.join(self.fds) or 'none'}"


class Dice(random.Random):
    """Random numbers; with `bad`, what is made from them makes sense only by chance."""

    bad = True


def case(seed, number):
    """Return the case of this number, always the same. Command line, the rest or both are bad."""
    dice = Dice(f"{seed}/{number}")
    what = dice.choice(("arguments", "rest", "both"))
    dice.bad = what != "rest"
    words = arguments(dice)
    dice.bad = what != "arguments"
    made = Case(number, words, environment(dice), fds(dice))
    if dice.random() < 0.7:  # mostly with valid LISTEN_ variables, so that more is reached
        made.fds = made.fds or ["tcp"]
        made.environment |= {b"LISTEN_PID": b"@own", b"LISTEN_FDS": b"@count"}
        made.environment.pop(b"LISTEN_PIDFDID", None)
        if dice.random() < 0.7:
            made.environment.pop(b"LISTEN_FDNAMES", None)
    return made


def pick(dice, values):
    return dice.choice(values[:_GOOD] if not dice.bad or dice.random() < 0.7 else values)


def arguments(dice):
    """Options and operands in any order; mostly few of them."""
    words = []
    for _ in range(dice.choice((0, 1, 1, 2, 3, 8))):
        words += option(dice)
    for _ in range(dice.choice((0, 1, 1, 1, 1, 2, 3)) if dice.bad else 1):
        words.insert(dice.randrange(len(words) + 1), operand(dice))
    return [word.replace(b"\0", b"") for word in words]


def option(dice):
    """One option in one of the ways to write it."""
    name = dice.choice(list(OPTIONS))
    values = OPTIONS[name]
    value = listen_address(dice) if values is None else pick(dice, values) if values else b""
    value = damaged(dice, value)
    if dice.bad and dice.random() < 0.2:
        name = name[: dice.randrange(1, len(name) + 1)]
    if dice.random() < 0.05:
        return [
            damaged(
                dice, dice.choice((b"--version", b"-c", b"-h", b"-x", b"-", b"--", b"-hc5", b"-c5"))
            )
        ]
    if values == () and dice.random() < 0.9:
        return [name]
    return [name + b"=" + value] if dice.random() < 0.7 else [name, value]


def operand(dice):
    text = target(dice)
    named = dice.bad and dice.random() < 0.3
    return damaged(dice, pick(dice, NAMES) + b"=" + text if named else text)


def target(dice):
    if dice.random() < 0.4:
        return pick(dice, PATHS)
    host = pick(dice, HOSTS)
    return host if dice.random() < 0.15 else host + b":" + pick(dice, PORTS)


def listen_address(dice):
    text = pick(dice, PORTS) if dice.random() < 0.3 else target(dice)
    return pick(dice, NAMES) + b"=" + text if dice.random() < 0.3 else text


def environment(dice):
    made = {}
    for name, values in ENVIRONMENT.items():
        if dice.random() < 0.3:
            value = pick(dice, values) if values else names(dice)
            # A damaged PYTHON variable would test Python instead.
            if value[:1] != b"@" and not name.startswith(b"PYTHON"):
                value = damaged(dice, value).replace(b"\0", b"")
            made[name] = value
    return made


def names(dice):
    return b":".join(pick(dice, NAMES) for _ in range(dice.randrange(5)))


def fds(dice):
    kinds = (
        "tcp", "dgram", "unix", "unix-dgram", "tcp6", "dgram6", "associated", "seqpacket", "pipe",
        "connected", "closed",
    )  # fmt: skip
    return [pick(dice, kinds) for _ in range(dice.choice((0, 1, 1, 1, 2, 5)))]


def damaged(dice, text):
    """Return `text`, mostly unchanged, else with bytes inserted, removed, swapped or repeated."""
    while dice.bad and dice.random() < 0.15:
        at = dice.randrange(len(text) + 1)
        text = dice.choice((_put_in, _leave_out, _swap, _repeat, _noise))(dice, text, at)
    return text[:100_000]


def _put_in(dice, text, at):
    return text[:at] + dice.choice(_STRANGE) + text[at:]


def _leave_out(_dice, text, at):
    return text[:at] + text[at + 1 :]


def _swap(_dice, text, at):
    return text[:at] + text[at + 1 : at + 2] + text[at : at + 1] + text[at + 2 :]


def _repeat(dice, text, at):
    return text[:at] + text[at:] * dice.choice((2, 3, 300)) if len(text) < 10_000 else text


def _noise(dice, text, at):
    return text[:at] + dice.randbytes(dice.randrange(1, 9)) + text[at:]
