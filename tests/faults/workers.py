"""Processes in which the program runs: if one crashes or hangs, the walk starts another."""

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
from faults.program_run import Outcome

TESTS = Path(__file__).resolve().parent.parent

LONGEST_S = 60.0
"""The longest wait for an answer; after that, the extension itself is in an endless loop."""

LAST_S = 20.0
"""The time that a process may take to end: an instrumented one writes its report then."""


class Worker:
    """One process under the interposer, started on demand, and again after a crash."""

    def __init__(self, library):
        self._library = library
        self._process = None
        self._folder = None
        self._ended = False
        self._is_busy = False

    def record(self, scenario):
        """Run a scenario without a failure; its Outcome."""
        return self._do({"scenario": scenario, "strike": None})

    def run(self, point):
        """Run a scenario with a failure in it; its Outcome."""
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
        """How the process ended, or that it hangs."""
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
        """End the process, in the middle of a run if need be. No further job is done."""
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
    """Call `do(worker, thing)` for each thing, in one thread a worker; yields (thing, result).

    An exception of `do` is raised in the end, after all results have been yielded.
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
