"""Numbers of bytes, for people."""

_UNITS = "BKMGTPE"


def bytes_text(count: int) -> str:
    """Format a number of bytes, to base 1024: 512B, 1.2G."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.{1 if unit and value < 99.95 else 0}f}{_UNITS[unit]}"
