"""Layers: what a row of the matrix needs on top of a suite's root folder.

A layer is an overlay's upper folder, made once per recipe, and only read from then on.
"""

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

from kit.containers import container, root


def ensure_layer(
    work: Path, name: str, lower: Path, recipe: str, make: Callable[[Path], None]
) -> Path:
    """Make the layer `name` on `lower` with `make(folder)`, unless it exists with this recipe.

    The result serves as the `lower` of an overlay, or of another layer.
    """
    key = hashlib.sha256(f"{lower_key(lower)}\n{recipe}".encode()).hexdigest()
    layer = work / name
    stamp = layer / ".layer"
    if not stamp.is_file() or stamp.read_text() != key:
        print(f"# preparing {name}", flush=True)
        root.remove_tree(layer)
        overlay = container.Overlay(lower, work)
        try:
            make(overlay.merged)
            subprocess.run(["umount", overlay.merged], check=True)
            (overlay.folder / "upper").rename(layer)
            stamp.write_text(key)
        finally:
            overlay.remove()
    return Path(f"{layer}:{lower}")


def lower_key(lower: Path) -> str:
    """Return what `lower` was made from: the recipes of the root folder and of its layers."""
    folders = [Path(folder) for folder in str(lower).split(":")]
    stamps = [folder / name for folder in folders for name in (".layer", ".e2e-recipe")]
    return "\n".join(stamp.read_text() for stamp in stamps if stamp.is_file())


def remove_leftovers(work: Path) -> None:
    """Remove the overlays of killed runs (the lock excludes a run that is still going on)."""
    for folder in work.glob("run-*"):
        root.remove_tree(folder)


def install_packages(folder: Path, packages: str, log: Path) -> None:
    """Install Debian packages in `folder`, from the mirror of its root folder."""
    with root.network_files(folder), root.mounted_proc(folder):
        root.chroot(folder, ["apt-get", "update"], log)
        command = ["apt-get", "install", "-y", "--no-install-recommends", *packages.split()]
        root.chroot(folder, command, log)
        root.chroot(folder, ["apt-get", "clean"], log)


def fetch_source(folder: Path, package: str, log: Path) -> None:
    """Unpack the upstream source of a Debian package as /src/PACKAGE in `folder`."""
    with root.network_files(folder), root.mounted_proc(folder):
        root.chroot(folder, ["/bin/sh", "-ec", FETCH_SOURCE, "fetch", package], log)


FETCH_SOURCE = """
sed 's/^deb /deb-src /' /etc/apt/sources.list >/etc/apt/sources.list.d/source.list
apt-get update
mkdir -p /src/download /src/$1
cd /src/download
apt-get source --download-only --tar-only "$1"
tar -C /src/$1 --strip-components=1 -xf "$1"_*.orig.tar.*z
"""
