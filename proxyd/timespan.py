"""Time spans in the syntax of systemd.time(7)."""

_SEC = 1_000_000
_MINUTE = 60 * _SEC
_HOUR = 60 * _MINUTE
_DAY = 24 * _HOUR
_WEEK = 7 * _DAY
_MONTH = 2_629_800 * _SEC  # a twelfth of a year
_YEAR = 31_557_600 * _SEC  # 365.25 days

# The order matters: as in systemd, the first unit that the text begins with is used.
_UNITS = (
    ("seconds", _SEC),
    ("second", _SEC),
    ("sec", _SEC),
    ("s", _SEC),
    ("minutes", _MINUTE),
    ("minute", _MINUTE),
    ("min", _MINUTE),
    ("months", _MONTH),
    ("month", _MONTH),
    ("M", _MONTH),
    ("msec", 1000),
    ("ms", 1000),
    ("m", _MINUTE),
    ("hours", _HOUR),
    ("hour", _HOUR),
    ("hr", _HOUR),
    ("h", _HOUR),
    ("days", _DAY),
    ("day", _DAY),
    ("d", _DAY),
    ("weeks", _WEEK),
    ("week", _WEEK),
    ("w", _WEEK),
    ("years", _YEAR),
    ("year", _YEAR),
    ("y", _YEAR),
    ("usec", 1),
    ("us", 1),
    ("\u03bcs", 1),  # GREEK SMALL LETTER MU
    ("\u00b5s", 1),  # MICRO SIGN
)

_FORMAT = (
    ("y", _YEAR),
    ("month", _MONTH),
    ("w", _WEEK),
    ("d", _DAY),
    ("h", _HOUR),
    ("min", _MINUTE),
    ("s", _SEC),
    ("ms", 1000),
    ("us", 1),
)

_DIGITS = "0123456789"
_WHITESPACE = " \t\n\r"
_LENGTH_MAX = 1000
_INFINITY = 2**64 - 1  # of a usec_t
_NUMBER_MAX = 2**63 - 1  # of the strtoll(3) that reads each number


def parse(text: str) -> int | None:
    """Return the span in microseconds, None for `infinity`; the default unit is seconds.

    Accepts what systemd's parse_sec() accepts, up to a length that is more than enough, but limits
    the time to parse it. Raises ValueError.
    """
    if len(text) > _LENGTH_MAX:
        raise ValueError("too long")
    rest = text.lstrip(_WHITESPACE)
    if rest.startswith("infinity"):
        if rest[8:].strip(_WHITESPACE):
            raise ValueError("text after infinity")
        return None
    if not rest:
        raise ValueError("empty")
    total = 0
    while rest:
        usec, rest = _term(rest)
        total += usec
        if total >= _INFINITY:
            raise ValueError("too long")
        rest = rest.lstrip(_WHITESPACE)
    return total


def format_usec(usec: int | None, accuracy: int = 1000) -> str:
    """Format `usec` microseconds as systemd does: "1min 2.500s".

    Parts smaller than `accuracy` microseconds, a power of ten, are omitted.
    """
    if usec is None:
        return "infinity"
    parts: list[str] = []
    for suffix, unit in _FORMAT:
        if usec <= 0 or (usec < accuracy and parts):
            break
        if usec < unit:
            continue
        whole, part = divmod(usec, unit)
        if usec < _MINUTE and part and unit > accuracy:
            decimals = len(str(unit // accuracy)) - 1
            parts.append(f"{whole}.{part // accuracy:0{decimals}d}{suffix}")
            break
        parts.append(f"{whole}{suffix}")
        usec = part
    return " ".join(parts) or "0"


def _term(text: str) -> tuple[int, str]:
    """Read a number with its unit; return the microseconds, and the rest. Raises ValueError."""
    # strtoll(3) allows more white space and a sign, but takes nothing unless a digit follows. The
    # sign cannot be a minus: systemd refuses even "-0".
    body = text.lstrip(" \t\n\v\f\r").removeprefix("+")
    whole = _leading_digits(body)
    rest = body[len(whole) :] if whole else text
    fraction = ""
    if rest.startswith("."):
        fraction = _leading_digits(rest[1:])
        rest = rest[1 + len(fraction) :]
        if not fraction:
            raise ValueError("no digits after the point")
    elif not whole:
        raise ValueError("not a number")
    number = _number(whole)
    unit, rest = _unit(rest)
    if number >= _INFINITY // unit:
        raise ValueError("too long")
    usec = number * unit
    for digit in fraction:  # truncated digit by digit, as systemd does
        unit //= 10
        usec += int(digit) * unit
    return usec, rest


def _leading_digits(text: str) -> str:
    return text[: len(text) - len(text.lstrip(_DIGITS))]


def _number(digits: str) -> int:
    digits = digits.lstrip("0") or "0"
    if len(digits) > 19 or int(digits) > _NUMBER_MAX:  # int() of a huge string is slow
        raise ValueError("too large")
    return int(digits)


def _unit(text: str) -> tuple[int, str]:
    """Read the unit at the beginning of `text`; the default is seconds. Raises ValueError."""
    rest = text.lstrip(_WHITESPACE)
    for suffix, unit in _UNITS:
        if rest.startswith(suffix):
            return unit, rest[len(suffix) :]
    if rest and rest == text:  # "1.2.3" is refused, "1.2 .3" is not
        raise ValueError("unknown unit")
    return _SEC, rest
