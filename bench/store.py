"""A service manager as far as a proxy with a descriptor store needs one: sd_notify(3)."""

import os
import socket
import threading
from pathlib import Path

MESSAGE_MAX, FDS_MAX = 65536, 16
END = b"X_END=1"


class Store:
    """Keeps what FDSTORE=1 brings, until it is removed or `close()` is called.

    A thread of this process waits for messages. There is one every two seconds, and one more when
    the first connection is old enough to be kept: it takes no CPU time from what is measured.
    """

    def __init__(self, path: Path) -> None:
        self.names: set[str] = set()
        """Of all that has ever been stored."""
        self.kept: list[tuple[str, int]] = []
        """(name, descriptor) of what is stored now."""
        self._path = os.fspath(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._path)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What the program is told of it."""
        return {"NOTIFY_SOCKET": self._path, "FDSTORE": "1"}

    def close(self) -> None:
        """Drop everything."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(END, self._path)
        self._thread.join()
        self._socket.close()
        self._remove(None)

    def _receive(self) -> None:
        data = b""
        while data != END:
            data, fds, _, _ = socket.recv_fds(self._socket, MESSAGE_MAX, FDS_MAX)
            lines = data.decode(errors="replace").splitlines()
            fields = {key: value for key, _, value in (line.partition("=") for line in lines)}
            name = fields.get("FDNAME", "stored")
            if fields.get("FDSTOREREMOVE") == "1":
                self._remove(name)
            if fields.get("FDSTORE") == "1":
                self.kept += [(name, fd) for fd in fds]
                self.names.add(name)
            else:
                close_all(fds)  # which answers BARRIER=1

    def _remove(self, name: str | None) -> None:
        """Remove what has this name; None: all."""
        close_all([fd for kept, fd in self.kept if name in (None, kept)])
        self.kept = [one for one in self.kept if name not in (None, one[0])]


def close_all(fds: list[int]) -> None:
    """Close each."""
    for fd in fds:
        os.close(fd)
