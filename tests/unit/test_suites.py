"""The suites themselves: those that look at programs from outside need only the commands."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent

FROM_OUTSIDE = ["blackbox", "cases", "completions", "datagrams", "e2e", "hostile", "soak"]
"""A package's modules are private, and the original has none."""


def imported(path):
    """The modules that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reached(files):
    """{module: the file that imports it} of all that is imported, by way of other tests, too."""
    importers = {}
    pending = list(files)
    while pending:
        file = pending.pop()
        for name in imported(file):
            path = TESTS.joinpath(*name.split("."))
            if name not in importers:
                importers[name] = file
                found = (path.with_suffix(".py"), path / "__init__.py")
                pending += [one for one in found if one.exists()]
    return importers


@pytest.mark.parametrize("suite", FROM_OUTSIDE)
def test_it_runs_where_the_package_cannot_be_imported(suite):
    importers = reached((TESTS / suite).rglob("*.py"))
    assert any(name.startswith("kit.") for name in importers)
    ours = {name: file for name, file in importers.items() if name.partition(".")[0] == "proxyd"}
    assert not ours, ours
