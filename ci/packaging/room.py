"""A room to build or test packages in: a temporary overlay of a cached Debian root, no network.

The scripts in inside/ run there. Their lines that begin with "ok" or "note" are printed; everything
goes to the log of the room.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kit.containers import cgroup, container, project, root

REPO = Path(__file__).resolve().parent.parent.parent

INSIDE = Path(__file__).resolve().parent / "inside"
SHOWN = ("ok ", "note ")

Unavailable = root.Unavailable


class StepError(Exception):
    """A step failed; str() says which, with the end of its log."""


class Room:
    """`path` is its root folder; /room in it has the scripts, the inputs and the results."""

    def __init__(self, path: Path, log: Path):
        self.path = path
        self.log = log
        self.folder = path / "room"
        shutil.copytree(INSIDE, self.folder / "inside")
        (self.folder / "out").mkdir()
        for name in ("etc/dpkg/dpkg.cfg.d/e2e", "usr/sbin/policy-rc.d"):
            (path / name).unlink()  # packages are installed in full here, as on any machine

    def add_sources(self) -> None:
        """Copy the project to /room/source, as git sees it."""
        project.copy_sources(REPO, self.folder / "source")

    def add(self, *files: Path) -> None:
        """Copy files to /room."""
        for file in files:
            shutil.copy2(file, self.folder)

    def results(self, folder: Path) -> list[Path]:
        """Move the files in /room/out to `folder`; return their new paths, sorted."""
        return [
            Path(shutil.move(file, folder / file.name))
            for file in sorted((self.folder / "out").iterdir())
        ]

    def run(self, script: str, *arguments: str) -> None:
        """Run inside/SCRIPT in /room, and print its results. Raises StepError if it fails."""
        groups = container.container_groups()
        # --pdeathsig ends the processes in the room even if this process is killed.
        argv = ["sh", "-c", container.IN_GROUPS, "in-groups", *map(str, groups), "--"]
        argv += ["setpriv", "--pdeathsig", "TERM", "--", *self._nspawn()]
        argv += ["/bin/bash", f"/room/inside/{script}", *arguments]
        try:
            with self.log.open("a") as log:
                log.write(f"\n$ {script} {' '.join(arguments)}\n")
                log.flush()
                status = self._shown(argv, log.fileno())
        finally:
            for group in groups:
                cgroup.remove_group(group)
        if status:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
            raise StepError(f"{script} ended with {status}, see {self.log}\n{tail}")

    def _nspawn(self) -> list[str]:
        return [
            "systemd-nspawn",
            "--quiet",
            "--register=no",
            "--keep-unit",
            f"--machine=package-{os.getpid()}",
            f"--directory={self.path}",
            "--private-network",
            "--pipe",
            "--as-pid2",
            "--link-journal=no",
            "--resolv-conf=off",
            "--timezone=off",
            "--setenv=LC_ALL=C.UTF-8",
            "--setenv=DEBIAN_FRONTEND=noninteractive",
            "--chdir=/room",
            "--",
        ]

    def _shown(self, argv: list[str], log: int) -> int:
        """Run a command with its output to `log`, and lines that begin with SHOWN to stdout too."""
        with subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **container.NSPAWN_ENVIRONMENT},
            start_new_session=True,
        ) as process:
            assert process.stdout
            try:
                for line in process.stdout:
                    os.write(log, line)
                    if line.startswith(tuple(word.encode() for word in SHOWN)):
                        print(f"  {line.decode(errors='replace').rstrip()}", flush=True)
                return process.wait()
            finally:
                process.terminate()


@contextmanager
def open_room(kind: str, suite: str, packages: str, log: Path) -> Iterator[Room]:
    """Yield a room of `suite` with `packages`. Raises Unavailable if none can be made."""
    cache = cache_folder()
    lower = root.ensure_root(made(cache / kind), suite, packages)
    overlay = container.Overlay(lower, cache)
    try:
        yield Room(overlay.merged, log)
    finally:
        overlay.remove()


def cache_folder() -> Path:
    """The folder of root folders and overlays: PACKAGE_CACHE, or one that git ignores."""
    return made(Path(os.environ.get("PACKAGE_CACHE", REPO / ".cache" / "package")))


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_leftovers() -> None:
    """Remove the overlays of killed runs (the lock excludes a run that is still going on)."""
    for folder in cache_folder().glob("run-*"):
        root.remove_tree(folder)
