"""Callers of the inspection socket around one run of the program, stepped by the walk."""

import json
import socket

from kit.stepped import Incoming, Outgoing, prepare

INFO = {"method": "org.varlink.service.GetInfo"}
STATUS = {"method": "net.socketproxyd.Proxy.Status"}
LIST = {"method": "net.socketproxyd.Proxy.List", "more": True}
WATCH = {"method": "net.socketproxyd.Proxy.Watch", "more": True}
METRICS = {"method": "io.systemd.Metrics.List", "more": True}
TERMINATE = {"method": "net.socketproxyd.Proxy.Terminate", "parameters": {"id": 999}}


class CallerRun:
    """One caller, its calls, and what it hears."""

    def __init__(self, path, calls):
        self.calls = calls
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        prepare(self.socket)
        data = b"".join(json.dumps(call).encode() + b"\0" for call in calls)
        self.sending = Outgoing(self.socket, data)
        self.hearing = Incoming(self.socket)

    def step(self):
        if self.socket.fileno() >= 0:
            self.sending.step()
            self.hearing.step()

    @property
    def answered(self):
        """Whether the last reply to every call has come."""
        return sum(not reply.get("continues") for reply in self.replies()) == len(self.calls)

    @property
    def over(self):
        return self.hearing.end is not None or self.answered

    def replies(self):
        """All replies that have come in full. Raises ValueError if one of them is not JSON."""
        return [json.loads(message) for message in bytes(self.hearing.data).split(b"\0")[:-1]]

    def judge(self):
        """Return what is wrong, in words: what it hears is right, or it is cut."""
        try:
            replies = self.replies()
        except ValueError as error:
            return [f"a caller was sent no JSON: {error}"]
        wrong = [reply for reply in replies if not isinstance(reply.get("parameters"), dict)]
        ids = [
            reply["parameters"]["connection"]["id"]
            for reply in replies
            if "connection" in reply.get("parameters", {}) and self.calls == [LIST]
        ]
        if len(set(ids)) != len(ids):
            wrong.append(f"a connection was told twice: {ids}")
        if not self.over and WATCH not in self.calls:
            wrong.append(f"it has not ended, and heard {len(replies)} replies")
        return [f"a caller of {self.calls}: {each}" for each in wrong]
