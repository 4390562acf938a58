"""A backend that answers each datagram with "echo " in front; files in /run/heal say what it does.

Usage: datagram_backend.py PORT | datagram_backend.py PATH

start-delay   seconds before it binds
crash         it ends with status 1 instead
"""

import os
import socket
import sys
import time

CONTROL = "/run/heal"


def main() -> int:
    where = sys.argv[1]
    if os.path.exists(f"{CONTROL}/start-delay"):
        with open(f"{CONTROL}/start-delay", encoding="ascii") as file:
            time.sleep(float(file.read()))
    if os.path.exists(f"{CONTROL}/crash"):
        return 1
    if where.startswith("/"):
        if os.path.exists(where):
            os.unlink(where)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        server.bind(where)
    else:
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind(("127.0.0.1", int(where)))
    while True:
        data, client = server.recvfrom(65536)
        server.sendto(b"echo " + data, client)


if __name__ == "__main__":
    sys.exit(main())
