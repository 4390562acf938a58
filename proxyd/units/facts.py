"""What the rules ask about services: is it restarted, can it hit a limit, is it always on."""

from proxyd.units import command
from proxyd.units.sets import Backend, Set
from proxyd.units.unit import Unit

AFTER_A_CRASH = ("always", "on-failure", "on-abnormal", "on-abort")
"""Values of Restart= that restart a killed service."""

_DIGITS_MAX = 10  # systemd ignores a number that is longer than 32 bits


def restarts(unit: Unit) -> bool:
    """Tell whether the service manager starts the service again after a crash."""
    return unit.choice("Service", "Restart", "no") in AFTER_A_CRASH


def upheld(found: Set, unit: Unit) -> bool:
    """Tell whether some unit upholds this one: starts it whenever it is not active."""
    if unit.installed_by("UpheldBy"):
        return True
    if any(path.rpartition("/")[0].endswith(".upholds") for _, path in unit.wanted_by):
        return True
    target = found.library.get("sockets.target")
    if target is not None and unit.aliases.intersection(target.dependencies("Upholds")):
        return True
    return any(kind == "Upholds" for _, kind, _ in found.library.dependents(unit.aliases))


def is_revived(found: Set) -> bool:
    """Tell whether failed sockets are started again: another unit upholds them."""
    return bool(found.sockets) and all(upheld(found, socket) for socket in found.sockets)


def start_limit_off(unit: Unit, period: int) -> bool:
    """Tell whether StartLimitIntervalSec= and StartLimitBurst= cannot be hit.

    `period` is the shortest time between two starts, in microseconds.
    """
    interval = unit.span("Unit", "StartLimitIntervalSec", "10s")
    burst = unit.choice("Unit", "StartLimitBurst", "5")
    known = burst.isascii() and burst.isdigit() and len(burst) <= _DIGITS_MAX
    count = int(burst) if known else 5
    if interval == 0 or count == 0:
        return True
    return interval is not None and period * count >= interval


def restart_pause(unit: Unit) -> int:
    """Return the microseconds from a crash to the next start; 0 if a client may cause that."""
    if not restarts(unit):
        return 0
    return unit.span("Service", "RestartSec", "100ms") or 0


def is_oneshot(unit: Unit) -> bool:
    """Tell whether this is a Type=oneshot: a command without a process that stays."""
    kind = unit.choice("Service", "Type")
    return kind == "oneshot" or (not kind and not unit.entries("Service", "ExecStart"))


def is_helper(found: Set, backend: Backend) -> bool:
    """Tell whether this is not the actual backend, but a service that the backend needs.

    It is a oneshot that remains active, such as one that makes a namespace, or, if there is another
    backend, a service that many others need.
    """
    unit = backend.unit
    if unit is not None and is_oneshot(unit) and unit.flag("Service", "RemainAfterExit"):
        return True
    return len(found.backends) > 1 and backend.name.startswith(_NEEDED_BY_MANY)


def is_enabled(unit: Unit) -> str:
    """Return the unit that starts this one at boot, or empty.

    An administrator's unit that has WantedBy= is meant to be enabled. A package's unit counts only
    if it is enabled.
    """
    for owner, _ in unit.wanted_by:
        if owner.endswith(".target"):
            return owner
    if unit.vendors:
        return ""
    for owner, _ in unit.installed_by("WantedBy", "RequiredBy", "UpheldBy"):
        if owner.endswith(".target"):
            return owner
    return ""


def is_heavy(backend: Backend) -> bool:
    """Tell whether the service runs containers by a command, such as docker compose up."""
    return backend.unit is not None and bool(container_command(backend.unit))


def tells_readiness(unit: Unit) -> bool:
    """Tell whether a service is active only once it serves."""
    if unit.choice("Service", "Type") not in _READY:
        return False
    container = container_command(unit)
    return not container or any(
        word in ("--sdnotify=container", "--sdnotify=healthy") for word in container
    )


def container_command(unit: Unit) -> list[str]:
    """Return the words of the command that starts containers, empty if there is none."""
    for line in command.programs(unit, "ExecStart"):
        if any(word.rpartition("/")[2] in _ENGINES for word in line[:2]) or any(
            f"{engine} " in word for engine in _ENGINES for word in line[1:]
        ):
            return [piece for word in line for piece in word.split()]
    return []


_READY = ("notify", "notify-reload", "dbus", "forking", "oneshot")
"""Type= of services that are only active once they serve."""

_NEEDED_BY_MANY = (
    "containerd.",
    "dbus.",
    "docker.",
    "network",
    "NetworkManager",
    "podman.",
    "systemd-",
    "tailscaled.",
    "wg-quick@",
)

_ENGINES = ("podman", "docker", "docker-compose", "podman-compose", "nerdctl")


def joins(first: Unit, other: Unit | None, name: str) -> bool:
    """Tell whether one of the two has JoinsNamespaceOf= the other, which is called `name`."""
    names = {name, *(other.aliases if other else ())}
    if names.intersection(first.dependencies("JoinsNamespaceOf")):
        return True
    return other is not None and bool(
        first.aliases.intersection(other.dependencies("JoinsNamespaceOf"))
    )


def joins_back(proxy: Unit, unit: Unit) -> bool:
    """Tell whether the backend joins the namespace of the proxy."""
    return bool(proxy.aliases.intersection(unit.dependencies("JoinsNamespaceOf")))


def private_network(unit: Unit) -> bool:
    """Tell whether the service has a network of its own, or that of the units that it joins."""
    return unit.flag("Service", "PrivateNetwork")


def private_tmp(unit: Unit) -> bool:
    """Tell whether /tmp and /var/tmp are the service's own."""
    value = unit.choice("Service", "PrivateTmp")
    return (
        value == "disconnected"
        or unit.flag("Service", "PrivateTmp")
        or unit.flag("Service", "DynamicUser")
    )


def network_is_own(found: Set) -> bool:
    """Tell whether the proxy is in another network than its sockets: then it cannot be a loop."""
    proxy = found.proxy
    return (
        found.command.elsewhere
        or private_network(proxy)
        or bool(proxy.value("Service", "NetworkNamespacePath"))
        or bool(proxy.value("Service", "RootDirectory") or proxy.value("Service", "RootImage"))
    )


def required(found: Set, socket: Unit) -> bool:
    """Tell whether the proxy stops and starts with this socket."""
    return bool(socket.aliases.intersection(found.proxy.dependencies("Requires", "BindsTo")))


def ordered(unit: Unit, other: Unit | None, name: str) -> bool:
    """Tell whether the two wait for each other, `other` being called `name`.

    A unit that starts waits for one that stops, whichever of the two is After= the other.
    """
    known = {name, *(other.aliases if other else ())}
    if known.intersection(unit.dependencies("After", "Before")):
        return True
    return other is not None and bool(
        unit.aliases.intersection(other.dependencies("After", "Before"))
    )
