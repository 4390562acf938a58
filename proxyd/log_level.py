"""SYSTEMD_LOG_LEVEL, systemd(1). Imported only if it is set."""

_NAMES = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")


def parse_level(text: str, default: int, *, on_journal: bool) -> int:
    """Read a name or 0-7, or a list of these, also for single destinations.

    A value such as `console:debug` applies if stderr is that destination. Raises ValueError.
    """
    level = default
    for item in text.split(","):
        target, colon, value = item.rpartition(":")
        number = _level_number(value)
        if not colon or target == ("journal" if on_journal else "console"):
            level = number
        elif target not in ("console", "journal", "kmsg", "syslog"):
            raise ValueError(target)
    return level


def _level_number(text: str) -> int:
    if text in _NAMES:
        return _NAMES.index(text)
    if len(text) == 1 and text in "01234567":
        return int(text)
    raise ValueError(text)
