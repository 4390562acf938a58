"""Logging to stderr, in single lines, and with priorities for the journal.

A line is one write of less than PIPE_BUF bytes, so that lines never interleave. No write blocks: if
the reader of the log stops, lines are lost, but the proxy never stalls. Lines that stderr did not
take are counted, and their number is logged before the next line. Nothing here raises.

poll(2) does not help: a terminal is writable if a single byte fits, and another process that shares
a pipe may fill it after the poll. O_NONBLOCK on stderr itself does not help, because other
processes share its open file description. So the method depends on what stderr is:

    a socket        send(2) with MSG_DONTWAIT, as for the journal
    a regular file  write(2): no reader can stop it. A file system that stalls (NFS, FUSE) does, as
                    it would if our modules or a UNIX target were on it.
    anything else   an open file description of our own, with O_NONBLOCK, opened through /proc.
                    If that fails, because /proc is hidden or stderr belongs to another user:
    - a pipe        splice(2) from a pipe of our own, which SPLICE_F_NONBLOCK keeps from blocking
    - a terminal    a thread that may block. It is the last resort: from the second thread on, the
                    kernel counts the users of each fd at every call

The main thread and the threads of the resolver log. One thread writes at a time, and also writes
the lines of the others, so that no thread waits for a lock.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import _thread
import posix
import time

from proxyd import threads
from proxyd.address import parse_number

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Mapping

# Syslog severities, syslog(3).
ERROR, WARNING, INFO, DEBUG = 3, 4, 6, 7

# MESSAGE_ID= of the events that systemd/systemd-socket-proxyd.catalog explains.
OUTAGE, RECOVERED = "f5cd69e7daf94ec5b92bd85fa05e383d", "095eeb13d607418ca7b835721555bf36"
REFUSED, FAILED = "735f0bd8883747a6a41f644c3700e063", "6f89b993361644b09718e67662621d7e"
REFUSED_SOURCE = "d2c1733ec1fc4f75974d5e0df5367062"

# Pause between two lines of the same kind, in seconds.
_REPEAT_PAUSE = 5.0

# In characters, which have at most 4 bytes each: PIPE_BUF is 4096.
_LINE_MAX = 1000

_FINISH_S = 0.2
"""How long the program waits at its end for the thread that writes to a terminal."""

_THREAD_LINES_MAX = 64
"""The maximum number of lines that wait for this thread."""

_FORMAT, _SOCKET, _FILE, _PIPE = 0o170000, 0o140000, 0o100000, 0o010000  # inode(7)

_SPLICE_F_NONBLOCK = 2

_max_level = INFO
_on_journal = False

# kind -> (time of the last line written, lines left out since; level, text, fields of the last one)
_repeats: dict[str, tuple[float, int, int, str, dict[str, str]]] = {}

_lines: list[bytes] = []
"""Lines to be written by the thread that holds the lock."""

_writing = _thread.allocate_lock()

_rest = b""
"""The rest of a line of which a terminal took only a part; to be written before the next one."""

_lost = 0
"""The number of lines that stderr did not take, as far as it has not been logged."""

_writer: "tuple[tuple[int, int], _Description | _Splice | _Thread] | None" = None
"""Device and inode of a pipe or terminal, and what writes to it."""


def setup(environ: "Mapping[str, str]") -> None:
    """Take the level and the destination from `environ`.

    SYSTEMD_LOG_LEVEL and JOURNAL_STREAM are described in systemd(1) and systemd.exec(5). Garbage in
    either is ignored, with a warning that names the variable.
    """
    global _max_level, _on_journal
    _repeats.clear()
    _max_level = INFO
    if posix.isatty(2):
        # Otherwise, with `stty tostop`, a line would stop us while we are in the background.
        _signal.signal(_signal.SIGTTOU, _signal.SIG_IGN)
    try:
        _on_journal = _is_journal(environ.get("JOURNAL_STREAM", ""))
    except ValueError:
        _on_journal = False
        warning(f"Ignoring JOURNAL_STREAM={environ['JOURNAL_STREAM']}: not a device and an inode.")
    level = environ.get("SYSTEMD_LOG_LEVEL", "")
    if not level:
        return
    from proxyd.log_level import parse_level

    try:
        _max_level = parse_level(level, INFO, on_journal=_on_journal)
    except ValueError:
        warning(f"Ignoring SYSTEMD_LOG_LEVEL={level}: not a log level.")


def enabled(level: int) -> bool:
    """Tell whether lines of `level` are written, for callers to whom building one has a cost."""
    return level <= _max_level


def error(text: str) -> None:
    """Log why something failed."""
    _log(ERROR, text)


def warning(text: str) -> None:
    """Log something that an administrator should look into."""
    _log(WARNING, text)


def info(text: str) -> None:
    """Log what happened."""
    _log(INFO, text)


def debug(text: str) -> None:
    """Log details for finding a fault."""
    _log(DEBUG, text)


def limited(kind: str, text: str, level: int = WARNING, **fields: str) -> None:
    """Log `text` unless a line of the same `kind` was logged in the last 5 s.

    The next line of that kind says how many were left out. `fields` are for the journal, MESSAGE_ID
    among them; those that are empty are not known.
    """
    now = time.monotonic()
    last, left_out, *_ = _repeats.get(kind, (now - _REPEAT_PAUSE, 0))
    if now - last < _REPEAT_PAUSE:
        _repeats[kind] = (last, left_out + 1, level, text, fields)
        return
    _repeats[kind] = (now, 0, level, text, fields)
    if left_out:
        text = f"{text} ({left_out} more in the last {now - last:.0f} s left out)"
    _log(level, text, fields)


def finish() -> None:
    """Write what has not been written yet, for use at exit. Does not wait for a reader."""
    flush_limited()
    try:
        _deliver(b"")
        if _writer is not None:
            _writer[1].finish()
    except (OSError, ValueError, MemoryError):
        pass  # there is no way left to report it


def flush_limited() -> None:
    """Log what limited() has left out since its last line, for use at exit."""
    for _, left_out, level, text, fields in _repeats.values():
        if left_out:
            _log(level, f"{text} (last of {left_out} left out)", fields)
    _repeats.clear()


def _log(level: int, text: str, fields: "Mapping[str, str] | None" = None) -> None:
    if level > _max_level or (fields and _on_journal and _send_fields(level, text, fields)):
        return
    try:
        _deliver(_line(level, text))
    except (OSError, ValueError, MemoryError):
        pass  # there is no way left to report it


def _send_fields(level: int, text: str, fields: "Mapping[str, str]") -> bool:
    """Send an entry with fields to the journal; False if it has to be a line instead."""
    known = {name: printable(value) for name, value in fields.items() if value}
    try:
        from proxyd.journal import send

        send(level, printable(text)[:_LINE_MAX], known)
    except (OSError, ImportError, MemoryError):  # no fd may be left to load or to send it with
        return False
    return True


def _line(level: int, text: str) -> bytes:
    prefix = f"<{level}>" if _on_journal else ""  # sd-daemon(3)
    return f"{prefix}{printable(text)[:_LINE_MAX]}\n".encode("utf-8", "backslashreplace")


def _deliver(line: bytes) -> None:
    """Write `line`, or leave it to the thread that is writing at the moment."""
    _lines.append(line)
    while _lines and _writing.acquire(False):  # checked again once others can take the lock
        try:
            while _lines:
                _write_or_count(_lines.pop(0))
        finally:
            _writing.release()


def _write_or_count(line: bytes) -> None:
    """Write a line; an empty one only writes what is left of earlier ones."""
    global _lost
    try:
        _write_line(line)
    except (OSError, ValueError, MemoryError):
        _lost += bool(line)


def _write_line(line: bytes) -> None:
    """Write the rest of the last line, the number of lost lines, and `line`. Raises OSError."""
    global _rest, _lost
    if _rest:
        _rest = _rest[_put(_rest) :]
    if _lost and not _rest:
        text = f"Lines lost here, because standard error did not take them: {_lost}."
        lost = _line(WARNING, text)
        _rest = lost[_put(lost) :]
        _lost = 0
    if _rest:
        raise BlockingIOError
    if line:
        _rest = line[_put(line) :]


def _put(data: bytes) -> int:
    """Write to stderr without blocking; return how many bytes it took. Raises OSError."""
    global _writer
    stat = posix.fstat(2)
    kind = stat.st_mode & _FORMAT
    if kind == _SOCKET:
        return _send(data)
    if kind == _FILE:
        return posix.write(2, data)
    which = stat.st_dev, stat.st_ino
    if _writer is None or _writer[0] != which:
        _writer = which, _find_writer(which, kind == _PIPE)
    return _writer[1].put(data)


def _send(data: bytes) -> int:
    # Only send() is used, so the family may be wrong. Giving it saves asking the kernel.
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fileno=2)
    try:
        return sock.send(data, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
    finally:
        sock.detach()


def _find_writer(which: tuple[int, int], is_pipe: bool) -> "_Description | _Splice | _Thread":
    """Return what writes to a pipe or a terminal without blocking us. Raises OSError."""
    try:
        return _Description(which)
    except OSError:
        pass
    try:
        if is_pipe:
            return _Splice()
    except OSError:
        pass  # no fd is left; a thread needs none
    try:
        return _Thread()
    except RuntimeError:  # TasksMax=
        raise BlockingIOError from None


class _Description:
    """An open file description of our own for stderr. Owns its fd."""

    __slots__ = ("_fd",)

    def __init__(self, which: tuple[int, int]) -> None:
        flags = posix.O_WRONLY | posix.O_NONBLOCK | posix.O_NOCTTY | posix.O_CLOEXEC
        self._fd = posix.open("/proc/self/fd/2", flags)
        stat = posix.fstat(self._fd)
        if (stat.st_dev, stat.st_ino) != which:  # /proc is not a procfs
            posix.close(self._fd)
            raise FileNotFoundError

    def put(self, data: bytes) -> int:
        return posix.write(self._fd, data)

    def finish(self) -> None:
        pass


class _Splice:
    """A pipe of our own, from which lines are spliced into the pipe of stderr. Owns its fds."""

    __slots__ = ("_rd", "_wr")

    def __init__(self) -> None:
        self._rd, self._wr = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)

    def put(self, data: bytes) -> int:
        left = posix.write(self._wr, data)
        try:
            left -= posix.splice(self._rd, 2, left, flags=_SPLICE_F_NONBLOCK)
        finally:
            if left:
                posix.read(self._rd, left)
        return len(data) - left

    def finish(self) -> None:
        pass


class _Thread:
    """A thread that writes to stderr, and may block."""

    __slots__ = ("_done", "_queue", "_wake")

    def __init__(self) -> None:
        self._queue: list[bytes] = []
        """Not written yet; at b"" the thread releases `_done`."""
        self._wake, self._done = _thread.allocate_lock(), _thread.allocate_lock()
        self._wake.acquire()
        self._done.acquire()
        threads.start(self._run)

    def put(self, data: bytes) -> int:
        if len(self._queue) >= _THREAD_LINES_MAX:
            raise BlockingIOError
        self._append(data)
        return len(data)

    def finish(self) -> None:
        """Wait until all is written, but not for long: the terminal may have stopped for good."""
        self._append(b"")
        self._done.acquire(timeout=_FINISH_S)

    def _append(self, data: bytes) -> None:
        self._queue.append(data)
        if self._wake.locked():  # only _append() unlocks it
            self._wake.release()

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            while self._queue:
                if self._queue[0]:
                    self._write(self._queue[0])
                elif self._done.locked():
                    self._done.release()
                self._queue.pop(0)

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[posix.write(2, data) :]
        except OSError:
            pass  # the terminal is gone


def printable(text: str) -> str:
    """Escape what would break the line or control a terminal; undecodable bytes in hexadecimal."""
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


def _is_journal(stream: str) -> bool:
    """Tell whether `stream`, JOURNAL_STREAM's "device:inode", is stderr. Raises ValueError."""
    if not stream:
        return False
    device, _, inode = stream.partition(":")
    wanted = parse_number(device, 0, 2**64, "device"), parse_number(inode, 0, 2**64, "inode")
    try:
        stat = posix.fstat(2)
    except OSError:
        return False
    return (stat.st_dev, stat.st_ino) == wanted
