"""Points of the walk: which call of a scenario fails, and how; and how they are written."""

import re
from typing import NamedTuple

from faults.control import FOR_EVER, Strike
from faults.table import AT_START, FAILURES, strike_of


class Point(NamedTuple):
    """A scenario and its Strike, by names."""

    scenario: str
    scope: str
    call: str
    failure: str
    start: int
    count: int


NOTATION = re.compile(r"(relay|python)\.(\w+)=(\w+)@(\d+)(?:(-)|x(\d+))?")


def text(point):
    """SCENARIO SCOPE.CALL=FAILURE@START, then xCOUNT for several in a row, - for all from then."""
    count = "-" if point.count == FOR_EVER else f"x{point.count}" if point.count > 1 else ""
    call = f"{point.scope}.{point.call}={point.failure}@{point.start}{count}"
    return f"{point.scenario} {call}"


def parse(scenario, call):
    """The Point that text() has written so. Raises ValueError."""
    found = NOTATION.fullmatch(call)
    if found is None:
        raise ValueError(f"not SCOPE.CALL=FAILURE@START[xCOUNT|-]: {call}")
    scope, name, failure, start, for_ever, count = found.groups()
    return Point(
        scenario, scope, name, failure, int(start), FOR_EVER if for_ever else int(count or 1)
    )


def strike(point):
    action, error = strike_of(point.failure)
    return Strike(point.scope, point.call, action, error, point.start, point.count)


def sampled(count, limit):
    """All numbers from 1 to `count`, or `limit` of them: the first, the last, and some between."""
    if count <= limit:
        return range(1, count + 1)
    first, last = limit // 2, max(limit // 8, 1)
    between = limit - first - last
    stride = (count - last - first) / max(between, 1)
    chosen = {*range(1, first + 1), *range(count - last + 1, count + 1)}
    return sorted(chosen | {first + 1 + int(i * stride) for i in range(between)})


def points_of(scenario, calls, limit):
    """All points of a scenario; `calls` is {(scope, call): the number of these calls}."""
    for (scope, call), count in sorted(calls.items()):
        if (scope, call) == AT_START and not scenario.startswith("start-"):
            continue
        for failure, counts in FAILURES[scope].get(call, {}).items():
            for in_a_row in counts:
                numbers = sampled(count, limit if in_a_row == 1 else max(limit // 2, 1))
                for number in numbers:
                    yield Point(scenario, scope, call, failure, number, in_a_row)
