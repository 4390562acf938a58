"""The limit of open files of this process."""

import contextlib
import resource


@contextlib.contextmanager
def files_allowed(wanted):
    """Allow so many, as far as the hard limit does. Where packages are built, it may be 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
