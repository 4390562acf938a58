"""The whole program in a process of its own, with one failure, counted from its first line on.

Failures during the interpreter's own start do not count. The program must either refuse to start,
with a line or two and status 1, or serve: two clients, the counters on SIGUSR1, and an end with
status 0 on SIGTERM.
"""

import contextlib
import signal
import socket
import tempfile

from faults.control import NO_STRIKE, Control
from faults.points import strike
from faults.program_run import LINES_MAX, ONE_WAS_HIT, REFUSED_TO_START, SERVED_ON, Outcome
from faults.world import half_close
from kit.socket_state import is_quiet
from kit.sockets import read_to_end
from kit.stage import Stage
from kit.waiting import patience, set_patience, wait_until

PATIENCE_S = 20.0
"""The longest wait for a state that must come."""

KINDS = {
    "start-tcp": ("tcp4", "tcp4", ()),
    "start-unix": ("unix", "unix", ()),
    "start-options": (
        "tcp4",
        "tcp4",
        ("--threads=2", "--hand-over=always", "--exit-idle-time=1h", "--proxy-protocol=v1"),
    ),
    "start-name": ("tcp4", "tcp4", ()),
    "start-listen": (None, "tcp4", ()),
}
"""Ways to start the program: family of the listener, of the target, options."""

QUICK = ("start-options", "start-listen")
"""The kinds that are part of the quick walk."""


class StartupRuns:
    """Starts the program for each point; a worker of the walk, like Worker."""

    def __init__(self, library, executable):
        self._library = library
        self._executable = executable
        self._file = tempfile.NamedTemporaryFile(prefix="faults-")  # noqa: SIM115 - until end()
        self._control = Control(library, self._file.name)
        self._stage = None
        self._ended = False
        set_patience(PATIENCE_S)

    def record(self, kind):
        return self._start(kind, NO_STRIKE)

    def run(self, point):
        return self._start(point.scenario, strike(point))

    def end(self):
        """End it, together with a program that runs. No further point is run."""
        self._ended = True
        for proxy in self._stage.proxies if self._stage is not None else ():
            proxy.send_signal(signal.SIGKILL)
        wait_until(lambda: self._stage is None, "the end of a run")
        self._file.close()

    def _start(self, kind, what):
        if self._ended:
            raise EOFError
        stage = self._stage = Stage(self._executable, "ours")
        self._look_up_failed = lambda: what.point == "getaddrinfo" and self._control.struct.hits
        self._control.reset(what)
        faults = []
        self._served = []
        self._calls = None
        refused = False
        try:
            proxy = self._launch(stage, kind)
            refused = self._use(stage, proxy)
            self._control.lift()
            faults += self._judge(proxy, refused)
            log = proxy.log()
        except AssertionError as error:
            faults.append(str(error))
            log = stage.proxy.log() if stage.proxies else ""
        finally:
            stage.close(checked=False)
            self._stage = None
        kind = REFUSED_TO_START if refused else SERVED_ON if all(self._served) else ONE_WAS_HIT
        return Outcome(kind, faults, self._control.struct.hits, log, self._calls or {})

    def _launch(self, stage, kind):
        listen, target, options = KINDS[kind]
        self._kind = kind
        text = stage.echo(target)
        if kind == "start-name":
            text = text.replace("127.0.0.1", "localhost")
        listeners = [stage.listener(listen)] if listen else []
        if listen is None:
            self._listen_address = stage.path("socket"), socket.AF_UNIX
            options = (*options, f"--listen={self._listen_address[0]}")
        else:
            self._listen_address = listeners[0].getsockname(), listeners[0].family
        environment = {"LD_PRELOAD": self._library, "FAULTS_FILE": self._file.name}
        return stage.launch(
            *options, text, listeners=listeners, environment=environment, wait=False
        )

    def _use(self, stage, proxy):
        """Two clients, SIGUSR1 and SIGTERM; True if the program refused to start instead."""
        if not self._serve(stage, proxy) or not self._serve_freshly(stage, proxy):
            assert "READY=1" not in proxy.notify.lines(), f"it has ended by itself: {proxy.log()!r}"
            return True
        assert self._served[-1], f"a fresh client is not served; stderr: {proxy.log()!r}"
        proxy.send_signal(signal.SIGUSR1)
        wait_until(lambda: proxy.log_lines("accepted") or proxy.has_ended(), "the counters")
        proxy.send_signal(signal.SIGTERM)
        proxy.wait()
        return False

    def _serve_freshly(self, stage, proxy):
        """Serve another client, now that no call fails any more."""
        self._calls = self._control.calls()
        self._control.lift()
        if self._look_up_failed():  # the failure is used as an answer for a second
            self._control.struct.clock_ms += 1100
        return self._serve(stage, proxy)

    def _serve(self, stage, proxy):
        """One client, which is served in full or sees an error; False if the program has ended."""
        wait_until(lambda: self._kind != "start-listen" or self._listens(proxy), "the listener")
        if proxy.has_ended():
            return False
        client = stage.connect_to(*self._listen_address)
        with contextlib.suppress(ConnectionError):  # refused already
            client.sendall(b"x" * 1000)
            half_close(client)
        wait_until(lambda: proxy.has_ended() or not is_quiet(client), "an answer or an end")
        if is_quiet(client):
            return False
        heard, end = read_to_end(client, patience())
        header = heard.find(b"\r\n") + 2 if heard.startswith(b"PROXY ") else 0
        self._served.append((heard[header:], end) == (b"x" * 1000, "eof"))
        assert self._served[-1] or end == "reset" or not heard, f"{len(heard)} bytes, then {end}"
        return True

    def _listens(self, proxy):
        """Whether the program listens on its socket file, or never will."""
        if proxy.has_ended():
            return True
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(self._listen_address[0]) == 0

    def _judge(self, proxy, refused):
        log = proxy.log()
        lines = log.splitlines()
        faults = [
            f"{sign} on stderr: {log!r}"
            for sign in ("Traceback", "Internal error", "Exception ignored", "Fatal Python error")
            if sign in log
        ]
        if proxy.status < 0:
            faults.append(f"killed by {signal.Signals(-proxy.status).name}")
        elif refused and (proxy.status != 1 or not 1 <= len(lines) <= 2):
            faults.append(f"exit {proxy.status} at start with {len(lines)} lines: {log!r}")
        elif not refused and proxy.status != 0:
            faults.append(f"exit {proxy.status} while it served: {log!r}")
        if len(lines) > LINES_MAX:
            faults.append(f"{len(lines)} lines on stderr")
        return faults
