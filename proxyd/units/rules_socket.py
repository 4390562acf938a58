"""Rules: socket units."""

from collections.abc import Iterator
from functools import lru_cache

from proxyd import address
from proxyd.bind import ListenAddress, parse_listen
from proxyd.errors import UsageError
from proxyd.units import facts
from proxyd.units.library import Library
from proxyd.units.rule import Finding, Rule, at
from proxyd.units.sets import Set, service_of
from proxyd.units.specifiers import UNKNOWN
from proxyd.units.unit import Unit
from proxyd.units.unitfile import Setting

_LATE_TARGETS = (
    "basic.target",
    "default.target",
    "graphical.target",
    "multi-user.target",
    "network-online.target",
    "sockets.target",
)
_MAYBE_LATE = ("network.target",)
_INET = (address.AF_INET, address.AF_INET6)
_EARLY = ("systemd-", "networking.", "nftables.", "netfilter-persistent.")
"""Services that start before basic.target, by the beginnings of their names."""


def listens_on(socket: Unit) -> list[tuple[ListenAddress, Setting]]:
    """Return the stream and datagram addresses of a socket unit that can be parsed."""
    found = []
    for key in ("ListenStream", "ListenDatagram"):
        for setting in socket.entries("Socket", key):
            text = socket.expand(setting.value)
            if UNKNOWN in text:
                continue
            try:
                found.append((parse_listen(_in_words(key, text)), setting))
            except (ValueError, UsageError):
                continue
    return found


def _in_words(key: str, text: str) -> str:
    """Return an address as --listen= has it."""
    if key == "ListenStream":
        return text
    return f"unix-dgram:{text}" if text.startswith(("/", "@")) else f"udp:{text}"


def only_datagrams(found: Set) -> bool:
    """Tell whether the proxy gets datagrams, and no connections."""
    listens = [where for socket in found.sockets for where, _ in listens_on(socket)]
    options = found.command.options
    listens += options.listen if options is not None else []
    return bool(listens) and all(where.datagram for where in listens)


def _ordered_after(rule: Rule, found: Set) -> Iterator[Finding]:
    for socket in found.sockets:
        if not _has_defaults(socket):
            continue
        for other, setting in sorted(socket.dependencies("After").items()):
            if setting is None:
                continue
            severity = _lateness(found, other)
            if severity:
                yield rule.found(
                    (setting.path, setting.line),
                    f"After={other}: at boot that waits for sockets.target, which waits for this "
                    "socket; the cycle is broken by leaving out one of them",
                    severity,
                )


def _lateness(found: Set, other: str) -> str:
    """Return whether `other` starts after sockets.target: a severity by certainty, or empty."""
    if other in _LATE_TARGETS:
        return "warning" if other == "network-online.target" else "error"
    if other in _MAYBE_LATE:
        return "warning"
    if not other.endswith(".service"):
        return ""
    unit = found.library.get(other)
    if unit is None and other.startswith(_EARLY):
        return ""
    return "error" if unit is None or _has_defaults(unit) else ""


def _has_defaults(unit: Unit) -> bool:
    return unit.flag("Unit", "DefaultDependencies", default=True)


def _without_freebind(rule: Rule, found: Set) -> Iterator[Finding]:
    for socket in found.sockets:
        free = socket.flag("Socket", "FreeBind") or socket.flag("Socket", "Transparent")
        if socket.user or free or _waits_for_network(socket):
            continue
        for where, setting in listens_on(socket):
            if _is_one_of_ours(where.address):
                yield rule.found(
                    (setting.path, setting.line),
                    f"{where.text} is not there yet when sockets are opened at boot, so that fails",
                )


def _waits_for_network(socket: Unit) -> bool:
    waits = socket.dependencies("After")
    return any(
        other == "network-online.target" or other.endswith((".service", ".device"))
        for other in waits
    )


def _is_one_of_ours(packed: bytes) -> bool:
    """Tell whether an interface must have this address before it can be bound."""
    kind = address.family(packed)
    if kind == address.AF_INET:
        return packed[4] != 127 and packed[4:8] != bytes(4)
    if kind == address.AF_INET6:
        return packed[8:24] not in (bytes(16), bytes(15) + b"\1")
    return False


def _second_socket(rule: Rule, found: Set) -> Iterator[Finding]:
    if found.per_connection:
        return
    for at_, socket in enumerate(found.sockets):
        service = service_of(socket)
        if service not in found.proxy.aliases:
            yield rule.found(
                socket.where(("Socket", "Service"), ("Socket", "ListenStream")),
                f"Sockets= names {socket.text}, which starts {service}: Sockets= does not replace "
                f"Service={found.proxy.text}",
            )
        elif at_ and not facts.required(found, socket):
            yield rule.found(
                found.proxy.where(("Service", "Sockets"), ("Unit", "Requires")),
                f"{socket.text} is refused if the proxy already runs for another socket",
            )


