"""Completion of the command line of systemd-socket-proxyd-units in each shell."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "systemd-socket-proxyd-units "
COMMAND = Path(sys.prefix) / "bin/systemd-socket-proxyd-units"
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")


def options_of_help(*command):
    """The options in the --help of systemd-socket-proxyd-units, or of one of its commands."""
    done = subprocess.run([COMMAND, *command, "--help"], check=True, capture_output=True, text=True)
    heads = [line for line in done.stdout.splitlines() if re.match(r" +-", line)]
    return {option for head in heads for option in OPTION.findall(head.partition("  ")[0] or head)}


@pytest.mark.parametrize("command", ["check", "create", "switch"])
def test_the_options_are_those_of_help(shell, command):
    wanted = {option for option in options_of_help(command) if len(option) > 1}
    assert len(wanted) > 3, wanted
    assert set(OPTION.findall(shell.offers(f"{command} -", wanted, NAME))) == wanted


def test_commands(shell):
    shell.offers("", {"check", "create", "switch"}, NAME)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("check --json=pr", "check --json=pretty "),
        ("check --threshold w", "check --threshold warning "),
        ("check --explain=no-o", "check --explain=no-order "),
        ("create --idle=5", "create --idle=5min "),
        ("switch pla", "switch plain.socket "),
        ("check nam", "check named.socket "),
    ],
)
def test_values(shell, typed, line):
    shell.completed(typed, "+", line + "+", NAME)
