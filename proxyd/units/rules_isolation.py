"""Rules: namespaces and sandboxes that come between the proxy and its target."""

from collections.abc import Iterator

from proxyd import address
from proxyd.target import Target
from proxyd.units import facts
from proxyd.units.rule import Finding, Rule, at
from proxyd.units.sets import STARTS, Set
from proxyd.units.unit import Unit
from proxyd.units.unitfile import Setting

_TEMPORARY = ("/tmp/", "/var/tmp/")  # noqa: S108 - what units say


def _joined(found: Set) -> dict[str, tuple[Setting | None, Unit | None]]:
    """Return the units that the proxy joins: the setting, and the unit if it is known."""
    names = found.proxy.dependencies("JoinsNamespaceOf")
    return {name: (setting, found.library.get(name)) for name, setting in names.items()}


def _targets(found: Set) -> list[Target]:
    options = found.command.options
    return [target for _, target in options.targets] if options is not None else []


def _path_of(target: Target) -> str:
    """Return the path of a UNIX target, empty for any other."""
    if target.address is None or address.family(target.address) != address.AF_UNIX:
        return ""
    text = target.text.removeprefix("unix:")
    return text if text.startswith("/") else ""


def _needs_network(target: Target) -> bool:
    """Tell whether reaching the target depends on the network namespace; VSOCK does not."""
    if target.address is not None and address.family(target.address) == address.AF_VSOCK:
        return False
    return not _path_of(target)


def _is_local(target: Target) -> bool:
    """Tell whether the target can only be in the same network namespace."""
    host = target.text.removeprefix("[")
    return host.startswith(("127.", "localhost", "::1", "@", "unix:@"))


def _alone(rule: Rule, found: Set) -> Iterator[Finding]:
    proxy = found.proxy
    target = next((one for one in _targets(found) if _needs_network(one)), None)
    if target is None or found.command.elsewhere or proxy.value("Service", "NetworkNamespacePath"):
        return
    if facts.private_network(proxy):
        if not _shares_network(found):
            yield rule.found(
                proxy.where(("Service", "PrivateNetwork")),
                f"{target.text} cannot be reached: the proxy is alone in its private network",
            )
        return
    for backend in found.backends:
        unit = backend.unit
        apart = unit is not None and (
            facts.private_network(unit) or unit.value("Service", "NetworkNamespacePath")
        )
        if apart and _is_local(target):
            yield rule.found(
                proxy.where(("Unit", "JoinsNamespaceOf"), ("Service", "ExecStart")),
                f"{target.text} cannot be reached: {backend.name} is in another network than the "
                "proxy",
            )


def _shares_network(found: Set) -> bool:
    """Tell whether another unit is, or may be, in the private network of the proxy."""
    for _, unit in _joined(found).values():
        if (
            unit is None
            or facts.private_network(unit)
            or unit.value("Service", "NetworkNamespacePath")
        ):
            return True
        if facts.private_tmp(unit):
            return True  # join-cancels-isolation
    return any(
        kind == "JoinsNamespaceOf" and facts.private_network(unit)
        for unit, kind, _ in found.library.dependents(found.proxy.aliases)
    )


def _without_requirement(rule: Rule, found: Set) -> Iterator[Finding]:
    wanted = found.proxy.dependencies(*STARTS)
    for name, (setting, unit) in _joined(found).items():
        known = {name, *(unit.aliases if unit else ())}
        installed = any(backend.name in known for backend in found.backends)
        if known.intersection(wanted) or installed:
            continue
        if unit is None or not facts.joins_back(found.proxy, unit):
            yield rule.found(
                at(setting, found.proxy),
                f"JoinsNamespaceOf={name} without Wants=: a proxy that starts before it is not in "
                "its namespace",
            )
        elif not facts.is_enabled(unit):
            yield rule.found(
                at(setting, found.proxy),
                f"JoinsNamespaceOf={name} without Wants=: nothing starts it with the proxy",
            )


