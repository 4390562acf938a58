"""Runs the program in this process, again and again, for jobs on stdin.

Started by the walk with the interposer preloaded. A job is {"scenario": …, "strike": …}; its
outcome is written to stdout. Each of them is one line of JSON.
"""

import gc
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

PASSED_ON = (3, 4, 5)
"""The fds at which a service manager passes sockets; nothing else may use them."""

SMALL_BUFFERS = "4096 65536 131072"
"""net.ipv4.tcp_rmem and tcp_wmem. With the usual 4 MiB, only a long stream would get stuck."""


def own_network():
    """Enter a network namespace with nothing but loopback and with small TCP buffers."""
    from kit.namespaces import enter_own_network

    enter_own_network()
    for name in ("tcp_rmem", "tcp_wmem"):
        Path(f"/proc/sys/net/ipv4/{name}").write_text(SMALL_BUFFERS)


def main():
    own_network()
    placeholders = tuple(os.open("/dev/null", os.O_RDWR) for _ in PASSED_ON)
    assert placeholders == PASSED_ON, "an fd too many was inherited"
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(placeholders[0], 1)
    jobs = os.fdopen(os.dup(0))
    real_stderr = os.fdopen(os.dup(2), "w")
    log = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it lives as long as the process
    os.dup2(log.fileno(), 2)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))

    from faults.continuity import SCENARIOS
    from faults.control import NO_STRIKE, Control, Strike
    from faults.program_run import ProgramRun

    control = Control(os.environ["FAULTS_LIBRARY"], os.environ["FAULTS_FILE"])
    gc.collect()
    gc.freeze()
    sys.excepthook = lambda *error: traceback.print_exception(*error, file=real_stderr)
    for line in jobs:
        for fd in PASSED_ON:
            os.dup2(1, fd)
        job = json.loads(line)
        strike = Strike(*job["strike"]) if job["strike"] else NO_STRIKE
        outcome = ProgramRun(SCENARIOS[job["scenario"]], control, log).run(strike)
        answer = outcome._asdict()
        answer["calls"] = [[*key, count] for key, count in outcome.calls.items()]
        results.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
