"""Check that the sdist has every file of the project, and each wheel exactly what is installed.

Usage: check_contents.py [--repaired] ROOT DIST <NUL-separated project files

--repaired: the wheels have been repaired by auditwheel, so their tags name a C library.
"""

import argparse
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from posixpath import dirname, normpath

NOT_IN_SDIST = (".gitignore", "*/.gitignore")
ADDED_TO_SDIST = ("PKG-INFO", "setup.cfg", "*.egg-info/*")

DATA = "*.data/data/share"
DOC = f"{DATA}/doc/systemd-socket-proxyd"

WHEEL_HAS = (
    "proxyd/__init__.py",
    "proxyd/_datagram.*.so",
    "proxyd/_datagram.pyi",
    "proxyd/_relay.*.so",
    "proxyd/start.cpython-3*.bundle",
    "proxyd/_relay.pyi",
    "proxyd/py.typed",
    "proxyd/ctl/__init__.py",
    "proxyd/units/__init__.py",
    "*.data/scripts/socket-proxyctl",
    "*.data/scripts/systemd-socket-proxyd",
    "*.data/scripts/systemd-socket-proxyd-units",
    f"{DATA}/man/man1/socket-proxyctl.1",
    f"{DATA}/man/man1/systemd-socket-proxyd.1",
    f"{DATA}/man/man1/systemd-socket-proxyd-units.1",
    f"{DOC}/README.md",
    f"{DOC}/CHANGELOG.md",
    f"{DATA}/bash-completion/completions/systemd-socket-proxyd",
    f"{DATA}/zsh/site-functions/_systemd-socket-proxyd",
    f"{DATA}/fish/vendor_completions.d/systemd-socket-proxyd.fish",
    f"{DATA}/bash-completion/completions/systemd-socket-proxyd-units",
    f"{DATA}/zsh/site-functions/_systemd-socket-proxyd-units",
    f"{DATA}/fish/vendor_completions.d/systemd-socket-proxyd-units.fish",
    f"{DATA}/bash-completion/completions/socket-proxyctl",
    f"{DATA}/zsh/site-functions/_socket-proxyctl",
    f"{DATA}/fish/vendor_completions.d/socket-proxyctl.fish",
    "*.data/data/lib/systemd/catalog/systemd-socket-proxyd.catalog",
    "*.data/data/lib/systemd/system/socket-proxyctl-report.socket",
    "*.data/data/lib/systemd/system/socket-proxyctl-report@.service",
    "*.dist-info/licenses/LICENSE",
)
WHEEL_MAY_HAVE = (
    *WHEEL_HAS,
    "proxyd/*.py",
    f"{DOC}/*",
    "*.dist-info/METADATA",
    "*.dist-info/RECORD",
    "*.dist-info/WHEEL",
    "*.dist-info/sboms/auditwheel.cdx.json",
    "*.dist-info/top_level.txt",
)
SCRIPTS = (
    "scripts/socket-proxyctl",
    "scripts/systemd-socket-proxyd",
    "scripts/systemd-socket-proxyd-units",
)
SOURCES = ("*.c", "*.h", "*.pxd", "*.pxi", "*.pyx")

# The place in the wheel of each installed file of the project.
INSTALLED = {
    "proxyd/*.py": "{path}",
    "man/*.1": f"{DATA}/man/man1/{{name}}",
    "examples/*": f"{DOC}/{{path}}",
    "systemd/*.catalog": "*.data/data/lib/systemd/catalog/{name}",
    "systemd/*.service": "*.data/data/lib/systemd/system/{name}",
    "systemd/*.socket": "*.data/data/lib/systemd/system/{name}",
    "completions/bash/*": f"{DATA}/bash-completion/completions/{{name}}",
    "completions/fish/*": f"{DATA}/fish/vendor_completions.d/{{name}}",
    "completions/zsh/*": f"{DATA}/zsh/site-functions/{{name}}",
}

# A link in a document to another file: not a URL, and not within the document.
LINK = re.compile(r"\]\(([^)#:]+)[)#]")

# An interpreter's suffix for extensions, from which a wheel's tags for Python and ABI follow.
SUFFIX = re.compile(r"proxyd/_\w+\.cpython-3(\d+)(t?)-(\w+)-linux-(gnu|musl)\.so")
EXTENSIONS = 2
PLATFORMS = {"gnu": "manylinux", "musl": "musllinux"}


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def sdist_faults(sdist: Path, project: set[str]) -> list[str]:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    files = {member.name.partition("/")[2] for member in members if member.isfile()}
    missing = {name for name in project - files if not matches(name, NOT_IN_SDIST)}
    stray = {name for name in files - project if not matches(name, ADDED_TO_SDIST)}
    odd = {m.name for m in members if m.uid or m.gid or m.mode not in {0o644, 0o755}}
    return [
        *(f"sdist lacks {name}" for name in sorted(missing)),
        *(f"sdist has {name}, which is no file of the project" for name in sorted(stray)),
        *(f"sdist tells the owner of {name}, or the umask" for name in sorted(odd)),
    ]


