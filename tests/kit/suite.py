"""The pytest plugin of the suites that test the program from outside: options, fixtures, tables."""

import contextlib
import os
import shlex
import sys
from pathlib import Path

import pytest

from kit.datagrams import Datagrams
from kit.differences import apply_differences, write_table
from kit.stage import Stage
from kit.waiting import set_patience

INSTALLED = str(Path(sys.executable).parent / "systemd-socket-proxyd")
"""The command that is installed next to this interpreter."""


def pytest_addoption(parser):
    group = parser.getgroup("black-box suite")
    group.addoption("--executable", default=INSTALLED, help="program under test [%(default)s]")
    group.addoption("--contender", default="ours", help="ours, original-252, original-262, ...")
    group.addoption("--arguments", default="", help="given to the program before all others")
    group.addoption("--big", action="store_true", default=False, help="also transfers of 1 GiB")


# pytest knows the options only if its command line names a folder that has this plugin; a run of
# all the tests uses the defaults.


def _executable(config):
    return config.getoption("--executable", default=INSTALLED)


def _contender(config):
    return config.getoption("--contender", default="ours")


def pytest_configure(config):
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2:
            with contextlib.suppress(OSError):
                os.set_inheritable(fd, False)  # the parent of this run may have left some open
    config.addinivalue_line("markers", "differs(contender, reason, ...): an intended difference")
    config.addinivalue_line("markers", "big: moves gigabytes, run with --big")


def pytest_report_header(config):
    return [f"program under test: {_executable(config)} ({_contender(config)})"]


def pytest_collection_modifyitems(config, items):
    contender = _contender(config)
    for item in items:
        apply_differences(item, contender)
        if item.get_closest_marker("big") and not config.getoption("--big", default=False):
            item.add_marker(pytest.mark.skip(reason="moves gigabytes: run with --big"))


def pytest_terminal_summary(terminalreporter, config):
    write_table(terminalreporter, _contender(config))
    _write_skips(terminalreporter)


def _write_skips(reporter):
    """Print every skipped test with its reason, even without -rs: what it tests is unproven."""
    reasons = {}
    for report in reporter.stats.get("skipped", ()):
        if any(key == "differs" for key, _ in report.user_properties):
            continue
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        test = report.nodeid.split("[")[0].rsplit("/", 1)[-1]
        reasons.setdefault(reason.removeprefix("Skipped: "), []).append(test)
    if reasons:
        reporter.section("not tested here")
        for reason, tests in reasons.items():
            counted = (f"{test} ({tests.count(test)})" for test in sorted(set(tests)))
            reporter.write_line(f"{reason}: {', '.join(counted)}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    setattr(item, f"failed_in_{call.when}", outcome.get_result().outcome != "passed")


@pytest.fixture(autouse=True)
def _patience(request):
    set_patience(4.0 if request.node.get_closest_marker("xfail") else 15.0)


@pytest.fixture(scope="session")
def executable(request):
    """Path of the program under test."""
    path = Path(_executable(request.config))
    if not path.exists():
        pytest.exit(f"no program at {path}: install the package or give --executable=", 2)
    return str(path)


@pytest.fixture(scope="session")
def contender(request):
    """The name of the program under test: `ours`, or one of the others."""
    return _contender(request.config)


@pytest.fixture
def new_stage(request, executable, contender):
    """A new Stage; the `stage` fixture closes it."""
    arguments = shlex.split(request.config.getoption("--arguments", default=""))
    return Stage(executable, contender, arguments=arguments)


@pytest.fixture
def stage(request, new_stage):
    """The program, its clients and its targets; all of them end with the test."""
    yield new_stage
    new_stage.close(checked=not getattr(request.node, "failed_in_call", True))


@pytest.fixture
def datagrams(stage):
    """Listeners, targets and clients that send datagrams; closed before the program ends."""
    world = Datagrams(stage)
    yield world
    world.close()
