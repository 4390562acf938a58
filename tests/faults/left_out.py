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
    """Compare the system calls of a run with the tables; 1 if any is not in them."""
    with tempfile.NamedTemporaryFile(prefix="faults-") as trace:
        run_traced(executable, trace.name)
        lines = Path(trace.name).read_text(errors="replace").splitlines()
    begin = next(n for n, line in enumerate(lines) if FIRST_LINE in line)
    seen = Counter(found[1] for line in lines[begin + 1 :] if (found := CALL.match(line)))
    unknown = [call for call in seen if not show(call, seen[call])]
    print(f"{len(seen)} system calls, {len(unknown)} of them not in the tables")
    return 1 if unknown else 0


def run_traced(executable, trace):
    """Run it under strace: short and long connections, datagrams, two threads, a name, SIGUSR1,
    SIGTERM."""
    stage = Stage(executable, "ours")
    server = Echo(open_socket("udp4", stage.directory))
    try:
        target = stage.echo().replace("127.0.0.1", "localhost")
        path, datagrams = stage.path("socket"), stage.path("datagrams")
        proxy = stage.launch(
            "--threads=2",
            "--hand-over=always",
            "--proxy-protocol=v2",
            f"--listen=streams={path}",
            f"--listen=datagrams=unix-dgram:{datagrams}",
            f"streams={target}",
            f"datagrams={server.text}",
            prefix=["strace", "-f", "-qq", "-o", trace],
            wait=False,
        )
        wait_until(lambda: "READY=1" in proxy.notify.lines(), "READY=1")
        for size in (100, BYTES):
            talk(stage.connect_to(path, socket.AF_UNIX), size)
        ask(datagrams, stage.path("asker"))
        ask(datagrams, stage.path("another"))
        tracee = Path(f"/proc/{proxy.pid}/task/{proxy.pid}/children").read_text().split()[0]
        os.kill(int(tracee), signal.SIGUSR1)
        proxy.wait_for_log("accepted")
        os.kill(int(tracee), signal.SIGTERM)
        proxy.wait()
    finally:
        server.close()
        stage.close(checked=False)


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
