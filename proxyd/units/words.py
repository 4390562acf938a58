"""Values of settings: words with quotes and escapes, booleans, time spans."""

from proxyd import timespan

_WHITESPACE = " \t\n\r"
_ESCAPES = {
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
    "s": " ",
}
_TRUE = ("1", "yes", "y", "true", "t", "on")
_FALSE = ("0", "no", "n", "false", "f", "off")


def split(text: str, escapes: bool = True) -> list[str]:
    """Split into words as extract_first_word() of systemd does: quotes, and escapes as in C.

    Without `escapes` a backslash is a character like any other: it is a part of names of units.
    Raises ValueError if a quote is not closed.
    """
    words: list[str] = []
    at = 0
    while True:
        while at < len(text) and text[at] in _WHITESPACE:
            at += 1
        if at == len(text):
            return words
        word, at = _word(text, at, escapes)
        words.append(word)


def boolean(text: str) -> bool | None:
    """Read a boolean; None for anything else."""
    lower = text.lower()
    return True if lower in _TRUE else False if lower in _FALSE else None


def span(text: str) -> int | str | None:
    """Read a time span: microseconds, None for infinity; the text itself if it is no span."""
    try:
        return timespan.parse(text)
    except ValueError:
        return text


def _word(text: str, at: int, escapes: bool) -> tuple[str, int]:
    """Read the word that begins at `at`; return it, and where it ends."""
    out: list[str] = []
    quote = ""
    while at < len(text):
        char = text[at]
        if escapes and char == "\\" and at + 1 < len(text):
            piece, at = _escape(text, at + 1)
            out.append(piece)
            continue
        if quote and char == quote:
            quote = ""
        elif not quote and char in "\"'":
            quote = char
        elif not quote and char in _WHITESPACE:
            break
        else:
            out.append(char)
        at += 1
    if quote:
        raise ValueError("a quote is not closed")
    return "".join(out), at


def _escape(text: str, at: int) -> tuple[str, int]:
    """Read what follows a backslash; an escape unknown to C stays as it is."""
    char = text[at]
    if char in _ESCAPES:
        return _ESCAPES[char], at + 1
    if char in "\\\"'":
        return char, at + 1
    length = {"x": 2, "u": 4, "U": 8}.get(char, 0)
    digits = text[at + 1 : at + 1 + length]
    if length and len(digits) == length:
        try:
            return chr(int(digits, 16)), at + 1 + length
        except (ValueError, OverflowError):
            pass
    if char in "01234567":
        try:
            return chr(int(text[at : at + 3], 8)), at + 3
        except ValueError:
            pass
    return "\\" + char, at + 1
