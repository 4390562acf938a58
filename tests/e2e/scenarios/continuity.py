"""Restart, reload and upgrade: no connection is lost, and no byte of it."""

import json
import statistics

from e2e import streams
from e2e.harness import CannotRun, scenario
from e2e.machine import Machine, check, same
from e2e.scenarios.privilege import HARDENING, KILL, not_killed
from e2e.scenarios.user_manager import UserManager
from e2e.streams import HELD, MIX, Streams, listeners, reload, restart, start_proxy, stored, times

# The service manager is executed anew while it has the connections.
BETWEEN = "ExecStartPre=systemctl daemon-reexec\n"


def go_through(m: Machine, factor: int, rounds: int) -> str:
    """Restart and reload `rounds` times under `factor` hundred connections in all states."""
    start_proxy(m, "--threads=3", BETWEEN)
    open_ones = Streams(m, times(factor, MIX | HELD), listeners(m))
    for _ in range(rounds):
        restart(m)
        reload(m)
    m.wait_for("one place of the store is used", lambda: stored(m) == "1")
    note = open_ones.end_well()
    same("resets", m.journal("proxy.service").count("Had to reset"), 0)
    return f"{note}, {rounds} restarts and reloads"


@scenario(needs="--threads")
def streams_go_on(m: Machine) -> str:
    """Connections in all states go through restarts, reloads and daemon-reexec"""
    return go_through(m, 2, 4)


@scenario(needs="--threads", slow=True)
def streams_go_on_for_long(m: Machine) -> str:
    """The same with 1000 connections, 100 restarts and 100 reloads"""
    return go_through(m, 10, 100)


@scenario(needs="--threads")
def restart_cuts_nothing(m: Machine) -> str:
    """Restart, reload and daemon-reexec under load: not one request fails"""
    m.unit("proxy.service.d/restart.conf", streams.RESTART)
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000", socket="TriggerLimitBurst=0")
    m.nginx_for_load(8000)
    m.sh("curl -sS --max-time 10 http://127.0.0.1:9000/small")
    load = m.start_load("steady", 9000, 8, 5)
    for verb in ("restart proxy.service", "reload proxy.service", "daemon-reexec") * 2:
        m.sh("sleep 0.5")
        m.sh(f"systemctl {verb}")
    counts = m.load_result(load)["steady"]
    same("failed", {how: count for how, count in counts.items() if how != "ok"}, {})
    return f"{counts['ok']} served"


# --- the pause ------------------------------------------------------------------------------------

ROUNDS = 5  # as many as streams.py tells pauses


