"""A child that is stopped, runs from system call to system call, or instruction by instruction.

See ptrace(2). If it ends or sleeps meanwhile, that is all right.
"""

import ctypes
import os
import time

import pytest

SINGLESTEP, SYSCALL, SEIZE, INTERRUPT = 9, 24, 0x4206, 0x4207
EXIT_KILLS = 0x100000
PENDING = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
ASLEEP_S = 0.005
"""After this time without a stop, the child counts as asleep."""

_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_ptrace.restype = ctypes.c_long


class Stepped:
    """A child of this process, stopped. Skips the test where that is forbidden."""

    def __init__(self, child):
        self.child = child
        seized = _ptrace(SEIZE, child, None, EXIT_KILLS) == 0
        error = ctypes.get_errno()
        if not seized and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            pytest.skip(f"ptrace: {os.strerror(error)}")
        _ptrace(INTERRUPT, child, None, None)
        self.stopped = seized and self._await_stop()

    def to_system_calls(self, count):
        """Run until that number of entries into and exits from system calls."""
        self._go(SYSCALL, count)

    def instructions(self, count):
        """Run that number of instructions."""
        self._go(SINGLESTEP, count)

    def _go(self, how, count):
        while self.stopped and count > 0:
            count -= 1
            _ptrace(how, self.child, None, None)
            self.stopped = self._await_stop()

    def _await_stop(self):
        """Whether it has stopped. Its status is left to others if it has ended."""
        deadline = time.perf_counter() + ASLEEP_S
        while time.perf_counter() < deadline:
            found = os.waitid(os.P_PID, self.child, PENDING)
            if found is not None:
                if found.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
                    return False
                os.waitpid(self.child, os.WUNTRACED)
                return True
        return False
