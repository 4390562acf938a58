"""How little the program can be allowed: examples/drop-ins/hardening.conf, enforced and traced."""

import re
from pathlib import Path

from e2e.harness import scenario
from e2e.machine import MEGABYTE, Machine, check, same
from e2e.paths import CURL, PATHS, Proxy, drive, set_up
from e2e.scenarios.limits import parallel_downloads
from e2e.scenarios.targets import SAYS

HARDENING = (Path(__file__).parents[3] / "examples/drop-ins/hardening.conf").read_text()

# systemd-analyze's sum of what is still allowed, from 0 to 10. What remains is what a forwarder is
# for: the network, and the address families of its sockets.
EXPOSURE = {"TCP": 1.1, "UNIX": 0.5}

# A system call outside of the filter kills the process, instead of failing with an error.
KILL = "[Service]\nSystemCallErrorNumber=\n"
KILLED = "status=31/SYS"


def uncommented(text: str) -> str:
    """The drop-in with the settings that it offers in comments."""
    return re.sub(r"^#([A-Z]\w+=)", r"\1", text, flags=re.MULTILINE)


def harden(m: Machine, more: str = "", text: str = HARDENING) -> None:
    """The drop-in for proxy.service and its instances, with a violation of the filter fatal."""
    for unit in ("proxy.service", "proxy@.service"):
        m.unit(f"{unit}.d/10-hardening.conf", text)
        m.unit(f"{unit}.d/20-kill.conf", f"{KILL}{more}\n")


def exposure(m: Machine, what: str) -> str:
    line = m.sh("systemd-analyze security proxy.service --no-pager | tail -n 1")
    found = re.search(r"proxy\.service: ([0-9.]+)", line)
    check(found, f"no exposure: {line!r}")
    check(
        float(found[1]) <= EXPOSURE[what],
        f"exposure of {what}: {found[1]}, {EXPOSURE[what]} is the bound",
    )
    return f"exposure {found[1]}"


def not_killed(m: Machine) -> None:
    check(KILLED not in m.journal(), f"killed by the filter: {m.journal()[-600:]}")


@scenario(needs="--listen --threads")
def filter_kills(m: Machine) -> None:
    """The system call filter is in force: without epoll_wait the program is killed"""
    harden(m, "SystemCallFilter=~epoll_wait epoll_pwait")
    m.nginx_for_load(8000)
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000")
    m.run("systemctl start proxy.service; curl -sS --max-time 3 http://127.0.0.1:9000/small")
    m.stop("proxy.socket")
    check(KILLED in m.journal(), "it was not killed")


@scenario(needs="--listen --threads")
def hardened_paths(m: Machine) -> str:
    """All paths through the program under hardening.conf, where a violation of its filter kills"""
    harden(m)
    set_up(m)
    drive(Proxy(m), lambda: not_killed(m))
    return f"{len(PATHS)} paths, {exposure(m, 'TCP')}"


@scenario(needs="--listen --threads")
def hardened_unix(m: Machine) -> str:
    """The same drop-in with what it offers for a UNIX target: no network, and a group"""
    harden(m, text=uncommented(HARDENING))
    m.nginx("backend", SAYS.format(listen=f"unix:{m.folder}/target", word="unix"))
    m.start("backend.service")
    m.wait_for("nginx listens", lambda: not m.run(f"test -S {m.folder}/target").returncode)
    m.sh(f"chgrp www-data {m.folder}/target; chmod 660 {m.folder}/target")
    m.proxy(
        "proxy", f"127.0.0.1:9000 {m.folder}/socket", f"{m.folder}/target", service="Type=notify"
    )
    for how in ("http://127.0.0.1:9000/", f"--unix-socket {m.folder}/socket http://localhost/"):
        same("answer", m.sh(f"{CURL} {how}"), "unix\n")
    m.stop("proxy.socket", "proxy.service")
    not_killed(m)
    return exposure(m, "UNIX")


ADDRESS = "10.9.9.1"


@scenario(needs="--listen --threads")
def hardened_local(m: Machine) -> str:
    """The same drop-in with its address filter: any client, but only targets on this machine"""
    harden(m, "IPAddressAllow=localhost\nIPAddressDeny=any")
    m.nginx_for_load(8000)
    m.nginx("other", SAYS.format(listen="8001", word="other"))
    m.start("other.service")
    m.wait_for("nginx listens", lambda: m.listens(8001))
    m.sh(f"ip addr add {ADDRESS}/32 dev lo")
    try:
        m.proxy("proxy", "9000", "127.0.0.1:8000")
        same("client", m.sh(f"{CURL} http://{ADDRESS}:9000/small"), "small\n")
        m.stop("proxy.socket", "proxy.service")
        m.proxy("proxy", "9000", f"{ADDRESS}:8001", options="--connect-timeout=1s")
        refused = m.run(f"{CURL} http://{ADDRESS}:9000/").stdout != "other\n"
    finally:
        m.sh(f"ip addr del {ADDRESS}/32 dev lo")
    not_killed(m)
    return "other targets refused" if refused else "IPAddressDeny= NOT enforced on this host"


LIMITS = "MemoryMax=32M\nTasksMax=4\nLimitNOFILE=64"


