"""What the service manager that runs here knows of units: more than their files tell.

`systemctl show` has the properties that `busctl get-property` has, by the names of units instead of
paths of objects, for many units in one call, and for a user's manager as well.
"""

import shutil
import subprocess

from proxyd.units.rule import Finding
from proxyd.units.unit import DEPENDENCIES, Unit

_PATIENCE = 30

_SETTINGS = {
    "Accept": "Accept",
    "DefaultDependencies": "DefaultDependencies",
    "DynamicUser": "DynamicUser",
    "FileDescriptorStoreMax": "FileDescriptorStoreMax",
    "FileDescriptorStorePreserve": "FileDescriptorStorePreserve",
    "FreeBind": "FreeBind",
    "KillSignal": "KillSignal",
    "NetworkNamespacePath": "NetworkNamespacePath",
    "PrivateNetwork": "PrivateNetwork",
    "PrivateTmp": "PrivateTmp",
    "ReloadSignal": "ReloadSignal",
    "RemainAfterExit": "RemainAfterExit",
    "Restart": "Restart",
    "RestartKillSignal": "RestartKillSignal",
    "RestartMode": "RestartMode",
    "RestartUSec": "RestartSec",
    "RuntimeMaxUSec": "RuntimeMaxSec",
    "StartLimitBurst": "StartLimitBurst",
    "StartLimitIntervalUSec": "StartLimitIntervalSec",
    "StopWhenUnneeded": "StopWhenUnneeded",
    "TriggerLimitBurst": "TriggerLimitBurst",
    "TriggerLimitIntervalUSec": "TriggerLimitIntervalSec",
    "Type": "Type",
}
"""{property of the manager: the setting that it shows, defaults of system.conf included}."""

_ABOUT = ("Id", "LoadState", "NeedDaemonReload")


class Manager:
    """The service manager of the system, or of the calling user, through systemctl."""

    def __init__(self, user: bool) -> None:
        program = shutil.which("systemctl")
        self._command = [program, *(["--user"] if user else [])] if program else []

    def answers(self) -> bool:
        """Tell whether it runs and answers."""
        return bool(self._show(["--property=Version"]))

    def tell(self, units: list[Unit]) -> list[Finding]:
        """Complete `units` with what the manager has loaded; return the findings about that."""
        units = [unit for unit in units if not unit.told]
        by_name = {alias: unit for unit in units for alias in unit.aliases}
        if not by_name:
            return []
        wanted = ",".join([*_ABOUT, *DEPENDENCIES, *_SETTINGS])
        findings = []
        blocks = self._show([f"--property={wanted}", "--", *sorted({u.text for u in units})])
        for block in blocks.split("\n\n"):
            properties = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
            unit = by_name.get(properties.get("Id", ""))
            if unit is None or properties.get("LoadState") != "loaded":
                continue
            if properties.get("NeedDaemonReload") == "yes":
                findings.append(
                    Finding(
                        unit.where(),
                        "warning",
                        f"{unit.text} has changed since the service manager has read it",
                        "daemon-reload",
                        "systemctl daemon-reload",
                    )
                )
            _complete(unit, properties)
        return findings

    def _show(self, arguments: list[str]) -> str:
        if not self._command:
            return ""
        try:
            done = subprocess.run(  # noqa: S603 - a program of systemd
                [*self._command, "show", *arguments],
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=_PATIENCE,
                check=False,
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        return "" if done.returncode else done.stdout.decode("utf-8", "replace")


def _complete(unit: Unit, properties: dict[str, str]) -> None:
    for name in DEPENDENCIES:
        if properties.get(name):
            unit.told[name] = properties[name]
    for name, setting in _SETTINGS.items():
        if name in properties:
            unit.told[setting] = properties[name]
