"""`check`: what is wrong with the units around the proxy."""

import os

from proxyd.errors import reason
from proxyd.units import (
    names,
    paths,
    rules_command,
    rules_folder,
    rules_healing,
    rules_isolation,
    rules_life,
    rules_restart,
    rules_socket,
    running,
    verify,
)
from proxyd.units.library import Library
from proxyd.units.rule import Finding, Rule
from proxyd.units.sets import Set, find_sets
from proxyd.units.unit import Unit
from proxyd.units.unitfile import Problem

RULES: tuple[Rule, ...] = (
    *rules_healing.RULES,
    *rules_life.RULES,
    *rules_restart.RULES,
    *rules_isolation.RULES,
    *rules_socket.RULES,
    *rules_command.RULES,
    *rules_folder.RULES,
)

_NOT_SETS = (".d", ".wants", ".requires", ".upholds")
_DEPTH_MAX = 16


class Scope:
    """Which machine the units are for."""

    __slots__ = ("ask_systemd", "manager", "root", "user")

    def __init__(self, root: str = "", user: bool = False, ask_systemd: bool = True) -> None:
        self.root = os.path.abspath(root).rstrip("/") if root else ""
        self.user = user
        self.ask_systemd = ask_systemd
        """Whether the lines of systemd-analyze are reported as well."""
        self.manager = running.Manager(user) if not root else None
        """The service manager that runs here; None if files of another machine are checked."""

    def library(self, folder: str = "") -> Library:
        """Return the units of the machine, or those in a folder that is not one of the machine's.

        Units that are not in such a folder are unknown: it may be meant for another machine.
        """
        rooted = bool(self.root)
        machine = [self.root + one for one in paths.search_path(self.user, rooted)]
        quadlets = [self.root + one for one in paths.quadlet_path(self.user, rooted)]
        if folder and folder not in machine:
            machine, quadlets = [folder], [folder, *paths.quadlet_beside(folder)]
        user = self.user or folder.endswith("/systemd/user")
        library = Library(machine, self.root, user)
        library.add_quadlets(quadlets)
        return library


def check(arguments: list[str], scope: Scope) -> tuple[list[Finding], int]:
    """Check units, files and folders; return the findings and the number of proxies."""
    findings: list[Finding] = []
    units: list[str] = []
    proxies = 0
    for argument in arguments:
        if os.path.isdir(argument) and not scope.root and paths.is_root(argument):
            proxies += _check_root(argument, scope, findings)
        elif os.path.isdir(argument):
            for folder, wanted in sorted(_folders(argument, findings).items()):
                proxies += _check_files(folder, wanted, scope, findings)
        elif "/" in argument or os.path.lexists(argument):
            folder, unit = of_file(argument)
            if not names.is_unit(unit):
                _complain(findings, argument, "is not a unit file, a drop-in or a folder")
            elif problem := _why_no_file(argument):
                _complain(findings, argument, problem)
            else:
                proxies += _check_files(folder, [unit], scope, findings)
        else:
            units.append(names.mangle(argument))
    if units or not arguments:
        proxies += _check_machine(units, scope, findings)
    return _sorted(findings), proxies


def _why_no_file(path: str) -> str:
    """Return why there is no file to check at `path`, or nothing."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    except OSError as error:
        return f"cannot be read: {reason(error)}"
    return ""


def _check_root(root: str, scope: Scope, findings: list[Finding]) -> int:
    """Check the units of the machine with this root folder: the system's, and those of users."""
    users = (True,) if scope.user else (False, True)
    return sum(_check_machine([], Scope(root, user), findings) for user in users)


def _check_files(folder: str, wanted: list[str], scope: Scope, findings: list[Finding]) -> int:
    """Check units whose files are in `folder`; units that are not in it are the machine's."""
    library = scope.library(folder)
    units = [name for name in wanted if library.path(name)]
    sets = find_sets(library, units)
    _judge(sets, findings)
    _report_files(library, units, sets, folder, findings)
    real = [name for name in units if names.is_unit(os.path.basename(library.path(name)))]
    files = [f"{folder}/{name}" for name in _startable(real, sets)]
    if scope.ask_systemd:
        _pass_through(verify.run(folder, files, library.user), sets, findings)
    return len(sets)


def _startable(units: list[str], sets: list[Set]) -> list[str]:
    """Return `units`, with templates replaced by the instances that were checked."""
    looked_at = sorted({unit.text for one in sets for unit in _units_of(one)})
    found = []
    for unit in units:
        if names.parse(unit).is_template:
            instances = [one for one in looked_at if names.parse(one).template == unit]
            found += instances or [_as_unit(unit)]
        else:
            found.append(unit)
    return found


def _check_machine(wanted: list[str], scope: Scope, findings: list[Finding]) -> int:
    """Check units of the machine by name, or all that run the proxy."""
    library = scope.library()
    known = []
    for name in wanted:
        problem = _why_not(library, name)
        if problem:
            _complain(findings, name, problem)
        else:
            known.append(name)
    meant = known if wanted else library.all_names()
    sets = find_sets(library, meant)
    if scope.manager is not None and scope.manager.answers():
        for _ in range(2):  # once for the dependencies, then for theirs
            findings += scope.manager.tell([unit for one in sets for unit in _units_of(one)])
            sets = find_sets(library, meant)
    _judge(sets, findings)
    _report_files(library, known, sets, "", findings)
    files = {f"{os.path.dirname(u.shown)}/{u.text}" for one in sets for u in _units_of(one)}
    if not scope.root:
        _pass_through(verify.run("", sorted(files), scope.user, installed=True), sets, findings)
    return len(sets)


