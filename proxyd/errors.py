"""Errors that become one line on stderr."""

import posix


class UsageError(Exception):
    """The command line, or something that the service manager has passed, cannot be used.

    `str()` is the line that says why. The program ends with status 1.
    """


def reason(error: Exception) -> str:
    """Return why, without the number and the file name that str() of an OSError contains."""
    if isinstance(error, MemoryError):
        return "out of memory"
    if not isinstance(error, OSError):
        return str(error)
    return error.strerror or (posix.strerror(error.errno) if error.errno else str(error))
