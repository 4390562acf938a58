"""What the tests of socket-proxyctl share."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from ctl.fake_proxy import COMMAND, FakeProxy, deadline, write_systemctl


@pytest.fixture
def place():
    """A folder with a name that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="ctl-") as name:
        yield Path(name)


@pytest.fixture
def proxy(place):
    """Start a fake proxy that listens at NAME/inspect, as with RuntimeDirectory=NAME."""
    started = []

    def start(name="web", **replies):
        (place / "run" / name).mkdir(parents=True, exist_ok=True)
        one = FakeProxy(place / "run" / name / "inspect", **replies)
        started.append(one)
        return one

    yield start
    for one in started:
        one.close()


@pytest.fixture
def environment(place):
    """The environment of the command: a user's manager whose runtime folder is the test's."""
    write_systemctl(place / "bin", sys.executable, {})
    return {
        "PATH": f"{place / 'bin'}:/usr/bin:/bin",
        "XDG_RUNTIME_DIR": str(place / "run"),
        "LANG": "C.UTF-8",
        "TERM": "xterm-256color",
        "TZ": "UTC",
    }


@pytest.fixture
def manager(place, environment):
    """Tell the service manager which units there are: {name: properties}."""

    def tell(units):
        write_systemctl(place / "bin", sys.executable, units)

    return tell


@pytest.fixture
def run(environment):
    """Run the command to its end."""

    def call(*arguments, **more):
        return subprocess.run(
            [COMMAND, *arguments],
            env=environment | more,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=deadline(),
            check=False,
        )

    return call


@pytest.fixture
def start(environment):
    """Start the command, and kill it in the end."""
    started = []

    def call(*arguments, **settings):
        process = subprocess.Popen([COMMAND, *arguments], env=environment, **settings)
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
