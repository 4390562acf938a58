"""What a rule is, and what it finds."""

from collections.abc import Callable, Iterator

from proxyd.units.unit import Unit
from proxyd.units.unitfile import Setting

SEVERITIES = ("note", "warning", "error")
"""From the least to the most severe."""


class Finding:
    """What a rule has found: where, what, and how to mend it."""

    __slots__ = ("line", "mend", "message", "path", "rule", "severity")

    def __init__(
        self, where: tuple[str, int], severity: str, message: str, rule: str, mend: str = ""
    ) -> None:
        self.path, self.line = where
        self.severity = severity
        self.message = message
        self.rule = rule
        self.mend = mend


class Rule:
    """A row of the table of rules."""

    __slots__ = ("check", "explain", "mend", "name", "severity")

    def __init__(
        self,
        name: str,
        severity: str,
        mend: str,
        explain: str,
        check: Callable[..., Iterator[Finding]],
    ) -> None:
        self.name = name
        self.severity = severity
        self.mend = mend
        """The cure in one line."""
        self.explain = explain
        """What happens, and how it is seen."""
        self.check = check
        """Yields findings for a Set."""

    def found(self, where: tuple[str, int], message: str, severity: str = "") -> Finding:
        """Return a finding of this rule."""
        return Finding(where, severity or self.severity, message, self.name, self.mend)


def at(setting: Setting | None, unit: Unit, *anchors: tuple[str, str]) -> tuple[str, int]:
    """Return the place to report: that of the setting, or else of the nearest line in the unit."""
    return (setting.path, setting.line) if setting is not None else unit.where(*anchors)
