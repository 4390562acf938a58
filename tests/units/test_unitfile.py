"""One file, as systemd reads it."""

import os

import pytest

from proxyd.units import unitfile


def read(tmp_path, data):
    path = tmp_path / "x.service"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return unitfile.read(str(path))


def settings(file):
    return [(s.section, s.key, s.value, s.line) for s in file.settings]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("K=a b", "a b"),
        ("K = a ", "a"),
        ("  K=a", "a"),
        ("K=a\\\n  b", "a b"),
        ("K=a \\\n# comment\n; another\n  b", "a  b"),
        ("K=a\\\\\nL=b", "a\\\\"),
        ("K=a\\\n\nL=b", "a"),
        ("K=a\\", "a"),
        ("K=a # no comment", "a # no comment"),
        ("K=a\r\nL=b", "a"),
        ("K=a=b", "a=b"),
        ("K=", ""),
    ],
)
def test_values(tmp_path, text, value):
    file = read(tmp_path, f"[S]\n{text}\n")
    assert settings(file)[0] == ("S", "K", value, 2)
    assert file.problems == []


def test_lines_are_counted_across_continuations(tmp_path):
    file = read(tmp_path, "\ufeff# head\n[A]\nK=1 \\\n  2 \\\n#x\n  3\n\n[B]\nL=4\n[A]\nM=5\n")
    assert settings(file) == [("A", "K", "1  2  3", 3), ("B", "L", "4", 9), ("A", "M", "5", 11)]
    assert file.sections == {"A": 2, "B": 8}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("[S]\nword\nK=1\n", 2, "missing '='"),
        ("K=1\n[S]\nK=1\n", 1, "outside of a section"),
        ("[S]\n=1\nK=1\n", 2, "missing key name"),
        (b"[S]\nK=\xff\nK=1\n", 2, "not valid UTF-8"),
    ],
)
def test_a_line_that_systemd_ignores_is_told(tmp_path, text, line, message):
    file = read(tmp_path, text)
    (problem,) = file.problems
    assert (problem.line, problem.fatal) == (line, False)
    assert message in problem.message
    assert [s[2] for s in settings(file)] == ["1"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[S\nK=1\n", "invalid section header"),
        (b"\x7fELF\x02\x01\x01\0\0\0", "not a text file"),
        (b"[S]\nK=" + b"x" * (unitfile.SIZE_MAX + 1), "more than 4 MiB"),
        (b"[S]\nK=" + b"x" * (1 << 20), "too long"),
    ],
)
def test_a_file_that_systemd_refuses_has_no_settings(tmp_path, data, message):
    file = read(tmp_path, data)
    assert message in file.problems[0].message
    assert file.problems[0].fatal
    assert file.settings == []


def test_what_is_no_file_is_told(tmp_path):
    fifo = tmp_path / "fifo.service"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, tmp_path / "nothing"):
        (problem,) = unitfile.read(str(path)).problems
        assert "cannot be read" in problem.message
