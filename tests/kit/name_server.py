"""A name server that answers, fails or stays silent, as the test says."""

import os
import socket
import struct
import threading

import pytest

from kit.privileges import need_root
from kit.waiting import wait_until

A, AAAA = 1, 28
"""Types of question."""

NO_ERROR, SERVFAIL, NXDOMAIN = 0, 2, 3
"""Response codes, RFC 1035 section 4.1.1."""

SILENCE = None

_FOR_S = 3600


class NameServer:
    """Listens at port 53 of a loopback address of its own.

    `zone` maps a name to the answer: addresses, an RCODE, SILENCE, or a dictionary of these by the
    type of the question. Other names do not exist.
    """

    def __init__(self):
        need_root("for a name server")
        self.zone = {}
        self.asked = []
        """(name, type) of every question."""
        self._socket, self.address = _bind()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def wait_asked(self, name, more_than=0):
        """Wait for a question about `name`."""
        wait_until(lambda: self.count(name) > more_than, f"a question; there: {self.asked}")

    def count(self, name):
        """The number of questions about `name` so far."""
        return sum(asked == name for asked, _ in self.asked)

    def close(self):
        """Stop answering."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", (self.address, 53))
        self._thread.join()
        self._socket.close()

    def _serve(self):
        while True:
            query, client = self._socket.recvfrom(4096)
            if not query:
                return
            name, kind, question = _question(query)
            self.asked.append((name, kind))
            said = self.zone.get(name, NXDOMAIN)
            if isinstance(said, dict):
                said = said[kind]
            if said is not SILENCE:
                self._socket.sendto(_answer(query[:2], question, kind, said), client)


def _bind():
    """A socket bound to port 53 of an unused address in 127.0.0.0/8."""
    while True:
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        address = "127." + ".".join(str(byte % 254 + 1) for byte in os.urandom(3))
        try:
            server.bind((address, 53))
        except PermissionError as error:
            server.close()
            pytest.skip(f"no port 53 for a name server: {error}")
        except OSError:
            server.close()
            continue
        return server, address


def _question(query):
    """(name, type, bytes) of the only question of a query."""
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode())
        at += query[at] + 1
    kind = struct.unpack(">H", query[at + 1 : at + 3])[0]
    return ".".join(labels), kind, query[12 : at + 5]


def _answer(number, question, kind, said):
    """A response: `said` is an RCODE, or addresses, of which those of type `kind` are sent."""
    rcode, found = (said, []) if isinstance(said, int) else (NO_ERROR, said)
    family = socket.AF_INET if kind == A else socket.AF_INET6
    packed = [socket.inet_pton(family, one) for one in found if (":" in one) == (kind == AAAA)]
    head = number + struct.pack(">HHHHH", 0x8180 | rcode, 1, len(packed), 0, 0)
    pointer = b"\xc0\x0c"  # to the name in the question
    records = [pointer + struct.pack(">HHIH", kind, 1, _FOR_S, len(one)) + one for one in packed]
    return head + question + b"".join(records)
