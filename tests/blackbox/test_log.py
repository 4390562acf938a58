"""Lines on stderr, whether or not they are read."""

import os
import pty
import signal
import socket

import pytest
from kit.differences import differs
from kit.namespaces import mount_prefix
from kit.traffic import read_exactly, read_to_end
from kit.waiting import wait_until

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


# ── the journal ───────────────────────────────────────────────────────────────────────────────────


class Journal:
    """A journal's socket, and where the program finds it."""

    def __init__(self, stage):
        folder = stage.path("journal")
        os.mkdir(folder)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(f"{folder}/socket")
        self.sock.setblocking(False)
        self.prefix = mount_prefix(
            "-t tmpfs none /run && mkdir -p /run/systemd/journal",
            f"--bind {folder} /run/systemd/journal",
        )
        self.entries = []

    def read(self):
        """All entries so far."""
        while True:
            try:
                lines = self.sock.recv(1 << 16).decode().splitlines()
            except BlockingIOError:
                return self.entries
            self.entries.append(dict(line.split("=", 1) for line in lines))

    def wait_for(self, part):
        """The entry whose message contains `part`."""

        def found():
            return [entry for entry in self.read() if part in entry["MESSAGE"]]

        wait_until(found, f"an entry with {part!r}")
        (entry,) = found()
        return entry


@pytest.fixture
def journal(stage):
    one = Journal(stage)
    yield one
    one.sock.close()


@differs("original", reason="has other fields", run=False)
def test_events_are_entries_of_the_journal_and_no_lines(stage, journal):
    backend = stage.absent()
    listener = stage.listener()
    proxy = stage.launch(
        "-c1", backend.target, listeners=[listener], journal=True, prefix=journal.prefix
    )
    client = stage.connect()
    outage = journal.wait_for("holding clients until it answers")
    assert (outage["TARGET"], outage["REASON"]) == (backend.target, "Connection refused")
    assert outage["PRIORITY"] == "6"
    refused = stage.connect()
    assert read_to_end(refused)[0] == b""
    entry = journal.wait_for("Hit connection limit")
    assert entry["CLIENT"] == "{}:{}".format(*refused.getsockname())
    assert (entry["LIMIT"], entry["PRIORITY"]) == ("1", "4")
    backend.start_listening()
    client.sendall(b"x")
    backend.accept()
    assert journal.wait_for("answers after")["CLIENTS_HELD"] == "1"
    assert len({entry["MESSAGE_ID"] for entry in journal.read()}) == 3
    assert proxy.log_lines() == []


@differs("original", reason="writes to the journal's socket", run=False)
@pytest.mark.parametrize("why", ["stderr", "no socket", "full"])
def test_events_are_lines_where_the_journal_takes_none(stage, journal, why):
    """Because stderr is another file, there is no socket, or its queue is full."""
    prefix = journal.prefix
    if why == "no socket":
        prefix = mount_prefix("-t tmpfs none /run")
    if why == "full":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            try:
                while True:
                    sender.sendto(b"MESSAGE=x\n", journal.sock.getsockname())
            except BlockingIOError:
                pass
    arguments = ["--connect-timeout=0", stage.absent().target]
    proxy = stage.launch(
        *arguments, listeners=[stage.listener()], journal=why != "stderr", prefix=prefix
    )
    assert read_to_end(stage.connect())[0] == b""
    proxy.wait_for_log("Failed to connect to remote host: ")
    assert proxy.log_lines("Failed")[0].startswith("Failed" if why == "stderr" else "<3>Failed")
    assert not [entry for entry in journal.read() if "Failed" in entry["MESSAGE"]]


# ── clients ───────────────────────────────────────────────────────────────────────────────────────


@differs("original", reason="does not log the address", run=False)
@pytest.mark.parametrize("wanted", ["yes", "no"])
def test_a_client_that_is_refused_is_logged_with_its_address(stage, wanted):
    proxy = stage.launch(
        "-c1", f"--log-addresses={wanted}", stage.echo(), listeners=[stage.listener()]
    )
    greet(stage.connect())
    refused = stage.connect()
    assert read_to_end(refused)[0] == b""
    proxy.wait_for_log("Hit connection limit, refusing connection.")
    (line,) = proxy.log_lines("Hit connection limit")
    name = "{}:{}".format(*refused.getsockname())
    assert line.endswith(f" Client: {name}.") == (wanted == "yes")
    assert (name in line) == (wanted == "yes")
