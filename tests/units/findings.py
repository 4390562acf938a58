"""Helpers of the tests of systemd-socket-proxyd-units."""

import subprocess
import sys
from pathlib import Path

from proxyd.units import check

COMMAND = Path(sys.executable).parent / "systemd-socket-proxyd-units"

PATIENCE_S = 100

SETTLE = "--settle-time=500ms "
"""In sets with published ports; taken out where the program does not know the option."""


def found_in(*what, root="", user=False):
    """What `check` finds: [(severity, rule, message)]."""
    findings, _ = check.check([str(one) for one in what], check.Scope(root, user))
    return [(finding.severity, finding.rule, finding.message) for finding in findings]


def rules_in(*what, root="", user=False):
    """The rules that `check` finds broken."""
    return {rule for _, rule, _ in found_in(*what, root=root, user=user)}


def run(*arguments, **more):
    """Run the installed command to its end, which is never a traceback."""
    done = subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        stdin=subprocess.DEVNULL,
        **more,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done
