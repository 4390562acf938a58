"""Words, spans, specifiers and names of units."""

import pytest

from proxyd.units import names, specifiers, words


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        (" a  b\tc ", ["a", "b", "c"]),
        ("'a b' \"c d\"e", ["a b", "c de"]),
        (r"a\x20b \"c\" d\\e f\sg", ["a b", '"c"', "d\\e", "f g"]),
        (r"'a\'b' \101 \q", ["a'b", "A", r"\q"]),
        ('""', [""]),
        (r"\u20ac", ["\u20ac"]),
    ],
)
def test_words(text, wanted):
    assert words.split(text) == wanted


def test_names_of_units_keep_their_backslashes():
    assert words.split(r'a\x2db.service "c\x20d"', escapes=False) == [r"a\x2db.service", r"c\x20d"]


def test_a_quote_that_is_not_closed():
    with pytest.raises(ValueError, match="not closed"):
        words.split("a 'b")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("%n", "a-b@x-y.service"),
        ("%N %p %i %I %j", "a-b@x-y a-b x-y x/y b"),
        ("%P %J %f", "a/b b /x/y"),
        ("100%%", "100%"),
        ("%t %T", "/run /tmp"),
        ("%z 5%", "%z 5%"),
        ("%H", specifiers.UNKNOWN),
    ],
)
def test_specifiers(text, wanted):
    assert specifiers.expand(text, names.parse("a-b@x-y.service"), user=False) == wanted


def test_specifiers_of_a_user_are_not_known():
    assert specifiers.expand("%t", names.parse("a.service"), user=True) == specifiers.UNKNOWN


@pytest.mark.parametrize(
    "text", ["", "a", "a.b", ".service", "@.service", "a b.service", "é.socket"]
)
def test_what_is_no_name(text):
    assert not names.is_unit(text)


@pytest.mark.parametrize("text", ["/srv/a-b", "a.b", ".a", "x@y", "ü", "a\\b"])
def test_escapes(text):
    assert names.unescape(names.escape(text)) == text
    assert names.is_unit(f"a@{names.escape(text)}.service")


def test_a_name_too_long_is_none():
    assert not names.is_unit("a" * 250 + ".service")
