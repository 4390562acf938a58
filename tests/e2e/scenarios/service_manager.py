"""What the service manager sees: readiness, watchdog, stop and restart under load."""

import os
import signal
from contextlib import contextmanager, suppress

from harness import scenario
from machine import UNIT_FOLDER, Machine, check, same

NOTIFY = "Type=notify\nTimeoutStartSec=5\n"

CLIENTS = 8
STOPS = ("stop proxy.service", "restart proxy.service", "daemon-reload")
CUTS = 4  # how often open connections are cut when STOPS is done twice


@scenario(original="252 never says that it is ready", until=252)
def notify(m: Machine) -> None:
    """Type=notify becomes active, systemctl shows STATUS, stop is a clean exit"""
    m.nginx_for_load(8000)
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000", service=NOTIFY)
    m.start("proxy.service")
    check(m.is_active("proxy.service"), "proxy.service is not active")
    m.sh("curl -sS --max-time 10 http://127.0.0.1:9000/small")
    m.wait_for("a status", lambda: m.show("proxy.service", "StatusText"))
    status = m.show("proxy.service", "StatusText")
    m.stop("proxy.socket", "proxy.service")
    same("result", m.show("proxy.service", "Result"), "success")
    same("exit status", m.show("proxy.service", "ExecMainStatus"), "0")
    return f"status: {status}"


@scenario(original="252 never says that it is ready", until=252)
def watchdog(m: Machine) -> None:
    """WatchdogSec=: an idle and a busy program live, a stopped one is killed and replaced"""
    m.nginx_for_load(8000)
    m.proxy(
        "proxy",
        "127.0.0.1:9000",
        "127.0.0.1:8000",
        service=NOTIFY
        + "WatchdogSec=1s\nWatchdogSignal=SIGKILL\nRestart=on-watchdog\nRestartSec=0\n",
    )
    m.start("proxy.service")
    first = m.main_pid("proxy.service")
    m.sh("sleep 2.5")
    m.load_result(m.start_load("steady", 9000, 10, 2))
    same("main process after 4.5 s", m.main_pid("proxy.service"), first)
    m.sh(f"kill -STOP {first}")
    m.wait_for(
        "the stopped program is replaced", lambda: m.main_pid("proxy.service") not in (0, first)
    )
    same("answer", m.sh("curl -sS --max-time 10 http://127.0.0.1:9000/small"), "small\n")


@contextmanager
def frozen(m: Machine, unit: str):
    """The service's main process, stopped with SIGSTOP and continued at the end.

    The service manager continues it earlier if it stops the service meanwhile (SIGTERM, SIGCONT).
    """
    pid = m.host_pid(unit)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def restart_with_backlog(m: Machine, verb: str) -> None:
    """Stop or restart the service while 20 clients wait in the backlog: all are to be served."""
    m.start("proxy.service")
    with frozen(m, "proxy.service"):
        clients = [
            m.client("exec curl -sS --max-time 10 http://127.0.0.1:9000/small") for _ in range(20)
        ]
        m.wait_for(
            "20 clients wait",
            lambda: len(m.sh("ss -Htn state established dport = 9000").splitlines()) == 20,
        )
        m.sh(f"systemctl {verb} --no-block proxy.service")
        m.sh("systemctl daemon-reload")  # answered only once the job's SIGTERM has been sent
    answers = [client.communicate(timeout=20)[0] for client in clients]
    same(f"answers after {verb}", answers, ["small\n"] * 20)


@scenario()
def backlog_survives(m: Machine) -> None:
    """What waits in the backlog at a stop or restart is served by the next process"""
    m.nginx_for_load(8000)
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000")
    for verb in ("stop", "restart") * 3:
        restart_with_backlog(m, verb)


def load_with_restarts(m: Machine) -> dict[str, int]:
    """How the requests of CLIENTS clients ended while the service was stopped and restarted."""
    m.nginx_for_load(8000)
    m.sh("curl -sS --max-time 10 http://127.0.0.1:9000/small")
    load = m.start_load("steady", 9000, CLIENTS, 5)
    for verb in STOPS * 2:
        m.sh("sleep 0.5")
        m.sh(f"systemctl {verb}")
    return m.load_result(load)["steady"]


@scenario()
def restart_under_load(m: Machine) -> str:
    """Stop, restart and daemon-reload under load: nobody is refused, only open connections end"""
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000", socket="TriggerLimitBurst=0")
    counts = load_with_restarts(m)
    failed = {how: count for how, count in counts.items() if how != "ok"}
    check(not any("Refused" in how for how in failed), f"refused: {failed}")
    check(sum(failed.values()) <= CLIENTS * CUTS, f"more failed than were open: {failed}")
    return f"{counts['ok']} served, {sum(failed.values())} cut"


@scenario(needs="--drain-timeout")
def restart_with_drain(m: Machine) -> str:
    """The same with --drain-timeout=5s: not one request fails"""
    m.proxy(
        "proxy",
        "127.0.0.1:9000",
        "127.0.0.1:8000",
        options="--drain-timeout=5s",
        socket="TriggerLimitBurst=0",
    )
    counts = load_with_restarts(m)
    same("failed", {how: count for how, count in counts.items() if how != "ok"}, {})
    return f"{counts['ok']} served"


ORIGINAL = "/lib/systemd/systemd-socket-proxyd"


@scenario()
def switch_by_drop_in(m: Machine) -> None:
    """A unit of the original is switched to this program by a drop-in, and back"""
    m.nginx_for_load(8000)
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000", program=ORIGINAL)
    same("running first", running(m), ORIGINAL)
    drop_in = "proxy.service.d/program.conf"
    m.unit(drop_in, f"[Service]\nExecStart=\nExecStart={m.program} 127.0.0.1:8000\n")
    m.sh("systemctl restart proxy.service")
    same("running with the drop-in", running(m), m.program)
    m.sh(f"rm {UNIT_FOLDER}/{drop_in}; systemctl daemon-reload; systemctl restart proxy.service")
    same("running without it", running(m), ORIGINAL)


def running(m: Machine) -> str:
    """The program that serves port 9000, by its command line."""
    same("answer", m.sh("curl -sS --max-time 10 http://127.0.0.1:9000/small"), "small\n")
    words = m.sh(f"tr '\\0' '\\n' </proc/{m.main_pid('proxy.service')}/cmdline").split()
    return next(word for word in words if word.endswith("socket-proxyd"))
