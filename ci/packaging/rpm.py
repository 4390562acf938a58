"""The RPM package: built from the spec by Debian's rpm, checked, compared with the DEB, installed.

dist/packages/rpm/systemd-socket-proxyd-VERSION.ARCH.rpm      and the source RPM
dist/packages/rpm/log                                         the output of every step
"""

from pathlib import Path

import deb
from room import REPO, StepError, made, open_room

SUITE = "bookworm"

PACKAGES = """
    build-essential file rpm rpmlint cpio cython3 python3-dev python3-build python3-installer
    python3-setuptools python3-wheel python3-pytest python3-pytest-xdist
"""


def make(folder: Path, compared: Path | None) -> list[Path]:
    """Build the RPM in the empty `folder`, and compare it with the .deb `compared` or a new one.

    The build of `compared` has tested the same sources with the same compiler: once is enough.
    """
    log = folder / "log"
    version = deb.upstream_version()
    spec = (REPO / "ci/packaging/systemd-socket-proxyd.spec").read_text()
    if f"\nVersion:        {version}\n" not in spec:
        raise StepError(f"the spec is not of version {version}")
    options = ["--nocheck"] if compared is not None else []
    if compared is None:
        compared = deb.build(SUITE, made(folder / "deb"), log, tested=False)[0]
    with open_room("rpm", SUITE, PACKAGES, log) as room:
        room.add_sources()
        room.run("build-rpm", version, *options)
        packages = room.results(folder)
    binary, source = sorted(packages, key=lambda file: file.name.endswith(".src.rpm"))
    with open_room("rpm", SUITE, PACKAGES, log) as room:
        room.add_sources()
        room.add(binary, source, compared)
        room.run("check-rpm", binary.name, compared.name)
    return [binary, source]
