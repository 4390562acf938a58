"""Start COMMAND as a service manager would, and send bytes both ways over a real connection.

Usage: forward.py COMMAND [ARGUMENT...]
"""

import os
import signal
import socket
import sys
import tempfile

PATIENCE = 10
"""Seconds until what does not come counts as lost."""


def start(command: list[str], listener: socket.socket) -> int:
    """Start `command` with `listener` as fd 3; LISTEN_PID is known only to the child itself."""
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(listener.fileno(), 3)
            variables = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
            os.execve(command[0], command, variables | {"PATH": os.environ["PATH"]})
        finally:
            os._exit(127)
    return pid


def exchange(client: socket.socket, backend: socket.socket) -> None:
    """A question, its end, and an answer in two parts."""
    client.settimeout(PATIENCE)
    backend.settimeout(PATIENCE)
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    with backend.accept()[0] as connection:
        connection.settimeout(PATIENCE)
        with connection.makefile("rb") as stream:
            question = stream.read()
        assert question == b"question", question
        first, second = os.urandom(1 << 16), os.urandom(1 << 16)
        connection.sendall(first)
        with client.makefile("rb") as stream:
            got = stream.read(len(first))
            connection.sendall(second)
            connection.shutdown(socket.SHUT_WR)
            got += stream.read()
    assert got == first + second, "the answer is not what was sent"


def main() -> int:
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX) as backend,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        backend.bind(f"{folder}/target")
        backend.listen()
        pid = start([*sys.argv[1:], f"{folder}/target"], listener)
        try:
            with socket.create_connection(listener.getsockname()) as client:
                exchange(client, backend)
        finally:
            os.kill(pid, signal.SIGTERM)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"exit status {status}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
