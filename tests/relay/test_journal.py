"""The order of steps in which a relay that is killed at any instant loses nothing: journal.c."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("journal.c")


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("journal") / "journal"
    subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-o", program, SOURCE], check=True)
    return program


@pytest.mark.parametrize("source", ["tcp", "unix"])
@pytest.mark.parametrize("sink", ["tcp", "unix"])
def test_nothing_is_lost_at_random_kills(journal, source, sink):
    command = [journal, source, sink, "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9000000 bytes" in done.stdout
