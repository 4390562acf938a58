"""A backend that does what files in /run/e2e-heal say; it answers what a client sends.

The header of the PROXY protocol, version 2, is not answered.

Usage: backend.py ADDRESS PORT | backend.py PATH    connections
       backend.py udp ADDRESS PORT                  datagrams
       backend.py both ADDRESS PORT                 both

start-delay, stop-delay  seconds before it listens, and between SIGTERM and its end
crash                    it ends with status 1 as soon as it listens
"""

import os
import signal
import socket
import sys
import time

CONTROL = "/run/e2e-heal"


def delay(name: str) -> None:
    try:
        with open(f"{CONTROL}/{name}", encoding="ascii") as file:
            time.sleep(float(file.read()))
    except OSError:
        pass


def stop(*_: object) -> None:
    # Clients that connect meanwhile get as far as the queue of the listener.
    delay("stop-delay")
    os._exit(0)


def listen_for_datagrams(where: list[str]) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.bind((where[0], int(where[1])))
    return listener


def listen(where: list[str]) -> socket.socket:
    if len(where) == 2:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((where[0], int(where[1])))
    else:
        if os.path.exists(where[0]):
            os.unlink(where[0])
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(where[0])
        os.chmod(where[0], 0o666)
    listener.listen()
    return listener


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    delay("start-delay")
    kind, where = "", sys.argv[1:]
    if where[0] in ("udp", "both"):
        kind = where.pop(0)
    datagrams = listen_for_datagrams(where) if kind else None
    listener = listen(where) if kind != "udp" else None
    if os.path.exists(f"{CONTROL}/crash"):
        sys.exit(1)
    if listener and (not datagrams or os.fork()):
        answer_connections(listener)
    elif datagrams:
        answer_datagrams(datagrams)


def answer_datagrams(listener: socket.socket) -> None:
    while True:
        data, client = listener.recvfrom(65536)
        listener.sendto(b"answer " + data, client)


def answer_connections(listener: socket.socket) -> None:
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            while data := client.recv(4096):
                if data := without_header(data):
                    client.sendall(b"answer " + data)
            os._exit(0)
        client.close()
        while os.waitpid(-1, os.WNOHANG)[0] if children() else 0:
            pass


def without_header(data: bytes) -> bytes:
    """What follows the header, which one write of the proxy brings as a whole."""
    if not data.startswith(b"\r\n\r\n\0\r\nQUIT\n"):
        return data
    return data[16 + int.from_bytes(data[14:16], "big") :]


def children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


main()
