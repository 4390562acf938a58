"""Check that the sdist has every file of the project, and the wheel just what is to be installed.

Usage: check_contents.py ROOT DIST <NUL-separated project files
"""

import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

NOT_IN_SDIST = (".gitignore", "*/.gitignore")
ADDED_TO_SDIST = ("PKG-INFO", "setup.cfg", "*.egg-info/*")

WHEEL_HAS = (
    "proxyd/__init__.py",
    "proxyd/_relay.*.so",
    "proxyd/_relay.pyi",
    "proxyd/py.typed",
    "*.data/scripts/systemd-socket-proxyd",
    "*.data/data/share/man/man1/systemd-socket-proxyd.1",
    "*.data/data/share/doc/systemd-socket-proxyd/README.md",
    "*.data/data/share/bash-completion/completions/systemd-socket-proxyd",
    "*.data/data/share/zsh/site-functions/_systemd-socket-proxyd",
    "*.data/data/share/fish/vendor_completions.d/systemd-socket-proxyd.fish",
    "*.dist-info/licenses/LICENSE",
)
WHEEL_MAY_HAVE = (
    *WHEEL_HAS,
    "proxyd/*.py",
    "*.data/data/share/doc/systemd-socket-proxyd/*",
    "*.dist-info/METADATA",
    "*.dist-info/RECORD",
    "*.dist-info/WHEEL",
    "*.dist-info/top_level.txt",
)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder} has {len(found)} files {pattern}, wanted is one")
    return found[0]


def sdist_faults(sdist: Path, project: set[str]) -> list[str]:
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    missing = {name for name in project - files if not matches(name, NOT_IN_SDIST)}
    stray = {name for name in files - project if not matches(name, ADDED_TO_SDIST)}
    return [f"sdist lacks {name}" for name in sorted(missing)] + [
        f"sdist has {name}, which is no file of the project" for name in sorted(stray)
    ]


def wheel_faults(wheel: Path, root: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}
        script = archive.read(
            next(name for name in files if name.endswith("scripts/systemd-socket-proxyd"))
        )
        metadata = archive.read(next(name for name in files if name.endswith("/METADATA"))).decode()
    faults = [
        f"wheel lacks {pattern}"
        for pattern in WHEEL_HAS
        if not any(fnmatch(name, pattern) for name in files)
    ]
    faults += [f"wheel has {name}" for name in sorted(files) if not matches(name, WHEEL_MAY_HAVE)]
    modules = {f"proxyd/{path.name}" for path in (root / "proxyd").glob("*.py")}
    faults += [f"wheel lacks {name}" for name in sorted(modules - files)]
    if not script.startswith(b"#!python\n"):
        faults.append("the script's first line is not '#!python', which installers replace")
    if "Requires-Dist:" in metadata:
        faults.append("the wheel requires other distributions at run time")
    return faults


def main() -> int:
    root, dist = Path(sys.argv[1]), Path(sys.argv[2])
    project = {name for name in sys.stdin.read().split("\0") if name}
    if len(project) < 20:
        sys.exit(f"only {len(project)} project files were named")
    faults = sdist_faults(only(dist, "*.tar.gz"), project) + wheel_faults(only(dist, "*.whl"), root)
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{len(project)} project files, as they should be in sdist and wheel")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
