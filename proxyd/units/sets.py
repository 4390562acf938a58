"""The sets of units that are checked: a proxy, its sockets, and the backends that it starts."""

from collections.abc import Iterable

from proxyd.units import command, names
from proxyd.units.command import Command
from proxyd.units.library import Library
from proxyd.units.unit import Unit
from proxyd.units.unitfile import Setting

STARTS = ("Requires", "Requisite", "Wants", "BindsTo", "Upholds")
"""Dependencies that start a backend with the proxy."""

_INSTALLS = (("RequiredBy", "Requires"), ("WantedBy", "Wants"), ("UpheldBy", "Upholds"))

_SYNTHETIC = "1"
"""The instance that stands for a template without known instances."""


class Backend:
    """A service that the proxy starts."""

    __slots__ = ("found", "kinds", "name")

    def __init__(self, name: str, found: Unit | None) -> None:
        self.name = name
        self.found = found
        """None if it has no file here."""
        self.kinds: dict[str, Setting | None] = {}
        """{kind of dependency: where the proxy says it}."""

    @property
    def unit(self) -> Unit | None:
        """Return the unit; None if its settings are unknown: it was not found, or not read."""
        return self.found if self.found is not None and self.found.known else None


class Set:
    """A proxy with its sockets and backends."""

    __slots__ = ("backends", "command", "library", "proxy", "sockets")

    def __init__(self, library: Library, proxy: Unit, run: Command) -> None:
        self.library = library
        self.proxy = proxy
        self.command = run
        self.sockets: list[Unit] = []
        """Those that start the proxy, or that it names; the one with the proxy's name first."""
        self.backends: list[Backend] = []

    @property
    def per_connection(self) -> bool:
        """Tell whether every connection has a proxy of its own (Accept=yes)."""
        return any(socket.flag("Socket", "Accept") for socket in self.sockets)

    def is_named(self, name: str) -> bool:
        """Tell whether `name` is one of the names of the proxy."""
        return name in self.proxy.aliases


def find_sets(library: Library, wanted: Iterable[str]) -> list[Set]:
    """Return the set of each proxy that is among the units `wanted`, or belongs to one of them."""
    index = _Index(library)
    asked = [name for name in wanted if library.path(name) or names.parse(name).instance]
    proxies: dict[str, Set] = {}
    for name in _proxies_of(library, index, asked):
        unit = library.get(name)
        run = command.find(unit) if unit is not None else None
        if unit is not None and run is not None and unit.text not in proxies:
            proxies[unit.text] = _complete(Set(library, unit, run), index)
    return list(proxies.values())


def service_of(socket: Unit) -> str:
    """Return the service that a socket starts; a template for Accept=yes."""
    chosen = socket.value("Socket", "Service")
    if chosen:
        return chosen
    if socket.flag("Socket", "Accept"):
        return names.Name(socket.name.prefix, "", "service").text
    return names.with_type(socket.text, "service")


class _Index:
    """How the library's units refer to others: the service of a socket, and [Install]."""

    def __init__(self, library: Library) -> None:
        self.by_service: dict[str, list[Unit]] = {}
        """{service: the sockets that start it}."""
        self.installed: dict[str, list[tuple[str, Unit]]] = {}
        """{service: [(kind of dependency on it, the unit whose [Install] makes it)]}."""
        for name in library.own_names():
            if name.endswith(".socket"):
                for instance in _instances(library, name):
                    socket = library.get(instance)
                    if socket is not None:
                        self.add(socket)
            elif name.endswith(".service") and "@." not in name:
                unit = library.get(name)
                if unit is not None:
                    self._install(unit)

    def _install(self, unit: Unit) -> None:
        for key, kind in _INSTALLS:
            for owner, _ in unit.installed_by(key):
                self.installed.setdefault(owner, []).append((kind, unit))

    def add(self, socket: Unit) -> None:
        known = self.by_service.setdefault(service_of(socket), [])
        if socket not in known:
            known.append(socket)

    def services(self, template: str) -> list[str]:
        """Return the instances of a template of a service that a socket starts."""
        return [
            service
            for service in self.by_service
            if names.is_unit(service) and names.parse(service).template == template
        ]


