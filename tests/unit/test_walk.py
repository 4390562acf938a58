"""ARCHITECTURE.md follows one connection from accept to close, downwards through the sources."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| [^|\n]*\| ?(?:`([\w./]+)`)? \| (`.+) \|$", re.MULTILINE)
DEFINITION = re.compile(r"^ *(?:cdef inline [^(\n]*?|def )(\w+)\(", re.MULTILINE)


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


RELAY, POLICY = walks()


def functions(file):
    """{function: its text, up to the next one} of a source file, in its order."""
    text = (ROOT / "proxyd" / file).read_text()
    found = list(DEFINITION.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return {match[1]: text[match.end() : end] for match, end in zip(found, ends, strict=True)}


def not_called(steps):
    """Steps that are not in their files, or that no step before them calls."""
    before = []
    for file, function in steps:
        there = functions(file)
        if function not in there:
            yield f"{file}: {function} is not there"
            continue
        if before and not any(re.search(rf"\b{function}\(", body) for body in before):
            yield f"{file}: no step before {function} calls it"
        before.append(there[function])


def jumps_back(steps):
    """Steps that stand in their file above the step before."""
    place = {}
    for file, function in steps:
        number = list(functions(file)).index(function)
        if number < place.get(file, 0):
            yield f"{file}: {function} stands above the step before"
        place[file] = number


@pytest.mark.parametrize("steps", [RELAY, POLICY], ids=["relay", "policy"])
def test_each_step_is_called_by_one_before_it(steps):
    assert len(steps) > 8
    assert list(not_called(steps)) == []


def test_the_relay_is_followed_downwards():
    files = [file for file, _ in RELAY]
    assert [
        file for at, file in enumerate(files) if file in files[:at] and file != files[at - 1]
    ] == []
    assert list(jumps_back(RELAY)) == []


def test_a_false_walk_is_found():
    steps = [("server.py", "_turn"), ("server.py", "serve"), ("acceptor.py", "no_such")]
    assert list(not_called(steps)) == [
        "server.py: no step before serve calls it",
        "acceptor.py: no_such is not there",
    ]
    assert list(jumps_back(steps[:2])) == ["server.py: serve stands above the step before"]
