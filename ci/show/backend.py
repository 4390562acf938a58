"""A small web server for the demo, on a UNIX socket: a page, a large file, and an upload.

Usage: backend.py SOCKET. Prints "ready" once it listens. It answers
- GET / with a page,
- GET /large?bytes=N with N bytes, made as they are sent,
- PUT / with the SHA-256 of what was sent.
"""

import contextlib
import hashlib
import http.server
import random
import socketserver
import sys
from collections.abc import Iterator

PAGE = b"""<!doctype html>
<title>It works</title>
<h1>It works</h1>
<p>This page came through systemd-socket-proxyd.</p>
<p><a href="/large?bytes=268435456">A large file</a></p>
"""

BLOCK = 1 << 20
NOISE = random.Random(1).randbytes(BLOCK)


def large_file(size: int) -> Iterator[bytes]:
    """Yield `size` bytes in blocks, each beginning with its own number, so that order shows."""
    for start in range(0, size, BLOCK):
        yield (start.to_bytes(8, "big") + NOISE[8:])[: size - start]


class Handler(http.server.BaseHTTPRequestHandler):
    """The three answers."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/":
            self.answer(200, len(PAGE), "text/html")
            self.wfile.write(PAGE)
        elif path == "/large" and query.removeprefix("bytes=").isdigit():
            size = int(query.removeprefix("bytes="))
            self.answer(200, size, "application/octet-stream")
            for block in large_file(size):
                self.wfile.write(block)
        else:
            self.answer(404, 0)

    def do_PUT(self) -> None:
        digest = hashlib.sha256()
        left = int(self.headers["Content-Length"])
        while left and (data := self.rfile.read(min(left, BLOCK))):
            digest.update(data)
            left -= len(data)
        text = digest.hexdigest().encode()
        self.answer(200, len(text), "text/plain")
        self.wfile.write(text)

    def answer(self, status: int, size: int, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def address_string(self) -> str:
        return "unix client"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing: the demo tells what happens."""


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """One thread per connection, which does not keep the process from ending."""

    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    with Server(sys.argv[1], Handler) as server:
        print("ready", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
