"""What the shells, and shellcheck, say about the scripts themselves."""

import shutil
import subprocess

import pytest
from terminal import INSTALLED

CHECKS = {
    "shellcheck": ["shellcheck", INSTALLED["bash"]],
    "bash": ["bash", "-n", INSTALLED["bash"]],
    "zsh": ["zsh", "-n", INSTALLED["zsh"]],
    "fish": ["fish", "--no-execute", INSTALLED["fish"]],
}


@pytest.mark.parametrize("program", CHECKS)
def test_nothing_is_to_be_said(program):
    if not shutil.which(program):
        pytest.skip(f"no {program} here")
    done = subprocess.run(CHECKS[program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
