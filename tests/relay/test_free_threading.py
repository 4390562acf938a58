"""A free-threaded interpreter stays one: the extension says that it can do without the GIL."""

import subprocess
import sys
import sysconfig

import pytest


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this interpreter is not free-threaded"
)
def test_import_leaves_the_gil_off():
    """CPython turns it on, with a warning, for an extension that does not say so."""
    script = "import sys, proxyd._relay; sys.exit(sys._is_gil_enabled())"
    command = [sys.executable, "-I", "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
