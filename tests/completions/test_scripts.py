"""The scripts themselves, checked by the shells and by shellcheck."""

import shutil
import subprocess

import pytest
from kit.terminal import CTL, INSTALLED, UNITS

CHECKS = {
    "shellcheck": ["shellcheck", INSTALLED["bash"]],
    "bash": ["bash", "-n", INSTALLED["bash"]],
    "zsh": ["zsh", "-n", INSTALLED["zsh"]],
    "fish": ["fish", "--no-execute", INSTALLED["fish"]],
    "shellcheck of units": ["shellcheck", UNITS["bash"]],
    "bash of units": ["bash", "-n", UNITS["bash"]],
    "zsh of units": ["zsh", "-n", UNITS["zsh"]],
    "fish of units": ["fish", "--no-execute", UNITS["fish"]],
    "shellcheck of ctl": ["shellcheck", CTL["bash"]],
    "bash of ctl": ["bash", "-n", CTL["bash"]],
    "zsh of ctl": ["zsh", "-n", CTL["zsh"]],
    "fish of ctl": ["fish", "--no-execute", CTL["fish"]],
}


@pytest.mark.parametrize("program", CHECKS)
def test_no_complaint(program):
    if not shutil.which(CHECKS[program][0]):
        pytest.skip(f"no {program} here")
    done = subprocess.run(CHECKS[program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
