"""What all suites share: they test the installed package, hypothesis does not measure time, and a
test that hangs ends the run."""

import faulthandler
import importlib.util
import os
import signal
from pathlib import Path

import pytest

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a suite without it may run where it is not installed
    settings = None

SOURCES = Path(__file__).resolve().parent.parent / "proxyd"

HANG_SECONDS = 300
"""A test that takes longer has hung: the run ends with the stack of every thread. A million
messages of one byte take two minutes on a loaded machine, as do some tests under a sanitizer."""

STDERR = pytest.StashKey[int]()


def pytest_configure(config):
    config.stash[STDERR] = os.dup(2)  # while tests run, fd 2 is captured
    if settings is not None:
        # How long an example takes says more about the machine than about the program.
        settings.register_profile(
            "project", deadline=None, suppress_health_check=[HealthCheck.too_slow]
        )
        settings.load_profile("project")
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        # A shell, or nohup, starts what runs in the background like that, and programs inherit it.
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    package = importlib.util.find_spec("proxyd")
    if package is not None and SOURCES in Path(package.origin).resolve().parents:
        pytest.exit(f"the tests would import {SOURCES}: run them with ci/test", returncode=4)


@pytest.fixture(autouse=True)
def _no_hang(request):
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=request.config.stash[STDERR])
    yield
    faulthandler.cancel_dump_traceback_later()
