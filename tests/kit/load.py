"""Load processes: programs that act as clients or targets, and how they are told what to do.

Such a process runs a module, whose settings are JSON. It reads orders from stdin, one word a line,
and reports events on stdout, one JSON object a line. It ends with the process that started it.
"""

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent

PR_SET_PDEATHSIG = 1

# ── in the process that starts it ────────────────────────────────────────────────────────────────


class Load:
    """A load process: it is sent orders, and its reports go into the queue `reports`."""

    def __init__(self, module, settings, reports):
        self.name = settings["name"]
        self.settings = settings
        self._module = module
        self._reports = reports
        self.process = None
        self.cpu_before = 0.0
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-B", str(TESTS), self._module, json.dumps(self.settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()

    def _listen(self, lines):
        for line in lines:
            if line.endswith("\n"):  # a process that is killed may leave half a line
                self._reports.put((self, json.loads(line)))
        self._reports.put((self, {"event": "ended"}))

    @property
    def pid(self):
        return self.process.pid

    def order(self, word):
        try:
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # it has ended, or was told to end

    def cpu_seconds(self):
        if self.process.returncode is not None:
            return self.cpu_before
        text = Path(f"/proc/{self.pid}/schedstat").read_text()
        return self.cpu_before + int(text.split()[0]) / 1e9

    def stop(self):
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        if self.process.returncode is None:
            self.cpu_before = self.cpu_seconds()
        self.process.kill()
        self.process.wait()
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has not read an order


# ── in the load process ──────────────────────────────────────────────────────────────────────────


def run(main):
    """Run the coroutine function `main`; end with the parent, however the parent ends."""
    end_with_parent()
    asyncio.run(main())


def end_with_parent():
    """Have this process killed when its parent ends in any way, even if it is stopped."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent has ended")


def read_settings():
    """The settings of this process: its only argument, which is JSON."""
    return json.loads(sys.argv[1])


async def orders(handle):
    """Call `handle(word)` for each line on stdin, until its end."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        handle(line.decode().strip())


async def cancelled(tasks):
    """Cancel all tasks and wait until they have ended."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def cancelled_servers(accepting, serving):
    """The same for tasks that accept clients and tasks that serve them."""
    # asyncio may hand a client that comes just now to an accept that is already cancelled.
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    await cancelled([*accepting, *serving])


def tell(event, **facts):
    """Report an event to the process that started this one."""
    print(json.dumps({"event": event, **facts}), flush=True)


class Tally:
    """Counts by name. Faults are reported at once, since the process may be killed."""

    def __init__(self, name):
        self._name = name
        self.counts = {}

    def add(self, name, amount=1):
        self.counts[name] = self.counts.get(name, 0) + amount

    def fault(self, what):
        self.add("faults")
        tell("fault", who=self._name, what=str(what))

    def send(self, event="counts", **facts):
        """Report what was counted since the last report."""
        tell(event, who=self._name, counts=self.counts, **facts)
        self.counts = {}
