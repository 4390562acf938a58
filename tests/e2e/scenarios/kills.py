"""The proxy is killed: no connection that is older than a second is lost, and no byte of it."""

import json
import time
from pathlib import Path

from e2e import streams
from e2e.harness import CannotRun, scenario
from e2e.machine import TOOLS, Machine, check, same
from e2e.scenarios import transfers
from e2e.scenarios.continuity import BETWEEN, USERS_SOCKET
from e2e.scenarios.privilege import HARDENING, KILL, not_killed
from e2e.scenarios.store import FEW, STORE, see_resets
from e2e.scenarios.user_manager import UserManager
from e2e.streams import (
    AGAIN,
    HELD,
    MIX,
    RESTART,
    WENT_ON,
    Streams,
    kill,
    listeners,
    reload,
    restart,
    start_proxy,
    stored,
    times,
    wait_until_kept,
)
from kit.containers import cgroup

BOTH = "9000,{folder}/listener"
"""The listeners for connections that are not held."""


def open_and_keep(m: Machine, counts: dict[str, int], *where: int | str) -> Streams:
    """Open streams, by TCP and UNIX, and wait until a kill costs none of them."""
    open_ones = Streams(m, counts, BOTH.format(folder=m.folder), *where)
    wait_until_kept(m, sum(counts.values()))
    return open_ones


def end_well(m: Machine, open_ones: Streams) -> str:
    """End them: none is lost. Then nothing keeps a socket of theirs open."""
    note = open_ones.end_well()
    same("resets", m.journal("proxy.service").count("Had to reset"), 0)
    m.wait_for("no socket is left", lambda: not leftovers(m))
    return note


def leftovers(m: Machine) -> str:
    """Connections between the proxy and the ports of clients and servers, in any state."""
    ports = " or ".join(f"{end} = {port}" for end in ("sport", "dport") for port in (9000, 8000))
    return m.sh(f"ss -Htn state connected exclude time-wait '( {ports} )'")


# --- again and again ------------------------------------------------------------------------------


def die_and_go_on(m: Machine, factor: int, kills: int) -> str:
    """Kill it under `factor` hundred connections in all states."""
    start_proxy(m, "--threads=3", AGAIN + BETWEEN)
    open_ones = open_and_keep(m, times(factor, MIX))
    for number in range(kills):
        kill(m, ("KILL", "ABRT")[number % 2])
        if number % 40 == 39:  # before 50 in a row have not lasted a second
            m.wait_for("it to last", lambda: active_for_s(m) > 2)
    same("what is in the store", stored(m), "1")
    return f"{end_well(m, open_ones)}, {kills} kills"


def active_for_s(m: Machine) -> float:
    """For how long the service has been active."""
    since = int(m.show("proxy.service", "ActiveEnterTimestampMonotonic")) / 1e6
    return time.clock_gettime(time.CLOCK_MONOTONIC) - since


@scenario(needs="--threads")
def killed(m: Machine) -> str:
    """SIGKILL and SIGABRT: connections in all states go on, with daemon-reexec in between"""
    return die_and_go_on(m, 2, 6)


@scenario(needs="--threads", slow=True)
def killed_for_long(m: Machine) -> str:
    """The same with 1000 connections and 100 kills"""
    return die_and_go_on(m, 11, 100)


@scenario(needs="--threads")
def killed_unix_target(m: Machine) -> str:
    """The same towards a UNIX target"""
    target = f"{m.folder}/target"
    start_proxy(m, service=AGAIN, target=target)
    open_ones = open_and_keep(m, MIX, target)
    for _ in range(4):
        kill(m)
    return end_well(m, open_ones)


