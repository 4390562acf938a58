"""Text, numbers and tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd.ctl.table import Column, Paper, render
from proxyd.ctl.text import clip, ellipsize, escape, short_span, span, width


@pytest.mark.parametrize(
    ("usec", "text"),
    [
        (0, "0"),
        (320, "320us"),
        (1999, "1.9ms"),
        (1_999_999, "1.9s"),
        (119_000_000, "119s"),
        (15_000, "15ms"),
        (2_500_000, "2.5s"),
        (3_000_000, "3s"),
        (65_999_999, "65s"),
        (150_000_000, "2.5min"),
        (84 * 60_000_000, "84min"),
        (47 * 3600_000_000, "47h"),
        (125 * 3600_000_000, "5.2d"),
    ],
)
def test_one_number(usec, text):
    assert short_span(usec) == text


@pytest.mark.parametrize(
    ("usec", "text"),
    [(320, "320us"), (2_550_000, "2.5s"), (182_000_000, "3min 2s"), (0, "0")],
)
def test_two_parts(usec, text):
    assert span(usec) == text


@given(st.text())
def test_escaped_text_is_printable(text):
    assert escape(text).isprintable()
    assert not text.isprintable() or escape(text) == text


@given(st.text().map(escape), st.integers(0, 40))
def test_text_is_cut_to_a_width(text, limit):
    assert width(clip(text, limit)) <= limit
    assert width(ellipsize(text, limit)) <= limit
    assert width(text) > limit or ellipsize(text, limit) == text


COLUMNS = [
    Column("A", lambda row: row["a"], flexible=True),
    Column("NUMBER", lambda row: str(row["b"]), right=True, drop=1),
    Column("LAST", lambda row: row["c"], drop=2, style=lambda _: "bad"),
]


@given(
    st.lists(st.fixed_dictionaries({"a": st.text(), "b": st.integers(), "c": st.text()})),
    st.integers(1, 120),
)
def test_tables_fit(rows, columns):
    lines = render(rows, COLUMNS, Paper(columns, colour=False))
    assert len(lines) == len(rows) + 1
    assert max(map(width, lines)) <= columns
    assert all(line.isprintable() and line == line.rstrip() for line in lines)


@given(st.lists(st.fixed_dictionaries({"a": st.text(), "b": st.integers(), "c": st.text()})))
def test_without_a_width_nothing_is_cut(rows):
    lines = render(rows, COLUMNS, Paper(None, colour=False))
    for row, line in zip(rows, lines[1:], strict=True):
        for key in "abc":
            assert escape(row[key]).strip() in line


def test_colours_do_not_count():
    rows = [{"a": "x" * 50, "b": 7, "c": "end"}]
    plain = render(rows, COLUMNS, Paper(60, colour=False))
    coloured = render(rows, COLUMNS, Paper(60, colour=True))
    assert "\x1b[1;31mend\x1b[0m" in coloured[1]
    for code in ("\x1b[1;31m", "\x1b[4m", "\x1b[0m"):
        coloured = [line.replace(code, "") for line in coloured]
    assert coloured == plain
