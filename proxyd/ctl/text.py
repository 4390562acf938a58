"""Text for terminals and pipes: names that peers chose, numbers with units, widths."""

import unicodedata

from proxyd import log
from proxyd.timespan import format_usec

_SEC = 1_000_000


def escape(value: object) -> str:
    r"""Return text that cannot control a terminal: "a\x1b[2J" instead of the escape sequence.

    Backslashes stay, because a proxy escapes names in the same way before it sends them.
    """
    return log.printable(str(value))


def span(usec: int) -> str:
    """Format a time span in two parts at most: 320us, 15ms, 2.5s, 3min 2s, 5d 4h."""
    accuracy = 1 if usec < 1000 else 1000 if usec < _SEC else _SEC // 10
    return " ".join(format_usec(usec, accuracy if usec < 60 * _SEC else _SEC).split()[:2])


def short_span(usec: int) -> str:
    """Format a time span as one number, for columns: 0, 320us, 1.5s, 65s, 84min, 5.2d."""
    if not usec:
        return "0"
    # Two minutes rather than one: 65s says more than 1min.
    unit_usec, unit = next(
        one for one in _SPAN_UNITS if usec >= (2 if one[0] > _SEC else 1) * one[0] or one[0] == 1
    )
    tenths = usec * 10 // unit_usec
    if tenths < 100 and unit != "us" and tenths % 10:
        return f"{tenths // 10}.{tenths % 10}{unit}"
    return f"{tenths // 10}{unit}"


_SPAN_UNITS = (
    (86400 * _SEC, "d"),
    (3600 * _SEC, "h"),
    (60 * _SEC, "min"),
    (_SEC, "s"),
    (1000, "ms"),
    (1, "us"),
)


def ellipsize(text: str, limit: int, mark: str = "…") -> str:
    """Shorten text to `limit` columns by leaving out its middle: ports and ends are told apart."""
    if width(text) <= limit:
        return text
    room = limit - len(mark)
    if room <= 0:
        return clip(text, limit)
    tail = text[::-1]
    end = clip(tail, room - room // 2)[::-1]
    return clip(text, room - width(end)) + mark + end


def clip(text: str, limit: int) -> str:
    """Return as much of the beginning as fits in `limit` columns."""
    if text.isascii():
        return text[: max(limit, 0)]
    used = 0
    for at, char in enumerate(text):
        used += _char_width(char)
        if used > limit:
            return text[:at]
    return text


def width(text: str) -> int:
    """Return the number of columns that printable text takes."""
    if text.isascii():
        return len(text)
    return sum(_char_width(char) for char in text)


def _char_width(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
