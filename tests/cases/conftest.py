"""The twenty-five cases that every relay must survive, seen from outside.

    pytest tests/cases --executable=/lib/systemd/systemd-socket-proxyd --contender=original-252
    pytest tests/cases --no-splice --arguments='--threads=2 --hand-over=always'

Each test is named after its case. Its docstring has the name of the case, a colon, and the expected
result: what a direct connection between client and server would have delivered. Any program that is
started like this one can be tested; `contenders/` makes such programs of HAProxy and nginx, and
--contender=direct is no program at all. `ci/test cases` runs all of them and writes the report.
"""

import shlex

import pytest
from cases.direct import DirectStage
from cases.faults import Faults, Interposer, no_splice
from cases.lan import Lan
from cases.record import Recorder, describe
from kit.stage import Stage


def pytest_addoption(parser, pluginmanager):
    pluginmanager.import_plugin("kit.suite")  # does nothing if it is imported already
    group = parser.getgroup("cases")
    group.addoption("--no-splice", action="store_true", help="splice fails: everything is copied")
    group.addoption("--record", help="write what was seen to this file, as JSON")


def pytest_configure(config):
    path = config.getoption("--record", default=None)
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    describe(item, outcome.get_result(), call.excinfo.value if call.excinfo else None)


@pytest.fixture(scope="session")
def interposer():
    """The library that makes calls fail."""
    interposer = Interposer()
    yield interposer
    interposer.close()


@pytest.fixture
def new_stage(request, executable, contender):
    """As for the black-box tests, but splice may fail, or there may be no program."""
    arguments = shlex.split(request.config.getoption("--arguments", default=""))
    kind = DirectStage if contender == "direct" else Stage
    stage = kind(executable, contender, arguments=arguments)
    stage.environment["CONTENDER_FOLDER"] = stage.directory
    if request.config.getoption("--no-splice", default=False):
        stage.environment |= no_splice(request.getfixturevalue("interposer"))
    return stage


@pytest.fixture
def faults(interposer, stage):
    """Makes calls of the running program fail."""
    faults = Faults(interposer, stage.directory)
    stage.environment |= faults.environment
    return faults


@pytest.fixture
def lan():
    """Two hosts and a cable between them."""
    lan = Lan()
    yield lan
    lan.close()
