"""What the service manager sees: readiness, watchdog, stop and restart under load."""

import os
import signal
import subprocess
from contextlib import contextmanager, suppress

from e2e.harness import scenario
from e2e.machine import UNIT_FOLDER, Machine, check, same
from e2e.scenarios.transfers import MAKE_FILE, start_dav

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


TRANSFERS = 6  # each way
SIZE = 32 << 20  # bytes of each
RATE = "12M"  # bytes a second: they take almost three seconds


@scenario(needs="--drain-timeout")
def drained_transfers(m: Machine) -> str:
    """--drain-timeout: downloads and uploads under way at a restart or stop arrive whole"""
    m.sh(f"install -d -o www-data {m.folder}/files")
    m.sh(MAKE_FILE.format(size=SIZE, path=f"{m.folder}/files/down"))
    start_dav(m)
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000", options="--drain-timeout=1min")
    for verb in ("restart", "stop"):
        clients = start_transfers(m)
        before = m.main_pid("proxy.service")
        m.sh(f"systemctl --no-block {verb} proxy.service; systemctl daemon-reload")
        m.wait_for("it drains", lambda: m.show("proxy.service", "SubState") == "stop-sigterm")
        late = m.client("exec curl -sS --max-time 30 -I http://127.0.0.1:9000/down")
        outputs = [client.communicate(timeout=60)[0] for client in clients]
        same("what curl and cmp say", outputs, [""] * len(clients))
        for number in range(TRANSFERS):
            m.sh(f"cmp {m.folder}/files/down {m.folder}/files/up{number}")
        check("200 OK" in late.communicate(timeout=30)[0], f"a client that came in a {verb}")
        check(m.main_pid("proxy.service") != before, f"no other process after a {verb}")
    return f"{4 * TRANSFERS} transfers of {SIZE >> 20} MiB"


def start_transfers(m: Machine) -> list[subprocess.Popen]:
    """TRANSFERS downloads and as many uploads, all of them under way."""
    curl, url = f"curl -sS --limit-rate {RATE}", "http://127.0.0.1:9000"
    clients = []
    for number in range(TRANSFERS):
        clients.append(m.client(f"{curl} {url}/down | cmp - {m.folder}/files/down"))
        clients.append(m.client(f"exec {curl} -T {m.folder}/files/down {url}/up{number}"))
    m.wait_for(
        "all are under way",
        lambda: len(m.sh("ss -Htn state established dport = 8000").splitlines()) == len(clients),
    )
    return clients


ORIGINAL = "/lib/systemd/systemd-socket-proxyd"
SWITCH = "[Service]\nExecStart=\nExecStart={program} 127.0.0.1:8000\n"
SWITCHES = 4  # how often the program is replaced by the other one


@scenario()
def switch_by_drop_in(m: Machine) -> str:
    """A unit of the original is switched to this program by a drop-in, and back, under load"""
    m.nginx_for_load(8000)
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000", program=ORIGINAL)
    same("running first", running(m), ORIGINAL)
    load = m.start_load("steady", 9000, CLIENTS, 5)
    drop_in = "proxy.service.d/program.conf"
    for _ in range(2):
        m.unit(drop_in, SWITCH.format(program=m.program))
        m.sh("systemctl restart proxy.service")
        same("running with the drop-in", running(m), m.program)
        m.sh(f"rm {UNIT_FOLDER}/{drop_in}; systemctl daemon-reload")
        m.sh("systemctl restart proxy.service")
        same("running without it", running(m), ORIGINAL)
    counts = m.load_result(load)["steady"]
    failed = {how: count for how, count in counts.items() if how != "ok"}
    check(not any("Refused" in how for how in failed), f"refused: {failed}")
    check(sum(failed.values()) <= CLIENTS * SWITCHES, f"more failed than were open: {failed}")
    return f"{counts['ok']} served, {sum(failed.values())} cut"


def running(m: Machine) -> str:
    """The program that serves port 9000, by its command line."""
    same("answer", m.sh("curl -sS --max-time 10 http://127.0.0.1:9000/small"), "small\n")
    words = m.sh(f"tr '\\0' '\\n' </proc/{m.main_pid('proxy.service')}/cmdline").split()
    return next(word for word in words if word.endswith("socket-proxyd"))
