"""Rules: when proxy and backend start and stop."""

from collections.abc import Iterator

from proxyd.units import command, facts
from proxyd.units.rule import Finding, Rule, at
from proxyd.units.sets import STARTS, Backend, Set
from proxyd.units.unit import Unit
from proxyd.units.unitfile import Setting

_CHECKS = ("Condition", "Assert")


def _restart_refused(rule: Rule, found: Set) -> Iterator[Finding]:
    if found.per_connection:
        return
    for socket in found.sockets[:1]:
        by_stop = found.proxy.dependencies("PartOf")
        if not facts.required(found, socket) and not socket.aliases.intersection(by_stop):
            yield rule.found(
                found.proxy.where(),
                f"{socket.text} cannot be restarted while the proxy runs: 'already active'",
            )


def _no_order(rule: Rule, found: Set) -> Iterator[Finding]:
    for backend in found.backends:
        if facts.is_helper(found, backend) and not facts.is_heavy(backend):
            continue
        if not facts.ordered(found.proxy, backend.unit, backend.name):
            kind = next(iter(backend.kinds))
            yield rule.found(
                at(backend.kinds[kind], found.proxy),
                f"{kind}={backend.name} without After=: clients that come while it stops are reset",
            )


def _never_stops(rule: Rule, found: Set) -> Iterator[Finding]:
    for backend in found.backends:
        unit = backend.unit
        if unit is None or not found.command.sure or found.command.options is None:
            continue
        helper = facts.is_helper(found, backend) or facts.is_oneshot(unit)
        if helper and not facts.is_heavy(backend):
            continue
        stops = unit.flag("Unit", "StopWhenUnneeded")
        if stops and not found.command.rests and not found.per_connection:
            yield rule.found(
                found.proxy.where(("Service", "ExecStart")),
                f"without --exit-idle-time= the proxy never ends, and {backend.name} runs on",
            )
        elif not stops and not _stopped_otherwise(found, backend) and not _is_on(found, unit):
            yield rule.found(
                unit.where(("Unit", "StopWhenUnneeded"), ("Service", "ExecStart")),
                f"{backend.name} runs on when the proxy has ended",
            )


def _is_on(found: Set, unit: Unit) -> bool:
    """Tell whether the backend is meant to run always."""
    if unit.vendors and facts.is_enabled(unit):
        return True
    if found.per_connection and facts.is_oneshot(unit):  # it cannot have Restart=always
        return bool(facts.is_enabled(unit))
    if found.command.rests or found.per_connection:
        return bool(facts.is_enabled(unit)) and facts.restarts(unit)
    return bool(facts.is_enabled(unit)) or facts.restarts(unit)


def _stopped_otherwise(found: Set, backend: Backend) -> bool:
    """Tell whether the backend ends with the proxy in another way than StopWhenUnneeded=."""
    unit = backend.unit
    if unit is not None and found.proxy.aliases.intersection(unit.dependencies("BindsTo")):
        return True
    after = command.programs(found.proxy, "ExecStop", "ExecStopPost")
    return any(
        "stop" in " ".join(line) and backend.name.removesuffix(".service") in " ".join(line)
        for line in after
    )


def _pinned(rule: Rule, found: Set) -> Iterator[Finding]:
    for backend in found.backends:
        unit = backend.unit
        if unit is None or not unit.flag("Unit", "StopWhenUnneeded"):
            continue
        owner = facts.is_enabled(unit)
        if owner:
            yield rule.found(
                unit.where(("Install", "WantedBy"), ("Install", "RequiredBy")),
                f"{owner} needs {backend.name} as well: it starts at boot and never stops",
            )
        for socket in found.sockets:
            kinds = socket.dependencies(*STARTS)
            for other in sorted(unit.aliases.intersection(kinds)):
                yield rule.found(
                    at(kinds[other], socket),
                    f"{socket.text} needs {backend.name} as well: it starts at boot and never "
                    "stops",
                )


def _unneeded_proxy(rule: Rule, found: Set) -> Iterator[Finding]:
    proxy = found.proxy
    if not proxy.flag("Unit", "StopWhenUnneeded"):
        return
    needs = ("Requires", "Requisite", "BindsTo", "Wants", "Upholds")
    bound = any(
        backend.unit is not None and proxy.aliases.intersection(backend.unit.dependencies(*needs))
        for backend in found.backends
    )
    if not bound and not proxy.wanted_by:
        yield rule.found(
            proxy.where(("Unit", "StopWhenUnneeded")),
            "a socket does not need its service: the proxy is stopped as soon as it has started",
        )


