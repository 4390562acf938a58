"""Answer each client with the SHA-256 of what it sent, once it has shut down its sending side.

digest_server.py PORT
"""

import hashlib
import socketserver
import sys


class Digest(socketserver.StreamRequestHandler):
    def handle(self):
        received = hashlib.file_digest(self.rfile, "sha256").hexdigest()
        self.wfile.write(f"{received}\n".encode())


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True


Server(("127.0.0.1", int(sys.argv[1])), Digest).serve_forever()
