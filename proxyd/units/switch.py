"""`switch`: what an existing unit needs to run our proxy, and to heal.

Nearly all of it fits into a drop-in. A dependency does not: it cannot be taken away, so where
Requires= or BindsTo= of a backend has to go, the unit is written anew.
"""

import os

from proxyd.errors import UsageError
from proxyd.units import check, facts, names, recipes, report, rules_command, text
from proxyd.units.command import PROGRAM
from proxyd.units.library import Library
from proxyd.units.sets import Backend, Set, find_sets
from proxyd.units.text import Section, Text
from proxyd.units.unit import DEPENDENCIES, Unit
from proxyd.units.unitfile import Setting

_GOES = ("Requires", "Requisite", "BindsTo")

Row = tuple[str, str]


class Plan:
    """What changes, and why."""

    __slots__ = ("drops", "reasons", "service", "unit")

    def __init__(self) -> None:
        self.unit: list[Row] = []
        """Added to [Unit]."""
        self.service: list[Row] = []
        """Added to [Service]; a key replaces that of the unit."""
        self.drops: dict[str, set[str]] = {}
        """Dependencies to remove: {kind: units}."""
        self.reasons: list[str] = []

    def add(self, section: list[Row], rows: list[Row], reason: str) -> None:
        """Add rows to a section, with their reason."""
        section += rows
        self.reasons.append(f"{rows[-1][0]}={rows[-1][1]}: {reason}")


class Result:
    """The result of a switch."""

    __slots__ = ("before", "files", "findings", "remarks")

    def __init__(self, files: list[Text], one: Set, remarks: list[str]) -> None:
        user, others = one.proxy.user, _others(one)
        self.files = files
        self.findings = text.try_out(files, others, user)
        """What `check` finds in the result."""
        self.before = {finding.rule for finding in text.try_out([], others, user)}
        """The rules that already found something before the switch."""
        self.remarks = remarks

    @property
    def spoils(self) -> bool:
        """Tell whether the switch would introduce errors."""
        new = [finding for finding in self.findings if finding.rule not in self.before]
        return report.reaches(new, "error")


def switch(argument: str, scope: check.Scope) -> Result:
    """Return the files that switch a unit. Raises UsageError."""
    one = _find(argument, scope)
    if one.command.error and not one.command.original:
        raise UsageError(f"{one.proxy.text}: {one.command.error}")
    plan = _plan(one)
    proxy = _whole(one, plan) if plan.drops else _drop_in(one, plan)
    files = [proxy, *(_for_backend(one, backend) for backend in _own_backends(one))]
    files = [file for file in files if file.sections]
    return Result(files, one, _remarks(one, bool(plan.drops)))


def _find(argument: str, scope: check.Scope) -> Set:
    if "/" in argument or os.path.isfile(argument):
        folder, unit = check.of_file(argument)
        library = scope.library(folder)
    else:
        unit, library = names.mangle(argument), scope.library()
    if not names.is_unit(unit):
        raise UsageError(f"{argument}: is not a unit")
    if not library.path(unit) and not names.parse(unit).instance:
        raise UsageError(_why_not(argument, library))
    loaded = library.get(unit)
    if loaded is not None and loaded.fault is not None:
        raise UsageError(f"{argument}: {loaded.fault.message}")
    sets = find_sets(library, [unit])
    if not sets:
        raise UsageError(f"{argument}: does not run {PROGRAM}")
    if len(sets) > 1:
        several = " ".join(one.proxy.text for one in sets)
        raise UsageError(f"{argument}: belongs to several proxies, name one of them: {several}")
    return sets[0]


def _why_not(argument: str, library: Library) -> str:
    """Return why a unit is not in the library: its folder may be one that cannot be read."""
    for problem in library.problems:
        if problem.path in library.folders and "/" in argument:
            return f"{problem.path}: {problem.message}"
    return f"{argument}: no such unit"


def _plan(one: Set) -> Plan:
    plan = Plan()
    _plan_sockets(one, plan)
    for backend in one.backends:
        _plan_backend(one, backend, plan)
    _plan_limits(one, plan)
    _plan_command(one, plan)
    _plan_inspection(one, plan)
    return plan


def _plan_sockets(one: Set, plan: Plan) -> None:
    if one.per_connection:
        return
    for socket in one.sockets:
        if not facts.required(one, socket):
            name = _generic(one, socket.text)
            reason = "so that it can be restarted while the proxy runs"
            plan.add(plan.unit, [("After", name), ("Requires", name)], reason)


