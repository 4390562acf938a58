"""Rules: what stays broken after a crash, or after a start that failed."""

from collections.abc import Iterator

from proxyd.units import facts
from proxyd.units.rule import Finding, Rule, at
from proxyd.units.sets import Backend, Set


def _crash_not_healed(rule: Rule, found: Set) -> Iterator[Finding]:
    for backend in found.backends:
        if (
            "BindsTo" in backend.kinds
            or "Upholds" in backend.kinds
            or facts.is_helper(found, backend)
        ):
            continue
        unit = backend.unit
        if unit is None or facts.restarts(unit) or facts.is_oneshot(unit):
            continue  # an unknown unit may have Restart=
        if not facts.upheld(found, unit):
            kind = next(iter(backend.kinds))
            yield rule.found(
                at(backend.kinds[kind], found.proxy),
                f"{kind}={backend.name}: after a crash of it this proxy stays active, and holds "
                "its clients until they give up",
            )


def _failing_start(rule: Rule, found: Set) -> Iterator[Finding]:
    for backend in found.backends:
        kind = next((k for k in ("Requires", "BindsTo", "Requisite") if k in backend.kinds), "")
        if not kind or _never_fails(backend) or facts.is_revived(found):
            continue
        message = (
            f"{kind}={backend.name}: if it fails to start, the socket fails with "
            "trigger-limit-hit, and stays so after the repair"
        )
        if found.per_connection:
            message = (
                f"{kind}={backend.name}: if it fails to start, the client's connection is lost"
            )
        yield rule.found(at(backend.kinds[kind], found.proxy), message)


def _never_fails(backend: Backend) -> bool:
    """Tell whether the backend's start job lasts until it succeeds."""
    unit = backend.unit
    if unit is None:
        return False
    direct = unit.choice("Service", "RestartMode") == "direct"
    return direct and facts.restarts(unit)


def _start_limit(rule: Rule, found: Set) -> Iterator[Finding]:
    if found.per_connection or not found.sockets or facts.is_revived(found):
        return  # with Accept=yes each connection has a proxy of its own, which starts once
    proxy = found.proxy
    options = found.command.options
    pauses = [facts.restart_pause(proxy)]
    if options is not None and options.exit_idle_time is not None:
        pauses.append(options.exit_idle_time)
    if not facts.start_limit_off(proxy, min(pauses)):
        yield rule.found(
            proxy.where(("Unit", "StartLimitIntervalSec"), ("Unit", "StartLimitBurst")),
            "a proxy that is started too often takes its socket along: service-start-limit-hit",
        )


def _cannot_start(rule: Rule, found: Set) -> Iterator[Finding]:
    if found.per_connection or not found.sockets or facts.is_revived(found):
        return
    if found.proxy.choice("Service", "Restart", "no") not in ("on-failure", "always"):
        yield rule.found(
            found.proxy.where(("Service", "Restart"), ("Service", "ExecStart")),
            "if the proxy itself cannot start, its socket fails, and stays so after the repair",
        )


def _backend_limit(rule: Rule, found: Set) -> Iterator[Finding]:
    for backend in found.backends:
        unit = backend.unit
        if unit is None or (facts.is_helper(found, backend) and not facts.is_heavy(backend)):
            continue
        if not facts.start_limit_off(unit, facts.restart_pause(unit)):
            yield rule.found(
                unit.where(("Unit", "StartLimitIntervalSec"), ("Unit", "StartLimitBurst")),
                f"after five starts in ten seconds {backend.name} is not started any more, and "
                "clients are lost",
            )


def _trigger_limit(rule: Rule, found: Set) -> Iterator[Finding]:
    proxy = found.proxy
    complete = proxy.choice("Service", "Restart", "no") in ("on-failure", "always") and (
        facts.start_limit_off(proxy, facts.restart_pause(proxy))
    )
    if complete or found.per_connection:
        return
    for socket in found.sockets:
        interval = socket.span("Socket", "TriggerLimitIntervalSec", "2s")
        if interval == 0 or socket.choice("Socket", "TriggerLimitBurst", "200") == "0":
            yield rule.found(
                socket.where(
                    ("Socket", "TriggerLimitIntervalSec"), ("Socket", "TriggerLimitBurst")
                ),
                "without a trigger limit a proxy that cannot start is started without end, and "
                "costs the service manager most of a processor",
            )


