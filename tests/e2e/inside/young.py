"""Kill a proxy whose connections are all younger than a second, and tell what their ends see.

    young.py LISTENER TARGET PID COUNT

COUNT clients connect to LISTENER, a port of 127.0.0.1; this program is the server behind it, on
port TARGET. Each has sent a byte and received one when process PID is killed. Then one JSON object
says how long that took since the first connect, in ms, and how many ends saw "reset", "end" or
something else.
"""

import collections
import json
import os
import signal
import socket
import sys
import time


def seen_by(sock: socket.socket) -> str:
    """What comes next: "reset", "end", or another error or byte."""
    sock.settimeout(20)
    try:
        return "a byte" if sock.recv(1) else "end"
    except ConnectionResetError:
        return "reset"
    except OSError as error:
        return str(error)


def main() -> None:
    listener, target, pid, count = map(int, sys.argv[1:])
    server = socket.create_server(("127.0.0.1", target))
    began = time.monotonic()
    ends = []
    for _ in range(count):
        client = socket.create_connection(("127.0.0.1", listener))
        client.sendall(b"?")
        served, _ = server.accept()
        served.recv(1)
        served.sendall(b"!")
        client.recv(1)
        ends += [client, served]
    os.kill(pid, signal.SIGKILL)
    took_ms = round(1000 * (time.monotonic() - began))
    print(json.dumps({"took_ms": took_ms, **collections.Counter(map(seen_by, ends))}))


main()