@scenario(needs="--threads")
def killed_in_a_transfer(m: Machine) -> str:
    """1 GiB down and up at once by curl and nginx, and kills in the middle"""
    wanted = transfers.gigabyte(m)
    files = f"{m.folder}/files"
    m.sh(f"install -d -o www-data {files}; ln {transfers.GIGABYTE_FILE} {files}/down")
    transfers.start_dav(m)
    start_proxy(m, service=AGAIN)
    curl = "curl -sS --limit-rate 60M"
    upload = m.client(f"exec {curl} -T {files}/down http://127.0.0.1:9000/up")
    download = m.client(f"{curl} http://127.0.0.1:9000/down | {transfers.SHA256}")
    kills = 0
    while kills < 5:
        wait_until_kept(m, 2)
        check(upload.poll() is None and download.poll() is None, f"over after {kills} kills")
        kill(m)
        kills += 1
    same("output of the upload", upload.communicate(timeout=120)[0], "")
    same("downloaded", download.communicate(timeout=120)[0].split()[0], wanted)
    same("uploaded", transfers.sha256(m, f"{files}/up"), wanted)
    return f"{kills} kills"


@scenario(needs="--threads")
def killed_and_restarted(m: Machine) -> str:
    """Kills, restarts and reloads in turn"""
    start_proxy(m, "--threads=3", AGAIN)
    open_ones = open_and_keep(m, MIX)
    for how in (restart, reload, kill, reload, restart):
        how(m)
        wait_until_kept(m, sum(MIX.values()))
        kill(m)
    return end_well(m, open_ones)


@scenario(needs="--threads")
def killed_at_once(m: Machine) -> str:
    """Killed again and again while it goes on after a kill"""
    start_proxy(m, "--threads=3", AGAIN)
    open_ones = open_and_keep(m, MIX)
    m.sh(f"python3 {TOOLS}/killer.py proxy.service {KILLS} {MOST_MS}", timeout=120)
    went_on = m.journal("proxy.service").count(WENT_ON)
    m.wait_for("it goes on", lambda: streams.active_pid(m))
    return f"{end_well(m, open_ones)}, {KILLS} kills, {KILLS - went_on} before it had gone on"


KILLS, MOST_MS = 30, 120


@scenario(needs="--threads")
def hung(m: Machine) -> str:
    """WatchdogSec=: a process that hangs is killed, and its connections go on"""
    watchdog = "WatchdogSec=1s\nWatchdogSignal=SIGKILL\n"
    start_proxy(m, service=AGAIN + watchdog)
    open_ones = open_and_keep(m, MIX)
    before = m.main_pid("proxy.service")
    m.sh(f"kill -STOP {before}")
    m.wait_for("another process", lambda: streams.active_pid(m) not in (0, before), 20)
    return end_well(m, open_ones)


# --- what is not kept, and when -------------------------------------------------------------------


@scenario(needs="--threads")
def killed_young(m: Machine) -> str:
    """Connections younger than a second, and clients that are held, are reset; others go on"""
    start_proxy(m, service=AGAIN)
    open_ones = Streams(m, MIX | HELD, listeners(m))
    wait_until_kept(m, sum(MIX.values()))
    kill(m)  # no client is held any more, and their target can be that of others
    kills = kill_young_ones(m, 20)
    outcomes = open_ones.end()
    held = outcomes.pop("held")
    check(all("ConnectionResetError" in how for how in held), f"held: {held}")
    same("streams", outcomes, {kind: {"ok": count} for kind, count in MIX.items()})
    return f"{kills} kills until all were young"


def kill_young_ones(m: Machine, count: int) -> int:
    """Kill it while `count` more connections are young; return how many kills that took.

    On a busy machine one may have become old by then, which proves nothing.
    """
    kills, took_ms, seen = 0, YOUNG_MS, {}
    deadline = time.monotonic() + 60
    while took_ms >= YOUNG_MS:
        check(time.monotonic() < deadline, "they never are young")
        before = m.main_pid("proxy.service")
        seen = json.loads(m.sh(f"python3 {TOOLS}/young.py 9001 8001 {before} {count}"))
        m.wait_for("another process", lambda old=before: streams.active_pid(m) not in (0, old), 20)
        took_ms = seen.pop("took_ms")
        kills += 1
    same("what the ends see", seen, {"reset": 2 * count})
    return kills


YOUNG_MS = 900


