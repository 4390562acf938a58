"""The store of the service manager: missing, full, kept by a stop; which signal means what."""

from e2e.harness import CannotRun, scenario
from e2e.machine import Machine, check, same
from e2e.streams import (
    MIX,
    RESTART,
    WENT_ON,
    Streams,
    reload,
    restart,
    start_proxy,
    stored,
    version,
)

FEW = {"talk": 3, "idle": 3}

CUT = "open and 0 waiting connections were cut."


def see_resets(open_ones: Streams) -> None:
    """Fail unless each connection has ended as a proxy without a store ends it."""
    for kind, outcomes in open_ones.end().items():
        check(all("ConnectionResetError" in how for how in outcomes), f"{kind}: {outcomes}")


@scenario(needs="--drain-timeout")
def no_store(m: Machine) -> None:
    """FileDescriptorStoreMax=0: a restart resets what is open, at once"""
    start_proxy(m, service="FileDescriptorStoreMax=0", drop_in=RESTART.replace("Max=1", "Max=0"))
    open_ones = Streams(m, FEW)
    restart(m)
    check(f"{sum(FEW.values())} {CUT}" in m.journal("proxy.service"), "nothing was cut")
    see_resets(open_ones)


# What another program of the unit stores, so that there is no room.
STORE = """
import os, socket
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(os.environ["NOTIFY_SOCKET"].replace("@", chr(0), 1))
socket.send_fds(notify, [b"FDSTORE=1\\nFDNAME=other\\nFDPOLL=0"], [os.memfd_create("other")])
"""


@scenario(needs="--drain-timeout")
def full_store(m: Machine) -> None:
    """A store that somebody else has filled: the same, and what is in it is skipped"""
    script = m.write(f"{m.folder}/store", STORE)
    fill = f"NotifyAccess=all\nExecStartPost=-python3 {script}"
    start_proxy(m, service=fill)
    m.wait_for("the store is full", lambda: stored(m) == "1")
    open_ones = Streams(m, FEW)
    restart(m)
    see_resets(open_ones)  # systemd 262 may refuse so late that the log says "kept"
    check("Ignoring the stored file descriptor" in m.journal("proxy.service"), "it is not told")
    Streams(m, FEW).end_well()


@scenario(needs="--drain-timeout")
def stop_drops_the_store(m: Machine) -> None:
    """A plain stop: the service manager drops the connections, and their peers see a reset"""
    start_proxy(m)
    open_ones = Streams(m, FEW)
    m.stop("proxy.socket", "held.socket", "proxy.service")
    same("what is left in the store", stored(m), "0")
    see_resets(open_ones)


@scenario(needs="--drain-timeout")
def preserved_store(m: Machine) -> str:
    """FileDescriptorStorePreserve=yes: after a stop peers wait, until the next start goes on"""
    if version(m) < 254:
        raise CannotRun("systemd does not know it before 254")
    start_proxy(m, service="FileDescriptorStorePreserve=yes")
    open_ones = Streams(m, MIX)
    m.stop("proxy.service")
    same("what is in the store", stored(m), "1")
    m.sh("sleep 0.3")
    m.start("proxy.service")
    return open_ones.end_well()


@scenario(needs="--drain-timeout")
def drain_and_restart(m: Machine) -> str:
    """RestartKillSignal=SIGUSR2: a restart does not wait for --drain-timeout, a stop does"""
    start_proxy(m, "--drain-timeout=1h")
    open_ones = Streams(m, MIX)
    restart(m)
    same("processes that went on", m.journal("proxy.service").count(WENT_ON), 1)
    m.sh("systemctl --no-block stop proxy.service; systemctl daemon-reload")
    same("a stop with connections", m.show("proxy.service", "SubState"), "stop-sigterm")
    note = open_ones.end_well()
    m.wait_for("the stop", lambda: m.show("proxy.service", "ActiveState") == "inactive")
    same("result", m.show("proxy.service", "Result"), "success")
    return note


@scenario(needs="--drain-timeout")
def restart_after_draining(m: Machine) -> str:
    """Without it, what is left after --drain-timeout= is kept for the next start"""
    drop_in = RESTART.replace("RestartKillSignal=SIGUSR2\n", "")
    start_proxy(m, "--drain-timeout=1s", drop_in=drop_in)
    open_ones = Streams(m, MIX)
    restart(m)
    return open_ones.end_well()


@scenario(needs="--drain-timeout")
def notify_reload(m: Machine) -> str:
    """Type=notify-reload: systemctl reload returns once the new program is ready"""
    if version(m) < 253:
        raise CannotRun("systemd does not know it before 253")
    drop_in = "[Service]\nType=notify-reload\nFileDescriptorStoreMax=1\n"
    start_proxy(m, drop_in=drop_in)
    open_ones = Streams(m, MIX)
    for count in range(1, 4):
        m.sh("systemctl reload proxy.service")
        same("processes that went on", m.journal("proxy.service").count(WENT_ON), count)
    restart(m)
    reload(m)
    return open_ones.end_well()
