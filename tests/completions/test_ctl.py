"""Completion of the command line of socket-proxyctl in each shell."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "socket-proxyctl "
COMMAND = Path(sys.prefix) / "bin/socket-proxyctl"
COMMANDS = ("list", "top", "watch", "metrics", "status", "terminate")
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")


def options_of_help(*command):
    """The options in the --help of socket-proxyctl, or of one of its commands."""
    done = subprocess.run([COMMAND, *command, "--help"], check=True, capture_output=True, text=True)
    heads = [line for line in done.stdout.splitlines() if re.match(r" +-", line)]
    return {option for head in heads for option in OPTION.findall(head.partition("  ")[0] or head)}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_are_those_of_help(shell, command):
    wanted = {option for option in options_of_help(command) if len(option) > 1}
    assert len(wanted) > 3, wanted
    assert set(OPTION.findall(shell.offers(f"{command} -", wanted, NAME))) == wanted


def test_commands(shell):
    shell.offers("", set(COMMANDS), NAME)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("list --json=pr", "list --json=pretty "),
        ("list --state l", "list --state lingering "),
        ("list --state hea", "list --state header "),
        ("top --interval=5s", "top --interval=5s "),
        ("ter", "terminate "),
    ],
)
def test_values(shell, typed, line):
    shell.completed(typed, "+", line + "+", NAME)