def _plan_backend(one: Set, backend: Backend, plan: Plan) -> None:
    name = _generic(one, backend.name)
    if facts.is_helper(one, backend) and not facts.is_heavy(backend):
        return
    for kind in _GOES:
        if kind in backend.kinds:
            plan.drops.setdefault(kind, set()).add(backend.name)
            plan.reasons.append(
                f"{kind}={name} is gone: a start of it that fails leaves a dead socket"
            )
    if "Wants" not in backend.kinds:
        plan.add(plan.unit, [("Wants", name)], "starts it with the proxy")
    if "Upholds" not in backend.kinds:
        plan.add(plan.unit, [("Upholds", name)], "starts it again after a crash")
    if not facts.ordered(one.proxy, backend.unit, backend.name):
        plan.add(plan.unit, [("After", name)], "a client that comes while it stops waits")


def _plan_limits(one: Set, plan: Plan) -> None:
    proxy = one.proxy
    if not one.per_connection:
        if not facts.start_limit_off(proxy, 0):
            reason = "a limit on starts would take the socket along"
            plan.add(plan.unit, list(recipes.HEALS), reason)
        restart = proxy.choice("Service", "Restart", "no")
        if restart != "on-failure":
            rows = list(recipes.RESTARTS)
            plan.add(plan.service, rows, "a proxy that cannot start is tried once a second")
    if proxy.flag("Unit", "StopWhenUnneeded"):
        rows = [("StopWhenUnneeded", "no")]
        plan.add(plan.unit, rows, "a socket does not need its service")


def _plan_command(one: Set, plan: Plan) -> None:
    setting = one.command.setting
    words = setting.value.split()
    at = next(at for at, word in enumerate(words) if word.rstrip("'\"").endswith(PROGRAM))
    path = words[at].lstrip("@-:+!|'\"").rstrip("'\"")
    options = _new_options(one)
    new = setting.value.replace(path, recipes.PROGRAM, 1)
    if one.command.sure and options:
        before = recipes.PROGRAM
        if "@" in words[at].partition("/")[0] and at + 1 < len(words):
            before = f"{before} {words[at + 1]}"  # what follows @PATH is argv[0]
        new = new.replace(before, " ".join([before, *options]), 1)
    if new != setting.value:
        plan.service += [("ExecStart", ""), ("ExecStart", new)]
        plan.reasons.append(f"ExecStart=: {' '.join(['our program', *options])}")


def _plan_inspection(one: Set, plan: Plan) -> None:
    name = one.proxy.name
    has = one.proxy.entries("Service", "RuntimeDirectory") or "inspect" in one.command.given
    if has or one.per_connection or "\\" in (name.instance or ""):
        return
    row = ("RuntimeDirectory", recipes.runtime_directory(name.text))
    plan.add(plan.service, [row], "for the socket on which socket-proxyctl asks it")


def _new_options(one: Set) -> list[str]:
    """Return the options that the command line lacks."""
    run = one.command
    if run.options is None:
        return []
    options = []
    if one.backends and "connect-timeout" not in run.given:
        options.append("--connect-timeout=1min")
    published = any(rules_command.published_port(one, backend) for backend in one.backends)
    if published and "settle-time" not in run.given:
        options.append(recipes.SETTLES)
    idle = run.options.exit_idle_time
    if idle is not None and run.options.idle_timeout is None and not one.per_connection:
        options.append(f"--idle-timeout={max(idle // 1_000_000, 60)}s")
    return options


def _generic(one: Set, unit: str) -> str:
    """Return how the file of a template writes the name of a unit."""
    proxy = one.proxy.name
    if not proxy.instance or proxy.instance not in unit:
        return unit
    parsed = names.parse(unit)
    if parsed.instance == proxy.instance:
        return names.Name(parsed.prefix, "%i", parsed.type).text
    return unit


# Writing the files.


def _file_name(one: Set) -> str:
    return os.path.basename(one.proxy.shown)


def _head(plan: Plan, what: str) -> list[str]:
    return [what, *(f"- {reason}" for reason in plan.reasons)]


def _drop_in(one: Set, plan: Plan) -> Text:
    sections: list[Section] = [("Unit", plan.unit), ("Service", plan.service)]
    name = f"{_file_name(one)}.d/{recipes.DROP_IN}"
    return Text(name, sections, _head(plan, f"Makes {_file_name(one)} run this proxy, and heal."))


