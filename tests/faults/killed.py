"""A process of the program that is killed, and has its turns until then.

It is a child of the walk's process, and really killed: after SIGKILL it does nothing more, and
the kernel closes what no other process and no queue has. The world stays in the walk's process,
where the next process of the program finds it. The child has a turn whenever it is told so: nothing
depends on scheduling here either.
"""

import os
import signal
import socket
import sys
import traceback


class KilledProcess:
    """Runs main(wait), which returns an exit status, in a child.

    Wherever it would wait for events it is to call wait(): whether anything has moved in the world.
    What `report` returns there the first time, bytes, is reported.
    """

    def __init__(self, main, report, patience_s):
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(patience_s)
        self._status = None
        self.report = b""
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._channel.close()
            become(main, report, theirs)
        theirs.close()

    def takes_turn(self):
        """Let it run until it waits for events; False once it has ended. TimeoutError: it hangs."""
        try:
            data = self._channel.recv(64)
        except ConnectionResetError:
            data = b""
        self.report = self.report or data
        return bool(data)

    def go_on(self, *, moved):
        self._channel.sendall(b"1" if moved else b"0")

    def kill(self):
        """Kill it, unless it has ended; its status as of waitstatus_to_exitcode()."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self._channel.close()
        return self._status

    def end(self):
        """It has ended by itself; its status."""
        self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._channel.close()
        return self._status


def become(main, report, channel):
    """Run it in this process, which ends with it."""
    status = 70
    reports = []

    def wait():
        if not reports:
            reports.append(report())
        channel.sendall(reports[0])
        answer = channel.recv(1)
        if not answer:  # the walk has ended
            os._exit(0)
        return answer == b"1"

    try:
        status = main(wait)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)
