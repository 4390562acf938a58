"""Checks that a log keeps to the rate limits."""

import re

REPEAT_PAUSE = 5
"""Seconds between two lines of the same kind, as in proxyd/log.py."""


def too_many_lines(log, seconds):
    """What is wrong with a log of that many seconds: lines that repeat too often, and crashes."""
    allowed = int(seconds / REPEAT_PAUSE) + 2
    kinds = {}
    for line in log.splitlines():
        kind = re.sub(r" (answers after|\(\d+ more in|\(last of|Client:) .*", r" \1", line)
        kinds[kind] = kinds.get(kind, 0) + 1
    found = [
        f"{count} lines like {kind!r}, at most {allowed} expected"
        for kind, count in kinds.items()
        if count > allowed
    ]
    if "Traceback" in log or "Internal error" in log:
        found.append(log[-2000:])
    return found
