"""Makes calls of the program fail on request, by an interposer in front of libc (faults.c)."""

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
    """The built library. Any user may read it, since the program may run as another one."""

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
    """Switches faults of a running program on and off."""

    def __init__(self, interposer, directory):
        self.directory = Path(directory, "faults")
        self.directory.mkdir()
        self.environment = {"LD_PRELOAD": interposer.path, "FAULTS": str(self.directory)}

    def _file(self, call, value):
        return self.directory / f"{call}.{value}"

    @contextlib.contextmanager
    def of(self, call, error):
        """Within, `call` fails with `error`, a name such as ENFILE."""
        file = self._file(call, getattr(errno, error))
        file.touch()
        try:
            yield
        finally:
            file.unlink()

    @contextlib.contextmanager
    def short_sends(self, size):
        """Within, a send of the program takes `size` bytes at most."""
        file = self._file("send", size)
        file.touch()
        try:
            yield
        finally:
            file.unlink()


def no_splice(interposer):
    """The environment in which splice always fails."""
    return {"LD_PRELOAD": interposer.path, "FAULT_SPLICE": str(errno.EINVAL)}
