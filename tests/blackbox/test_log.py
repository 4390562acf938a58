"""Lines on stderr, whether or not they are read."""

import os
import pty
import signal

import pytest
from kit.differences import differs
from kit.namespaces import mount_prefix
from kit.traffic import read_exactly

CLIENTS = 1500
"""Their lines, at debug level, are more than any log takes that is not read."""


def greet(client):
    """One byte there and back."""
    client.sendall(b"x")
    assert read_exactly(client, 1) == b"x"


def open_terminal(stage):
    """(reader, writer, path) of a terminal."""
    reader, writer = pty.openpty()
    return reader, writer, os.ttyname(writer)


def open_fifo(stage):
    """The same of a named pipe."""
    path = stage.path(f"log{len(os.listdir(stage.directory))}")
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    return reader, os.open(path, os.O_WRONLY), path


@differs("original", reason="waits for the reader of its log", run=False)
@pytest.mark.parametrize("open_log", [open_terminal, open_fifo])
@pytest.mark.parametrize("proc", ["proc", "no proc"])
def test_a_log_that_is_not_read(stage, open_log, proc):
    """Lines are lost, but no client is, and SIGTERM ends the program."""
    hide = mount_prefix("-t tmpfs none /proc") if proc == "no proc" else []
    reader, writer, path = open_log(stage)
    try:
        proxy = stage.launch(
            stage.echo(),
            listeners=[stage.listener()],
            environment={"SYSTEMD_LOG_LEVEL": "debug"},
            prefix=[*hide, "sh", "-c", f'exec "$@" 2>{path}', "sh"],
        )
        for _ in range(CLIENTS):
            client = stage.connect()
            greet(client)
            client.close()
        proxy.send_signal(signal.SIGTERM)
        assert proxy.wait() == 0
    finally:
        os.close(reader)
        os.close(writer)
