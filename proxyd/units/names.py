"""Names of units, as systemd.unit(5) defines them."""

TYPES = (
    "automount",
    "device",
    "mount",
    "path",
    "scope",
    "service",
    "slice",
    "socket",
    "swap",
    "target",
    "timer",
)

_CHARACTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:-_.\\@")
_LENGTH_MAX = 255


class Name:
    """PREFIX.TYPE, PREFIX@.TYPE or PREFIX@INSTANCE.TYPE."""

    __slots__ = ("instance", "prefix", "type")

    def __init__(self, prefix: str, instance: str | None, kind: str) -> None:
        self.prefix = prefix
        self.instance = instance
        """None without @, and empty for a template."""
        self.type = kind

    @property
    def text(self) -> str:
        """The whole name."""
        return f"{self.stem}.{self.type}"

    @property
    def stem(self) -> str:
        """The name without its type."""
        return self.prefix if self.instance is None else f"{self.prefix}@{self.instance}"

    @property
    def template(self) -> str | None:
        """The name of the template, if this is one or is an instance of one."""
        return None if self.instance is None else f"{self.prefix}@.{self.type}"

    @property
    def is_template(self) -> bool:
        """Tell whether this names a template and no unit."""
        return self.instance == ""


def parse(text: str) -> Name:
    """Take a name apart. Raises ValueError if it is not the name of a unit."""
    stem, dot, kind = text.rpartition(".")
    if not dot or kind not in TYPES:
        raise ValueError(f"'{text}' does not end with the type of a unit")
    prefix, at, instance = stem.partition("@")
    if not prefix or len(text) > _LENGTH_MAX or not _CHARACTERS.issuperset(text):
        raise ValueError(f"'{text}' is not the name of a unit")
    return Name(prefix, instance if at else None, kind)


def is_unit(text: str) -> bool:
    """Tell whether `text` can name a unit or a template."""
    try:
        parse(text)
    except ValueError:
        return False
    return True


def mangle(text: str) -> str:
    """Return the unit that is meant: as for systemctl(1), a name without a type is a service."""
    return text if is_unit(text) or not is_unit(f"{text}.service") else f"{text}.service"


def with_instance(template: str, instance: str) -> str:
    """Return the name of the instance of a template."""
    name = parse(template)
    return Name(name.prefix, instance, name.type).text


def with_type(text: str, kind: str) -> str:
    """Return the name of the unit of another type with the same stem."""
    name = parse(text)
    return Name(name.prefix, name.instance, kind).text


def escape(text: str) -> str:
    """Write `text` as a part of a unit's name, as systemd-escape(1) does."""
    out = []
    for at, byte in enumerate(text.encode()):
        char = chr(byte)
        if char == "/":
            out.append("-")
        elif (char in "-\\" or char not in _CHARACTERS or char == "@") or (char == "." and not at):
            out.append(f"\\x{byte:02x}")
        else:
            out.append(char)
    return "".join(out)


def unescape(text: str) -> str:
    """Undo escape()."""
    out = bytearray()
    at = 0
    while at < len(text):
        code = text[at + 2 : at + 4]
        if text[at] == "-":
            out += b"/"
        elif text.startswith("\\x", at) and len(code) == 2 and _is_hex(code):
            out.append(int(code, 16))
            at += 3
        else:
            out += text[at].encode()
        at += 1
    return out.decode("utf-8", "replace")


def _is_hex(text: str) -> bool:
    return all(char in "0123456789abcdefABCDEF" for char in text)