@scenario(original="is out of fds with 20 connections, 6 fds each")
def hardened_under_load(m: Machine) -> str:
    """The same drop-in with MemoryMax=32M, TasksMax=4, LimitNOFILE=64 under load"""
    harden(m, LIMITS)
    m.nginx_for_load(8000)
    m.proxy("proxy", "127.0.0.1:9000 [::1]:9000", "127.0.0.1:8000", gated=True)
    with m.limited("proxy.service", 32 * MEGABYTE, 4) as note:
        same("IPv6", m.sh("curl -sS http://[::1]:9000/small"), "small\n")
        counts = m.load_result(m.start_load("mix", 9000, 1000, 0, 0))
        same("short requests", counts["short"], {"ok": 1000})
        same("downloads", parallel_downloads(m, 12), {"ok": 12})
        noise = [
            line
            for line in m.journal("proxy.service").splitlines()
            if "Traceback" in line or "arning" in line
        ]
        check(not noise, f"{noise[:3]}")
    not_killed(m)
    return note


# --- traced ---------------------------------------------------------------------------------------

# -D: the tracer is a grandchild, so that the program keeps the pid that LISTEN_PID= and the
# service manager know. KillMode=process: a stop leaves the tracer time to write down the end.
STRACE = "/usr/bin/strace -D -f -qq -s 0 -A -o {folder}/trace {program}"
TRACED = "KillMode=process\nSendSIGKILL=no\n"

CALL = re.compile(r"^\d+ +(?:<\.\.\. )?([a-z_0-9]+)(?:\(| resumed)", re.MULTILINE)
OPENED = re.compile(r'\bopen(?:at)?\((?:AT_FDCWD, )?"([^"]*)", ([A-Z_|]+).* = \d+$', re.MULTILINE)
EXECUTABLE = re.compile(r"\b(?:mprotect|mmap)\(.*PROT_EXEC.*", re.MULTILINE)

# What one call is named on different architectures and in different C libraries.
KIN = (
    "access faccessat",
    "chmod fchmodat",
    "clone clone3",
    "epoll_pwait epoll_wait",
    "fstat newfstatat stat",
    "open openat",
    "poll ppoll",
    "readlink readlinkat",
    "unlink unlinkat",
)

# Called by some versions of the libraries only; systemd's stands for the age of all of them.
BY_VERSION = {"sysinfo": range(253), "pidfd_open": range(259, 9999)}

# For a trial of a new version: in posix_spawn(3) of musl, and if it does not end, or a stop comes.
RARE = {"dup2", "dup3", "kill"}

# The allocator of Python 3.13 and newer asks, and the inspection socket; both do without where
# ProcSubset=pid hides the file.
ASKED_FOR = ("/proc/sys/vm/overcommit_memory", "/proc/sys/kernel/overflowuid")

# Opened to be locked while the socket file of --listen= is made, or removed.
LOCKED = "/run/proxy"

# Written to by the trial of a new version, and by what starts it.
WRITTEN = re.compile("/dev/null|/proc/[0-9]+/oom_score_adj")

READ_ONLY = ("/usr/", "/lib/", "/lib64/", "/etc/", "/opt/proxyd/", "/proc/self/")


@scenario(needs="--listen --threads")
def traced_paths(m: Machine) -> str:
    """All paths, traced: the filter allows what is called and no more; no file is written"""
    trace = trace_of_paths(m)
    called = set(CALL.findall(trace))
    default = set(m.sh("systemd-analyze syscall-filter @default").split())
    allowed = set(" ".join(re.findall("^SystemCallFilter=(.*)", HARDENING, re.MULTILINE)).split())
    same("called, but not allowed", sorted(called - allowed - default), [])
    version = int(m.sh("systemctl --version").split()[1])
    unused = {name for name in idle(allowed, called) if version in BY_VERSION.get(name, [version])}
    same("allowed, but never called", sorted(unused - RARE), [])
    for opened, flags in OPENED.findall(trace):
        if WRITTEN.fullmatch(opened):
            continue
        check("O_WRONLY" not in flags and "O_RDWR" not in flags, f"{opened} opened with {flags}")
        check(opened.startswith(READ_ONLY) or opened in (*ASKED_FOR, LOCKED), f"{opened} opened")
    for line in EXECUTABLE.findall(trace):
        check("mmap(" in line and "PROT_WRITE" not in line, f"made executable: {line}")
    return f"{len(called)} system calls, {len(called - default)} of them beyond @default"


def trace_of_paths(m: Machine) -> str:
    set_up(m)
    program = STRACE.format(folder=m.folder, program=m.program)
    drive(Proxy(m, TRACED, program), lambda: m.wait_for("strace ends", lambda: not tracers(m)))
    return m.sh(f"cat {m.folder}/trace")


def tracers(m: Machine) -> str:
    return m.run("pgrep -x strace").stdout


def idle(allowed: set[str], called: set[str]) -> set[str]:
    """Those of `allowed` that were not called, under this name or another one of the same call."""
    families = [set(line.split()) for line in KIN]
    return {
        name
        for name in allowed - called
        if not any(name in family and family & called for family in families)
    }
