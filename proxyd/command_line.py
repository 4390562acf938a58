"""The command line, read as getopt_long(3) reads it, message by message: the original uses that.

argparse differs from it in a dozen details, and importing it takes longer than the rest of the
start.
"""

import posix

from proxyd.errors import UsageError
from proxyd.options import OPTIONS, ORIGINAL, Option, Options
from proxyd.target import Target, parse_target, split_pair

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Iterator


def parse_args(argv: list[str]) -> Options | Option:
    """Read the command line; `argv[0]` is the program.

    Returns the option itself if it only prints (--help, --version). As in the original, whatever
    follows such an option is ignored. Raises UsageError.
    """
    options = Options()
    operands: list[str] = []
    for option, argument in getopt(argv, operands):
        if option.convert is None:
            return option
        try:
            option.convert(options, argument)
        except ValueError:
            raise UsageError(_not_allowed(option, argument)) from None
    options.targets = _parse_operands(operands)
    return options


def _not_allowed(option: Option, argument: str) -> str:
    """The message of the original, word for word where it has the option."""
    text = f"Failed to parse --{option.long}= argument: {argument}"
    return text if option.long in ORIGINAL else f"{text}: expected {option.allowed}"


def _parse_operands(operands: list[str]) -> list[tuple[str | None, Target]]:
    """Read one TARGET, or NAME=TARGET pairs. Raises UsageError."""
    if not operands:
        raise UsageError("Not enough parameters.")
    pairs = [split_pair(operand) for operand in operands]
    if len(pairs) > 1 and any(name is None for name, _ in pairs):
        raise UsageError("Too many parameters.")
    seen: set[str | None] = set()
    for name, _ in pairs:
        if name in seen:
            raise UsageError(f"There is more than one target for '{name}'.")
        seen.add(name)
    return [(name, parse_target(text)) for name, text in pairs]


# ── getopt_long(3) ────────────────────────────────────────────────────────────────────────────────


def getopt(argv: list[str], operands: list[str]) -> "Iterator[tuple[Option, str]]":
    """Yield each option with its argument; append the other words to `operands`.

    The messages, and argv[0] before them, are those of glibc. Raises UsageError.
    """
    program = argv[0] if argv else ""
    rest = iter(argv[1:])
    for word in rest:
        if word == "--":
            break
        if word.startswith("--"):
            yield _long_option(program, word[2:], rest)
        elif word.startswith("-") and word != "-":
            yield from _short_options(program, word[1:], rest)
        else:
            operands.append(word)
            if b"POSIXLY_CORRECT" in posix.environ:
                break
    operands.extend(rest)


def _long_option(program: str, word: str, rest: "Iterator[str]") -> tuple[Option, str]:
    """Read `word`, NAME or NAME=ARGUMENT; a separate argument is taken from `rest`."""
    name, equals, argument = word.partition("=")
    option = _find_long(program, word, name)
    if option.convert is None:
        if equals:
            raise UsageError(f"{program}: option '--{option.long}' doesn't allow an argument")
        return option, ""
    if equals:
        return option, argument
    for argument in rest:
        return option, argument
    raise UsageError(f"{program}: option '--{option.long}' requires an argument")


def _find_long(program: str, word: str, name: str) -> Option:
    """Find the option `name`, or the only one that begins with it. Raises UsageError."""
    for option in OPTIONS:
        if option.long == name:
            return option
    candidates = [option for option in OPTIONS if option.long.startswith(name)]
    # An abbreviation that is unique among the original's options keeps its meaning: --conn.
    originals = [option for option in candidates if option.long in ORIGINAL]
    if len(candidates) == 1 or len(originals) == 1:
        return (originals or candidates)[0]
    if not candidates:
        raise UsageError(f"{program}: unrecognized option '--{word}'")
    possibilities = " ".join(f"'--{option.long}'" for option in candidates)
    raise UsageError(f"{program}: option '--{word}' is ambiguous; possibilities: {possibilities}")


def _short_options(
    program: str, word: str, rest: "Iterator[str]"
) -> "Iterator[tuple[Option, str]]":
    """Read a cluster such as `hc5`; a separate argument is taken from `rest`."""
    for at, char in enumerate(word, 1):
        option = next((option for option in OPTIONS if option.short == char), None)
        if option is None:
            raise UsageError(f"{program}: invalid option -- '{char}'")
        if option.convert is None:
            yield option, ""
            continue  # pragma: no cover - the only such option, -h, ends the program
        argument = word[at:] or next(rest, None)
        if argument is None:
            raise UsageError(f"{program}: option requires an argument -- '{char}'")
        yield option, argument
        return
