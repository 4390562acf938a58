"""Build the package with other interpreters and tools, and run its tests there.

    ci/test matrix
    ci/test matrix -- [OPTION...] [ROW...] [-- PYTEST-ARGUMENT...]
    ci/test matrix -- --list

Each row is a folder made by debootstrap (shared with `ci/test e2e`, in .cache/e2e or E2E_CACHE),
with layers on top that are kept in .cache/matrix, and a temporary overlay. In it the sdist is built
from this working tree (or given by --sdist=), the wheel is built from the sdist and installed, and
tests/unit, tests/relay and tests/blackbox run in namespaces without a network.

A row prints "ok NAME SECONDS NOTE" or "FAIL NAME SECONDS REASON", and every skipped test with the
reason.
Exit status: 0 all passed, 1 a row failed, 2 wrong usage, 77 this machine cannot run it.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from kit.containers import container, host, project, root
from matrix import layers

REPO = Path(__file__).resolve().parents[2]
TOOLS = ("debootstrap", "unshare", "chroot")
LOCK = "/run/lock/systemd-socket-proxyd-matrix"
E2E_LOCK = "/run/lock/systemd-socket-proxyd-e2e"  # held while a root folder is made

# Programs that tests use if they are installed; a test without them is skipped with a reason.
TEST_PROGRAMS = "strace iproute2 util-linux curl nginx-light netbase systemd"
DEBIAN_TOOLS = """
    cython3 python3-setuptools python3-wheel python3-build python3-pip
    python3-pytest python3-hypothesis python3-pytest-xdist
