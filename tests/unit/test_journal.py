"""Entries of the journal with fields, and the catalog that explains them."""

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from proxyd import journal, log
from proxyd.outage import COLD_START_MS, Outage

ROOT = Path(__file__).resolve().parents[2]
CATALOG = ROOT / "systemd" / "systemd-socket-proxyd.catalog"

EVENTS = {
    name: getattr(log, name)
    for name in dir(log)
    if isinstance(getattr(log, name), str) and re.fullmatch("[0-9a-f]{32}", getattr(log, name))
}
"""Name → MESSAGE_ID, of all that the program has."""


@pytest.fixture
def stream(monkeypatch):
    """The service manager has connected stderr to the journal."""
    monkeypatch.setattr(log, "_on_journal", True)
    monkeypatch.setattr(log, "_max_level", log.INFO)
    log._repeats.clear()
    yield
    log._repeats.clear()


@pytest.fixture
def socket_file(tmp_path, monkeypatch):
    """A journal's socket."""
    path = str(tmp_path / "socket")
    monkeypatch.setattr(journal, "SOCKET", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.setblocking(False)
        yield sock


def entries(sock):
    """All that has come, as {field: value}."""
    found = []
    while True:
        try:
            data = sock.recv(1 << 20)
        except BlockingIOError:
            return found
        assert data.endswith(b"\n")
        lines = data.decode().splitlines()
        entry = dict(line.split("=", 1) for line in lines)
        assert len(entry) == len(lines)
        found.append(entry)


@pytest.mark.usefixtures("stream")
def test_an_event_is_one_entry_with_fields_and_no_line(socket_file, capfd):
    log.limited("a", "Down.", log.ERROR, MESSAGE_ID=log.FAILED, TARGET="/run/x", CLIENT="")
    assert entries(socket_file) == [
        {
            "MESSAGE": "Down.",
            "PRIORITY": "3",
            "SYSLOG_FACILITY": "3",
            "SYSLOG_IDENTIFIER": "systemd-socket-proxyd",
            "MESSAGE_ID": log.FAILED,
            "TARGET": "/run/x",
        }
    ]
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("stream")
def test_values_are_one_line_each(socket_file):
    log.limited("a", "x\ny\udcff", TARGET="/run/\n\x1b[31mé\udcff")
    (entry,) = entries(socket_file)
    assert entry["MESSAGE"] == "x\\ny\\xff"
    assert entry["TARGET"] == "/run/\\n\\x1b[31mé\\xff"


@pytest.mark.usefixtures("stream")
def test_what_has_no_fields_is_a_line(socket_file, capfd):
    log.warning("Down.")
    log.limited("a", "Up.", log.INFO)
    assert entries(socket_file) == []
    assert capfd.readouterr().err == "<4>Down.\n<6>Up.\n"


def test_without_the_journal_an_event_is_a_line(socket_file, capfd, monkeypatch):
    monkeypatch.setattr(log, "_on_journal", False)
    log.limited("without the journal", "Down.", TARGET="/run/x")
    assert entries(socket_file) == []
    assert capfd.readouterr().err == "Down.\n"


@pytest.mark.usefixtures("stream", "socket_file")
def test_levels_hold_for_entries(socket_file):
    log.limited("a", "Detail.", log.DEBUG, TARGET="/run/x")
    assert entries(socket_file) == []


@pytest.mark.usefixtures("stream")
def test_repeated_events_are_left_out_as_lines_are(socket_file, capfd):
    for number in range(3):
        log.limited("a", "Down.", TARGET=f"/run/{number}")
    log.flush_limited()
    first, last = entries(socket_file)
    assert first["TARGET"] == "/run/0"
    assert last["TARGET"] == "/run/2"
    assert last["MESSAGE"] == "Down. (last of 2 left out)"
    assert capfd.readouterr().err == ""


# ── where the journal takes no entry, there is a line ─────────────────────────────────────────────


@pytest.mark.usefixtures("stream")
@pytest.mark.parametrize("left", ["no file", "no reader"])
def test_without_a_socket_there_is_a_line(tmp_path, monkeypatch, capfd, left):
    path = tmp_path / "socket"
    monkeypatch.setattr(journal, "SOCKET", str(path))
    if left == "no reader":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(path))
    log.limited("a", "Down.", TARGET="/run/x")
    assert capfd.readouterr().err == "<4>Down.\n"


@pytest.mark.usefixtures("stream")
def test_a_full_queue_costs_no_event_and_no_wait(socket_file, capfd):
    total = 2000
    for number in range(total):
        log.limited(f"kind {number}", f"Event {number}.", TARGET="/run/x")
    sent = [entry["MESSAGE"] for entry in entries(socket_file)]
    lines = [line.removeprefix("<4>") for line in capfd.readouterr().err.splitlines()]
    assert sent
    assert lines
    assert sorted(sent + lines) == sorted(f"Event {number}." for number in range(total))


