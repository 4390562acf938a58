"""Messages on stderr: one escaped line each, written without blocking and without exceptions."""

import errno
import fcntl
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import tty

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import log

PATIENCE = 30
"""Seconds after which something that has not happened counts as failed."""

LOST = b"Lines lost here, because standard error did not take them: %d.\n"


@pytest.fixture(autouse=True)
def _own_writer(monkeypatch):
    for name in ("_rest", "_lost", "_writer"):
        monkeypatch.setattr(log, name, getattr(log, name))


def journal_stream():
    stat = os.fstat(2)
    return f"{stat.st_dev}:{stat.st_ino}"


def test_default_level_is_info(capfd):
    for write in (log.error, log.warning, log.info, log.debug):
        write(write.__name__)
    assert capfd.readouterr().err == "error\nwarning\ninfo\n"
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
        ("notice", 2),
        ("info", 3),
        ("debug", 4),
        ("7", 4),
        ("err,debug", 4),
        ("err,console:debug", 4),
        ("err,journal:debug", 1),
        ("", 3),
    ],
)
def test_levels(capfd, value, lines):
    log.setup({"SYSTEMD_LOG_LEVEL": value})
    for write in (log.error, log.warning, log.info, log.debug):
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
    escaped = log.printable(text)
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


def fill(fd):
    """Fill a pipe or socket that others write to as well: it is blocking again afterwards."""
    os.set_blocking(fd, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(fd, bytes(4096))
    os.set_blocking(fd, True)


def read_all(fd, until):
    """What comes out at `fd` until it ends with `until`."""
    data = b""
    while not data.endswith(until):
        assert select.select([fd], [], [], PATIENCE)[0], data
        data += os.read(fd, 65536)
    return data


def hide_proc(monkeypatch):
    really = os.open

    def hidden(path, *args, **more):
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(errno.ENOENT, "")
        return really(path, *args, **more)

    monkeypatch.setattr(log.posix, "open", hidden)


def in_a_child(stderr, program):
    """Run `program` with this stderr and return what it prints. A write that blocks fails the test.

    The extension is imported only because an instrumented one looks for leaks before the
    interpreter ends (tests/sanitize/address.h). Later, the memory of a thread that still waits
    would count as leaked.
    """
    start = "import os\nimport proxyd._relay\nfrom proxyd import log\nlog.setup({})\n"
    done = subprocess.run(
        [sys.executable, "-c", start + program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        timeout=PATIENCE,
        check=True,
    )
    return done.stdout.decode()


@pytest.fixture
def terminal():
    """(master, slave) of a terminal that adds nothing to what is written to it."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    yield master, slave
    os.close(slave)
    os.close(master)


HIDDEN = """
real = os.open
def hidden(path, *args, **more):
    if path == "/proc/self/fd/2":
        raise FileNotFoundError
    return real(path, *args, **more)
log.posix.open = hidden
"""
"""As with InaccessiblePaths=/proc, or with a stderr that belongs to another user."""


@pytest.mark.parametrize("proc", ["", HIDDEN], ids=["proc", "no proc"])
def test_a_full_pipe_costs_lines_which_are_counted(proc):
    """Other processes write to it as well, so its file description stays blocking."""
    reader, writer = os.pipe()
    fill(writer)
    program = proc + (
        f"log.error('lost'); log.error('lost as well'); os.read({reader}, 1 << 20)\n"
        "log.error('kept'); log.error('and more')\n"
        "print(os.get_blocking(2), len(os.listdir('/proc/self/task')))"
    )
    os.set_inheritable(reader, True)
    done = subprocess.run(
        [sys.executable, "-c", "import os\nfrom proxyd import log\nlog.setup({})\n" + program],
        stdout=subprocess.PIPE,
        stderr=writer,
        close_fds=False,
        timeout=PATIENCE,
        check=True,
    )
    os.close(writer)
    assert done.stdout == b"True 1\n"
    with open(reader, "rb") as rest:
        assert rest.read() == (LOST % 2 + b"kept\nand more\n")


def test_without_proc_a_pipe_takes_lines_in_order(monkeypatch):
    hide_proc(monkeypatch)
    reader, writer = os.pipe()
    with_stderr(writer, lambda: [log.error(f"line {number}") for number in range(10)])
    assert os.read(reader, 65536) == b"".join(b"line %d\n" % number for number in range(10))
    for fd in (reader, writer):
        os.close(fd)


def test_a_full_socket_costs_lines_which_are_counted():
    """Such as the journal's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        program = "for _ in range(1000): log.error('x' * 900)\nprint(os.get_blocking(2))"
        assert in_a_child(ours, program) == "True\n"
        with_stderr(ours.fileno(), lambda: log.error("lost"))
        theirs.settimeout(PATIENCE)
        while len(theirs.recv(1 << 20)) >= 900:
            theirs.setblocking(False)
            try:
                theirs.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                break
            theirs.setblocking(True)
        with_stderr(ours.fileno(), lambda: log.error("kept"))
        assert theirs.recv(4096).startswith(LOST % 1)


@pytest.mark.parametrize("proc", ["", HIDDEN], ids=["proc", "no proc"])
def test_a_terminal_that_is_not_read_costs_lines(terminal, proc):
    _, slave = terminal
    program = proc + (
        "for _ in range(5000): log.error('x' * 99)\n"
        "assert log._lost or len(log._writer[1]._queue) == log._THREAD_LINES_MAX\n"
        "log.finish(); print(os.get_blocking(2))"
    )
    assert in_a_child(slave, program) == "True\n"


@pytest.mark.parametrize("proc", ["", HIDDEN], ids=["proc", "no proc"])
def test_a_terminal_that_is_read_takes_every_line(terminal, proc):
    master, slave = terminal
    output = b""

    def read():
        nonlocal output
        output = read_all(master, b"last\n")

    reading = threading.Thread(target=read)
    reading.start()
    program = proc + "for n in range(20): log.error(f'line {n}')\nlog.error('last'); log.finish()"
    in_a_child(slave, program)
    reading.join(PATIENCE)
    assert output == b"".join(b"line %d\n" % number for number in range(20)) + b"last\n"


def test_a_line_that_a_terminal_takes_in_part_is_not_torn(terminal):
    master, slave = terminal
    lines = [f"{number:04d} " + "x" * 700 for number in range(1000)]

    def write():
        for line in lines:
            log.error(line)
            if log._lost:
                return
        raise AssertionError("the terminal took everything")

    with_stderr(slave, write)
    output = b""
    while not output.endswith(b"kept\n"):
        assert select.select([master], [], [], PATIENCE)[0], output[-2000:]
        output += os.read(master, 65536)
        if b"Lines lost" not in output:
            with_stderr(slave, lambda: log.error("kept"))
    got = [line for line in output.decode().splitlines() if line != "kept"]
    number = next(at for at, line in enumerate(got) if "Lines lost" in line)
    assert got[:number] == lines[:number]
    assert re.fullmatch(
        r"Lines lost here, because standard error did not take them: \d+\.", got[number]
    )


def test_a_terminal_does_not_stop_us_in_the_background(terminal):
    """With `stty tostop`, a process in the background is stopped when it writes."""
    master, slave = terminal
    attributes = tty.tcgetattr(slave)
    attributes[tty.LFLAG] |= tty.TOSTOP
    tty.tcsetattr(slave, tty.TCSANOW, attributes)
    program = (
        "import fcntl, sys, termios; from proxyd import log;"
        "log.setup({}); log.error('from the background')"
    )
    shell = "import os, subprocess, sys, termios; fcntl = __import__('fcntl'); os.setsid(); "
    shell += "fcntl.ioctl(2, termios.TIOCSCTTY, 0); "
    shell += "import signal; "
    shell += f"child = subprocess.Popen([sys.executable, '-c', {program!r}], process_group=0); "
    shell += "print(os.waitpid(child.pid, os.WUNTRACED)[1])"
    done = subprocess.run(
        [sys.executable, "-c", shell],
        stdout=subprocess.PIPE,
        stderr=slave,
        timeout=PATIENCE,
        check=True,
    )
    assert done.stdout == b"0\n"
    assert read_all(master, b"background\n") == b"from the background\n"


def test_a_line_is_written_when_no_fd_is_left():
    """A thread writes it then, which needs no further fd."""
    reader, writer = os.pipe()
    program = (
        "import resource; fds = len(os.listdir('/proc/self/fd')) - 1\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (fds, fds))\n"
        "log.error('kept'); log.finish()"
    )
    in_a_child(writer, program)
    assert read_all(reader, b"\n") == b"kept\n"
    os.close(reader)
    os.close(writer)


def test_the_thread_takes_no_signal(terminal):
    """SIGTERM is for the main thread, which may not have set its mask yet."""
    _, slave = terminal
    program = HIDDEN + (
        "log.error('x'); log.finish()\n"
        "masks = {}\n"
        "for task in os.listdir('/proc/self/task'):\n"
        "    status = open(f'/proc/self/task/{task}/status').read()\n"
        "    masks[int(task) == os.getpid()] = int(status.split('SigBlk:')[1].split()[0], 16)\n"
        "print(masks[True], bool(masks[False] & (1 << 14)))"
    )
    assert in_a_child(slave, program) == "0 True\n"


def test_a_thread_that_cannot_be_started_costs_the_line(terminal, monkeypatch):
    hide_proc(monkeypatch)

    def refused(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(log._thread, "start_new_thread", refused)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with_stderr(terminal[1], lambda: log.error("lost"))
    assert log._lost == 1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def test_the_end_waits_for_the_thread_but_not_for_a_reader(terminal):
    _, slave = terminal
    program = HIDDEN + "for _ in range(5000): log.error('x' * 99)\nlog.finish(); log.finish()"
    start = time.monotonic()
    in_a_child(slave, program)
    assert time.monotonic() - start < PATIENCE


def test_the_end_waits_for_a_thread_with_a_full_queue(terminal, monkeypatch):
    """It may not even have run yet, and the terminal may have room for all of its lines."""
    hide_proc(monkeypatch)
    monkeypatch.setattr(log._thread, "start_new_thread", lambda *_: None)
    monkeypatch.setattr(log, "_FINISH_S", 0)

    def write():
        for number in range(log._THREAD_LINES_MAX):
            log.error(str(number))
        log.finish()

    with_stderr(terminal[1], write)
    assert log._lost == 0
    assert log._writer[1]._queue[-1] == b""  # at which the thread reports that it is done


def test_another_file_in_place_of_proc_is_not_written_to(tmp_path, monkeypatch):
    """As in a chroot whose /proc is an ordinary folder."""
    really = os.open
    fake = tmp_path / "fake"
    fake.touch()
    monkeypatch.setattr(
        log.posix, "open", lambda path, *a: really(fake if "/proc/" in str(path) else path, *a)
    )
    reader, writer = os.pipe()
    fds = os.listdir("/proc/self/fd")
    with_stderr(writer, lambda: log.error("kept"))
    assert os.read(reader, 100) == b"kept\n"
    assert fake.read_bytes() == b""
    assert len(os.listdir("/proc/self/fd")) <= len(fds) + 2  # our own pipe
    os.close(reader)
    os.close(writer)


def test_a_second_thread_leaves_its_line_to_the_first(capfd, monkeypatch):
    """A thread of the resolver logs while the main thread writes."""
    put = log._put

    def slowly(data):
        if data == b"first\n":
            other = threading.Thread(target=log.error, args=["second"])
            other.start()
            other.join(PATIENCE)  # it does not wait for this thread
            assert not other.is_alive()
        return put(data)

    monkeypatch.setattr(log, "_put", slowly)
    log.error("first")
    assert capfd.readouterr().err == "first\nsecond\n"


def test_lost_lines_are_reported_at_the_end():
    reader, writer = os.pipe()
    fill(writer)
    with_stderr(writer, lambda: log.error("lost"))
    os.read(reader, 1 << 20)
    with_stderr(writer, log.finish)
    assert os.read(reader, 1 << 20).startswith(LOST % 1)
    os.close(reader)
    os.close(writer)


def test_our_own_file_description_is_closed_on_exec():
    reader, writer = os.pipe()
    with_stderr(writer, lambda: log.error("x"))
    assert fcntl.fcntl(log._writer[1]._fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(reader)
    os.close(writer)


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


def test_limited_lines(capfd, clock):
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


def test_lines_left_out_are_reported_at_the_end(capfd, clock):
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
