"""Rules: the folder of RuntimeDirectory=, which has the inspection socket of the proxy."""

from collections.abc import Iterator

from proxyd.units import command, names, specifiers, words
from proxyd.units.rule import Finding, Rule
from proxyd.units.sets import Set
from proxyd.units.unit import Unit
from proxyd.units.unitfile import Setting


def _shared(rule: Rule, found: Set) -> Iterator[Finding]:
    if found.per_connection:  # such a proxy has no inspection socket
        return
    proxy = found.proxy
    for setting, folder in _folders(proxy):
        where = setting.path, setting.line
        for unit in _others(found):
            other = next(
                (one for _, one in _folders(unit) if _collide(proxy, folder, unit, one)), ""
            )
            if other and command.find(unit) is not None:
                yield rule.found(where, _message(folder, unit), "warning")
            elif other:
                yield rule.found(where, _message(folder, unit))
        if proxy.name.instance is not None and not _is_distinct(proxy, setting, folder):
            message = f"all instances have the folder {folder}: the first that stops removes it"
            yield rule.found(where, message, "warning")


def _message(folder: str, unit: Unit) -> str:
    return f"{unit.text} has the folder {folder}, too: the first that stops removes it"


def _others(found: Set) -> list[Unit]:
    units = [backend.unit for backend in found.backends if backend.unit is not None]
    units += [unit for unit in found.library.own_units() if unit.name.type == "service"]
    unique = {unit.text: unit for unit in units}
    return [unique[name] for name in sorted(unique) if not found.is_named(name)]


def _folders(unit: Unit) -> list[tuple[Setting, str]]:
    """Return the folders of RuntimeDirectory=; FOLDER:SYMLINK is a folder with a symlink to it."""
    found = []
    for setting in unit.entries("Service", "RuntimeDirectory"):
        try:
            folders = [word.partition(":")[0] for word in words.split(setting.value)]
        except ValueError:
            continue  # systemd ignores the line, and verify says so
        found += [(setting, unit.expand(folder).rstrip("/")) for folder in folders if folder]
    return found


def _collide(first: Unit, folder: str, second: Unit, other: str) -> bool:
    """Tell whether a stop of one of the two removes what the other has in its folder."""
    if f"{other}/".startswith(f"{folder}/") and _removes(first):
        return True
    return f"{folder}/".startswith(f"{other}/") and _removes(second)


def _removes(unit: Unit) -> bool:
    return unit.value("Service", "RuntimeDirectoryPreserve") != "yes"


def _is_distinct(proxy: Unit, setting: Setting, folder: str) -> bool:
    """Tell whether another instance of the template has another folder."""
    another = names.Name(proxy.name.prefix, f"{proxy.name.instance}-", "service")
    expanded = specifiers.expand(setting.value, another, proxy.user)
    return folder not in expanded.split()


def _escaped(rule: Rule, found: Set) -> Iterator[Finding]:
    for setting, folder in _folders(found.proxy):
        if "\\" in folder:
            yield rule.found(
                (setting.path, setting.line),
                f"systemd 257 cannot start the proxy: {folder} has a backslash",
            )


RULES = (
    Rule(
        "runtime-directory-shared",
        "error",
        "RuntimeDirectory=%N in the proxy, which no other unit has",
        "The folder of RuntimeDirectory= is made when a service starts, and removed with all that "
        "is in it when the service stops, whoever else has it. A proxy that shares the folder of "
        "its backend takes the backend's socket away when it is idle, or crashes. Proxies that "
        "share one take each other's inspection socket away: that is a warning.\n"
        "Seen as: 'Failed to connect to remote host: No such file or directory' while the backend "
        "runs; `socket-proxyctl` says that there is no answer.",
        _shared,
    ),
    Rule(
        "runtime-directory-escaped",
        "warning",
        "a RuntimeDirectory= that is written out; instances with names that need no escapes",
        "%N, %i and others stand for names as they are escaped, such as my\\x2dapp. systemd 257 "
        "does not start a service whose folder has a backslash in its name; 252 and 262 do.\n"
        "Seen as: 'Failed to deserialize: Invalid argument'.",
        _escaped,
    ),
)
