"""A caller of an inspection socket, and what it asks."""

import json
import select
import socket
import subprocess
import sys

from kit.waiting import patience

PROXY = "net.socketproxyd.Proxy"
METRICS = "io.systemd.Metrics"
SERVICE = "org.varlink.service"


class CallFailed(Exception):
    """A call was answered with an error: its name and its parameters."""


class Caller:
    """A connection to an inspection socket."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(patience())
        self.sock.connect(path)
        self.data = b""

    def ask(self, method, more=False, **parameters):
        """Send a call."""
        call = {"method": method, "parameters": parameters, "more": more}
        self.sock.sendall(json.dumps(call).encode() + b"\0")

    def raw_message(self):
        """The bytes of the next message, without its NUL."""
        while b"\0" not in self.data:
            piece = self.sock.recv(1 << 16)
            assert piece, "the proxy has closed the connection"
            self.data += piece
        message, _, self.data = self.data.partition(b"\0")
        return message

    def message(self):
        """The next message."""
        return json.loads(self.raw_message())

    def messages(self):
        """The messages that have come already."""
        while select.select([self.sock], [], [], 0)[0]:
            piece = self.sock.recv(1 << 16)
            if not piece:
                break
            self.data += piece
        found = []
        while b"\0" in self.data:
            found.append(self.message())
        return found

    def call(self, method, more=False, **parameters):
        """All replies to a call."""
        self.ask(method, more, **parameters)
        replies = [self.message()]
        while replies[-1].get("continues"):
            replies.append(self.message())
        return replies

    def closed(self):
        """Whether the proxy closes the connection."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self):
        self.sock.close()

    # What is asked

    def connections(self, **which):
        """The rows of List: all of the chosen clients."""
        replies = self.call(f"{PROXY}.List", more=True, **which)
        if replies[0].get("error") == f"{PROXY}.NoSuchConnection":
            return []
        return [one["parameters"]["connection"] for one in replies]

    def connection_of(self, client):
        """The row of a client's TCP socket; None without one."""
        name = text_of(client.getsockname())
        found = [one for one in self.connections() if one["client"] == name]
        assert len(found) <= 1, found
        return found[0] if found else None

    def status(self):
        """The reply to Status."""
        (reply,) = self.call(f"{PROXY}.Status")
        return reply["parameters"]

    def terminate(self, number):
        """Terminate a connection. Raises CallFailed."""
        (reply,) = self.call(f"{PROXY}.Terminate", id=number)
        if "error" in reply:
            raise CallFailed(reply["error"], reply["parameters"])

    def watch(self):
        """Begin to watch: events are messages from now on."""
        self.ask(f"{PROXY}.Watch", more=True)
        # The proxy answers in order, but says nothing until there is an event. It reads the call
        # before it accepts later clients only if it has come to it: another call proves that.
        other = Caller(self.sock.getpeername())
        other.status()
        other.close()

    def metrics(self):
        """{(name, field values): value}"""
        found = {}
        for reply in self.call(f"{METRICS}.List", more=True):
            metric = reply["parameters"]
            name = metric["name"].removeprefix("net.socketproxyd.")
            key = name, *(metric["fields"] or {}).values()
            assert key not in found, key
            found[key] = metric["value"]
        return found


def text_of(address):
    """The address of a TCP or UNIX socket, as the proxy writes it."""
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if isinstance(address, bytes):
        return "@" + address[1:].decode()
    return address


CALL = """
import socket, sys
caller = socket.socket(socket.AF_UNIX)
caller.settimeout(float(sys.argv[3]))
caller.connect(sys.argv[1])
caller.sendall(sys.argv[2].encode() + b"\\0")
data = b""
while not data.endswith(b"\\0"):
    data += caller.recv(65536) or sys.exit("closed")
print(data.rstrip(b"\\0").split(b"\\0")[0].decode())
"""


def call_as(prefix, path, method, **parameters):
    """The first reply to a call from another user, whom `prefix` makes the command run as."""
    call = {"method": method, "parameters": parameters, "more": "more" in METHODS[method]}
    command = [sys.executable, "-Ic", CALL, path, json.dumps(call), str(patience())]
    done = subprocess.run([*prefix, *command], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


METHODS = {
    f"{PROXY}.List": "more",
    f"{PROXY}.Watch": "more",
    f"{PROXY}.Terminate": "",
    f"{PROXY}.Status": "",
    f"{METRICS}.List": "more",
    f"{METRICS}.Describe": "more",
}
"""All methods of a proxy, and what they need."""