def _one_sided(rule: Rule, found: Set) -> Iterator[Finding]:
    for name, (setting, unit) in _joined(found).items():
        if unit is None or not facts.private_network(unit):
            continue
        if not facts.joins_back(found.proxy, unit):
            yield rule.found(
                at(setting, found.proxy),
                f"{name} does not join back: up to systemd 252, after a start of it that failed, "
                "the two are in different networks",
            )


def _cancels(rule: Rule, found: Set) -> Iterator[Finding]:
    if not facts.private_network(found.proxy):
        return
    for name, (setting, unit) in _joined(found).items():
        if unit is None or facts.private_network(unit) or not facts.private_tmp(unit):
            continue
        if not unit.value("Service", "NetworkNamespacePath"):
            yield rule.found(
                at(setting, found.proxy),
                f"{name} has no PrivateNetwork=yes: the proxy is in the network of the host, in "
                "spite of its own PrivateNetwork=yes",
            )


def _hidden_target(rule: Rule, found: Set) -> Iterator[Finding]:
    path = next((p for p in map(_path_of, _targets(found)) if p.startswith(_TEMPORARY)), "")
    if not path:
        return
    proxy = found.proxy
    own = facts.private_tmp(proxy)
    if own and not found.backends:
        yield rule.found(
            proxy.where(("Service", "PrivateTmp"), ("Service", "DynamicUser")),
            f"{path} cannot be reached: the proxy has a temporary folder of its own",
        )
    for backend in found.backends:
        unit = backend.unit
        theirs = unit is not None and facts.private_tmp(unit)
        shared = own and theirs and facts.joins(proxy, unit, backend.name)
        if (own or theirs) and not shared:
            whose = proxy if own or unit is None else unit
            yield rule.found(
                whose.where(("Service", "PrivateTmp"), ("Service", "DynamicUser")),
                f"{path} cannot be reached: {whose.text} has a temporary folder of its own",
            )


def _families(rule: Rule, found: Set) -> Iterator[Finding]:
    proxy = found.proxy
    if proxy.choice("Service", "Type") not in ("notify", "notify-reload"):
        return
    settings = proxy.entries("Service", "RestrictAddressFamilies")
    if settings and "AF_UNIX" not in _allowed_families([s.value for s in settings]):
        yield rule.found(
            (settings[-1].path, settings[-1].line),
            "without AF_UNIX the proxy cannot say that it is ready: its start never ends, or fails",
        )


def _allowed_families(values: list[str]) -> set[str]:
    """Return the families that RestrictAddressFamilies= allows, as far as AF_UNIX matters."""
    allowed: set[str] | None = None
    for value in values:
        inverted = value.startswith("~")
        families = set(value.removeprefix("~").split())
        if value == "none":
            allowed = set()
        elif allowed is None:
            allowed = {"AF_UNIX"} - families if inverted else families
        elif inverted:
            allowed -= families
        else:
            allowed |= families
    return allowed or set()


def _no_capability(rule: Rule, found: Set) -> Iterator[Finding]:
    proxy, options = found.proxy, found.command.options
    if options is None or options.source is None or not options.source.client:
        return
    if proxy.choice("Service", "PrivateUsers", "no") not in ("no", "false", "off", "0", "n", "f"):
        yield rule.found(
            proxy.where(("Service", "PrivateUsers")),
            "with PrivateUsers= no capability counts for the network of the machine",
        )
        return
    ambient, bounding = (
        [setting.value for setting in proxy.entries("Service", key)]
        for key in ("AmbientCapabilities", "CapabilityBoundingSet")
    )
    is_root = proxy.value("Service", "User", "root") in ("root", "0")
    is_root = is_root and not proxy.flag("Service", "DynamicUser") and not proxy.user
    if proxy.all("Service", "CapabilityBoundingSet") and not _has_capability(bounding):
        key, why = "CapabilityBoundingSet", "CapabilityBoundingSet= lacks it"
    elif not is_root and not _has_capability(ambient):
        key, why = "AmbientCapabilities", "a user other than root has none"
    else:
        return
    yield rule.found(
        proxy.where(("Service", key), ("Service", "ExecStart")),
        f"--source=client needs a capability: {why}",
    )


