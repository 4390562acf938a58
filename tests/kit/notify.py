"""The service manager's end of sd_notify(3)."""

import os
import socket
import threading

from kit.waiting import wait_until


class NotifySocket:
    """A datagram socket that records what it receives; a thread empties its queue.

    Without a `path` its name is abstract.
    """

    def __init__(self, path=None):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(path or "")
        name = self._socket.getsockname()
        self.environment_value = name if isinstance(name, str) else "@" + name[1:].decode()
        if path:
            os.chmod(path, 0o777)
        self._lines = []
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self):
        while True:
            text = self.receive_one()
            if text == "end of test":
                return
            self._lines.extend(text.splitlines())

    def receive_one(self):
        """Wait for one message; its text."""
        return self._socket.recv(1 << 16).decode(errors="replace")

    def lines(self):
        """All assignments received so far, such as `READY=1`, in order."""
        return list(self._lines)

    def values(self, key):
        """The values received for `key`, in order."""
        return [line[len(key) + 1 :] for line in self.lines() if line.startswith(key + "=")]

    def clear(self):
        """Forget what was received so far."""
        self._lines.clear()

    def wait_for(self, line):
        """Wait until `line` has been received."""
        wait_until(lambda: line in self._lines, f"notification {line}; seen: {self._lines}")

    def close(self):
        """Stop receiving; what was received can still be read."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.connect(self._socket.getsockname())
            last.send(b"end of test")
        self._thread.join()
        self._socket.close()