"""


class Row:
    """One way to build and test: a suite's interpreter, with the suite's own tools."""

    python = "/usr/bin/python3"  # in the row's root folder

    def __init__(self, suite: str, title: str):
        self.suite = suite
        self.title = title

    def lower(self, base: Path, work: Path, log: Path) -> Path:
        """Return what the overlay is mounted on: `base` with the layers of this row."""
        packages = f"{TEST_PROGRAMS} {DEBIAN_TOOLS}"
        return layers.ensure_layer(
            work,
            f"{self.suite}-tools",
            base,
            packages,
            lambda folder: layers.install_packages(folder, packages, log),
        )


class SourceRow(Row):
    """An interpreter that the suite does not package, built from the suite's source of CPython.

    The build tools come from PyPI, since the suite's Cython does not support such interpreters;
    pytest and hypothesis are the suite's, because they are pure Python.
    """

    source = "python3.13"
    packages = "make xz-utils libffi-dev zlib1g-dev"

    def __init__(self, suite: str, title: str, prefix: str, *configure: str):
        super().__init__(suite, title)
        self.prefix = prefix
        self.python = f"{prefix}/bin/python3"
        self.configure = configure

    def lower(self, base: Path, work: Path, log: Path) -> Path:
        recipe = [self.source, self.packages, self.configure, (INSIDE / "cpython").read_text()]

        def make(folder: Path) -> None:
            layers.install_packages(folder, self.packages, log)
            layers.fetch_source(folder, self.source, log)
            self.build(folder, log)

        name = self.prefix.rpartition("/")[2]
        lower = super().lower(base, work, log)
        interpreter = layers.ensure_layer(work, name, lower, repr(recipe), make)
        wheels = project.fetch(project.build_requirements(REPO), work)
        return layers.ensure_layer(
            work,
            f"{name}-tools",
            interpreter,
            wheels.name,
            lambda folder: self.install_tools(folder, wheels, log),
        )

    def build(self, folder: Path, log: Path) -> None:
        shutil.copytree(INSIDE, folder / "opt/matrix")
        with root.mounted_proc(folder):
            root.chroot(folder, ["/opt/matrix/cpython", self.prefix, *self.configure], log)
        shutil.rmtree(folder / "opt/matrix")

    def install_tools(self, folder: Path, wheels: Path, log: Path) -> None:
        shutil.copytree(wheels, folder / "opt/wheels")
        names = [str(path.relative_to(folder)) for path in folder.glob("opt/wheels/*.whl")]
        pip = [self.python, "-m", "pip", "install", "--no-index", "--no-deps"]
        root.chroot(folder, [*pip, *(f"/{name}" for name in names)], log)
        # The suite's pytest and hypothesis, in sys.path after the packages from PyPI.
        [packages] = folder.glob(f"{self.prefix.lstrip('/')}/lib/python3.*/site-packages")
        (packages / "suite.pth").write_text("/usr/lib/python3/dist-packages\n")


INSIDE = REPO / "tests/matrix/inside"

ROWS = {
    "bookworm": Row("bookworm", "Debian 12: Python 3.11, Cython 0.29"),
    "trixie": Row("trixie", "Debian 13: Python 3.13, Cython 3.0"),
    "unstable": Row("unstable", "Debian unstable: Python 3.14, Cython 3.1"),
    "free-threaded": SourceRow(
        "trixie",
        "Debian 13's source of CPython 3.13, built without the GIL; Cython from PyPI",
        "/opt/python3.13t",
        "--disable-gil",
    ),
}


def main() -> int:
    options = parse_arguments()
    if options.list:
        for name, row in ROWS.items():
            print(f"{name:15} {row.title}")
        return 0
    host.end_on_signals()
    try:
        host.check_host(TOOLS, "debootstrap", ("--mount", "--net"))
        with host.locked(LOCK):
            return run(options)
    except root.Unavailable as error:
        print(f"CANNOT RUN HERE: {error}", file=sys.stderr)
        return host.EXIT_CANNOT_RUN


def parse_arguments() -> argparse.Namespace:
    words = sys.argv[1:]
    ours, theirs = (words, []) if "--" not in words else split(words, words.index("--"))
    parser = argparse.ArgumentParser(
        prog="ci/test matrix --", description="See the beginning of this file."
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=" ".join(ROWS))
    parser.add_argument("--list", action="store_true", help="list the rows")
    parser.add_argument("--sdist", type=Path, help="build the wheel from this sdist")
    options = parser.parse_args(ours)
    options.pytest = theirs
    options.rows = options.rows or list(ROWS)
    unknown = [name for name in options.rows if name not in ROWS]
    if unknown:
        parser.error(f"no such row: {' '.join(unknown)}; there are {' '.join(ROWS)}")
    if options.sdist and not options.sdist.is_file():
        parser.error(f"no such file: {options.sdist}")
    return options


def split(words: list[str], at: int) -> tuple[list[str], list[str]]:
    return words[:at], words[at + 1 :]


def run(options: argparse.Namespace) -> int:
    work = ignored_folder(REPO / ".cache" / "matrix")
    layers.remove_leftovers(work)
    failed = 0
    for name in options.rows:
        start = time.monotonic()
        try:
            note = run_row(name, options, work)
            word = "ok"
        except (root.CommandFailed, project.BuildFailed) as error:
            note, word = str(error), "FAIL"
            failed += 1
        print(f"{word} {name} {time.monotonic() - start:.0f} s {note}", flush=True)
    print(f"{len(options.rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


def ignored_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder


def run_row(name: str, options: argparse.Namespace, work: Path) -> str:
    """Build and test in the row's own overlay; return pytest's last line."""
    row, log = ROWS[name], work / f"{name}.log"
    log.unlink(missing_ok=True)
    cache = ignored_folder(Path(os.environ.get("E2E_CACHE", REPO / ".cache" / "e2e")))
    overlay = container.Overlay(row.lower(base_root(cache, row.suite), work, log), work)
    try:
        inside(overlay.merged, options.sdist)
        root.chroot(overlay.merged, ["/opt/matrix/wheel", row.python], log)
        versions = (overlay.merged / "opt/versions").read_text().splitlines()
        print(f"# {name}: {', '.join(versions)}", flush=True)
        result = test(overlay.merged, log, options.pytest)
    finally:
        overlay.remove()
    return result


def base_root(cache: Path, suite: str) -> Path:
    """Return the suite's root folder, made under the lock of ci/test e2e, which shares it."""
    stamp = cache / suite / ".e2e-recipe"
    if stamp.is_file() and stamp.read_text() == root.recipe_id(root.packages_of(suite)):
        return cache / suite
    with host.locked(E2E_LOCK):
        return root.ensure_root(cache, suite)


def inside(folder: Path, sdist: Path | None) -> None:
    """Put sources or sdist, and the scripts that use them, into the root folder."""
    root.write(folder / "etc/resolv.conf", "")  # to exist: a test mounts another one over it
    shutil.copytree(INSIDE, folder / "opt/matrix")
    if sdist:
        (folder / "opt/sdist").mkdir()
        shutil.copy(sdist, folder / "opt/sdist")
    else:
        project.copy_sources(REPO, folder / "opt/source")


def test(folder: Path, log: Path, arguments: list[str]) -> str:
    """Run the suites, print what they skipped, and return pytest's last line."""
    start = log.stat().st_size
    command = [str(INSIDE / "run"), str(folder), "/opt/matrix/suites"]
    clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
    root.logged([*command, "-n4", *arguments], log, env=clean)
    with log.open(errors="replace") as output:
        output.seek(start)
        lines = output.read().splitlines()
    print_skipped(lines)
    return lines[-1].strip("= ")


def print_skipped(lines: list[str]) -> None:
    """Print every skipped test with its reason, because it proves nothing here."""
    for line in lines:
        if line.startswith("SKIPPED "):
            print(f"#   {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