def _has_capability(values: list[str]) -> bool:
    """Tell whether a list of capabilities has one that --source=client can do with."""
    wanted = {"CAP_NET_ADMIN", "CAP_NET_RAW"}
    held: set[str] = set()
    for number, value in enumerate(values):
        words = set(value.removeprefix("~").upper().split()) & wanted
        if value.startswith("~"):
            held = (held if number else wanted) - words
        else:
            held |= words
    return bool(held)


RULES = (
    Rule(
        "private-network-alone",
        "error",
        "PrivateNetwork=yes and JoinsNamespaceOf= each other in both, or no PrivateNetwork=",
        "PrivateNetwork=yes gives a service a network with nothing in it but its own loopback. "
        "TCP and abstract UNIX targets are then out of reach; socket files are not. "
        "JoinsNamespaceOf= the backend, and PrivateNetwork=yes in both, let the two share one "
        "network.\n"
        "Seen as: 'Failed to connect to remote host: Connection refused' while the backend "
        "listens.",
        _alone,
    ),
    Rule(
        "join-without-requirement",
        "error",
        "Wants= and After= the unit that is joined",
        "A namespace is joined by the unit that starts second; a proxy that starts first, and that "
        "the other does not join, gets one of its own. After= alone orders two starts, but makes "
        "none: Wants= (or Requires=) does. From systemd 257 on, JoinsNamespaceOf= of one unit "
        "counts for both, so that this happens no longer.",
        _without_requirement,
    ),
    Rule(
        "join-one-sided",
        "error",
        "JoinsNamespaceOf= the proxy in the backend, too",
        "Up to systemd 252, a backend whose start has failed gets a new network at its next "
        "start, while the proxy is still in the old one. With JoinsNamespaceOf= in both units "
        "it joins the proxy's. From systemd 257 on, that of one unit counts for both.",
        _one_sided,
    ),
    Rule(
        "join-cancels-isolation",
        "error",
        "PrivateNetwork=yes in both units, or in neither",
        "Units that share a namespace share all that one of them has. If the backend has "
        "PrivateTmp=yes but no PrivateNetwork=, what it hands to the proxy is the network of "
        "the host: the proxy's own PrivateNetwork=yes is without effect, and without a word in "
        "the log.",
        _cancels,
    ),
    Rule(
        "private-tmp-hides-target",
        "error",
        "RuntimeDirectory= in the backend, and the socket in there",
        "PrivateTmp=yes, and DynamicUser=yes, which implies it, give a service a /tmp and a "
        "/var/tmp of its own: a socket file in there is invisible to others.\n"
        "Seen as: 'Failed to connect to remote host: No such file or directory'.",
        _hidden_target,
    ),
    Rule(
        "families-without-unix",
        "error",
        "AF_UNIX in RestrictAddressFamilies=",
        "Type=notify tells the service manager over a UNIX socket that the proxy is ready. Without "
        "AF_UNIX in RestrictAddressFamilies= that message is not sent: the proxy serves, but is "
        "starting until its start times out, or fails because the proxy ends when idle.\n"
        "Seen as: activating in `systemctl status PROXY`; 'Failed with result 'protocol''.",
        _families,
    ),
    Rule(
        "source-without-capability",
        "error",
        "AmbientCapabilities=CAP_NET_RAW, the same in CapabilityBoundingSet=, no PrivateUsers=",
        "--source=client sends from addresses that are not this machine's. That needs CAP_NET_RAW "
        "or CAP_NET_ADMIN, which a user other than root has only by AmbientCapabilities=, and "
        "which counts for nothing in a user namespace of its own.\n"
        "Seen as: '--source=client needs the capability CAP_NET_ADMIN or CAP_NET_RAW'.",
        _no_capability,
    ),
)
