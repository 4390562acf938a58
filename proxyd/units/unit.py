"""A unit as systemd would load it: its file and drop-ins merged."""

from proxyd.units import names, specifiers, words
from proxyd.units.unitfile import Problem, Setting, UnitFile

DEPENDENCIES = (
    "Requires",
    "Requisite",
    "Wants",
    "BindsTo",
    "Upholds",
    "PartOf",
    "Conflicts",
    "After",
    "Before",
    "JoinsNamespaceOf",
)

_SPELLINGS = {
    ("Unit", "BindsTo"): (("Unit", "BindTo"),),
    ("Unit", "StartLimitIntervalSec"): (
        ("Unit", "StartLimitInterval"),
        ("Service", "StartLimitInterval"),
    ),
    ("Unit", "StartLimitBurst"): (("Service", "StartLimitBurst"),),
    ("Service", "TimeoutStartSec"): (("Service", "TimeoutSec"),),
}
"""Old names of settings that systemd still accepts."""


_CHOICES = {
    "Restart": (
        "no",
        "always",
        "on-success",
        "on-failure",
        "on-abnormal",
        "on-watchdog",
        "on-abort",
    ),
    "Type": (
        "simple",
        "exec",
        "forking",
        "oneshot",
        "dbus",
        "notify",
        "notify-reload",
        "idle",
    ),
}
"""The words of settings for which it matters."""


class Unit:
    """The settings of a unit in the order in which systemd reads them.

    `told` is what a running service manager says of the unit (running.py): where that knows
    better, it wins.
    """

    __slots__ = (
        "aliases",
        "files",
        "folders",
        "name",
        "shown",
        "told",
        "user",
        "vendors",
        "wanted_by",
    )

    def __init__(self, name: names.Name, shown: str, user: bool) -> None:
        self.name = name
        self.shown = shown
        """The path of the file, for messages."""
        self.user = user
        """Whether it is a unit of a user's service manager."""
        self.aliases: set[str] = {name.text}
        """All of its names."""
        self.files: list[UnitFile] = []
        """The file and its drop-ins, in the order in which they apply."""
        self.folders: dict[str, list[tuple[str, str]]] = {}
        """Dependencies by symlinks in folders such as NAME.wants: {key: [(unit, path)]}."""
        self.wanted_by: list[tuple[str, str]] = []
        """Units with such a symlink to this one, and its path: this unit is enabled in them."""
        self.vendors = False
        """Whether the file came with a package."""
        self.told: dict[str, str] = {}

    @property
    def text(self) -> str:
        """The name of the unit."""
        return self.name.text

    @property
    def problems(self) -> list[Problem]:
        """What is wrong with its files."""
        return [problem for file in self.files for problem in file.problems]

    @property
    def fault(self) -> Problem | None:
        """Return why systemd could load nothing of its file; None if it could."""
        problems = self.files[0].problems if self.files else []
        return next((problem for problem in problems if problem.fatal), None)

    @property
    def known(self) -> bool:
        """Tell whether its settings are known, from its file or from the service manager."""
        return self.fault is None or bool(self.told)

    def all(self, section: str, key: str) -> list[Setting]:
        """Return every assignment of a setting, resets included, under any of its spellings."""
        spellings = ((section, key), *_SPELLINGS.get((section, key), ()))
        return [
            setting
            for file in self.files
            for setting in file.settings
            if (setting.section, setting.key) in spellings
        ]

    def last(self, section: str, key: str) -> Setting | None:
        """Return the last assignment of a setting with one value; None for none, or a reset."""
        found = self.all(section, key)
        return found[-1] if found and found[-1].value else None

    def entries(self, section: str, key: str) -> list[Setting]:
        """Return the assignments of a list since the last empty one, which resets it."""
        kept: list[Setting] = []
        for setting in self.all(section, key):
            if setting.value:
                kept.append(setting)
            else:
                kept.clear()
        return kept

    def value(self, section: str, key: str, default: str = "") -> str:
        """Return a setting's value with its specifiers expanded."""
        told = self.told.get(key)
        if told is not None:
            return told
        setting = self.last(section, key)
        return self.expand(setting.value) if setting else default

    def choice(self, section: str, key: str, default: str = "") -> str:
        """Return a setting that is one of a few words. Others are ignored, and do not reset it."""
        allowed = _CHOICES.get(key)
        settings = self.all(section, key)
        values = [s.value for s in settings if s.value and (not allowed or s.value in allowed)]
        return self.told.get(key, self.expand(values[-1]) if values else default)

    def flag(self, section: str, key: str, default: bool = False) -> bool:
        """Return a boolean setting. Other values are ignored, as systemd does."""
        for text in self._values(section, key):
            value = words.boolean(text)
            if value is not None:
                return value
        return default

    def span(self, section: str, key: str, default: str) -> int | None:
        """Return a time span in microseconds, None for infinity. Other values are ignored."""
        for text in [*self._values(section, key), default]:
            value = words.span(text)
            if not isinstance(value, str):
                return value
        raise ValueError(default)

    def _values(self, section: str, key: str) -> list[str]:
        """Return the values of a setting, the one in effect first."""
        told = self.told.get(key)
        values = [self.expand(setting.value) for setting in reversed(self.all(section, key))]
        return values if told is None else [told, *values]

    def expand(self, text: str) -> str:
        """Replace the specifiers in `text`."""
        return specifiers.expand(text, self.name, self.user)

    def dependencies(self, *keys: str) -> dict[str, Setting | None]:
        """Return {unit: the setting that names it} for dependencies of these kinds.

        An empty assignment takes none away: dependencies cannot be reset. The setting is None
        where it is a symlink, or the service manager, that tells.
        """
        found: dict[str, Setting | None] = {}
        for key in keys:
            for setting in self.all("Unit", key):
                for word in self._words(setting):
                    found.setdefault(self.meant(word), setting)
            for other, _ in self.folders.get(key, ()):
                found.setdefault(other, None)
            for other in _listed(self.told.get(key, "")):
                found.setdefault(other, None)
        return found

    def installed_by(self, *keys: str) -> list[tuple[str, Setting]]:
        """Return the units that [Install] names under `keys`, such as WantedBy."""
        return [
            (word, setting)
            for key in keys
            for setting in self.entries("Install", key)
            for word in self._words(setting)
        ]

    def where(self, *anchors: tuple[str, str]) -> tuple[str, int]:
        """Return path and line of the first of these settings that exists, or of the unit."""
        for section, key in anchors:
            found = self.all(section, key)
            if found:
                return found[-1].path, found[-1].line
        if not self.files:
            return self.shown, 0
        return self.files[0].path, self.files[0].sections.get("Unit", 1)

    def _words(self, setting: Setting) -> list[str]:
        try:
            return words.split(self.expand(setting.value), escapes=False)
        except ValueError:
            return []

    def meant(self, word: str) -> str:
        """Return the unit that a word of a dependency means, its specifiers expanded or not.

        A template gets this unit's instance, or its prefix.
        """
        word = self.expand(word)
        if names.is_unit(word) and names.parse(word).is_template:
            return names.with_instance(word, self.name.instance or self.name.prefix)
        return word


def _listed(told: str) -> list[str]:
    """Return the units in a property: names with a backslash are quoted, as words are."""
    try:
        return words.split(told)
    except ValueError:
        return told.split()
