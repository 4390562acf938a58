"""All units of a machine, of a folder, or both: found as systemd finds them, loaded when asked for.

Folders are searched in order, the first file of a name wins (systemd.unit(5), UNIT FILE LOAD PATH).
Drop-ins of all folders apply, sorted by their names; of two with one name the first folder's wins.
"""

import os
import stat
from collections.abc import Iterable

from proxyd.errors import reason
from proxyd.units import names, paths, quadlet, unitfile
from proxyd.units.unit import DEPENDENCIES, Unit
from proxyd.units.unitfile import Problem, Setting, UnitFile

_DEPENDENCY_FOLDERS = {".wants": "Wants", ".requires": "Requires", ".upholds": "Upholds"}


class Library:
    """Units by name. `problems` are those of folders and of files that could not be followed."""

    def __init__(self, folders: list[str], root: str = "", user: bool = False) -> None:
        """Search `folders`, absolute paths; symlinks in them are followed inside `root`."""
        self.root = root.rstrip("/")
        self.user = user
        self.folders = folders
        self.problems: list[Problem] = []
        self._entries: dict[str, list[str]] = {}
        """{name of a file or folder: its paths by precedence}."""
        self._quadlets: dict[str, quadlet.Source] = {}
        """{name of a service: the file that Quadlet makes it from}."""
        self._linked: dict[str, list[tuple[str, str]]] = {}
        """{unit: [(unit that depends on it by a symlink, that symlink)]}."""
        self._links: dict[str, list[tuple[str, str, str]]] = {}
        """{unit: [(kind of dependency, unit that it depends on by a symlink, that symlink)]}."""
        self._drop_in_dirs: set[str] = set()
        self._aliases: dict[str, set[str]] = {}
        self._units: dict[str, Unit | None] = {}
        self._seen: set[str] = set()
        self._own: list[Unit] | None = None
        self._dependents: dict[str, list[tuple[Unit, str, Setting | None]]] | None = None
        for folder in folders:
            self._index(folder)
        self._index_aliases()

    def add_quadlets(self, folders: list[str]) -> None:
        """Add the services that Quadlet would make of the files in `folders`."""
        for folder in folders:
            for path in self._scan(folder):
                source = quadlet.source(path)
                if source is not None:
                    self._quadlets.setdefault(source.service, source)

    def own_names(self) -> list[str]:
        """Return the units and templates whose file did not come with a package."""
        listed = [name for name in self._entries if names.is_unit(name)]
        listed += [name for name in self._quadlets if name not in self._entries]
        return sorted(name for name in listed if not self._is_vendors(name))

    def own_units(self) -> list[Unit]:
        """Return the units, templates left out, whose file did not come with a package."""
        if self._own is None:
            loaded = (self.get(name) for name in self.own_names() if "@." not in name)
            self._own = [unit for unit in loaded if unit is not None]
        return self._own

    def dependents(self, names_: Iterable[str]) -> list[tuple[Unit, str, Setting | None]]:
        """Return which of own_units() depend on a unit of these names: (unit, kind, where).

        What the service manager tells has to be known by then.
        """
        if self._dependents is None:
            self._dependents = {}
            for unit in self.own_units():
                for kind in DEPENDENCIES:
                    for other, setting in unit.dependencies(kind).items():
                        self._dependents.setdefault(other, []).append((unit, kind, setting))
        return [one for name in sorted(names_) for one in self._dependents.get(name, ())]

    def all_names(self) -> list[str]:
        """Return every unit and template that has a file."""
        listed = {name for name in self._entries if names.is_unit(name)}
        return sorted(listed | set(self._quadlets))

    def linked_instances(self, template: str) -> list[str]:
        """Return the instances of a template that are enabled somewhere."""
        found = set()
        for unit in self._linked:
            if names.is_unit(unit):
                name = names.parse(unit)
                if name.template == template and not name.is_template:
                    found.add(unit)
        return sorted(found)

    def path(self, name: str) -> str:
        """Return the path of a unit's file, empty if there is none."""
        found = self._entries.get(name)
        if found:
            return found[0]
        source = self._quadlets.get(name)
        return source.path if source else ""

    def get(self, name: str) -> Unit | None:
        """Load a unit, or an instance of a template; None if there is no file, or it is masked."""
        if name not in self._units:
            self._units[name] = self._load(name)
        return self._units[name]

    # Finding files.

    def _index(self, folder: str) -> None:
        real = os.path.realpath(folder)
        if real in self._seen:  # /lib is /usr/lib on most machines
            return
        self._seen.add(real)
        for path in self._scan(folder):
            self._entries.setdefault(os.path.basename(path), []).append(path)
            stem, kind = os.path.splitext(path)
            if kind == ".d":
                self._drop_in_dirs.add(path)
            elif kind in _DEPENDENCY_FOLDERS:
                self._index_links(path, os.path.basename(stem), _DEPENDENCY_FOLDERS[kind])

    def _index_links(self, folder: str, owner: str, key: str) -> None:
        links = self._links.setdefault(owner, [])
        known = {link[:2] for link in links}
        for path in self._scan(folder):
            name = os.path.basename(path)
            if (key, name) not in known and os.path.islink(path):
                links.append((key, name, path))
                self._linked.setdefault(name, []).append((owner, path))

    def _scan(self, folder: str) -> list[str]:
        try:
            return sorted(f"{folder}/{name}" for name in os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            message = f"cannot be read: {reason(error)}"
            self.problems.append(Problem(folder, 0, message, fatal=True))
            return []

    def _index_aliases(self) -> None:
        """Find symlinks that give a unit another name."""
        for name in self._entries:
            if names.is_unit(name):
                real = self._follow(name)[0]
                if real != name:
                    self._aliases.setdefault(real, set()).add(name)

    def _follow(self, name: str) -> tuple[str, str]:
        """Return the final name of a unit, and the file that it is read from.

        The file is empty if there is none, and /dev/null if the unit is masked.
        """
        path = self._entries[name][0]
        try:
            chain = paths.resolve(path, self.root)
        except (paths.LoopError, OSError) as error:
            message = f"cannot be followed: {reason(error)}"
            self.problems.append(Problem(path, 0, message, fatal=True))
            return name, ""
        if chain[-1] == f"{self.root}/dev/null":
            return name, "/dev/null"
        for target in chain[1:]:  # a link out of the search path leads to a file, not to a name
            own = os.path.basename(target)
            if own in self._entries and os.path.dirname(target) in self._search_folders():
                name = own
        return name, chain[-1]

    def _search_folders(self) -> set[str]:
        return {os.path.normpath(folder) for folder in self.folders}

    def _is_vendors(self, name: str) -> bool:
        return paths.is_vendors(self.path(name).removeprefix(self.root))

    # Loading.

    def _load(self, name: str) -> Unit | None:
        if not names.is_unit(name):
            return None
        parsed = names.parse(name)
        source = name if name in self._entries else parsed.template or ""
        if source not in self._entries:
            return self._load_quadlet(parsed) or self._load_target(parsed)
        real, path = self._follow(source)
        if not path or _is_empty(path):
            return None
        own = self._real_name(parsed, real)
        if own.text != name:
            return self.get(own.text)
        unit = Unit(own, path, self.user)
        unit.vendors = paths.is_vendors(path.removeprefix(self.root))
        self._complete(unit, unitfile.read(path), real)
        return unit

    def _load_quadlet(self, name: names.Name) -> Unit | None:
        source = self._quadlets.get(name.text) or self._quadlets.get(name.template or "")
        if source is None:
            return None
        unit = Unit(name, source.path, self.user)
        unit.vendors = paths.is_vendors(source.path.removeprefix(self.root))
        self._complete(unit, quadlet.service_file(source), name.template or name.text)
        return unit

    def _load_target(self, name: names.Name) -> Unit | None:
        """Load the drop-ins of a target whose own file belongs to systemd and is not here."""
        unit = Unit(name, f"{name.text}.d", self.user)
        drop_ins = self._drop_ins(unit) if name.type == "target" else []
        if not drop_ins:
            return None
        unit.files = [unitfile.read(path) for path in drop_ins]
        return unit

    def _complete(self, unit: Unit, file: UnitFile, source: str) -> None:
        unit.files = [file]
        for alias in {source, *self._aliases.get(source, ())}:
            unit.aliases.add(self._real_name(unit.name, alias).text)
        unit.files += [unitfile.read(path) for path in self._drop_ins(unit)]
        for alias in sorted(unit.aliases):
            unit.wanted_by += self._linked.get(alias, ())
        for owner in sorted(unit.aliases | {unit.name.template or unit.text}):
            for key, other, path in self._links.get(owner, ()):
                unit.folders.setdefault(key, []).append((other, path))

    @staticmethod
    def _real_name(asked: names.Name, real: str) -> names.Name:
        """Return the name that an alias stands for, with the instance that was asked for."""
        parsed = names.parse(real)
        if parsed.is_template and asked.instance:
            parsed.instance = asked.instance
        return parsed

    def _drop_ins(self, unit: Unit) -> list[str]:
        """Return the drop-ins of a unit in the order in which they apply."""
        chosen: dict[str, str] = {}
        for folder in self._drop_in_folders(unit):
            for path in self._scan(folder):
                name = os.path.basename(path)
                if name.endswith(".conf"):
                    chosen.setdefault(name, path)
        return [path for _, path in sorted(chosen.items()) if not _is_empty(path)]

    def _drop_in_folders(self, unit: Unit) -> list[str]:
        """Return folders of drop-ins: the unit's own first, then its template's, its prefixes'."""
        own = sorted(unit.aliases, key=lambda alias: alias != unit.text)
        by_folder: list[str] = []
        for alias in own:
            candidates = list(_drop_in_names(names.parse(alias)))
            for folder in self.folders:
                by_folder += [f"{folder}/{name}.d" for name in candidates]
        by_folder += [f"{folder}/{unit.name.type}.d" for folder in self.folders]
        return [path for path in by_folder if path in self._drop_in_dirs]


def _drop_in_names(name: names.Name) -> list[str]:
    """Return the names under which a unit may have drop-ins, the most specific first.

    An instance has the prefixes of a plain unit: a-b@i.service has a-.service.d.
    """
    found = [name.text]
    if name.template and not name.is_template:
        found.append(name.template)
    base = name.prefix.rstrip("-")
    while "-" in base:
        base = base.rpartition("-")[0].rstrip("-")
        found.append(f"{base}-.{name.type}")
    return found


def _is_empty(path: str) -> bool:
    """Tell whether a file masks what it stands for: empty, or a link to /dev/null."""
    try:
        status = os.stat(path)
    except OSError:
        return False  # reading it will report why
    if stat.S_ISREG(status.st_mode):
        return not status.st_size
    return os.path.realpath(path) == "/dev/null"