def _same_address(rule: Rule, found: Set) -> Iterator[Finding]:
    own = {socket.text for socket in found.sockets}
    before: list[tuple[Unit, ListenAddress]] = []
    for socket in found.sockets:
        streams = listens_on(socket)
        for where, setting in streams:
            others = _near(found.library, where)
            others = [*before, *(one for one in others if one[0].text not in own)]
            clashes = {unit.text: (unit, one) for unit, one in others if _clash(one, where)}
            for other, clash in clashes.values():
                if not _kept_apart(socket, other):
                    yield rule.found(
                        (setting.path, setting.line),
                        f"{other.text} listens on {clash.text} as well: only one of them starts",
                    )
        before += [(socket, where) for where, _ in streams]


def _near(library: Library, where: ListenAddress) -> list[tuple[Unit, ListenAddress]]:
    """Return the sockets that may clash with an address, with their addresses."""
    streams = _streams(library)
    if _is_wildcard(where.address):
        return streams.get(("port", address.port(where.address)), [])
    near = list(streams.get(("address", where.address), ()))
    if address.family(where.address) in _INET:
        near += streams.get(("wildcard", address.port(where.address)), ())
    return near


@lru_cache(maxsize=1)
def _streams(library: Library) -> dict[object, list[tuple[Unit, ListenAddress]]]:
    """Return {address, port, or port of a wildcard: the sockets there, with their addresses}."""
    found: dict[object, list[tuple[Unit, ListenAddress]]] = {}
    for unit in library.own_units():
        for where, _ in listens_on(unit) if unit.name.type == "socket" else ():
            keys: list[tuple[str, object]] = [("address", where.address)]
            if address.family(where.address) in _INET:
                keys.append(("port", address.port(where.address)))
            if _is_wildcard(where.address):
                keys.append(("wildcard", address.port(where.address)))
            for key in keys:
                found.setdefault(key, []).append((unit, where))
    return found


def _is_wildcard(packed: bytes) -> bool:
    """Tell whether this is 0.0.0.0 or [::]."""
    if address.family(packed) == address.AF_INET:
        return packed[4:8] == bytes(4)
    return address.family(packed) == address.AF_INET6 and packed[8:24] == bytes(16)


def _clash(one: ListenAddress, other: ListenAddress) -> bool:
    if one.datagram != other.datagram:
        path = address.family(one.address) == address.AF_UNIX and "/" in one.text
        return path and one.address == other.address  # one file; a port has two kinds
    if one.address == other.address:
        return address.family(one.address) != address.AF_INET6 or address.port(one.address) != 0
    if address.family(one.address) not in _INET or address.family(other.address) not in _INET:
        return False
    port = address.port(one.address)
    if port != address.port(other.address) or not port:
        return False
    return _covers(one.address, other.address) or _covers(other.address, one.address)


def _covers(wide: bytes, narrow: bytes) -> bool:
    """Tell whether `wide` is a wildcard that includes `narrow`; [::] includes IPv4."""
    if address.family(wide) == address.AF_INET6:
        return wide[8:24] == bytes(16)
    return wide[4:8] == bytes(4) and address.family(narrow) == address.AF_INET


def _kept_apart(one: Unit, other: Unit) -> bool:
    if other.aliases.intersection(one.dependencies("Conflicts")) or one.aliases.intersection(
        other.dependencies("Conflicts")
    ):
        return True
    for unit in (one, other):
        if unit.flag("Socket", "ReusePort") or unit.value("Socket", "BindToDevice"):
            return True
        if unit.choice("Socket", "BindIPv6Only", "default") not in ("default", "both"):
            return True
        if unit.flag("Socket", "PrivateNetwork") or unit.value("Socket", "NetworkNamespacePath"):
            return True
    return False


def _user_target(rule: Rule, found: Set) -> Iterator[Finding]:
    units = [*found.sockets, found.proxy, *(b.unit for b in found.backends if b.unit is not None)]
    for unit in units:
        if not unit.user:
            continue
        for target, setting in unit.installed_by("WantedBy", "RequiredBy"):
            if target in ("multi-user.target", "graphical.target"):
                yield rule.found(
                    at(setting, unit),
                    f"{target} is none of a user's service manager: the unit is never started",
                )


