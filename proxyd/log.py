"""One-line logging to stderr, aware of the journal.

A line is one write of less than PIPE_BUF bytes, so that lines never interleave. No write waits: a
reader of the log that has stopped costs lines, never a stalled proxy. Lines that stderr did not
take are counted, and the count is told before the next line that it takes. Nothing here raises.

poll(2) does not help: a terminal is writable while a single byte fits, and whoever shares a pipe
may fill it after the poll. Nor does O_NONBLOCK on stderr itself, for its open file description is
shared with whoever started us. So it depends on what stderr is:

    a socket        send(2) with MSG_DONTWAIT; the journal's is one
    a regular file  write(2): no reader can stop it. A file system that stalls (NFS, FUSE) does stop
                    us, as it would if our modules or a UNIX target were on it.
    anything else   an open file description of our own, with O_NONBLOCK, opened through /proc.
                    If that fails, because /proc is hidden or stderr belongs to another user:
    - a pipe        splice(2) from a pipe of our own; SPLICE_F_NONBLOCK keeps it from waiting
    - a terminal    a thread that may wait. It is the last resort: from the second thread on the
                    kernel counts the users of each fd at every call

The main thread and the resolver's threads log. One thread writes at a time, and writes the lines of
the others as well, so that none waits for a lock.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import _thread
import os
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

_FINISH_S = 0.2
"""How long the end of the program waits for a thread that writes to a terminal."""

_THREAD_LINES_MAX = 64
"""Lines that wait for such a thread."""

_FORMAT, _SOCKET, _FILE, _PIPE = 0o170000, 0o140000, 0o100000, 0o010000  # inode(7)

_SPLICE_F_NONBLOCK = 2

_max_level = INFO
_on_journal = False

# kind -> (time of the last line written, lines left out since, level and text of the last of them)
_repeats: dict[str, tuple[float, int, int, str]] = {}

_lines: list[bytes] = []
"""What is to be written, by whoever holds the lock."""

_writing = _thread.allocate_lock()

_rest = b""
"""Of a line that a terminal has taken in part: it comes before the next one."""

_lost = 0
"""Lines that stderr did not take, and of which nothing has been said."""

_way: "tuple[tuple[int, int], _Description | _Splice | _Thread] | None" = None
"""How a pipe or a terminal is written to, and which one: its device and inode."""


def setup(environ: Mapping[str, str]) -> None:
    """Take the level and the destination from `environ`.

    SYSTEMD_LOG_LEVEL and JOURNAL_STREAM are those of systemd.exec(5) and systemd(1). Garbage in
    either costs one warning that names the variable.
    """
    global _max_level, _on_journal
    _repeats.clear()
    _max_level = INFO
    if os.isatty(2):
        # Or a line would stop us while we are in the background (`stty tostop`).
        _signal.signal(_signal.SIGTTOU, _signal.SIG_IGN)
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


def finish() -> None:
    """Write what has not been written yet, for use at exit. Does not wait for a reader."""
    flush_limited()
    try:
        _deliver(b"")
        if _way is not None:
            _way[1].finish()
    except (OSError, ValueError, MemoryError):
        pass  # There is nobody left to tell.


def _log(level: int, text: str) -> None:
    if level > _max_level:
        return
    try:
        _deliver(_line(level, text))
    except (OSError, ValueError, MemoryError):
        pass  # There is nobody left to tell.


def _line(level: int, text: str) -> bytes:
    prefix = f"<{level}>" if _on_journal else ""  # sd-daemon(3)
    return f"{prefix}{_printable(text)[:_LINE_MAX]}\n".encode("utf-8", "backslashreplace")


def _deliver(line: bytes) -> None:
    """Write `line`, or leave it to the thread that is writing just now."""
    _lines.append(line)
    while _lines and _writing.acquire(False):  # looked at again once others can have the lock
        try:
            while _lines:
                _write_or_count(_lines.pop(0))
        finally:
            _writing.release()


def _write_or_count(line: bytes) -> None:
    """Write a line; an empty one is for what earlier ones have left behind."""
    global _lost
    try:
        _write_line(line)
    except (OSError, ValueError, MemoryError):
        _lost += bool(line)


def _write_line(line: bytes) -> None:
    """Write what is left of the last line, how many were lost, and `line`. Raises OSError."""
    global _rest, _lost
    if _rest:
        _rest = _rest[_put(_rest) :]
    if _lost and not _rest:
        told = _line(
            WARNING, f"Lines lost here, because standard error did not take them: {_lost}."
        )
        _rest = told[_put(told) :]
        _lost = 0
    if _rest:
        raise BlockingIOError
    if line:
        _rest = line[_put(line) :]


def _put(data: bytes) -> int:
    """Write to stderr without waiting; how many bytes it took. Raises OSError."""
    global _way
    stat = os.fstat(2)
    kind = stat.st_mode & _FORMAT
    if kind == _SOCKET:
        return _send(data)
    if kind == _FILE:
        return os.write(2, data)
    which = stat.st_dev, stat.st_ino
    if _way is None or _way[0] != which:
        _way = which, _find_way(which, kind == _PIPE)
    return _way[1].put(data)


def _send(data: bytes) -> int:
    # Whatever the family is: only its send() is used. Naming it saves asking the kernel.
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fileno=2)
    try:
        return sock.send(data, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
    finally:
        sock.detach()


def _find_way(which: tuple[int, int], is_pipe: bool) -> "_Description | _Splice | _Thread":
    """Find how to write to a pipe or a terminal. Raises OSError and RuntimeError."""
    try:
        return _Description(which)
    except OSError:
        pass
    try:
        if is_pipe:
            return _Splice()
    except OSError:
        pass  # there is no fd left; a thread needs none
    try:
        return _Thread()
    except RuntimeError:  # TasksMax=
        raise BlockingIOError from None


class _Description:
    """An open file description of our own of what stderr is. Owns its fd."""

    __slots__ = ("_fd",)

    def __init__(self, which: tuple[int, int]) -> None:
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        self._fd = os.open("/proc/self/fd/2", flags)
        stat = os.fstat(self._fd)
        if (stat.st_dev, stat.st_ino) != which:  # that is no procfs
            os.close(self._fd)
            raise FileNotFoundError

    def put(self, data: bytes) -> int:
        return os.write(self._fd, data)

    def finish(self) -> None:
        pass


class _Splice:
    """A pipe of our own, from which lines are moved to the pipe that stderr is. Owns its fds."""

    __slots__ = ("_rd", "_wr")

    def __init__(self) -> None:
        self._rd, self._wr = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def put(self, data: bytes) -> int:
        left = os.write(self._wr, data)
        try:
            left -= os.splice(self._rd, 2, left, flags=_SPLICE_F_NONBLOCK)
        finally:
            if left:
                os.read(self._rd, left)
        return len(data) - left

    def finish(self) -> None:
        pass


class _Thread:
    """A thread that writes to stderr, and waits where it must."""

    __slots__ = ("_bell", "_done", "_queue")

    def __init__(self) -> None:
        self._queue: list[bytes] = []
        """What it has not written yet; b"" asks it to say when it comes to that."""
        self._bell, self._done = _thread.allocate_lock(), _thread.allocate_lock()
        self._bell.acquire()
        self._done.acquire()
        # Signals are for the main thread, which may not have its handlers yet.
        mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, _signal.valid_signals())
        try:
            _thread.start_new_thread(self._run, ())
        finally:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)

    def put(self, data: bytes) -> int:
        if len(self._queue) >= _THREAD_LINES_MAX:
            raise BlockingIOError
        self._append(data)
        return len(data)

    def finish(self) -> None:
        """Wait until all is written, but not for long: the terminal may have stopped for ever."""
        self._append(b"")
        self._done.acquire(timeout=_FINISH_S)

    def _append(self, data: bytes) -> None:
        self._queue.append(data)
        if self._bell.locked():  # nobody else unlocks it
            self._bell.release()

    def _run(self) -> None:
        while True:
            self._bell.acquire()
            while self._queue:
                if self._queue[0]:
                    self._write(self._queue[0])
                elif self._done.locked():
                    self._done.release()
                self._queue.pop(0)

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(2, data) :]
        except OSError:
            pass  # a terminal that has gone


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
