"""The lines of `systemd-analyze verify`, if it is installed."""

import os
import shutil
import subprocess

from proxyd.units import names

_PATIENCE = 60
"""Seconds. It takes less than one for a set."""

_FILES_MAX = 500
"""With more at a time it takes minutes."""

_IGNORED = ("ignoring", "Ignoring", "ignored", "deprecated", "obsolete")


_NEWER = (
    "DeferTrigger",
    "DelegateSubgroup",
    "FileDescriptorStorePreserve",
    "PassFileDescriptorsToExec",
    "PollLimitBurst",
    "PollLimitIntervalSec",
    "ReloadSignal",
    "RestartMaxDelaySec",
    "RestartMode",
    "RestartSteps",
    "UpheldBy",
)
"""Settings that are too new for some installed versions of systemd."""

_NEWER_TYPE = "service type, ignoring: notify-reload"
"""The end of a line about another such one."""


class Line:
    """One line of its output."""

    __slots__ = ("line", "message", "path", "severity", "unit")

    def __init__(self, path: str, line: int, unit: str, message: str, severity: str) -> None:
        self.path = path
        """Empty where it names a unit."""
        self.line = line
        self.unit = unit
        self.message = message
        self.severity = severity


def run(folder: str, files: list[str], user: bool, installed: bool = False) -> list[Line]:
    """Let systemd-analyze verify read `files`, with the other units of `folder`.

    Whether programs are there is only said of units that are `installed` on this machine.
    """
    program = shutil.which("systemd-analyze")
    files = [file for file in files if names.is_unit(os.path.basename(file))]
    if program is None or not files:
        return []
    if len(files) > _FILES_MAX:
        return [_not_asked(folder, f"{len(files)} units are more than {_FILES_MAX} at a time")]
    command = [program, "verify", "--man=no", *(["--user"] if user else []), *files]
    environment = {**os.environ, "SYSTEMD_COLORS": "0", "LC_ALL": "C.UTF-8"}
    if folder and ":" not in folder:
        environment["SYSTEMD_UNIT_PATH"] = f"{folder}:"
    try:
        done = subprocess.run(  # noqa: S603 - a program of systemd
            command,
            env=environment,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [_not_asked(folder, f"it was not done within {_PATIENCE} s")]
    except (OSError, subprocess.SubprocessError) as error:
        return [_not_asked(folder, str(error))]
    own = {os.path.basename(file) for file in files}
    lines = done.stderr.decode("utf-8", "replace").splitlines()
    found = [_parse(line, folder, own) for line in lines]
    return [line for line in found if line and (installed or not _is_of_machine(line.message))]


def _not_asked(folder: str, why: str) -> Line:
    message = f"systemd-analyze verify says nothing: {why}"
    return Line(folder or "systemd-analyze", 0, "", message, "note")


def _is_of_machine(message: str) -> bool:
    """Tell whether a line is about this machine rather than about the units."""
    unknown = message.startswith("Unknown key") and any(f"'{key}'" in message for key in _NEWER)
    unknown = unknown or message.endswith(_NEWER_TYPE)
    return unknown or "is not executable" in message


def _parse(text: str, folder: str, own: set[str]) -> Line | None:
    """Read PATH:LINE: MESSAGE or UNIT: MESSAGE; None for a line about units of others."""
    severity = "warning" if any(word in text for word in _IGNORED) else "error"
    head, colon, rest = text.partition(": ")
    path, _, number = head.rpartition(":")
    if colon and path.startswith("/") and number.isascii() and number.isdigit():
        mine = os.path.basename(path) in own or (folder and path.startswith(f"{folder}/"))
        return Line(path, int(number), "", rest, severity) if mine else None
    if colon and names.is_unit(head):
        mine = head in own or names.parse(head).template in own
        return Line("", 0, head, rest, severity) if mine else None
    return None
