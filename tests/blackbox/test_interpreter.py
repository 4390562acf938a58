"""Variables that a user has set for Python in general do not affect this program."""

import os
from pathlib import Path

import pytest
from kit.differences import differs
from kit.sockets import read_exactly

pytestmark = differs("original", reason="is no Python program", run=False)

IMPORTED = ("errno", "time", "_socket", "socket", "select", "_signal", "selectors", "signal", "re")
"""Modules that the program or a library of Python might import."""

PROXYD = ("proxyd", "proxyd/cli", "cli", "log")
"""Names of the package's own modules."""

SILENT = [
    ("PYTHONASYNCIODEBUG", "1"),
    ("PYTHONBREAKPOINT", "nosuch.module"),
    ("PYTHONCASEOK", "1"),
    ("PYTHONDEVMODE", "1"),
    ("PYTHONDONTWRITEBYTECODE", "1"),
    ("PYTHONFAULTHANDLER", "1"),
    ("PYTHONHASHSEED", "1"),
    ("PYTHONINSPECT", "1"),
    ("PYTHONINTMAXSTRDIGITS", "640"),
    ("PYTHONIOENCODING", "utf-16"),
    ("PYTHONMALLOC", "debug"),
    ("PYTHONNODEBUGRANGES", "1"),
    ("PYTHONNOUSERSITE", "1"),
    ("PYTHONOPTIMIZE", "2"),
    ("PYTHONPYCACHEPREFIX", "/dev/null"),
    ("PYTHONSAFEPATH", "1"),
    ("PYTHONSTARTUP", "/nosuch"),
    ("PYTHONTRACEMALLOC", "5"),
    ("PYTHONUNBUFFERED", "1"),
    ("PYTHONUSERBASE", "/nosuch"),
    ("PYTHONUTF8", "0"),
    ("PYTHONWARNINGS", "error"),
    ("PYTHON_CPU_COUNT", "1"),
]

VERBOSE = [("PYTHONPROFILEIMPORTTIME", "1"), ("PYTHONVERBOSE", "1"), ("PYTHONWARNINGS", "bad")]
"""These make the interpreter write to stderr."""


def serves(stage, **launch):
    """Start, serve a client and exit with 0; return stderr without the lines about the end."""
    proxy = stage.launch(stage.echo(), listeners=[stage.listener()], **launch)
    client = stage.connect()
    client.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"
    client.close()
    assert proxy.end()
    assert proxy.status == 0, proxy.log()
    return "\n".join(
        line for line in proxy.log_lines() if not line.startswith(("Stopped; ", "Totals: "))
    )


@pytest.mark.parametrize(("variable", "value"), SILENT)
def test_variable_of_the_interpreter(stage, variable, value):
    """It serves as usual, and writes nothing."""
    assert serves(stage, environment={variable: value}) == ""


@pytest.mark.parametrize(("variable", "value"), VERBOSE)
def test_verbose_variable_of_the_interpreter(stage, variable, value):
    """It serves as usual."""
    serves(stage, environment={variable: value})


def broken_modules(stage, names):
    """A user's folder with modules of these names, which fail."""
    folder = Path(stage.path("modules"))
    folder.mkdir()
    for name in names:
        module = folder / f"{name}.py"
        module.parent.mkdir(exist_ok=True)
        module.write_text("raise RuntimeError('imported the module of a user')\n")
    return folder


@pytest.mark.parametrize("names", [IMPORTED, PROXYD], ids=["library", "package"])
@pytest.mark.parametrize("form", ["{}", "/nosuch:{}", "{}:/nosuch", "{}/", "{}/../modules"])
def test_modules_in_pythonpath(stage, names, form):
    """They come after the interpreter's modules, and after ours where those are installed."""
    folder = broken_modules(stage, names)
    assert serves(stage, environment={"PYTHONPATH": form.format(folder)}) == ""


@pytest.mark.parametrize("value", ["", ":", "."])
def test_modules_in_the_current_folder(stage, value):
    """An empty part of PYTHONPATH is the current folder."""
    folder = broken_modules(stage, IMPORTED)
    prefix = ["sh", "-c", f'cd {folder} && exec "$@"', "sh"]
    assert serves(stage, environment={"PYTHONPATH": value}, prefix=prefix) == ""


def test_library_in_pythonpath(stage):
    """If PYTHONPATH names the interpreter's own folders, they are still found."""
    assert serves(stage, environment={"PYTHONPATH": os.path.dirname(os.__file__)}) == ""


@pytest.mark.parametrize("arguments", [["--version"], ["-c0", "a:1"], ["a:1"]])
def test_inspect_does_not_change_the_exit_status(stage, arguments):
    """PYTHONINSPECT, which would read commands from stdin, does not show a prompt."""
    plain = stage.run(*arguments)
    inspected = stage.run(*arguments, environment={"PYTHONINSPECT": "1"})
    assert (inspected.status, inspected.stdout, inspected.stderr) == (
        plain.status,
        plain.stdout,
        plain.stderr,
    )
