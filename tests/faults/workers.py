"""Processes that live lives: one may crash or hang, and the walk goes on with another."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from faults import points
from faults.life import Outcome

TESTS = Path(__file__).resolve().parent.parent

LONGEST_S = 60.0
"""An answer that takes longer does not come: the extension itself is caught in a loop."""

LAST_S = 20.0
"""What a process may still do at its end: an instrumented one writes down what it has seen."""


class Worker:
    """One process under the interposer, started when it is needed, and again after a crash."""

    def __init__(self, library):
        self._library = library
        self._process = None
        self._folder = None
        self._ended = False
        self._is_busy = False

    def record(self, scenario):
        """Let a scenario live undisturbed; its Outcome."""
        return self._do({"scenario": scenario, "strike": None})

    def live(self, point):
        """Let a scenario live with a failure in it; its Outcome."""
        return self._do({"scenario": point.scenario, "strike": points.strike(point)})

    def _do(self, job):
        if self._ended:
            raise EOFError
        if self._process is None:
            self._start()
        self._is_busy = True
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
            line = self._answer()
        except BrokenPipeError:
            line = b""
        self._is_busy = False
        if line:
            answer = json.loads(line)
            answer["calls"] = {(scope, call): n for scope, call, n in answer["calls"]}
            return Outcome(**answer)
        return Outcome("lost", [self._epitaph()], 1, "", {})

    def _answer(self):
        if select.select([self._process.stdout], [], [], LONGEST_S)[0]:
            return self._process.stdout.readline()
        return b""

    def _epitaph(self):
        """How the process ended, or that it did not."""
        try:
            status = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            status = None
        self._stop()
        if status is None:
            return f"hangs: no answer after {LONGEST_S:g} s"
        return f"crashes: {signal.Signals(-status).name if status < 0 else f'exit {status}'}"

    def _start(self):
        self._folder = tempfile.TemporaryDirectory(prefix="faults-")
        shared = Path(self._folder.name) / "control"
        shared.write_bytes(bytes(1 << 16))
        self._process = subprocess.Popen(
            [sys.executable, "-B", str(TESTS), "faults.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "LD_PRELOAD": self._library,
                "FAULTS_FILE": str(shared),
                "TMPDIR": self._folder.name,
                "FAULTS_LIBRARY": self._library,
            },
        )

    def end(self):
        """Be gone, in the middle of a life if need be. Nothing is done afterwards."""
        self._ended = True
        if self._process is not None and not self._is_busy:
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LAST_S)
        self._stop()

    def _stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._folder.cleanup()
            self._process = None


def for_each(things, makers, do):
    """Have `do(worker, thing)` done for each, by as many workers; yields (thing, result).

    What `do` raises is raised here in the end, once what is done by then was yielded.
    """
    rest = iter(list(things))
    results, errors = [], []
    ready = threading.Condition()
    running = len(makers)

    def work(worker):
        nonlocal running
        try:
            while True:
                with ready:
                    thing = next(rest, None)
                if thing is None:
                    return
                try:
                    result = do(worker, thing)
                except EOFError:  # the walk was interrupted
                    return
                except Exception as error:
                    error.add_note(f"at {thing}")
                    errors.append(error)
                    return
                with ready:
                    results.append((thing, result))
                    ready.notify()
        finally:
            with ready:
                running -= 1
                ready.notify()

    for worker in makers:
        threading.Thread(target=work, args=(worker,), daemon=True).start()
    while True:
        with ready:
            while not results and running:
                ready.wait()
            if not results:
                break
            batch, results[:] = list(results), []
        yield from batch
    if errors:
        raise errors[0]
