"""What becomes a line on stderr."""

import os


class UsageError(Exception):
    """What the administrator gave us cannot be used; `str()` is the line that says why.

    It is the one exception that ends the program with status 1.
    """


def reason(error: Exception) -> str:
    """Return why, without the number and the file name that str() of an OSError has."""
    if not isinstance(error, OSError):
        return str(error)
    return error.strerror or (os.strerror(error.errno) if error.errno else str(error))
