"""Rules: what becomes of connections at a restart, a reload, a stop and a crash of the proxy."""

import signal
from collections.abc import Iterator

from proxyd.units import facts
from proxyd.units.rule import Finding, Rule
from proxyd.units.sets import Set
from proxyd.units.unit import Unit

_ENDS = ("TERM", "INT", "USR2")
"""The signals that ask our program to end."""

_DIGITS_MAX = 10


def _drain_delays(rule: Rule, found: Set) -> Iterator[Finding]:
    options = found.command.options
    if not _is_ours(found) or options is None or options.drain_timeout == 0:
        return
    if has_store(found.proxy) and _restart_signal(found.proxy) != "USR2":
        yield rule.found(
            found.proxy.where(("Service", "RestartKillSignal"), ("Service", "ExecStart")),
            "a restart waits for --drain-timeout=, though the next process could go on at once",
        )


def _preserved(rule: Rule, found: Set) -> Iterator[Finding]:
    proxy = found.proxy
    if (
        _is_ours(found)
        and has_store(proxy)
        and proxy.flag("Service", "FileDescriptorStorePreserve")
    ):
        yield rule.found(
            proxy.where(("Service", "FileDescriptorStorePreserve")),
            "after a stop of the proxy, clients and targets wait in open connections that nobody "
            "serves",
        )


def _crash_resets(rule: Rule, found: Set) -> Iterator[Finding]:
    proxy = found.proxy
    options = found.command.options
    if options is not None and options.crash_recovery == "no":
        return
    if _is_ours(found) and has_store(proxy) and not facts.restarts(proxy):
        yield rule.found(
            proxy.where(("Service", "Restart"), ("Service", "FileDescriptorStoreMax")),
            "when the proxy crashes, all its connections are reset, though they are stored",
        )


def _wrong_signal(rule: Rule, found: Set) -> Iterator[Finding]:
    proxy = found.proxy
    if not _is_ours(found):
        return
    for key in ("KillSignal", "RestartKillSignal"):
        name = _signal(proxy, key)
        if name and name not in _ENDS:
            yield rule.found(
                proxy.where(("Service", key)),
                f"{key}=SIG{name} does not let the proxy leave its connections behind in order",
            )
    name = _signal(proxy, "ReloadSignal")
    if proxy.choice("Service", "Type") == "notify-reload" and name not in ("", "HUP"):
        yield rule.found(
            proxy.where(("Service", "ReloadSignal")),
            f"ReloadSignal=SIG{name}: the proxy reloads on SIGHUP alone",
        )


def has_store(unit: Unit) -> bool:
    """Tell whether the service manager stores descriptors of the service."""
    text = unit.value("Service", "FileDescriptorStoreMax", "0")
    return text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX and int(text) > 0


def _is_ours(found: Set) -> bool:
    """Tell whether connections of this proxy can go on in another process."""
    return not found.command.original and not found.per_connection


def _restart_signal(unit: Unit) -> str:
    return _signal(unit, "RestartKillSignal") or _signal(unit, "KillSignal") or "TERM"


def _signal(unit: Unit, key: str) -> str:
    """Return the name of a signal without SIG, or empty if there is none, or no such one."""
    text = unit.value("Service", key).removeprefix("SIG")
    if text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX:
        known = {one.value: one.name for one in signal.Signals}
        return known.get(int(text), "").removeprefix("SIG")
    return text if f"SIG{text}" in signal.Signals.__members__ else ""


RULES = (
    Rule(
        "drain-delays-restart",
        "warning",
        "RestartKillSignal=SIGUSR2",
        "With FileDescriptorStoreMax= the next process goes on with all connections, so a restart "
        "has nothing to wait for. But on SIGTERM the proxy lets them finish first, for "
        "--drain-timeout=, and new clients wait meanwhile. RestartKillSignal= says a signal for "
        "restarts alone: on SIGUSR2 it leaves its connections to the next process at once.\n"
        "Seen as: `systemctl restart PROXY` takes as long as --drain-timeout=.",
        _drain_delays,
    ),
    Rule(
        "store-preserved",
        "warning",
        "no FileDescriptorStorePreserve=",
        "FileDescriptorStorePreserve=yes (systemd 254) keeps the stored connections after a stop "
        "and a failure, too. Their peers see neither an end nor a reset, and wait until the proxy "
        "is started again, if ever. Without it, a restart keeps the connections, and a stop "
        "resets them.\n"
        "Seen as: clients hang after `systemctl stop PROXY`.",
        _preserved,
    ),
    Rule(
        "crash-resets",
        "warning",
        "Restart=on-failure and RestartSec=1s in the proxy's service",
        "With FileDescriptorStoreMax= the connections of a proxy outlive it when it is killed, as "
        "for want of memory. But the service manager drops them unless it starts the proxy again "
        "by itself, which takes Restart=. A client that comes later starts it too late.\n"
        "Seen as: clients are reset after a crash.",
        _crash_resets,
    ),
    Rule(
        "wrong-signal",
        "error",
        "no KillSignal= and no ReloadSignal=; SIGUSR2 in RestartKillSignal=",
        "The proxy ends on SIGTERM, SIGINT and SIGUSR2: it leaves its connections to the next "
        "process, or resets them. On SIGHUP it reloads, on SIGUSR1 it logs counters, and goes on: "
        "a stop waits for TimeoutStopSec=, and then kills it. Any other signal kills it at once. "
        "Then connections younger than a second and clients that wait are lost, also if there is "
        "a store.\n"
        "Seen as: a stop that takes TimeoutStopSec=; connections that a restart cuts.",
        _wrong_signal,
    ),
)
