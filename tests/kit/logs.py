"""Whether a log is within the rate limits."""

import re

REPEAT_PAUSE = 5
"""Seconds between two lines of one kind, as in proxyd/log.py."""


def too_many_lines(log, seconds):
    """Kinds of lines that came more often than they may in that time, and crashes."""
    most = int(seconds / REPEAT_PAUSE) + 2
    kinds = {}
    for line in log.splitlines():
        kind = re.sub(r" (answers after|\(\d+ more in|\(last of) .*", r" \1", line)
        kinds[kind] = kinds.get(kind, 0) + 1
    found = [
        f"{count} lines like {kind!r}, {most} at most expected"
        for kind, count in kinds.items()
        if count > most
    ]
    if "Traceback" in log or "Internal error" in log:
        found.append(log[-2000:])
    return found
