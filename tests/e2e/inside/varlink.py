"""varlink.py SOCKET METHOD [PARAMETERS]: all replies to a Varlink call, a line of JSON each.

For suites without varlinkctl, and for what it does not show.
"""

import json
import socket
import sys

PATIENCE = 20  # seconds


def main() -> int:
    path, method, *rest = sys.argv[1:]
    parameters = json.loads(rest[0]) if rest else {}
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(path)
        call = {"method": method, "parameters": parameters, "more": True}
        sock.sendall(json.dumps(call).encode() + b"\0")
        data = b""
        while True:
            message, nul, data = data.partition(b"\0")
            if not nul:
                data = message
                piece = sock.recv(1 << 16)
                if not piece:
                    return 1
                data += piece
                continue
            print(message.decode(), flush=True)
            if not json.loads(message).get("continues"):
                return 0


if __name__ == "__main__":
    sys.exit(main())