@scenario(needs="--threads", slow=True)
def pauses(m: Machine) -> str:
    """How long a client waits at a restart and a reload, with 10 to 10 000 connections"""
    found = []
    start_proxy(m, "-c 20000", "LimitNOFILE=100000")
    most = min(10_000, int(m.sh("ulimit -Hn")) // 2 - 100)
    for count in (10, 1000, most):
        for how in (restart, reload):
            open_ones = Streams(m, {"ping": 8, "idle": count - 8})
            before = cpu_of_manager(m)
            for _ in range(ROUNDS):
                how(m)
            cpu = (cpu_of_manager(m) - before) / ROUNDS
            open_ones.end_well()
            waits = open_ones.pauses_ms
            found.append(
                f"{how.__name__} with {count}: {min(waits)} to {max(waits)} ms, median "
                f"{statistics.median(waits):.0f}, PID 1 {cpu:.1f} ms"
            )
    return "; ".join(found)


def cpu_of_manager(m: Machine) -> float:
    """The CPU time of PID 1, in ms."""
    return int(m.sh("cat /proc/1/schedstat").split()[0]) / 1e6


# --- upgrades -------------------------------------------------------------------------------------

NEWER = "0.1.0.post1"

INSTALL_WHEEL = """
/opt/build/bin/pip --python=/opt/proxyd/bin/python install --quiet --no-index --no-deps \
    --force-reinstall {wheel}
"""

MAKE_WHEEL = """
cd {folder}
/opt/build/bin/python -m wheel unpack --dest old {wheel} >/dev/null
cd old/*
mv systemd_socket_proxyd-{old}.dist-info systemd_socket_proxyd-{new}.dist-info
sed -i 's/^Version: .*/Version: {new}/' *.dist-info/METADATA
sed -i 's/^__version__ = .*/__version__ = "{new}"/' proxyd/__init__.py
mkdir {folder}/new
/opt/build/bin/python -m wheel pack --dest-dir {folder}/new . >/dev/null
"""

MAKE_DEB = """
dpkg-deb --raw-extract {deb} {folder}/package
sed -i 's/^Version: .*/Version: {new}-1/' {folder}/package/DEBIAN/control
sed -i 's/^__version__ = .*/__version__ = "{new}"/' \
    {folder}/package/usr/lib/systemd-socket-proxyd/proxyd/__init__.py
dpkg-deb --build {folder}/package {folder}/new.deb >/dev/null
"""


@scenario(needs="--threads")
def upgraded(m: Machine) -> str:
    """Another version is installed under load, and put in place by a reload; back by a restart"""
    m.nginx_for_load(8080)
    older, install_older, install_newer = make_versions(m)
    start_proxy(m, "--threads=2")
    load_through_second_proxy(m)
    open_ones = Streams(m, MIX | HELD, listeners(m))
    load = m.start_load("steady", 9002, 4, 8)
    same("version", running_version(m), older)
    try:
        m.sh(install_newer)
        same("version before the reload", running_version(m), older)
        reload(m)
        same("version after the reload", running_version(m), NEWER)
        m.sh("systemctl restart second.service")
    finally:
        m.sh(install_older)
    restart(m)
    same("version after the restart", running_version(m), older)
    m.sh("systemctl reload second.service")
    note = open_ones.end_well()
    counts = m.load_result(load)["steady"]
    same("failed", {how: count for how, count in counts.items() if how != "ok"}, {})
    return f"{note}, {counts['ok']} requests"


def make_versions(m: Machine) -> tuple[str, str, str]:
    """Make a newer version of what is installed; its number now, and how to install which."""
    older = m.sh(f"{m.program} --version").split()[1]
    names = {"folder": m.folder, "old": older, "new": NEWER}
    if not m.run("test -e /opt/package.deb").returncode:
        m.sh(MAKE_DEB.format(deb="/opt/package.deb", **names))
        install = "dpkg --install {} >/dev/null"
        return older, install.format("/opt/package.deb"), install.format(f"{m.folder}/new.deb")
    wheel = m.run("ls /opt/dist/*.whl").stdout.strip()
    if not wheel:
        raise CannotRun("what is run was not installed here")
    m.sh(MAKE_WHEEL.format(wheel=wheel, **names))
    newer = INSTALL_WHEEL.format(wheel=f"{m.folder}/new/*.whl")
    return older, INSTALL_WHEEL.format(wheel=wheel), newer


def load_through_second_proxy(m: Machine) -> None:
    """second.service on port 9002, for requests that come and go."""
    m.unit("second.service.d/restart.conf", streams.RESTART)
    m.proxy("second", "127.0.0.1:9002", "127.0.0.1:8080", socket="TriggerLimitBurst=0")
    m.sh("curl -sS --max-time 10 http://127.0.0.1:9002/small")


def running_version(m: Machine) -> str:
    (status,) = json.loads(m.sh(f"{m.ctl} status --json=short --unit=proxy.service"))
    return status["version"]


# --- limits and privileges ------------------------------------------------------------------------


@scenario(needs="--threads")
def more_streams_than_files(m: Machine) -> str:
    """A soft LimitNOFILE= of 1024: restarts and reloads with 2000 descriptors"""
    start_proxy(m, service="LimitNOFILE=1024:16384")
    open_ones = Streams(m, {"ping": 1, "talk": 49, "idle": 950})
    restart(m)
    reload(m)
    restart(m)
    note = open_ones.end_well()
    same("resets", m.journal("proxy.service").count("Had to reset"), 0)
    return note


@scenario(needs="--threads")
def hardened_restart(m: Machine) -> str:
    """Restart and reload under hardening.conf, where a violation of its filter kills"""
    m.unit("proxy.service.d/10-hardening.conf", HARDENING, load=False)
    m.unit("proxy.service.d/20-kill.conf", KILL, load=False)
    start_proxy(m)
    open_ones = Streams(m, MIX | HELD, listeners(m))
    for _ in range(2):
        restart(m)
        reload(m)
    note = open_ones.end_well()
    not_killed(m)
    return note


# --- a user's manager -----------------------------------------------------------------------------

USERS_SOCKET = "[Socket]\nListenStream=127.0.0.1:9000\n"


@scenario(needs="--threads")
def user_restart(m: Machine) -> str:
    """systemctl --user: connections go through restarts, a reload and daemon-reexec"""
    user = UserManager(m)
    try:
        return restart_as_user(m, user)
    finally:
        user.end()


def restart_as_user(m: Machine, user: UserManager) -> str:
    user.unit("proxy.socket", USERS_SOCKET)
    command = f"ExecStart={m.program} 127.0.0.1:8000"
    user.unit("proxy.service", f"[Unit]\nStartLimitIntervalSec=0\n{streams.RESTART}{command}\n")
    user.sh("systemctl --user daemon-reload; systemctl --user start proxy.socket")
    open_ones = Streams(m, MIX)
    before = user.show("proxy.service", "MainPID")
    for verb in ("restart proxy", "daemon-reexec", "restart proxy"):
        user.sh(f"systemctl --user {verb}")
    pid = user.show("proxy.service", "MainPID")
    check(pid not in ("0", before), "no other process after a restart")
    user.sh("systemctl --user reload proxy")
    m.wait_for("the reload", lambda: m.journal().count(streams.WENT_ON) == 3)
    same("the main process after a reload", user.show("proxy.service", "MainPID"), pid)
    note = open_ones.end_well()
    user.sh("systemctl --user stop proxy.socket proxy.service")
    same("result", user.show("proxy.service", "Result"), "success")
    return note
