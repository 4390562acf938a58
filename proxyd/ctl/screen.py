"""The terminal while `top` runs: its alternate screen, restored by whatever ends the program."""

import os
import select
import signal
import sys
import termios
import tty
from types import FrameType
from typing import Self

from proxyd.errors import UsageError

_ENTER = b"\x1b[?1049h\x1b[?25l\x1b[?7l"  # alternate screen, no cursor, no wrapping
_LEAVE = b"\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
_FATAL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

_KEYS = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b"\x1b[H": "home",
    b"\x1bOH": "home",
    b"\x1b[1~": "home",
    b"\x1b[F": "end",
    b"\x1bOF": "end",
    b"\x1b[4~": "end",
    b"k": "up",
    b"j": "down",
    b"\x0c": "redraw",
}


class Screen:
    """Use as a context manager, once, in the main thread."""

    __slots__ = ("_in", "_out", "_saved", "_signalled", "_wake")

    def __init__(self) -> None:
        if not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()):
            raise UsageError("top needs a terminal; list and watch do not")
        if os.environ.get("TERM", "dumb") == "dumb":
            raise UsageError("top needs a terminal that can do more than TERM=dumb")
        self._in, self._out = sys.stdin.fileno(), sys.stdout.fileno()
        self._saved: list[int | list[bytes | int]] | None = None
        """The settings to restore; None outside of the alternate screen."""
        self._wake, self._signalled = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        """Take the terminal."""
        sys.stdout.flush()
        # Signals are handled first: from then on nothing ends the program without restoring.
        for number in _FATAL:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._end)
        signal.signal(signal.SIGTSTP, self._suspend)
        signal.signal(signal.SIGWINCH, lambda *_: None)  # it wakes wait()
        signal.set_wakeup_fd(self._signalled, warn_on_full_buffer=False)
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        self._restore()
        signal.set_wakeup_fd(-1)

    def paint(self, lines: list[str], height: int) -> None:
        """Show lines from the top of a screen of this height; the rest of it becomes empty."""
        # Each line is cleared before it is written: after the last column, the cursor stays on it.
        frame = b"\x1b[H" + b"\r\n".join(b"\x1b[K" + _encoded(line) for line in lines)
        self._write(frame if len(lines) >= height else frame + b"\r\n\x1b[J")

    def wait(self, other: int, seconds: float) -> list[str] | None:
        """Return the keys that were pressed, after `seconds` at most; None if none can come.

        Returns earlier when `other` becomes readable, or the size of the terminal changes.
        """
        ready, _, _ = select.select([self._in, self._wake, other], [], [], seconds)
        if self._wake in ready:
            os.read(self._wake, 512)
        if self._in not in ready:
            return []
        try:
            data = os.read(self._in, 256)
        except OSError:  # the terminal is gone
            return None
        return _split_keys(data) if data else None

    def _end(self, number: int, _: FrameType | None) -> None:
        """Restore the terminal, and end by the same signal."""
        self._restore()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    def _suspend(self, number: int, _: FrameType | None) -> None:
        """Give the terminal back while the job is stopped."""
        self._restore()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # to this thread, so nothing is painted before it stops
        # Here the shell has continued it.
        signal.signal(number, self._suspend)
        self._begin()

    def _begin(self) -> None:
        self._saved = termios.tcgetattr(self._in)
        tty.setcbreak(self._in, termios.TCSANOW)
        self._write(_ENTER)

    def _restore(self) -> None:
        """Undo _begin(), once."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        try:
            termios.tcsetattr(self._in, termios.TCSANOW, saved)
        except termios.error:  # the terminal is gone
            pass
        self._write(_LEAVE)

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._out, data) :]
        except OSError:  # the terminal is gone: wait() notices
            pass


def _encoded(line: str) -> bytes:
    return line.encode(sys.stdout.encoding or "ascii", "backslashreplace")


def _split_keys(data: bytes) -> list[str]:
    """Return names of keys; those that nothing is known of are their characters."""
    keys = []
    while data:
        known = next((one for one in _KEYS if data.startswith(one)), None)
        if known:
            keys.append(_KEYS[known])
            data = data[len(known) :]
        elif data.startswith(b"\x1b"):
            return keys  # another sequence, of unknown length
        else:
            keys.append(data[:1].decode("latin-1"))
            data = data[1:]
    return keys
