"""Text that the kernel takes and gives as bytes: names of files, arguments, variables.

The same as in `os`, which takes longer to import than everything that the program needs of it.
"""

import posix
import sys


def environ() -> dict[str, str]:
    """Return the environment as it was at the start. Changes to it stay in the dictionary."""
    codec = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
    return {name.decode(*codec): value.decode(*codec) for name, value in posix.environ.items()}


def decode(raw: bytes) -> str:
    """Convert as os.fsdecode() does: bytes that are no text become lone surrogates (PEP 383)."""
    return raw.decode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


def encode(text: bytes | str) -> bytes:
    """Convert back as os.fsencode() does. Raises UnicodeError."""
    if isinstance(text, bytes):
        return text
    return text.encode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())
