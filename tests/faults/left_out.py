"""Which system calls of the program, as seen by strace, are made to fail, and which are not."""

import os
import re
import signal
import socket
import tempfile
from collections import Counter
from pathlib import Path

from faults.table import FAILURES, SYSTEM_CALLS, SYSTEM_CALLS_LEFT_OUT
from kit.datagrams import Echo, open_socket
from kit.kept import wait_kept
from kit.manager import Manager
from kit.sockets import read_to_end
from kit.stage import Stage
from kit.traffic import Payload, in_background
from kit.waiting import patience, wait_until

CALL = re.compile(r"\d+ +(\w+)\(")

FIRST_LINE = "rt_sigaction(SIGINT, {sa_handler=SIG_DFL"
"""The first call of the program itself; the interpreter has started before it."""

BYTES = 4 << 20
"""Enough for the stream to be spliced."""


def main(executable):
    """Compare the system calls of two runs with the tables; 1 if any is not in them."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        traces = [os.path.join(folder, name) for name in ("first", "second")]
        run_traced(executable, *traces)
        seen = sum([calls(Path(trace).read_text(errors="replace")) for trace in traces], Counter())
    unknown = [call for call in seen if not show(call, seen[call])]
    print(f"{len(seen)} system calls, {len(unknown)} of them not in the tables")
    return 1 if unknown else 0


def calls(trace):
    """How often each system call was made by the program itself."""
    lines = trace.splitlines()
    begin = next(n for n, line in enumerate(lines) if FIRST_LINE in line)
    return Counter(found[1] for line in lines[begin + 1 :] if (found := CALL.match(line)))


def run_traced(executable, first, second):
    """Run it under strace: short and long connections, datagrams, two threads, a name, SIGUSR1; and
    SIGKILL. The next process goes on with what is kept, until SIGTERM."""
    stage, manager = Stage(executable, "ours"), Manager()
    server = Echo(open_socket("udp4", stage.directory))
    try:
        target = stage.echo().replace("127.0.0.1", "localhost")
        path, datagrams = stage.path("socket"), stage.path("datagrams")
        arguments = [
            "--threads=2",
            "--hand-over=always",
            "--proxy-protocol=v2",
            "--crash-recovery=all",
            f"--listen=streams={path}",
            f"--listen=datagrams=unix-dgram:{datagrams}",
            f"streams={target}",
            f"datagrams={server.text}",
        ]
        proxy = launch_traced(stage, manager, first, arguments)
        for size in (100, BYTES):
            talk(stage.connect_to(path, socket.AF_UNIX), size)
        ask(datagrams, stage.path("asker"))
        ask(datagrams, stage.path("another"))
        os.kill(proxy.pid, signal.SIGUSR1)
        proxy.wait_for_log("accepted")
        client = stage.connect_to(path, socket.AF_UNIX)
        client.sendall(b"question")
        wait_kept(manager, 1)
        os.kill(proxy.pid, signal.SIGKILL)
        await_end(proxy, first)
        manager.clear()
        proxy = launch_traced(stage, manager, second, arguments)
        talk(client, 100)
        os.kill(proxy.pid, signal.SIGTERM)
        await_end(proxy, second)
    finally:
        server.close()
        stage.close(checked=False)
        manager.close()


def launch_traced(stage, manager, trace, arguments):
    """Start the program with what is stored, traced by a process that is not its parent."""
    proxy = stage.launch(
        *arguments,
        listeners=[fd for _, fd in manager.stored],
        names=":".join(name for name, _ in manager.stored),
        notify=manager,
        prefix=["strace", "-D", "-f", "-q", "-o", trace],
        wait=False,
    )
    wait_until(lambda: "READY=1" in manager.lines(), "READY=1")
    return proxy


def await_end(proxy, trace):
    """Wait until the program has ended, and all that it has done is in the trace."""
    proxy.wait()
    wait_until(lambda: f"{proxy.pid} +++ " in Path(trace).read_text(errors="replace"), "the trace")


def talk(client, size):
    """Send `size` bytes, and read all of them back."""
    heard = in_background(lambda: read_to_end(client))
    for block in Payload(size).blocks():
        client.sendall(block)
    client.shutdown(socket.SHUT_WR)
    assert len(heard.result()[0]) >= size


def ask(path, own):
    """Send bursts of datagrams, and receive their answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.settimeout(patience())
        client.bind(own)
        client.connect(path)
        for _ in range(3):
            for _ in range(5):
                client.send(b"question")
            for _ in range(5):
                assert client.recv(100).endswith(b"question")


def show(call, count):
    """Print what is done about a system call; False if it is not in the tables."""
    if call in SYSTEM_CALLS:
        kinds = SYSTEM_CALLS[call].split()
        assert all(any(kind in rows for rows in FAILURES.values()) for kind in kinds), call
        what = f"walked as {', '.join(kinds)}"
    else:
        what = f"left out: {SYSTEM_CALLS_LEFT_OUT.get(call, 'NOT KNOWN')}"
    print(f"{call:<18}{count:>8}  {what}")
    return call in SYSTEM_CALLS or call in SYSTEM_CALLS_LEFT_OUT