def _whole(one: Set, plan: Plan) -> Text:
    """Write the unit anew, its drop-ins merged, without the dependencies to remove."""
    sections: dict[str, list[Row]] = {}
    for setting in _effective(one):
        value = _without(one, setting, plan)
        if value is not None:
            sections.setdefault(setting.section, []).append((setting.key, value))
    for title, rows in (("Unit", plan.unit), ("Service", plan.service)):
        new = {key for key, _ in rows} - set(DEPENDENCIES)
        old = [row for row in sections.get(title, []) if row[0] not in new]
        sections[title] = old + [row for row in rows if row[1]]
    places = ", ".join(file.path for file in one.proxy.files)
    head = f"In place of {places}: a drop-in cannot take a dependency away."
    order = sorted(sections, key=lambda title: (title != "Unit", title == "Install"))
    return Text(_file_name(one), [(title, sections[title]) for title in order], _head(plan, head))


def _effective(one: Set) -> list[Setting]:
    """Return the settings of the unit and its drop-ins that no later one has reset."""
    kept: list[Setting] = []
    for file in one.proxy.files:
        for setting in file.settings:
            if setting.value:
                kept.append(setting)
            elif setting.key not in DEPENDENCIES:
                kept = [s for s in kept if (s.section, s.key) != (setting.section, setting.key)]
    return kept


def _without(one: Set, setting: Setting, plan: Plan) -> str | None:
    """Return what remains of a dependency, or None if nothing does."""
    gone = plan.drops.get(setting.key)
    if setting.section != "Unit" or gone is None:
        return setting.value
    proxy = one.proxy
    left = [word for word in setting.value.split() if proxy.meant(word) not in gone]
    return " ".join(left) if left else None


def _own_backends(one: Set) -> list[Backend]:
    return [b for b in one.backends if not facts.is_helper(one, b) or facts.is_heavy(b)]


def _for_backend(one: Set, backend: Backend) -> Text:
    """Write a drop-in with the settings that the backend lacks."""
    rows: list[Row] = []
    unit = backend.unit
    rests = one.command.rests and (unit is None or not facts.is_enabled(unit))
    if rests and not (unit is not None and unit.flag("Unit", "StopWhenUnneeded")):
        rows.append(("StopWhenUnneeded", "yes"))
    if unit is None or not facts.start_limit_off(unit, facts.restart_pause(unit)):
        rows += recipes.HEALS
    joined = backend.name in one.proxy.dependencies("JoinsNamespaceOf")
    if joined and (unit is None or not facts.joins_back(one.proxy, unit)):
        rows.append(("JoinsNamespaceOf", _generic(one, one.proxy.text)))
    name = os.path.basename(unit.shown) if unit is not None else backend.name
    if unit is not None and not name.endswith(".service"):
        name = unit.text  # made by Quadlet
    return Text(f"{name}.d/{recipes.DROP_IN}", [("Unit", rows)], [])


def _others(one: Set) -> dict[str, bytes | str]:
    """Return the files of the set as they are, for `check` to look at with the new ones.

    A `str` is where a symlink leads.
    """
    found: dict[str, bytes | str] = {}
    for unit in (one.proxy, *one.sockets, *(b.unit for b in one.backends if b.unit is not None)):
        found |= _files_of(unit)
        found |= _links_of(unit)
    return found


def _files_of(unit: Unit) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for number, file in enumerate(unit.files):
        name = os.path.basename(file.path)
        if number:
            name = f"{os.path.basename(os.path.dirname(file.path))}/{name}"
        try:
            with open(file.path, "rb") as source:
                found[name] = source.read()
        except OSError:
            continue  # a file that cannot be read was not part of the set either
    return found


def _links_of(unit: Unit) -> dict[str, bytes | str]:
    """Return the aliases of a unit, and the dependencies that it has by symlinks."""
    file = os.path.basename(unit.shown)
    found: dict[str, bytes | str] = {}
    if names.is_unit(file):
        found |= {alias: file for alias in unit.aliases if alias not in (unit.text, file)}
    for links in unit.folders.values():
        for other, path in links:
            found[f"{os.path.basename(os.path.dirname(path))}/{other}"] = f"../{other}"
    return found


def _remarks(one: Set, whole: bool) -> list[str]:
    """Return the steps that are left to the administrator."""
    remarks = []
    if whole:
        drop_ins = [file.path for file in one.proxy.files[1:]]
        if drop_ins:
            remarks.append(f"remove {', '.join(drop_ins)}: the new unit has what they say")
    if not one.command.sure:
        remarks.append("the arguments are not known: see that they have --connect-timeout=")
    for backend in _own_backends(one):
        unit = backend.unit
        if unit is not None and one.command.rests and facts.is_enabled(unit):
            remarks.append(f"{backend.name} is enabled: it runs on, unless it is disabled")
        elif unit is None:
            why = "was not found" if backend.found is None else "cannot be read"
            remarks.append(f"{backend.name} {why}: it was not looked at")
    return remarks
