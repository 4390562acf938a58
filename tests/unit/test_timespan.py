"""Time spans as in systemd.time(7); the values come from `systemd-analyze timespan`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import timespan

INFINITY = 2**64 - 1


@pytest.mark.parametrize(
    ("text", "usec"),
    [
        ("0", 0),
        ("90", 90_000_000),
        ("+5", 5_000_000),
        ("5min 20s", 320_000_000),
        ("5m5", 305_000_000),
        ("5s5", 10_000_000),
        (" 1h ", 3_600_000_000),
        ("5\tmin", 300_000_000),
        ("500ms", 500_000),
        ("1.5h", 5_400_000_000),
        (".5", 500_000),
        ("1 .5", 1_500_000),
        ("12.34s.56", 12_900_000),
        ("5.5m.5h", 2_130_000_000),
        ("1.123456789s", 1_123_456),
        ("1.5us", 1),
        ("5\u00b5s", 5),
        ("5\u03bcs", 5),
        ("5M", 13_149_000_000_000),
        ("1y 1month", 34_187_400_000_000),
        ("\v5", 5_000_000),
        ("9223372036854775807us", 2**63 - 1),
        ("584541 years", 584_541 * 31_557_600_000_000),
    ],
)
def test_spans(text, usec):
    assert timespan.parse(text) == usec


@pytest.mark.parametrize("text", ["infinity", " infinity", "infinity \t"])
def test_infinity(text):
    assert timespan.parse(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "3.",
        "3. 1",
        "3.sec",
        "1.5.5",
        "-1",
        "-0",
        "5 -3",
        "+",
        "+.5",
        "\v.5",
        "1e3",
        "0x10",
        "1,5",
        "5secs",
        "infinityx",
        "5s infinity",
        "\u0665",  # a digit, but not an ASCII one
        "5 parsecs",
        "9223372036854775808us",
        "18446744073709",
        "584542 years",
        "9223372036854775807us 9223372036854775807us 1us",
        "9" * 5000,
        "0 " * 5000,
    ],
)
def test_garbage(text):
    with pytest.raises(ValueError, match="."):
        timespan.parse(text)


@pytest.mark.parametrize(
    ("usec", "text"),
    [
        (None, "infinity"),
        (0, "0"),
        (1, "1us"),
        (1_500, "1ms"),
        (10_000_000, "10s"),
        (12_900_000, "12.900s"),
        (90_000_000, "1min 30s"),
        (62_500_000, "1min 2.500s"),
        (123_456_789_000_000, "3y 10month 4w 18h 33min 9s"),
    ],
)
def test_format(usec, text):
    assert timespan.format_usec(usec) == text


def test_format_exactly():
    assert timespan.format_usec(1_123_456, 1) == "1.123456s"


@given(st.integers(0, 584_541 * 31_557_600_000_000))
def test_what_is_formatted_exactly_parses_back(usec):
    assert timespan.parse(timespan.format_usec(usec, 1)) == usec


@given(st.lists(st.tuples(st.integers(0, 500_000), st.sampled_from(timespan._UNITS)), min_size=1))
def test_terms_add_up(terms):
    text = " ".join(f"{number}{suffix}" for number, (suffix, _) in terms)
    total = sum(number * unit for number, (_, unit) in terms)
    if len(text) > 1000 or total >= INFINITY:
        with pytest.raises(ValueError, match="too long"):
            timespan.parse(text)
    else:
        assert timespan.parse(text) == total


@given(st.one_of(st.text(), st.text("0123456789. +-\tsmhinfty\v")))
def test_anything_is_a_span_or_a_value_error(text):
    try:
        usec = timespan.parse(text)
    except ValueError:
        return
    assert usec is None or 0 <= usec < INFINITY
