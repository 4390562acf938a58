"""Send datagrams to a port, all at once, and print what comes back, a line each.

Usage: datagram_client.py PORT COUNT [SECONDS]

Exit status 1 if an answer takes longer than that, 20 seconds by default.
"""

import socket
import sys


def main() -> int:
    port, count = int(sys.argv[1]), int(sys.argv[2])
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.connect(("127.0.0.1", port))
    client.settimeout(float(sys.argv[3]) if len(sys.argv) > 3 else 20)
    for number in range(count):
        client.send(b"%d" % number)
    for _ in range(count):
        try:
            print(client.recv(65536).decode(), flush=True)
        except OSError as error:
            print(error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
