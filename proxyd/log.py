"""One-line logging to stderr, aware of the journal.

A line is one write(2) of less than PIPE_BUF bytes, so that lines never interleave, and it is
made only when poll(2) says that stderr takes it: a log reader that has stopped costs lines,
never a stalled proxy. stderr is not set non-blocking for this, because its open file description
is usually shared with whoever started us. Nothing here raises.

Only the main thread and the resolver's threads log, both with the GIL held, so the module-level
state needs no lock.
"""

import os
import select
import time
from _collections_abc import Mapping

from proxyd.address import parse_number

# Syslog severities, syslog(3).
ERROR, WARNING, NOTICE, INFO, DEBUG = 3, 4, 5, 6, 7

_NAMES = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")

# Pause between two lines of the same kind, in seconds.
_REPEAT_PAUSE = 5.0

# In characters, which have at most 4 bytes each: PIPE_BUF is 4096.
_LINE_MAX = 1000

_max_level = INFO
_on_journal = False

# kind -> (time of the last line written, lines left out since, level and text of the last of them)
_repeats: dict[str, tuple[float, int, int, str]] = {}


def setup(environ: Mapping[str, str]) -> None:
    """Take the level and the destination from `environ`.

    SYSTEMD_LOG_LEVEL and JOURNAL_STREAM are those of systemd.exec(5) and systemd(1). Garbage in
    either costs one warning that names the variable.
    """
    global _max_level, _on_journal
    _repeats.clear()
    _max_level = INFO
    try:
        _on_journal = _is_journal(environ.get("JOURNAL_STREAM", ""))
    except ValueError:
        _on_journal = False
        warning(f"Ignoring JOURNAL_STREAM={environ['JOURNAL_STREAM']}: not a device and an inode.")
    level = environ.get("SYSTEMD_LOG_LEVEL", "")
    try:
        _max_level = _parse_level(level)
    except ValueError:
        warning(f"Ignoring SYSTEMD_LOG_LEVEL={level}: not a log level.")


def enabled(level: int) -> bool:
    """Tell whether lines of `level` are written, for callers that would build one at a cost."""
    return level <= _max_level


def error(text: str) -> None:
    """Log why something failed."""
    _log(ERROR, text)


def warning(text: str) -> None:
    """Log something that an administrator should look at."""
    _log(WARNING, text)


def notice(text: str) -> None:
    """Log something normal but worth knowing."""
    _log(NOTICE, text)


def info(text: str) -> None:
    """Log what happened."""
    _log(INFO, text)


def debug(text: str) -> None:
    """Log what only somebody who looks for a fault wants to see."""
    _log(DEBUG, text)


def limited(kind: str, text: str, level: int = WARNING) -> None:
    """Log `text` unless a line of the same `kind` was logged in the last 5 s.

    The next line of that kind tells how many were left out.
    """
    now = time.monotonic()
    last, left_out, _, _ = _repeats.get(kind, (now - _REPEAT_PAUSE, 0, level, text))
    if now - last < _REPEAT_PAUSE:
        _repeats[kind] = (last, left_out + 1, level, text)
        return
    _repeats[kind] = (now, 0, level, text)
    if left_out:
        text = f"{text} ({left_out} more in the last {now - last:.0f} s left out)"
    _log(level, text)


def flush_limited() -> None:
    """Log what `limited` has left out and not yet told, for use at exit."""
    for _, left_out, level, text in _repeats.values():
        if left_out:
            _log(level, f"{text} (last of {left_out} left out)")
    _repeats.clear()


def _log(level: int, text: str) -> None:
    if level > _max_level:
        return
    try:
        prefix = f"<{level}>" if _on_journal else ""  # sd-daemon(3)
        line = f"{prefix}{_printable(text)[:_LINE_MAX]}\n".encode("utf-8", "backslashreplace")
        if _takes_a_line(2):
            os.write(2, line)
    except (OSError, ValueError, MemoryError):
        pass  # There is nobody left to tell.


def _takes_a_line(fd: int) -> bool:
    """Tell whether a write(2) of at most PIPE_BUF bytes to `fd` returns at once."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def _printable(text: str) -> str:
    """Escape what would break the line or fool a terminal; undecodable bytes become hexadecimal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # PEP 383: byte NN of a file name or argument
        code -= 0xDC00
    if char in "\n\t":
        return "\\n" if char == "\n" else "\\t"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _parse_level(text: str) -> int:
    """Read SYSTEMD_LOG_LEVEL: a name or 0-7, or a list of these, some for one destination only.

    A value such as `console:debug` (systemd(1)) counts where the lines go to that destination.
    Raises ValueError.
    """
    level = INFO
    if not text:
        return level
    for item in text.split(","):
        target, colon, value = item.rpartition(":")
        number = _level_number(value)
        if not colon or target == ("journal" if _on_journal else "console"):
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


def _is_journal(stream: str) -> bool:
    """Tell whether `stream`, JOURNAL_STREAM's "device:inode", is stderr. Raises ValueError."""
    if not stream:
        return False
    device, _, inode = stream.partition(":")
    wanted = parse_number(device, 0, 2**64, "device"), parse_number(inode, 0, 2**64, "inode")
    try:
        stat = os.fstat(2)
    except OSError:
        return False
    return (stat.st_dev, stat.st_ino) == wanted