def _wrong_stream(rule: Rule, found: Set) -> Iterator[Finding]:
    for socket in found.sockets:
        for key in ("ListenDatagram", "ListenSequentialPacket", "ListenFIFO", "ListenNetlink"):
            for setting in socket.entries("Socket", key):
                vsock = socket.expand(setting.value).startswith("vsock:")
                if key == "ListenDatagram" and not vsock and not found.command.original:
                    continue
                yield rule.found(
                    (setting.path, setting.line),
                    f"{key}= is no stream socket: the proxy ends with 'Passed in socket is not a "
                    "stream socket.'",
                )


def _accepts_datagrams(rule: Rule, found: Set) -> Iterator[Finding]:
    for socket in found.sockets:
        if not socket.flag("Socket", "Accept"):
            continue
        for setting in socket.entries("Socket", "ListenDatagram"):
            yield rule.found(
                (setting.path, setting.line),
                f"ListenDatagram= with Accept=yes: systemd refuses {socket.text}",
            )


def _before_ready(rule: Rule, found: Set) -> Iterator[Finding]:
    sockets = [socket for socket in found.sockets if _has_datagrams(socket)]
    if not sockets or found.command.original:
        return
    for backend in found.backends:
        if backend.unit is None or not facts.is_heavy(backend):
            continue
        if not facts.tells_readiness(backend.unit):
            yield rule.found(
                backend.unit.where(("Service", "Type"), ("Service", "ExecStart")),
                f"when {backend.name} is ready cannot be known: its container engine takes "
                f"datagrams of {sockets[0].text} before that, and drops them",
            )


def _has_datagrams(socket: Unit) -> bool:
    return any(where.datagram for where, _ in listens_on(socket))


RULES = (
    Rule(
        "socket-ordered-after-service",
        "error",
        "FreeBind= instead, or DefaultDependencies=no with Conflicts= and "
        "Before=shutdown.target, and WantedBy=multi-user.target",
        "Services start after basic.target, which starts after sockets.target, which starts "
        "after every socket. A socket After= a service closes the circle; at boot systemd "
        "breaks it by leaving units out, up to all of sockets.target. `systemd-analyze verify "
        "multi-user.target` sees it, with the units enabled, and only then.\n"
        "Seen as: 'Found ordering cycle' in the journal of the boot.",
        _ordered_after,
    ),
    Rule(
        "address-without-freebind",
        "warning",
        "FreeBind=yes in the socket",
        "Sockets are opened early at boot, before the network has its addresses. ListenStream= "
        "with an address of an interface then fails: 'Cannot assign requested address'. "
        "FreeBind=yes lets it listen on an address that comes later.",
        _without_freebind,
    ),
    Rule(
        "second-socket-not-required",
        "warning",
        "Requires= and After= all sockets in the proxy, Service= in each socket",
        "A socket cannot start while its service runs. If the proxy runs for one of its "
        "sockets, the others can only be started if the proxy required them. Sockets= says "
        "which sockets are handed over, not which service a socket starts: that is Service=, in "
        "the socket.\n"
        "Seen as: 'Socket service ... already active, refusing.'",
        _second_socket,
    ),
    Rule(
        "same-address",
        "warning",
        "an address of its own for each socket",
        "Two sockets cannot listen on one address. A port alone, and [::], take the port of "
        "IPv4 as well.",
        _same_address,
    ),
    Rule(
        "user-unit-wanted-by-multi-user",
        "warning",
        "WantedBy=sockets.target for the socket, WantedBy=default.target for a service",
        "A user's service manager has default.target and sockets.target. A unit that is enabled "
        "in multi-user.target, which it does not have, is enabled without an effect.",
        _user_target,
    ),
    Rule(
        "not-a-stream",
        "error",
        "ListenStream=",
        "The proxy forwards streams and, other than the original, datagrams over IPv4, IPv6 and "
        "UNIX sockets. Both refuse to start with any other socket.",
        _wrong_stream,
    ),
    Rule(
        "accept-with-datagrams",
        "error",
        "Accept=no",
        "Datagrams have no connection that could be accepted. systemd refuses to start the "
        "socket, and one proxy serves all its clients anyway.\n"
        "Seen as: 'Unit configured for accepting sockets, but sockets are non-accepting. "
        "Refusing.'",
        _accepts_datagrams,
    ),
    Rule(
        "datagrams-before-ready",
        "warning",
        "Type=notify in the backend, with `podman run --sdnotify=container` (or =healthy where "
        "Podman has that), and After= in the proxy",
        "The proxy holds datagrams while the target refuses them. A published port of a "
        "container is taken by the engine before the application in it listens: nothing refuses "
        "what comes by then, and it is lost. If systemd knows when the backend is ready, the "
        "proxy starts only then, and the first datagrams wait in the queue of the socket.",
        _before_ready,
    ),
)
