"""Unit files as they are written, and the check before that."""

import os
import tempfile
from collections.abc import Mapping

from proxyd.units import check
from proxyd.units.rule import Finding

Section = tuple[str, list[tuple[str, str]]]
"""The name of a section, and its assignments in order."""


class Text:
    """One file: a unit, or a drop-in as NAME.d/FILE."""

    __slots__ = ("comments", "name", "sections")

    def __init__(self, name: str, sections: list[Section], comments: list[str]) -> None:
        self.name = name
        self.sections = [(title, rows) for title, rows in sections if rows]
        self.comments = comments
        """Comment lines at the beginning."""

    def render(self) -> str:
        """Return the contents of the file."""
        head = "".join(f"# {line}\n" for line in self.comments)
        blocks = [
            f"[{title}]\n" + "".join(f"{key}={value}\n" for key, value in rows)
            for title, rows in self.sections
        ]
        return head + "\n".join(blocks)


def show(files: list[Text]) -> str:
    """Return all files for stdout, a line with its name before each, as Quadlet's -dryrun does."""
    return "\n".join(f"---{file.name}---\n{file.render()}" for file in files)


def write(files: list[Text], folder: str) -> None:
    """Write the files into `folder`; none is overwritten. Raises OSError."""
    for file in files:
        if os.path.lexists(f"{folder}/{file.name}"):
            raise FileExistsError(17, os.strerror(17), f"{folder}/{file.name}")
    for file in files:
        path = f"{folder}/{file.name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "x", encoding="utf-8") as out:
            out.write(file.render())


def try_out(files: list[Text], others: Mapping[str, bytes | str], user: bool) -> list[Finding]:
    """Return what `check` finds in the files together with `others`: {name: contents}.

    Where a symlink leads is a `str`. The paths in the findings are the names of the files.
    """
    with tempfile.TemporaryDirectory(prefix="systemd-socket-proxyd-units-") as folder:
        for name, data in others.items():
            _store(f"{folder}/{name}", data)
        for file in files:
            _store(f"{folder}/{file.name}", file.render().encode())
        findings, _ = check.check([folder], check.Scope(user=user, ask_systemd=False))
    for finding in findings:
        finding.path = finding.path.removeprefix(f"{folder}/")
    return findings


def _store(path: str, data: bytes | str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if isinstance(data, str):
        os.symlink(data, path)
        return
    with open(path, "wb") as out:
        out.write(data)
