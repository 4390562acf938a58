"""Further relay threads: when they start, and by which rule they get connections."""

import os

from proxyd import log
from proxyd._relay import Relay


def share(relay: Relay) -> None:
    """Have further threads only when one has too much to do: run() asks for hire() then."""
    try:
        stat = os.open("/proc/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # ProcSubset=pid; as the man page says, a CPU is taken to be idle then
        stat = -1
    relay.share(stat)


def hire(relay: Relay, threads: int) -> None:
    """Have so many threads from now on; fewer where the system refuses them."""
    for number in range(relay.threads, threads):
        try:
            relay.hire()
        except OSError as error:
            log.warning(
                f"Failed to start a relay thread: {os.strerror(error.errno or 0)}. "
                f"Going on with {number} of {threads}."
            )
            return
