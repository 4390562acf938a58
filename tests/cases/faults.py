"""Calls of the program that fail on request, by an interposer in front of libc (faults.c)."""

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("faults.c")


class Interposer:
    """The built library. Any user may read it, for programs that run as another one."""

    def __init__(self):
        compiler = shutil.which("cc") or shutil.which("gcc")
        if not compiler:
            pytest.skip("no C compiler: faults cannot be made")
        self.directory = tempfile.mkdtemp(prefix="proxyd-faults-")
        os.chmod(self.directory, 0o755)
        self.path = os.path.join(self.directory, "faults.so")
        command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", self.path, str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def close(self):
        shutil.rmtree(self.directory)


class Faults:
    """Switches faults of one program on and off, while it runs."""

    def __init__(self, interposer, directory):
        self.directory = Path(directory, "faults")
        self.directory.mkdir()
        self.environment = {"LD_PRELOAD": interposer.path, "FAULTS": str(self.directory)}

    def _file(self, call, value):
        return self.directory / f"{call}.{value}"

    @contextlib.contextmanager
    def of(self, call, error):
        """While this lasts, `call` fails with `error`, a name such as ENFILE."""
        file = self._file(call, getattr(errno, error))
        file.touch()
        try:
            yield
        finally:
            file.unlink()

    @contextlib.contextmanager
    def short_sends(self, size):
        """While this lasts, the program's sends take `size` bytes at most."""
        file = self._file("send", size)
        file.touch()
        try:
            yield
        finally:
            file.unlink()


def no_splice(interposer):
    """The environment in which splice is refused from the start."""
    return {"LD_PRELOAD": interposer.path, "FAULT_SPLICE": str(errno.EINVAL)}
