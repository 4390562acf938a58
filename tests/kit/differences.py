"""Intended differences between the program and the C originals, written next to each test.

    @differs("original", reason="the reply is dropped after a half-close")

The test must then fail on that contender (strict xfail). With `run=False` it is not run there,
because it would hang or spin. `when={"target": ("tcp4", "tcp6")}` limits this to matching
parameters. With `always=False` the contender may pass if the timing happens to be right.
"""

import pytest


def differs(contender, *, reason, run=True, when=None, always=True):
    """Mark a test whose outcome is meant to differ on `contender`.

    `contender` is a name such as `original-252`, or a family of them such as `original`.
    """
    return pytest.mark.differs(contender, reason=reason, run=run, when=when or {}, always=always)


def apply_differences(item, contender):
    """Turn those marks of a collected test that apply to `contender` into xfail or skip."""
    for mark in item.iter_markers("differs"):
        if not _concerns(mark, item, contender):
            continue
        reason = mark.kwargs["reason"]
        item.user_properties.append(("differs", reason))
        if mark.kwargs["run"]:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=mark.kwargs["always"]))
        else:
            item.add_marker(pytest.mark.skip(reason=f"not run on {contender}: {reason}"))


def _concerns(mark, item, contender):
    name = mark.args[0]
    if contender != name and not contender.startswith(name + "-"):
        return False
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return all(parameters.get(key) in _tuple(wanted) for key, wanted in mark.kwargs["when"].items())


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


def write_table(reporter, contender):
    """Print which tests are meant to have another outcome on `contender`, and why."""
    rows = {}
    for outcome in ("xfailed", "skipped", "xpassed", "failed", "passed"):
        for report in reporter.stats.get(outcome, ()):
            if outcome in ("failed", "passed") and getattr(report, "when", "") != "call":
                continue
            for key, reason in getattr(report, "user_properties", ()):
                if key == "differs":
                    test = report.nodeid.split("[")[0].rsplit("/", 1)[-1]
                    seen = rows.setdefault((test, reason), {})
                    seen[outcome] = seen.get(outcome, 0) + 1
    if not rows:
        return
    reporter.section(f"intended differences of {contender} ({len(rows)})")
    words = {
        "xfailed": "fails as written",
        "skipped": "not run",
        "xpassed": "passes here",
        "failed": "PASSES, which is not written",
        "passed": "passes",
    }
    for (test, reason), seen in sorted(rows.items()):
        counts = ", ".join(f"{number} {words[outcome]}" for outcome, number in seen.items())
        reporter.write_line(f"{test} ({counts})\n    {reason}")
