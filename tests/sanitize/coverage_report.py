"""Which lines of the package no test has run: counts, a list, and what is said about each.

    coverage_report.py ROOT GCOV-JSON COVERAGE-JSON

The first is what gcov tells of the generated C, whose lines are named as those of the .pyx and .pxd
files; the second is from coverage.py. Each line that was not run must be argued in
tests/COVERAGE.md: by its file and its text, since numbers change. Exit status 1 where one is not.
"""

import json
import re
import sys
from pathlib import Path

ROW = re.compile(r"^\| `(?P<file>[^`]+)` \| `(?P<text>.*)` \| (?P<reason>.+) \|$")
"""A row of tests/COVERAGE.md: file, line, reason."""

DECLARATION = re.compile(r"(cdef |def )(?!\w[^()]* = )")
"""A header, or variables without a value. Those with one are statements."""


def from_gcov(root, report):
    """{file: {line number: how often it was run}} of the .pyx and .pxd files."""
    found = {}
    for file in report["files"]:
        name = file["file"]
        if not name.startswith("proxyd/") or not name.endswith((".pyx", ".pxd")):
            continue
        source = (root / name).read_text().splitlines()
        counts = found.setdefault(name, {})
        for line in file["lines"]:
            number = line["line_number"]
            # What Cython adds behind a function counts as the lines after it.
            if number <= len(source) and is_statement(source[number - 1]):
                counts[number] = max(counts.get(number, 0), line["count"])
    return found


def is_statement(text):
    """Whether a line can be run: not blank, no comment, and no header of what only declares."""
    text = text.strip()
    if DECLARATION.match(text):
        return False
    return bool(text) and not text.startswith(("#", '"""', "@", ")"))


def from_coverage(report):
    """The same of the Python files."""
    found = {}
    for path, file in report["files"].items():
        counts = dict.fromkeys(file["executed_lines"], 1)
        counts.update(dict.fromkeys(file["missing_lines"], 0))
        found[f"proxyd/{Path(path).name}"] = counts
    return found


def arguments(root):
    """{(file, text of the line): reason}."""
    rows = map(ROW.match, (root / "tests/COVERAGE.md").read_text().splitlines())
    return {(row["file"], row["text"]): row["reason"] for row in rows if row}


def main(root, gcov, coverage):
    argued, stale = arguments(root), set(arguments(root))
    files = from_gcov(root, json.loads(Path(gcov).read_text()))
    files |= from_coverage(json.loads(Path(coverage).read_text()))
    missing = open_lines = lines = 0
    for name, counts in sorted(files.items()):
        source = (root / name).read_text().splitlines()
        idle = [number for number, count in sorted(counts.items()) if count == 0]
        share = 100 * (1 - len(idle) / max(len(counts), 1))
        print(f"{name:32} {len(counts) - len(idle):5} of {len(counts):5} lines  {share:5.1f} %")
        for number in idle:
            text = source[number - 1].strip()
            reason = argued.get((name, text))
            stale.discard((name, text))
            open_lines += reason is None
            print(f"    {number:4}  {text}\n          {reason or 'NOT ARGUED'}")
        lines += len(counts)
        missing += len(idle)
    for name, text in sorted(stale):
        print(f"argued, and run all the same or gone: {name}: {text}")
    share = 100 * (1 - missing / lines)
    argued_lines = missing - open_lines
    print(f"{share:.1f} % of {lines} lines; not run: {argued_lines} argued, {open_lines} not")
    return 1 if open_lines else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
