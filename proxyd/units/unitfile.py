"""One unit file or drop-in, read line by line as systemd's own parser does (systemd.syntax(7))."""

import os
import stat

from proxyd.errors import reason

SIZE_MAX = 4 << 20
"""Bytes. No unit file has a hundredth of that; a larger file is something else."""

_WHITESPACE = " \t\n\r"
_LINE_MAX = 1 << 20  # LONG_LINE_MAX of systemd, for a line with its continuations


class Setting:
    """One assignment, at the line where it begins."""

    __slots__ = ("key", "line", "path", "section", "value")

    def __init__(self, section: str, key: str, value: str, path: str, line: int) -> None:
        self.section = section
        self.key = key
        self.value = value
        """Continuation lines are joined; specifiers and quotes are as written."""
        self.path = path
        self.line = line


class Problem:
    """What is wrong with a file itself; line 0 is the file as a whole."""

    __slots__ = ("fatal", "line", "message", "path")

    def __init__(self, path: str, line: int, message: str, fatal: bool = False) -> None:
        self.path = path
        self.line = line
        self.message = message
        self.fatal = fatal
        """Whether systemd loads nothing of the file then."""


class UnitFile:
    """What was read from one file. With a fatal problem there are no settings."""

    __slots__ = ("path", "problems", "sections", "settings")

    def __init__(self, path: str) -> None:
        self.path = path
        self.settings: list[Setting] = []
        self.sections: dict[str, int] = {}
        """The line where each section begins first."""
        self.problems: list[Problem] = []

    def fail(self, line: int, message: str) -> None:
        """Note that systemd would load nothing of this file."""
        self.settings.clear()
        self.problems.append(Problem(self.path, line, message, fatal=True))

    def remark(self, line: int, message: str) -> None:
        """Note a line that systemd ignores."""
        self.problems.append(Problem(self.path, line, message))


def read(path: str, shown: str = "") -> UnitFile:
    """Read the file at `path`, called `shown` in messages. Never raises."""
    file = UnitFile(shown or path)
    try:
        data = read_bytes(path)
    except (OSError, ValueError) as error:
        file.fail(0, f"cannot be read: {reason(error)}")
        return file
    parse(file, data)
    return file


def parse(file: UnitFile, data: bytes) -> None:
    """Fill `file` from its contents."""
    if b"\0" in data:
        file.fail(0, "is not a text file: it contains NUL bytes")
        return
    section = ""
    for number, line in logical_lines(data):
        if len(line) > _LINE_MAX:
            file.fail(number, "the line is too long")
            return
        try:
            text = line.decode().strip(_WHITESPACE)
        except UnicodeDecodeError:
            file.remark(number, "the line is not valid UTF-8 and is ignored")
            continue
        if not text:
            continue
        if text.startswith("["):
            if not text.endswith("]"):
                file.fail(number, f"invalid section header '{text}'")
                return
            section = text[1:-1]
            file.sections.setdefault(section, number)
            continue
        _assign(file, section, number, text)


def logical_lines(data: bytes) -> list[tuple[int, bytes]]:
    """Join continuation lines, leave out comments; return each line with its number.

    A comment between continued lines is left out and does not end them; a backslash that another
    one escapes continues nothing.
    """
    lines: list[tuple[int, bytes]] = []
    held: list[bytes] = []
    begin = 0
    data = data.removeprefix(b"\xef\xbb\xbf")
    for number, raw in enumerate(data.replace(b"\r\n", b"\n").split(b"\n"), 1):
        line = raw.lstrip(b" \t\r")
        if line[:1] in (b"#", b";"):
            continue
        begin = begin or number
        if _is_continued(line):
            held.append(line[:-1])
            continue
        lines.append((begin, b" ".join([*held, line])))
        held, begin = [], 0
    if begin:
        lines.append((begin, b" ".join([*held, b""])))
    return lines


def _is_continued(line: bytes) -> bool:
    return (len(line) - len(line.rstrip(b"\\"))) % 2 == 1


def _assign(file: UnitFile, section: str, number: int, text: str) -> None:
    key, equals, value = text.partition("=")
    key = key.rstrip(_WHITESPACE)
    if not equals:
        file.remark(number, "missing '=', the line is ignored")
    elif not section:
        file.remark(number, "assignment outside of a section, the line is ignored")
    elif not key:
        file.remark(number, "missing key name before '=', the line is ignored")
    else:
        setting = Setting(section, key, value.strip(_WHITESPACE), file.path, number)
        file.settings.append(setting)


def read_bytes(path: str) -> bytes:
    """Read a regular file; never wait for a pipe. Raises OSError and ValueError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(SIZE_MAX + 1)
        if len(data) > SIZE_MAX:
            raise ValueError(f"it has more than {SIZE_MAX >> 20} MiB")
        return data
    finally:
        os.close(fd)
