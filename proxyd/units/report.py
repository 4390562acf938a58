"""Findings for people and for programs."""

import json
import os

from proxyd.units.rule import SEVERITIES, Finding


def text(findings: list[Finding]) -> str:
    """Return `path:line: severity: message [rule]`, each with its mend in the line below it."""
    lines = []
    for finding in findings:
        where = _shown(finding.path)
        if finding.line:
            where += f":{finding.line}"
        lines.append(f"{where}: {finding.severity}: {finding.message} [{finding.rule}]\n")
        if finding.mend:
            lines.append(f"    mend: {finding.mend}\n")
    return "".join(lines)


def as_json(findings: list[Finding], pretty: bool) -> str:
    """Return an array of objects, one for each finding."""
    rows = [
        {
            "path": _shown(finding.path),
            "line": finding.line,
            "severity": finding.severity,
            "rule": finding.rule,
            "message": finding.message,
            "mend": finding.mend,
        }
        for finding in findings
    ]
    if pretty:
        return json.dumps(rows, indent=4) + "\n"
    return json.dumps(rows, separators=(",", ":")) + "\n"


def reaches(findings: list[Finding], threshold: str) -> bool:
    """Tell whether one of the findings is as severe as `threshold`."""
    least = SEVERITIES.index(threshold)
    return any(SEVERITIES.index(finding.severity) >= least for finding in findings)


def _shown(path: str) -> str:
    """Return the path relative to the current folder if it is below that."""
    try:
        here = os.getcwd()
    except OSError:
        return path
    return path[len(here) + 1 :] if path.startswith(f"{here}/") else path
