"""The Debian package: built, checked, installed, upgraded, removed and tested, in one suite.

dist/packages/SUITE/systemd-socket-proxyd_VERSION_ARCH.deb    the package, alone
dist/packages/SUITE/upload/                                   the files to upload, and build.log
dist/packages/SUITE/log                                       the output of every step
"""

import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from room import REPO, Room, StepError, made, open_room

DEBIAN = Path(__file__).resolve().parent / "debian"

# A suite's package must have a lower version than the next suite's, so that an upgrade replaces it.
SUFFIX = {"bookworm": "~deb12", "trixie": "~deb13", "unstable": ""}

CHECK_TOOLS = "systemd man-db bash-completion zsh fish lintian devscripts blhc autopkgtest"


def make(suite: str, folder: Path) -> Path:
    """Build the package of `suite` in the empty `folder`, and check it; return the .deb."""
    log = folder / "log"
    deb, upload, older = build(suite, folder, log)
    shown = folder / deb.name
    shown.hardlink_to(deb)
    check(suite, log, deb, upload, older)
    shutil.rmtree(older.parent)
    return shown


def build(
    suite: str, folder: Path, log: Path, *, tested: bool = True
) -> tuple[Path, list[Path], Path]:
    """Return the .deb, all files to upload, and the .deb of an older version."""
    version, revision = upstream_version(), changelog_revision()
    with open_room("build", suite, build_packages(), log) as room:
        room.add_sources()
        options = "" if tested else "nocheck"
        room.run("build-deb", f"{version}-{revision}{SUFFIX[suite]}", options)
        upload = room.results(made(folder / "upload"))
        room.run("build-older-deb", f"{version}-0{SUFFIX[suite]}")
        (older,) = room.results(made(folder / "older"))
    (deb,) = (file for file in upload if re.search(r"proxyd_.*\.deb$", file.name))
    return deb, upload, older


def check(suite: str, log: Path, deb: Path, upload: list[Path], older: Path) -> None:
    """Run each check in a room of its own, without traces of other checks."""
    with test_room(suite, log) as room:
        room.add(*upload)
        room.run("check-deb", deb.name)
    with test_room(suite, log) as room:
        room.add(deb, older)
        room.run("install-deb", deb.name, older.name)
    with test_room(suite, log) as room:
        room.add(deb)
        room.run("complete-deb", deb.name)
    with test_room(suite, log) as room:
        room.add(*upload)
        room.run("autopkgtest-deb", deb.name)


def test_room(suite: str, log: Path) -> AbstractContextManager[Room]:
    """A room with the dependencies of the package and of its tests, and with Debian's tools."""
    tests = fields((DEBIAN / "tests/control").read_text(), "Depends")
    return open_room("test", suite, f"python3 {CHECK_TOOLS} {names(tests)}", log)


def build_packages() -> str:
    """The packages that Debian's builders have, and Build-Depends."""
    return f"build-essential {names(fields((DEBIAN / 'control').read_text(), 'Build-Depends'))}"


def fields(control: str, name: str) -> str:
    """The contents of all the fields called `name`, joined by commas."""
    found = re.findall(rf"^{name}:((?:.*\n)(?: .*\n)*)", control, re.MULTILINE)
    return ",".join(found)


def names(relations: str) -> str:
    """The packages in a dependency field, without versions, profiles and the package itself."""
    words = (relation.split() for relation in relations.split(","))
    return " ".join(sorted({word[0] for word in words if word and word[0] != "@"}))


def upstream_version() -> str:
    match = re.search(r'__version__ = "(.*)"', (REPO / "proxyd/__init__.py").read_text())
    assert match
    return match[1]


def changelog_revision() -> str:
    """The Debian revision in the newest entry, which must be for the project's version."""
    first = (DEBIAN / "changelog").read_text().partition("\n")[0]
    match = re.search(rf"\({re.escape(upstream_version())}-(\d+)\)", first)
    if not match:
        raise StepError(f"debian/changelog is not of version {upstream_version()}: {first}")
    return match[1]