def wheel_faults(wheel: Path, project: set[str], repaired: bool) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}
        faults = [
            *file_faults(files, project),
            *mode_faults(archive),
            *link_faults(archive, files),
        ]
        if not faults:
            faults = [
                *text_faults(archive, files),
                *tag_faults(wheel, text(archive, files, "/WHEEL"), files, repaired),
            ]
    return [f"{wheel.name}: {fault}" for fault in faults]


def text(archive: zipfile.ZipFile, files: set[str], end: str) -> str:
    return archive.read(next(name for name in files if name.endswith(end))).decode()


def file_faults(files: set[str], project: set[str]) -> list[str]:
    lacking = [pattern for pattern in WHEEL_HAS if not any(fnmatch(f, pattern) for f in files)]
    stray = {name for name in files if not matches(name, WHEEL_MAY_HAVE) or matches(name, SOURCES)}
    return [
        *(f"lacks {pattern}" for pattern in lacking),
        *(f"has {name}" for name in sorted(stray)),
        *(f"lacks {name} of the project" for name in sorted(project) if not has(files, name)),
    ]


def has(files: set[str], source: str) -> bool:
    """Return False if `source` should be installed but is not in the wheel."""
    for pattern, place in INSTALLED.items():
        if fnmatch(source, pattern):
            wanted = place.format(path=source, name=source.rpartition("/")[2])
            return any(fnmatch(name, wanted) for name in files)
    return True


def mode_faults(archive: zipfile.ZipFile) -> list[str]:
    """Files must be 644, or 755 if they are executed or loaded; setuptools makes RECORD 664."""
    allowed = {0o644, 0o755}
    return [
        f"the mode of {info.filename} is {(info.external_attr >> 16) & 0o7777:o}"
        for info in archive.infolist()
        if (info.external_attr >> 16) & 0o7777 not in allowed
        and not info.filename.endswith((".dist-info/RECORD", "/"))
    ]


def link_faults(archive: zipfile.ZipFile, files: set[str]) -> list[str]:
    """The targets of links in installed documents must be installed as well."""
    return [
        f"{page} links to {link}"
        for page in sorted(files)
        if page.endswith(".md")
        for link in LINK.findall(archive.read(page).decode())
        if normpath(f"{dirname(page)}/{link}") not in files
    ]


def text_faults(archive: zipfile.ZipFile, files: set[str]) -> list[str]:
    faults = []
    faults += [
        f"the first line of {script} is not '#!python', which installers replace"
        for script in SCRIPTS
        if not text(archive, files, script).startswith("#!python\n")
    ]
    if "Requires-Dist:" in text(archive, files, "/METADATA"):
        faults.append("requires other distributions at run time")
    return faults


def tag_faults(wheel: Path, metadata: str, files: set[str], repaired: bool) -> list[str]:
    """Name, metadata, extensions and bundle must agree on interpreter, ABI and platform."""
    modules = sorted(name for name in files if name.endswith(".so"))
    suffixes = [SUFFIX.fullmatch(module) for module in modules]
    kinds = {suffix.groups() if suffix else () for suffix in suffixes}
    if len(modules) != EXTENSIONS or len(kinds) != 1 or () in kinds:
        return [f"has the extension modules {modules}, wanted are {EXTENSIONS} of one CPython"]
    minor, threads, machine, libc = kinds.pop()
    name, python, abi, platforms = wheel.stem.rsplit("-", 3)
    faults = []
    if (python, abi) != (f"cp3{minor}", f"cp3{minor}{threads}"):
        faults.append(f"{modules[0]} is not for {python}-{abi}")
    wanted = f"{PLATFORMS[libc]}_*_{machine}" if repaired else f"*linux*_{machine}"
    faults += [
        f"the platform {platform} is not {wanted}"
        for platform in platforms.split(".")
        if not fnmatch(platform, wanted)
    ]
    bundles = {file for file in files if file.endswith(".bundle")}
    if bundles != {f"proxyd/start.cpython-3{minor}.bundle"}:
        faults.append(f"has the bundles {sorted(bundles)}, wanted is one for {python}")
    told = set(re.findall(r"^Tag: (.*)$", metadata, re.MULTILINE))
    named = {f"{python}-{abi}-{platform}" for platform in platforms.split(".")}
    if told != named:
        faults.append(f"{name} has the tags {sorted(told)} in WHEEL, {sorted(named)} in its name")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description="See the beginning of this file.")
    parser.add_argument("--repaired", action="store_true")
    parser.add_argument("root", type=Path)
    parser.add_argument("dist", type=Path)
    options = parser.parse_args()
    project = {name for name in sys.stdin.read().split("\0") if name}
    if len(project) < 20:
        sys.exit(f"only {len(project)} project files were named")
    sdists, wheels = (sorted(options.dist.glob(end)) for end in ("*.tar.gz", "*.whl"))
    if len(sdists) != 1 or not wheels:
        sys.exit(f"{options.dist} has {len(sdists)} sdists and {len(wheels)} wheels")
    faults = sdist_faults(sdists[0], project)
    for wheel in wheels:
        faults += wheel_faults(wheel, project, options.repaired)
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{len(project)} project files, right in the sdist and in {len(wheels)} wheel(s)")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
