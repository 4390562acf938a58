"""What the tests of systemd-socket-proxyd-units share."""

import shutil

import pytest
from units.findings import SETTLE

from proxyd.units.rules_command import knows_settle_time


@pytest.fixture
def units(tmp_path):
    """Write a set of units, {name: text}, and return its folder; a text `-> X` is a symlink."""

    def write(files, folder="set"):
        top = tmp_path / folder
        for name, text in files.items():
            path = top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text.startswith("-> "):
                path.symlink_to(text[3:])
            else:
                path.write_text(text)
        return top

    return write


def make_links(folder):
    """Make the symlinks of the file `links`: an archive of the sources has none."""
    links = folder / "links"
    for line in links.read_text().splitlines() if links.exists() else ():
        name, target = line.split(" -> ")
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(target)


@pytest.fixture
def copy_of(tmp_path):
    """Copy a set of units, with options that the program has."""

    def copy(source):
        target = tmp_path / source.name
        shutil.copytree(source, target)
        make_links(target)
        if not knows_settle_time():
            for path in target.rglob("*.service"):
                if path.is_file():
                    path.write_text(path.read_text().replace(SETTLE, ""))
        return target

    return copy