def _why_not(library: Library, name: str) -> str:
    """Return why there is nothing to check under this name, or nothing."""
    if not names.is_unit(name):
        return "is not the name of a unit"
    if library.get(name) is not None or library.path(name):
        path = library.path(name)
        masked = path and not names.parse(name).is_template and library.get(name) is None
        return "is masked, or cannot be read" if masked else ""
    return "no such unit"


def _judge(sets: list[Set], findings: list[Finding]) -> None:
    for one in sets:
        for rule in RULES:
            findings += rule.check(rule, one)


def _units_of(one: Set) -> list[Unit]:
    backends = [backend.found for backend in one.backends if backend.found is not None]
    return [one.proxy, *one.sockets, *backends]


def _report_files(
    library: Library, wanted: list[str], sets: list[Set], folder: str, findings: list[Finding]
) -> None:
    """Report files that cannot be read, and lines that systemd ignores."""
    units = [unit for one in sets for unit in _units_of(one)]
    units += [unit for name in wanted if (unit := library.get(_as_unit(name))) is not None]
    problems = [problem for unit in units for problem in unit.problems]
    concerned = {os.path.dirname(unit.shown) for unit in units} | {folder}
    problems += [
        problem for problem in library.problems if not folder or _is_within(problem.path, concerned)
    ]
    findings += map(_of_problem, problems)


def _as_unit(name: str) -> str:
    return names.with_instance(name, "1") if names.parse(name).is_template else name


def _is_within(path: str, folders: set[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders if folder)


def _of_problem(problem: Problem) -> Finding:
    severity, rule = ("error", "unreadable") if problem.fatal else ("warning", "ignored-line")
    if not problem.fatal and not problem.line:
        rule = "unreadable"
    return Finding((problem.path, problem.line), severity, problem.message, rule)


def _pass_through(lines: list[verify.Line], sets: list[Set], findings: list[Finding]) -> None:
    """Add the lines of systemd-analyze, except those that repeat a finding."""
    said = {(finding.path, finding.line) for finding in findings if finding.rule == "ignored-line"}
    unread = {finding.path for finding in findings if finding.rule == "unreadable"}
    unread |= {unit for path in unread if names.is_unit(unit := os.path.basename(path))}
    paths_of = {
        name: unit.shown for one in sets for unit in _units_of(one) for name in unit.aliases
    }
    for line in lines:
        path = line.path or paths_of.get(line.unit, line.unit)
        if (path, line.line) not in said and path not in unread and line.unit not in unread:
            findings.append(Finding((path, line.line), line.severity, line.message, "verify"))


def _complain(findings: list[Finding], what: str, message: str) -> None:
    findings.append(Finding((what, 0), "error", message, "unreadable"))


def _sorted(findings: list[Finding]) -> list[Finding]:
    """Sort by place, and leave out duplicates."""
    unique = {(f.path, f.line, f.rule, f.message): f for f in findings}
    return [unique[key] for key in sorted(unique)]


# What arguments name.


def of_file(path: str) -> tuple[str, str]:
    """Return the folder of units that a file is in, and the unit that it belongs to."""
    full = os.path.abspath(path)
    folder, name = os.path.split(full)
    if name.endswith(".conf") and folder.endswith(".d"):
        return os.path.dirname(folder), os.path.basename(folder).removesuffix(".d")
    stem, kind = os.path.splitext(name)
    if kind in (".container", ".kube"):
        return folder, f"{stem}.service"
    return folder, f"{stem}-pod.service" if kind == ".pod" else name


def _folders(top: str, findings: list[Finding]) -> dict[str, list[str]]:
    """Return {folder: the units in it} for a folder and those below it, each a set of its own.

    Symlinks are followed, but not back to a folder above: that would be the whole machine.
    """
    found: dict[str, list[str]] = {}
    _walk(os.path.abspath(top), found, _above(os.path.realpath(top)), findings, 0)
    return found


def _above(folder: str) -> set[str]:
    parent = os.path.dirname(folder)
    return {parent, *_above(parent)} if parent != folder else set()


def _walk(
    folder: str, found: dict[str, list[str]], seen: set[str], findings: list[Finding], depth: int
) -> None:
    real = os.path.realpath(folder)
    if real in seen or depth > _DEPTH_MAX:
        return
    seen.add(real)
    try:
        entries = sorted(os.listdir(folder))
    except OSError as error:
        _complain(findings, folder, f"cannot be read: {error.strerror}")
        return
    for entry in entries:
        path = f"{folder}/{entry}"
        if os.path.isdir(path):
            if not entry.endswith(_NOT_SETS):
                _walk(path, found, seen, findings, depth + 1)
            elif entry.endswith(".d") and names.is_unit(entry[:-2]):
                found.setdefault(folder, []).append(entry[:-2])
        elif names.is_unit(unit := of_file(path)[1]):
            found.setdefault(folder, []).append(unit)
