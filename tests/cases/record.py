"""Writes the results as JSON, for the table of which program passes which case."""

import json
import re
from pathlib import Path

CASE = re.compile(r"test_(\d\d)([a-z]?)_")


def describe(item, report, error):
    """Add its case and what was seen to a report, which xdist sends to its main process."""
    found = CASE.match(item.name)
    if not found:
        return
    title, _, expectation = (item.function.__doc__ or "").strip().partition(":")
    report.user_properties.append(
        (
            "case",
            {
                "number": int(found[1]),
                "part": found[2],
                "title": title,
                "expectation": " ".join(expectation.split()),
                "test": item.originalname,
                "parameters": item.name.partition("[")[2].removesuffix("]"),
                "seen": words(error),
            },
        )
    )


def words(error):
    """One line about an exception."""
    if error is None:
        return ""
    text = str(error).strip().partition("\n")[0].removeprefix("not applicable: ")
    name = type(error).__name__
    plain = name in ("AssertionError", "Skipped")
    return text if plain and text else f"{name}: {text}"


class Recorder:
    """Collects the reports in the main process, and writes them at the end."""

    def __init__(self, path):
        self.path = Path(path)
        self.rows = {}

    def pytest_runtest_logreport(self, report):
        case = dict(report.user_properties).get("case")
        if not case or (report.when != "call" and report.outcome == "passed"):
            return
        if self.rows.get(report.nodeid, {}).get("outcome") != "failed":
            self.rows[report.nodeid] = case | {"outcome": report.outcome}

    def pytest_sessionfinish(self):
        rows = sorted(self.rows.values(), key=lambda row: (row["test"], row["parameters"]))
        self.path.write_text(json.dumps(rows, indent=1))