@scenario(needs="--threads")
def killed_after_restart(m: Machine) -> str:
    """Killed right after a restart or a reload: each connection goes on or is reset"""
    start_proxy(m, service=AGAIN)
    kept = lost = 0
    for how in (restart, reload):
        open_ones = Streams(m, times(5, FEW))
        wait_until_kept(m, 5 * sum(FEW.values()))
        how(m)
        kill(m)
        for kind, outcomes in open_ones.end().items():
            for outcome, count in outcomes.items():
                check(outcome == "ok" or "ConnectionReset" in outcome, f"{kind}: {outcomes}")
                kept += count * (outcome == "ok")
                lost += count * (outcome != "ok")
    return f"{kept} went on, {lost} were reset"


@scenario(needs="--threads")
def killed_without_store(m: Machine) -> None:
    """FileDescriptorStoreMax=0: a kill resets what is open, and the next process serves"""
    no_store = "FileDescriptorStoreMax=0"
    start_proxy(m, service=AGAIN + no_store, drop_in=RESTART.replace("Max=1", "Max=0"))
    see_kill_reset(m)


@scenario(needs="--threads")
def killed_with_full_store(m: Machine) -> None:
    """A store that somebody else has filled: the same"""
    script = m.write(f"{m.folder}/store", STORE)
    fill = f"NotifyAccess=all\nExecStartPost=-python3 {script}"
    start_proxy(m, service=AGAIN + fill)
    m.wait_for("the store is full", lambda: stored(m) == "1")
    see_kill_reset(m)


def see_kill_reset(m: Machine) -> None:
    for _ in range(2):
        open_ones = Streams(m, FEW)
        m.wait_for("they are old", lambda: youngest_ms(m) > streams.KEPT_MS)
        kill(m)
        see_resets(open_ones)
    Streams(m, FEW).end_well()


def youngest_ms(m: Machine) -> float:
    rows = json.loads(m.sh(f"{m.ctl} list --json=short --unit=proxy.service"))
    return min(row["ageUSec"] for row in rows) / 1000


# --- stops ----------------------------------------------------------------------------------------


@scenario(needs="--drain-timeout")
def killed_while_draining(m: Machine) -> str:
    """A restart that drains is cut short by a kill: the next process goes on with what is left"""
    drop_in = RESTART.replace("RestartKillSignal=SIGUSR2\n", "")
    start_proxy(m, "--drain-timeout=1h", AGAIN, drop_in)
    open_ones = open_and_keep(m, MIX)
    before = m.main_pid("proxy.service")
    m.sh("systemctl --no-block restart proxy.service; systemctl daemon-reload")
    same("it drains", m.show("proxy.service", "SubState"), "stop-sigterm")
    m.sh("systemctl kill --signal=KILL proxy.service")
    m.wait_for("another process", lambda: streams.active_pid(m) not in (0, before), 20)
    return end_well(m, open_ones)


@scenario(needs="--drain-timeout")
def kept_ones_end(m: Machine) -> str:
    """What is kept ends as ever: in a drain, at an idle exit, and by a stop with a reset"""
    start_proxy(m, "--exit-idle-time=1s --drain-timeout=1h", AGAIN)
    open_ones = open_and_keep(m, MIX)
    m.sh("systemctl --no-block stop proxy.service; systemctl daemon-reload")
    same("a stop with connections", m.show("proxy.service", "SubState"), "stop-sigterm")
    end_well(m, open_ones)
    m.wait_for("the stop", lambda: m.show("proxy.service", "ActiveState") == "inactive")
    end_well(m, open_and_keep_again(m))
    m.wait_for("idle", lambda: m.show("proxy.service", "ActiveState") == "inactive")
    for what in ("Result", "NFileDescriptorStore"):
        same(what, m.show("proxy.service", what), {"Result": "success"}.get(what, "0"))
    open_ones = open_and_keep_again(m, FEW)
    m.sh("systemctl kill --signal=USR2 proxy.service")  # nothing starts it again
    see_resets(open_ones)
    return "drained, idle, reset"


def open_and_keep_again(m: Machine, counts: dict[str, int] = MIX) -> Streams:
    """The same by TCP alone, with the start of the program."""
    open_ones = Streams(m, counts)
    wait_until_kept(m, sum(counts.values()))
    return open_ones


