"""The project in the container: a Debian package, or a wheel built from an sdist, in a venv.

All of it is done by the container's own Python, in a chroot of the overlay before it boots, and
without a network: the host's pip, which knows how to reach an index, fetches the few pure-Python
build requirements once into the cache.
"""

import hashlib
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from kit.containers import root

# What scenarios run: as the wheel installs it, and as the package does.
WHEEL_COMMAND = "/opt/proxyd/bin/systemd-socket-proxyd"
DEB_COMMAND = "/usr/bin/systemd-socket-proxyd"

MAKE_BUILD_VENV = """
python3 -m venv /opt/build
/opt/build/bin/pip install --quiet --no-index --find-links=/opt/wheels "$@"
"""

MAKE_SDIST = "/opt/build/bin/python -m build --no-isolation --sdist --outdir=/opt/sdist /opt/source"

MAKE_AND_INSTALL_WHEEL = """
/opt/build/bin/pip wheel --no-index --no-build-isolation --no-deps -w /opt/dist /opt/sdist/*
python3 -m venv --without-pip /opt/proxyd
/opt/build/bin/pip --python=/opt/proxyd/bin/python install --no-index --no-deps /opt/dist/*.whl
test -x /opt/proxyd/bin/systemd-socket-proxyd
"""


class BuildFailed(Exception):
    """The project did not build or install; str() has the end of the log."""


def install_deb(deb: Path, folder: Path, log: Path) -> str:
    """Install the package in the root folder `folder`; the installed command.

    Its dependencies must be in the folder: dpkg fetches nothing, and fails without them.
    """
    log.unlink(missing_ok=True)
    shutil.copy(deb, folder / "opt/package.deb")
    try:
        run(folder, log, f"dpkg --install /opt/package.deb; test -x {DEB_COMMAND}")
    except root.CommandFailed as error:
        raise BuildFailed(str(error)) from error
    return DEB_COMMAND


def install_wheel(repo: Path, sdist: Path | None, folder: Path, cache: Path, log: Path) -> str:
    """Build the project's wheel in the root folder `folder`, install it; the installed command.

    The wheel is built from `sdist`, or from one that is made of the working tree of `repo`.
    """
    log.unlink(missing_ok=True)
    requirements = build_requirements(repo)
    shutil.copytree(fetch(requirements, cache), folder / "opt/wheels")
    try:
        run(folder, log, MAKE_BUILD_VENV, *requirements)
        if sdist:
            (folder / "opt/sdist").mkdir()
            shutil.copy(sdist, folder / "opt/sdist")
        else:
            copy_sources(repo, folder / "opt/source")
            run(folder, log, MAKE_SDIST)
        run(folder, log, MAKE_AND_INSTALL_WHEEL)
    except root.CommandFailed as error:
        raise BuildFailed(str(error)) from error
    return WHEEL_COMMAND


def run(folder: Path, log: Path, script: str, *arguments: str) -> None:
    root.chroot(folder, ["/bin/sh", "-ec", script, "build", *arguments], log)


def build_requirements(repo: Path) -> list[str]:
    with (repo / "pyproject.toml").open("rb") as file:
        return ["build", "wheel", *tomllib.load(file)["build-system"]["requires"]]


def fetch(requirements: list[str], cache: Path) -> Path:
    """A folder with pure-Python wheels of `requirements` and what they need, any Python's."""
    name = hashlib.sha256(repr(requirements).encode()).hexdigest()[:16]
    folder, part = cache / f"wheels-{name}", cache / f"wheels-{name}.part"
    if not folder.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        download = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--dest",
            str(part),
            "--only-binary=:all:",
            "--platform=any",
            "--implementation=py",
            "--abi=none",
        ]
        done = subprocess.run(
            [*download, *requirements], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise root.Unavailable(f"no build requirements: {done.stderr.strip()}")
        part.rename(folder)
    return folder


def copy_sources(repo: Path, folder: Path) -> None:
    """Copy the working tree as git sees it: what is tracked or new, nothing that is ignored."""
    command = [
        "git",
        "-C",
        str(repo),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listing.split("\0")):
        source = repo / name
        if source.is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
