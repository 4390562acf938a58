"""Names of listeners: which target serves which listener."""

from _collections_abc import Iterable

from proxyd.address import AF_INET, AF_INET6
from proxyd.errors import UsageError
from proxyd.listen import UNNAMED, Listener
from proxyd.target import Target

_NAMES_MAX = 10
"""Of a list of names no more are shown."""


def valid_name(text: str) -> bool:
    """Tell whether `text` can be the NAME of NAME=TARGET or --listen=NAME=ADDRESS.

    The rule keeps every TARGET that has an equals sign of its own, such as /run/a=b, apart.
    """
    return bool(text) and text[0] not in "/@[" and ":" not in text and "=" not in text


def split_pair(text: str) -> tuple[str | None, str]:
    """Split NAME=REST; without a valid NAME the name is None and the rest all of `text`."""
    name, equals, rest = text.partition("=")
    return (name, rest) if equals and valid_name(name) else (None, text)


def match_targets(
    targets: list[tuple[str | None, Target]], listeners: list[Listener]
) -> tuple[list[Target], list[str]]:
    """Find the target of each listener.

    Returns one target per listener, in their order, and the names that no listener has. Raises
    UsageError for a listener without a target, and for a `HOST:*` target whose listener has no
    TCP port that could be passed on.
    """
    by_name = dict(targets)
    plain = by_name.get(None)
    matched: list[Target] = []
    for listener in listeners:
        target = plain or by_name.get(listener.name)
        if target is None:
            raise UsageError(
                f"No target for listener '{listener.name}' ({listener.text})"
                f"{_instead(listener.name, by_name)}."
            )
        if target.any_port and listener.family not in (AF_INET, AF_INET6):
            raise UsageError(
                f"Target {target.text} needs a TCP listener, to take the port from: "
                f"'{listener.name}' ({listener.text}) is not one."
            )
        matched.append(target)
    used = {listener.name for listener in listeners}
    return matched, [name for name in by_name if name is not None and name not in used]


def list_names(names: Iterable[str]) -> str:
    """Write names for people, the first ones of many."""
    quoted = [f"'{name}'" for name in dict.fromkeys(names)]
    more = f" and {len(quoted) - _NAMES_MAX} more" if len(quoted) > _NAMES_MAX else ""
    return ", ".join(quoted[:_NAMES_MAX]) + more


def _instead(name: str, by_name: "dict[str | None, Target]") -> str:
    """Return what there are targets for, and what may have gone wrong with `name`."""
    from difflib import get_close_matches

    names = [one for one in by_name if one is not None]
    there_are = f": the targets are for {list_names(names)}"
    if name in ("", UNNAMED):
        return (
            f"{there_are}, and this one has no name: set FileDescriptorName= in the socket unit, "
            "or use --listen=NAME=ADDRESS"
        )
    if not valid_name(name):
        return (
            f"{there_are}, and this name cannot be a NAME: set FileDescriptorName= "
            f"in the socket unit to one {_what_a_name_is(name)}"
        )
    close = get_close_matches(name, names, n=1)
    return f"{there_are}; is '{close[0]}' meant for it?" if close else there_are


def _what_a_name_is(bad: str) -> str:
    if ":" in bad:
        return "without a colon"
    return "without an equals sign, which does not begin with a slash, @ or ["
