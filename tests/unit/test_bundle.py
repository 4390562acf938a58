"""The bundle that the command loads: it is the sources, in another form."""

import ast
import linecache
import marshal
import os
import shutil
import subprocess
import sys
from importlib.util import MAGIC_NUMBER, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import proxyd

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(proxyd.__file__).parent
NAME = f"start.{sys.implementation.cache_tag}.bundle"
PATIENCE = 30
"""Seconds after which something that has not happened counts as failed."""


@pytest.fixture(scope="module")
def maker():
    spec = spec_from_file_location("make_bundle", ROOT / "make_bundle.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tmp_path):
    """A copy of the installed package."""
    folder = tmp_path / "proxyd"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(program, package):
    """Run a program that imports `package`, as a command of a package does."""
    program = f"import sys; sys.path.insert(0, {str(package.parent)!r}); {program}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.stdout + done.stderr


def make(folder):
    subprocess.run(
        [sys.executable, "-I", ROOT / "make_bundle.py", folder], timeout=PATIENCE, check=True
    )
    return (folder / NAME).read_bytes()


def test_it_is_made_of_the_installed_sources(package):
    installed = (PACKAGE / NAME).read_bytes()
    (package / NAME).unlink()
    made = make(package)
    assert made[: len(MAGIC_NUMBER)] == installed[: len(MAGIC_NUMBER)] == MAGIC_NUMBER
    # As objects: equal code may have been marshalled in more than one way.
    assert marshal.loads(made[4:]) == marshal.loads(installed[4:])


def test_it_is_reproducible(package):
    assert make(package) == make(package)


def test_it_is_what_a_start_imports(package, maker):
    """Each module once, below those that it imports, and nothing else."""
    (package / NAME).unlink()
    program = (
        "import proxyd.cli, proxyd.server; "
        "print(*[name for name in sys.modules if name.startswith('proxyd.')])"
    )
    imported = {name.removeprefix("proxyd.") for name in run(program, package).split()}
    assert imported - {"_relay"} == set(maker.MODULES)
    seen = set()
    for name in maker.MODULES:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        assert at_once(tree) & set(maker.MODULES) <= seen, name
        seen.add(name)


def at_once(tree):
    """The modules of the package that a module imports when it is imported."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "proxyd":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.removeprefix("proxyd."))
    return found


def test_the_command_loads_all_of_it(package):
    program = (
        "import proxyd; proxyd.use_bundle(); from proxyd import cli; "
        "print(cli.main.__doc__, cli.main.__annotations__, proxyd.server.__file__)"
    )
    assert run(program, package) == f"None {{}} {package}/server.py\n"


def test_a_traceback_has_files_and_lines(package):
    program = "import proxyd; proxyd.use_bundle(); from proxyd import address; address.text(None)"
    said = run(program, package)
    line = next(
        number
        for number, text in enumerate((PACKAGE / "address.py").read_text().splitlines(), 1)
        if "kind = family(address)" in text
    )
    assert f'File "{package}/address.py", line {line}, in text' in said
    assert linecache.getline(str(package / "address.py"), line).strip() in said


def test_a_debugger_stops_at_a_line_of_the_source(package):
    line = next(
        number
        for number, text in enumerate((PACKAGE / "cli.py").read_text().splitlines(), 1)
        if "_open_standard_fds()" in text
    )
    script = package.parent / "command"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(package.parent)!r})\n"
        "from proxyd import use_bundle\nuse_bundle()\n"
        "from proxyd.cli import main\nmain(['x', '--version'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pdb", "-c", "next", "-c", "next", "-c", "next", script],
        input=f"break {package}/cli.py:{line}\ncontinue\nwhere\nquit\n",
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert f"{package}/cli.py({line})main()" in done.stdout, done.stdout + done.stderr


def test_a_module_can_be_loaded_again_from_its_source(package):
    program = (
        "import proxyd; proxyd.use_bundle(); from proxyd import errors; import importlib; "
        "print(importlib.reload(errors).UsageError.__doc__.split()[0])"
    )
    assert run(program, package) == "The\n"


@pytest.mark.parametrize("content", [None, b"", b"\0" * 100], ids=["no", "an empty", "a foreign"])
def test_without_a_bundle_that_fits_the_sources_are_imported(package, content):
    (package / NAME).unlink()
    if content is not None:
        (package / NAME).write_bytes(content)
    program = (
        "import proxyd; proxyd.use_bundle(); from proxyd import cli; print(bool(cli.main.__doc__))"
    )
    assert run(program, package) == "True\n"


def test_a_module_that_fails_is_left_to_whoever_imports_it(package):
    next(package.glob("_relay.*.so")).unlink()
    program = "import proxyd; proxyd.use_bundle(); print('loaded'); from proxyd import server"
    said = run(program, package)
    assert said.startswith("loaded\n")
    assert "No module named 'proxyd._relay'" in said