def _restart_always(rule: Rule, found: Set) -> Iterator[Finding]:
    value = found.proxy.choice("Service", "Restart")
    if value not in ("always", "on-success"):
        return
    if found.command.rests or found.per_connection:
        yield rule.found(
            found.proxy.where(("Service", "Restart")),
            f"with Restart={value} the proxy starts again as soon as it has ended when idle",
        )


def _condition(rule: Rule, found: Set) -> Iterator[Finding]:
    same = {
        (setting.key, setting.value)
        for socket in found.sockets
        for file in socket.files
        for setting in file.settings
    }
    if found.per_connection or facts.is_revived(found):
        return
    for setting in _conditions(found.proxy):
        if (setting.key, setting.value) not in same:
            yield rule.found(
                (setting.path, setting.line),
                f"if {setting.key}= does not hold when a client comes, the socket fails with "
                "trigger-limit-hit",
            )


def _conditions(unit: Unit) -> list[Setting]:
    """Return the conditions and assertions in effect: an empty one resets all of its kind."""
    kept: dict[str, list[Setting]] = {kind: [] for kind in _CHECKS}
    for file in unit.files:
        for setting in file.settings:
            kind = next((kind for kind in _CHECKS if setting.key.startswith(kind)), "")
            if setting.section != "Unit" or not kind:
                continue
            if setting.value:
                kept[kind].append(setting)
            else:
                kept[kind].clear()
    return [setting for kind in _CHECKS for setting in kept[kind]]


def _oneshot(rule: Rule, found: Set) -> Iterator[Finding]:
    for backend in found.backends:
        unit = backend.unit
        if unit is None or not facts.is_oneshot(unit) or unit.flag("Service", "RemainAfterExit"):
            continue
        again = {"Upholds", "BindsTo"}.intersection(backend.kinds)
        if again or unit.entries("Service", "ExecStop") or facts.is_heavy(backend):
            yield rule.found(
                unit.where(("Service", "RemainAfterExit"), ("Service", "Type")),
                f"{backend.name} counts as stopped once its command is done: it is "
                + ("started in a loop" if again else "stopped again at once, or never"),
            )


def _enabled(rule: Rule, found: Set) -> Iterator[Finding]:
    proxy = found.proxy
    if not found.sockets:
        return
    owner = facts.is_enabled(proxy)
    if owner:
        yield rule.found(
            proxy.where(("Install", "WantedBy"), ("Install", "RequiredBy")),
            f"{owner} starts the proxy at boot, and its backend with it, before there is a client",
        )


def _others_require(rule: Rule, found: Set) -> Iterator[Finding]:
    if not found.sockets:
        return
    own = {socket.text for socket in found.sockets} | {found.proxy.text}
    own |= {backend.unit.text for backend in found.backends if backend.unit is not None}
    for unit, kind, setting in found.library.dependents(found.proxy.aliases):
        if kind in STARTS and unit.text not in own and setting is not None:
            yield rule.found(
                (setting.path, setting.line),
                f"{unit.text} starts the proxy, and with it the backend, before it needs it",
            )


def _socket_part_of(rule: Rule, found: Set) -> Iterator[Finding]:
    services = [("the proxy", found.proxy.aliases)]
    services += [(backend.name, _names_of(backend)) for backend in found.backends]
    for socket in found.sockets:
        for kind in ("PartOf", "BindsTo", "Requires"):
            kinds = socket.dependencies(kind)
            for what, aliases in services:
                for other in sorted(aliases.intersection(kinds)):
                    yield rule.found(
                        at(kinds[other], socket, ("Unit", kind)),
                        f"{kind}={other}: the socket "
                        + (f"starts {what}, and " if kind != "PartOf" else "")
                        + f"goes when {what} is stopped, and no client can start it again",
                    )


def _names_of(backend: Backend) -> set[str]:
    return {backend.name, *(backend.unit.aliases if backend.unit is not None else ())}


def _runtime_max(rule: Rule, found: Set) -> Iterator[Finding]:
    value = found.proxy.value("Service", "RuntimeMaxSec")
    if value and value != "infinity" and not found.per_connection:
        yield rule.found(
            found.proxy.where(("Service", "RuntimeMaxSec")),
            f"RuntimeMaxSec={value} cuts the connections that are open then, as a failure",
        )


