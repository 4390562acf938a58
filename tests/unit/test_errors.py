"""How errors are put into words."""

import errno
import os

import pytest

from proxyd.errors import reason


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.EMFILE, "Too many open files", "/a/file"), "Too many open files"),
        (OSError(errno.EMFILE, ""), os.strerror(errno.EMFILE)),  # as the extension raises it
        (OSError("no number"), "no number"),
        (ValueError("not a port"), "not a port"),
    ],
)
def test_reason(error, text):
    assert reason(error) == text
