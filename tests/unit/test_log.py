"""Lines on stderr: one each, escaped, never a block and never an exception."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import log


@pytest.fixture(autouse=True)
def _default_setup():
    log.setup({})
    yield
    log.setup({})


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(log.time, "monotonic", lambda: Clock.now)
    return Clock


def journal_stream():
    stat = os.fstat(2)
    return f"{stat.st_dev}:{stat.st_ino}"


def test_default_level_is_info(capfd):
    for write in (log.error, log.warning, log.notice, log.info, log.debug):
        write(write.__name__)
    assert capfd.readouterr().err == "error\nwarning\nnotice\ninfo\n"
    assert log.enabled(log.INFO)
    assert not log.enabled(log.DEBUG)


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        ("emerg", 0),
        ("0", 0),
        ("err", 1),
        ("3", 1),
        ("warning", 2),
        ("notice", 3),
        ("info", 4),
        ("debug", 5),
        ("7", 5),
        ("err,debug", 5),
        ("err,console:debug", 5),
        ("err,journal:debug", 1),
        ("", 4),
    ],
)
def test_levels(capfd, value, lines):
    log.setup({"SYSTEMD_LOG_LEVEL": value})
    for write in (log.error, log.warning, log.notice, log.info, log.debug):
        write("x")
    assert capfd.readouterr().err == "x\n" * lines


@pytest.mark.parametrize(
    "value", ["8", "-1", "DEBUG", "77", ",", "x:debug", ":debug", "\udcff", "٣"]
)
def test_garbage_level(capfd, value):
    log.setup({"SYSTEMD_LOG_LEVEL": value})
    log.info("on")
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("Ignoring SYSTEMD_LOG_LEVEL=")
    assert second == "on"


def test_journal_gets_the_level(capfd):
    log.setup({"JOURNAL_STREAM": journal_stream(), "SYSTEMD_LOG_LEVEL": "journal:debug"})
    log.error("a")
    log.debug("b")
    assert capfd.readouterr().err == "<3>a\n<7>b\n"


def test_another_stream_is_not_the_journal(capfd):
    log.setup({"JOURNAL_STREAM": "1:1"})
    log.error("a")
    assert capfd.readouterr().err == "a\n"


@pytest.mark.parametrize("value", ["x", "1", "1:", ":1", "1:x", "1:-1", "1:1:1", "9" * 5000, "٣:٣"])
def test_garbage_journal_stream(capfd, value):
    log.setup({"JOURNAL_STREAM": value})
    log.info("on")
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("Ignoring JOURNAL_STREAM=")
    assert second == "on"


def test_a_line_is_one_line(capfd):
    log.error("a\nb\r\x1b[31m\udcff\ud800\tü")
    assert capfd.readouterr().err == "a\\nb\\x0d\\x1b[31m\\xff\\ud800\\tü\n"


def test_long_lines_are_cut(capfd):
    log.error("\U0001f600" * 10000)
    line = capfd.readouterr().err
    assert len(line.encode()) < 4096
    assert set(line) == {"\U0001f600", "\n"}


@given(st.text(st.characters()))
def test_any_text_is_one_printable_line(text):
    escaped = log._printable(text)
    assert escaped.isprintable()
    assert len(escaped) >= len(text)


def with_stderr(fd, write):
    saved = os.dup(2)
    os.dup2(fd, 2)
    try:
        write()
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def test_a_full_pipe_costs_the_line():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)  # a write(2) would block from here on
    with_stderr(writer, lambda: log.error("lost"))
    os.read(reader, 65536)
    with_stderr(writer, lambda: log.error("kept"))
    os.close(writer)
    with open(reader, "rb") as rest:
        assert rest.read().strip(b"\0") == b"kept\n"


def test_a_closed_pipe_costs_the_line():
    reader, writer = os.pipe()
    os.close(reader)
    with_stderr(writer, lambda: log.error("lost"))
    os.close(writer)


def test_a_closed_stderr_costs_the_line():
    saved = os.dup(2)
    os.close(2)
    try:
        log.error("lost")
        log.setup({"JOURNAL_STREAM": "1:1"})
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def test_limited(capfd, clock):
    for _ in range(4):
        log.limited("limit", "Hit.")
    log.limited("other", "Other.")
    clock.now += 4.9
    log.limited("limit", "Hit.")
    clock.now += 2.1
    log.limited("limit", "Hit.")
    clock.now += 6
    log.limited("limit", "Hit.")
    assert capfd.readouterr().err.splitlines() == [
        "Hit.",
        "Other.",
        "Hit. (4 more in the last 7 s left out)",
        "Hit.",
    ]


def test_what_was_left_out_is_told_at_the_end(capfd, clock):
    log.limited("a", "First.")
    log.limited("a", "Second.")
    log.limited("a", "Third.")
    log.limited("b", "Other.")
    log.flush_limited()
    log.flush_limited()
    assert capfd.readouterr().err.splitlines() == [
        "First.",
        "Other.",
        "Third. (last of 2 left out)",
    ]


def test_limited_takes_a_level(capfd):
    log.limited("a", "x", log.DEBUG)
    assert capfd.readouterr().err == ""
