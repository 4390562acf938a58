"""Stands in for %pyproject_save_files: write the %files lines of a module and its metadata.

Usage: save_files.py BUILDROOT SITE OUTPUT MODULE
"""

import sys
from pathlib import Path


def lines(buildroot: Path, folder: Path) -> list[str]:
    """A folder with all that is in it, as a spec file names it; licenses are marked."""
    found = []
    for path in [folder, *sorted(folder.rglob("*"))]:
        name = f"/{path.relative_to(buildroot)}"
        mark = "%dir " if path.is_dir() else "%license " if path.name == "LICENSE" else ""
        found.append(f"{mark}{name}")
    return found


def main() -> int:
    buildroot, site, output, module = sys.argv[1:]
    folder = Path(buildroot + site)
    (metadata,) = folder.glob("*.dist-info")
    if {one.name for one in folder.iterdir()} != {module, metadata.name}:
        sys.exit(f"{site} has more than {module} and {metadata.name}")
    found = [line for one in (folder / module, metadata) for line in lines(Path(buildroot), one)]
    if not any(line.startswith("%license ") for line in found):
        sys.exit("no license in the metadata")
    Path(output).write_text("\n".join(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