RULES = (
    Rule(
        "crash-not-healed",
        "error",
        "Wants=, Upholds= and After= the backend, instead of Requires=",
        "Requires= and Wants= start the backend once, with the proxy. When it crashes, the "
        "proxy stays active, so nothing starts the backend again: every client is held until "
        "--connect-timeout= is over, and each new one puts the idle exit off. Upholds= (systemd "
        "249) starts the backend again as long as the proxy is active. Before 249, Restart= in "
        "the backend does. BindsTo= heals a crash too, but see failing-start-kills-socket.\n"
        "Seen as: `systemctl status PROXY` is active with 'N waiting for ...', BACKEND is "
        "failed.",
        _crash_not_healed,
    ),
    Rule(
        "failing-start-kills-socket",
        "error",
        "Wants= and Upholds= instead, or Restart= with RestartMode=direct in the backend",
        "With Requires= or BindsTo=, a backend that fails to start makes the start of the proxy "
        "fail. The client is still in the queue of the socket, which starts the proxy again at "
        "once, until the socket fails with 'trigger-limit-hit'. Nothing starts a failed socket "
        "again: after the repair of the backend nobody listens. With Wants= the proxy starts, "
        "holds its clients, and Upholds= tries the backend again. Where the dependency cannot "
        "be changed (a drop-in cannot take Requires= away), Restart=on-failure and "
        "RestartMode=direct (systemd 254) in the backend keep its start going until it "
        "succeeds. Under systemd 252, Restart=on-failure alone was seen to be enough.\n"
        "Seen as: `systemctl status SOCKET` says failed (Result: trigger-limit-hit).",
        _failing_start,
    ),
    Rule(
        "start-limit-kills-socket",
        "error",
        "StartLimitIntervalSec=0 in [Unit] of the proxy's service",
        "A service that starts more than StartLimitBurst= times (5) in StartLimitIntervalSec= "
        "(10s) is refused, and the socket that starts it fails with 'service-start-limit-hit'. "
        "A proxy gets there when it is killed a few times, when it ends as soon as it is idle, "
        "or when the limit was lowered. Datagrams that it has left in the queue start it again "
        "at once. A socket starts its service for each client, so the limit guards nothing "
        "here.\n"
        "Seen as: `systemctl status SOCKET` says failed (Result: service-start-limit-hit).",
        _start_limit,
    ),
    Rule(
        "proxy-cannot-start",
        "warning",
        "Restart=on-failure and RestartSec=1s in the proxy's service",
        "A proxy that cannot start, for want of its program or its user, is started by its "
        "socket again and again within milliseconds, until the socket fails for good. With "
        "Restart=on-failure and RestartSec=1s the service manager tries once a second instead, "
        "and the first start after the repair serves the clients that are still waiting.",
        _cannot_start,
    ),
    Rule(
        "backend-start-limit",
        "warning",
        "StartLimitIntervalSec=0 in [Unit] of the backend",
        "A backend on demand starts as often as its clients come and go. After five starts in "
        "ten seconds the service manager refuses the next one, and the client that needed it is "
        "lost.\n"
        "Seen as: 'Start request repeated too quickly' in the journal of the backend.",
        _backend_limit,
    ),
    Rule(
        "trigger-limit-off-alone",
        "warning",
        "StartLimitIntervalSec=0, Restart=on-failure and RestartSec=1s in the proxy instead",
        "TriggerLimitIntervalSec=0 keeps the socket alive when the proxy cannot start, but then "
        "nothing slows the attempts down: with a condition that fails, the service manager was "
        "seen to use 41 % of a processor and to write 1900 log lines a second.",
        _trigger_limit,
    ),
)