# --- limits and privileges ------------------------------------------------------------------------


@scenario(needs="--threads")
def more_kept_than_files(m: Machine) -> str:
    """A soft LimitNOFILE= of 1024, without privileges: kills with 2000 descriptors"""
    start_proxy(m, service=AGAIN + "DynamicUser=yes\nLimitNOFILE=1024:16384")
    open_ones = open_and_keep_again(m, {"ping": 1, "talk": 49, "idle": 950})
    for _ in range(3):
        kill(m)
    return end_well(m, open_ones)


@scenario(needs="--threads")
def hardened_kill(m: Machine) -> str:
    """Kills under hardening.conf, where a violation of its filter is one, too"""
    m.unit("proxy.service.d/10-hardening.conf", HARDENING, load=False)
    m.unit("proxy.service.d/20-kill.conf", KILL, load=False)
    start_proxy(m, service=AGAIN)
    open_ones = open_and_keep(m, MIX)
    for _ in range(3):
        kill(m)
    note = end_well(m, open_ones)
    not_killed(m)
    return note


@scenario(needs="--threads")
def out_of_memory(m: Machine) -> str:
    """The kernel kills it at its memory limit: connections in all states go on"""
    start_proxy(m, service=AGAIN)
    open_ones = open_and_keep(m, MIX)
    before = m.main_pid("proxy.service")
    how = exhaust_memory(m)
    m.wait_for("another process", lambda: streams.active_pid(m) not in (0, before), 20)
    return f"{end_well(m, open_ones)}, {how}"


MANY_CLIENTS = """
import signal, socket
clients = [socket.create_connection(("127.0.0.1", 9001)) for _ in range(2000)]
signal.pause()
"""


def exhaust_memory(m: Machine) -> str:
    """Lower the limit below what the program has, until it is killed; return which limit."""
    group = Path("/sys/fs/cgroup" + m.show("proxy.service", "ControlGroup"))
    if not m.run(f"test -e {group}/memory.max").returncode:
        m.sh(f"echo 1M >{group}/memory.max; echo max >{group}/memory.max || true")
        return "by memory.max"
    limits = cgroup.Limits(f"e2e-memory-{m.container.leader}")
    try:
        if not limits.apply(m.host_pid("proxy.service"), 128 << 10, 100):
            raise CannotRun("there is no group with a limit of memory")
        # What the program has already is not counted in its new group; clients that it holds are.
        m.client(f"exec python3 -c '{MANY_CLIENTS}'")
        oom = limits.groups[0] / "memory.oom_control"
        m.wait_for("a kill", lambda: "\noom_kill 1" in oom.read_text(), 20)
    finally:
        limits.remove()
    return "by a cgroup v1 group of the host"


# --- a user's manager -----------------------------------------------------------------------------


@scenario(needs="--threads")
def user_kill(m: Machine) -> str:
    """systemctl --user: connections go on after kills, with daemon-reexec in between"""
    user = UserManager(m)
    try:
        return kill_as_user(m, user)
    finally:
        user.end()


def kill_as_user(m: Machine, user: UserManager) -> str:
    user.unit("proxy.socket", USERS_SOCKET)
    command = f"RuntimeDirectory=%N\nExecStart={m.program} 127.0.0.1:8000"
    user.unit("proxy.service", f"[Unit]\nStartLimitIntervalSec=0\n{RESTART}{AGAIN}{command}\n")
    user.sh("systemctl --user daemon-reload; systemctl --user start proxy.socket")
    open_ones = Streams(m, MIX)
    for number in range(1, 4):
        pid = int(user.show("proxy.service", "MainPID"))
        where = f"--socket=/run/user/{user.number}/proxy/inspect"
        wait_until_kept(m, sum(MIX.values()), pid, where)
        user.sh("systemctl --user kill --signal=KILL proxy; systemctl --user daemon-reexec")
        m.wait_for("it goes on", lambda n=number: m.journal().count(WENT_ON) == n, 20)
    note = end_well(m, open_ones)
    user.sh("systemctl --user stop proxy.socket proxy.service")
    return note
