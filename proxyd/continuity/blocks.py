"""Text for the next process: blocks of KEY=VALUE lines, each with file descriptors of its own.

A reader skips kinds and keys that it does not know, so that a later version may have more of them.
Numbers are decimal; text and bytes are hexadecimal, so that nothing has to be escaped.
"""

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Value = int | bool | str | bytes

_FDS_MAX = 1 << 20
"""More descriptors than any block can have."""


class Block:
    """One thing that the next process is told of. Who owns the descriptors, says the user."""

    __slots__ = ("fds", "kind", "values")

    def __init__(
        self, kind: str, values: "Mapping[str, Value] | None" = None, fds: "Sequence[int]" = ()
    ) -> None:
        self.kind = kind
        self.values = {key: _write(value) for key, value in (values or {}).items()}
        self.fds = list(fds)

    def number(self, key: str, default: int = 0) -> int:
        """Return a number; the default if there is none. Raises ValueError."""
        text = self.values.get(key)
        if text is None:
            return default
        digits = text.removeprefix("-")
        if not digits.isascii() or not digits.isdigit() or len(digits) > 20:
            raise ValueError(f"{self.kind}: {key}={text} is not a number")
        return int(text)

    def text(self, key: str) -> str:
        """Return text; "" if there is none. Raises ValueError."""
        return self.raw(key).decode("utf-8", "surrogateescape")

    def raw(self, key: str) -> bytes:
        """Return bytes; b"" if there are none. Raises ValueError."""
        return bytes.fromhex(self.values.get(key, ""))


def write(blocks: list[Block]) -> bytes:
    """Return the text of all `blocks`. Their descriptors are to be sent in the same order."""
    lines = []
    for block in blocks:
        lines.append(block.kind)
        lines.append(f"fds={len(block.fds)}")
        lines += [f"{key}={value}" for key, value in block.values.items()]
        lines.append("")
    return "\n".join(lines).encode("ascii")


def read(data: bytes) -> list[Block]:
    """Return the blocks of a text; `fds` are placeholders, one for each. Raises ValueError."""
    blocks = []
    for part in data.decode("ascii").split("\n\n"):
        kind, *lines = part.split("\n")
        if not kind:
            continue
        block = Block(kind)
        for line in lines:
            key, equals, value = line.partition("=")
            if equals:
                block.values[key] = value
        count = block.number("fds")
        if not 0 <= count <= _FDS_MAX:
            raise ValueError(f"{kind}: {count} descriptors")
        block.fds = [-1] * count
        blocks.append(block)
    return blocks


def _write(value: "Value") -> str:
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogateescape")
    return value.hex() if isinstance(value, bytes) else str(int(value))
