"""Which ports a service publishes that runs a compose project."""

import os

from proxyd.units import unitfile
from proxyd.units.unit import Unit

_ENGINES = ("docker-compose", "podman-compose")
_FILES = ("compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml")
_WAITS = ("--wait", "--wait=true")


def publishes(unit: Unit, line: list[str], port: int, root: str) -> bool:
    """Tell whether the project publishes `port` and accepts there before its application does.

    `line` are the words of its command. It is assumed if the project's file cannot be read: a port
    on the loopback is published or, which is rare, the container is in the network of the host.
    """
    if not _is_compose(line) or any(word in _WAITS for word in line):
        return False
    texts = [text for path in _files(unit, line, root) if (text := _read(path))]
    return not texts or any("ports:" in text and str(port) in text for text in texts)


def _is_compose(line: list[str]) -> bool:
    bases = [word.rpartition("/")[2] for word in line]
    return "compose" in bases or any(engine in bases for engine in _ENGINES)


def _files(unit: Unit, line: list[str], root: str) -> list[str]:
    """Return where the project's files may be: where the command says, or next to the unit."""
    folder = _option(line, "--project-directory") or unit.value("Service", "WorkingDirectory")
    named = [value for option in ("--file", "-f") if (value := _option(line, option))]
    listed = named or (list(_FILES) if folder else [])
    found = [root + os.path.join(folder or "/", name) for name in listed]
    here = [os.path.basename(name) for name in named] or list(_FILES)
    return found + [f"{os.path.dirname(unit.shown)}/{name}" for name in here]


def _option(line: list[str], option: str) -> str:
    """Return the value of an option, given as `--option=VALUE` or as `--option VALUE`."""
    for at, word in enumerate(line):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and at + 1 < len(line):
            return line[at + 1]
    return ""


def _read(path: str) -> str:
    """Return the text of a file, empty if it cannot be read."""
    try:
        return unitfile.read_bytes(path).decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""
