"""A program that is killed at one of its system calls, as a debugger would stop it: ptrace(2)."""

import contextlib
import ctypes
import os
import platform
import signal
import struct
import time

from kit.waiting import patience

HELD_BACK = ("/bin/sh", "-c", 'kill -STOP $$; exec "$@"', "sh")
"""Before a command: it begins once kill_at_call() has taken hold of it."""

RECVMSG = {"x86_64": 47, "aarch64": 212}.get(platform.machine())
"""The number of recvmsg(2): with it, what the last process has left is looked at."""

SEIZE, INTERRUPT, SYSCALL, DETACH, SYSCALL_INFO = 0x4206, 0x4207, 24, 17, 0x420E
OPTIONS = 0x100000 | 1  # PTRACE_O_EXITKILL, PTRACE_O_TRACESYSGOOD
EVENT_STOP = 128
AT_CALL = signal.SIGTRAP | 0x80
ALL = 0x40000000  # __WALL
INFO_SIZE = 88

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def kill_at_call(proxy, number, *, begins, ends=lambda: False):
    """Kill a program at stop `number` after `begins(number of the call)`.

    It stops before and after each system call of its first thread. If it never makes as many, it
    is let go when `ends()`, and how many it made is returned. Only for a command with HELD_BACK
    before it.
    """
    traced = _Traced(proxy.pid)
    deadline = time.monotonic() + patience()
    count, has_begun = 0, False
    while traced.next_stop(deadline, ends):
        has_begun = has_begun or begins(traced.call())
        count += has_begun
        if count > number:
            proxy.kill()
            return None
    return count


class _Traced:
    def __init__(self, pid):
        self._pid = pid
        self._signal = 0
        """What is to be delivered when it goes on."""
        os.waitpid(pid, os.WUNTRACED)
        self._do(SEIZE, OPTIONS)
        os.kill(pid, signal.SIGCONT)
        self._runs = True

    def next_stop(self, deadline, ends):
        """Let it run to the next system call, or its end; False at the latter, or if `ends()`."""
        while True:
            if not self._runs:
                self._do(SYSCALL, self._signal)
                self._runs, self._signal = True, 0
            status = self._wait(deadline, ends)
            if status is None:
                return False
            self._runs = False
            number = os.WSTOPSIG(status)
            if number == AT_CALL:
                return True
            if status >> 16 == 0 and number != signal.SIGTRAP:
                self._signal = number

    def call(self):
        """The number of the system call that it is about to make; -1 after one."""
        info = ctypes.create_string_buffer(INFO_SIZE)
        self._do(SYSCALL_INFO, ctypes.addressof(info), INFO_SIZE)
        is_entry = info.raw[0] == 1
        return struct.unpack_from("=q", info.raw, 24)[0] if is_entry else -1

    def _wait(self, deadline, ends):
        """Its status as of waitpid(2) once it has stopped. If it has ended that is for others."""
        while True:
            seen = os.waitid(
                os.P_PID, self._pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT | os.WNOHANG | ALL
            )
            if seen is not None:
                if seen.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
                    return None
                return os.waitpid(self._pid, ALL)[1]
            if ends():
                self._let_go()
                return None
            assert time.monotonic() < deadline, "it makes no system call any more"
            time.sleep(0.0001)

    def _let_go(self):
        self._do(INTERRUPT)
        with contextlib.suppress(ProcessLookupError):
            os.waitpid(self._pid, ALL)
            self._do(DETACH)

    def _do(self, request, data=0, address=0):
        if _libc.ptrace(request, self._pid, address, data) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
