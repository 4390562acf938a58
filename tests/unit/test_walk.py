"""ARCHITECTURE.md follows one connection from accept to close: the functions that it names exist,
and each is called by one that is named before it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| [^|\n]*\| ?(?:`([\w./]+)`)? \| (`.+) \|$", re.MULTILINE)
DEFINITION = re.compile(r"^ *(?:cdef (?:inline )?[^(=\n]*?|def )(\w+)\(", re.MULTILINE)


def walks():
    """The tables, each as [(file, function)] in its order."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    section = text.partition("## One connection, from accept to close\n")[2].partition("\n## ")[0]
    for table in section.split("|---|---|---|\n")[1:]:
        steps, file = [], None
        for name, functions in ROW.findall(table):
            file = name or file
            steps += [(file, function) for function in re.findall(r"`(\w+)`", functions)]
        yield steps


def bodies(file):
    """{function: its text, up to the next one} of a source file."""
    text = (ROOT / "proxyd" / file).read_text()
    found = list(DEFINITION.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return {match[1]: text[match.end() : end] for match, end in zip(found, ends, strict=True)}


def missing(steps):
    """Functions that are not in their files, or that no function named before calls."""
    before = []
    for file, function in steps:
        there = bodies(file)
        if function not in there:
            yield f"{file}: {function} does not exist"
            continue
        if before and not any(re.search(rf"\b{function}\(", body) for body in before):
            yield f"{file}: nothing that is named before calls {function}"
        before.append(there[function])


@pytest.mark.parametrize("steps", list(walks()), ids=["relay", "policy"])
def test_the_walk_is_true(steps):
    assert len(steps) > 8
    assert list(missing(steps)) == []


def test_a_function_that_is_gone_or_not_called_is_found():
    steps = [("server.py", "_turn"), ("server.py", "_end"), ("acceptor.py", "no_such")]
    assert list(missing(steps)) == [
        "server.py: nothing that is named before calls _end",
        "acceptor.py: no_such does not exist",
    ]