@pytest.mark.usefixtures("stream")
def test_an_entry_too_large_for_a_datagram_is_a_line(socket_file, capfd):
    log.limited("a", "Down.", TARGET="x" * 1_000_000)
    assert entries(socket_file) == []
    assert capfd.readouterr().err == "<4>Down.\n"


@pytest.mark.usefixtures("stream", "socket_file")
@pytest.mark.parametrize("error", [OSError(24, "no fd"), ImportError("x"), MemoryError()])
def test_what_cannot_be_loaded_costs_no_event(capfd, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(journal, "send", fail)
    log.limited("a", "Down.", TARGET="/run/x")
    assert capfd.readouterr().err == "<4>Down.\n"


@pytest.mark.usefixtures("stream")
def test_no_fd_is_kept(socket_file):
    before = os.listdir("/proc/self/fd")
    log.limited("a", "Down.", TARGET="/run/x")
    assert os.listdir("/proc/self/fd") == before
    assert len(entries(socket_file)) == 1


# ── what the events have ──────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("stream")
def test_the_entries_of_an_outage(socket_file):
    outage = Outage("/run/x")
    why = "Failed to connect to remote host: Connection refused (/run/x)"
    outage.client_held(0, first=True)
    outage.fail(why, 0, 1, cold=True, denied=False)
    outage.step(COLD_START_MS)
    outage.succeed()
    outage.end(12_000)
    outage.given_up(why, b"")
    began, lasts, ended, failed = entries(socket_file)
    assert (began["MESSAGE_ID"], began["PRIORITY"]) == (log.OUTAGE, "6")
    assert (lasts["MESSAGE_ID"], lasts["PRIORITY"]) == (log.OUTAGE, "4")
    assert (ended["MESSAGE_ID"], ended["PRIORITY"]) == (log.RECOVERED, "6")
    assert (failed["MESSAGE_ID"], failed["PRIORITY"]) == (log.FAILED, "3")
    assert {entry["TARGET"] for entry in (began, lasts, ended, failed)} == {"/run/x"}
    assert {entry["REASON"] for entry in (began, lasts, failed)} == {"Connection refused"}
    assert (ended["OUTAGE_MSEC"], ended["CLIENTS_HELD"]) == ("12000", "1")


# ── the catalog ───────────────────────────────────────────────────────────────────────────────────

FIELDS = {
    "OUTAGE": {"TARGET", "REASON"},
    "RECOVERED": {"TARGET", "OUTAGE_MSEC", "CLIENTS_HELD"},
    "REFUSED": {"LISTENER", "LIMIT", "_SYSTEMD_UNIT"},
    "REFUSED_SOURCE": {"LISTENER", "LIMIT", "_SYSTEMD_UNIT"},
    "FAILED": {"TARGET", "REASON", "_SYSTEMD_UNIT"},
}
"""What the journal always has. CLIENT may be missing: its name would be printed in its place."""


def catalog():
    """{MESSAGE_ID: (head, text)}"""
    text = re.sub("^#.*\n", "", CATALOG.read_text(), flags=re.MULTILINE)
    nothing, *pieces = re.split("^-- ", text, flags=re.MULTILINE)
    assert nothing.strip() == ""
    found = {}
    for piece in pieces:
        name, _, rest = piece.partition("\n")
        head, blank, body = rest.partition("\n\n")
        assert blank
        assert name not in found
        found[name] = head, body
    return found


def test_every_event_is_in_the_catalog_and_no_other():
    assert len(EVENTS) == len(FIELDS) == 5
    assert catalog().keys() == set(EVENTS.values())
    used = {
        name
        for path in (ROOT / "proxyd").glob("*.py")
        for name in re.findall(r"MESSAGE_ID[\"=: ]+log\.(\w+)", path.read_text())
    }
    assert used == EVENTS.keys()


@pytest.mark.parametrize("event", FIELDS)
def test_the_catalog_uses_fields_that_the_entry_has(event):
    head, text = catalog()[EVENTS[event]]
    assert set(re.findall(r"@(\w+)@", head + text)) <= FIELDS[event]
    assert re.fullmatch(r"Subject: .+\nDefined-By: .+\nDocumentation: man:.+", head)
    assert all(len(line) <= 80 for line in text.splitlines())


def test_journalctl_reads_the_catalog(tmp_path):
    program = shutil.which("journalctl")
    if program is None:
        pytest.skip("there is no journalctl")
    folder = tmp_path / "usr" / "lib" / "systemd" / "catalog"
    folder.mkdir(parents=True)
    shutil.copy(CATALOG, folder)

    def run(*arguments):
        command = [program, f"--root={tmp_path}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout

    run("--update-catalog")
    listed = {line.split()[0] for line in run("--list-catalog").splitlines()}
    assert listed == set(EVENTS.values())
