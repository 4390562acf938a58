"""Tables whose widths come from the content, and which fit a terminal where there is one."""

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from proxyd.ctl.text import clip, ellipsize, escape, width

Row = dict[str, Any]

_GAP = 2
_FLEXIBLE_KEPT = 21
"""Of a flexible column, what it keeps as long as others can be left out: IPv4 address and port."""

_FLEXIBLE_MIN = 12
"""What it keeps in any case."""

_SGR = {"title": "4", "warn": "33", "bad": "1;31", "good": "32", "dim": "2"}


class Column:
    """One column: its title, the text of a row in it, and what happens if room is short."""

    __slots__ = ("drop", "flexible", "right", "style", "text", "title")

    def __init__(  # noqa: PLR0913 - by name, and each but two has a default
        self,
        title: str,
        text: Callable[[Row], str],
        *,
        right: bool = False,
        drop: int = 0,
        flexible: bool = False,
        style: Callable[[Row], str] | None = None,
    ) -> None:
        self.title = title
        self.text = text
        self.right = right
        self.drop = drop
        """0: shown if at all possible; otherwise columns with a greater number are left out first,
        all with the same number together."""
        self.flexible = flexible
        """Whether the middle of a long text may be left out."""
        self.style = style


class Paper:
    """What is printed on: how wide it is, whether it has colours, how it marks what is cut."""

    __slots__ = ("colour", "mark", "width")

    def __init__(self, columns: int | None, colour: bool, mark: str = "…") -> None:
        self.width = columns
        """None: nothing is cut."""
        self.colour = colour
        self.mark = mark

    def paint(self, text: str, style: str) -> str:
        """Return `text` in a style, where there are colours."""
        return f"\x1b[{_SGR[style]}m{text}\x1b[0m" if style and self.colour else text


def paper(stream: TextIO | None = None, full: bool = False) -> Paper:
    """Return the paper that `stream` is; `full`: nothing is cut on a terminal either."""
    stream = stream or sys.stdout
    terminal = stream.isatty()
    dumb = os.environ.get("TERM", "dumb") == "dumb"
    columns = shutil.get_terminal_size().columns if terminal and not full else None
    colour = terminal and not dumb and not os.environ.get("NO_COLOR")
    utf8 = (stream.encoding or "").lower().replace("-", "") == "utf8"
    return Paper(columns, colour, "…" if utf8 else "...")


def render(rows: Sequence[Row], columns: Iterable[Column], sheet: Paper) -> list[str]:
    """Return the lines of a table, the titles first; no line has spaces at its end."""
    chosen = list(columns)
    cells = {column: [escape(column.text(row)) for row in rows] for column in chosen}
    widths = {
        column: max(width(column.title), *(width(cell) for cell in cells[column]), 0)
        for column in chosen
    }
    if sheet.width is not None:
        chosen = _choose(chosen, widths, sheet.width)
        _shrink(chosen, widths, sheet.width)
    lines = [_line([(column.title, "title") for column in chosen], chosen, widths, sheet)]
    for at, row in enumerate(rows):
        texts = [(cells[one][at], one.style(row) if one.style else "") for one in chosen]
        lines.append(_line(texts, chosen, widths, sheet))
    return lines


def _choose(columns: list[Column], widths: dict[Column, int], limit: int) -> list[Column]:
    """Leave out columns until the rest fits, if need be with shortened texts."""
    chosen = list(columns)
    for drop in sorted({one.drop for one in columns if one.drop}, reverse=True):
        if _least(chosen, widths, _FLEXIBLE_KEPT, 2 / 3) <= limit:
            break
        chosen = [one for one in chosen if one.drop != drop]
    while len(chosen) > 1 and _least(chosen, widths, _FLEXIBLE_MIN) > limit:
        chosen.pop()  # half a number would be a wrong one
    return chosen


def _least(columns: list[Column], widths: dict[Column, int], kept: int, share: float = 0.0) -> int:
    """Return how narrow the columns can be made.

    Flexible ones keep `kept` columns of their text at least, and this share of a long one.
    """
    total = 0
    for one in columns:
        natural = widths[one]
        total += max(min(natural, kept), int(natural * share)) if one.flexible else natural
    return total + _GAP * (len(columns) - 1)


def _shrink(columns: list[Column], widths: dict[Column, int], limit: int) -> None:
    """Narrow the widest flexible column until all fit."""
    excess = sum(widths[one] for one in columns) + _GAP * (len(columns) - 1) - limit
    flexible = [one for one in columns if one.flexible]
    while excess > 0 and flexible:
        widest = max(flexible, key=lambda one: widths[one])
        if widths[widest] <= _FLEXIBLE_MIN:
            break
        widths[widest] -= 1
        excess -= 1


def _line(
    texts: list[tuple[str, str]], columns: list[Column], widths: dict[Column, int], sheet: Paper
) -> str:
    parts = []
    left = sheet.width
    for at, (column, (text, style)) in enumerate(zip(columns, texts, strict=True)):
        room = widths[column]
        text = ellipsize(text, room, sheet.mark)  # noqa: PLW2901
        padding = " " * (room - width(text))
        plain = padding + text if column.right else text + padding
        if at == len(columns) - 1:
            plain = plain.rstrip()
        if left is not None:
            plain = clip(plain, left)
            left -= width(plain) + _GAP
        body = plain.strip()
        parts.append(plain.replace(body, sheet.paint(body, style), 1) if body else plain)
    return (" " * _GAP).join(parts).rstrip()