def _instances(library: Library, name: str) -> list[str]:
    """Return `name`; for a template, its known instances, or an invented one."""
    parsed = names.parse(name)
    if not parsed.is_template:
        return [name]
    linked = library.linked_instances(name)
    if linked:
        return linked
    template = library.get(names.with_instance(name, _SYNTHETIC))
    default = template.value("Install", "DefaultInstance") if template else ""
    return [names.with_instance(name, default or _SYNTHETIC)]


def _proxies_of(library: Library, index: _Index, wanted: list[str]) -> list[str]:
    """Return the services that may be the wanted proxies."""
    found: list[str] = []
    others: set[str] = set()
    for name in wanted:
        kind = names.parse(name).type
        if kind == "service":
            services = _service_instances(library, index, name)
            found += services
            others |= {one for one in services if not _runs_proxy(library, one)}
        elif kind == "socket":
            sockets = (library.get(instance) for instance in _instances(library, name))
            for socket in filter(None, sockets):
                index.add(socket)
                found += _service_instances(library, index, service_of(socket))
    if others:
        found += _proxies_in_front_of(library, index, others)
    return found


def _service_instances(library: Library, index: _Index, name: str) -> list[str]:
    if not names.is_unit(name) or not names.parse(name).is_template:
        return [name]
    started = [one for one in index.services(name) if not names.parse(one).is_template]
    return started or _instances(library, name)


def _runs_proxy(library: Library, name: str) -> bool:
    unit = library.get(name)
    return unit is not None and command.find(unit) is not None


def _proxies_in_front_of(library: Library, index: _Index, backends: set[str]) -> list[str]:
    """Return the proxies that start one of `backends`."""
    found = []
    for name in library.own_names():
        if not name.endswith(".service"):
            continue
        for one in _service_instances(library, index, name):
            unit = library.get(one)
            if unit is None or command.find(unit) is None:
                continue
            if backends.intersection(unit.dependencies(*STARTS)):
                found.append(one)
    return found


def _complete(found: Set, index: _Index) -> Set:
    found.sockets = _sockets_of(found, index)
    own = {alias for socket in found.sockets for alias in socket.aliases}
    backends: dict[str, Backend] = {}
    for kind in STARTS:
        for name, setting in found.proxy.dependencies(kind).items():
            if not name.endswith(".service") or name in own or found.is_named(name):
                continue
            if name not in backends:
                backends[name] = Backend(name, found.library.get(name))
            backends[name].kinds[kind] = setting
    found.backends = list(backends.values())
    _add_enabled(found, index)
    return found


def _add_enabled(found: Set, index: _Index) -> None:
    """Treat [Install] as the dependencies that it makes when the unit is enabled."""
    for alias in sorted(found.proxy.aliases):
        for kind, unit in index.installed.get(alias, ()):
            backend = next((one for one in found.backends if one.name in unit.aliases), None)
            if backend is None:
                backend = Backend(unit.text, unit)
                found.backends.append(backend)
            backend.kinds.setdefault(kind, None)


def _sockets_of(found: Set, index: _Index) -> list[Unit]:
    """Return the sockets of a proxy, the one with its name first."""
    proxy = found.proxy
    sockets: list[Unit] = []
    for alias in sorted(proxy.aliases | {proxy.name.template or proxy.text}):
        sockets += index.by_service.get(alias, [])
        same = found.library.get(names.with_type(alias, "socket"))
        if same is not None and service_of(same) in proxy.aliases:
            sockets.append(same)
    for setting in proxy.entries("Service", "Sockets"):
        for word in proxy.expand(setting.value).split():
            unit = found.library.get(word)
            if unit is not None:
                sockets.append(unit)
    unique = {socket.text: socket for socket in sockets}
    return sorted(
        unique.values(), key=lambda socket: (socket.name.stem != proxy.name.stem, socket.text)
    )
