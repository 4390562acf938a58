"""Black-box suite: everything that is promised of the program as seen from outside.

    pytest tests/blackbox --executable=/lib/systemd/systemd-socket-proxyd --contender=original-252

The executable is a parameter, and the suite runs on the C original too; each intended difference
is marked at its test with `differs` and listed at the end of the run.
"""

import os

import pytest
from kit.manager import Manager
from kit.varlink import Caller


def pytest_addoption(pluginmanager):
    pluginmanager.import_plugin("kit.suite")  # imports it once, even if another suite did already


@pytest.fixture
def manager():
    """A service manager with a descriptor store, for kit.manager.restart()."""
    manager = Manager()
    yield manager
    manager.close()


@pytest.fixture
def callers():
    """Call the inspection socket at a path; closed in the end."""
    opened = []

    def call(path):
        opened.append(Caller(path))
        return opened[-1]

    yield call
    for caller in opened:
        caller.close()


@pytest.fixture
def folder(stage):
    """The runtime directory of the program."""
    path = stage.path("runtime")
    os.mkdir(path)
    return path


@pytest.fixture
def inspected(stage, folder, callers):
    """Launch the program with an inspection socket, and return a caller of it."""

    def launch(*arguments, listeners=None, **options):
        options["environment"] = {"RUNTIME_DIRECTORY": folder} | options.get("environment", {})
        stage.launch(*arguments, listeners=listeners or [stage.listener()], **options)
        return callers(f"{folder}/inspect")

    return launch
