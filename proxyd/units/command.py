"""ExecStart= of a service that runs the proxy, ours or the original, through our own parser."""

from proxyd.command_line import getopt, parse_args
from proxyd.errors import UsageError
from proxyd.options import Option, Options
from proxyd.units import words
from proxyd.units.specifiers import UNKNOWN
from proxyd.units.unit import Unit
from proxyd.units.unitfile import Setting

PROGRAM = "systemd-socket-proxyd"

_PREFIXES = "@-:+!|"
_ORIGINALS_OPTIONS = ("connections-max", "exit-idle-time", "help", "version")
_SHELL = "$`'\"\\*?[]{}()<>|&;#~!" + UNKNOWN
"""Characters that are special to a shell."""

_NETWORK_WRAPPERS = ("ip", "nsenter", "unshare", "firejail", "chroot")


class Command:
    """How a service runs the proxy."""

    __slots__ = (
        "arguments",
        "elsewhere",
        "error",
        "given",
        "options",
        "original",
        "setting",
        "sure",
    )

    def __init__(self, setting: Setting, path: str) -> None:
        self.setting = setting
        self.original = path.rpartition("/")[0].endswith("/systemd")
        """Whether it is systemd's own program, which lies in systemd's own folder."""
        self.arguments: list[str] = []
        self.sure = False
        """Whether all arguments are known: no shell runs it, and no variable is unknown."""
        self.elsewhere = False
        """Whether a program that starts it may have moved it into another namespace."""
        self.options: Options | None = None
        """The arguments as parsed; None if the parser refuses them, or they are unknown."""
        self.given: set[str] = set()
        """The long options that are given, in full."""
        self.error = ""
        """Why it would not start."""

    @property
    def rests(self) -> bool:
        """Tell whether it ends when it is idle."""
        return self.options is not None and self.options.exit_idle_time is not None


def find(unit: Unit) -> Command | None:
    """Return the proxy that a service runs, or None if it runs something else."""
    for setting in unit.entries("Service", "ExecStart"):
        if PROGRAM in setting.value:
            command = _read(unit, setting)
            if command is not None:
                return command
    return None


def programs(unit: Unit, *keys: str) -> list[list[str]]:
    """Return the command lines of a service as words; those that cannot be read are left out."""
    found = []
    for key in keys:
        for setting in unit.entries("Service", key):
            try:
                line = words.split(unit.expand(setting.value))
            except ValueError:
                continue
            if line:
                found.append([line[0].lstrip(_PREFIXES), *line[1:]])
    return found


def _read(unit: Unit, setting: Setting) -> Command | None:
    prefix, text = _split_prefix(setting.value)
    try:
        line = words.split(unit.expand(text))
    except ValueError:
        return None  # systemd loads no such line, and verify says so
    at = next((at for at, word in enumerate(line) if _is_program(word)), None)
    if at is None:
        inside = next((word for word in line if PROGRAM in word), None)
        return None if inside is None or not _is_script(line) else _wrapped(setting, inside, line)
    command = Command(setting, line[at])
    command.elsewhere = at > 0 and _base(line[0]) in _NETWORK_WRAPPERS
    arguments = line[at + 1 :]
    if "@" in prefix and at == 0:
        arguments = arguments[1:]  # argv[0]
    if ";" in arguments:
        arguments = arguments[: arguments.index(";")]
    known = arguments if ":" in prefix else _with_variables(unit, arguments)
    if known is not None and not any(UNKNOWN in word for word in known):
        command.sure = True
        command.arguments = known
        _parse(command)
    return command


def _wrapped(setting: Setting, script: str, line: list[str]) -> Command:
    """Return the command in a shell script; its arguments, if the shell leaves them unchanged."""
    words_ = script.split()
    at = next((at for at, word in enumerate(words_) if _is_program(word)), len(words_))
    command = Command(setting, words_[at] if at < len(words_) else PROGRAM)
    arguments = words_[at + 1 :]
    if arguments and not set("".join(arguments)).intersection(_SHELL):
        command.sure = True
        command.arguments = arguments
        _parse(command)
    command.elsewhere = any(word in _NETWORK_WRAPPERS for word in script.split()) or (
        _base(line[0]) in _NETWORK_WRAPPERS
    )
    return command


def _parse(command: Command) -> None:
    """Let our parser read the arguments."""
    argv = [PROGRAM, *command.arguments]
    try:
        command.given = _given(argv)
        options = parse_args(argv)
    except UsageError as error:
        command.error = str(error).removeprefix(f"{PROGRAM}: ")
        return
    if isinstance(options, Option):
        command.error = f"--{options.long} prints, and the program ends"
        return
    command.options = options
    if command.original:
        command.error = _refused_by_original(command, options)


def _given(argv: list[str]) -> set[str]:
    """Return the options in use, abbreviations resolved as the program does. Raises UsageError."""
    given = set()
    for option, _ in getopt(argv, []):
        given.add(option.long)
        if option.convert is None:
            break
    return given


def _refused_by_original(command: Command, options: Options) -> str:
    """Return why systemd's own program would refuse arguments that ours accepts."""
    for option in sorted(command.given):
        known = option in _ORIGINALS_OPTIONS
        if not known and not (option == "proxy-protocol" and options.proxy_protocol == 1):
            return f"systemd's own program has no option --{option}"
    if any(name is not None for name, _ in options.targets):
        return "systemd's own program has no NAME=TARGET"
    target = options.targets[0][1]
    if target.any_port or target.text.startswith(("unix:", "vsock:")):
        return f"systemd's own program has no target {target.text}"
    return ""


def _with_variables(unit: Unit, arguments: list[str]) -> list[str] | None:
    """Replace $NAME and ${NAME}; None if a value is not known."""
    if not any("$" in word for word in arguments):
        return arguments
    known = _environment(unit)
    out: list[str] = []
    for word in arguments:
        if word.startswith("$") and word[1:2] not in ("{", "$", ""):
            if word[1:] not in known:
                return None
            out += known[word[1:]].split()
            continue
        text = _braces(word, known)
        if text is None:
            return None
        out.append(text)
    return out


def _braces(word: str, known: dict[str, str]) -> str | None:
    out = []
    rest = word.replace("$$", "\0")
    while "${" in rest:
        before, _, rest = rest.partition("${")
        name, brace, rest = rest.partition("}")
        if not brace or name not in known:
            return None
        out += [before, known[name]]
    return "".join([*out, rest]).replace("\0", "$")


def _environment(unit: Unit) -> dict[str, str]:
    """Return the variables that the unit itself sets, except those that a file may override."""
    if unit.entries("Service", "EnvironmentFile"):
        return {}
    found: dict[str, str] = {}
    for setting in unit.entries("Service", "Environment"):
        try:
            assignments = words.split(unit.expand(setting.value))
        except ValueError:
            continue
        for assignment in assignments:
            name, _, value = assignment.partition("=")
            found[name] = value
    return found


def _split_prefix(text: str) -> tuple[str, str]:
    rest = text.lstrip(_PREFIXES)
    return text[: len(text) - len(rest)], rest


def _is_program(word: str) -> bool:
    return _base(word) == PROGRAM


def _is_script(line: list[str]) -> bool:
    return any(_base(word) in ("sh", "bash", "dash", "env") for word in line)


def _base(path: str) -> str:
    return path.lstrip(_PREFIXES).rpartition("/")[2]
