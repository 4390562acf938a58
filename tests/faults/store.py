"""The store of a service manager: descriptors that one process leaves to the next."""

import os
import socket

ROOM = 2
"""The number of descriptors that it takes (FileDescriptorStoreMax=)."""


class Store:
    """Obeys FDSTORE=, FDSTOREREMOVE= and BARRIER=, sd_notify(3)."""

    def __init__(self):
        self.stored = []
        """(name, fd), the newest first, as they are passed on."""

    @property
    def names(self):
        return [name for name, _ in self.stored]

    @property
    def fds(self):
        return {str(fd) for _, fd in self.stored}

    def obey(self, notify):
        """Do what the program has asked for."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(notify, 4096, 8)
            except BlockingIOError:
                return
            fields = dict(line.partition("=")[::2] for line in data.decode().splitlines())
            name = fields.get("FDNAME", "")
            if fields.get("FDSTOREREMOVE") == "1":
                self._remove(name)
            while fds:
                if fields.get("FDSTORE") == "1" and len(self.stored) < ROOM:
                    self.stored.insert(0, (name, fds.pop()))
                else:
                    os.close(fds.pop())

    def _remove(self, name):
        for each in [one for one in self.stored if one[0] == name]:
            self.stored.remove(each)
            os.close(each[1])

    def empty(self):
        """As after a stop of the unit."""
        for _, fd in self.stored:
            os.close(fd)
        self.stored.clear()
