"""A Varlink server in a thread: answers as a proxy does, or as a test wants it to."""

import contextlib
import json
import os
import socket
import sys
import threading
from pathlib import Path

from kit.waiting import patience

COMMAND = Path(sys.executable).parent / "socket-proxyctl"

PROXY = "net.socketproxyd.Proxy"
METRICS = "io.systemd.Metrics"


def row(number, **fields):
    """A connection, as List and Watch tell it."""
    half = {"bytes": 2048, "inFlight": 0, "state": "flowing"}
    return {
        "id": number,
        "state": "open",
        "listener": "0.0.0.0:80",
        "client": f"192.0.2.7:{40000 + number}",
        "clientPID": None,
        "target": "127.0.0.1:8080",
        "targetAddress": "127.0.0.1:8080",
        "localAddress": "127.0.0.1:50000",
        "sinceUSec": 1_790_000_000_000_000,
        "ageUSec": 65_000_000,
        "idleUSec": 1_500_000,
        "heldUSec": None,
        "connectUSec": 320,
        "up": half,
        "down": half | {"bytes": 3 << 30, "inFlight": 512},
        "thread": 0,
    } | fields


STATUS = {
    "version": "1.2.3",
    "pid": 4711,
    "startedUSec": 1_790_000_000_000_000,
    "status": "2 connections",
    "open": 2,
    "held": 1,
    "threads": 1,
    "limits": {"connectionsMax": 256, "threadsMax": 1, "callersMax": 64},
    "listeners": [
        {"name": "web", "address": "0.0.0.0:80", "target": "127.0.0.1:8080", "accepting": True}
    ],
    "targets": [
        {
            "target": "127.0.0.1:8080",
            "up": False,
            "downSinceUSec": 1_790_000_000_000_000,
            "reason": "Connection refused",
            "held": 1,
            "served": 7,
            "failed": 2,
        }
    ],
}


class FakeProxy:
    """Listens at `path`. `replies` is {method: replies, or a function of the parameters}.

    A reply is a dict (the parameters), an error as a string, bytes that are sent as they are, or
    None: the connection is closed.
    """

    def __init__(self, path, **replies):
        self.path = str(path)
        self.calls = []
        self.replies = {
            f"{PROXY}.List": [{"connection": row(1)}, {"connection": row(2)}],
            f"{PROXY}.Status": [STATUS],
            f"{PROXY}.Terminate": [{}],
        } | replies
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._callers = []
        self._acceptor = threading.Thread(target=self._serve, daemon=True)
        self._acceptor.start()

    def close(self):
        """Close every socket, as a proxy that ends."""
        end(self._listener)
        self._acceptor.join()  # it may just have accepted another
        for caller in self._callers:
            end(caller)

    def _serve(self):
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            self._callers.append(caller)
            threading.Thread(target=self._answer, args=(caller,), daemon=True).start()

    def _answer(self, caller):
        buffer = b""
        try:
            while data := caller.recv(4096):
                buffer += data
                while b"\0" in buffer:
                    message, _, buffer = buffer.partition(b"\0")
                    if not self._reply(caller, json.loads(message)):
                        caller.shutdown(socket.SHUT_RDWR)
                        return
        except OSError:
            return

    def _reply(self, caller, call):
        self.calls.append(call)
        replies = self.replies.get(call["method"], ["org.varlink.service.MethodNotFound"])
        if callable(replies):
            replies = replies(call["parameters"])
        endless = call["method"].endswith(".Watch")
        replies = replies if endless else list(replies)
        for at, one in enumerate(replies):
            if one is None:
                return False
            if isinstance(one, bytes):
                caller.sendall(one)
                continue
            reply = (
                {"error": one, "parameters": {}} if isinstance(one, str) else {"parameters": one}
            )
            if endless or at < len(replies) - 1:
                reply["continues"] = True
            caller.sendall(json.dumps(reply).encode() + b"\0")
        return True


def end(sock):
    """Close a socket, and wake the thread that waits for it."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


SYSTEMCTL = """#!{python}
import json, sys
units = json.load(open({table!r}))
arguments = [word for word in sys.argv[1:] if word != "--user"]
if arguments[0] == "list-units":
    for name in units:
        if name.endswith(".service"):
            print(name, "loaded active running Some Description")
else:
    wanted = next(word for word in arguments if word.startswith("--property="))
    wanted = wanted.removeprefix("--property=").split(",")
    blocks = []
    for name in arguments[arguments.index("--") + 1 :]:
        about = {{"Id": name, "MainPID": "0"}} | units.get(name, {{}})
        blocks.append("".join(f"{{key}}={{about[key]}}\\n" for key in wanted if key in about))
    print("\\n".join(blocks), end="")
"""
"""A service manager of which nothing but its answers is there."""


def write_systemctl(folder, python, units):
    """Write a systemctl that knows `units`, {name: properties}, into `folder`."""
    folder.mkdir(exist_ok=True)
    table = folder / "units.json"
    table.write_text(json.dumps(units))
    program = folder / "systemctl"
    program.write_text(SYSTEMCTL.format(python=python, table=str(table)))
    program.chmod(0o755)


def running(*words, **properties):
    """The properties of a running service whose process is hidden."""
    words = words or ("/usr/bin/systemd-socket-proxyd", "127.0.0.1:8080")
    return {"MainPID": pid_without_process(), "ExecStart": exec_start(*words)} | properties


def exec_start(*words):
    """ExecStart= as systemctl shows it."""
    return f"{{ path={words[0]} ; argv[]={' '.join(words)} ; ignore_errors=no ; start_time=[n/a] }}"


def deadline():
    """Seconds after which a command counts as hung."""
    return patience() * 2


def pid_without_process():
    """A pid that no process has: its command line cannot be read."""
    with open("/proc/sys/kernel/pid_max") as file:
        pid = int(file.read()) + 1
    assert not os.path.exists(f"/proc/{pid}")
    return str(pid)
