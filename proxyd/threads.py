"""Threads that run Python."""

import _signal  # type: ignore[import-not-found]
import _thread

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable


def start(run: "Callable[[], None]") -> None:
    """Call `run` in a new thread, which gets no signals. Raises RuntimeError, MemoryError.

    They are for the main thread: it has to be interrupted by them, blocks them for a moment at a
    reload, and may not have its handlers yet.
    """
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, _signal.valid_signals())
    try:
        _thread.start_new_thread(run, ())
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
