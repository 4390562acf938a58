"""What Podman's Quadlet makes of a .container, .pod or .kube file (podman-systemd.unit(5))."""

import os

from proxyd.units import names, unitfile
from proxyd.units.unitfile import Setting, UnitFile

_KINDS = {".container": ("Container", ""), ".pod": ("Pod", "-pod"), ".kube": ("Kube", "")}


class Source:
    """A file of Quadlet's, and the service that is made from it."""

    __slots__ = ("path", "section", "service")

    def __init__(self, path: str, section: str, service: str) -> None:
        self.path = path
        self.section = section
        self.service = service


def source(path: str) -> Source | None:
    """Return what Quadlet makes of `path`, or None if it ignores it."""
    stem, kind = os.path.splitext(os.path.basename(path))
    if kind not in _KINDS:
        return None
    section, suffix = _KINDS[kind]
    service = f"{stem}{suffix}.service"
    for setting in unitfile.read(path).settings:
        if (setting.section, setting.key) == (section, "ServiceName") and setting.value:
            service = f"{setting.value}.service"
    return Source(path, section, service) if names.is_unit(service) else None


def service_file(source_: Source) -> UnitFile:
    """Return the service as Quadlet would write it, as far as the rules look at it.

    Every line is at its place in the source; what Quadlet adds is at the head of its section.
    """
    made = unitfile.read(source_.path)
    line = made.sections.get(source_.section, 1)
    container = [setting for setting in made.settings if setting.section == source_.section]
    added = [("Type", "notify" if source_.section != "Pod" else "forking")]
    added.append(("ExecStart", _command(source_, container)))
    made.settings[:0] = [Setting("Service", key, value, made.path, line) for key, value in added]
    return made


def _command(source_: Source, container: list[Setting]) -> str:
    """Return the command that publishes what the file publishes."""
    publish = [s for s in container if s.key == "PublishPort" and s.value]
    words = [f"--publish={setting.value}" for setting in publish]
    ready = next((s.value for s in container if s.key == "Notify"), "")
    words += ["--sdnotify=container"] if ready.lower() in ("true", "yes", "healthy") else []
    verb = {"Container": "run", "Pod": "pod start", "Kube": "kube play"}[source_.section]
    return " ".join(["/usr/bin/podman", verb, *words])