RULES = (
    Rule(
        "socket-restart-refused",
        "warning",
        "Requires= and After= the proxy's own socket",
        "A socket unit cannot start while its service runs. With Requires= its socket, the "
        "proxy stops with the socket, so that `systemctl restart SOCKET` works.\n"
        "Seen as: 'Socket service ... already active, refusing.'",
        _restart_refused,
    ),
    Rule(
        "no-order",
        "error",
        "After= the backend",
        "Without After= the proxy and the backend start and stop at the same time. A client "
        "that comes while the backend takes its time to stop is connected to what is about to "
        "end, and is reset. With After= it waits until the backend has stopped, and is started "
        "again.",
        _no_order,
    ),
    Rule(
        "backend-never-stops",
        "warning",
        "StopWhenUnneeded=yes in the backend, and --exit-idle-time= for the proxy",
        "The proxy ends when it is idle, if --exit-idle-time= says so; the backend ends with it "
        "only if it has StopWhenUnneeded=yes. A backend that is meant to run always has "
        "WantedBy= and Restart=.",
        _never_stops,
    ),
    Rule(
        "backend-pinned",
        "warning",
        "no WantedBy= in the backend, or systemctl disable it; no Wants= of it in the socket",
        "StopWhenUnneeded=yes stops a unit that no active unit needs. A target that it is "
        "enabled in is always active, and so is the socket of the proxy. If one of them needs the "
        "backend, it starts at boot and never stops.",
        _pinned,
    ),
    Rule(
        "stop-when-unneeded-on-proxy",
        "error",
        "no StopWhenUnneeded= in the proxy; it belongs into the backend",
        "A socket starts its service but does not need it. A proxy with StopWhenUnneeded=yes is "
        "stopped at once, which cuts a client that it has taken. One that still waits starts it "
        "again, and so on until the start limit is hit and the socket fails. Only systemd 262 "
        "gives up stopping it after some times.",
        _unneeded_proxy,
    ),
    Rule(
        "restart-always-on-proxy",
        "error",
        "Restart=on-failure",
        "A proxy with --exit-idle-time= ends with success when it is idle. Restart=always "
        "starts it again, and its backend with it, so neither ever rests.",
        _restart_always,
    ),
    Rule(
        "condition-on-proxy",
        "error",
        "the condition in the backend instead",
        "A service whose condition does not hold is skipped, which is no failure. The client is "
        "still in the queue of the socket, which starts the service again, until the trigger "
        "limit is hit and the socket fails. Restart= does not help: nothing has failed.\n"
        "Seen as: `systemctl status SOCKET` says failed (Result: trigger-limit-hit).",
        _condition,
    ),
    Rule(
        "oneshot-not-remaining",
        "error",
        "RemainAfterExit=yes in the backend",
        "A Type=oneshot service is inactive again when its command has ended, unless it has "
        "RemainAfterExit=yes. Upholds= and BindsTo= then start it in a loop, ExecStop= runs at "
        "once, and StopWhenUnneeded= has nothing to stop.",
        _oneshot,
    ),
    Rule(
        "proxy-enabled",
        "warning",
        "WantedBy=sockets.target in the socket alone",
        "[Install] belongs into the socket unit. A proxy that is enabled itself is started at "
        "boot, without a client, and starts the backend.",
        _enabled,
    ),
    Rule(
        "others-require-proxy",
        "warning",
        "Requires= and After= the socket instead",
        "A unit that is a client of the proxy needs its socket, which is there from the start. "
        "With Requires= the proxy's service it starts proxy and backend before it uses them, "
        "and stops with them.",
        _others_require,
    ),
    Rule(
        "socket-partof-proxy",
        "warning",
        "Requires= and After= the socket in the proxy instead",
        "The socket is what stays while proxy and backend come and go. With PartOf=, BindsTo= or "
        "Requires= of one of the two it stops with that one, and nobody listens any more. A "
        "backend with StopWhenUnneeded=yes takes such a socket along as soon as it is idle.",
        _socket_part_of,
    ),
    Rule(
        "runtime-max-on-proxy",
        "warning",
        "no RuntimeMaxSec=; --idle-timeout= ends connections over which nothing moves",
        "RuntimeMaxSec= ends the proxy at a fixed time, with every connection that is open then.",
        _runtime_max,
    ),
)
