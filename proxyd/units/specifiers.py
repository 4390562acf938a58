"""Specifiers such as %i in the values of settings (systemd.unit(5), SPECIFIERS)."""

from proxyd.units import names

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Stands for a value that only the machine of the unit knows, such as its host name."""

_TEMPORARY = {"T": "/tmp", "V": "/var/tmp"}  # noqa: S108 - what systemd says

_SYSTEM = {
    "t": "/run",
    "S": "/var/lib",
    "C": "/var/cache",
    "L": "/var/log",
    "E": "/etc",
    **_TEMPORARY,
    "u": "root",
    "U": "0",
    "g": "root",
    "G": "0",
    "h": "/root",
}

_FROM_MACHINE = frozenset("aAbBdDfHlmMoqsuUvwWygGhtSCLEY")


def expand(text: str, name: names.Name, user: bool) -> str:
    """Replace the specifiers in `text`, a setting of the unit `name`.

    What cannot be known here becomes UNKNOWN; a % that begins no specifier stays.
    """
    if "%" not in text:
        return text
    out: list[str] = []
    known: dict[str, str | None] = {}
    at = 0
    while at < len(text):
        if text[at] != "%" or at + 1 == len(text):
            out.append(text[at])
            at += 1
            continue
        char = text[at + 1]
        if char not in known:
            known[char] = _value(char, name, user)
        value = known[char]
        out.append(f"%{char}" if value is None else value)
        at += 2
    return "".join(out)


def _value(char: str, name: names.Name, user: bool) -> str | None:
    """Return what %CHAR means in a unit, or None if it means nothing."""
    instance = name.instance or ""
    last = name.prefix.rpartition("-")[2]
    known = {
        "%": "%",
        "n": name.text,
        "N": name.stem,
        "p": name.prefix,
        "P": names.unescape(name.prefix),
        "i": instance,
        "I": names.unescape(instance),
        "j": last,
        "J": names.unescape(last),
        **(_TEMPORARY if user else _SYSTEM),
    }
    if char == "f":
        return "/" + names.unescape(instance or name.prefix).lstrip("/")
    if char in known:
        return known[char]
    return UNKNOWN if char in _FROM_MACHINE else None
