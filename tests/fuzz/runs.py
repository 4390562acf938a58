"""One start of the installed command, and the verdict on it.

The command may do one of three things: print what --help or --version ask for and exit with 0; exit
with 1 after one line on stderr that says why (two if there are no sockets); or run until SIGTERM
ends it with 0. There may also be a warning for each invalid variable, and for each NAME without a
listener.
"""

import os
import re
import select
import signal
import socket
import tempfile
import time
from pathlib import Path

from kit.sockets import open_listener

PATIENCE = 20.0
"""Seconds after which a start that neither ends nor runs counts as a hang."""

STEP = 0.001

LISTENERS = {"tcp": "tcp4", "tcp6": "tcp6", "unix": "abstract"}
"""A kind of listener in a case, and in `open_listener()`."""

DATAGRAMS = {
    "dgram": (socket.AF_INET, "127.0.0.1"),
    "dgram6": (socket.AF_INET6, "::1"),
    "unix-dgram": (socket.AF_UNIX, None),
}
"""A kind of datagram socket in a case: its family, and the host that it is bound to."""

NO_SOCKETS = "Didn't get any sockets passed in."

# Without HOME, Python looks up the user, and libraries of systemd then read SYSTEMD_LOG_LEVEL.
ALWAYS = {b"PATH": b"/bin", b"HOME": b"/"}

NOTE = re.compile(
    r"Ignoring (NOTIFY_SOCKET|WATCHDOG_USEC|WATCHDOG_PID|SYSTEMD_LOG_LEVEL|JOURNAL_STREAM)="
    r"|Failed to send to NOTIFY_SOCKET"
    r"|No listener has the name"
    r"|The limit of \d+ open files allows"
    r"|Listening on "
    r"|New connection from "
    r"|unix client → .*: client gone while it was held"
    r"|No inspection socket: failed to open "
    r"|There is no (network interface|local address) .* yet \(--source=\)"
    r"|--connections-max-per-source= does not apply to UNIX "
    r"|Ignoring the stored file descriptor \d+"
    r"|(Resetting|Failed to go on with) the connections of the last process"
    r"|Failed to connect to remote host: .*, holding clients until it answers"
    r"|Failed to resolve host: "
    r"|No thread can be started for name look-ups"
    r"|Stopped; "
    r"|Target \d+ is a host"
    r"|WATCHDOG=1 is \d+ ms late"
)
"""Lines that are allowed in addition to the one that says why."""


SILENT = re.compile(rb"[012]|emerg|alert|crit")
"""Log levels at which not even an error is logged."""


class Fault(Exception):
    """The command did something that it may not do."""


def start(executable, case):
    """Fork and execute; return the pid, and the files that are its stdout and stderr."""
    streams = [tempfile.TemporaryFile(buffering=0) for _ in range(2)]  # noqa: SIM115
    sockets = [make_fd(kind) for kind in case.fds]
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            place_fds(sockets, [stream.fileno() for stream in streams])
            own = {b"@own": str(os.getpid()).encode(), b"@count": str(len(case.fds)).encode()}
            environment = {name: own.get(value, value) for name, value in case.environment.items()}
            os.execve(executable, [executable, *case.arguments], ALWAYS | environment)
        finally:
            os._exit(127)
    for thing in sockets:
        if thing is not None:
            thing.close()
    return pid, *streams


def make_fd(kind):
    """Return what becomes fd 3 or a later one; None: a closed fd."""
    if kind in LISTENERS:
        return open_listener(LISTENERS[kind], None)
    if kind in DATAGRAMS:
        return bound(*DATAGRAMS[kind])
    if kind == "associated":
        sock = bound(socket.AF_INET, "127.0.0.1")
        sock.connect(sock.getsockname())
        return sock
    if kind == "seqpacket":
        return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if kind == "connected":
        return socket.socketpair()[0]  # the other end is closed at once
    return open("/dev/null", "rb") if kind == "pipe" else None


def bound(family, host):
    """A datagram socket at a free port of `host`, or (None) a free abstract name."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind("" if host is None else (host, 0))
    return sock


def place_fds(things, streams):
    """Set up stdin, stdout, stderr and the fds from 3 on in the child. Raises OSError."""
    top = 100
    high = [None if thing is None else os.dup2(thing.fileno(), top + n)
            for n, thing in enumerate(things)]  # fmt: skip
    for n, fd in enumerate(streams):
        os.dup2(fd, top + 50 + n)
    os.closerange(3, top)
    for n, fd in enumerate(high):
        if fd is not None:
            os.dup2(fd, 3 + n, inheritable=True)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    for n in range(2):
        os.dup2(top + 50 + n, 1 + n)
    os.closerange(top, top + 60)


def run(executable, case):
    """Start the command and wait for its end: "refused", "told" or "ran". Raises Fault."""
    pid, stdout, stderr = start(executable, case)
    with stdout, stderr:
        ran = wait(pid)
        status = ran[1]
        output, lines = content(stdout), content(stderr)
    silent = SILENT.search(case.environment.get(b"SYSTEMD_LOG_LEVEL", b""))
    return verdict(ran[0], status, output, lines, silent)


def wait(pid):
    """Return whether it ran until it got SIGTERM, and its exit status. Raises Fault for a hang."""
    pidfd = os.pidfd_open(pid)
    told, deadline = False, time.monotonic() + PATIENCE
    try:
        while not select.select([pidfd], [], [], STEP)[0]:
            if not told and waits_for_signals(pid):
                os.kill(pid, signal.SIGTERM)
                told = True
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise Fault(f"hangs, {'not ended by SIGTERM' if told else 'neither runs nor ends'}")
        return told, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(pidfd)


def waits_for_signals(pid):
    """Tell whether it handles SIGTERM, which it does from when it begins to serve."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)
    return bool(caught and int(caught[1], 16) & 1 << (signal.SIGTERM - 1))


def content(file):
    return os.pread(file.fileno(), 1 << 20, 0)


def verdict(told_to_end, status, output, log, silent):
    """Return what it did; `silent`: the environment may forbid it to log errors. Raises Fault."""
    text = log.decode()  # UnicodeDecodeError, a ValueError, is a fault too
    lines = text.splitlines()
    if text.count("\n") != len(lines) or any(not line.isprintable() for line in lines):
        raise Fault(f"not lines of printable text: {log[:500]!r}")
    if "Traceback" in text or "Internal error" in text:
        raise Fault(text)
    reasons = [line for line in lines if not NOTE.match(line.split("> ", 1)[-1])]
    if status == 0 and not told_to_end and output:
        return expect(not lines or not reasons, "told", text)
    if status == 0:
        return expect(not reasons and not output, "ran", text)
    if status != 1:
        raise Fault(f"exit status {status}: {text}")
    wanted = 2 if reasons[:1] == [NO_SOCKETS] else 1
    said = len(reasons) == wanted or (silent and not reasons)
    return expect(said and not output, "refused", text)


def expect(condition, what, text):
    if not condition:
        raise Fault(f"{what}, and yet: {text}")
    return what
